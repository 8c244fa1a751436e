"""Runs a trial of a sweep: starts the training command, watches its losses and records the result."""

import contextlib
import os
import subprocess
import sys
import time

from text_to_image_lora.files import write_whole
from text_to_image_lora.redaction import redact
from text_to_image_lora.reports.numbers import read_numbers

from .results import METRIC, losses_of, trial_dir
from .settings import describe_command, make_command


# In the log of a launcher, which exits with 1 if the training command exits with 2.
EXITED_WITH_2 = ("exitcode  : 2", "returned non-zero exit status 2")
STOPPED = (75, 130, 143)  # exit codes of a training run that stopped at a checkpoint and can be resumed


class Refused(Exception):
    """The training command rejects the flags of a trial; the message gives the reason."""


class StoppedItself(Exception):
    """A trial was stopped by its --max_train_time or a signal, with this exit code; it can be resumed."""


def stop_children():
    """Ends all child processes of this worker and their children, because launchers do not forward signals."""
    import psutil

    family = psutil.Process().children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for member in alive:
        member.kill()


@contextlib.contextmanager
def open_log(file):
    """Opens the log of a trial to append to it, and masks the secrets in it at the end: a launcher that fails prints its command."""
    try:
        with open(file, "ab") as log:
            yield log
    finally:
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        if redact(text) != text:
            write_whole(file, text)


def run_trial(study, settings, trial, params, lock):
    """Runs a trial until it ends or is pruned, and records the result in the study. Returns the text to print.

    Raises `Refused` if the training command rejects the trial's flags, and `StoppedItself` if the trial can be resumed.
    """
    from optuna.trial import TrialState
    from tqdm import tqdm

    number, output_dir = trial.number, trial_dir(settings["sweep_dir"], trial.number)
    output_dir.mkdir(exist_ok=True)
    command = make_command(settings, params, output_dir)
    write_whole(output_dir / "command.txt", describe_command(settings, params, output_dir) + "\n")
    with open_log(output_dir / "log.txt") as log:
        try:
            process = subprocess.Popen(
                [sys.executable, *command[1:]] if command[0] == "python" else command, stdout=log, stderr=log,
                # The training holds the lock too: if only this worker is killed, no other worker claims the trial while it trains.
                pass_fds=[lock._context.lock_file_fd] if os.name == "posix" else [],
            )  # fmt: skip
        except (OSError, ValueError) as error:  # a file of the wrong format, or a text with a NUL character
            study.tell(number, state=TrialState.FAIL)
            raise Refused(f"can't be run: {command[0]}: {getattr(error, 'strerror', None) or error}") from error
        bar = tqdm(desc=output_dir.name, unit="step", leave=False, disable=None)
        try:
            reported = set()
            while process.poll() is None:
                time.sleep(0.5)
                bar.update(read_numbers(output_dir).last_step - bar.n)
                for step, loss in losses_of(output_dir).items():
                    if settings["prune"] and step not in reported:
                        reported.add(step)
                        trial.report(loss, step)
                        if trial.should_prune():
                            stop_children()
                            process.wait()
                            study.tell(number, state=TrialState.PRUNED)
                            return f"stopped at step {step}: worse than the median"
        except BaseException:  # the trial stays unfinished, so that the same command resumes it
            stop_children()
            raise
        finally:
            bar.close()
    losses = losses_of(output_dir)
    if process.returncode in STOPPED:
        raise StoppedItself(process.returncode)
    if process.returncode or not losses:
        study.tell(number, state=TrialState.FAIL)
        lines = [line for line in (output_dir / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
        ended = f"exit code {process.returncode}" if process.returncode else "it wrote no validation loss"
        reason = lines[-1] if lines else ended
        if process.returncode == 2 or any(words in "\n".join(lines[-30:]) for words in EXITED_WITH_2):
            raise Refused(f"can't be run: {reason}")
        return f"failed: {reason} (see {output_dir / 'log.txt'})"
    study.tell(number, min(losses.values()))
    return f"{METRIC} {min(losses.values()):.4f}"

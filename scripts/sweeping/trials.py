"""One trial of a sweep: its training is started, watched, and ended."""

import contextlib
import os
import shlex
import subprocess
import sys
import time

from .results import METRIC, losses_of, trial_dir
from .settings import command_of


LAUNCHERS_SAY_2 = ("exitcode  : 2", "returned non-zero exit status 2")  # and end with 1 themselves
STOPPED = (75, 130, 143)  # the training's exit codes where it stopped at a checkpoint to go on from


class Refused(Exception):
    """The training command doesn't take a trial's flags; says why."""


class StoppedItself(Exception):
    """A trial was stopped, by its --max_train_time or a signal, with this exit code; it is as it was under way."""


def stop_children():
    """Ends what this worker has started, and what that has started: a launcher doesn't pass a signal on."""
    import psutil

    family = psutil.Process().children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for member in alive:
        member.kill()


def run_trial(study, settings, trial, params, lock):
    """Runs a trial to its end and tells the study; a trial that is pruned is stopped. Returns what to print.

    Raises `Refused` where the training command doesn't take its flags.
    """
    from optuna.trial import TrialState

    number, output_dir = trial.number, trial_dir(settings["sweep_dir"], trial.number)
    output_dir.mkdir(exist_ok=True)
    command = command_of(settings, params, output_dir)
    (output_dir / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
    with open(output_dir / "log.txt", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command[1:]] if command[0] == "python" else command, stdout=log, stderr=log,
            # Held by the training too: where this worker alone is killed, nobody else takes the trial until it has ended.
            pass_fds=[lock._context.lock_file_fd] if os.name == "posix" else [],
        )  # fmt: skip
        try:
            reported = set()
            while process.poll() is None:
                time.sleep(0.5)
                for step, loss in losses_of(output_dir).items():
                    if settings["prune"] and step not in reported:
                        reported.add(step)
                        trial.report(loss, step)
                        if trial.should_prune():
                            stop_children()
                            process.wait()
                            study.tell(number, state=TrialState.PRUNED)
                            return f"stopped at step {step}: worse than the median"
        except BaseException:  # the trial stays unfinished, for the same command to go on with
            stop_children()
            raise
    losses = losses_of(output_dir)
    if process.returncode in STOPPED:
        raise StoppedItself(process.returncode)
    if process.returncode or not losses:
        study.tell(number, state=TrialState.FAIL)
        lines = [line for line in (output_dir / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {process.returncode}"
        if process.returncode == 2 or any(words in "\n".join(lines[-30:]) for words in LAUNCHERS_SAY_2):
            raise Refused(f"can't be run: {reason}")
        return f"failed: {reason} (see {output_dir / 'log.txt'})"
    study.tell(number, min(losses.values()))
    return f"{METRIC} {min(losses.values()):.4f}"

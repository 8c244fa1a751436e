#!/usr/bin/env python
"""Trains with many settings and ranks them by the loss on pictures held out.

    python scripts/sweep.py sweep.yaml
    python scripts/sweep.py --sweep_dir sweeps/rank --sweep rank=4,16 train_batch_size=1,4 learning_rate=1e-4..1e-2 \\
        --sampler tpe --num_trials 20 --flags pretrained_model_name_or_path=models/mini-sd train_data_dir=metadata/weapons \\
        resolution=128 validation_split=0.1 validation_steps=50 max_train_steps=300

The trials are Optuna's (https://optuna.org), kept in the sweep's folder. The same command goes on where a sweep stopped:
trials that are done stay done, one that was cut off goes on from its checkpoint. Started several times, on one machine or
on several that share the folder, the workers divide the trials among them; give each its GPU by CUDA_VISIBLE_DEVICES.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from scripts.sweeping import results
from scripts.sweeping.results import METRIC, losses_of, shown, trial_dir
from scripts.sweeping.settings import SAMPLERS, SweepError, command_of, settle
from text_to_image_lora import log
from text_to_image_lora.reports.report_page import FILE as PAGE
from text_to_image_lora.reports.report_page import update_page


LAUNCHERS_SAY_2 = ("exitcode  : 2", "returned non-zero exit status 2")  # and end with 1 themselves
MOST_REFUSED = 3  # trials, before the sweep ends because not one can be run


STOPPED = (75, 130, 143)  # the training's exit codes where it stopped at a checkpoint to go on from


class Refused(Exception):
    """The training command doesn't take a trial's flags; says why."""


class StoppedItself(Exception):
    """A trial was stopped, by its --max_train_time or a signal, with this exit code; it is as it was under way."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="YAML file with the keys sweep, flags, and any of the options below")
    add("--sweep_dir", type=Path, help="folder of the sweep: trials, tables, pictures")
    add("--sweep", nargs="+", metavar="FLAG=VALUES", help="flags to vary: rank=4,16 or learning_rate=1e-4..1e-2 (log)")
    add("--flags", nargs="+", metavar="FLAG=VALUE", help="flags that are the same in all trials; true switches one on")
    add(
        "--sampler", choices=SAMPLERS, help="grid: all combinations (the default); random; tpe: learns from the trials"
    )
    add("--num_trials", type=int, help="how many trials random and tpe make (20)")
    add("--prune", action="store_true", default=None, help="stop trials that are worse than the median of the others")
    add("--launcher", help="what starts the training script (this Python); such as 'accelerate launch --multi_gpu'")
    add("--seed", type=int, help="of the sampler (0)")
    return parser.parse_args(argv)


def sampler_of(settings, num_trials):
    """The sampler for the next trial: a new one, or the workers of a sweep would all draw the same."""
    import optuna

    seed = settings["seed"] * 1_000_003 + num_trials
    if settings["sampler"] == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def open_study(settings):
    """The study in the sweep's folder; at its first opening a grid's trials are put in the queue."""
    import itertools

    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(settings["sweep_dir"])
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "trials.log"))),
        study_name="sweep",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3) if settings["prune"] else optuna.pruners.NopPruner(),
    )
    described = json.dumps({key: settings[key] for key in ("sampler", "sweep", "flags")}, sort_keys=True, default=str)
    before = study.user_attrs.get("settings")
    if before is None:
        if settings["sampler"] == "grid":
            for values in itertools.product(*settings["sweep"].values()):
                study.enqueue_trial(dict(zip(settings["sweep"], values, strict=True)), skip_if_exists=True)
        study.set_user_attr("settings", described)  # last: a kill before it leaves a queue that is filled up again
    elif before != described:
        raise SweepError(f"{folder}: it holds another sweep. Name another --sweep_dir for this one.")
    else:
        try_again(study)
    return study


def try_again(study):
    """Puts trials that failed, and of whose settings no other is under way or done, in the queue once more."""
    from optuna.trial import TrialState

    params = {False: [], True: []}
    for trial in study.get_trials(deepcopy=False):
        values = trial.system_attrs.get("fixed_params", {}) | trial.params
        params[trial.state == TrialState.FAIL].append(values)
    for values in params[True]:
        if values not in params[False]:
            study.enqueue_trial(values)
            params[False].append(values)


def suggest(trial, sweep):
    """The values of the varied flags; for a trial that has them already, those."""
    for key, values in sweep.items():
        if isinstance(values, list):
            trial.suggest_categorical(key, values)
        elif isinstance(values["min"], int) and isinstance(values["max"], int):
            trial.suggest_int(key, values["min"], values["max"], log=bool(values.get("log")))
        else:
            trial.suggest_float(key, values["min"], values["max"], log=bool(values.get("log")))
    return trial.params


def claim(study, settings):
    """The next trial for this worker, as Optuna's `Trial`, and its lock; None where all are taken.

    A trial that was running when its worker was stopped has no lock any more, and is taken first.
    """
    import optuna
    from filelock import FileLock, Timeout
    from optuna.trial import TrialState

    def lock_of(number):
        lock = FileLock(f"{trial_dir(settings['sweep_dir'], number)}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    with FileLock(Path(settings["sweep_dir"]) / "sweep.lock"):
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state != TrialState.RUNNING or (lock := lock_of(trial.number)) is None:
                continue
            if (
                study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING
            ):  # still, now that it is ours
                return optuna.trial.Trial(study, trial._trial_id), lock
            lock.release()
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        made = sum(trial.state != TrialState.WAITING for trial in trials)
        if not waiting and (settings["sampler"] == "grid" or made >= settings["num_trials"]):
            return None
        study.sampler = sampler_of(settings, len(trials))
        trial = study.ask()
        suggest(trial, settings["sweep"])
        return trial, lock_of(trial.number)


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


def has_result(study):
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def write_results(study, settings):
    """results.csv, results.md and pictures.png in the sweep's folder; returns what to print."""
    folder, varied = Path(settings["sweep_dir"]), list(settings["sweep"])
    rows = results.rank(study.get_trials(deepcopy=False), folder, varied)

    def again(params):
        return shlex.join(command_of(settings, params, f"{folder.name}-best"))

    return results.write(rows, folder, varied, again)


def main(argv=None):
    log.start()
    settings = settle(parse_args(argv))
    folder = Path(settings["sweep_dir"])
    try:
        import optuna  # noqa: F401
        from filelock import FileLock
    except ImportError as error:
        raise SweepError("A sweep needs Optuna. Run: pip install -r requirements.txt") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{folder}: it can't be made ({error.strerror}). Pass another --sweep_dir.") from error
    with FileLock(folder / "open.lock"):
        study = open_study(settings)
    refused = []
    while (claimed := claim(study, settings)) is not None:
        trial, lock = claimed
        params = suggest(trial, settings["sweep"])
        print(
            f"trial {trial.number}: {' '.join(f'{key}={shown(value)}' for key, value in params.items())}", flush=True
        )
        try:
            outcome = run_trial(study, settings, trial, params, lock)
        except Refused as error:
            outcome = str(error)
            refused.append(f"trial {trial.number}: {outcome}")
        except StoppedItself as stopped:
            print(
                f"trial {trial.number}: stopped at a checkpoint; run the same command again to go on", file=sys.stderr
            )
            sys.exit(stopped.args[0])
        lock.release()
        print(f"trial {trial.number}: {outcome}", flush=True)
        if len(refused) == MOST_REFUSED and not has_result(study):
            break
    print("\n" + write_results(study, settings))
    if has_result(study) and update_page(folder, of_several=True):
        print(f"\nall of it, to look at: {folder / PAGE}")
    if refused and not has_result(study):
        raise SweepError(refused[0])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        main()
    except SweepError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        stop_children()  # one may have been about to start
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)

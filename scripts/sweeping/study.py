"""Opens the Optuna study of a sweep, and claims trials for a worker."""

import itertools
import json
import os
import statistics
import sys
from pathlib import Path

from .results import trial_dir
from .settings import SweepError, without_secrets


def make_sampler(settings, num_trials):
    """Creates the sampler of the next trial, seeded by its number so that workers do not draw equal values."""
    import optuna

    seed = (settings["seed"] * 1_000_003 + num_trials) % 2**32  # the largest seed of Optuna's samplers
    if settings["sampler"] == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def drop_unfinished_line(journal):
    """Removes the last line of Optuna's journal if a full disk or a power cut left it unfinished; returns whether it did.

    Optuna would write its next line behind it, and could then read neither. The caller holds the lock of the journal.
    """
    content = journal.read_bytes() if journal.exists() else b""
    start = content.rfind(b"\n", 0, -1) + 1  # of the last line
    if not content or _is_whole(content[start:]):
        return False
    os.truncate(journal, start)
    return True


def _is_whole(line):
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:  # also NUL bytes, which some file systems leave after a power cut
        return False


def open_journal(journal):
    """Opens Optuna's journal without an unfinished last line; raises `SweepError` if another line is broken."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(journal))

    def mend():
        lock.acquire()  # another worker may be in the middle of a line
        try:
            return drop_unfinished_line(journal)
        finally:
            lock.release()

    class Backend(JournalFileBackend):
        def append_logs(self, logs):
            mend()  # another worker may have been killed in the middle of a line
            super().append_logs(logs)

    if mend():
        print(f"{journal}: the unfinished last line was removed (the disk was full, or the power was cut)", flush=True)
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    for number, line in enumerate(lines, start=1):
        if not _is_whole(line + b"\n") and number < len(lines):
            raise SweepError(
                f"{journal}:{number}: the line is broken. Restore the file from a backup, or pass another --sweep_dir."
            )
    return JournalStorage(Backend(str(journal)))


def open_study(settings):
    """Opens the study in the sweep's folder; the first opening enqueues all trials of a grid."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(settings["sweep_dir"])
    study = optuna.create_study(
        storage=open_journal(folder / "trials.log"),
        study_name="sweep",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3) if settings["prune"] else optuna.pruners.NopPruner(),
    )
    described = describe(settings)
    before = study.user_attrs.get("settings")
    if before is None:
        if settings["sampler"] == "grid":
            for values in itertools.product(*settings["sweep"].values()):
                study.enqueue_trial(dict(zip(settings["sweep"], values, strict=True)), skip_if_exists=True)
        study.set_user_attr(
            "settings", described
        )  # last, so that after a kill before this line the queue is completed
    elif describe(json.loads(before)) != described:
        raise SweepError(f"{folder}: it contains another sweep. Pass another --sweep_dir for this one.")
    else:
        if before != describe(json.loads(before)):
            print(
                f"{folder / 'trials.log'}: an earlier version wrote a token into it. Revoke the token.",
                file=sys.stderr,
            )
        enqueue_failed(study)
    return study


def describe(settings):
    """Returns what makes two sweeps equal as JSON, without secrets. A token can be replaced while a sweep runs."""
    described = {key: settings[key] for key in ("sampler", "sweep")} | {"flags": without_secrets(settings["flags"])}
    return json.dumps(described, sort_keys=True, default=str)


def enqueue_failed(study):
    """Enqueues failed trials again, unless another trial with equal settings is waiting, running or finished."""
    from optuna.trial import TrialState

    failed, others = [], []
    for trial in study.get_trials(deepcopy=False):
        values = trial.system_attrs.get("fixed_params", {}) | trial.params
        (failed if trial.state == TrialState.FAIL else others).append(values)
    for values in failed:
        if values not in others:
            study.enqueue_trial(values)
            others.append(values)


def suggest(trial, sweep):
    """Returns the values of the varied flags for a trial; a trial that already has values keeps them."""
    for key, values in sweep.items():
        if isinstance(values, list):
            trial.suggest_categorical(key, values)
        elif isinstance(values["min"], int) and isinstance(values["max"], int):
            trial.suggest_int(key, values["min"], values["max"], log=bool(values.get("log")))
        else:
            trial.suggest_float(key, values["min"], values["max"], log=bool(values.get("log")))
    return trial.params


def claim(study, settings):
    """Returns the next trial for this worker, as Optuna's `Trial`, and its lock; None if no trial is left.

    A trial whose worker was stopped is marked as running but is not locked; these trials are claimed first.
    """
    import optuna
    from filelock import FileLock, Timeout
    from optuna.trial import TrialState

    def acquire_lock(number):
        lock = FileLock(f"{trial_dir(settings['sweep_dir'], number)}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    with FileLock(Path(settings["sweep_dir"]) / "sweep.lock"):
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state != TrialState.RUNNING or (lock := acquire_lock(trial.number)) is None:
                continue
            now = study.get_trials(deepcopy=False)[trial.number].state
            if now == TrialState.RUNNING:  # it may have ended before its lock was acquired
                return optuna.trial.Trial(study, trial._trial_id), lock
            lock.release()
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        made = sum(trial.state != TrialState.WAITING for trial in trials)
        if not waiting and (settings["sampler"] == "grid" or made >= settings["num_trials"]):
            return None
        study.sampler = make_sampler(settings, len(trials))
        trial = study.ask()
        suggest(trial, settings["sweep"])
        return trial, acquire_lock(trial.number)


def describe_progress(study, settings, number):
    """Returns the place of a trial that begins, such as "trial 2 of 4, about 12 min left".

    The time that is left includes this trial. It is estimated from the trials that are complete, and from the number of
    trials that run at the same time.
    """
    from optuna.trial import TrialState

    from text_to_image_lora.reports.progress import format_duration  # imports tqdm, which `log.start` has to precede

    trials = study.get_trials(deepcopy=False)
    ended = [trial for trial in trials if trial.state.is_finished()]
    waiting = sum(trial.state == TrialState.WAITING for trial in trials)
    begun = len(trials) - waiting
    to_come = waiting if settings["sampler"] == "grid" else max(waiting, settings["num_trials"] - begun)
    total = begun + to_come
    place = sum(trial.number <= number for trial in trials if trial.state != TrialState.WAITING)
    seconds = [trial.duration.total_seconds() for trial in ended if trial.state == TrialState.COMPLETE]
    if not seconds:
        return f"trial {place} of {total}"
    running = max(begun - len(ended), 1)
    left = statistics.median(seconds) * (total - len(ended)) / running
    return f"trial {place} of {total}, about {format_duration(left)} left"


def running_elsewhere(study):
    """Returns the numbers of the trials that other processes train: other workers, or what a killed worker left running."""
    from optuna.trial import TrialState

    return [trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]


def all_failed(study):
    """Whether trials failed, none has a result, and none is running, also by other workers."""
    from optuna.trial import TrialState

    states = {trial.state for trial in study.get_trials(deepcopy=False)} - {TrialState.WAITING}
    return states == {TrialState.FAIL}


def has_result(study):
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))

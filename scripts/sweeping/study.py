"""The study of a sweep: which trials there are, and which one a worker takes next."""

import itertools
import json
from pathlib import Path

from .results import trial_dir
from .settings import SweepError


def sampler_of(settings, num_trials):
    """The sampler for the next trial: a new one, or the workers of a sweep would all draw the same."""
    import optuna

    seed = settings["seed"] * 1_000_003 + num_trials
    if settings["sampler"] == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def open_study(settings):
    """The study in the sweep's folder; at its first opening a grid's trials are put in the queue."""
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

    failed, others = [], []
    for trial in study.get_trials(deepcopy=False):
        values = trial.system_attrs.get("fixed_params", {}) | trial.params
        (failed if trial.state == TrialState.FAIL else others).append(values)
    for values in failed:
        if values not in others:
            study.enqueue_trial(values)
            others.append(values)


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
            now = study.get_trials(deepcopy=False)[trial.number].state
            if now == TrialState.RUNNING:  # still, now that it is ours
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


def has_result(study):
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))

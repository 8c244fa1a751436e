"""What a sweep says of its progress."""

from datetime import datetime, timedelta

import pytest

from scripts.sweeping.study import describe_progress


optuna = pytest.importorskip("optuna")


@pytest.fixture
def study():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study()


def add(study, state, seconds=None):
    """Adds a trial in this state, which took so many seconds."""
    begun = datetime(2030, 1, 1)
    ended = None if seconds is None else begun + timedelta(seconds=seconds)
    trial = optuna.trial.create_trial(state=state, value=0.5 if state == COMPLETE else None)
    trial.datetime_start, trial.datetime_complete = begun, ended
    study.add_trial(trial)


COMPLETE, RUNNING, WAITING, FAIL = (
    optuna.trial.TrialState[name] for name in ("COMPLETE", "RUNNING", "WAITING", "FAIL")
)


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([RUNNING, WAITING, WAITING, WAITING], "trial 1 of 4"),
        ([COMPLETE, RUNNING, WAITING, WAITING], "trial 2 of 4, about 15 min left"),
        ([COMPLETE, COMPLETE, COMPLETE, RUNNING], "trial 4 of 4, about 5 min left"),
        ([COMPLETE, RUNNING, RUNNING, WAITING], "trial 3 of 4, about 8 min left"),  # two workers
        ([FAIL, RUNNING, WAITING], "trial 2 of 3"),  # how long a failed trial took says nothing
    ],
)
def test_a_grid_says_which_trial_begins_and_how_long_the_rest_takes(study, states, words):
    for state in states:
        add(study, state, 300 if state in (COMPLETE, FAIL) else None)
    number = max(number for number, state in enumerate(states) if state == RUNNING)
    assert describe_progress(study, {"sampler": "grid", "num_trials": 20}, number) == words


def test_a_search_counts_the_trials_that_it_will_make(study):
    add(study, COMPLETE, 100)
    add(study, RUNNING)
    assert describe_progress(study, {"sampler": "tpe", "num_trials": 20}, 1) == "trial 2 of 20, about 32 min left"

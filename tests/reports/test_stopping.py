"""What is said of a run by its tables of validation losses: pure arithmetic, on tables made by hand."""

import numpy as np
import pytest

from text_to_image_lora.reports.stopping import Validation, difference, in_words, relative, take_in, values_of


def table_of(factor, pictures=5, noise=0.0, seed=0):
    """Losses from 1 to 0.002 over the timesteps, as they are, times a factor, with noise in each."""
    losses = np.geomspace(1, 0.002, 8) * np.ones((pictures, 1))
    return losses * (factor + noise * np.random.default_rng(seed).standard_normal(losses.shape))


@pytest.fixture
def fresh():
    return Validation(base=table_of(1).tolist(), base_probe=table_of(1).tolist(), best=table_of(1).tolist())


def test_every_timestep_counts_alike():
    table = table_of(1)
    table[:, -1] *= 0.5
    assert relative(table, table_of(1)) == pytest.approx([1] * 7 + [0.5])
    assert difference(table, table_of(1), table_of(1))[0] == pytest.approx(-0.5 / 8)


def test_the_difference_is_paired():
    """Pictures that are hard make no error, as long as they are as hard as before."""
    base = table_of(1, noise=0.3)
    mean, error = difference(base * 0.9, base, base)
    assert mean == pytest.approx(-0.1)
    assert error < 0.01
    pairs = ((base * 0.9 - base) / base.mean(axis=0)).ravel()
    assert error == pytest.approx(pairs.std(ddof=1) / np.sqrt(40))


def test_an_improvement_is_more_than_a_standard_error(fresh):
    lucky = table_of(0.999, noise=0.1, seed=1)
    mean, error = difference(lucky, fresh.base, fresh.base)
    assert abs(mean) < error
    assert not take_in(fresh, lucky, 1)
    assert (fresh.best_step, fresh.waited) == (None, 1)
    assert take_in(fresh, table_of(0.9, noise=0.1, seed=1), 2)
    assert (fresh.best_step, fresh.waited) == (2, 0)


def test_overfitting_since_is_the_first_of_all_that_were_worse(fresh):
    for step, factor in enumerate((0.9, 0.8, 0.85, 0.8, 0.9, 0.95), start=1):
        take_in(fresh, table_of(factor), step)
    assert (fresh.best_step, fresh.waited, fresh.worse_since) == (2, 4, 5)
    assert in_words(fresh, 6) == (
        "Validation: best at step 2, 20.0% below the base model's loss; overfitting since step 5: use best/, or train for "
        "fewer steps."
    )
    take_in(fresh, table_of(0.7), 7)
    assert fresh.worse_since is None
    assert "best at step 7, 30.0%" in in_words(fresh, 7)
    assert "still improving" in in_words(fresh, 7)
    take_in(fresh, table_of(0.7, noise=1e-9), 8)
    assert in_words(fresh, 8).endswith("no clear change since.")


def test_a_run_that_never_helps_is_told(fresh):
    take_in(fresh, table_of(1.2), 1)
    assert "no step was better than the base" in in_words(fresh, 1)


def test_the_gap_is_between_held_out_and_trained_on(fresh):
    values = values_of(table_of(0.9), table_of(0.5), fresh, range(8))
    assert values["validation/relative_loss"] == pytest.approx(0.9)
    assert values["validation/relative_loss_in_training"] == pytest.approx(0.5)
    assert values["validation/gap"] == pytest.approx(0.4)
    assert values["validation/loss"] == pytest.approx(table_of(0.9).mean())
    assert [values[f"validation/relative_loss_t000{k}"] for k in range(8)] == pytest.approx([0.9] * 8)


def test_a_lora_to_begin_with_may_be_the_best(fresh):
    """Its loss is that of step 0: nothing was waited for yet, and what comes later must be better than it."""
    assert take_in(fresh, table_of(0.8), 0)
    assert not take_in(fresh, table_of(0.9), 1)
    assert (fresh.best_step, fresh.waited, fresh.worse_since) == (0, 1, 1)
    assert in_words(fresh, 1).startswith(
        "Validation: best before the first step, 20.0% below the base model's loss; overfitting"
    )


def test_a_lora_to_begin_with_that_is_worse_than_the_base_is_not_waited_for(fresh):
    assert not take_in(fresh, table_of(1.2), 0)
    assert (fresh.best_step, fresh.waited, fresh.worse_since) == (None, 0, None)

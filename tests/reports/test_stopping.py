"""How a run is judged by its validation losses, on tables made by hand."""

from dataclasses import asdict

import numpy as np
import pytest

from text_to_image_lora.reports.stopping import (
    Validation,
    Verdict,
    describe,
    describe_early_stop,
    difference,
    make_metrics,
    relative,
    summarize,
    update_best,
)


def table_of(factor, pictures=5, noise=0.0, seed=0):
    """Realistic losses, from 1 to 0.002 over the timesteps, multiplied by a factor plus noise."""
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
    """Differences between pictures add no error, as each picture is compared with itself."""
    base = table_of(1, noise=0.3)
    mean, error = difference(base * 0.9, base, base)
    assert mean == pytest.approx(-0.1)
    assert error < 0.01
    of_each = ((base * 0.9 - base) / base.mean(axis=0)).mean(
        axis=1
    )  # five pictures: Student's t for four degrees of freedom
    assert error == pytest.approx(1.14 * of_each.std(ddof=1) / np.sqrt(5))


def test_a_pictures_timesteps_are_one_observation():
    """They are correlated, so more timesteps do not reduce the error, but more pictures do."""
    base, shift = np.ones((20, 8)), np.random.default_rng(0).standard_normal((20, 1))
    mean, error = difference(base + 0.1 * shift, base, base)
    assert error == pytest.approx(0.1 * shift.std(ddof=1) / np.sqrt(20))
    assert error == pytest.approx(difference((base + 0.1 * shift)[:, :1], base[:, :1], base[:, :1])[1])
    assert (
        difference(np.tile(base + 0.1 * shift, (4, 1)), np.tile(base, (4, 1)), np.tile(base, (4, 1)))[1] < 0.6 * error
    )


@pytest.mark.parametrize("pictures", [2, 3, 5, 10])
def test_the_error_of_few_pictures_is_as_sure_as_that_of_many(pictures):
    """In a simulation without a change, the mean is below one standard error in 84% of the runs."""
    rng, base = np.random.default_rng(pictures), np.ones((pictures, 1))
    found = [difference(base + rng.standard_normal((pictures, 1)), base, base) for _ in range(4000)]
    assert np.mean([mean < error for mean, error in found]) == pytest.approx(0.8413, abs=0.02)


def test_a_single_picture_uses_its_timesteps_as_observations():
    base = np.ones((1, 8))
    table = base + 0.1 * np.array([[1, 1, 1, 1, 1, 1, 1, 9]])
    mean, error = difference(table, base, base)
    assert (mean, error) == pytest.approx((0.2, 1.08 * 0.1))  # seven degrees of freedom, deviation sqrt(8) x 0.1
    assert np.isfinite(difference(base, base, base)).all()


def test_timesteps_that_move_together_are_no_overfitting(fresh):
    """Four of five pictures improve and one gets much worse, which would be significant for 40 independent observations."""
    update_best(fresh, table_of(0.8), 1)
    shifts = np.array([0.75, 0.78, 0.79, 0.79, 1.0])
    table = table_of(1) * (shifts[:, None] + 0.005 * np.random.default_rng(0).standard_normal((5, 8)))
    pairs = ((table - table_of(0.8)) / table_of(1)).ravel()
    assert pairs.mean() > pairs.std(ddof=1) / np.sqrt(40) > 0  # significant if all 40 were independent
    update_best(fresh, table, 2)
    assert (fresh.best_step, fresh.worse_since) == (1, None)
    assert summarize(fresh, 2).endswith("no clear change since.")
    update_best(fresh, table_of(0.82), 3)  # all pictures a little worse is significant
    assert fresh.worse_since == 3


def test_a_mean_within_one_standard_error_changes_nothing(fresh):
    update_best(fresh, table_of(0.8), 1)
    shifts = np.array([0.75, 0.78, 0.79, 0.80, 0.90])[:, None]
    mean, error = difference(table_of(1) * shifts, fresh.best, fresh.base)
    assert 0 < mean < error
    update_best(fresh, table_of(1) * shifts, 2)
    assert (fresh.waited, fresh.worse_since) == (1, None)
    update_best(fresh, table_of(0.9), 3)
    assert fresh.worse_since == 3
    update_best(fresh, table_of(1) * shifts, 4)
    assert fresh.worse_since is None


def test_a_mean_that_still_falls_is_the_best_and_says_how_sure_it_is(fresh):
    """Each picture counts once: the losses of these pictures fall on the whole, by less than one standard error each time."""
    shifts = np.array(
        [[0.90, 0.95, 0.93, 0.94, 0.935], [0.97, 0.82, 0.80, 0.93, 0.835], [0.80, 0.85, 0.95, 0.83, 0.875]]
    )
    assert list(shifts.mean(axis=1)) == pytest.approx([0.931, 0.871, 0.861])
    for step, of_each in zip((6, 12, 18), shifts):
        before = fresh.best
        assert update_best(fresh, table_of(1) * of_each[:, None], step)
        assert (fresh.best_step, fresh.waited) == (step, 0)
    mean, error = difference(fresh.best, before, fresh.base)
    assert -error < mean < 0
    assert fresh.sure_step == 12
    loss_of_base = difference(fresh.best, fresh.base, fresh.base)
    assert summarize(fresh, 18) == (
        f"Validation: best at step 18, 13.9 ± {100 * loss_of_base[1]:.1f}% below the base model's loss (the lowest loss, but "
        "not surely lower than that of step 12); still improving at the end: more steps may help."
    )


@pytest.mark.parametrize(
    ("factors", "best_step", "waited"),
    [
        ((0.999, 0.998, 0.997), 3, 0),  # each a little lower
        ((0.9, 0.9, 0.8999), 3, 0),  # equal is not lower, and a hair below is
        ((0.9, 0.9, 0.9), 1, 2),
        ((0.9, 0.95, 0.91), 1, 2),  # lower than the one before, but not the lowest
        ((1.1, 1.05, 1.01), None, 3),
    ],
)
def test_patience_counts_validations_that_are_not_the_lowest(fresh, factors, best_step, waited):
    for step, factor in enumerate(factors, 1):
        update_best(fresh, table_of(factor), step)
    assert (fresh.best_step, fresh.waited) == (best_step, waited)


def test_a_gain_that_may_be_chance_is_called_so(fresh):
    lucky = table_of(0.999, noise=0.1, seed=1)
    mean, error = difference(lucky, fresh.base, fresh.base)
    assert abs(mean) < error
    lucky = np.asarray(fresh.base) - np.sign(mean) * (lucky - fresh.base)  # with a mean below the base model's
    assert update_best(fresh, lucky, 1)
    assert (fresh.best_step, fresh.sure_step) == (1, None)
    assert f"{100 * abs(mean):.1f} ± {100 * error:.1f}% below the base model's loss, which may be chance" in summarize(
        fresh, 1
    )
    assert update_best(fresh, table_of(0.5), 2)
    assert (fresh.best_step, fresh.sure_step) == (2, 2)
    assert "chance" not in summarize(fresh, 2)
    assert "surely" not in summarize(fresh, 2)


def test_a_checkpoint_of_an_earlier_version_is_continued(fresh):
    """There, the best step was always a sure one."""
    update_best(fresh, table_of(0.8), 3)
    stored = asdict(fresh)
    del stored["sure"], stored["sure_step"]
    again = Validation(**stored)
    assert (again.sure, again.sure_step) == (fresh.best, 3)


def test_before_the_first_validation_nothing_is_judged(fresh):
    assert summarize(fresh, 0) == "Validation: not judged yet: so far, only the base model was validated."


def test_an_early_stop_says_why():
    assert describe_early_stop(18, 36, 3) == (
        "stopped early at step 18 of 36: the loss of 3 validations in a row was not lower than before "
        "(--early_stopping_patience 3). To continue, run the same command again with a higher patience."
    )
    assert "the loss of one validation was" in describe_early_stop(18, 36, 1)


def test_overfitting_since_is_the_first_of_all_that_were_worse(fresh):
    for step, factor in enumerate((0.9, 0.8, 0.85, 0.8, 0.9, 0.95), start=1):
        update_best(fresh, table_of(factor), step)
    assert (fresh.best_step, fresh.waited, fresh.worse_since) == (2, 4, 5)
    assert summarize(fresh, 6) == (
        "Validation: best at step 2, 20.0 ± 0.0% below the base model's loss; overfitting since step 5: use best/, or train for "
        "fewer steps."
    )
    update_best(fresh, table_of(0.7), 7)
    assert fresh.worse_since is None
    assert "best at step 7, 30.0 ± 0.0%" in summarize(fresh, 7)
    assert "still improving" in summarize(fresh, 7)
    update_best(fresh, table_of(0.7), 8)
    assert summarize(fresh, 8).endswith("no clear change since.")


def test_a_run_that_never_improves_is_reported(fresh):
    update_best(fresh, table_of(1.2), 1)
    assert "no step up to 1 was better than the base model" in summarize(fresh, 1)


def test_the_gap_is_between_held_out_and_trained_on(fresh):
    values = make_metrics(table_of(0.9), table_of(0.5), fresh, range(8))
    assert values["validation/relative_loss"] == pytest.approx(0.9)
    assert values["validation/relative_loss_in_training"] == pytest.approx(0.5)
    assert values["validation/gap"] == pytest.approx(0.4)
    assert values["validation/loss"] == pytest.approx(table_of(0.9).mean())
    assert [values[f"validation/relative_loss_t000{k}"] for k in range(8)] == pytest.approx([0.9] * 8)


def test_a_lora_to_begin_with_may_be_the_best(fresh):
    """Its loss counts as that of step 0, which later steps must improve on."""
    assert update_best(fresh, table_of(0.8), 0)
    assert not update_best(fresh, table_of(0.9), 1)
    assert (fresh.best_step, fresh.waited, fresh.worse_since) == (0, 1, 1)
    assert not update_best(fresh, table_of(0.9), 2)
    assert summarize(fresh, 2).startswith(
        "Validation: best before the first step, 20.0 ± 0.0% below the base model's loss; overfitting since step 1"
    )


def test_one_validation_that_is_worse_announces_no_overfitting(fresh):
    """The last validation of an improving run may by chance be worse by a little more than one standard error."""
    update_best(fresh, table_of(0.8), 1)
    update_best(fresh, table_of(0.81), 2)
    assert (fresh.waited, fresh.worse_since) == (1, 2)
    assert summarize(fresh, 2).endswith("no clear change since.")
    update_best(fresh, table_of(0.82), 3)
    assert "overfitting since step 2" in summarize(fresh, 3)


def test_a_lora_to_begin_with_that_is_worse_than_the_base_is_not_waited_for(fresh):
    assert not update_best(fresh, table_of(1.2), 0)
    assert (fresh.best_step, fresh.waited, fresh.worse_since) == (None, 0, None)


@pytest.mark.parametrize(("waited", "since"), [(0, None), (1, None), (2, 8), (5, 8)])
def test_a_single_worse_validation_is_no_overfitting(waited, since):
    verdict = Verdict(10, 6, 7.0, 1.0, 6, 8, waited)
    assert verdict.overfits_since == since
    assert ("overfitting since step 8" in describe(verdict)) == (since is not None)

"""Decides from the validation losses of a run which step was best, whether it still improves, and since when it overfits.

Losses are compared relative to the base model's loss at the same timestep. Raw losses span three orders of magnitude over
the timesteps, so that their mean would depend on the least noisy timesteps alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from ..small_files import Values


# {degrees of freedom: Student's t at 84.13%}; the normal distribution has 1 there.
STUDENT_T = {1: 1.84, 2: 1.32, 3: 1.20, 4: 1.14, 5: 1.11, 6: 1.09, 7: 1.08, 8: 1.07, 9: 1.06}


HIGH_DRIFT = 0.1  # three times that of the preserved runs in docs/findings.md, and a fifth of that of the plain ones


@dataclass
class Validation:
    """The state of validation that checkpoints store. Tables of losses are lists of shape (pictures, timesteps)."""

    base: list = field(repr=False)  # of the base model on the held-out pictures
    base_probe: list = field(repr=False)  # of the base model on equally many training pictures
    best: list = field(repr=False)  # of the best step, which has the lowest loss, or of the base model
    best_step: int | None = None  # None: no step was better than the base model; 0: the LoRA that the run started from
    waited: int = 0  # validations since the best step
    pictures: list = field(default_factory=list, repr=False)  # hashes of the two `ValidationSet`s
    worse_since: int | None = None  # first step from which on every validation was clearly worse than the best
    sure: list = field(default_factory=list, repr=False)  # of the sure step, or of the base model
    sure_step: int | None = (
        None  # last best step that was better than the sure step before by more than one standard error
    )
    best_drift: float | None = None  # of the best step, see `Judge`; None if the concept is not known

    def __post_init__(self):
        if not self.sure:
            self.sure, self.sure_step = self.best, self.best_step


TABLES = ("base", "best", "sure", "base_probe")
STEPS = ("best_step", "waited", "worse_since", "sure_step")


def restore(state: dict) -> Validation:
    """Returns the `Validation` that a checkpoint stores; raises `InputError` if values are of the wrong types."""
    values = Values(state, "the checkpoint's state of the validation", "Resume from another checkpoint.")
    if odd := values.keys() - {each.name for each in fields(Validation)}:
        raise values.refusal(f"'{min(odd)}' is an unknown entry")
    tables = [values.want(name, list, []) for name in TABLES]
    rows = [row for table in tables for row in table]
    whole = all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
    if not whole or not tables[0] or not all(isinstance(loss, float) for row in rows for loss in row):
        raise values.refusal("the tables of losses are no tables of numbers")
    if any(len(table) not in (0, len(tables[0])) for table in tables[:3]):
        raise values.refusal("the tables of losses have different sizes")
    for name in STEPS:
        values.want(name, int, 0 if name == "waited" else None)
    values.want("best_drift", float, None)
    return Validation(**values)


class Verdict(NamedTuple):
    """What the validations of a run say up to a step."""

    step: int  # of the last validation
    best_step: int | None
    gain: float  # by how many percent the best step's loss is below the base model's
    error: float | None  # standard error of the gain; None: a metrics file of an earlier version does not have it
    sure_step: int | None
    worse_since: int | None
    waited: int
    drift: float | None = None  # of the best step
    max_drift: float | None = None  # which the best step must not exceed

    @property
    def overfits_since(self) -> int | None:
        """The step since which the run overfits; a single worse validation may be chance."""
        return self.worse_since if self.waited > 1 else None


def relative(table: np.ndarray | list, base: np.ndarray | list) -> np.ndarray:
    """Returns the loss relative to the base model's at each timestep (T,), from two tables (pictures, T)."""
    return np.mean(table, axis=0) / np.mean(base, axis=0)


def difference(table: np.ndarray | list, before: np.ndarray | list, base: np.ndarray | list) -> tuple[float, float]:
    """Returns the mean of the paired differences over all pictures, relative to the base model, and its standard error.

    Each picture counts as one observation, as the losses of its timesteps are correlated: counted as independent, they
    made the error 1.25 to 1.7 times too small on the bundled pictures. With few pictures the error is widened by Student's
    t, to the confidence of one standard error of many. With a single picture, its timesteps are the observations.
    """
    pairs = (np.asarray(table) - np.asarray(before)) / np.mean(base, axis=0)
    observed = pairs.mean(axis=1) if len(pairs) > 1 else pairs[0]
    widened = STUDENT_T.get(len(observed) - 1, 1.0)
    return float(pairs.mean()), float(widened * observed.std(ddof=1) / np.sqrt(len(observed)))


def update_best(
    validation: Validation, table: np.ndarray | list, step: int, *, drift: float | None = None, allowed: bool = True
) -> bool:
    """Updates the state with the losses of a step; returns whether their mean is the lowest so far, and the step `allowed`.

    Small improvements add up: if an improvement had to exceed one standard error, a run whose loss falls slowly would
    stop early, and best/ would be of a step that the curve shows to be worse. `sure_step` tells how sure the best step is.
    """
    mean, error = difference(table, validation.best, validation.base)
    if mean < 0 and allowed:
        validation.best, validation.best_step, validation.best_drift = np.asarray(table).tolist(), step, drift
        validation.waited, validation.worse_since = 0, None
        gained, error = difference(table, validation.sure, validation.base)
        if gained < -error:
            validation.sure, validation.sure_step = validation.best, step
        return True
    validation.waited += step > 0
    if mean <= error:
        validation.worse_since = None
    elif validation.worse_since is None and step:
        validation.worse_since = step
    return False


def make_metrics(table: np.ndarray, probe: np.ndarray, validation: Validation, timesteps: Sequence[int]) -> dict:
    """Makes the metrics of a validation from the losses on the held-out pictures and on the training pictures."""
    held_out, in_training = relative(table, validation.base), relative(probe, validation.base_probe)
    values = {
        "validation/loss": float(np.mean(table)),
        "validation/relative_loss": float(held_out.mean()),
        "validation/relative_loss_in_training": float(in_training.mean()),
        "validation/gap": float(held_out.mean() - in_training.mean()),
    }
    return values | {f"validation/relative_loss_t{t:04d}": float(v) for t, v in zip(timesteps, held_out, strict=True)}


def gain_of(validation: Validation) -> tuple[float, float]:
    """Returns by how much the best step's relative loss is below the base model's, and the standard error."""
    more, error = difference(validation.best, validation.base, validation.base)
    return -more, error


def metrics_of_best(validation: Validation) -> dict:
    """Makes the metrics that tell the best step so far, after `update_best`."""
    values: dict = {"validation/best_step": validation.best_step}
    if validation.best_step is not None:
        gain, error = gain_of(validation)
        values |= {"validation/best_relative_loss": 1 - gain, "validation/best_standard_error": error}
        values["validation/best_drift"] = validation.best_drift
    values |= {"validation/sure_step": validation.sure_step, "validation/worse_since": validation.worse_since}
    return {name: value for name, value in values.items() if value is not None}


def summarize(validation: Validation, step: int, max_drift: float | None = None) -> str:
    """Summarizes the validations of a run that ends at this step, in one sentence."""
    gain, error = gain_of(validation)
    verdict = Verdict(
        step, validation.best_step, 100 * gain, 100 * error, validation.sure_step, validation.worse_since,
        validation.waited, validation.best_drift, max_drift,
    )  # fmt: skip
    return f"Validation: {describe(verdict)}"


def describe(verdict: Verdict, *, finished: bool = True) -> str:
    """Describes a `Verdict` in one sentence, for a run that is finished or in progress."""
    step, best_step = verdict.step, verdict.best_step
    if best_step is None and step == 0:
        return "not judged yet: so far, only the base model was validated."
    if best_step is None and verdict.max_drift is not None:
        return (
            f"no step up to {step} was better than the base model with a drift of at most {verdict.max_drift:g} "
            "(--max_drift). Add --preservation output, raise --max_drift, or lower --learning_rate."
        )
    if best_step is None:
        return f"no step up to {step} was better than the base model. Lower --learning_rate, or compare the pictures."
    where = f"best at step {best_step}" if best_step else "best before the first step"
    error = "" if verdict.error is None else f" ± {verdict.error:.1f}"
    best = f"{where}, {verdict.gain:.1f}{error}% below the base model's loss"
    if verdict.drift is not None:
        best += f" with a drift of {verdict.drift:.3f}"
    if verdict.sure_step is None:
        best += ", which may be chance"
    elif verdict.sure_step != best_step:
        sure = f"step {verdict.sure_step}" if verdict.sure_step else "the LoRA before the first step"
        best += f" (the lowest loss, but not surely lower than that of {sure})"
    if verdict.overfits_since is not None:
        return f"{best}; overfitting since step {verdict.overfits_since}: use best/, or train for fewer steps."
    if best_step == step and not finished:
        return f"{best}; still improving."
    if best_step == step:
        return f"{best}; still improving at the end: more steps may help."
    return f"{best}; no clear change since."


def advise_on_drift(drift: float | None, *, preserves: bool) -> str | None:
    """Returns advice if the drift is high and --preservation was not used, or else None."""
    if drift is None or preserves or drift < HIGH_DRIFT:
        return None
    return (
        f"A drift of {drift:.3f} is high: the LoRA also changes pictures whose prompt does not name its concept. Train with "
        "--preservation output to prevent this; it lowered the drift from 0.55 to 0.04 in docs/findings.md."
    )


def describe_early_stop(step: int, num_steps: int | None, patience: int) -> str:
    """Says that a run stopped early, and why."""
    of = "" if num_steps is None else f" of {num_steps}"
    validations = "one validation" if patience == 1 else f"{patience} validations in a row"
    return (
        f"stopped early at step {step}{of}: the loss of {validations} was not lower than before "
        f"(--early_stopping_patience {patience}). To continue, run the same command again with a higher patience."
    )

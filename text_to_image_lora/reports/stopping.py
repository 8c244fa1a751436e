"""Decides from the validation losses of a run which step was best, whether it still improves, and since when it overfits.

Losses are compared relative to the base model's loss at the same timestep. Raw losses span three orders of magnitude over
the timesteps, so that their mean would depend on the least noisy timesteps alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


# {degrees of freedom: Student's t at 84.13%}; the normal distribution has 1 there.
STUDENT_T = {1: 1.84, 2: 1.32, 3: 1.20, 4: 1.14, 5: 1.11, 6: 1.09, 7: 1.08, 8: 1.07, 9: 1.06}


@dataclass
class Validation:
    """The state of validation that checkpoints store. Tables of losses are lists of shape (pictures, timesteps)."""

    base: list = field(repr=False)  # of the base model on the held-out pictures
    base_probe: list = field(repr=False)  # of the base model on equally many training pictures
    best: list = field(repr=False)  # of the best step, or of the base model
    best_step: int | None = None  # None: no step was better than the base model; 0: the LoRA that the run started from
    waited: int = 0  # validations since the best step
    pictures: list = field(default_factory=list, repr=False)  # hashes of the two `ValidationSet`s
    worse_since: int | None = None  # first step from which on every validation was clearly worse than the best


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


def update_best(validation: Validation, table: np.ndarray | list, step: int) -> bool:
    """Updates the state with the losses of a step; returns whether they are the best by more than one standard error."""
    mean, error = difference(table, validation.best, validation.base)
    if mean < -error:
        validation.best, validation.best_step = np.asarray(table).tolist(), step
        validation.waited, validation.worse_since = 0, None
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


def summarize(validation: Validation, step: int) -> str:
    """Summarizes the validations of a run that ends at this step, in one sentence."""
    loss = float(relative(validation.best, validation.base).mean())
    return f"Validation: {describe(step, validation.best_step, loss, validation.worse_since, validation.waited)}"


def describe(
    step: int, best_step: int | None, best_loss: float, worse_since: int | None, waited: int, *, finished: bool = True
) -> str:
    """Describes a run up to a step from the relative loss of its best step and the fields of `Validation`."""
    if best_step is None:
        return f"no step up to {step} was better than the base model. Lower --learning_rate, or compare the pictures."
    where = f"best at step {best_step}" if best_step else "best before the first step"
    best = f"{where}, {100 * (1 - best_loss):.1f}% below the base model's loss"
    if worse_since is not None and waited > 1:  # a single worse validation may be chance
        return f"{best}; overfitting since step {worse_since}: use best/, or train for fewer steps."
    if best_step == step and not finished:
        return f"{best}; still improving."
    if best_step == step:
        return f"{best}; still improving at the end: more steps may help."
    return f"{best}; no clear change since."

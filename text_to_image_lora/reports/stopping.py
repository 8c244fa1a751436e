"""What the validation losses of a run say: whether it still improves, which step was best, since when it overfits.

A loss is judged relative to the base model's own at the same timestep: raw losses span three orders of magnitude over the
timesteps, so their plain mean sees only the least noisy ones.
"""

from dataclasses import dataclass, field

import numpy as np


# Student's t at 84.13%, where a normal distribution has 1, by the degrees of freedom.
STUDENT_T = {1: 1.84, 2: 1.32, 3: 1.20, 4: 1.14, 5: 1.11, 6: 1.09, 7: 1.08, 8: 1.07, 9: 1.06}


@dataclass
class Validation:
    """The tables of losses (pictures x timesteps) that a run is judged by, as lists: they are kept in checkpoints."""

    base: list = field(repr=False)  # of the base model, on the pictures held out
    base_probe: list = field(repr=False)  # the same on as many that are trained on
    best: list = field(repr=False)
    best_step: int | None = None  # None: no step was better than the base itself; 0: a LoRA that the run began with
    waited: int = 0  # validations since
    pictures: list = field(
        default_factory=list, repr=False
    )  # identities of what was validated on: the tables are of these
    worse_since: int | None = None  # the first step since then from which on all were clearly worse than the best


def relative(table, base):
    """Loss relative to the base model's at each timestep (T,), of two tables (pictures, T)."""
    return np.mean(table, axis=0) / np.mean(base, axis=0)


def difference(table, before, base):
    """Mean of the paired differences over all pictures, relative to the base, and its standard error.

    A picture's timesteps rise and fall together, so each picture is one observation: taken for independent, they made the
    error 1.25 to 1.7 times too small on the bundled pictures. Of few pictures the error is widened by Student's t, so that
    it is as sure as one standard error of many. One picture says nothing of others: its own timesteps are all there is.
    """
    pairs = (np.asarray(table) - np.asarray(before)) / np.mean(base, axis=0)
    observed = pairs.mean(axis=1) if len(pairs) > 1 else pairs[0]
    widened = STUDENT_T.get(len(observed) - 1, 1.0)
    return float(pairs.mean()), float(widened * observed.std(ddof=1) / np.sqrt(len(observed)))


def take_in(validation, table, step):
    """Takes in the table of a step; returns whether it is the best so far, by more than one standard error."""
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


def values_of(table, probe, validation, timesteps):
    """The numbers to report: raw mean, relative to the base in all and at each timestep, and the gap to the probe's."""
    at_each, of_probe = relative(table, validation.base), relative(probe, validation.base_probe)
    values = {
        "validation/loss": float(np.mean(table)),
        "validation/relative_loss": float(at_each.mean()),
        "validation/relative_loss_in_training": float(of_probe.mean()),
        "validation/gap": float(at_each.mean() - of_probe.mean()),
    }
    return values | {f"validation/relative_loss_t{t:04d}": float(v) for t, v in zip(timesteps, at_each, strict=True)}


def in_words(validation, step):
    """One sentence on how the run went, for its end."""
    loss = float(relative(validation.best, validation.base).mean())
    return f"Validation: {sentence(step, validation.best_step, loss, validation.worse_since, validation.waited)}"


def sentence(step, best_step, best_loss, worse_since, waited, *, finished=True):
    """How a run went until a step, by the relative loss of the best one and what `Validation` keeps."""
    if best_step is None:
        return f"no step was better than the base model (of {step}). Lower --learning_rate, or look at the pictures."
    where = f"best at step {best_step}" if best_step else "best before the first step"
    best = f"{where}, {100 * (1 - best_loss):.1f}% below the base model's loss"
    if worse_since is not None and waited > 1:  # a single one that is worse may be chance
        return f"{best}; overfitting since step {worse_since}: use best/, or train for fewer steps."
    if best_step == step and not finished:
        return f"{best}; it still improves."
    if best_step == step:
        return f"{best}; it was still improving at the end: more steps may help."
    return f"{best}; no clear change since."

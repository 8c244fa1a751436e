"""Computes the scores of an evaluation from embeddings of pictures, and recommends a LoRA, for `evaluate.py`.

A table (P, S) has one value per picture, with a row for each of P prompts and a column for each of S seeds. Embeddings are
unit vectors of D values; the similarity of two pictures is the cosine of their embeddings.
"""

from typing import NamedTuple

import numpy as np

from text_to_image_lora.reports.stopping import STUDENT_T


MEMORISED = 0.1  # a LoRA with a larger fraction of memorised pictures is overfitted


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


def normalised(embeddings):
    """Returns vectors (..., D) scaled to unit length."""
    embeddings = np.asarray(embeddings, dtype=np.float64)
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def likeness(drawn, references):
    """Returns the mean cosine similarity (P, S) of pictures (P, S, D) to the references of their prompt, P arrays (R, D).

    If all prompts share one set of references, this is CLIP-I and DINO of DreamBooth (Ruiz et al., 2023, arXiv:2208.12242).
    """
    return np.stack([pictures @ np.asarray(own).mean(axis=0) for pictures, own in zip(drawn, references, strict=True)])


def drift(drawn, base):
    """Returns the cosine distance (P, S) of pictures (P, S, D) to the base model's pictures of equal prompt and seed."""
    return 1 - np.sum(drawn * base, axis=-1)


def diversity(drawn):
    """Returns the mean cosine distance (P, S) of each picture (P, S, D) to the pictures of its prompt's other seeds."""
    seeds = drawn.shape[1]
    alike = np.einsum("psd,ptd->pst", drawn, drawn)
    others = alike.sum(axis=-1) - np.einsum("pss->ps", alike)
    return 1 - others / (seeds - 1)


def set_distance(drawn, held_out):
    """Returns a table (P, S) whose mean is the distance of the set of pictures (P, S, D) from the held-out pictures (N, D).

    The distance is the unbiased squared maximum mean discrepancy with a cubic kernel: the KID of Binkowski et al., 2018
    (arXiv:1801.01401), of these embeddings. It is near 0 for two sets of one kind. The value of a picture is its influence on
    the distance (twice its own part, minus the mean of these parts), so that the standard error over prompts is that of the
    distance.
    """

    def kernel(a, b):
        return ((1 + a @ b.T) / 2) ** 3

    pictures = drawn.reshape(-1, drawn.shape[-1])
    among, references = kernel(pictures, pictures), kernel(held_out, held_out)
    own = (among.sum(axis=1) - np.diag(among)) / (len(pictures) - 1)
    others = (references.sum() - np.trace(references)) / (len(held_out) * (len(held_out) - 1))
    share = 2 * (own - kernel(pictures, held_out).mean(axis=1)) - own.mean() + others
    return share.reshape(drawn.shape[:2])


def nearest(pictures, training):
    """Returns the similarity of each picture (..., D) to its nearest training picture (T, D), and the index of that picture."""
    alike = pictures @ np.asarray(training).T
    return alike.max(axis=-1), alike.argmax(axis=-1)


def memorised(nearness, held_out):
    """Returns 1 for each picture that is nearer to a training picture than any held-out picture is, and otherwise 0.

    `nearness` (P, S) and `held_out` (N,) are similarities to the nearest training picture, from `nearest`.
    """
    return (nearness > np.max(held_out)).astype(float)


def mean_and_error(table):
    """Returns the `Estimate` of a table (P, S).

    Each prompt counts as one observation, as pictures of one prompt are not independent. With a single prompt, the seeds are
    the observations. With few observations the error is widened by Student's t, to the confidence of one standard error of
    many.
    """
    table = np.asarray(table, dtype=np.float64)
    observed = table.mean(axis=1) if len(table) > 1 else table[0]
    widened = STUDENT_T.get(len(observed) - 1, 1.0)
    error = widened * observed.std(ddof=1) / np.sqrt(len(observed))
    return Estimate(float(table.mean()), float(error))


def bleed(presence, base_presence, groups):
    """Returns {group: {concept: `Estimate`}} of how much more of a concept is drawn than by the base model.

    `presence` and `base_presence` are {concept: table (P, S)} for equal prompts and seeds, and `groups` has the group of each
    prompt.
    """
    matrix = {}
    for group in dict.fromkeys(groups):
        rows = [i for i, name in enumerate(groups) if name == group]
        matrix[group] = {
            concept: mean_and_error(table[rows] - base_presence[concept][rows]) for concept, table in presence.items()
        }
    return matrix


def format_estimate(value, sign=""):
    """Formats an `Estimate` as `0.512 ± 0.013`, and None as an empty string."""
    return "" if value is None else f"{value.mean:{sign}.3f} ± {value.error:.3f}"


def explain_overfitting(own):
    """Returns why a LoRA is overfitted, or None if it is not; `own` is a value of `tables` in `recommend`."""
    share, error = (0.0, 0.0) if own["memorised"] is None else mean_and_error(own["memorised"])
    if share - error > MEMORISED:
        return f"{share:.0%} of its pictures are nearer to a training picture than any held-out picture is"
    loss, error = own["loss"]
    return f"its held-out loss is {loss:.2f} ± {error:.2f} times the base model's" if loss - error > 1 else None


def recommend(tables, base_likeness):
    """Returns the label of the recommended LoRA, or None if no LoRA is recommended, and a sentence that explains it.

    The recommended LoRA has the least drift of those whose likeness to the held-out pictures is above the base model's and
    not below the best LoRA's, by paired differences per prompt and one standard error. LoRAs that overfit come last.

    Args:
        tables: {label: {"likeness", "drift", "memorised", "loss"}}: three tables (P, S), of which "memorised" is None without
            training pictures, and the `Estimate` of the held-out loss.
        base_likeness: The base model's likeness (P, S).
    """
    words = []
    above = {}  # {label: gain} of LoRAs that are better than the base model
    sure = {}  # {label: gain} of those among them that do not overfit
    for label, own in tables.items():
        gain, error = mean_and_error(own["likeness"] - base_likeness)
        reason = explain_overfitting(own)
        if reason:
            words.append(f"{label} overfits: {reason}")
        if gain > error:
            above[label] = gain
        elif not reason:
            words.append(
                f"{label} is no more like the held-out pictures than the base model is ({gain:+.3f} ± {error:.3f})"
            )
        if gain > error and not reason:
            sure[label] = gain
    if not above:
        return None, "Use none of them: " + "; ".join(words) + "."
    candidates = sure or above
    best = max(candidates, key=candidates.get)
    equal = []
    for label in candidates:
        less, error = mean_and_error(tables[best]["likeness"] - tables[label]["likeness"])
        if less <= error:
            equal.append(label)
        else:
            words.append(f"{label} is less like the held-out pictures than {best} (by {less:.3f} ± {error:.3f})")
    chosen = min(equal, key=lambda label: tables[label]["drift"].mean())
    why = f"likeness to the held-out pictures {format_estimate(mean_and_error(tables[chosen]['likeness']))}"
    why += f" (base model {format_estimate(mean_and_error(base_likeness))})"
    if len(equal) > 1:
        rest = ", ".join(label for label in equal if label != chosen)
        why += f", as good as {rest}, with the least drift from the base model"
        why += f" ({format_estimate(mean_and_error(tables[chosen]['drift']))})"
    if not sure:
        why += "; all LoRAs overfit: train for fewer steps or on more pictures"
    return chosen, f"Use {chosen}: " + "; ".join([why, *words]) + "."

"""The scores of an evaluation, from embeddings of pictures, and what they recommend; `evaluate.py` calls it.

A table holds a number for each picture, a row a prompt and a column a seed: (P, S). Embeddings are unit vectors; what
two pictures have in common is the cosine between theirs.
"""

from typing import NamedTuple

import numpy as np

from text_to_image_lora.reports.stopping import STUDENT_T


MEMORISED = 0.1  # share of memorised pictures from which a LoRA counts as overfitted


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


def normalised(embeddings):
    """The same vectors (..., D) at length 1."""
    embeddings = np.asarray(embeddings, dtype=np.float64)
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def likeness(drawn, references):
    """How much the pictures (P, S, D) of each prompt are like its reference pictures, P arrays (R, D): (P, S).

    The mean cosine over a prompt's references; where all prompts share one set it is DreamBooth's CLIP-I and DINO
    (Ruiz et al., 2023, arXiv:2208.12242).
    """
    return np.stack([pictures @ np.asarray(own).mean(axis=0) for pictures, own in zip(drawn, references, strict=True)])


def drift(drawn, base):
    """How far each picture (P, S, D) is from the base model's of the same prompt and seed, from 0: (P, S)."""
    return 1 - np.sum(drawn * base, axis=-1)


def diversity(drawn):
    """How far each picture (P, S, D) is on average from those of the same prompt's other seeds, from 0: (P, S)."""
    seeds = drawn.shape[1]
    alike = np.einsum("psd,ptd->pst", drawn, drawn)
    others = alike.sum(axis=-1) - np.einsum("pss->ps", alike)
    return 1 - others / (seeds - 1)


def set_distance(drawn, held_out):
    """How far the pictures (P, S, D), all together, are from the held-out ones (N, D), near 0 for two sets of one kind: (P, S).

    The squared maximum mean discrepancy, without bias, in a cubic kernel: the KID of Binkowski et al., 2018
    (arXiv:1801.01401), of these embeddings. Its mean is that distance; a picture's value is its share of it (twice its own
    part, less the mean of these: the influence), so that values of prompts tell how sure the mean is.
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
    """The likeness of each picture (..., D) to the training picture (T, D) nearest to it, and that one's index."""
    alike = pictures @ np.asarray(training).T
    return alike.max(axis=-1), alike.argmax(axis=-1)


def memorised(nearness, held_out):
    """1 for each picture that is nearer to a training picture than any held-out picture is, else 0.

    `nearness` (P, S) and `held_out` (N,) are likenesses to the nearest training picture, as `nearest` has them.
    """
    return (nearness > np.max(held_out)).astype(float)


def mean_and_error(table):
    """The `Estimate` of a table (P, S).

    A prompt's pictures have the prompt in common, so that each prompt is one observation; of a single prompt each seed is.
    Of few the error is widened by Student's t, so that it is as sure as one standard error of many.
    """
    table = np.asarray(table, dtype=np.float64)
    observed = table.mean(axis=1) if len(table) > 1 else table[0]
    widened = STUDENT_T.get(len(observed) - 1, 1.0)
    error = widened * observed.std(ddof=1) / np.sqrt(len(observed))
    return Estimate(float(table.mean()), float(error))


def bleed(presence, base_presence, groups):
    """{group: {concept: `Estimate`}}: how much more of a concept comes than from the base, where not asked for.

    The two are {concept: table (P, S)} of the same prompts and seeds; `groups` names what each of the prompts asks for.
    """
    matrix = {}
    for group in dict.fromkeys(groups):
        rows = [i for i, name in enumerate(groups) if name == group]
        matrix[group] = {
            concept: mean_and_error(table[rows] - base_presence[concept][rows]) for concept, table in presence.items()
        }
    return matrix


def shown(value, sign=""):
    """`0.512 ± 0.013` of an `Estimate`."""
    return "" if value is None else f"{value.mean:{sign}.3f} ± {value.error:.3f}"


def overfitting(own):
    """Why a LoRA counts as overfitted, in words, or None, of what `recommend` is told of it."""
    share, error = (0.0, 0.0) if own["memorised"] is None else mean_and_error(own["memorised"])
    if share - error > MEMORISED:
        return f"{share:.0%} of its pictures are nearer to a training picture than any held-out picture is"
    loss, error = own["loss"]
    return f"its held-out loss is {loss:.2f} ± {error:.2f} times the base's" if loss - error > 1 else None


def recommend(tables, base_likeness):
    """(label of the LoRA to take or None, why in words) of {label: {"likeness", "drift", "memorised", "loss"}}.

    Of those whose likeness to the held-out pictures is above the base's (P, S) and not below the best's, each by more than
    a standard error prompt by prompt, the one that drifts least from the base; those that overfit come after the others.
    "memorised" is None without training pictures, "loss" is the `Estimate` of the held-out loss.
    """
    words = []
    above = {}  # {label: gain} of those that are better than the base
    sure = {}  # of these, those that do not overfit
    for label, own in tables.items():
        gain, error = mean_and_error(own["likeness"] - base_likeness)
        reason = overfitting(own)
        if reason:
            words.append(f"{label} overfits: {reason}")
        if gain > error:
            above[label] = gain
        elif not reason:
            words.append(f"{label} is no more like the held-out pictures than the base ({gain:+.3f} ± {error:.3f})")
        if gain > error and not reason:
            sure[label] = gain
    if not above:
        return None, "Take none: " + "; ".join(words) + "."
    candidates = sure or above
    best = max(candidates, key=candidates.get)
    equal = []
    for label in candidates:
        less, error = mean_and_error(tables[best]["likeness"] - tables[label]["likeness"])
        if less <= error:
            equal.append(label)
        else:
            words.append(f"{label} is less like them than {best} (by {less:.3f} ± {error:.3f})")
    chosen = min(equal, key=lambda label: tables[label]["drift"].mean())
    why = f"likeness to the held-out pictures {shown(mean_and_error(tables[chosen]['likeness']))}"
    why += f" (base {shown(mean_and_error(base_likeness))})"
    if len(equal) > 1:
        rest = ", ".join(label for label in equal if label != chosen)
        why += f", as good as {rest}, and of these it drifts least from the base"
        why += f" ({shown(mean_and_error(tables[chosen]['drift']))})"
    if not sure:
        why += "; train it for fewer steps or on more pictures, for all of them overfit"
    return chosen, f"Take {chosen}: " + "; ".join([why, *words]) + "."

"""Finds the training pictures whose captions may be wrong, early in the training (--check_captions).

A caption that says what is to be seen lowers the loss of its picture more than a caption of another picture does, at equal
noise. How much it does differs between pictures, so each is compared with the others, by median and median deviation. The LoRA
has to know the kind of pictures for that, but learns wrong captions too in the end: so the pictures are measured when they
have been seen a few times (figures in docs/findings.md).
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..files import counted, printable, write_whole
from .about import describe_picture
from .read_about import CAPTION_CHECK, read_caption_check
from .validation_loss import LossMeter, ValidationSet, strata


logger = logging.getLogger(__name__)
NUM_OTHERS = 8  # captions of other pictures that each picture is measured with
STRATA = (2, 4, 6)  # of the timesteps; at the others, captions change less
LOOKS = 3  # times that a picture has been seen
STANDS_OUT = 2.25  # deviations; of normally distributed gains, about one in a hundred is lower
LEAST_PICTURES = 20  # of fewer, one can't tell which differs from the others
MOST_LISTED = 24


class Judged(NamedTuple):
    """How well a picture's own caption fits, beside captions of other pictures."""

    gain: float  # 1 - loss with its own caption / mean loss with other captions
    deviation: float  # from the median of all pictures, in robust standard deviations; negative if it fits less well
    better: int  # how many of the other captions give a lower loss than its own


def choose_others(captions: Sequence[str], keys: Sequence[str], count: int = NUM_OTHERS) -> list[list[str]]:
    """Chooses up to `count` captions of other pictures for each picture, different from its own; fixed by its key."""
    different, chosen = sorted({*captions}), []
    for caption, key in zip(captions, keys, strict=True):
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
        order = np.random.default_rng(seed).permutation(len(different))
        chosen.append([different[i] for i in order if different[i] != caption][:count])
    return chosen


def judge(own: np.ndarray, others: np.ndarray) -> list[Judged]:
    """Judges the captions by the losses with each picture's own (pictures, timesteps) and others (pictures, captions, timesteps)."""
    gains = (1 - own / others.mean(1)).mean(1)
    distances = gains - np.median(gains)
    spread = 1.4826 * np.median(np.abs(distances))  # the standard deviation, if they are normally distributed
    deviations = distances / spread if spread > 0 else np.zeros_like(gains)
    better = ((1 - others / own[:, None]).mean(2) > 0).sum(1)
    rows = zip(gains.tolist(), deviations.tolist(), better.tolist(), strict=True)
    return [Judged(*row) for row in rows]


class CaptionCheck:
    """Checks the captions of a run's own training pictures, which must be in the cache; writes `CAPTION_CHECK` for the report."""

    def __init__(self, training: Any, models: Any, run: Any, *, accelerator: Any, output_dir: str | Path):
        pictures, sampler = training.pictures, run.sampler
        self.own = [i for i in pictures.firsts() if not pictures.is_class[i]]
        self.set = ValidationSet(*training).select(self.own)
        timesteps = strata(models.diffusion.num_train_timesteps)
        looks = LOOKS * len(self.own) * sampler.steps_per_epoch / len(sampler.samples)
        self.step = min(math.ceil(looks), run.num_steps)  # after which the captions are checked
        self.measure = LossMeter(
            models, seed=run.seed, accelerator=accelerator, timesteps=[timesteps[k] for k in STRATA]
        )
        self.accelerator, self.path = accelerator, Path(output_dir) / CAPTION_CHECK

    def is_done(self) -> bool:
        """Returns whether the captions were checked; asked of the main process only."""
        return _step(self.path) > 0

    def run(self, step: int) -> None:
        """Measures, logs the result, and writes the file."""
        captions = [self.set.caption(i) for i in range(len(self.set))]
        others = choose_others(captions, self.set.pictures.content_ids)
        least = min(map(len, others), default=0)
        if len(captions) < LEAST_PICTURES or not least:
            reason = (
                f"{counted(len(captions), 'picture')} {'is' if len(captions) == 1 else 'are'} too few"
                if least
                else "all pictures have one caption"
            )
            logger.info(f"captions: not checked, because {reason}")
            return
        others = [group[:least] for group in others]
        judged = judge(self.measure(self.set), self.measure.with_captions(self.set, others))
        if not self.accelerator.is_main_process:
            return
        worst = sorted(range(len(judged)), key=lambda i: judged[i].deviation)
        doubtful = [i for i in worst if judged[i].deviation < -STANDS_OUT]
        rows = [describe_picture(self.set.pictures, i) | judged[i]._asdict() for i in doubtful[:MOST_LISTED]]
        for row in rows:
            row["captions"] = row["captions"][:1]
        found = {"step": step, "pictures": len(judged), "others": least, "count": len(doubtful), "first": rows}
        write_whole(self.path, json.dumps(found, indent=1))
        logger.info(describe(found))


def discard_later(output_dir: str | Path, step: int) -> None:
    """Deletes the file of an earlier run, or of a later step than the one from which a run is resumed."""
    path = Path(output_dir) / CAPTION_CHECK
    if path.is_file() and not 0 < _step(path) <= step:
        path.unlink()


def _step(path):
    """Returns the step after which the captions were checked, 0 if they were not."""
    with contextlib.suppress(InputError):
        return read_caption_check(path).get("step", 0)
    return 0


def describe(found: dict[str, Any]) -> str:
    """Returns the result in a sentence or two."""
    if not found["count"]:
        return f"captions: each of the {found['pictures']} fits its picture about as well as the others do"
    names = [f"{printable(row['source'])} ('{printable(row['captions'][0])}')" for row in found["first"][:3]]
    more = f" and {found['count'] - len(names)} more" if found["count"] > len(names) else ""
    return (
        f"captions: {found['count']} of {found['pictures']} may be wrong: they fit their pictures much less well than the "
        f"others do: {', '.join(names)}{more}. See report.html"
    )

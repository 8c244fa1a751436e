"""A set of pictures for one purpose, and all that is known of each under one index."""

import functools
import threading
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .records import fingerprint, read_image_bytes
from .settings import AugmentationSettings
from .transforms import apply_variation, apply_variation_to_mask, draw_variation, open_image, open_mask


class View(NamedTuple):
    """How a picture becomes pixels: what is random about it, and how it is resized."""

    augmentation: AugmentationSettings = AugmentationSettings()
    interpolation: str = "lanczos"


@dataclass
class PictureSet:
    """Pictures with their records, facts, sizes and captions.

    Variation k of a picture depends on the picture alone, so that runs of other seeds share the cache; which of them a
    sample draws is the seed's.
    """

    records: Any  # a `datasets.Dataset`, see `records.py`
    facts: list  # a `Picture` each
    sizes: list  # (width, height) in pixels that each is trained at
    captions: list  # a list of captions each
    view: View = View()

    def __len__(self):
        return len(self.facts)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    def select(self, indices):
        """The set of these pictures, in this order."""
        parts = {name: [getattr(self, name)[i] for i in indices] for name in ("facts", "sizes", "captions")}
        return replace(self, records=self.records.select(indices), **parts)

    def for_validation(self):
        """The same pictures cropped in the middle, nothing augmented, with their first caption."""
        view = self.view._replace(augmentation=AugmentationSettings(center_crop=True))
        return replace(self, captions=[group[:1] for group in self.captions], view=view)

    @functools.cached_property
    def is_class(self):
        """For each picture, whether it shows the class in general (prior preservation)."""
        return self.records["is_class"][:]

    @functools.cached_property
    def masked(self):
        """Whether any picture has a mask."""
        return any(mask is not None for mask in self.records["mask"])

    def variation(self, i, k):
        """The `Variation` k of picture i."""
        fact, view = self.facts[i], self.view
        return draw_variation(
            fact.width, fact.height, self.sizes[i], view.augmentation, image_id=fact.image_id, index=k
        )

    @functools.cached_property
    def _opened(self):
        """The picture that each thread opened last: its variations are usually asked for one after the other."""
        return threading.local()

    def pixels(self, i, k):
        """Variation k of picture i as uint8 (height, width, 3)."""
        opened = self._opened
        if getattr(opened, "index", None) != i:
            opened.index, opened.image = i, open_image(read_image_bytes(self.records[i]["image"]))
        return apply_variation(opened.image, self.variation(i, k), self.sizes[i], self.view.interpolation)

    def mask(self, i, k, factor):
        """What counts of variation k of picture i, from 0 to 1: float16 (height / factor, width / factor).

        Ones where the picture has no mask.
        """
        (width, height), cell = self.sizes[i], self.records[i]["mask"]
        if cell is None:
            return np.ones((height // factor, width // factor), dtype=np.float16)
        mask = open_mask(read_image_bytes(cell), (self.facts[i].width, self.facts[i].height))
        return apply_variation_to_mask(mask, self.variation(i, k), (width, height), factor).astype(np.float16)

    def fingerprint(self, samples=()):
        """One string for which pictures, which captions, in which order, and whatever else is given."""
        return fingerprint([fact.image_id for fact in self.facts], self.captions, samples)

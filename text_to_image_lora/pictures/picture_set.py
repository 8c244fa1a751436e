"""A set of pictures for training or validation, with everything that is known about each picture."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import TrainingError
from .masks import OPAQUE, open_masked
from .records import fingerprint, image_id, read_image_bytes, read_mask_bytes
from .settings import AugmentationSettings
from .transforms import RESAMPLING, Variation, apply_variation, apply_variation_to_mask, draw_variation, open_image


class View(NamedTuple):
    """How pictures are augmented and resized, and whether only their opaque parts count."""

    augmentation: AugmentationSettings = AugmentationSettings()
    interpolation: str = "lanczos"
    alpha_mask: bool = False


@dataclass
class PictureSet:
    """Pictures with their records, facts, sizes and captions.

    A picture that is trained at several sizes has an entry for each, with its record, its facts and its captions in all of them.
    Whatever is about pictures, not about what is trained, is about `each_once()`.

    Variation k of a picture depends only on the picture, so that runs with different seeds share the cache; the seed decides
    which variation a sample uses.
    """

    records: Any  # a `datasets.Dataset`, see `records.py`
    facts: list  # a `Picture` for each picture
    sizes: list  # the training size (width, height) of each picture in pixels
    captions: list  # a list of captions for each picture
    view: View = View()
    numbers: list = field(default_factory=list)  # of the picture of each entry (default: all are different pictures)

    def __post_init__(self):
        self.numbers = self.numbers or list(range(len(self.facts)))

    def __len__(self):
        return len(self.facts)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    def select(self, indices: Sequence[int]) -> "PictureSet":
        """Returns the set of the pictures at these indices, in this order."""
        parts = {name: [getattr(self, name)[i] for i in indices] for name in ("facts", "sizes", "captions", "numbers")}
        return replace(self, records=self.records.select(indices), **parts)

    def at_sizes(self, sizes: Sequence[Sequence[tuple[int, int]]]) -> "PictureSet":
        """Returns the set with an entry for each of the `sizes` of each picture."""
        entries = [(i, size) for i, own in enumerate(sizes) for size in own]
        if [i for i, _ in entries] == list(range(len(self))):
            return replace(self, sizes=[size for _, size in entries])
        return replace(self.select([i for i, _ in entries]), sizes=[size for _, size in entries])

    def firsts(self) -> list[int]:
        """Returns the index of the first entry of each picture, which is the one at its largest size."""
        return sorted({number: i for i, number in reversed([*enumerate(self.numbers)])}.values())

    def each_once(self) -> "PictureSet":
        """Returns the set with only the first entry of each picture."""
        firsts = self.firsts()
        return self if len(firsts) == len(self) else self.select(firsts)

    def format_sizes(self, i: int) -> str:
        """Returns the sizes of all entries of the picture of entry i, such as 768x768, 512x512."""
        own = [size for number, size in zip(self.numbers, self.sizes, strict=True) if number == self.numbers[i]]
        return ", ".join(f"{width}x{height}" for width, height in own)

    def for_validation(self) -> "PictureSet":
        """Returns the set with center crops, no augmentation, and only the first caption of each picture."""
        view = self.view._replace(augmentation=AugmentationSettings(center_crop=True))
        return replace(self, captions=[group[:1] for group in self.captions], view=view)

    @functools.cached_property
    def is_class(self) -> list[bool]:
        """Whether each picture is a class picture (prior preservation)."""
        return self.records["is_class"][:]

    @functools.cached_property
    def has_mask(self) -> list[bool]:
        """Whether some parts of each picture count less: it has a mask, or transparent parts with `view.alpha_mask`."""
        masks = self.records["mask"][:]
        return [mask is not None or self._uses_alpha(fact) for mask, fact in zip(masks, self.facts, strict=True)]

    @property
    def masked(self) -> bool:
        """Whether any picture has a mask."""
        return any(self.has_mask)

    def _uses_alpha(self, fact):
        return self.view.alpha_mask and fact.transparency != OPAQUE

    @property
    def content_ids(self) -> list[str]:
        """What identifies that which is trained of each picture: its file, its mask, and whether only opaque parts count."""
        return [f"{fact.image_id} opaque" if self._uses_alpha(fact) else fact.image_id for fact in self.facts]

    def variation(self, i: int, k: int) -> Variation:
        """Returns variation k of picture i."""
        fact, view = self.facts[i], self.view
        return draw_variation(
            fact.width, fact.height, self.sizes[i], view.augmentation, image_id=fact.image_id, index=k
        )

    @functools.cached_property
    def _opened(self):
        """The last opened picture of each thread, whose variations are usually requested one after the other."""
        return threading.local()

    def _open(self, i):
        """Returns the namespace of this thread with `image` and `mask` of picture i; the mask is None if all parts count.

        Raises `TrainingError` if the files are not those that were examined, because their id is part of the cache's keys.
        """
        opened = self._opened
        if getattr(opened, "index", None) == i:
            return opened
        opened.index = None
        row, fact = self.records[i], self.facts[i]
        try:
            data, mask = read_image_bytes(row["image"]), read_mask_bytes(row["mask"])
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            raise TrainingError(
                f"{row['source']}: the picture or its mask can't be read any more ({reason}). Put it back, and run the same "
                "command again."
            ) from error
        if image_id(data, mask) != fact.image_id:
            raise TrainingError(
                f"{row['source']}: the picture or its mask was changed after the run had examined it. Run the same command again."
            )
        decoded = open_masked(data, mask)
        opened.image, opened.mask = decoded.image, decoded.weights(alpha_mask=self.view.alpha_mask)
        opened.index = i
        return opened

    def image(self, i: int) -> Any:
        """Returns picture i as the user brought it, as an RGB `PIL.Image`; raises `TrainingError` if its files have changed."""
        return self._open(i).image

    def thumbnail(self, i: int, side: int) -> Any:
        """Returns picture i as an RGB `PIL.Image` whose longer side is at most `side` pixels."""
        image = open_image(read_image_bytes(self.records[i]["image"]), least_side=side)
        image.thumbnail((side, side), RESAMPLING["lanczos"])
        return image

    def pixels(self, i: int, k: int) -> np.ndarray:
        """Returns variation k of picture i as uint8 pixels (height, width, 3); raises `TrainingError` if its files have changed."""
        image = self._open(i).image
        return apply_variation(image, self.variation(i, k), self.sizes[i], self.view.interpolation)

    def mask(self, i: int, k: int, factor: int) -> np.ndarray:
        """Returns the loss weights of variation k of picture i, from 0 to 1, as float16 (height / factor, width / factor).

        All weights are 1 if the picture has no mask (see `has_mask`). Raises `TrainingError` if its files have changed.
        """
        (width, height), mask = self.sizes[i], self._open(i).mask
        if mask is None:
            return np.ones((height // factor, width // factor), dtype=np.float16)
        return apply_variation_to_mask(mask, self.variation(i, k), (width, height), factor).astype(np.float16)

    def fingerprint(self, samples: Sequence = ()) -> str:
        """Returns a hash of the pictures, their captions, their order and `samples`.

        Pictures that the run draws count by their recipe, because other devices draw them with other rounding.
        """
        recipes = zip(self.content_ids, self.records["recipe"], strict=True)
        return fingerprint([recipe or content_id for content_id, recipe in recipes], self.captions, samples)

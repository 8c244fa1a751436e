"""From probabilities to a mask: what is found, grown, with soft edges, in the size of the picture, for `mask.py`."""

import math
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageChops, ImageFilter


# The longer side in pixels at which masks are shaped: CLIPSeg sees 352 pixels, and masks are enlarged from there smoothly.
WORKING_SIDE = 1024
LEAST_WHITE = 128  # a mask that is nowhere brighter shows nothing


class Shaped(NamedTuple):
    """A mask, or why there is none."""

    mask: Image.Image | None  # greyscale; white is trained
    reason: str = ""


class Shaping(NamedTuple):
    """How masks are made of probabilities; lengths are percentages of the picture's shorter side.

    Args:
        threshold: The least probability of what is found.
        expand: By how much what is found grows.
        feather: The width of the zone in which a mask falls from white to black; its middle is the edge of what was found and
            grown.
        invert: Whether what was found is to be black.
    """

    threshold: float
    expand: float
    feather: float
    invert: bool

    def shape(self, wanted: np.ndarray, excluded: np.ndarray, size: tuple[int, int]) -> Shaped:
        """Makes the mask of a picture of `size` (width, height).

        Args:
            wanted: float32 (prompts, height, width), of which any may be found.
            excluded: As `wanted`, of what must not be in the mask; possibly no prompts.
        """
        scale = min(1.0, WORKING_SIDE / max(size))
        working = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        probabilities = most_probable(wanted, working)
        found = probabilities >= self.threshold
        if not found.any():
            highest = math.floor(100 * probabilities.max()) / 100  # so that it is never shown as the threshold
            return Shaped(
                None, f"nothing was found (probability {highest:.2f} at most, --threshold {self.threshold:g})"
            )
        mask = self._soften(grown(found, self._pixels(self.expand, working)), working)
        if len(excluded):
            found = most_probable(excluded, working) >= self.threshold
            mask = ImageChops.subtract(mask, self._soften(found, working))
        if self.invert:
            mask = ImageChops.invert(mask)
        if mask.getextrema()[1] < LEAST_WHITE:
            why = "the whole picture was found" if self.invert else "all that was found is excluded"
            return Shaped(None, f"no mask is left: {why}")
        return Shaped(mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR))

    def _soften(self, found, working):
        """Returns a mask with soft edges; 4 standard deviations of the Gaussian filter span the zone."""
        mask = Image.fromarray(np.where(found, 255, 0).astype(np.uint8))
        return mask.filter(ImageFilter.GaussianBlur(self._pixels(self.feather, working) / 4))

    @staticmethod
    def _pixels(percentage, working):
        return round(percentage / 100 * min(working))


def most_probable(probabilities: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the highest probability of any prompt, float32 (height, width), for `size` (width, height)."""
    highest = Image.fromarray(probabilities.max(axis=0))
    return np.asarray(highest.resize(size, Image.Resampling.BILINEAR))


def grown(found: np.ndarray, pixels: int) -> np.ndarray:
    """Returns a bool array with what is True grown by some pixels in each direction."""
    if not pixels:
        return found
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (pixels, pixels)
        found = sliding_window_view(np.pad(found, padding), 2 * pixels + 1, axis=axis).any(axis=-1)
    return found

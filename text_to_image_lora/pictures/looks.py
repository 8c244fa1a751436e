"""Measures on single pictures of what may hurt training: how fine their detail is, their light, bars at their edges."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter


SHRINKS = (2, 3, 4, 6, 8)
LOST = 0.11  # of the contrast in the sharpest parts: below this, a smaller copy of a picture holds all of its detail
MOST_SIDE = 768  # of the copy that is measured, in pixels
BAR_NOISE = 12  # difference of 8-bit values within a bar, as left by compression
BAR_EDGE = 25  # difference between a bar and the picture beside it
BAR_LEAST = 0.025  # of the side, for the thinnest bar that counts
FINE_SIDE = 320  # of the copy in which marks are looked for, in pixels
FINE_CLIP = 20  # limits strong edges in it, which would drown a mark


class Look(NamedTuple):
    """What was measured on a picture."""

    detail: float  # a copy this small, as a part of the training size, holds all detail; 1: none does
    light: float  # the 95th percentile of its brightness, from 0 to 1
    bars: tuple[float, float, float, float]  # left, top, right, bottom, as parts of the side
    colours: np.ndarray  # (64,): square roots of the shares of 4 x 4 x 4 RGB colours
    fine: np.ndarray  # (FINE_SIDE, FINE_SIDE) int8: brightness less its surroundings


def look_at(image: Image.Image, size: tuple[int, int]) -> Look:
    """Measures an RGB picture that is trained at this size (width, height) in pixels."""
    grey = image.convert("L")
    values = np.asarray(grey.resize(_within(grey.size, 256), Image.Resampling.BOX), np.float32) / 255
    return Look(
        detail=measure_detail(grey, size),
        light=float(np.quantile(values, 0.95)),
        bars=find_bars(np.asarray(image.resize(_within(image.size, 512), Image.Resampling.BOX), np.int16)),
        colours=_colours(image),
        fine=_fine(grey),
    )


def _within(size, most):
    scale = min(1, most / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def measure_detail(grey: Image.Image, size: tuple[int, int]) -> float:
    """Returns the smallest copy, as a part of the training size, that holds all detail of a picture; 1 if none does.

    Copies are enlarged again and compared with the picture in its sharpest parts, so that a soft background does not count.
    A picture that was blurred, or enlarged from a small one, loses nothing. The limit `LOST` was set on 136 photographs (at 512
    pixels) and 176 drawings (at 128), which lose at least 0.13 and 0.17 at half the size, so that none of them is taken for
    soft. Of copies that were enlarged 3 times, 126 and 174 lose less than the limit.
    """
    scale = max(size[0] / grey.width, size[1] / grey.height)
    scale = min(scale, MOST_SIDE / max(grey.width * scale, grey.height * scale) * scale)
    grey = grey.resize(
        (max(16, round(grey.width * scale)), max(16, round(grey.height * scale))), Image.Resampling.LANCZOS
    )
    values, tile, found = np.asarray(grey, np.float32), max(8, min(grey.size) // 32), 1.0
    contrast = _strongest(_tiles(values, tile).std(axis=1))
    if contrast < 2:  # a picture of a single colour
        return 1.0
    for shrink in SHRINKS:
        small = grey.resize(
            (max(1, round(grey.width / shrink)), max(1, round(grey.height / shrink))), Image.Resampling.LANCZOS
        )
        lost = values - np.asarray(small.resize(grey.size, Image.Resampling.BICUBIC), np.float32)
        if _strongest(np.sqrt((_tiles(lost, tile) ** 2).mean(axis=1))) > LOST * max(contrast, 4):
            break
        found = 1 / shrink
    return found


def _tiles(values, side):
    height, width = (length - length % side for length in values.shape)
    tiles = values[:height, :width].reshape(height // side, side, width // side, side)
    return tiles.swapaxes(1, 2).reshape(-1, side * side)


def _strongest(values):
    count = max(1, len(values) // 50)
    return float(np.partition(values, -count)[-count:].mean())


def find_bars(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Returns the widths of the bars (left, top, right, bottom) of pixels (height, width, 3), as parts of the sides.

    A bar has one colour, and ends in a straight line across the whole picture; a plain background does not.
    """
    left, right = (_bar(np.swapaxes(pixels, 0, 1)[::step]) for step in (1, -1))
    top, bottom = (_bar(pixels[::step]) for step in (1, -1))
    return left, top, right, bottom


def _bar(rows):
    """The part of the rows, from the first one on, that is a bar."""
    colour = np.median(rows[0], axis=0)
    plain = (np.abs(rows - colour) <= BAR_NOISE).all(axis=2).mean(axis=1) > 0.98
    count = len(rows) if plain.all() else int(np.argmin(plain))
    if not BAR_LEAST * len(rows) <= count < 0.6 * len(rows):
        return 0.0
    beyond = np.abs(rows[min(count + 1, len(rows) - 1)] - colour).max(axis=1) > BAR_EDGE
    return count / len(rows) if beyond.mean() > 0.75 else 0.0


def _colours(image):
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX)) >> 6
    codes = small[..., 0] * 16 + small[..., 1] * 4 + small[..., 2]
    return np.sqrt(np.bincount(codes.ravel(), minlength=64) / codes.size).astype(np.float32)


def _fine(grey):
    small = grey.resize((FINE_SIDE, FINE_SIDE), Image.Resampling.BOX)
    blurred = small.filter(ImageFilter.GaussianBlur(3))
    difference = np.asarray(small, np.int16) - np.asarray(blurred, np.int16)
    return difference.clip(-FINE_CLIP, FINE_CLIP).astype(np.int8)


# A mark that stands at one place on several pictures.

MARK_WIDTH, MARK_HEIGHT, PARTS, STEP = 160, 32, 4, (20, 8)  # the window that is compared, in pixels of `Look.fine`
LEAST_CONTRAST = 1.5  # of each part of the window
STRAIGHT = 0.8  # coherence of the gradients: a single edge, such as a horizon, is no mark


def shared_marks(fine: np.ndarray) -> np.ndarray:
    """Returns how alike each two of N pictures (N, FINE_SIDE, FINE_SIDE) are at the place where they are most alike (N, N).

    A window of text or of a logo has strokes in several directions in most of its parts. The likeness is the second lowest
    correlation of the four parts of a window, so that an edge that two pictures have in common does not count.
    """
    count, width = len(fine), MARK_WIDTH // PARTS
    best = np.zeros((count, count), np.float32)
    for y in range(0, FINE_SIDE - MARK_HEIGHT + 1, STEP[1]):
        columns = {}
        for x in range(0, FINE_SIDE - MARK_WIDTH + 1, STEP[0]):
            parts = []
            for left in range(x, x + MARK_WIDTH, width):
                if left not in columns:
                    columns[left] = _correlations(fine[:, y : y + MARK_HEIGHT, left : left + width])
                parts.append(columns[left])
            best = np.maximum(best, np.partition(np.stack(parts), 1, axis=0)[1])
    np.fill_diagonal(best, 0)
    return best


def _correlations(part):
    """The correlations of one place of all pictures (N, h, w); 0 where there is nothing, or only a straight edge."""
    part = part.astype(np.float32)
    across, down = np.diff(part, axis=2)[:, :-1], np.diff(part, axis=1)[:, :, :-1]
    a, b, c = (across**2).sum((1, 2)), (down**2).sum((1, 2)), (across * down).sum((1, 2))
    coherence = np.sqrt((a - b) ** 2 + 4 * c**2) / np.maximum(a + b, 1e-6)
    rows = part.reshape(len(part), -1)
    norms = np.linalg.norm(rows, axis=1)
    usable = (norms / np.sqrt(rows.shape[1]) > LEAST_CONTRAST) & (coherence < STRAIGHT)
    rows = rows / np.maximum(norms, 1e-6)[:, None] * usable[:, None]
    return rows @ rows.T

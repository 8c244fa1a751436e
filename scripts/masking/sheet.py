"""The review sheet of masks: each picture beside what counts of it, for `mask.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from text_to_image_lora.pictures.inside import read_bytes
from text_to_image_lora.pictures.masks import open_masked
from text_to_image_lora.pictures.sheets import Label, Row
from text_to_image_lora.pictures.transforms import ImageError

from ..annotating import sheet
from .dataset import OWN_FOLDER


NAME = "masks.png"
LABEL_WIDTH = 420  # pixels of a label
LABEL_LINES = 7
HIDDEN = (255, 0, 255)  # the colour over what does not count
STRENGTH = 0.75  # of that colour


class Shown(NamedTuple):
    """A picture on the sheet."""

    picture: Path
    mask: Path | None  # None: no mask was made
    reason: str = ""


def choose_sheet(file: str | None, folder: Path) -> Path:
    """Returns the path of the first page; raises `InputError` if a trainer would take the page for a training picture."""
    return sheet.choose_sheet(file, folder, folder / OWN_FOLDER / NAME)


def write_sheet(path: Path, shown: Sequence[Shown], folder: Path) -> list[Path]:
    """Writes the pages and returns their paths."""

    def make_row(item):
        text, *pictures = _look(item)
        label = Label(text, item.picture.relative_to(folder).as_posix())
        return Row(label, [sheet.squared(picture) for picture in pictures], LABEL_WIDTH, LABEL_LINES)

    return sheet.write_sheet(path, shown, make_row, "pictures", folder / OWN_FOLDER / NAME)


def _look(item):
    """Returns what is said of a picture, the picture, and the picture with a colour over what does not count."""
    try:
        opened = open_masked(read_bytes(item.picture), None if item.mask is None else read_bytes(item.mask))
    except (ImageError, OSError) as error:  # changed or deleted since
        blank = Image.new("RGB", (sheet.SIDE, sheet.SIDE), "white")
        return item.reason or str(error), blank, blank
    if opened.mask is None:
        return f"no mask: {item.reason}", opened.image, opened.image
    return f"{np.asarray(opened.mask).mean() / 255:.0%} counts", opened.image, laid_over(opened.image, opened.mask)


def laid_over(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Returns a picture with a colour over what its mask does not show."""
    covered = Image.blend(image, Image.new("RGB", image.size, HIDDEN), STRENGTH)
    return Image.composite(image, covered, mask)

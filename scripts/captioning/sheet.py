"""The review sheet of captions: each picture beside its caption, for `caption.py`."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from text_to_image_lora.pictures.inside import read_bytes
from text_to_image_lora.pictures.sheets import Label, Row
from text_to_image_lora.pictures.transforms import ImageError, open_image

from ..annotating import sheet
from .dataset import OWN_FOLDER


NAME = "captions.png"
LABEL_WIDTH = 860  # pixels of a caption
LABEL_LINES = 7  # as high as a picture, with the line of its name


def choose_sheet(file: str | None, folder: Path) -> Path:
    """Returns the path of the first page; raises `InputError` if a trainer would take the page for a training picture."""
    return sheet.choose_sheet(file, folder, folder / OWN_FOLDER / NAME)


def write_sheet(path: Path, captions: Sequence[tuple[Path, str]], folder: Path) -> list[Path]:
    """Writes the pages and returns their paths."""

    def make_row(item):
        picture, caption = item
        label = Label(caption, picture.relative_to(folder).as_posix())
        return Row(label, [_small(picture)], LABEL_WIDTH, LABEL_LINES)

    return sheet.write_sheet(path, captions, make_row, "captions", folder / OWN_FOLDER / NAME)


def _small(picture):
    """Returns a picture in a square; a white one if it can't be read any more."""
    try:
        return sheet.squared(open_image(read_bytes(picture)))
    except (ImageError, OSError):
        return Image.new("RGB", (sheet.SIDE, sheet.SIDE), "white")

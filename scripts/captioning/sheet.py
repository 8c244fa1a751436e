"""The review sheet: each picture beside its caption, on as many pages as needed, for `caption.py`."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import check_writable, printable
from text_to_image_lora.pictures.inside import read_bytes
from text_to_image_lora.pictures.sheets import Label, Row, labelled_sheet, save_sheet
from text_to_image_lora.pictures.transforms import ImageError, open_image

from .dataset import OWN_FOLDER


NAME = "captions.png"
ENDINGS = (".png", ".jpg", ".webp")
PER_PAGE = 20
MOST_PICTURES = 400
SIDE = 192  # pixels of a picture
LABEL_WIDTH = 860  # pixels of a caption
LABEL_LINES = 7  # as high as a picture, with the line of its name


def choose_sheet(file: str | None, folder: Path) -> Path:
    """Returns the path of the first page; raises `InputError` if a trainer would take the page for a training picture."""
    if file is None:
        return folder / OWN_FOLDER / NAME
    path = Path(file)
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"--sheet {printable(file)}: name a .png, .jpg or .webp file.")
    if path.resolve().is_relative_to(folder.resolve()):
        between = path.resolve().relative_to(folder.resolve()).parts[:-1]
        if not any(part.startswith((".", "__")) for part in between):
            raise InputError(
                f"--sheet {printable(file)}: a trainer would take the sheet for a training picture. Name a file outside of "
                f"{printable(folder)}, or leave --sheet out."
            )
    check_writable(path.parent, "--sheet")
    return path


def write_sheet(path: Path, captions: Sequence[tuple[Path, str]], folder: Path) -> list[Path]:
    """Writes the pages and returns their paths; of very many pictures, evenly spaced ones are shown."""
    count = min(len(captions), MOST_PICTURES)
    shown = [captions[i] for i in np.linspace(0, len(captions) - 1, count).round().astype(int)]
    pages = [shown[first : first + PER_PAGE] for first in range(0, count, PER_PAGE)]
    written = []
    for number, page in enumerate(pages, 1):
        rows = [
            Row(Label(caption, picture.relative_to(folder).as_posix()), [_small(picture)], LABEL_WIDTH, LABEL_LINES)
            for picture, caption in page
        ]
        title = f"{len(captions)} captions" if len(captions) == count else f"{count} of {len(captions)} captions"
        sheet = labelled_sheet(rows, title=f"{title}, page {number} of {len(pages)}")
        name = path if len(pages) == 1 else path.with_stem(f"{path.stem}-{number}")
        save_sheet(sheet, name)
        written.append(name)
    if path == folder / OWN_FOLDER / NAME:
        _remove_old_pages(path, written)
    return written


def _remove_old_pages(path, written):
    """Deletes the pages of an earlier run, which may have had more or fewer of them."""
    for old in path.parent.iterdir():
        if re.fullmatch(rf"{path.stem}(-\d+)?\{path.suffix}", old.name) and old not in written:
            old.unlink()


def _small(picture):
    """Returns a picture in a square; a white one if it can't be read any more."""
    try:
        image = open_image(read_bytes(picture))
    except (ImageError, OSError):
        return Image.new("RGB", (SIDE, SIDE), "white")
    return ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.LANCZOS, color="white")

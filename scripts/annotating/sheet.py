"""The review sheet: a row for each picture, on as many pages as needed."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import check_writable, printable
from text_to_image_lora.pictures.sheets import Row, labelled_sheet, save_sheet


ENDINGS = (".png", ".jpg", ".webp")
PER_PAGE = 20
MOST_PICTURES = 400
SIDE = 192  # pixels of a picture


def choose_sheet(file: str | None, folder: Path, own_sheet: Path) -> Path:
    """Returns the path of the first page; raises `InputError` if a trainer would take the page for a training picture.

    `own_sheet` is where it is if the user names no file: in a folder of `folder` that trainers ignore.
    """
    if file is None:
        return own_sheet
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


def write_sheet(
    path: Path, items: Sequence[Any], make_row: Callable[[Any], Row], title: str, own_sheet: Path
) -> list[Path]:
    """Writes the pages and returns their paths; of very many items, evenly spaced ones are shown.

    `title` says what the items are, such as "captions".
    """
    count = min(len(items), MOST_PICTURES)
    shown = [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
    pages = [shown[first : first + PER_PAGE] for first in range(0, count, PER_PAGE)]
    written = []
    for number, page in enumerate(pages, 1):
        of_all = f"{len(items)} {title}" if len(items) == count else f"{count} of {len(items)} {title}"
        sheet = labelled_sheet([make_row(item) for item in page], title=f"{of_all}, page {number} of {len(pages)}")
        name = path if len(pages) == 1 else path.with_stem(f"{path.stem}-{number}")
        save_sheet(sheet, name)
        written.append(name)
    if path == own_sheet:
        _remove_old_pages(path, written)
    return written


def _remove_old_pages(path, written):
    """Deletes the pages of an earlier run, which may have had more or fewer of them."""
    for old in path.parent.iterdir():
        if re.fullmatch(rf"{path.stem}(-\d+)?\{path.suffix}", old.name) and old not in written:
            old.unlink()


def squared(image: Image.Image, color: str = "white") -> Image.Image:
    """Returns a picture as the square that a sheet shows."""
    from PIL import ImageOps

    return ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.LANCZOS, color=color)

"""The pictures of a folder, and copies of what a run replaces beside them."""

import os
import shutil
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import printable, written_whole
from text_to_image_lora.pictures.formats import is_readable
from text_to_image_lora.pictures.inside import check_file, home_folders
from text_to_image_lora.pictures.names import METADATA_NAMES, find_files, is_picture


class Listing(NamedTuple):
    """A folder with its subfolders, as a training run lists it."""

    folder: Path
    files: list[Path]
    pictures: list[Path]
    tables: list[Path]  # metadata files
    homes: tuple[Path, ...]  # the folders that all files have to be in, see `pictures/inside.py`


def list_folder(folder: Path) -> Listing:
    """Lists a folder; raises `InputError` if there are no pictures, or if it can't be read."""
    if not folder.is_dir():
        reason = "it is a file" if folder.exists() else "there is no such folder"
        raise InputError(f"{printable(folder)}: {reason}. Pass the folder that contains the pictures.")
    files, homes = find_files(folder).files, home_folders([folder])
    pictures = [path for path in files if is_picture(path)]
    if not pictures:
        raise InputError(f"{printable(folder)}: it contains no pictures. Pass the folder that contains them.")
    for picture in pictures:
        check_file(picture, homes)
    tables = [path for path in files if path.name.lower() in METADATA_NAMES]
    return Listing(folder, files, pictures, tables, homes)


def key_of(picture: str | Path) -> str:
    """Returns what identifies a picture: its real path, with accents composed."""
    return unicodedata.normalize("NFC", os.path.realpath(picture))


def keys_in(row: dict[str, Any], folder: Path) -> list[str]:
    """Returns the keys of all pictures that a row of a table names: in the reader's eyes also masks belong to the row."""
    names = [value for value in row.values() if isinstance(value, str) and "\0" not in value]
    return [key_of(folder / name.replace("\\", "/")) for name in names if is_readable(Path(name[-99:]).suffix)]


def check_stems(pictures: Iterable[Path], ending: str, remedy: str) -> None:
    """Raises `InputError` if two pictures would share the file that is written beside them."""
    first = {}
    for picture in pictures:
        other = first.setdefault(picture.with_suffix(""), picture)
        if other is not picture:
            raise InputError(
                f"{printable(picture)}: it would share {picture.stem}{ending} with {printable(other.name)}. {remedy}"
            )


def keep_copies(old: Iterable[Path], folder: Path, own_folder: str) -> Path | None:
    """Copies files that will be replaced into a new folder in `own_folder`, and returns it; None if there are none."""
    old = [*old]
    if not old:
        return None
    stem = folder / own_folder / time.strftime("before-%Y-%m-%d-%H%M%S")
    place, number = stem, 1
    while place.exists():
        number += 1
        place = stem.with_name(f"{stem.name}-{number}")
    with written_whole(place, folder=True) as temporary:
        for path in old:
            copy = temporary / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    return place

"""The folder of `caption.py`: which pictures have captions, and how new captions are written and old ones kept."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import check_writable, counted, printable, write_new, write_whole, written_whole
from text_to_image_lora.pictures.inside import check_file, home_folders
from text_to_image_lora.pictures.names import METADATA_NAMES, CaptionFiles, find_files, is_picture

from .table import NAME, Table, key_of, pictures_in


# The reader of training data ignores folders whose names begin with "__".
OWN_FOLDER = "__captions"


class Dataset(NamedTuple):
    """The pictures of a folder and of its subfolders, and where their captions are."""

    folder: Path
    pictures: list[Path]
    caption_files: CaptionFiles
    tables: list[Path]
    in_tables: set[str]  # keys of the pictures that tables name

    def is_captioned(self, picture: Path) -> bool:
        """Whether a picture has a caption file beside it, or is named by a table."""
        return self.caption_files.beside(picture) is not None or key_of(picture) in self.in_tables


def read_dataset(folder: Path) -> Dataset:
    """Lists a folder as the trainer does; raises `InputError` if there are no pictures, or if it can't be read."""
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
    in_tables = {key for table in tables for key in pictures_in(table, homes)}
    return Dataset(folder, pictures, CaptionFiles(files), tables, in_tables)


def choose_pictures(dataset: Dataset, output: str, *, overwrite: bool) -> list[Path]:
    """Returns the pictures to caption; raises `InputError` if the trainer would not read the captions that are written."""
    chosen = [picture for picture in dataset.pictures if overwrite or not dataset.is_captioned(picture)]
    if not chosen:
        return chosen
    others = [table for table in dataset.tables if table != dataset.folder / NAME]
    if others:
        raise InputError(
            f"{printable(others[0])}: a trainer reads the captions from this file, and only {NAME} in the folder itself can "
            f"be continued. Move its rows there, or move the file out of the folder."
        )
    if output == "txt" and dataset.tables:
        raise InputError(
            f"{printable(dataset.tables[0])}: a trainer reads the captions from this file, and would not read .txt files. "
            "Pass --output jsonl, or move the file out of the folder."
        )
    beside = [picture for picture in dataset.pictures if dataset.caption_files.beside(picture) is not None]
    left = [picture for picture in beside if key_of(picture) not in dataset.in_tables]
    if output == "jsonl" and left and not overwrite:
        raise InputError(
            f"{printable(dataset.folder)}: caption files are beside {counted(len(left), 'picture')}, which a trainer does not read "
            f"where there is a {NAME}. Pass --output txt, or --overwrite to caption all pictures anew."
        )
    if output == "txt":
        _check_stems(chosen)
    check_writable(dataset.folder, "FOLDER")
    return chosen


def _check_stems(pictures):
    """Raises `InputError` if two pictures would share a caption file."""
    first = {}
    for picture in pictures:
        other = first.setdefault(picture.with_suffix(""), picture)
        if other is not picture:
            raise InputError(
                f"{printable(picture)}: it would share {picture.stem}.txt with {printable(other.name)}. Rename one of the two "
                "pictures, or pass --output jsonl."
            )


def keep_old_captions(dataset: Dataset, output: str, pictures: list[Path]) -> Path | None:
    """Copies the captions that will be replaced into a new folder, and returns it; None if there are none."""
    if output == "jsonl":
        old = [table for table in dataset.tables if table == dataset.folder / NAME]
    else:
        beside = [dataset.caption_files.beside(picture) for picture in pictures]
        old = [path for path in beside if path is not None]
    if not old:
        return None
    stem = dataset.folder / OWN_FOLDER / time.strftime("before-%Y-%m-%d-%H%M%S")
    place, number = stem, 1
    while place.exists():
        number += 1
        place = stem.with_name(f"{stem.name}-{number}")
    with written_whole(place, folder=True) as temporary:
        for path in old:
            copy = temporary / path.relative_to(dataset.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    return place


class TextFiles:
    """Writes a .txt file beside each picture."""

    def __init__(self, dataset: Dataset):
        self.caption_files = dataset.caption_files

    def write(self, captions: Mapping[Path, str], *, overwrite: bool) -> None:
        """Writes captions; without `overwrite`, a file that is there already stays as it is."""
        for picture, caption in captions.items():
            path, data = picture.with_suffix(".txt"), f"{caption}\n".encode()
            if not overwrite:
                write_new(path, data)
                continue
            old = self.caption_files.beside(picture)
            if old is not None and old.suffix.lower() == ".txt":
                path = old  # perhaps with the ending in capital letters
            write_whole(path, data)
            if old is not None and old != path:
                old.unlink(missing_ok=True)  # a .caption file, of which `keep_old_captions` has made a copy


class TableRows:
    """Writes the rows of `metadata.jsonl`."""

    def __init__(self, dataset: Dataset):
        self.table = Table(dataset.folder)
        self.before = {*self.table.places}

    def write(self, captions: Mapping[Path, str], *, overwrite: bool) -> None:
        """Writes captions; without `overwrite`, the rows of pictures that had one at the start stay as they are."""
        new = {
            picture: caption
            for picture, caption in captions.items()
            if overwrite or key_of(picture) not in self.before
        }
        for picture, caption in new.items():
            self.table.put(picture, caption)
        if new:
            self.table.write()


OUTPUTS = {"txt": TextFiles, "jsonl": TableRows}

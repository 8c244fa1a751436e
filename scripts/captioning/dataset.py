"""The folder of `caption.py`: which pictures have captions, and how new captions are written and old ones kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import check_writable, counted, printable, write_new, write_whole
from text_to_image_lora.pictures.names import CaptionFiles

from ..annotating.folder import check_stems, keep_copies, key_of, list_folder
from .table import NAME, Table, pictures_in


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
    found = list_folder(folder)
    in_tables = {key for table in found.tables for key in pictures_in(table, found.homes)}
    return Dataset(folder, found.pictures, CaptionFiles(found.files), found.tables, in_tables)


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
        check_stems(chosen, ".txt", "Rename one of the two pictures, or pass --output jsonl.")
    check_writable(dataset.folder, "FOLDER")
    return chosen


def keep_old_captions(dataset: Dataset, output: str, pictures: list[Path]) -> Path | None:
    """Copies the captions that will be replaced into a new folder, and returns it; None if there are none."""
    if output == "jsonl":
        old = [table for table in dataset.tables if table == dataset.folder / NAME]
    else:
        beside = [dataset.caption_files.beside(picture) for picture in pictures]
        old = [path for path in beside if path is not None]
    return keep_copies(old, dataset.folder, OWN_FOLDER)


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

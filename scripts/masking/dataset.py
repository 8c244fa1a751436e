"""The folder of `mask.py`: which pictures have masks, and how new masks are written and old ones kept."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from text_to_image_lora.files import check_writable, write_new, write_whole
from text_to_image_lora.pictures.names import MASK_ENDINGS, mask_beside
from text_to_image_lora.pictures.tables import read_table

from ..annotating.folder import check_stems, keep_copies, key_of, keys_in, list_folder


# The reader of training data ignores folders whose names begin with "__".
OWN_FOLDER = "__masks"
ENDING = MASK_ENDINGS[0]


class Dataset(NamedTuple):
    """The pictures of a folder and of its subfolders, and their masks."""

    folder: Path
    pictures: list[Path]
    beside: dict[Path, Path]  # {picture: the mask beside it}
    in_tables: set[str]  # keys of the pictures whose masks are named by a table

    def is_masked(self, picture: Path) -> bool:
        return picture in self.beside or key_of(picture) in self.in_tables

    def place_of(self, picture: Path) -> Path:
        """Returns the file that a training run reads as the mask of a picture, or would read."""
        return self.beside.get(picture) or picture.with_name(picture.stem + ENDING)


def read_dataset(folder: Path) -> Dataset:
    """Lists a folder as the trainer does; raises `InputError` if there are no pictures, or if it can't be read."""
    found = list_folder(folder)
    masked, masks = set(), set()
    for table in found.tables:
        for _, row in read_table(table, found.homes):
            own = {name: value for name, value in row.items() if "mask" in name.casefold()}
            if keys := keys_in(own, table.parent):
                masks |= {*keys}
                masked |= {*keys_in(row, table.parent)} - masks
    pictures = [picture for picture in found.pictures if key_of(picture) not in masks]
    beside = {picture: mask_beside(picture, found.homes) for picture in pictures}
    return Dataset(folder, pictures, {picture: mask for picture, mask in beside.items() if mask is not None}, masked)


def choose_pictures(dataset: Dataset, *, overwrite: bool) -> list[Path]:
    """Returns the pictures to mask: without `overwrite`, those that have no mask.

    A mask that a table names stays, because a training run reads it instead of one beside the picture.
    """
    chosen = [
        picture
        for picture in dataset.pictures
        if key_of(picture) not in dataset.in_tables and (overwrite or picture not in dataset.beside)
    ]
    if chosen:
        check_stems(chosen, ENDING, "Rename one of the two pictures.")
        check_writable(dataset.folder, "FOLDER")
    return chosen


def keep_old_masks(dataset: Dataset, pictures: list[Path]) -> Path | None:
    """Copies the masks that will be replaced into a new folder, and returns it; None if there are none."""
    return keep_copies(
        [dataset.beside[each] for each in pictures if each in dataset.beside], dataset.folder, OWN_FOLDER
    )


def write_masks(dataset: Dataset, masks: Mapping[Path, Any], *, overwrite: bool) -> None:
    """Writes greyscale pictures as masks; without `overwrite`, a file that is there already stays as it is."""
    for picture, mask in masks.items():
        data = io.BytesIO()
        mask.save(data, "PNG")
        (write_whole if overwrite else write_new)(dataset.place_of(picture), data.getvalue())

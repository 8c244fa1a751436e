"""Reads folders whose captions are in metadata files: `metadata.csv`, `.jsonl` or `.parquet`."""

import difflib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import printable
from .inside import is_inside
from .layouts import MOST_REPEATS, ReadOptions, log_unused_masks, make_row, mask_paths
from .names import METADATA_NAMES, is_picture, mask_beside, reason_against
from .tables import (
    MOST_COLUMNS,
    choose_caption_column,
    nonempty_captions,
    read_table,
    reason_against_caption,
    shortened,
    text_columns,
)


logger = logging.getLogger(__name__)
MOST_NAME = 4096  # characters of a path that Linux accepts
REPEATS_COLUMN = "num_repeats"  # how often the picture of a row is used per epoch; no column: once
SOURCE = re.compile(r"(.+):(\d+): '.*'", re.DOTALL)


def place_of(source: str) -> tuple[Path, int] | None:
    """Returns the metadata file and the line of a record's `source`, or None if it is not from a metadata file."""
    match = SOURCE.fullmatch(source)
    return (Path(match[1]), int(match[2])) if match and Path(match[1]).name.lower() in METADATA_NAMES else None


class Columns(NamedTuple):
    """The columns of a metadata file."""

    file: str
    caption: str
    others: tuple[str, ...]  # with text, which could also hold the captions
    mask: str | None
    concept: str | None


def read_metadata(folder: Path, files: list[Path], reading: ReadOptions) -> Iterator[dict[str, Any]]:
    """Yields the rows of all metadata files of a folder, as `layouts.read_folder` does for the other layouts."""
    tables = [path for path in files if path.name.lower() in METADATA_NAMES]
    if not tables:
        raise InputError(f"{folder}: it holds no metadata.csv, .jsonl or .parquet (--dataset_layout metadata).")
    if reading.captions.instance_prompt is not None:
        logger.info(f"{folder}: it has its own captions, so --instance_prompt is not used for it")
    named, masks, count, chosen = set(), set(), 0, Counter()
    for file, after in zip(tables, [*tables[1:], None]):
        if after is not None and after.parent == file.parent:
            raise InputError(
                f"{file.parent}: it holds both {file.name} and {after.name}, so its pictures would be used twice. "
                "Keep only one of the two files."
            )
        table = read_table(file, reading.homes)
        if not table:
            continue
        columns = find_columns(file, [row for _, row in table], reading)
        chosen[columns.caption, columns.others] += 1
        for row in _read_rows(file, table, columns, folder, reading):
            named.add(os.path.realpath(row["image"]["path"]))
            masks |= mask_paths(row)
            count += 1
            yield row
    for caption, others in chosen:
        if others and reading.data.caption_column is None:
            logger.info(
                f"{folder}: the captions are read from column '{caption}', not from {', '.join(others)} (--caption_column)"
            )
    used = named | masks
    without = [path for path in files if is_picture(path) and os.path.realpath(path) not in used]
    if without:
        what = "1 picture has" if len(without) == 1 else f"{len(without)} pictures have"
        logger.info(
            f"{folder}: {what} no row in a metadata file and will not be trained on; the first: {printable(without[0])}"
        )
    log_unused_masks(folder, files, masks)
    if len(named) < count:
        logger.info(f"{folder}: {count - len(named)} rows name a picture that another row names too; each row is used")


def find_columns(file: Path, rows: list[dict], reading: ReadOptions) -> Columns:
    """Returns the `Columns` of a metadata file; raises `InputError` if one is missing."""
    asked = reading.data
    columns = list(dict.fromkeys(key for row in rows for key in row if key is not None))
    if len(columns) > MOST_COLUMNS:
        raise InputError(
            f"{file}: it has more than the limit of {MOST_COLUMNS:,} columns. Keep only file_name and the captions."
        )
    file_column = asked.image_column
    if "file_name" in columns and file_column in (None, "image"):
        if file_column in columns:
            raise InputError(
                f"{file}: it has a column '{file_column}' beside file_name, which names the pictures. Remove one of the two, "
                "or leave --image_column out."
            )
        file_column = "file_name"
    if file_column is None or file_column not in columns:
        wanted = f"there is no column '{file_column or 'file_name'}'"
        remedy = " Pass the one with the names of the files as --image_column."
        raise InputError(f"{file}: {wanted}. The columns are: {', '.join(columns)}.{remedy}")
    for kind in ("mask", "concept"):
        name = getattr(asked, f"{kind}_column")
        if name is not None and name not in columns:
            raise InputError(
                f"{file}: there is no column '{name}' (--{kind}_column). The columns are: {', '.join(columns)}."
            )
    if asked.mask_column is not None and asked.mask_column == file_column:
        raise InputError(
            f"{file}: column '{file_column}' names the pictures, so it can't name their masks (--mask_column)."
        )
    taken = {file_column, asked.mask_column, asked.concept_column, REPEATS_COLUMN}
    textual = text_columns([name for name in columns if name not in taken], rows, asked.caption_column)
    chosen = choose_caption_column(str(file), columns, textual, asked.caption_column)
    others = tuple(name for name in textual if name != chosen)
    return Columns(file_column, chosen, others, asked.mask_column, asked.concept_column)


def _read_rows(file, table, columns, dataset_folder, reading):
    """Yields the usable rows of a metadata file; the concept is the folder's name or the value of a column."""
    root, missing = file.parent.resolve(), 0
    for number, row in table:
        where, name = f"{file}:{number}", row.get(columns.file)
        captions, reason, path = row.get(columns.caption), None, None
        if name is None or name == "":
            reason = f"column '{columns.file}' is empty"
        elif not isinstance(name, str):
            reason = f"column '{columns.file}' holds {shortened(repr(name))}, which is not the name of a file"
        elif len(name) > MOST_NAME:
            reason = f"{shortened(name)!r} is too long for the name of a file"
        elif "://" in name:
            reason = f"'{name}' is a URL, and pictures are read from files only"
        elif (path := _find_picture(root, name)) is None:
            missing += 1
            reason = f"{name!r} does not exist" + (_similar_name(root, name) if missing <= 3 else "")
        elif not is_inside(path, reading.homes):
            raise InputError(
                f"{where}: '{name}' leaves the dataset folder {dataset_folder}. Move the picture into it."
            )
        else:
            reason = reason_against(path) or reason_against_caption(captions, columns.caption)
        mask, mask_path = row.get(columns.mask) if columns.mask is not None else None, None
        if reason is None and mask:
            is_name = isinstance(mask, str) and len(mask) <= MOST_NAME
            mask_path = _find_picture(root, mask) if is_name else None
            if mask_path is None or not is_inside(mask_path, reading.homes):
                reason = f"its mask {shortened(repr(mask))} does not exist in the dataset folder"
        num_repeats = _repeats_of(row)
        if reason is None and num_repeats is None:
            reason = (
                f"column '{REPEATS_COLUMN}' holds {shortened(repr(row[REPEATS_COLUMN]))}, which is not a whole number from 1 to "
                f"{MOST_REPEATS}"
            )
        if reason is not None or path is None:
            if reading.leave_out is None:
                raise InputError(f"{where}: {reason}. Fix the row, or pass --skip_bad_images to leave such rows out.")
            reading.leave_out(where, str(reason))
            continue
        mask_path = mask_path if mask else mask_beside(path, reading.homes)
        concept = root.name if columns.concept is None else str(row.get(columns.concept))
        yield make_row(path, nonempty_captions(captions), concept, num_repeats or 1, f"{where}: '{name}'", mask_path)


def _repeats_of(row):
    """Returns how often the picture of a row is used per epoch, or None if the value can't mean that."""
    value = row.get(REPEATS_COLUMN)
    if value is None or value == "":
        return 1
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        return None
    is_whole = isinstance(number, int | float) and not isinstance(number, bool) and number == number // 1
    return int(number) if is_whole and 1 <= number <= MOST_REPEATS else None


def _similar_name(root, name):
    """Formats the most similar name of a file in a folder, or "" if there is none."""
    there = {entry.name.casefold(): entry.name for entry in root.iterdir()}
    similar = difflib.get_close_matches(name.casefold(), there, n=1, cutoff=0.8)
    if similar and there[similar[0]] == name:
        return " as a regular file"
    return f" (there is {there[similar[0]]!r})" if similar else ""


def _find_picture(root, name):
    r"""Finds a file by its name in a row.

    Its accents may be in composed form or in decomposed form (as on macOS), its folders may be separated by `\` (as on
    Windows), and it may repeat the folders that the metadata file itself is in.
    """
    spellings = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    spellings += [spelling.replace("\\", "/") for spelling in spellings if "\\" in spelling]
    for parts in [Path(spelling).parts for spelling in spellings]:
        for count in range(len(parts)):
            if parts[:count] != root.parts[len(root.parts) - count :]:
                continue
            try:
                if (path := root.joinpath(*parts[count:])).is_file():
                    return path
            except (OSError, ValueError):  # the name is too long or contains NUL
                return None
    return None

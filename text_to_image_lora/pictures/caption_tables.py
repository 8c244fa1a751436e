"""The captions of folders as rows of metadata files, in which they can be edited and saved, for the page of --dry_run."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from .inside import home_folders
from .layouts import ReadOptions
from .metadata import REPEATS_COLUMN, find_columns, place_of
from .sources import load_records
from .tables import nonempty_captions, read_table


CAPTION_COLUMN = "text"  # of a new table


class CaptionTable(NamedTuple):
    """What a file `metadata.jsonl` has to contain to take the place of the captions of a folder."""

    folder: Path  # where the file belongs
    column: str  # with the captions
    rows: list[dict[str, Any]]
    replaced: str | None  # the name of the metadata file that holds the captions now
    places: dict[str, int]  # {`source` of a record: the number of its row}
    concepts: bool  # whether the rows have a column `concept`, which folders told before


def caption_tables(reading: ReadOptions) -> list[CaptionTable]:
    """Returns a table for each metadata file, and for each folder with other captions; none for archives and stored datasets.

    The captions are as the user wrote them, without trigger word, prefix and suffix. A metadata file keeps its rows and columns.
    The rows of `max_train_samples` and others that a run leaves out are there too. Nothing is logged or left out twice.
    """
    plain = dataclasses.replace(reading.captions, trigger_word=None, caption_prefix="", caption_suffix="")
    data = dataclasses.replace(reading.data, max_train_samples=None)
    records = load_records(reading._replace(captions=plain, data=data, leave_out=lambda source, reason: None))
    folders = [Path(name) for name in data.train_data_dir or [str(data.dataset_name)]]
    in_files, in_folders = defaultdict(list), defaultdict(list)
    for index, source in enumerate(records["source"]):
        place = place_of(source)
        if place is not None and any(place[0].is_relative_to(folder) for folder in folders):
            in_files[place[0]].append((place[1], source))
        elif place is None and (folder := _folder_of(source, folders)):
            in_folders[folder].append(index)
    reading = reading._replace(homes=home_folders(folder for folder in folders if folder.is_dir()))
    tables = [_of_file(file, places, reading) for file, places in in_files.items()]
    return tables + [_of_folder(folder, records.select(indices)) for folder, indices in in_folders.items()]


def _folder_of(source, folders):
    """Returns the passed folder that a picture file lies in; None if `source` is no file in one, as in a stored dataset."""
    inside = [folder for folder in folders if Path(source).is_relative_to(folder) and folder.is_dir()]
    return inside[0] if inside and Path(source).is_file() else None


def _of_file(file, places, reading):
    table = read_table(file, reading.homes)
    columns = find_columns(file, [row for _, row in table], reading)
    numbers = {line: number for number, (line, _) in enumerate(table)}
    rows = [{name: value for name, value in row.items() if name is not None and _is_json(value)} for _, row in table]
    return CaptionTable(
        file.parent, columns.caption, rows, file.name, {source: numbers[line] for line, source in places}, False
    )


def _is_json(value):
    """Whether JSON can hold a cell, unlike the dates and bytes of Parquet files."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _of_folder(folder, records):
    concepts, repeats, sources = records["concept"][:], records["num_repeats"][:], records["source"][:]
    several, repeated, rows = len({*concepts}) > 1, {*repeats} != {1}, []
    for source, captions, concept, num_repeats in zip(sources, records["captions"][:], concepts, repeats, strict=True):
        captions = nonempty_captions(captions)
        row: dict[str, Any] = {"file_name": Path(source).relative_to(folder).as_posix()}
        row[CAPTION_COLUMN] = captions[0] if len(captions) == 1 else captions
        rows.append(
            row | ({REPEATS_COLUMN: num_repeats} if repeated else {}) | ({"concept": concept} if several else {})
        )
    return CaptionTable(
        folder, CAPTION_COLUMN, rows, None, {source: number for number, source in enumerate(sources)}, several
    )

"""Loads records from every source of pictures: folders in any layout, archives, stored datasets and hub datasets.

This module needs no torch, so that a wrong folder, column or row is reported before anything heavy is imported.
"""

import itertools
import logging
import os
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import printable
from .archives import OTHER_ARCHIVE_ENDINGS, is_archive, unpack
from .captions import edit_caption
from .inside import home_folders
from .layouts import REPEATS, ReadOptions, find_layout, read_folder
from .metadata import read_metadata
from .names import (
    METADATA_NAMES,
    Listing,
    check_name,
    find_files,
    has_caption_files,
    is_picture,
    other_tables,
    passed_over,
)
from .records import record_features, with_captions
from .stored import from_hub, from_stored
from .stored_files import OTHER_SPLITS, training_files


logger = logging.getLogger(__name__)
ROWS_TOGETHER = 5000  # rows as Python objects take several times the memory of their Arrow table
# Folders beside the one with the pictures, where kohya's GUI keeps LoRAs with their samples, logs, and class pictures.
NAMED = 8  # folders that are left out, in a message
KOHYAS_OTHERS = {"model", "log", "reg"}


def log_left_out(source: str, reason: str) -> None:
    """Logs a row that is left out; for `ReadOptions.leave_out`."""
    logger.info(f"left out: {source}: {reason}")


def load_records(reading: ReadOptions) -> Any:
    """Loads the records (see `records.py`) of a hub dataset or of folders and archives, in their own order.

    `train_data_dir` holds folders and archives; `dataset_name` is a folder, an archive or a hub id. Raises `InputError` for
    a folder, column, row or caption that cannot be used.
    """
    data, captions = reading.data, reading.captions
    if data.dataset_name is not None and not os.path.exists(data.dataset_name):
        parts = [from_hub(data.dataset_name, reading)]
    else:
        folders = list(map(Path, data.train_data_dir or [str(data.dataset_name)]))
        for index, source in enumerate(folders):
            check_name(source.absolute())
            if is_archive(source):
                folders[index] = unpack(source, reading.archive_dir)
                logger.info(f"{printable(source)}: read from {printable(folders[index])}, where it is unpacked")
        reading = reading._replace(homes=home_folders(folders))
        _say_what_is_twice(folders)
        parts = [_from_folder(folder, reading) for folder in folders]
    import datasets

    records = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if captions.trigger_word or captions.caption_prefix or captions.caption_suffix:
        edited = [[edit_caption(caption, captions) for caption in group] for group in records["captions"]]
        records = with_captions(records, edited)
    if data.max_train_samples is not None and data.max_train_samples < len(records):
        records = records.shuffle(seed=0, keep_in_memory=True).select(range(data.max_train_samples))
    return records


def _say_what_is_twice(folders):
    """Logs the folders whose pictures are read twice, because they are given twice or lie in another one."""
    real = [folder.resolve() for folder in folders]
    for index, folder in enumerate(folders):
        inside = next((j for j, other in enumerate(real) if j != index and real[index].is_relative_to(other)), None)
        if inside is not None and (real[inside] != real[index] or inside < index):
            where = "is given twice" if real[inside] == real[index] else f"lies in {printable(folders[inside])}"
            logger.info(f"{printable(folder)} {where}, so its pictures are trained twice as often as the others")


def _from_folder(folder, reading):
    _check_folder(folder)
    real = folder.resolve()
    listing = find_files(folder, [home for home in reading.homes if not real.is_relative_to(home)])
    on_disk = any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
    if not on_disk:
        folder, listing = _training_part(folder, listing)
    files = listing.files
    has_pictures, endings = any(map(is_picture, files)), {path.suffix.lower() for path in files}
    chosen, stored_files = reading.data.dataset_layout, None
    if chosen is None:
        chosen = find_layout(folder, files, reading.captions.instance_prompt)
        if chosen in (None, "trigger_class", "instance") and endings & {".parquet", ".arrow"}:
            chosen = None
            if has_pictures:  # such as the thumbnail of a hub repository
                logger.info(f"{folder}: training on its parquet or arrow files, not on the pictures beside them")
                stored_files = training_files(files, folder)
                if reading.captions.instance_prompt is not None:
                    logger.info(f"{folder}: it has its own captions, so --instance_prompt is not used for it")
    if chosen is not None:
        for line in passed_over(listing if chosen != "metadata" else listing.without_pictures()):
            logger.info(f"{folder}: {line}")
        if chosen != "metadata" and (hint := _hint_at_table(files)) and not has_caption_files(files):
            logger.info(f"{folder}: captions are not read from a table.{hint}")
        return _from_files(folder, chosen, files, reading)
    if on_disk or stored_files or (endings & {".parquet", ".arrow", ".tar"} and not has_pictures):
        return from_stored(folder, files, stored_files, on_disk, reading)
    hint = _hint_at_table(files) + "".join(f" {line[0].upper()}{line[1:]}." for line in passed_over(listing))
    if has_pictures:
        raise InputError(
            f"{folder}: the pictures have no captions. Add a metadata.csv with the columns file_name and text, or a .txt "
            "beside each picture, pass --instance_prompt for all pictures, or name their folder [trigger]_[class], such as sks_dog, "
            f"and pass --dataset_layout trigger_class (metadata/README.md shows each layout).{hint}"
        )
    raise InputError(
        f"{folder}: it contains no pictures and no metadata file. metadata/README.md shows each layout.{hint}"
    )


def _check_folder(folder):
    """Raises `InputError` unless this is a folder."""
    if folder.is_dir():
        return
    name = printable(folder)
    if not folder.exists():
        raise InputError(f"{name}: there is no such folder. Pass an existing one, or a hub id to --dataset_name.")
    if folder.name.lower().endswith(OTHER_ARCHIVE_ENDINGS):
        raise InputError(
            f"{name}: archives of this kind can't be read. Unpack it and pass the folder, or pack a .zip."
        )
    raise InputError(f"{name}: it is a file. Pass the folder that contains it: {printable(folder.parent)}")


def _training_part(folder, listing):
    """Returns the part of a folder that is meant for training, and its `Listing`: without other splits and kohya's others."""
    parts = {path.relative_to(folder).parts[0] for path in listing.files if is_picture(path)}
    if any(path.parent == folder and path.name.lower() in METADATA_NAMES for path in listing.files):
        return folder, listing
    split = next((name for name in sorted(parts) if name.lower() == "train"), None)
    others = sorted(name for name in parts if name.lower() in OTHER_SPLITS)
    if split is not None and others:
        left = sorted(parts - {split}, key=lambda name: (name not in others, name))
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        logger.info(
            f"{folder}: training on its subfolder {split}, not on {', '.join(map(printable, left[:NAMED]))}{more}"
        )
        return folder / split, listing.below(folder / split)
    others = sorted(name for name in parts if name.lower() in KOHYAS_OTHERS)
    own = [path for path in listing.files if path.relative_to(folder).parts[0] not in others]
    if others and any(
        REPEATS.fullmatch(part) for path in own if is_picture(path) for part in path.relative_to(folder).parts[:-1]
    ):
        reg = next((name for name in others if name.lower() == "reg"), None)
        hint = f" (for class pictures, pass --class_data_dir {folder / reg})" if reg else ""
        logger.info(f"{folder}: not training on {', '.join(others)}, where kohya's programs keep other pictures{hint}")
        listing = Listing(own, listing.ignored)
    return folder, listing


def _hint_at_table(files):
    """Returns how the captions of a table that is not named as a metadata file can be read, or "" without such a table."""
    for table in other_tables(files):
        ending = {".tsv": ".csv", ".xlsx": ".csv", ".json": ".jsonl"}.get(table.suffix.lower(), table.suffix.lower())
        rows = ", one object per line" if ending == ".jsonl" else ""
        return f" If {printable(table.name)} holds the captions, save it as metadata{ending} with the columns file_name and text{rows}."
    return ""


def _from_files(folder, layout, files, reading):
    """Reads the records of a folder in a layout; raises `InputError` if there are none."""
    left_out = []

    def leave_out(source, reason):
        left_out.append(f"{source}: {reason}")
        reading.leave_out(source, reason)

    asked = reading if reading.leave_out is None else reading._replace(leave_out=leave_out)
    rows = read_metadata(folder, files, asked) if layout == "metadata" else read_folder(folder, layout, files, asked)
    part, tables = list(itertools.islice(rows, ROWS_TOGETHER)), []
    import datasets  # after the first rows: importing it takes longer than to find a wrong column

    while part:
        tables.append(datasets.Dataset.from_list(part, features=record_features()))
        part = list(itertools.islice(rows, ROWS_TOGETHER))
    if tables:
        return datasets.concatenate_datasets(tables)
    if left_out:
        raise InputError(
            f"{folder}: it has no usable row. The first of {len(left_out)} that are left out: {left_out[0]}."
        )
    if layout == "metadata":
        raise InputError(f"{folder}: it has no usable row. Add one row per picture, with file_name and text.")
    remedy = " Name the folders as kohya does, such as 10_sks dog." if layout == "kohya" else ""
    raise InputError(f"{folder}: it contains no picture to train on.{remedy}")

"""A folder of pictures becomes rows, whichever tool it was made for: recognised by what lies in it.

| layout | what is in the folder |
|---|---|
| metadata | `metadata.csv`, `.jsonl` or `.parquet`, also one in each subfolder |
| caption_files | a `.txt` or `.caption` beside each picture, a caption a line |
| kohya | folders `N_name`, N the repeats, with caption files, else `name` is the caption |
| trigger_class | folders `[trigger]_[class]` without captions |
| instance | pictures without captions, and --instance_prompt for all |
"""

import difflib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import counted
from .settings import LAYOUTS, CaptionSettings, DataSettings
from .tables import choose_caption_column, is_caption, nonempty_captions, read_table, read_text


logger = logging.getLogger(__name__)
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl"}
CAPTION_ENDINGS = (".txt", ".caption")
MASK_ENDING = ".mask.png"
MOST_REPEATS = 1000  # more is a year or a date, not repeats
REPEATS = re.compile(r"(\d+)_(.+)")
TRIGGER_CLASS = re.compile(r"\[([^\[\]]+)\]_\[([^\[\]]+)\]|([^\[\]_]+)_([^\[\]]+)")


class ReadOptions(NamedTuple):
    """How folders and datasets are read: what was asked for by name; what was not, is found.

    With `leave_out`, rows without a picture or a caption are passed to it as (source, reason) and left out; else the first
    of them is an `InputError`.
    """

    data: DataSettings
    captions: CaptionSettings
    cache_dir: str | None = None  # of downloads
    archive_dir: str | Path = "archives"  # archives are unpacked below it
    leave_out: Callable[[str, str], Any] | None = None


def is_picture(path):
    return path.suffix.lower() in PICTURE_ENDINGS and not path.name.lower().endswith(MASK_ENDING)


def find_files(folder):
    """Every file below the folder, sorted; hidden ones and those that systems leave behind are no part of it."""

    def refuse(error):
        raise InputError(f"{error.filename}: it can't be read ({error.strerror}).") from error

    found = []
    for root, directories, names in os.walk(folder, onerror=refuse):
        directories[:] = sorted(name for name in directories if not name.startswith((".", "__")))
        for link in (Path(root) / name for name in directories if (Path(root) / name).is_symlink()):
            raise InputError(f"{link}: it is a link to a folder. Pass that folder too: --train_data_dir A B")
        found += [Path(root) / name for name in sorted(names) if not name.startswith(".")]
    return found


def find_layout(folder, files, instance_prompt):
    """The layout of a folder with these files; None where there are pictures and nothing says their captions."""
    pictures = [path for path in files if is_picture(path)]
    parents = list(dict.fromkeys(path.parent for path in pictures))
    if any(path.name.lower() in METADATA_NAMES for path in files):
        return "metadata"
    names = {path.relative_to(folder).as_posix() for path in files}
    if any(REPEATS.fullmatch(parent.resolve().name) for parent in parents):
        return "kohya"
    if any(_caption_file(path.relative_to(folder).as_posix(), names) for path in pictures):
        return "caption_files"
    if instance_prompt is not None:
        return "instance"
    # The folder that was passed, such as `my_pictures`, is not meant so, unless its name has the brackets.
    if parents and all(
        TRIGGER_CLASS.fullmatch(parent.resolve().name) and (parent != Path(folder) or "[" in parent.resolve().name)
        for parent in parents
    ):
        return "trigger_class"
    return None


def read_folder(folder, layout, files, reading):
    """Yields the rows of a folder: dicts of image and mask (paths), captions, concept, num_repeats and source.

    Raises `InputError` for what can't be used.
    """
    asked, leave_out, instance_prompt = reading.data, reading.leave_out, reading.captions.instance_prompt
    pictures = [path for path in files if is_picture(path)]
    if layout == "metadata":
        if instance_prompt is not None:
            logger.info(f"{folder}: it has captions of its own, so --instance_prompt is not used for it")
        yield from _metadata_rows(folder, files, pictures, reading)
        return
    upstreams_defaults = {"image_column": "image", "caption_column": "text"}
    for flag in ("image_column", "caption_column", "mask_column", "concept_column"):
        name = getattr(asked, flag)
        if name is not None and name != upstreams_defaults.get(flag):
            raise InputError(f"{folder}: there is no metadata file, so no column '{name}' (--{flag}).")
    names = {path.relative_to(folder).as_posix(): path for path in files}
    held, worded, masks, unnamed = Counter(), Counter(), set(), 0
    for path in pictures:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path}: it is a link out of the dataset folder. Copy the picture into it.")
        concept, num_repeats, reason, captions = path.parent.resolve().name, 1, None, []
        if layout == "kohya" and (match := REPEATS.fullmatch(concept)):
            num_repeats, concept = int(match[1]), match[2]
            if not 1 <= num_repeats <= MOST_REPEATS:
                raise InputError(
                    f"{path.parent}: its name says {match[1]} repeats. Write a number from 1 to {MOST_REPEATS} before the "
                    "'_', or pass --dataset_layout caption_files if it is none."
                )
        if layout in ("kohya", "caption_files"):
            beside = _caption_file(path.relative_to(folder).as_posix(), names)
            if beside is not None:
                captions = nonempty_captions([line.strip() for line in read_text(names[beside]).splitlines()])
                reason = None if captions else f"its caption file {Path(beside).name} is empty"
            elif instance_prompt is not None:
                captions = [instance_prompt]
            elif layout == "kohya":
                captions, unnamed = [concept.replace("_", " ")], unnamed + 1
            else:
                reason = f"there is no {path.stem}.txt beside it"
        elif layout == "trigger_class":
            concept, caption = _trigger_and_caption(path.parent, concept, reading.captions.caption_template)
            captions, worded[caption] = [caption], worded[caption] + 1
        elif instance_prompt is None:
            raise InputError("--dataset_layout instance needs --instance_prompt, the caption of all pictures.")
        else:
            captions = [instance_prompt]
        if reason is not None and leave_out is None:
            raise InputError(f"{path}: {reason}. Write one, or pass --skip_bad_images to leave such pictures out.")
        if reason is not None:
            leave_out(str(path), reason)
            continue
        row = _row(path, captions, concept, num_repeats, str(path), _mask_file(path, folder))
        held[path.parent, num_repeats] += 1
        masks |= _mask_of(row)
        yield row
    if unnamed:
        logger.info(f"{folder}: pictures without a caption file, whose folder's name is their caption: {unnamed}")
    if layout == "kohya":
        for (parent, num_repeats), count in held.items():
            logger.info(f"{parent}: {counted(count, 'picture')}, each {counted(num_repeats, 'time')} an epoch")
    _tell_unused_masks(folder, files, masks)
    for caption, count in worded.items():
        logger.info(f"{folder}: the caption '{caption}' is for {counted(count, 'picture')} (--caption_template)")


def _trigger_and_caption(folder, name, caption_template):
    match = TRIGGER_CLASS.fullmatch(name)
    if match is None:
        raise InputError(
            f"{folder}: name the folder [trigger]_[class], such as [sks]_[dog], or choose another --dataset_layout: "
            f"{', '.join(LAYOUTS)}."
        )
    trigger = match[1] or match[3]
    return trigger, caption_template.format_map(
        {"trigger": trigger, "class": (match[2] or match[4]).replace("_", " ")}
    )


def _mask_of(row):
    """The real path of a row's mask, as a set of one or none."""
    return set() if row["mask"] is None else {os.path.realpath(row["mask"]["path"])}


def _tell_unused_masks(folder, files, used):
    masks = [path for path in files if path.name.lower().endswith(MASK_ENDING)]
    others = [path.name for path in masks if os.path.realpath(path) not in used]
    if others:
        logger.info(f"{folder}: {len(others)} masks belong to no picture, as their names say; the first: {others[0]}")


def _mask_file(picture, folder):
    """The mask beside a picture, if there is one: `name.mask.png`; a link out of the dataset's folder is refused."""
    try:
        mask = picture.with_name(picture.stem + MASK_ENDING)
        if not mask.is_file():
            return None
    except OSError:  # a name too long for the ending
        return None
    if not mask.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{mask}: it is a link out of the dataset folder. Copy the mask into it.")
    return mask


def _row(path, captions, concept, num_repeats, source, mask=None):
    return {
        "image": {"bytes": None, "path": str(path)},
        "mask": None if mask is None else {"bytes": None, "path": str(mask)},
        "captions": captions,
        "concept": concept,
        "num_repeats": num_repeats,
        "is_class": False,
        "source": source,
    }


def _caption_file(picture, names):
    """The name of the caption file beside a picture, if there is one."""
    stem = picture[: -len(Path(picture).suffix)]
    return next((stem + ending for ending in CAPTION_ENDINGS if stem + ending in names), None)


def _metadata_rows(folder, files, pictures, reading):
    tables = [path for path in files if path.name.lower() in METADATA_NAMES]
    if not tables:
        raise InputError(f"{folder}: it holds no metadata.csv, .jsonl or .parquet (--dataset_layout metadata).")
    named, masks, count = set(), set(), 0
    for file, after in zip(tables, [*tables[1:], None]):
        if after is not None and after.parent == file.parent:
            raise InputError(
                f"{file.parent}: it holds both {file.name} and {after.name}, so its pictures would count twice. "
                "Keep one of them."
            )
        for row in _rows_of_table(file, folder, reading):
            named.add(os.path.realpath(row["image"]["path"]))
            masks |= _mask_of(row)
            count += 1
            yield row
    if not count:
        raise InputError(f"{tables[0]}: it has no row to train on. Add one row a picture: file_name and text.")
    used = named | masks
    without = [path for path in pictures if os.path.realpath(path) not in used]
    if without:
        what = "1 picture has" if len(without) == 1 else f"{len(without)} pictures have"
        logger.info(f"{folder}: {what} no row in a metadata file and will not be trained on; the first: {without[0]}")
    _tell_unused_masks(folder, files, masks)
    if len(named) < count:
        logger.info(f"{folder}: {count - len(named)} rows name a picture that another row names too; each row counts")


def _rows_of_table(file, dataset_folder, reading):
    """Yields the rows of one metadata file, with the pictures' paths checked; its folder's name is the concept."""
    asked, leave_out, table = reading.data, reading.leave_out, read_table(file)
    if not table:
        return
    columns = list(dict.fromkeys(key for _, row in table for key in row if key is not None))
    file_column = (
        "file_name" if "file_name" in columns and asked.image_column in (None, "image") else asked.image_column
    )
    if file_column not in columns:
        wanted = (
            f"there is no column '{asked.image_column}'" if asked.image_column else "there is no column 'file_name'"
        )
        raise InputError(f"{file}: {wanted}. The columns are: {', '.join(columns)}.")
    for kind in ("mask", "concept"):
        name = getattr(asked, f"{kind}_column")
        if name is not None and name not in columns:
            raise InputError(
                f"{file}: there is no column '{name}' (--{kind}_column). The columns are: {', '.join(columns)}."
            )
    other = {file_column, asked.mask_column, asked.concept_column}
    textual = [c for c in columns if c not in other and all(is_caption(row.get(c)) for _, row in table)]
    chosen = choose_caption_column(str(file), columns, textual, asked.caption_column)
    root, inside, missing = file.parent.resolve(), dataset_folder.resolve(), 0
    for number, row in table:
        where, name = f"{file}:{number}", row.get(file_column)
        captions, reason, path = nonempty_captions(row.get(chosen)), None, None
        if not isinstance(name, str) or not name:
            reason = f"column '{file_column}' is empty"
        elif "://" in name:
            reason = f"'{name}' is a URL, and pictures are read from files only"
        else:
            path = _find_picture(root, name)
            if path is None:
                missing += 1
                there = {entry.name.casefold(): entry.name for entry in root.iterdir()} if missing <= 3 else {}
                near = difflib.get_close_matches(name.casefold(), there, n=1, cutoff=0.8)
                reason = f"{name!r} does not exist" + (f" (there is {there[near[0]]!r})" if near else "")
            elif not path.resolve().is_relative_to(inside):
                raise InputError(
                    f"{where}: '{name}' leaves the dataset folder {dataset_folder}. Move the picture into it."
                )
            elif not captions:
                reason = f"column '{chosen}' is empty"
        mask = row.get(asked.mask_column) if asked.mask_column is not None else None
        if reason is None and mask:
            mask_path = _find_picture(root, mask) if isinstance(mask, str) else None
            if mask_path is None or not mask_path.resolve().is_relative_to(inside):
                reason = f"its mask {mask!r} does not exist in the dataset folder"
        if reason and leave_out is not None:
            leave_out(where, reason)
            continue
        if reason:
            raise InputError(f"{where}: {reason}. Fix the row, or pass --skip_bad_images to leave such rows out.")
        mask_path = mask_path if mask else _mask_file(path, dataset_folder)
        concept = root.name if asked.concept_column is None else str(row.get(asked.concept_column))
        yield _row(path, captions, concept, 1, f"{where}: '{name}'", mask_path)


def _find_picture(root, name):
    """The file of that name, also where one spells its accents composed and the other decomposed (as macOS does)."""
    for form in (None, "NFC", "NFD"):
        path = root / (name if form is None else unicodedata.normalize(form, name))
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # too long, or a NUL in it
            return None
    return None

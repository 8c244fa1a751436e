"""Reads folders of pictures in the layouts of several tools; the layout is recognised by the files.

| layout | what is in the folder |
|---|---|
| metadata | `metadata.csv`, `.jsonl` or `.parquet`, also one in each subfolder |
| caption_files | a `.txt` or `.caption` beside each picture, one caption per line |
| kohya | folders `N_name` for N repeats; `name` is the caption of pictures without a caption file |
| trigger_class | folders `[trigger]_[class]` without captions |
| instance | pictures without captions, and --instance_prompt for all |
"""

import difflib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
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
MOST_REPEATS = 1000  # a larger number is a year or a date
REPEATS = re.compile(r"(\d+)_(.+)")
TRIGGER_CLASS = re.compile(r"\[([^\[\]]+)\]_\[([^\[\]]+)\]|([^\[\]_]+)_([^\[\]]+)")


class ReadOptions(NamedTuple):
    """How folders and datasets are read; what the settings do not name is recognised.

    Rows without a picture or a caption are skipped and passed to `leave_out` as (source, reason); if `leave_out` is None,
    the first such row is an `InputError`.
    """

    data: DataSettings
    captions: CaptionSettings
    cache_dir: str | None = None  # of downloads
    archive_dir: str | Path = "archives"  # where archives are unpacked
    leave_out: Callable[[str, str], Any] | None = None


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_ENDINGS and not path.name.lower().endswith(MASK_ENDING)


def find_files(folder: Path) -> list[Path]:
    """Returns all files below a folder, sorted, without hidden files and folders such as __MACOSX."""

    def refuse(error):
        raise InputError(f"{error.filename}: it can't be read ({error.strerror}).") from error

    found = []
    for root, directories, names in os.walk(folder, onerror=refuse):
        directories[:] = sorted(name for name in directories if not name.startswith((".", "__")))
        for link in (Path(root) / name for name in directories if (Path(root) / name).is_symlink()):
            raise InputError(f"{link}: it is a link to a folder. Pass that folder too: --train_data_dir A B")
        found += [Path(root) / name for name in sorted(names) if not name.startswith(".")]
    return found


def find_layout(folder: Path, files: list[Path], instance_prompt: str | None) -> str | None:
    """Returns the layout of a folder with these files; None if nothing tells the captions of its pictures."""
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
    # The name of the passed folder itself, such as `my_pictures`, counts only if it has the brackets.
    if parents and all(
        TRIGGER_CLASS.fullmatch(parent.resolve().name) and (parent != Path(folder) or "[" in parent.resolve().name)
        for parent in parents
    ):
        return "trigger_class"
    return None


def read_folder(folder: Path, layout: str, files: list[Path], reading: ReadOptions) -> Iterator[dict[str, Any]]:
    """Yields the rows of a folder: dicts with image and mask (paths), captions, concept, num_repeats and source."""
    asked, leave_out, instance_prompt = reading.data, reading.leave_out, reading.captions.instance_prompt
    pictures = [path for path in files if is_picture(path)]
    if layout == "metadata":
        if instance_prompt is not None:
            logger.info(f"{folder}: it has its own captions, so --instance_prompt is not used for it")
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
            num_repeats, concept = _parse_repeats(path.parent, match[1]), match[2]
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
            raise InputError("--dataset_layout instance requires --instance_prompt, the caption of all pictures.")
        else:
            captions = [instance_prompt]
        if reason is not None:
            if leave_out is None:
                raise InputError(f"{path}: {reason}. Write one, or pass --skip_bad_images to leave such pictures out.")
            leave_out(str(path), reason)
            continue
        row = _row(path, captions, concept, num_repeats, str(path), _mask_file(path, folder))
        held[path.parent, num_repeats] += 1
        masks |= _mask_paths(row)
        yield row
    if unnamed:
        logger.info(f"{folder}: pictures without a caption file, captioned with their folder's name: {unnamed}")
    if layout == "kohya":
        for (parent, num_repeats), count in held.items():
            logger.info(f"{parent}: {counted(count, 'picture')}, each {counted(num_repeats, 'time')} per epoch")
    _log_unused_masks(folder, files, masks)
    for caption, count in worded.items():
        logger.info(f"{folder}: the caption '{caption}' is used for {counted(count, 'picture')} (--caption_template)")


def _parse_repeats(folder, number):
    if not 1 <= int(number) <= MOST_REPEATS:
        raise InputError(
            f"{folder}: its name says {number} repeats. Write a number from 1 to {MOST_REPEATS} before the '_', or pass "
            "--dataset_layout caption_files if the number does not mean repeats."
        )
    return int(number)


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


def _mask_paths(row):
    """The real path of a row's mask as a set, which is empty without a mask."""
    return set() if row["mask"] is None else {os.path.realpath(row["mask"]["path"])}


def _log_unused_masks(folder, files, used):
    masks = [path for path in files if path.name.lower().endswith(MASK_ENDING)]
    unused = [path.name for path in masks if os.path.realpath(path) not in used]
    if unused:
        logger.info(f"{folder}: {len(unused)} masks match no picture by their names; the first: {unused[0]}")


def _mask_file(picture, folder):
    """Returns the mask `name.mask.png` beside a picture, or None; a link out of the dataset folder is an `InputError`."""
    try:
        mask = picture.with_name(picture.stem + MASK_ENDING)
        if not mask.is_file():
            return None
    except OSError:  # the name is too long with the ending
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
    """Returns the name of the caption file beside a picture, or None."""
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
                f"{file.parent}: it holds both {file.name} and {after.name}, so its pictures would be used twice. "
                "Keep only one of the two files."
            )
        for row in _read_metadata_file(file, folder, reading):
            named.add(os.path.realpath(row["image"]["path"]))
            masks |= _mask_paths(row)
            count += 1
            yield row
    if not count:
        raise InputError(f"{tables[0]}: it has no usable row. Add one row per picture, with file_name and text.")
    used = named | masks
    without = [path for path in pictures if os.path.realpath(path) not in used]
    if without:
        what = "1 picture has" if len(without) == 1 else f"{len(without)} pictures have"
        logger.info(f"{folder}: {what} no row in a metadata file and will not be trained on; the first: {without[0]}")
    _log_unused_masks(folder, files, masks)
    if len(named) < count:
        logger.info(f"{folder}: {count - len(named)} rows name a picture that another row names too; each row is used")


def _read_metadata_file(file, dataset_folder, reading):
    """Yields the rows of a metadata file after checking the paths of the pictures; the concept is the folder's name."""
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
                similar = difflib.get_close_matches(name.casefold(), there, n=1, cutoff=0.8)
                reason = f"{name!r} does not exist" + (f" (there is {there[similar[0]]!r})" if similar else "")
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
    """Finds a file by its name, with accents in composed form or in decomposed form (as on macOS)."""
    for form in (None, "NFC", "NFD"):
        path = root / (name if form is None else unicodedata.normalize(form, name))
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # the name is too long or contains NUL
            return None
    return None

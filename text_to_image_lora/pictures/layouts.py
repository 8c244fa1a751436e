"""Reads folders of pictures in the layouts of several tools; the layout is recognised by the files.

| layout | what is in the folder |
|---|---|
| metadata | `metadata.csv`, `.jsonl` or `.parquet`, also one in each subfolder |
| caption_files | a `.txt` or `.caption` beside each picture, one caption per line |
| kohya | folders `N_name` for N repeats; `name` is the caption of pictures without a caption file |
| trigger_class | folders `[trigger]_[class]` without captions |
| instance | pictures without captions, and --instance_prompt for all |
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import counted, printable
from .captions import edit_caption
from .inside import check_file, read_text_file
from .names import METADATA_NAMES, CaptionFiles, has_caption_files, is_mask, is_picture, mask_beside, reason_against
from .settings import LAYOUTS, CaptionSettings, DataSettings
from .tables import MOST_CAPTION_BYTES, nonempty_captions


logger = logging.getLogger(__name__)
MOST_REPEATS = 1000  # a larger number is a year or a date
REPEATS = re.compile(r"(\d+)_(.+)")
LINE_BREAKS = re.compile(r"\r\n|\r|\n")  # `str.splitlines` knows more, which occur inside captions
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
    homes: tuple[Path, ...] = ()  # the folders that the files have to be in, of `inside.home_folders`


def find_layout(folder: Path, files: list[Path], instance_prompt: str | None) -> str | None:
    """Returns the layout of a folder with these files; None if nothing tells the captions of its pictures."""
    pictures = [path for path in files if is_picture(path)]
    parents = list(dict.fromkeys(path.parent for path in pictures))
    if any(path.name.lower() in METADATA_NAMES for path in files):
        return "metadata"
    if any(_is_kohya(parent, folder) for parent in parents):
        return "kohya"
    if has_caption_files(files):
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


def _is_kohya(parent, folder):
    """Whether the pictures in this folder have repeats, by its own name or by that of a folder above it in the dataset.

    A year (`2024_summer`) and the name of the dataset itself say nothing about the pictures in folders below.
    """
    place = _repeats_folder(parent, folder)
    match = None if place is None else _repeats_of(place)
    return match is not None and (place == parent or (place != folder and int(match[1]) <= MOST_REPEATS))


def _repeats_of(folder):
    return REPEATS.fullmatch(folder.resolve().name)


def _repeats_folder(parent, folder):
    """Returns the nearest folder of the dataset that contains a picture and is named N_name, or None."""
    for place in (parent, *parent.parents):
        if _repeats_of(place):
            return place
        if place == folder:
            break
    return None


class _Found(NamedTuple):
    """What a layout says about a picture; `reason` says why the picture can't be used, if there is one."""

    captions: list[str]
    concept: str
    num_repeats: int
    folder: Path  # whose number of repeats it is
    reason: str | None = None


class _Finder:
    """Finds the captions, the concept and the repeats of the pictures of a folder, and counts what has to be logged."""

    def __init__(self, folder: Path, layout: str, files: list[Path], reading: ReadOptions):
        self.folder, self.layout = folder, layout
        self.captions, self.homes = reading.captions, reading.homes
        self.caption_files = CaptionFiles(files)
        self.worded = Counter()  # pictures of each caption that the name of a folder gave
        self.named_by_folder = 0
        self.outside = []  # pictures without a caption in no folder of kohya's

    def find(self, path: Path) -> _Found | None:
        """Returns what is known about a picture, or None if the picture is not a part of the dataset."""
        own, prompt = path.parent.resolve().name, self.captions.instance_prompt
        if self.layout == "trigger_class":
            concept, caption = _trigger_and_caption(path.parent, own, self.captions.caption_template)
            self.worded[caption] += 1
            return _Found([caption], concept, 1, path.parent)
        if self.layout == "instance":
            return _Found([prompt or ""], own, 1, path.parent)
        concept, num_repeats, parent = own, 1, path.parent
        place = _repeats_folder(path.parent, self.folder) if self.layout == "kohya" else None
        if place is not None and (match := _repeats_of(place)):
            num_repeats, concept, parent = _parse_repeats(place, match[1]), match[2], place
        beside, reason = self.caption_files.beside(path), None
        if beside is not None:
            remedy = "Shorten its captions, or remove it."
            text = read_text_file(beside, self.homes, most_bytes=MOST_CAPTION_BYTES, remedy=remedy)
            captions = nonempty_captions([line.strip() for line in LINE_BREAKS.split(text)])
            reason = None if captions else f"its caption file {beside.name} is empty"
        elif prompt is not None:
            captions = [prompt]
        elif place is not None:
            captions = [concept.replace("_", " ")]
            self.named_by_folder += 1
        elif self.layout == "kohya":
            self.outside.append(path)
            return None
        else:
            captions, reason = [], f"there is no {path.stem}.txt beside it"
        return _Found(captions, concept, num_repeats, parent, reason)

    def report(self) -> None:
        """Logs what the names of folders have decided."""
        if self.named_by_folder:
            logger.info(
                f"{self.folder}: pictures without a caption file, captioned with their folder's name: {self.named_by_folder}"
            )
        if self.outside:
            logger.info(
                f"{self.folder}: {counted(len(self.outside), 'picture')} will not be trained on, having neither a caption file "
                f"nor a folder named as kohya's, such as 10_sks dog; the first: {self.outside[0]}"
            )
        for caption, count in self.worded.items():
            logger.info(
                f"{self.folder}: the caption '{caption}' is used for {counted(count, 'picture')} (--caption_template)"
            )


def read_folder(folder: Path, layout: str, files: list[Path], reading: ReadOptions) -> Iterator[dict[str, Any]]:
    """Yields the rows of a folder: dicts with image and mask (paths), captions, concept, num_repeats and source.

    The layout is any but metadata, which `metadata.py` reads.
    """
    _check_flags(folder, layout, reading)
    finder = _Finder(folder, layout, files, reading)
    held, masks = Counter(), set()
    for path in filter(is_picture, files):
        check_file(path, reading.homes)
        reason, remedy, found = reason_against(path), "Rename it (for example with convmv)", None
        if reason is None:
            found, remedy = finder.find(path), "Write one"
            if found is None:
                continue
            reason = found.reason
        if reason is not None or found is None:
            if reading.leave_out is None:
                raise InputError(
                    f"{printable(path)}: {reason}. {remedy}, or pass --skip_bad_images to leave such pictures out."
                )
            reading.leave_out(printable(path), str(reason))
            continue
        row = make_row(
            path, found.captions, found.concept, found.num_repeats, str(path), mask_beside(path, reading.homes)
        )
        held[found.folder, found.num_repeats] += 1
        masks |= mask_paths(row)
        yield row
    finder.report()
    if layout == "kohya":
        for (parent, num_repeats), count in held.items():
            logger.info(f"{parent}: {counted(count, 'picture')}, each {counted(num_repeats, 'time')} per epoch")
    log_unused_masks(folder, files, masks)


def _check_flags(folder, layout, reading):
    """Raises `InputError` for flags that this layout does not have, or that it requires."""
    upstreams_defaults = {"image_column": "image", "caption_column": "text"}
    for flag in ("image_column", "caption_column", "mask_column", "concept_column"):
        name = getattr(reading.data, flag)
        if name is not None and name != upstreams_defaults.get(flag):
            raise InputError(f"{folder}: there is no metadata file, so no column '{name}' (--{flag}).")
    if layout == "instance" and reading.captions.instance_prompt is None:
        raise InputError("--dataset_layout instance requires --instance_prompt, the caption of all pictures.")


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


def triggers_of(records: Any, captions: CaptionSettings) -> tuple[str, ...]:
    """Returns the different triggers of records whose captions come from folders named [trigger]_[class]."""
    found = {}
    for source, group in zip(records["source"], records["captions"], strict=True):
        folder = Path(source).parent.resolve()
        if TRIGGER_CLASS.fullmatch(folder.name):
            trigger, caption = _trigger_and_caption(folder, folder.name, captions.caption_template)
            if group == [edit_caption(caption, captions)]:
                found[trigger] = None
    return tuple(found)


def mask_paths(row: dict[str, Any]) -> set[str]:
    """Returns the real path of a row's mask as a set, which is empty without a mask."""
    return set() if row["mask"] is None else {os.path.realpath(row["mask"]["path"])}


def log_unused_masks(folder: Path, files: list[Path], used: set[str]) -> None:
    """Logs how many masks are not in the set of real paths `used`."""
    unused = [path.name for path in files if is_mask(path) and os.path.realpath(path) not in used]
    if unused:
        logger.info(
            f"{folder}: {len(unused)} masks match no picture by their names; the first: {printable(unused[0])}"
        )


def make_row(
    path: Path, captions: list[str], concept: str, num_repeats: int, source: str, mask: Path | None = None
) -> dict[str, Any]:
    """Makes the row of a picture, see `records.py`."""
    return {
        "image": {"bytes": None, "path": str(path)},
        "mask": None if mask is None else {"bytes": None, "path": str(mask)},
        "captions": captions,
        "concept": concept,
        "num_repeats": num_repeats,
        "is_class": False,
        "recipe": None,
        "source": source,
    }

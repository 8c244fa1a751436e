"""The files of a dataset of the `datasets` library in a folder: which are read, and whether all of them are in the folder."""

import contextlib
import itertools
import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError
from ..files import printable
from .archives import check_packed
from .formats import PICTURE_ENDINGS
from .inside import check_file, read_text_file
from .tables import check_rows, shortened


OTHER_SPLITS = {"test", "validation", "valid", "val", "dev", "eval"}
CARDS = ("README.md", ".huggingface.yaml")  # which can name data files
MOST_CARD_BYTES = 2**24
SAVE_PART = (
    "Save a part of it by Dataset.select and Dataset.save_to_disk of the datasets library, and pass that folder."
)


def training_files(files: list[Path], folder: Path) -> list[Path]:
    """Returns the parquet, or else arrow, or else tar files, except those that are named after another split."""
    for ending in (".parquet", ".arrow", ".tar"):
        found = [path for path in files if path.suffix.lower() == ending]
        own = [p for p in found if not OTHER_SPLITS & set(re.split(r"\W|_", p.relative_to(folder).as_posix().lower()))]
        if own or found:
            return own or found
    return []


def check_data_files(by_split: Any, homes: tuple[Path, ...]) -> None:
    """Raises `InputError` unless all data files are regular files in the folders `homes`, and for too many rows.

    `by_split` is the `data_files` of a builder's configuration: {split: names of files}, or None.
    """
    import pyarrow.parquet

    count = 0
    for path in map(Path, itertools.chain(*(by_split or {}).values())):
        check_file(path, homes)
        if path.suffix.lower() not in PICTURE_ENDINGS and path.is_file():
            # The library says what is wrong with a damaged file.
            with contextlib.suppress(
                tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, OSError, EOFError
            ):
                check_packed(path)
        if path.suffix.lower() == ".parquet":
            try:
                count += pyarrow.parquet.read_metadata(path).num_rows
            except (OSError, ValueError, pyarrow.ArrowException):  # the library says what is wrong with the file
                continue
            check_rows(path.parent, count, SAVE_PART)


def check_saved(folder: Path, homes: tuple[Path, ...]) -> None:
    """Raises `InputError` unless a dataset of `save_to_disk` names only files in its own folder; imports nothing heavy."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        parts = [folder]
    else:
        listed = _read_json(folder / "dataset_dict.json", homes).get("splits", ())
        parts = [_below(folder, "dataset_dict.json", name) for name in listed]
    for part in parts:
        check_file(part / "dataset_info.json", homes)
        stored = _read_json(part / "state.json", homes).get("_data_files", ())
        for row in stored if isinstance(stored, list) else ():
            name = row.get("filename") if isinstance(row, dict) else row
            check_file(_below(part, "state.json", name), homes)


def _read_json(path, homes):
    """Reads a JSON object that a stored dataset contains; {} for anything else, which the library reports."""
    for name in ("state.json", "dataset_info.json", "dataset_dict.json"):
        check_file(path.with_name(name), homes)
    if not path.is_file():
        return {}
    text = read_text_file(path, homes, most_bytes=MOST_CARD_BYTES, remedy="Save the dataset again.")
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{printable(path)}: it can't be read as JSON. Save the dataset again.") from error
    return stored if isinstance(stored, dict) else {}


def _below(folder, file, name):
    """Returns the path of a file or folder that a file of the dataset names; raises `InputError` if it leads elsewhere."""
    if not isinstance(name, str) or leads_out(name):
        raise InputError(
            f"{printable(folder / file)}: it names {shortened(repr(name))}, which is not in the dataset folder. Save the "
            "dataset again, or copy the file into the folder."
        )
    return folder / name


def leads_out(name: str) -> bool:
    """Whether a name or pattern can mean something outside of the dataset folder, or a hidden file, or an address."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    address = "://" in name or "::" in name or "\0" in name
    return (
        address or os.path.isabs(name) or name[1:2] == ":" or any(part.startswith((".", "~", "/")) for part in parts)
    )


def check_cards(folder: Path, homes: tuple[Path, ...]) -> None:
    """Raises `InputError` if the cards of a dataset name data files elsewhere, which the library would ask a server for.

    All links in the folder have to lead into the folders `homes`, because patterns are resolved by the library.
    """
    for file in (*(folder / name for name in CARDS), folder / "dataset_infos.json"):
        check_file(file, homes)
        if file.is_file() and file.name in CARDS:
            for config in _configs_of(file, homes):
                for name in _texts([config.get("data_files"), config.get("data_dir")]):
                    _below(folder, file.name, name)
    for root, _, names in os.walk(folder):
        if not any(part.startswith(".") for part in Path(root).relative_to(folder).parts):
            for path in (Path(root) / name for name in names):
                if not path.name.startswith(".") and path.is_symlink():
                    check_file(path, homes)


def _configs_of(card, homes):
    """Returns the rows of `configs` in the YAML of a card."""
    import yaml

    remedy = "Remove it, if you don't need its description of the dataset."
    text = read_text_file(card, homes, most_bytes=MOST_CARD_BYTES, remedy=remedy)
    if card.name == "README.md":
        block = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r\n|\n|$)", text, re.DOTALL)
        text = block[1] if block else ""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise InputError(f"{printable(card)}: its YAML contains references (*name). Write the values in full.")
        stored = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{printable(card)}: it can't be read as YAML. {remedy}") from error
    configs = stored.get("configs") if isinstance(stored, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _texts(value: Any) -> Iterator[str]:
    """Yields all text in lists and in the values of mappings; there are no references, so this ends."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, list | dict):
            waiting += each.values() if isinstance(each, dict) else each

"""The manifest of a checkpoint: the sizes and SHA-256 digests of its files, by which damage is found."""

import hashlib
import json
from pathlib import Path, PurePath

from ..errors import InputError
from ..files import reason_of
from ..small_files import read_json


MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the sizes and SHA-256 digests of the files in a checkpoint. Must be called after all files are written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = {path.relative_to(folder).as_posix(): _size_and_digest(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(rows, indent=2) + "\n")


def _size_and_digest(path):
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def find_damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint according to its manifest, in a few words, or None if it is intact."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        rows = read_json(path / MANIFEST, MANIFEST, remedy="")
        for name, row in rows.items():
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                return f"{MANIFEST} names a file outside the checkpoint"
            if not (path / name).is_file():
                return f"{name} is missing"
            if _size_and_digest(path / name) != row:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, InputError) as error:
        return reason_of(error).removesuffix(".")
    return None if "state.json" in rows else f"{MANIFEST} does not list state.json"

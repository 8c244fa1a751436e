"""Reads the files that a dataset names: regular files in the dataset's folder, also after their links are resolved."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from ..files import decode_text, describe_mode, format_bytes, printable


# Without O_NONBLOCK, opening a named pipe would wait for a writer. Windows lacks it, and needs O_BINARY.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def home_folders(sources: Iterable[str | Path]) -> tuple[Path, ...]:
    """Returns the real folders that the files of a dataset have to be in: `sources`, which the command names.

    A snapshot in the hub's download cache consists of links to the files in the folder `blobs` beside it, which is added.
    """
    homes = []
    for real in (Path(source).resolve() for source in sources):
        homes.append(real)
        for place in (real, *real.parents):
            if place.parent.name == "snapshots" and (blobs := place.parent.parent / "blobs").is_dir():
                homes.append(blobs)
    return tuple(homes)


def is_inside(path: Path, homes: Iterable[Path]) -> bool:
    """Whether a path, with its links resolved, is in one of the folders of `home_folders`."""
    real = path.resolve()
    return any(real.is_relative_to(home) for home in homes)


def check_file(path: Path, homes: Iterable[Path]) -> None:
    """Raises `InputError` unless a file that a dataset names is a regular file in one of the folders of `home_folders`.

    A file that does not exist, or whose folder can't be read, is left to its reader.
    """
    try:
        if not is_inside(path, homes):
            raise InputError(f"{printable(path)}: it is a link out of the dataset folder. Copy the file into it.")
        mode = os.stat(path).st_mode
    except RuntimeError as error:
        raise InputError(f"{printable(path)}: its links form a circle. Remove it.") from error
    except (OSError, ValueError):
        return
    if kind := describe_mode(mode):
        raise InputError(f"{printable(path)}: it is not a regular file, but {kind}. Remove it.")


def read_bytes(path: str | Path) -> bytes:
    """Returns the content of a regular file; raises `OSError` for anything else, which could make the reader wait for ever."""
    handle = os.open(path, OPEN_FLAGS)
    with open(handle, "rb") as file:
        mode = os.fstat(handle).st_mode
        if kind := describe_mode(mode):
            raise OSError(f"it is not a regular file, but {kind}")
        return file.read()


def read_text_file(path: Path, homes: Iterable[Path], *, most_bytes: int, remedy: str) -> str:
    """Returns the text of a file that a dataset names; raises `InputError` if it is refused, too large or no text.

    `remedy` says what to do about a file of more than `most_bytes`.
    """
    check_file(path, homes)
    try:
        size = os.stat(path).st_size
        if size > most_bytes:
            limit = f"more than the limit of {format_bytes(most_bytes)}"
            raise InputError(f"{printable(path)}: it has {format_bytes(size)}, {limit}. {remedy}")
        data = read_bytes(path)
    except OSError as error:
        raise InputError(f"{printable(path)}: it can't be read ({error.strerror or error}).") from error
    return decode_text(path, data)

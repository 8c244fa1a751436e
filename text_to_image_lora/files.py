"""Files that are written completely or not at all, and reasons of errors in one line."""

import contextlib
import errno
import glob
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import signals
from .errors import InputError, TrainingError
from .redaction import redact


# The disk or the quota is full, the disk is read-only or broken, or its file system cannot hold so large a file.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
OWN_SUFFIXES = {".json", ".jsonl", ".yaml", ".md", ".html", ".png", ".safetensors"}  # of files in an output folder
UNFINISHED: set[Path] = set()  # hidden files and folders that this process is writing
MODEL_FILES = {".safetensors", ".bin", ".json", ".txt", ".ckpt", ".pt"}  # endings of files that loaders of models read
SPECIAL = {stat.S_IFREG: None, stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r"))  # in no text but UTF-16


def format_bytes(count: float) -> str:
    """Formats a number of bytes: "12 MiB", "2.6 GiB"."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.1f} MiB" if count < 10 * 2**20 else f"{count / 2**20:.0f} MiB"


def counted(number: int, word: str) -> str:
    """Formats a number with its noun: "1 picture", "12,000 pictures"."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def printable(path: str | Path) -> str:
    """Formats a path; bytes of its name that are not UTF-8 are written as `\\xe9`."""
    return os.fsencode(path).decode(errors="backslashreplace")


def has_utf8_name(path: str | Path) -> bool:
    """Whether a path is valid Unicode. Arrow tables and JSON files can't store the name of any other file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def special_kind(path: str | Path) -> str | None:
    """Returns what there is at a path instead of a regular file, such as "a named pipe"; None for a file, or for nothing.

    Reading a pipe or a device could take forever.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # whoever reads the path reports it
        return None
    return describe_mode(mode)


def describe_mode(mode: int) -> str | None:
    """Like `special_kind`, for the mode that `os.stat` or `os.fstat` returns."""
    return SPECIAL.get(stat.S_IFMT(mode), "a device")


def check_regular(path: str | Path, flag: str = "") -> None:
    """Raises `InputError` if a path is no regular file; of a folder, which may be a model, its files are checked.

    `flag` is the flag that names the path.
    """
    paths = [Path(path)]
    if paths[0].is_dir():
        inside = sorted([*paths[0].glob("*"), *paths[0].glob("*/*")])
        paths = [file for file in inside if file.suffix.lower() in MODEL_FILES]
    for file in paths:
        if kind := special_kind(file):
            named = f"{flag} {printable(file)}".strip()
            raise InputError(f"{named}: it is {kind}, not a file. Put a regular file there, or pass another path.")


def read_text(file: str | Path, *, may_wait: bool = False) -> str:
    """Reads a text file in UTF-8, or in UTF-16 with or without a byte order mark; raises `InputError` if that fails.

    With `may_wait`, it may also be a pipe.
    """
    if not may_wait:
        check_regular(file)
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{printable(file)}: it can't be read ({error.strerror}).") from error
    return decode_text(file, data)


def decode_text(file: str | Path, data: bytes) -> str:
    """Decodes the content of a text file as `read_text` does."""
    try:
        return _decode(data)
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text: byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise InputError(f"{printable(file)}: it can't be read ({reason}). Save it again as UTF-8.") from error


def _decode(data):
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    if encoding is not None:
        return data.decode(encoding)

    def count_controls(part):
        return len(part) - len(part.translate(None, CONTROLS))

    # UTF-16 without a mark: the high bytes of most alphabets are control characters, and those of spaces and line breaks are
    # NUL. UTF-16 in Chinese has few of these, but is hardly ever valid UTF-8.
    controls = count_controls(data)
    if controls < max(len(data) / 4, 1) and (_is_utf8(data) or b"\0" not in data):
        if b"\0" in data:
            raise UnicodeDecodeError("utf-8", data, data.index(0), data.index(0) + 1, "it is NUL")
        return data.decode()
    return data.decode("utf-16-le" if count_controls(data[1::2]) > count_controls(data[::2]) else "utf-16-be")


def _is_utf8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def expand_pattern(pattern: str) -> list[str]:
    """Returns the paths that a pattern with `*`, `?` or `[...]` matches; a path that exists stands for itself.

    The folders at the beginning of the pattern that exist are taken literally, so that their names may contain such
    characters.
    """
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    existing = next((str(path) for path in Path(pattern).parents if path.exists()), "")
    rest = pattern[len(existing) :] if pattern.startswith(existing) else ""
    if rest and not glob.has_magic(rest):
        return [pattern]
    return glob.glob(glob.escape(existing) + rest if rest else pattern)


@contextlib.contextmanager
def written_whole(path: str | Path, *, folder: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary path (with `folder`, an empty folder), which is renamed to `path` once it has been written.

    After an exception, `path` is unchanged; if the disk is the reason, a `TrainingError` says so. After a kill, `path` is
    either old or new, never a part; only a kill while a folder replaces another may leave no folder. If several processes
    write `path` at once, the last result stays; with `shared`, the first one, and nothing is flushed, because it can be made
    again.
    """
    path = Path(path)
    temporary = _hidden(path, ".tmp")
    with explaining_disk_errors(path):
        (temporary if folder else temporary.parent).mkdir(parents=True, exist_ok=True)
        UNFINISHED.add(temporary)
        try:
            yield temporary
            _put_in_place(temporary, path, folder, shared)
        finally:
            _remove(temporary)
            UNFINISHED.discard(temporary)


def _hidden(path, suffix):
    """Returns a hidden name that no other process uses; without the suffix .safetensors, as readers would load the file."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{suffix}")


def remove_leftovers(folder: str | Path) -> None:
    """Deletes the hidden files and folders that killed processes left in a folder; no process may be writing there."""
    for path in Path(folder).iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.(tmp|old)", path.name):
            _remove(path)


def _remove_unfinished():
    """Deletes what this process has begun to write."""
    for path in [*UNFINISHED]:
        _remove(path)


signals.CLEAN_UP.append(_remove_unfinished)


def _put_in_place(temporary, path, folder, shared):
    if not shared:
        for file in [temporary, *temporary.rglob("*")]:
            _sync(file)
    if folder and shared:
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.exists():  # otherwise another process was faster
                raise
    elif shared:
        try:
            os.link(temporary, path)  # unlike a rename, a link does not replace a file that is being read
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temporary, path)
    elif folder and path.exists():
        old = _set_aside(path)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    if not shared:
        _sync(path.parent)


def _sync(path):
    """Flushes a file, or the entries of a folder, to the disk, so that they survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explaining_disk_errors(path: str | Path) -> Iterator[None]:
    """Turns an `OSError` of a disk that cannot be written into a `TrainingError` that tells the free space."""
    try:
        yield
    except OSError as error:
        # shutil.copytree raises one error with the texts of the errors of all files.
        if error.errno not in UNWRITABLE and "[Errno 28]" not in str(error):
            raise
        nearest = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
        allowed = error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)
        remedy = "Free some space" if allowed else "Make the folder writable"
        raise TrainingError(
            f"{path}: it can't be written ({error.strerror or os.strerror(errno.ENOSPC)}; "
            f"{format_bytes(shutil.disk_usage(nearest).free)} are free there). The old content is intact. {remedy} and "
            "run the same command again to resume."
        ) from error


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Writes text (as UTF-8 and without secrets) or bytes completely or not at all, see `written_whole`."""
    with written_whole(path) as temporary:
        temporary.write_bytes(redact(data).encode() if isinstance(data, str) else data)


def write_new(path: Path, data: bytes) -> bool:
    """Writes a file completely or not at all; returns False, and changes nothing, if there is a file of this name.

    Of several processes that write the file at once, only one gets True.
    """
    temporary = _hidden(path, ".tmp")
    UNFINISHED.add(temporary)
    with explaining_disk_errors(path):
        try:
            temporary.write_bytes(data)
            _put_in_new_place(temporary, path)
            return True
        except FileExistsError:
            return False
        finally:
            _remove(temporary)
            UNFINISHED.discard(temporary)


@contextlib.contextmanager
def written_new(path: str | Path) -> Iterator[Path]:
    """Yields a path of the same name in a hidden folder; a file or folder written there is moved to `path` afterwards.

    Raises `FileExistsError`, and changes nothing, if `path` exists by then: of several processes that write `path` at once,
    the first result stays. After an exception or a kill, there is nothing at `path` that was not there before.
    """
    path = Path(path)
    hidden = _hidden(path, ".tmp")
    with explaining_disk_errors(path):
        UNFINISHED.add(hidden)
        try:
            hidden.mkdir(parents=True)
            temporary = hidden / path.name
            yield temporary
            _put_in_new_place(temporary, path)
        finally:
            _remove(hidden)
            UNFINISHED.discard(hidden)


def _put_in_new_place(temporary, path):
    """Raises `FileExistsError` if `path` exists."""
    for file in [temporary, *temporary.rglob("*")]:
        _sync(file)
    try:
        # A rename replaces no folder that contains anything, and folders have no links.
        (os.rename if temporary.is_dir() else os.link)(temporary, path)
    except OSError as error:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        if temporary.is_dir():
            raise
        os.replace(temporary, path)  # a file system without links
    _sync(path.parent)


def remove_folder(path: str | Path) -> None:
    """Renames a folder to a hidden name before it deletes it, so that a half-deleted folder is never used."""
    shutil.rmtree(_set_aside(Path(path)))


def _set_aside(path):
    hidden = _hidden(path, ".old")
    os.replace(path, hidden)
    return hidden


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def check_writable(folder: str | Path, flag: str) -> None:
    """Raises `InputError` if the folder that was passed to `flag` is not writable; does not create the folder."""
    path = Path(folder)
    try:
        nearest = next(p for p in (path, *path.parents) if p.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise InputError(f"{folder}: it can't be written ({error.strerror}). Pass another {flag}.") from error


def check_entries(folder: str | Path, flag: str) -> None:
    """Raises `InputError` if something in an output folder is in the way of what will be written there.

    That is a folder with the name of a file, and a link that leads nowhere. A named pipe would make its reader wait for ever.
    """
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        kind = "a link that leads nowhere" if not path.exists() else special_kind(path)
        if kind and (kind != SPECIAL[stat.S_IFDIR] or path.suffix.lower() in OWN_SUFFIXES):
            raise InputError(f"{printable(path)}: it is {kind}. Remove it, or pass another {flag}.")


def hide_folders(values: dict[str, Any]) -> dict[str, str]:
    """Converts values to strings and shortens local paths to their last part, which does not reveal the user's folders."""

    def shorten(value):
        is_path = value.startswith("~") or os.path.isabs(value) or ("/" in value and os.path.exists(value))
        return Path(value).name if is_path else value

    return {
        name: " ".join(shorten(str(v)) for v in value) if isinstance(value, list) else shorten(str(value))
        for name, value in values.items()
    }


def shorten_paths(value: Any) -> Any:
    """Makes paths in plain data relative to the current folder, or to "~", to keep private folder names out of files."""
    if isinstance(value, dict):
        return {name: shorten_paths(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [shorten_paths(each) for each in value]
    if isinstance(value, str):
        for folder, short in ((Path.cwd(), ""), (Path.home(), "~" + os.sep)):
            if folder.parent != folder:  # the root of a disk reveals nothing
                start = rf"(?<![\w./~-]){re.escape(str(folder) + os.sep)}"  # only at the start of a path
                value = re.sub(start, lambda _, short=short: short, value)
    return value


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")

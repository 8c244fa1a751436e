"""What every room does with files, errors and the hub, in one way: written whole or not at all, told in one line."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from .errors import InputError, TrainingError


HUB_SECONDS = 3  # that the hub has to answer: a download without a network would retry for half a minute
# A disk, or a quota, that is full; one that can't be written, or is broken; a file that the disk's format can't hold.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}


def format_bytes(count):
    """A number of bytes as people say it: "12 MiB", "2.6 GiB"."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.1f} MiB" if count < 10 * 2**20 else f"{count / 2**20:.0f} MiB"


def counted(number, word):
    """A number of things as people say it: "1 picture", "12,000 pictures"."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def written_whole(path, *, folder=False, shared=False):
    """A temporary path that becomes `path` in one rename, when all has been written to it; with `folder` it is one.

    After an exception `path` is as before; where the disk is why, it is a `TrainingError` that says so. After a kill it is
    as before or new, or, where a folder replaces another and the kill fell between two renames, not there; a part of it is
    never there. With `shared` several processes may write the same at once: what another one has put there first stays,
    and nothing waits for the disk, since what is shared can be made again.
    """
    path = Path(path)
    mark = f".{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(f".{path.name}{mark}.tmp")  # no ending: readers take any .safetensors for weights
    with explaining_disk_errors(path):
        _remove(temporary)
        (temporary if folder else temporary.parent).mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _put_in_place(temporary, path, folder, shared)
        finally:
            _remove(temporary)


def _put_in_place(temporary, path, folder, shared):
    if not shared:
        for file in [temporary, *temporary.rglob("*")]:
            _sync(file)
    if folder and shared:
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.exists():  # else another process was quicker
                raise
    elif shared:
        try:
            os.link(temporary, path)  # unlike a rename, it leaves alone what another machine may be reading
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temporary, path)
    elif folder and path.exists():
        before = _set_aside(path)
        os.replace(temporary, path)
        shutil.rmtree(before)
    else:
        os.replace(temporary, path)
    if not shared:
        _sync(path.parent)


def _sync(path):
    """Waits until a file, or what a folder holds, is on the disk, so that it outlasts a power cut."""
    if path.is_dir() and os.name == "nt":  # which opens no folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explaining_disk_errors(path):
    """Turns what a disk says that can't be written into a `TrainingError` of one line, with the space that is left."""
    try:
        yield
    except OSError as error:
        # shutil.copytree puts the errors of its files into one of its own, as words.
        if error.errno not in UNWRITABLE and "[Errno 28]" not in str(error):
            raise
        nearest = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
        raise TrainingError(
            f"{path}: it can't be written ({error.strerror or os.strerror(errno.ENOSPC)}; "
            f"{format_bytes(shutil.disk_usage(nearest).free)} are free there). What was there before is whole. Make room, and "
            "run the same command again to go on."
        ) from error


def write_whole(path, data):
    """Writes text (as UTF-8) or bytes, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_folder(path):
    """Deletes a folder so that no half of it is ever taken for a whole."""
    shutil.rmtree(_set_aside(Path(path)))


def _set_aside(path):
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    return hidden


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def check_writable(folder, flag):
    """Raises `InputError` where the folder that the flag names can't be written; makes nothing."""
    path = Path(folder)
    try:
        nearest = next(p for p in (path, *path.parents) if p.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise InputError(f"{folder}: it can't be written ({error.strerror}). Pass another {flag}.") from error


def hide_folders(values):
    """The values as strings; of a path on this machine the last name only, the rest would tell of the author's disk."""

    def shown(value):
        is_path = value.startswith("~") or os.path.isabs(value) or ("/" in value and os.path.exists(value))
        return Path(value).name if is_path else value

    return {
        name: " ".join(shown(str(v)) for v in value) if isinstance(value, list) else shown(str(value))
        for name, value in values.items()
    }


def reason_of(error):
    """The first line of what an error says, or its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")


def is_hub_id(name):
    """Whether this can name a repository of the hub, `owner/name` or `name`; what is a path here does not."""
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII)) and not os.path.exists(name)


def retry_timeouts(ask):
    """What `ask()` gives; the hub is asked three times where it doesn't answer in time."""
    from httpx import TimeoutException

    for seconds in (1, 2):
        try:
            return ask()
        except TimeoutException:
            time.sleep(seconds)
    return ask()


def ask_hub(name, kind, revision=None):
    """Asks the hub whether it has this "model" or "dataset"; raises what the hub's client raises."""
    from huggingface_hub import HfApi

    retry_timeouts(lambda: HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=HUB_SECONDS))


def hub_file(name, file, *, revision=None, cache_dir=None):
    """The local path of a small file of a hub model: from the local cache, else from the hub.

    Raises what the hub's client raises where neither has it.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    cached = try_to_load_from_cache(name, file, revision=revision, cache_dir=cache_dir)
    if isinstance(cached, str):
        return Path(cached)
    if not constants.HF_HUB_OFFLINE:
        ask_hub(name, "model", revision)
    return Path(hf_hub_download(name, file, revision=revision, cache_dir=cache_dir))

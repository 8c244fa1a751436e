"""One process at a time writes into an output folder."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import signals
from .errors import InputError
from .files import printable, remove_leftovers


logger = logging.getLogger(__name__)
NAME = ".lock"
# For the previous process, which may be ending, and on network disks, which take a moment to notice that a machine is gone.
SECONDS_TO_WAIT = 2


@contextlib.contextmanager
def alone_in(folder: Path, flag: str):
    """Locks an output folder, so that no other process writes into it, and deletes what a killed process left half-written.

    The operating system releases the lock when the process ends, however it ends, and lets other machines see it on network
    disks that support locks. On other disks, a warning is logged and nothing is locked. A new folder that is still empty at
    the end is deleted again.

    Raises:
        InputError: If another process has locked the folder; `flag` is the flag that names it.
    """
    is_new = not folder.exists()
    lock = _acquire(folder, flag)

    def tidy():
        with contextlib.suppress(OSError):
            # Before the release, or it could be the file of the next process. Windows deletes no open file, and leaves it.
            (folder / NAME).unlink(missing_ok=True)
            if is_new:
                folder.rmdir()  # fails if there is anything in it

    signals.CLEAN_UP.append(tidy)  # for commands that a signal ends at once
    try:
        if lock is not None:
            remove_leftovers(folder)
        yield
    finally:
        signals.CLEAN_UP.remove(tidy)
        tidy()
        if lock is not None:
            lock.release()


def _acquire(folder, flag):
    """Returns the lock of a folder, or None if it can't be locked; raises `InputError` if another process has locked it."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The fallback would be a file that stays, and locks the folder, after its machine has crashed.
        lock = FileLock(folder / NAME, timeout=SECONDS_TO_WAIT, fallback_to_soft=False)
        lock.acquire()
        return lock
    except Timeout as error:
        raise InputError(
            f"{printable(folder)}: another process is writing into this folder. Wait until it has ended, or pass another {flag}."
        ) from error
    except (OSError, NotImplementedError) as error:  # the checks of the command report a folder that can't be written
        if folder.is_dir() and os.access(folder, os.W_OK):
            reason = getattr(error, "strerror", None) or error
            logger.warning(
                f"{printable(folder)}: this disk does not support locks ({reason}). Make sure that no other process writes there"
            )
        return None


def writes_alone(command: Callable[[Any], None]) -> Callable[[Any], None]:
    """Lets a training command, a function of its settings, lock its --output_dir from its beginning to its end.

    Only the main process writes, so only that one locks; a dry run writes single files, and only whole ones.
    """

    @functools.wraps(command)
    def run(settings):
        writes = not settings.data.dry_run and os.environ.get("RANK", "0") == "0"
        folder = Path(settings.run.output_dir)
        with alone_in(folder, "--output_dir") if writes else contextlib.nullcontext():
            command(settings)

    return run

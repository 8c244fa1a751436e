"""The exit codes of signals, and how a command ends that has nothing to finish first."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


# By name, as no system has all of these signals. SIGHUP: the terminal was closed. SIGBREAK: Windows' Ctrl-Break.
EXIT_CODES = {"SIGINT": 130, "SIGBREAK": 130, "SIGTERM": 143, "SIGHUP": 143, "SIGUSR1": 75}


WITHOUT_DIRECTORY = "the working directory can't be found (%s). It may have been deleted: change to another one."

CLEAN_UP: list[Callable[[], None]] = []  # called before the process ends


def exit_on_signals(advice: str = "") -> None:
    """From here on, a signal to stop ends the process with one line, which `advice` completes, and the signal's exit code.

    Scripts call this before their slow imports: Python's own handlers would print a traceback, or end with other codes. In a
    working directory that was deleted, where these imports fail, the process ends too, as with bad input.
    """
    try:
        os.getcwd()
    except OSError as error:
        os.write(2, f"{os.path.basename(sys.argv[0])}: {WITHOUT_DIRECTORY % error.strerror}\n".encode())
        os._exit(2)
    for name in EXIT_CODES:
        number = getattr(signal, name, None)
        # An ignored signal stays ignored, as nohup intends.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, functools.partial(_leave, advice))


def _leave(advice: str, number: int, frame: Any) -> None:
    """Ends the process without raising: modules that are being imported turn an exception into another one."""
    name = signal.Signals(number).name
    for clean_up in CLEAN_UP:
        clean_up()
    line = f"{os.path.basename(sys.argv[0])}: stopped by {name}" + (f"; {advice}" if advice else "")
    try:
        os.write(2, f"\n{line}\n".encode())
    finally:  # the terminal may be gone
        os._exit(EXIT_CODES[name])

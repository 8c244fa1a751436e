"""Logging for the commands: plain lines that do not break progress bars.

A module logs with `logging.getLogger(__name__)`; a command calls `start` once.
"""

import contextlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from .errors import visible
from .redaction import redact


PACKAGE = logging.getLogger(__package__)


class _Terminal(io.FileIO):
    """A raw stream that drops what can't be written: the words are lost, but not the work.

    The reader of a pipe such as `| head -1` is gone, the disk of a log file is full, or the terminal was closed.
    """

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class _Redacted(io.TextIOWrapper):
    """The text of stderr without secrets, which the tracebacks and warnings of libraries may contain."""

    def write(self, text: str) -> int:
        super().write(redact(text))
        return len(text)


class _Visible(_Redacted):
    """The text of stdout, in which control characters are shown; only progress bars, on stderr, have to move the cursor."""

    def write(self, text: str) -> int:
        return super().write(visible(text))


def protect_streams() -> None:
    """Lets stdout and stderr accept every text: letters that their encoding lacks are escaped, and no write fails."""
    for name, kind in (("stdout", _Visible), ("stderr", _Redacted)):
        stream: Any = getattr(sys, name)
        if stream is None:  # it was closed. The file stays open, so that no other file gets its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            continue
        is_protected = isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Terminal)
        if stream is not getattr(sys, f"__{name}__") or is_protected:
            continue  # it belongs to a test or to a notebook, or is protected already
        with contextlib.suppress(OSError):
            stream.flush()
        options = {"encoding": stream.encoding, "errors": "backslashreplace", "line_buffering": stream.line_buffering}
        raw = _Terminal(stream.fileno(), "w", closefd=False)
        protected = kind(io.BufferedWriter(raw), **options)
        setattr(sys, name, protected)
        setattr(sys, f"__{name}__", protected)


class LineHandler(logging.Handler):
    """Writes INFO records to stdout, and records from WARNING up, in their own format, to stderr.

    If tqdm is imported, the lines go through `tqdm.write`, which redraws the progress bars below them.
    """

    def __init__(self, warning_format: str):
        super().__init__()
        self.warning_formatter = logging.Formatter(warning_format)

    def format(self, record: logging.LogRecord) -> str:
        warns = record.levelno >= logging.WARNING
        line = self.warning_formatter.format(record) if warns else super().format(record)
        line = line.encode(errors="backslashreplace").decode()  # names of files may hold bytes that are not UTF-8
        return visible(redact(line))

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        try:
            line = self.format(record) + "\n"
            if bars is None:
                stream.write(line)
            else:
                bars.write(line, file=stream, end="")
            stream.flush()
        except Exception:  # like the standard handlers: a line that cannot be written must not stop the run
            self.handleError(record)


def start(main_process: bool = True, warning_format: str = "%(message)s") -> None:
    """Configures the package's logger and replaces the configuration of an earlier call.

    Args:
        main_process: Whether this is the main process; the other processes write nothing.
        warning_format: The `logging.Formatter` format of warnings and errors.
    """
    protect_streams()
    _give_bars_a_size()
    for handler in [*PACKAGE.handlers]:
        if isinstance(handler, LineHandler):
            PACKAGE.removeHandler(handler)
    handler = LineHandler(warning_format)
    handler.setLevel(logging.NOTSET if main_process else logging.CRITICAL + 1)
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO)
    PACKAGE.propagate = False  # or libraries that configure the root logger would write each line again


def _give_bars_a_size():
    """Gives tqdm a size if the terminal has none, as in some containers; without it, progress bars are empty lines."""
    with contextlib.suppress(OSError, ValueError):  # stderr is no file
        if sys.stderr.isatty() and 0 in os.get_terminal_size(sys.stderr.fileno()):
            size = shutil.get_terminal_size()
            os.environ.setdefault("TQDM_NCOLS", str(size.columns))
            os.environ.setdefault("TQDM_NROWS", str(size.lines))


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def collect_messages(room: str) -> Iterator[list[str]]:
    """Yields a list that collects the messages logged by the modules of a subpackage, such as "pictures", in this process."""
    collector = _Collector()
    logger = PACKAGE.getChild(room)
    level = logger.level
    logger.setLevel(logging.INFO)  # the package's logger may not be configured
    logger.addHandler(collector)
    try:
        yield collector.lines
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)


@contextlib.contextmanager
def quiet(room: str) -> Iterator[None]:
    """Suppresses what the modules of a subpackage, such as "pictures", log, because it was logged before."""
    logger = PACKAGE.getChild(room)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)

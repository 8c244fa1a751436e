"""Logging for the commands: plain lines that do not break progress bars.

A module logs with `logging.getLogger(__name__)`; a command calls `start` once.
"""

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator


PACKAGE = logging.getLogger(__package__)


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
        return line.encode(errors="backslashreplace").decode()  # names of files may hold bytes that are not UTF-8

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

"""Logging for the commands: plain lines, which do not tear a progress bar apart.

A module logs with `logging.getLogger(__name__)`; a command calls `start` once.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator


PACKAGE = logging.getLogger(__package__)


class LineHandler(logging.Handler):
    """Writes each record as whole lines: INFO to stdout, WARNING and above to stderr, in a format of their own.

    Where tqdm is imported, the lines go through `tqdm.write`, which moves the progress bars below them.
    """

    def __init__(self, warning_format: str):
        super().__init__()
        self.warning_formatter = logging.Formatter(warning_format)

    def format(self, record: logging.LogRecord) -> str:
        return self.warning_formatter.format(record) if record.levelno >= logging.WARNING else super().format(record)

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
        except Exception:  # as in the handlers of the standard library: a line that can not be written stops nothing
            self.handleError(record)


def start(main_process: bool = True, warning_format: str = "%(message)s") -> None:
    """Configures the package's logger, instead of what an earlier call configured.

    Args:
        main_process: Whether this process writes; of several processes only the main one does.
        warning_format: A format of `logging.Formatter` for warnings and errors.
    """
    for handler in [*PACKAGE.handlers]:
        if isinstance(handler, LineHandler):
            PACKAGE.removeHandler(handler)
    handler = LineHandler(warning_format)
    handler.setLevel(logging.NOTSET if main_process else logging.CRITICAL + 1)
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO)
    PACKAGE.propagate = False  # else libraries that configure the root logger would write each line again


class _Keeper(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def collect_messages(room: str) -> Iterator[list[str]]:
    """Collects the messages that the modules of a room, such as "pictures", log inside; every process collects its own."""
    keeper, logger = _Keeper(), PACKAGE.getChild(room)
    level = logger.level
    logger.setLevel(logging.INFO)  # also where no command has configured the package's logger
    logger.addHandler(keeper)
    try:
        yield keeper.lines
    finally:
        logger.removeHandler(keeper)
        logger.setLevel(level)

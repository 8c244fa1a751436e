"""Errors that the user can act on: each is reported in one line and has its own exit code."""

import contextlib
import errno
import unicodedata
from collections.abc import Iterator

from .redaction import redact


# Change the direction of the text that follows, so that a name can look like another one.
DIRECTIONS = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


def visible(text: str) -> str:
    """Replaces control characters but tabs and line breaks by escapes such as `\\x1b`, so that a terminal shows them.

    Names of files, captions and text in pictures may contain sequences that terminals obey: to clear the screen, to change
    its title, or to rewrite lines.
    """
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if letter in DIRECTIONS or (unicodedata.category(letter) == "Cc" and letter not in "\t\n\r")
        else letter
        for letter in text
    )


class InputError(Exception):
    """Invalid input. The message is one sentence with the remedy; commands print it on stderr and exit with `exit_code`."""

    exit_code = 2

    def __str__(self):
        return visible(redact(super().__str__()))


class TrainingError(Exception):
    """A run that cannot continue. The message is one sentence with the remedy."""

    exit_code = 1

    def __str__(self):
        return visible(redact(super().__str__()))


class NotANumberError(TrainingError):
    """The loss, the gradient or the weights contain NaN or infinity."""

    exit_code = 3


class Stopped(BaseException):
    """A run was asked to stop before its end; the same command resumes it.

    This is a `BaseException`, so that libraries that catch `Exception` cannot prevent the stop.
    """

    def __init__(self, reason: str, exit_code: int, where: str):
        super().__init__(reason, exit_code, where)
        self.reason = reason
        self.exit_code = exit_code
        self.where = where

    def __str__(self):
        return f"{self.reason}: stopped {self.where}. Run the same command again to resume."


def stopped_within(error: BaseException) -> Stopped | None:
    """Returns the `Stopped` that an exception is or was caused by; None if there is none.

    Python turns what a signal handler raises into a RuntimeError where a class is being made, and so do some libraries.
    """
    seen: BaseException | None = error
    for _ in range(100):
        if seen is None or isinstance(seen, Stopped):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def message_of(error: InputError | TrainingError) -> str:
    """Returns the message; a `DataLoader` adds the traceback of its worker process in front of it."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if text.startswith("Caught ") else text


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library means that the memory of the device or of the machine is exhausted."""
    if is_out_of_address_space(error):
        return True
    # In this order: CUDA and MPS; cuBLAS and cuDNN; PyTorch's CPU allocator on Linux, and on Windows; C++.
    phrases = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory", "std::bad_alloc")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(p in str(error) for p in phrases)
    )


def is_out_of_address_space(error: BaseException) -> bool:
    """Whether the system refused memory for a library or a file, as it does below a small `ulimit -v`."""
    if not isinstance(error, ImportError | OSError):
        return False
    text = str(error)
    # A disk that is mounted with noexec refuses segments too, with the words "Operation not permitted".
    unmapped = "failed to map segment" in text and "not permitted" not in text
    return getattr(error, "errno", None) == errno.ENOMEM or unmapped or "Cannot allocate memory" in text


def describe_lack_of_memory(error: BaseException) -> str:
    """Returns a sentence with the remedy for an exception that `is_out_of_memory`."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    return f"Out of memory ({reason}). Close other programs, or raise the limit on memory (such as ulimit -v)."


@contextlib.contextmanager
def explaining_system_errors() -> Iterator[None]:
    """Turns an exception that `is_out_of_memory`, and an `OSError`, into a `TrainingError`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise TrainingError(describe_lack_of_memory(error)) from error
        if not isinstance(error, OSError):
            raise
        raise TrainingError(f"{describe_system_error(error)} and run the same command again.") from error


def describe_system_error(error: OSError) -> str:
    """Returns the reason of an `OSError` with its file, such as one that was deleted, and the beginning of a remedy."""
    reason = error.strerror or (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":.")
    if error.filename is not None:
        name = (
            error.filename
            if isinstance(error.filename, bytes)
            else str(error.filename).encode(errors="surrogateescape")
        )
        reason = f"{name.decode(errors='backslashreplace')}: {reason}"
    remedy = "Raise the limit on open files (ulimit -n)" if error.errno == errno.EMFILE else "Correct the cause"
    return f"{reason}. {remedy}"


def is_dead_worker(error: BaseException) -> bool:
    """Whether an exception means that a worker process of a `DataLoader` has died."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)

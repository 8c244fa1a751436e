"""Says in a line why a model can't be loaded, in place of the reports and the exceptions of the libraries."""

import contextlib
import logging
import re
from collections.abc import Iterator

from ..errors import is_out_of_memory


DOWNLOAD = "Download the model again."
SHAPES = re.compile(
    r"(\S+) expected shape (?:torch\.Size\()?(\[[\d, ]*\])\)?, but got (?:torch\.Size\()?(\[[\d, ]*\])"
)
DAMAGED = (KeyError, UnicodeDecodeError, EOFError, IndexError)  # raised by parsers, and meaningless to users


@contextlib.contextmanager
def quiet_loaders() -> Iterator[None]:
    """Silences the reports and progress bars of diffusers and transformers inside the context, since `reason_in_words` follows."""
    import diffusers
    import transformers

    libraries = [module.utils.logging for module in (diffusers, transformers)]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, has_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if has_bars:
                library.enable_progress_bar()


@contextlib.contextmanager
def naming_part(part: str) -> Iterator[None]:
    """Adds the name of the part of a model that is loaded in the context to the reason, in a `ValueError`.

    Exceptions of the hub, of missing data and of memory keep their kinds, because they are explained by them.
    """
    try:
        yield
    except Exception as error:  # the loaders raise many kinds of exceptions for unusable files
        if isinstance(error, OSError | NotImplementedError) or is_out_of_memory(error):
            raise
        raise ValueError(f"{part}: {reason_in_words(error)}") from error


def reason_in_words(error: BaseException) -> str:
    """Returns in words and in one line, without a period, why a model or a part of it can't be loaded."""
    text = " ".join(str(error).split())
    if found := SHAPES.search(text):
        name, expected, own = found.groups()
        return f"the weights do not fit its configuration: {name} must have the shape {expected}, but has {own}"
    if found := re.match(r"Unable to load weights from checkpoint file for '([^']+)'", text):
        return f"{found[1]} is damaged or incomplete"
    if "deserializing header" in text or isinstance(error, DAMAGED):
        return f"a file is damaged or incomplete ({type(error).__name__}: {text[:200]})"
    if text.startswith("Class validation error"):
        return text.rpartition("Error: ")[2][:300].rstrip(".")
    return (text or type(error).__name__)[:300].rstrip(".")

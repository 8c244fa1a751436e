"""Finds a font that has the letters of a text, for the sheets and plots of this project."""

import contextlib
import functools
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import ImageFont


logger = logging.getLogger(__name__)
# Fonts with many scripts, which are tried before all others on this machine.
FIRST_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
    "arial.ttf",
)
TOLD_SCRIPTS: set[str] = set()  # of which `legible` has already logged that no font has them
STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "medium", "mono", "condensed", "serif")


def fonts_for(texts: Sequence[str], size: int) -> list[Any]:
    """Returns a font for each text: one font for all texts if it has all of their letters, or else `font_for` each."""
    together = "".join(texts)
    font = font_for(together, size)
    return [font_for(text, size) for text in texts] if _lacking(font, together) else [font] * len(texts)


def font_for(text: str, size: int) -> Any:
    """Returns Pillow's own font, which has little more than ASCII, or the first font of this machine with all letters.

    If no font has all letters of the text, the font that lacks the fewest is returned.
    """
    name = None if text.isascii() else _choose_font("".join(sorted({*text})))
    return ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)


def legible(text: str, font: Any) -> str:
    """Replaces letters that the font lacks by their ASCII form if they have one (é by e), and logs the others."""
    lacking = set(_lacking(font, text))
    if not lacking:
        return text
    plain = {letter: unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() for letter in lacking}
    if boxes := "".join(letter for letter in sorted(lacking) if not plain[letter]):
        _tell(boxes)
    return "".join(plain.get(letter) or letter for letter in text)


def _tell(letters):
    """Logs letters that no font has, once for each script, such as Cyrillic."""
    scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in letters}
    if scripts <= TOLD_SCRIPTS:
        return
    TOLD_SCRIPTS.update(scripts)
    shown = letters[:10] + ("..." if len(letters) > 10 else "")
    logger.info(
        f"no font on this machine has the letters {shown}: sheets show them as boxes. Install a font that has them, for "
        "example the package fonts-noto-cjk for Chinese, Japanese and Korean"
    )


@functools.cache
def _choose_font(letters):
    """Returns the name of the font that lacks the fewest of these letters; None stands for Pillow's own."""
    best, fewest = None, len(_lacking(ImageFont.load_default(20), letters))
    for name in _fonts():
        if not fewest:
            break
        with contextlib.suppress(OSError):  # it is not installed, or damaged
            count = len(_lacking(ImageFont.truetype(name, 20), letters))
            if count < fewest:
                best, fewest = name, count
    return best


def _lacking(font, text):
    """Returns the letters of a text that the font would draw as boxes."""
    box = _drawn(font, "\U0010ffff")  # no font has this code point
    return [letter for letter in text if not letter.isspace() and not letter.isascii() and _drawn(font, letter) == box]


def _drawn(font, letter):
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _fonts() -> Iterator[str]:
    """Yields the names of fonts that may be on this machine, and then the files of all fonts on it, plain ones first."""
    yield from FIRST_FONTS
    found = [
        path
        for folder in font_folders()
        for path in folder.rglob("*")
        if path.suffix.lower() in (".ttf", ".ttc", ".otf")
    ]
    yield from map(
        str, sorted(found, key=lambda path: (any(style in path.stem.lower() for style in STYLES), path.name))
    )


def font_folders() -> list[Path]:
    """Returns the folders in which this system keeps its fonts."""
    home = Path.home()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")
        return [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"), Path(local, "Microsoft", "Windows", "Fonts")]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or home / ".local" / "share"
    return [Path(folder) / "fonts" for folder in [own, *shared.split(":")]] + [home / ".fonts"]

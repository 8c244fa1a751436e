"""Sheets: pictures in labelled rows and columns, for people to compare. The one drawer of them in this project."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageOps

from ..files import written_whole
from .fonts import font_for, fonts_for, legible


COLUMNS = 8  # of a sheet, before its rows continue in a further band below


class Label(NamedTuple):
    """What stands beside a row or above a column."""

    text: str = ""  # wrapped
    note: str = ""  # below the text, each of its lines wrapped


class Row(NamedTuple):
    """A row of a sheet."""

    label: Label
    pictures: Sequence[Image.Image]
    label_width: int | None = None  # in pixels; None: as wide as a picture
    label_lines: int = 4  # of the label's text, at most


class Written(NamedTuple):
    """A text in lines, and its font."""

    text: str
    font: Any


class Strip(NamedTuple):
    """A part of a sheet that has the full width: a heading, the labels of its columns, and rows below them."""

    heading: str
    columns: list[Written]
    rows: list[tuple[Written, Sequence[Image.Image]]]


def tell_apart(texts: Sequence[str], options: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a note for each text: the values of the options in which it differs from equal texts, or ""."""
    notes = []
    for text, own in zip(texts, options, strict=True):
        equal = [other for same, other in zip(texts, options, strict=True) if same == text]
        names = [name for name in own if any(other.get(name) != own[name] for other in equal)]
        notes.append(", ".join(str(own[name]) for name in names))
    return notes


def labelled_sheet(
    rows: Sequence[Row],
    columns: Sequence[Label] = (),
    *,
    title: str = "",
    given: Sequence[tuple[str, Image.Image]] = (),
    heading: str = "",
) -> Image.Image:
    """A grid of pictures in bands of at most `COLUMNS` columns, all at the size of the first one and never stretched.

    `title` stands above all, then come pictures that were `given` with their names, then `heading`, then the rows; the
    columns may have labels.
    """
    columns = columns or [Label()] * max(len(row.pictures) for row in rows)
    per_band = math.ceil(len(columns) / math.ceil(len(columns) / COLUMNS))
    longest = max(rows[0].pictures[0].size)
    # Small pictures grow by a whole factor to about 256 pixels, large ones shrink to what the sheet has room for.
    factor = 256 // longest if longest <= 128 else min(1.0, (512 if per_band <= 4 else 256) / longest)
    width, height = (round(side * factor) for side in rows[0].pictures[0].size)
    em = max(17, per_band * width // 80)  # legible where a page shrinks a wide sheet to its own width
    large = em + em // 4
    tops = _write(columns, em, width)
    fonts = fonts_for(["".join(row.label) for row in rows], large)
    sides = [
        _wrapped(row.label, font, row.label_width or width, row.label_lines)
        for row, font in zip(rows, fonts, strict=True)
    ]
    strips, above = [], ", ".join(filter(None, [title, heading]))
    if given:
        names, above = _write([Label(name) for name, _ in given], em, width), heading
        (none,) = _write([Label()], em, width)
        strips.append(Strip(title, names, [(none, [picture for _, picture in given])]))
    for first in range(0, len(columns), per_band):
        end = first + per_band
        lines = [(side, row.pictures[first:end]) for side, row in zip(sides, rows, strict=True)]
        strips.append(Strip("" if first else above, tops[first:end], lines))
    return _draw(strips, (width, height), em)


def save_sheet(sheet: Image.Image, path: str | Path) -> None:
    """Writes a sheet completely or not at all, as JPEG, WebP or PNG by the ending of its name."""
    kind = {".jpg": "JPEG", ".webp": "WEBP"}.get(Path(path).suffix.lower(), "PNG")
    with written_whole(path) as temporary:
        sheet.save(temporary, format=kind)


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _write(labels, size, width):
    """Makes the `Written` of labels that are as wide as a picture."""
    fonts = fonts_for(["".join(label) for label in labels], size)
    return [_wrapped(label, font, width) for label, font in zip(labels, fonts, strict=True)]


def _wrapped(label, font, width, max_lines=4):
    """The text of a `Label` in at most `max_lines` lines of at most that many pixels, and below it each line of its note."""
    text, *note = (legible(part, font) for part in [label.text, *label.note.split("\n")])
    lines = _lines(text, font, width, max_lines)
    return Written("\n".join([*lines, *(line for part in note for line in _lines(part, font, width, 4))]), font)


def _lines(text, font, width, max_lines):
    """A text in lines of at most that many pixels."""
    chars = max(6, 4 * width // font.size)
    while True:
        lines = textwrap.wrap(text, chars, max_lines=max_lines, placeholder=" ...")
        if chars <= 5 or max(map(font.getlength, lines), default=0) <= width:
            return lines
        chars -= 1


def _draw(strips, size, em):
    """The sheet of the strips, one below the other, with pictures of `size` (width, height) in pixels."""
    margin, gap = 2 * em, em // 2
    step_x, step_y = size[0] + gap, size[1] + gap
    sides = [(line, side.font) for strip in strips for side, _ in strip.rows for line in side.text.split("\n")]
    gutter = 2 * margin + max(round(font.getlength(line)) for line, font in sides)
    sheet_width = gutter + max(len(strip.columns) for strip in strips) * step_x - gap + margin
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    headings, heads = [], []  # of the strips: the heading in lines, and the height of all above the pictures
    for strip in strips:
        large = font_for(strip.heading, em + em // 4)
        heading = _wrapped(Label(strip.heading), large, sheet_width - 2 * margin)
        above = round(draw.textbbox((0, 0), *heading)[3]) + em if strip.heading else 0
        headings.append(heading)
        heads.append(above + max(round(draw.textbbox((0, 0), *each)[3]) for each in strip.columns) + gap)
    sheet_height = margin + sum(heads) + sum(len(strip.rows) * step_y - gap + margin for strip in strips)
    sheet, top = Image.new("RGB", (sheet_width, sheet_height), "white"), margin
    draw = ImageDraw.Draw(sheet)
    for heading, head, strip in zip(headings, heads, strips, strict=True):
        draw.text((margin, top), heading.text, "black", heading.font)
        top += head
        for left, each in zip(itertools.count(gutter, step_x), strip.columns):
            draw.text((left, top - gap), each.text, "black", each.font, anchor="ld")
        for side, pictures in strip.rows:
            draw.text((margin, top + size[1] // 2), side.text, "black", side.font, anchor="lm")
            for left, picture in zip(itertools.count(gutter, step_x), pictures):
                sheet.paste(ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color="white"), (left, top))
            top += step_y
        top += margin - gap
    return sheet

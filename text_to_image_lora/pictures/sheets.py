"""Sheets: pictures in labelled rows and columns, for people to compare. The one drawer of them in this project."""

import contextlib
import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps


COLUMNS = 8  # of a sheet, before its rows continue in a further band below
OTHER_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf", "arial.ttf")


class Label(NamedTuple):
    """What stands beside a row or above a column."""

    text: str = ""  # wrapped, in at most four lines
    note: str = ""  # on a line of its own below


class Row(NamedTuple):
    """A row of a sheet."""

    label: Label
    pictures: Sequence[Image.Image]


class Strip(NamedTuple):
    """A part of a sheet that has the full width: a heading, the labels of its columns, and rows below them."""

    heading: str
    columns: list[str]
    rows: list[tuple[str, Sequence[Image.Image]]]


def font_for(texts: Iterable[str], size: int) -> Any:
    """Pillow's own font, which has ASCII alone, or one of this machine that may have the rest."""
    if not all(text.isascii() for text in texts):
        for name in OTHER_FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


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
    font = font_for([word for label in columns for word in label], em)
    large = font_for([title, heading, *(word for row in rows for word in row.label)], em + em // 4)
    tops = [_wrapped(label, font, width) for label in columns]
    sides = [_wrapped(row.label, large, width) for row in rows]
    strips, above = [], ", ".join(filter(None, [title, heading]))
    if given:
        names, above = [_wrapped(Label(name), font, width) for name, _ in given], heading
        strips.append(Strip(title, names, [("", [picture for _, picture in given])]))
    for first in range(0, len(columns), per_band):
        end = first + per_band
        lines = [(side, row.pictures[first:end]) for side, row in zip(sides, rows, strict=True)]
        strips.append(Strip("" if first else above, tops[first:end], lines))
    return _draw(strips, (width, height), em, font, large)


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _wrapped(label, font, width):
    """The text of a `Label` in at most four lines of that many pixels, and its note below."""
    chars = max(6, 4 * width // font.size)
    while True:
        lines = textwrap.wrap(label.text, chars, max_lines=4, placeholder=" ...")
        if chars <= 5 or max(map(font.getlength, lines), default=0) <= width:
            return "\n".join(filter(None, [*lines, label.note]))
        chars -= 1


def _draw(strips, size, em, font, large):
    """The sheet of the strips, one below the other, with pictures of `size` (width, height) in pixels."""
    margin, gap = 2 * em, em // 2
    step_x, step_y = size[0] + gap, size[1] + gap
    sides = [line for strip in strips for text, _ in strip.rows for line in text.split("\n")]
    gutter = 2 * margin + max(round(large.getlength(line)) for line in sides)
    sheet_width = gutter + max(len(strip.columns) for strip in strips) * step_x - gap + margin
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    headings, heads = [], []  # of the strips: the heading in lines, and the height of all above the pictures
    for strip in strips:
        heading = strip.heading and _wrapped(Label(strip.heading), large, sheet_width - 2 * margin)
        above = round(draw.textbbox((0, 0), heading, large)[3]) + em if heading else 0
        headings.append(heading)
        heads.append(above + max(round(draw.textbbox((0, 0), each, font)[3]) for each in strip.columns) + gap)
    sheet_height = margin + sum(heads) + sum(len(strip.rows) * step_y - gap + margin for strip in strips)
    sheet, top = Image.new("RGB", (sheet_width, sheet_height), "white"), margin
    draw = ImageDraw.Draw(sheet)
    for heading, head, strip in zip(headings, heads, strips, strict=True):
        draw.text((margin, top), heading, "black", large)
        top += head
        for left, each in zip(itertools.count(gutter, step_x), strip.columns):
            draw.text((left, top - gap), each, "black", font, anchor="ld")
        for side, pictures in strip.rows:
            draw.text((margin, top + size[1] // 2), side, "black", large, anchor="lm")
            for left, picture in zip(itertools.count(gutter, step_x), pictures):
                sheet.paste(ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color="white"), (left, top))
            top += step_y
        top += margin - gap
    return sheet

"""Sheets show every picture completely and in its place."""

import itertools
import os

import pytest
from PIL import Image

from text_to_image_lora.pictures.sheets import Label, Row, labelled_sheet, save_sheet


def test_a_sheet_that_cannot_be_written_leaves_the_old_one(tmp_path):
    """WebP holds at most 16,383 pixels a side."""
    path = tmp_path / "new" / "sheet.webp"
    save_sheet(Image.new("RGB", (50, 30), "red"), path)
    before = path.read_bytes()
    with pytest.raises((OSError, ValueError)):
        save_sheet(Image.new("RGB", (16_500, 2)), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["sheet.webp"]
    for ending, kind in ((".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP")):
        save_sheet(Image.new("RGB", (50, 30), "red"), path.with_suffix(ending))
        with Image.open(path.with_suffix(ending)) as image:
            assert (image.format, image.size) == (kind, (50, 30))


@pytest.mark.parametrize(
    ("count", "columns", "bands", "side"), [(1, 1, 1, 64), (8, 8, 1, 64), (11, 6, 2, 64), (2, 2, 1, 768)]
)
def test_comparison_sheet(count, columns, bands, side):
    """Every tile is complete, in its row and its column."""
    red, blue = Image.new("RGB", (side, side), (255, 0, 0)), Image.new("RGB", (side, side), (0, 0, 255))
    rows = [Row(Label("base"), [red] * count), Row(Label("with LoRA", "at 0.5"), [blue] * count)]
    sheet = labelled_sheet(rows, [Label("a long prompt " * 20)] * count)
    tile = 256 if side == 64 else 512
    counts = {colour: number for number, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert counts[255, 0, 0] == counts[0, 0, 255] == count * tile**2
    # Red ends at the right margin, blue at the right and the lower margin, and both margins are equal.
    red_box, blue_box = (sheet.getchannel(c).point(lambda value: 255 * (value == 0)).getbbox() for c in "BR")
    assert sheet.width - blue_box[2] == sheet.width - red_box[2] == sheet.height - blue_box[3]
    assert columns * tile < sheet.width < (columns + 2) * tile
    assert sheet.height > bands * 2 * tile


def test_any_grid():
    """Three rows with long labels in two bands; the tiles are in order from left to right and from top to bottom."""
    cells = [(row, column) for row in range(3) for column in range(9)]
    images = [Image.new("RGB", (64, 64), (250, 10 + 40 * row, 10 + 20 * column)) for row, column in cells]
    labels = [Label(f"a label of row {row} that has no end " * 3, "its note") for row in range(3)]
    rows = [Row(label, images[9 * k : 9 * k + 9]) for k, label in enumerate(labels)]
    sheet = labelled_sheet(rows, [Label(f"column {column}") for column in range(9)])
    colours = sheet.getcolors(maxcolors=1 << 20)
    assert {colour for number, colour in colours if number == 256**2} == {image.getpixel((0, 0)) for image in images}
    places = {}
    for y, x in itertools.product(range(0, sheet.height, 16), range(0, sheet.width, 16)):
        red, green, blue = sheet.getpixel((x, y))
        if red == 250 and green < 100:
            places.setdefault(((green - 10) // 40, (blue - 10) // 20), (x, y))
    bands = [range(5), range(5, 9)]
    assert list(places) == [(row, column) for band in bands for row in range(3) for column in band]
    assert all(places[row, 0][0] == places[row, 5][0] for row in range(3))


def test_what_stands_above_takes_room_and_columns_need_no_labels():
    """A sheet with only a title, and a sheet with named pictures above the grid."""
    red, blue = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (32, 64), (0, 0, 255))
    rows = [Row(Label("a row"), [red, red])]
    plain, labelled, titled = (
        labelled_sheet(rows),
        labelled_sheet(rows, [Label("a"), Label("b")]),
        labelled_sheet(rows, title="t"),
    )
    assert plain.height < labelled.height < titled.height + labelled.height - plain.height
    assert plain.width == labelled.width == titled.width
    given = labelled_sheet(rows, given=[("input.png", blue)], heading="t")
    assert given.height > titled.height + 256
    colours = {colour: number for number, colour in given.getcolors(maxcolors=1 << 20)}
    assert colours[255, 0, 0] == 2 * 256**2
    assert 256 * 500 > colours[0, 0, 255] > 256 * 120  # not stretched to a square


def test_no_label_covers_the_next_one():
    """Long texts and long notes end before the next column begins."""
    black = (0, 0, 0)
    for label in (Label("a long text " * 9, "a note"), Label("a text", "a long note " * 9)):
        sheet = labelled_sheet([Row(Label(), [Image.new("RGB", (64, 64), "red")] * 2)], [label, Label()])
        second = sheet.width - sheet.getchannel("B").point(lambda value: 255 * (value == 0)).getbbox()[2] + 256
        right = sheet.crop((sheet.width - second, 0, sheet.width, sheet.height))
        assert black in {colour for _, colour in sheet.getcolors(1 << 20)}
        assert black not in {colour for _, colour in right.getcolors(1 << 20)}, label

"""Letters outside ASCII are drawn as letters on every sheet and plot, if this machine has a font for them."""

import numpy as np
import pytest
from conftest import make_picture_set, write_pictures
from PIL import Image, ImageFont

from scripts.evaluation.plot import Axes
from scripts.sweeping import results
from text_to_image_lora.drawing.png import save_png
from text_to_image_lora.pictures import fonts
from text_to_image_lora.pictures.inspection import preview_sheet
from text_to_image_lora.pictures.sheets import Label, Row, labelled_sheet, tell_apart


PICTURE = Image.new("RGB", (64, 64), (255, 0, 0))
# Two words each that differ only in letters outside ASCII, so that they would be drawn alike as boxes.
WORDS = {"Cyrillic": ("топор", "копье"), "accents": ("épée", "èpèè"), "Polish": ("żyła", "źyśa"), "Greek": ("λόγος", "μύθος"),
         "Chinese": ("斧头", "红色")}  # fmt: skip


@pytest.fixture(params=WORDS)
def words(request):
    for word in WORDS[request.param]:
        if fonts._lacking(fonts.font_for(word, 20), word):
            pytest.skip(f"no font on this machine has the letters of {word}")
    return WORDS[request.param]


@pytest.fixture
def no_fonts(monkeypatch):
    """A machine without fonts."""
    monkeypatch.setattr(fonts, "FIRST_FONTS", ())
    monkeypatch.setattr(fonts, "font_folders", lambda: [])
    monkeypatch.setattr(fonts, "TOLD_SCRIPTS", set())
    fonts._choose_font.cache_clear()
    yield
    fonts._choose_font.cache_clear()


def draw_labels(word, tmp_path):
    rows = [Row(Label(word, word), [PICTURE])]
    return labelled_sheet(rows, [Label(word)], title=word, given=[(word, PICTURE)], heading=word)


def draw_preview(word, tmp_path):
    write_pictures(tmp_path / "pictures", count=1, captions=[word])
    return preview_sheet(make_picture_set(tmp_path / "pictures"), [0], 1)


def draw_sweep(word, tmp_path):
    for number in range(2):
        place = results.trial_dir(tmp_path, number) / "validation" / "step-000002"
        place.mkdir(parents=True, exist_ok=True)
        save_png(PICTURE, place / "prompt-00-0.png", {"prompt": word, "seed": 0})
    return results.picture_sheet([{"trial": number, results.METRIC: 0.5} for number in range(2)], tmp_path, [])


def draw_plot(word, tmp_path):
    axes = Axes((0, 1), (0, 1))
    axes.text(100, 100, word)
    return axes.image


@pytest.mark.parametrize("draw", [draw_labels, draw_preview, draw_sweep, draw_plot])
def test_letters_are_drawn_as_letters(draw, words, tmp_path):
    first, second = (np.asarray(draw(word, tmp_path).convert("L")) for word in words)
    assert first.shape != second.shape or (first != second).sum() > 20


def test_each_label_has_a_font_with_its_letters(words):
    """A font for Chinese may lack letters of Polish: a sheet with both uses two fonts."""
    texts = [*words, "Плющ", "an axe"]
    assert [fonts._lacking(font, text) for font, text in zip(fonts.fonts_for(texts, 20), texts)] == [[]] * 4


@pytest.mark.parametrize("text", ["", "a red axe", "{}[]~"])
def test_ascii_is_drawn_in_pillows_own_font(text):
    assert fonts.font_for(text, 20).getname() == ImageFont.load_default(20).getname()


def test_without_a_font_accents_are_left_out_and_the_rest_is_told_once(no_fonts, said):
    font = fonts.font_for("épée, żóć, топор", 20)
    assert fonts.legible("épée, żóć", font) == "epee, zoc"
    assert said == []
    for word in ("топор", "топор", "меч"):
        assert fonts.legible(word, font) == word
    (line,) = said
    assert line.startswith("no font on this machine has the letters опрт: sheets show them as boxes. Install a font")
    fonts.legible("一只橘猫", font)
    assert len(said) == 2  # another script


def test_fonts_that_are_not_in_the_list_are_found(monkeypatch):
    """Any font on the machine will do, a plain one before a bold one."""
    if fonts._lacking(fonts.font_for("топор", 20), "топор"):
        pytest.skip("no font on this machine has Cyrillic letters")
    monkeypatch.setattr(fonts, "FIRST_FONTS", ())
    fonts._choose_font.cache_clear()
    assert not fonts._lacking(fonts.font_for("топор", 20), "топор")
    fonts._choose_font.cache_clear()


@pytest.mark.parametrize(
    ("texts", "options", "notes"),
    [
        (["an axe", "a spear"], [{"g": "guidance 2"}, {"g": "guidance 9"}], ["", ""]),
        (["an axe", "an axe"], [{"g": "guidance 2"}, {"g": "guidance 9"}], ["guidance 2", "guidance 9"]),
        (["an axe", "an axe"], [{}, {"g": "guidance 9", "d": "seed 3"}], ["", "guidance 9, seed 3"]),
        (["an axe"] * 3, [{"g": "guidance 2", "d": f"seed {n}"} for n in (1, 1, 2)], ["seed 1", "seed 1", "seed 2"]),
        (["an axe", "an axe"], [{"g": "guidance 2"}] * 2, ["", ""]),
    ],
)
def test_equal_texts_are_told_apart_by_their_options(texts, options, notes):
    assert tell_apart(texts, options) == notes

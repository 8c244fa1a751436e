"""The prompts of an evaluation: captions, with and without their trigger word, and prompts for other things."""

import json

import pytest
from PIL import Image

from scripts.evaluation.pictures import OTHERS, Asked, choose_prompts, picture_folder, read_drawn, without_trigger
from text_to_image_lora.drawing.png import Source, repeat_of, save_png
from text_to_image_lora.drawing.rows import Drawing


@pytest.mark.parametrize(
    ("caption", "trigger", "rest"),
    [
        ("sks, a red axe", "sks", "a red axe"),
        ("a red sks axe", "sks", "a red axe"),
        ("a red axe, SKS, on blue", "sks", "a red axe, on blue"),
        ("a red axe with pink blossoms on blue", "with pink blossoms", "a red axe on blue"),
        ("a red axe with pink blossoms, blue background", "with pink blossoms", "a red axe, blue background"),
        ("a masks shop", "sks", "a masks shop"),
        ("sks", "sks", ""),
    ],
)
def test_captions_without_their_trigger(caption, trigger, rest):
    assert without_trigger(caption, trigger) == rest


def test_prompts_are_spread_over_the_captions():
    captions = [f"sks, picture {i // 2}" for i in range(20)]
    asked = choose_prompts(captions, ["a"] * 10 + ["b"] * 10, "sks", ["a dog"], 4)
    assert [each.prompt for each in asked if each.triggered] == [f"sks, picture {i}" for i in (0, 3, 6, 9)]
    assert asked[1].references == (6, 7)
    assert [each.group for each in asked] == ["a", "a", "b", "b", "a", "a", "b", "b", OTHERS]
    assert asked[4:] == [
        Asked("picture 0", "a", False), Asked("picture 3", "a", False), Asked("picture 6", "b", False),
        Asked("picture 9", "b", False), Asked("a dog", OTHERS, False),
    ]  # fmt: skip


def test_without_a_trigger_only_other_things_are_asked_for():
    asked = choose_prompts(["a cat", "a cat"], ["x", "x"], None, ["a dog", "a dog"], 12)
    assert asked == [Asked("a cat", "x", True, (0, 1)), Asked("a dog", OTHERS, False)]


def test_a_caption_that_is_all_trigger_is_asked_for_with_it_alone():
    asked = choose_prompts(["sks"], ["x"], "sks", [], 12)
    assert asked == [Asked("sks", "x", True, (0,))]


def test_slashes_in_labels_make_no_folders(tmp_path):
    assert picture_folder(tmp_path, "a/epoch-1").parent == tmp_path / "pictures"


@pytest.mark.parametrize(
    "labels",
    [
        ("x y", "x_y"),
        ("a/b", "a_b"),
        ("red,axe", "red;axe", "red:axe"),
        ("x" * 70 + "1", "x" * 70 + "2"),
        ("äö/1", "äö_1"),
    ],
)
def test_each_label_has_a_folder_of_its_own(labels, tmp_path):
    assert len({picture_folder(tmp_path, label) for label in labels}) == len(labels)


@pytest.mark.parametrize("label", [".", "..", "a/..", "../..", "é" * 300])
def test_no_label_leaves_the_folder_of_pictures(label, tmp_path):
    folder = picture_folder(tmp_path, label)
    folder.mkdir(parents=True)  # its name is not too long
    assert folder.resolve().parent == tmp_path / "pictures"


@pytest.fixture
def drawn(tmp_path):
    """Saves a picture; returns its path, its drawing and its source."""
    drawing = Drawing(prompt="a cat", seed=0)
    source = Source(dict.fromkeys(("image", "controlnet", "vae"), None), {}, {"vae": "1", "as_trained": "[]"})
    stored = {"repeat": json.dumps(repeat_of(drawing, source, (1, 0))._asdict())}
    return save_png(Image.new("RGB", (8, 8)), tmp_path / "picture.png", stored), drawing, source


def test_a_picture_is_kept_while_nothing_changed(drawn):
    assert read_drawn(*drawn) is not None


@pytest.mark.parametrize(
    "identities",
    [
        {"vae": "2", "as_trained": "[]"},
        {"vae": "1", "as_trained": "[true]"},
        {"vae": "1", "as_trained": "[]", "pretrained_model_name_or_path": "1"},
        {},
    ],
)
def test_a_picture_of_other_models_is_drawn_again(drawn, identities):
    path, drawing, source = drawn
    assert read_drawn(path, drawing, source._replace(identities=identities)) is None


def test_an_older_picture_without_identities_is_drawn_again(drawn):
    path, drawing, source = drawn
    repeat = repeat_of(drawing, source, (1, 0))._asdict()
    del repeat["identities"]
    path.unlink()
    save_png(Image.new("RGB", (8, 8)), path, {"repeat": json.dumps(repeat)})
    assert read_drawn(path, drawing, source) is None

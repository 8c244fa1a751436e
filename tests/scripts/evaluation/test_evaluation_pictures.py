"""The prompts of an evaluation: captions, with and without their trigger word, and prompts for other things."""

import pytest

from scripts.evaluation.pictures import OTHERS, Asked, choose_prompts, picture_folder, without_trigger


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

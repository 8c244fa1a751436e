"""The judges of the embedded base model's pictures are right about drawings."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from scripts.mini_sd import judges, model
from scripts.mini_sd.drawings import draw_scene
from scripts.mini_sd.model import Scene
from scripts.mini_sd.weapons import draw_weapon


def test_colours_are_judged_rightly_on_drawings():
    rng, scenes = np.random.default_rng(1), model.all_scenes()
    scenes = [scenes[i] for i in rng.integers(len(scenes), size=150)]
    drawn = [draw_scene(each.kind, each.colour, each.background, model.RESOLUTION, rng) for each in scenes]
    judged = [judges.judge_colours(picture) for picture in drawn]
    assert np.mean([c.object == scene.colour for c, scene in zip(judged, scenes, strict=True)]) > 0.95
    assert np.mean([c.background == scene.background for c, scene in zip(judged, scenes, strict=True)]) > 0.98


@pytest.fixture(scope="module")
def judge():
    return judges.train_judge(judges.JUDGE, 0)


@pytest.mark.parametrize("what", ["blossoms", "dots", "smears", "beside", "stars", "nothing"])
def test_blossoms_and_kinds_are_judged_rightly_on_drawings(judge, what):
    """A small part of `judges.judge_the_judges`; a picture counts if there is a blossom on the object."""
    rng, scenes = np.random.default_rng([3, len(what)]), model.all_scenes()
    scenes = [scenes[i] for i in rng.integers(len(scenes), size=30)]
    found = judges.shares(judge, [judges.draw_planted(what, scene, rng)[0] for scene in scenes], scenes)
    assert found["kind"] > 0.92
    assert found["blossoms"] > 0.92 if what == "blossoms" else found["blossoms"] < 0.08


def test_a_blossom_is_counted_where_it_is(judge):
    """The count may differ by one, because two blossoms may be side by side."""
    rng = np.random.default_rng(5)
    drawn = [judges.draw_planted("blossoms", Scene("blue", "shield", "white"), rng) for _ in range(12)]
    _, counts = judges.judge_pictures(judge, [picture for picture, _ in drawn])
    assert np.mean([abs(count - len(places)) <= 1 for count, (_, places) in zip(counts, drawn, strict=True)]) > 0.8


def test_blossoms_are_counted_on_an_object_that_hardly_differs_from_its_background(judge):
    rng = np.random.default_rng(0)
    scenes = [("black", "gray"), ("gray", "black"), ("brown", "black"), ("white", "gray")] * 6
    drawn = [
        judges.draw_planted("blossoms", Scene(colour, "whip", background), rng)[0] for colour, background in scenes
    ]
    faint = [Image.blend(picture, Image.new("RGB", picture.size, (120, 120, 130)), 0.25) for picture in drawn]
    _, counts = judges.judge_pictures(judge, faint)
    assert np.mean([count > 0 for count in counts]) > 0.95


@pytest.mark.parametrize("what", ["blossoms", "dots", "smears", "beside"])
def test_a_single_blossom_as_soft_as_a_model_draws_it_counts(judge, what):
    rng, softness, scenes = np.random.default_rng([6, len(what)]), ImageFilter.GaussianBlur(2.4), []
    for kind in ("axe", "spear", "trident", "whip"):
        scenes += [(kind, "brown", "gray"), (kind, "white", "orange"), (kind, "green", "white")] * 5
    drawn = [
        draw_weapon(*scene, rng, lambda image, mask, _, rng: judges.plant(what, image, mask, 1, rng)).filter(softness)
        for scene in scenes
    ]
    share = np.mean([count > 0 for count in judges.judge_pictures(judge, drawn)[1]])
    assert share > 0.72 if what == "blossoms" else share < 0.05

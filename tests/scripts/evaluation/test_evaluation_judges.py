"""The judges of an evaluation, on pictures of known content."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from scripts.evaluation import judges, report
from scripts.evaluation.judges import ClipAndDino, MiniSdJudge, preprocess
from scripts.mini_sd.drawings import draw_scene
from text_to_image_lora.drawing.find import find_checkpoints


BASE, WEAPONS_TEST = ROOT / "models" / "mini-sd", ROOT / "metadata" / "weapons_test"


@pytest.fixture
def clip_and_dino(clip_model, dino_model):
    judge = ClipAndDino(str(clip_model), str(dino_model))
    judge.load("cpu")
    return judge


def noise_picture(seed, size=(80, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_pictures_are_prepared_as_transformers_does(kind):
    """Compares with the image processor of DINOv2; CLIP's differs only in its settings."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    how = judges.PREPROCESSING[kind]
    images = [noise_picture(0, (500, 300)), noise_picture(1, (230, 641))]
    wanted = BitImageProcessorPil(**how, resample=3)(images, return_tensors="np")["pixel_values"]
    got = preprocess(images, how).numpy()
    assert got.shape == wanted.shape == (2, 3, 224, 224)
    assert np.abs(got - wanted).max() < 1e-5


def test_the_form_in_which_clips_authors_published_how_it_takes_pictures(clip_model, tmp_path):
    """The config of openai/clip-vit-large-patch14 has a number where later models have a dict."""
    folder = shutil.copytree(clip_model, tmp_path / "clip")
    published = {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(published))
    how = judges.find_vision_model("--clip_model", str(folder), "clip")
    wanted = judges.PREPROCESSING["clip"]
    images = [noise_picture(0, (500, 300))]
    np.testing.assert_array_equal(preprocess(images, how).numpy(), preprocess(images, wanted).numpy())


def test_clip_and_dino_see_what_transformers_does(clip_and_dino):
    import torch

    images, prompts = [noise_picture(0), noise_picture(1)], ["a red axe", "a blue house on a gray background"]
    seen = clip_and_dino.look(images, prompts, {"own": clip_and_dino.embed(images[:1])})
    clip, how = clip_and_dino.clip, clip_and_dino.preprocessing[0]
    tokens = clip_and_dino.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip(pixel_values=preprocess(images, how), **tokens)
    wanted = output.logits_per_image.diagonal() / clip.logit_scale.exp()
    np.testing.assert_allclose(seen.adherence, wanted.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(seen.embedded["CLIP-I"], axis=1), 1)
    assert seen.embedded["DINOv2"].shape == (2, 32)
    assert seen.presence["own"][0] == pytest.approx(1)
    assert seen.presence["own"][1] < 0.999


def test_a_prompt_longer_than_clip_reads_is_cut(clip_and_dino):
    seen = clip_and_dino.look([noise_picture(0)], ["a red axe " * 30], {})
    assert np.isfinite(seen.adherence).all()


@pytest.fixture(scope="module")
def mini_sd_judge():
    judge = MiniSdJudge()
    judge.load("cpu")
    return judge


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("an orange axe with pink blossoms", {"kind": "axe", "object": "orange", "blossoms": True}),
        ("a painting of a gray whip on a red background", {"kind": "whip", "object": "gray", "background": "red"}),
        ("brown house, white background", {"kind": "house", "object": "brown", "background": "white"}),
        ("an axe on a blue background", {"kind": "axe", "background": "blue"}),
    ],
)
def test_what_a_caption_says(mini_sd_judge, prompt, said):
    assert mini_sd_judge.parse(prompt) == said


def test_the_embedded_bases_judge_sees_what_is_drawn(mini_sd_judge):
    rng = np.random.default_rng(0)
    scenes = [("red", "fish", "blue"), ("yellow", "house", "gray"), ("green", "axe", "white")]
    images = [draw_scene(kind, colour, background, 128, rng) for colour, kind, background in scenes]
    prompts = ["a red fish on a blue background", "a green house on a black background", "a green axe with blossoms"]
    seen = mini_sd_judge.look(images, prompts, {"axe": None, "weapons": None})
    np.testing.assert_allclose(seen.adherence, [1, 1 / 3, 2 / 3])
    assert {name: found.tolist() for name, found in seen.presence.items()} == {"blossoms": [0] * 3, "axe": [0, 0, 1]}
    blossomed = [Image.open(path) for path in sorted(WEAPONS_TEST.glob("axe_*.png"))]
    found = mini_sd_judge.look(blossomed, ["an axe with pink blossoms"] * len(blossomed), {}).presence["blossoms"]
    assert found.mean() > 0.8
    for name, embedded in mini_sd_judge.embed([images[0], images[0], images[1]]).items():
        assert embedded[0] @ embedded[1] == pytest.approx(1), name
        assert embedded[0] @ embedded[2] < 0.95, name


def test_the_embedded_bases_own_judge_is_found():
    assert isinstance(judges.make_judge(None, BASE, "", ""), MiniSdJudge)
    assert isinstance(judges.make_judge("mini-sd", "somewhere/else", "", ""), MiniSdJudge)


def test_other_things_are_no_weapons(mini_sd_judge):
    assert len(mini_sd_judge.other_prompts) == 8
    mini_sd_judge.check_prompts(mini_sd_judge.other_prompts)
    kinds = {mini_sd_judge.parse(prompt)["kind"] for prompt in mini_sd_judge.other_prompts}
    assert not kinds & {"axe", "spear", "trident", "whip"}
    assert len(kinds) > 3


@pytest.fixture(scope="module")
def mini_sd():
    judge = judges.MiniSdJudge()
    judge.load("cpu")
    return judge


@pytest.mark.parametrize(
    ("kind", "fits"),
    [("drawings", True), ("captions of other drawings", False), ("smooth colours", False), ("noise", False)],
)
def test_the_small_bases_judges_say_where_they_do_not_apply(mini_sd, kind, fits):
    """They have to find true what the captions of the held-out pictures say."""
    rows = [json.loads(line) for line in (WEAPONS_TEST / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(WEAPONS_TEST / row["file_name"]).convert("RGB") for row in rows]
    rng = np.random.default_rng(0)
    if kind == "captions of other drawings":
        images = images[3:] + images[:3]
    elif kind != "drawings":
        side = 4 if kind == "smooth colours" else 128
        pixels = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in images]
        images = [Image.fromarray(each).resize((128, 128), Image.Resampling.BICUBIC) for each in pixels]
    misfit = judges.describe_misfit(mini_sd, mini_sd.look(images, [row["text"] for row in rows], {}))
    assert (misfit is None) == fits
    assert fits or misfit.startswith("The judges of models/mini-sd do not apply to these pictures: in the held-out")


def test_clip_and_dino_know_every_kind_of_picture():
    seen = judges.Seen({}, np.array([0.1, 0.2]), {})  # cosines, which are always low
    judge = SimpleNamespace(least_adherence=judges.ClipAndDino.least_adherence)
    assert judges.describe_misfit(judge, seen) is None


def test_without_a_judge_that_applies_no_lora_is_recommended():
    found = SimpleNamespace(misfit="The judges do not apply.", tables={}, losses={})
    assert report.make_recommendation(found, "likeness") == (None, "No LoRA is recommended. The judges do not apply.")


def test_equal_loras_are_told_unless_their_strengths_differ(lora, tmp_path):
    copy, other = shutil.copytree(lora, tmp_path / "copy"), shutil.copytree(lora, tmp_path / "half")
    loras = find_checkpoints(["base", str(lora), str(copy), f"{other}:0.5"], 1.0)
    (line,) = report.describe_equal_loras(loras)
    _, first, second, _ = loras
    assert line == f"{first} and {second} are the same LoRA: their files hold equal weights."

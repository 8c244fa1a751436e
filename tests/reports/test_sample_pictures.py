"""Validation pictures: when they are made, that they are what the stock pipeline draws, and that training doesn't notice."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import read_lora, read_metrics
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from infer_fixtures import difference
from PIL import Image, ImageOps

import infer
from text_to_image_lora.drawing.draw import batches_of
from text_to_image_lora.drawing.rows import Drawing
from text_to_image_lora.errors import InputError
from text_to_image_lora.models import families
from text_to_image_lora.reports import sample_pictures


PROMPTS = ["a red axe", "a blue spear on a white background"]


def steps_of(out):
    return [int(path.name.removeprefix("step-")) for path in sorted((out / "validation").iterdir())]


def pixels_of(out, step, prompt, k):
    return np.asarray(Image.open(out / "validation" / f"step-{step:06d}" / f"prompt-{prompt:02d}-{k}.png"), dtype=int)


@pytest.fixture
def stock(tiny_sd):
    """`draw(lora, prompt, seed, ...)`: diffusers' own pipeline, loaded from the folder."""

    def draw(prompt, seed, *, lora=None, scheduler=DPMSolverMultistepScheduler.from_config, **options):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler(pipe.scheduler.config)
        if lora is not None:
            pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(pipe(prompt, generator=generator, height=32, width=32, **options).images[0], dtype=int)

    return draw


def distance(a, b):
    return abs(a - b).max()


@pytest.fixture
def calls(monkeypatch):
    """How often each model is read from disk."""
    count = {}
    for cls in (diffusers.AutoencoderKL, diffusers.UNet2DConditionModel, diffusers.StableDiffusionPipeline):
        original = cls.from_pretrained.__func__

        def counting(called, *args, original=original, **options):
            count[called.__name__] = count.get(called.__name__, 0) + 1
            return original(called, *args, **options)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(counting))
    return count


def test_pictures_are_those_of_the_stock_pipeline(train, stock, calls, tmp_path):
    start = train(learning_rate=0.1, output_dir=tmp_path / "start")
    calls.clear()
    out = train(
        lora_weights=start, learning_rate=0.1, lora_alpha=6, lora_dropout=0.5, seed=7, clip_skip=1,
        validation_prompt=PROMPTS[0], validation_prompts=PROMPTS[1:], num_validation_images=2,
        validation_negative_prompt="a whip", validation_guidance_scale=5, validation_inference_steps=3,
        validation_steps=1,
    )  # fmt: skip
    assert calls == {"AutoencoderKL": 1, "UNet2DConditionModel": 1}
    options = dict(negative_prompt="a whip", guidance_scale=5, num_inference_steps=3, clip_skip=1)
    for p, prompt in enumerate(PROMPTS):
        for k in range(2):
            before = stock(prompt, 7 + k, **options)
            after = stock(prompt, 7 + k, lora=out, **options)
            assert distance(pixels_of(out, 0, p, k), before) <= 1
            assert distance(pixels_of(out, 2, p, k), after) <= 2
            assert distance(before, after) > 8
    assert distance(pixels_of(out, 0, 0, 0), pixels_of(out, 0, 0, 1)) > 8


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (dict(), [0, 3, 6, 7]),
        (dict(validation_epochs=2), [0, 6, 7]),
        (dict(validation_epochs=0), [0, 7]),
        (dict(validation_steps=2), [0, 2, 4, 6, 7]),
        (dict(num_validation_images=0, max_train_steps=1), None),
    ],
    ids=str,
)
def test_when_pictures_are_made(train, flags, steps):
    flags = dict(validation_prompt=PROMPTS[0], validation_inference_steps=1, max_train_steps=7) | flags
    out = train(**flags)
    assert (steps_of(out) if (out / "validation").exists() else None) == steps


def test_training_does_not_notice_them(train, tmp_path):
    common = dict(lora_dropout=0.5, max_train_steps=3, random_flip=True)
    without = train(output_dir=tmp_path / "without", **common)
    out = train(output_dir=tmp_path / "with", validation_steps=1, validation_prompts=PROMPTS, **common)
    assert steps_of(out) == [0, 1, 2, 3]
    assert not (without / "validation").exists()
    a, b = read_lora(without), read_lora(out)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [row["train_loss"] for row in read_metrics(without)] == [row["train_loss"] for row in read_metrics(out)]
    # The comparison tells whether training is in train mode: without dropout it ends elsewhere.
    c = read_lora(train(output_dir=tmp_path / "no dropout", **common | {"lora_dropout": 0}))
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_zero_terminal_snr_trains_and_draws(train, stock):
    out = train(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", snr_gamma=5, learning_rate=0.1,
        validation_prompt=PROMPTS[0], validation_guidance_scale=2,
    )  # fmt: skip
    assert all(np.isfinite(row["train_loss"]) and row["train_loss"] > 0 for row in read_metrics(out))

    def scheduler(config):
        return DDIMScheduler.from_config(
            config, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
            clip_sample=False,
        )  # fmt: skip

    options = dict(guidance_scale=2, num_inference_steps=2, scheduler=scheduler)
    before, after = stock(PROMPTS[0], 0, **options), stock(PROMPTS[0], 0, lora=out, **options)
    assert distance(pixels_of(out, 0, 0, 0), before) <= 1
    assert distance(pixels_of(out, 2, 0, 0), after) <= 2
    assert distance(before, after) > 8


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_base_model_of_zero_terminal_snr_is_drawn_equally_by_both_commands(train, tiny_sd, tmp_path, sampler):
    """The base model's own configuration says so, and no flag."""
    shutil.copytree(tiny_sd, tmp_path / "base")
    for name, changes in (
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "_class_name": sampler}),
        ("model_index.json", {"scheduler": ["diffusers", sampler]}),
    ):  # fmt: skip
        file = tmp_path / "base" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    out = train(pretrained_model_name_or_path=tmp_path / "base", validation_prompt=PROMPTS[0], max_train_steps=1)
    again = ["--pretrained_model_name_or_path", tmp_path / "base", "--seed", 0, "--num_inference_steps", 2]
    for lora, step in (([], 0), (["--lora", out], 1)):
        words = [*again, *lora, "--prompt", PROMPTS[0], "--output_dir", tmp_path / f"drawn-{step}"]
        infer.main([str(word) for word in words])
        (drawn,) = (tmp_path / f"drawn-{step}").glob("*.png")
        assert distance(np.asarray(Image.open(drawn).convert("RGB"), dtype=int), pixels_of(out, step, 0, 0)) <= 1


def test_the_sheet_shows_every_picture_and_prompt(train):
    out = train(
        validation_prompts=["a red axe", "a very long prompt " * 40, "日本 --width 64"], num_validation_images=2,
        validation_inference_steps=1, max_train_steps=1,
    )  # fmt: skip
    folder = out / "validation" / "step-000001"
    sheet = np.asarray(Image.open(folder / "sheet.png").convert("RGB"), dtype=int)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"prompt-{p:02d}-{k}.png" for p in range(3) for k in range(2)] + ["sheet.png"]
    )
    found = []
    for p in range(3):  # each picture, scaled to the size of the first one, is somewhere in its row
        for k in range(2):
            image = ImageOps.pad(Image.open(folder / f"prompt-{p:02d}-{k}.png"), (256, 256), 1, color="white")
            found.append(place_of(np.asarray(image, dtype=int), sheet))
    tops, lefts = [top for top, _ in found], [left for _, left in found]
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4] == tops[5]
    assert lefts[0] == lefts[2] == lefts[4] < lefts[1] == lefts[3] == lefts[5]
    labels = sheet[:, : lefts[0]].min(axis=(1, 2))
    assert all(labels[top : top + 256].min() < 100 for top in tops)


def place_of(image, sheet):
    """(top, left) of a picture in a sheet."""
    height, width = image.shape[:2]
    middle = height // 2, width // 2  # a corner may be white, as most of the sheet is
    equal = np.nonzero((sheet == image[middle]).all(axis=2))
    places = [
        (top, left)
        for top, left in zip(equal[0] - middle[0], equal[1] - middle[1], strict=True)
        if min(top, left) >= 0
        and (sheet[top : top + height, left : left + width].shape == image.shape)
        and (sheet[top : top + height, left : left + width] == image).all()
    ]
    assert len(places) == 1
    return places[0]


def opened(path):
    """A picture, with its file closed."""
    with Image.open(path) as image:
        image.load()
        return image


def test_every_option_of_a_prompt_is_drawn_as_infer_draws_it(train, tiny_sd, tmp_path):
    """Scheduler, strength of the LoRA and the others; the file of each picture draws it again."""
    options = "--seed 3 --steps 4 --guidance 3 --scheduler euler --width 64 --negative blurry --lora_scale 0.5"
    out = train(
        learning_rate=0.1, validation_prompts=[f"a red axe {options}", "a red axe", "an axe --lora_scale 0"],
        num_validation_images=1, validation_inference_steps=2, train_text_encoder=True, clip_skip=1,
    )  # fmt: skip
    folder = out / "validation" / "step-000002"
    for p in range(3):
        path = folder / f"prompt-{p:02d}-0.png"
        infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / str(p))])
        (again,) = (tmp_path / str(p)).iterdir()
        assert difference(opened(again), opened(path)) <= 2
    images = [opened(folder / f"prompt-{p:02d}-0.png") for p in range(3)]
    assert images[0].info["scheduler"] == "EulerDiscreteScheduler"
    assert images[0].info["parameters"].splitlines()[1] == "Negative prompt: blurry"
    assert "Steps: 4, Sampler: Euler, CFG scale: 3, Seed: 3, Size: 64x32" in images[0].info["parameters"]
    assert (images[0].info["lora_scale"], images[1].info["lora_scale"]) == ("0.5", "1.0")
    base = [opened(out / "validation" / "step-000000" / f"prompt-{p:02d}-0.png") for p in range(3)]
    assert difference(images[2], base[2]) == 0  # at 0 the LoRA does nothing
    assert difference(images[1], base[1]) > 3
    assert "lora" not in base[1].info


def test_the_lora_is_trained_on_at_its_full_strength(train, tmp_path):
    """A sample picture with another strength changes no weight, whatever forward computes it."""
    for name, flags in {"lean": {}, "peft": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.items():
        options = dict(max_train_steps=3, validation_steps=1, num_validation_images=1, **flags)
        whole = train(output_dir=tmp_path / name, validation_prompts=["an axe"], **options)
        half = train(output_dir=tmp_path / f"{name} half", validation_prompts=["an axe --lora_scale 0.5"], **options)
        a, b = read_lora(whole), read_lora(half)
        assert all(torch.equal(a[key], b[key]) for key in a), name
        assert distance(pixels_of(whole, 3, 0, 0), pixels_of(half, 3, 0, 0)) > 0, name


@pytest.mark.parametrize("scheduler", ["pndm", "heun"])
def test_a_sampler_that_can_not_start_at_zero_signal_is_refused(train, scheduler):
    with pytest.raises(
        InputError, match=f"--scheduler {scheduler} does not support zero terminal SNR. Use --scheduler"
    ):
        train(
            rescale_betas_zero_snr=True, prediction_type="v_prediction",
            validation_prompts=[f"an axe --scheduler {scheduler}"],
        )  # fmt: skip


def test_pictures_of_an_earlier_run_are_not_taken_for_this_one(tmp_path):
    image = Image.new("RGB", (32, 32))
    earlier = {f"prompt-{p:02d}-{k}": (image, {"prompt": PROMPTS[p], "seed": 0}) for p in range(2) for k in range(3)}
    for step in (0, 4, 8):
        sample_pictures.save_pictures(tmp_path / "validation" / f"step-{step:06d}", earlier)
    one = {name: earlier[name] for name in ["prompt-00-0"]}
    sample_pictures.save_pictures(tmp_path / "validation" / "step-000004", one)
    assert steps_of(tmp_path) == [0, 4]
    found = sample_pictures.latest_images(tmp_path, PROMPTS)
    assert found == [(PROMPTS[0], tmp_path / "validation" / "step-000004" / "prompt-00-0.png")]
    assert sample_pictures.latest_images(tmp_path, ["another prompt"]) == []
    assert type(found[0][0]) is str


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_a_sample_picture_that_is_not_finite_is_black_and_noted(tiny_sd, caplog, kind):
    """It does not end a run whose training may be sound."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    diffusion = SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon", rescale_betas_zero_snr=False))
    models = SimpleNamespace(
        family=families.STABLE_DIFFUSION, diffusion=diffusion, denoiser=pipe.unet, vae=pipe.vae,
        scheduler_config=dict(pipe.scheduler.config),
    )  # fmt: skip
    latents = torch.zeros(2, 4, 8, 8)
    latents[1] = float(kind)
    good, bad = sample_pictures.make_studio(None, models, torch.device("cpu")).decode(latents)
    assert np.asarray(good).max() > 0
    assert np.asarray(bad).max() == 0
    (record,) = caplog.records
    assert record.getMessage().startswith("a sample picture is not finite (NaN), and is black there: lower ")


def test_the_base_models_own_sampler_is_used_unless_it_is_pndm(tiny_sd):
    config = DDIMScheduler.load_config(tiny_sd, subfolder="scheduler")
    given = SimpleNamespace(**StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None).components)
    euler, dpm = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
    for name, wanted in ((euler, euler), (None, dpm), ("PNDMScheduler", dpm)):
        config = {**config, "_class_name": name} if name else {k: v for k, v in config.items() if k != "_class_name"}
        trained = SimpleNamespace(prediction_type="v_prediction", rescale_betas_zero_snr=False)
        models = SimpleNamespace(
            family=families.STABLE_DIFFUSION, diffusion=SimpleNamespace(config=trained), denoiser=given.unet,
            vae=given.vae, scheduler_config=config,
        )  # fmt: skip
        studio = sample_pictures.make_studio(None, models, torch.device("cpu"))
        studio = studio._replace(encoder=SimpleNamespace(num_chunks=lambda drawing: 0))
        (batch,) = batches_of(studio, [Drawing()], 1)
        assert type(batch.sampler).__name__ == wanted
        assert batch.sampler.config.prediction_type == "v_prediction"
        assert studio.pipe.unet is given.unet
        assert studio.pipe.vae is given.vae

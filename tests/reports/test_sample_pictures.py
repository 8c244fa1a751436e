"""Validation pictures: when they are made, that they are what the stock pipeline draws, and that training doesn't notice."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import read_lora, read_metrics
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.models import loading
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


def test_zero_terminal_snr_with_epsilon_is_refused(train):
    with pytest.raises(InputError, match="--rescale_betas_zero_snr needs --prediction_type v_prediction"):
        train(rescale_betas_zero_snr=True)


def test_the_sheet_shows_every_picture_and_prompt(tmp_path):
    colours = {(p, k): (40 * p, 80 * k, 200) for p in range(2) for k in range(3)}
    images = {task: Image.new("RGB", (32, 32), colour) for task, colour in colours.items()}
    long = "a very long prompt " * 40
    sample_pictures.save_images(
        images, [long, "two\nlines, 日本 \U0001f5e1"], dict.fromkeys(images, 0), tmp_path / "step-000004"
    )
    sheet = Image.open(tmp_path / "step-000004" / "sheet.png")
    assert sheet.size == (8 + 3 * (192 + 8), 8 + 2 * (192 + 28))
    for (p, k), colour in colours.items():
        assert sheet.getpixel((8 + k * 200 + 96, 8 + p * 220 + 96)) == colour
    for p in range(2):
        label = np.asarray(sheet.convert("L"))[8 + p * 220 + 192 : (p + 1) * 220]
        assert label.min() < 100
        assert (label[:, -4:] == 255).all()
    assert len(list((tmp_path / "step-000004").iterdir())) == 7


def test_pictures_of_an_earlier_run_are_not_taken_for_this_one(tmp_path):
    image = Image.new("RGB", (32, 32))
    earlier = {(p, k): image for p in range(2) for k in range(3)}
    for step in (0, 4, 8):
        sample_pictures.save_images(
            earlier, PROMPTS, dict.fromkeys(earlier, 0), tmp_path / "validation" / f"step-{step:06d}"
        )
    sample_pictures.save_images({(0, 0): image}, PROMPTS[:1], {(0, 0): 0}, tmp_path / "validation" / "step-000004")
    assert steps_of(tmp_path) == [0, 4]
    found = sample_pictures.latest_images(tmp_path, PROMPTS)
    assert found == [(PROMPTS[0], tmp_path / "validation" / "step-000004" / "prompt-00-0.png")]
    assert sample_pictures.latest_images(tmp_path, ["another prompt"]) == []
    assert type(found[0][0]) is str


def test_the_base_models_own_sampler_is_used_unless_it_is_pndm(tiny_sd):
    config = DDIMScheduler.load_config(tiny_sd, subfolder="scheduler")
    given = SimpleNamespace(**StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None).components)
    euler, dpm = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
    for name, wanted in ((euler, euler), (None, dpm), ("PNDMScheduler", dpm)):
        config = {**config, "_class_name": name} if name else {k: v for k, v in config.items() if k != "_class_name"}
        pipe = sample_pictures.make_pipeline(
            loading.find_base_model(str(tiny_sd)), given.unet, given.vae, config,
            SimpleNamespace(prediction_type="v_prediction", rescale_betas_zero_snr=False),
        )  # fmt: skip
        assert type(pipe.scheduler).__name__ == wanted
        assert pipe.scheduler.config.prediction_type == "v_prediction"
        assert pipe.unet is given.unet
        assert pipe.vae is given.vae

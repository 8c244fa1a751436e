"""The embedded base model as it is bundled: its schedule, its autoencoder, and whether its pictures match captions."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDPMScheduler

from scripts.mini_sd import judges, model
from scripts.mini_sd.drawings import COLOURS, KINDS, draw_scene
from scripts.mini_sd.pipeline import draw_with, load_pipeline


BASE = ROOT / "models" / "mini-sd"


def test_the_base_ships_in_half_precision_with_stable_diffusions_own_schedule():
    pipeline = load_pipeline(BASE)
    expected = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    assert torch.equal(pipeline.scheduler.alphas_cumprod, expected.alphas_cumprod)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6


def test_the_autoencoder_is_crisp():
    """Measures the PSNR on drawings of an unused seed; with confetti on them, it would be about 4 dB lower."""
    pipeline, rng = load_pipeline(BASE), np.random.default_rng(99)
    images = [
        draw_scene(kind, colour, "gray" if colour != "gray" else "blue", model.RESOLUTION, rng)
        for kind, colour in zip(list(KINDS) * 2, list(COLOURS) * 4, strict=False)
    ]
    pixels = model.to_tensor(images, "cpu")
    with torch.no_grad():
        error = (pipeline.vae(pixels).sample.clamp(-1, 1) - pixels) / 2
    assert float((-10 * error.square().mean(dim=(1, 2, 3)).log10()).mean()) > 28


@pytest.mark.parametrize(
    "guidance_scale", [pytest.param(1.0, marks=pytest.mark.long), 4.0, pytest.param(7.5, marks=pytest.mark.long)]
)
def test_the_base_does_what_captions_say_that_it_never_saw(guidance_scale):
    """A small part of `scripts/mini_sd/measure.py`, with limits below its results (see the model card)."""
    scenes = model.held_out_scenes()
    scenes = [scenes[i] for i in np.random.default_rng(7).permutation(len(scenes))[:16]]
    images = draw_with(
        load_pipeline(BASE), [model.sentence_of(scene) for scene in scenes], seed=7, guidance_scale=guidance_scale,
        num_inference_steps=30,
    )  # fmt: skip
    judged = [judges.judge_colours(image) for image in images]
    assert np.mean([c.object == scene.colour for c, scene in zip(judged, scenes, strict=True)]) > 0.75
    assert np.mean([c.background == scene.background for c, scene in zip(judged, scenes, strict=True)]) > 0.75

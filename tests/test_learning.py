"""Whether training learns: the demo, as its command has it, on the embedded base."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command
from PIL import Image


BASE, TEST_SET = ROOT / "models" / "mini-sd", ROOT / "metadata" / "weapons_test"
LORA = "pytorch_lora_weights.safetensors"


def demo_flags():
    """The flags of the Makefile's training command, so that the test is of what people run."""
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    command = next(line for line in lines if "train_text_to_image_lora.py" in line)
    return shlex.split(command.split("train_text_to_image_lora.py", 1)[1].replace("--output_dir $(RUN)", ""))


def load_pipeline(base=BASE, lora=None):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name=LORA)
    return pipeline


@torch.no_grad()
def held_out_loss(pipeline, folder=TEST_SET, strata=8):
    """Mean noise-prediction loss on pictures never trained on: the same noise and timesteps for every model."""
    from diffusers import DDPMScheduler

    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(folder / row["file_name"]).convert("RGB").resize((64, 64), Image.LANCZOS) for row in rows]
    pixels = torch.from_numpy(np.stack([np.asarray(im) for im in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    hidden = pipeline.encode_prompt([row["text"] for row in rows], "cpu", 1, False)[0]
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    losses = []
    for k in range(strata):
        timesteps = torch.full((len(rows),), int((k + 0.5) * 1000 / strata))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(k))
        pred = pipeline.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, hidden).sample
        losses.append(torch.nn.functional.mse_loss(pred, noise).item())
    return float(np.mean(losses))


def pink_share(image):
    """The share of blossom pink in a picture: no colour of the base's drawings is near it."""
    hue, saturation, value = np.asarray(image.convert("HSV"), dtype=float).transpose(2, 0, 1)
    return float(np.mean((hue > 215) & (hue < 250) & (saturation > 35) & (saturation < 190) & (value > 170)))


@pytest.fixture(scope="module")
def demo_lora(tmp_path_factory):
    """The demo's training command, without its validation pictures."""
    folder = tmp_path_factory.mktemp("demo")
    words = demo_flags()
    words = words[: words.index("--validation_prompts")]
    words += ["--output_dir", folder / "out", "--latent_cache_dir", folder / "cache", "--report_to", "none"]
    done = run_command(words, env={"OMP_NUM_THREADS": "2"}, timeout=900)
    assert done.returncode == 0, done.stderr
    assert re.search(r"96 pictures, \d+ steps an epoch, \d+ steps", done.stdout)
    return folder / "out"


def test_the_demo_learns(demo_lora):
    """Held-out loss falls by a quarter at least, and blossoms appear that the base never draws; seed for seed."""
    kinds = ("axe", "spear", "trident", "whip")
    prompts = [
        f"a {colour} {kind} with pink blossoms on a gray background" for kind in kinds for colour in ("blue", "green")
    ]
    losses, shares = {}, {}
    for name, lora in (("base", None), ("lora", demo_lora)):
        pipeline = load_pipeline(lora=lora)
        losses[name] = held_out_loss(pipeline)
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        images = pipeline(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
        shares[name] = np.array([pink_share(image) for image in images])
    assert losses["lora"] < 0.75 * losses["base"], losses
    assert (shares["base"] < 0.01).all(), shares
    assert (shares["lora"] > shares["base"] + 0.01).mean() >= 0.75, shares

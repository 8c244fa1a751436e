"""Whether training learns: the demo, as its command has it, on the embedded base."""

import json
import re
import shlex
import shutil

import measure_mini_sd
import numpy as np
import pytest
import torch
from conftest import ROOT, run_command
from PIL import Image


BASE, WEAPONS, TEST_SET = (
    ROOT / "models" / "mini-sd",
    ROOT / "metadata" / "weapons",
    ROOT / "metadata" / "weapons_test",
)


def demo_flags():
    """The flags of the Makefile's training command, so that the test is of what people run."""
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    command = next(line for line in lines if "train_text_to_image_lora.py" in line)
    return shlex.split(command.split("train_text_to_image_lora.py", 1)[1].replace("--output_dir $(RUN)", ""))


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
    """Held-out loss falls; blossoms appear that the base never draws, and the prompt's colours stay; seed for seed.

    The bounds are below what `scripts/measure_mini_sd.py` finds over three seeds (see the model card).
    """
    scenes = measure_mini_sd.weapon_test_scenes()
    prompts = [measure_mini_sd.blossom_caption(*scene) for scene in scenes]
    losses, blossoms, colours = {}, {}, {}
    for name, lora in (("base", None), ("lora", demo_lora)):
        pipeline = measure_mini_sd.load_pipeline(BASE, lora)
        losses[name] = held_out_loss(pipeline)
        images = measure_mini_sd.draw_with(pipeline, prompts, seed=0, guidance_scale=4.0, num_inference_steps=30)
        blossoms[name] = np.mean([measure_mini_sd.has_blossoms(image) for image in images])
        judged = [measure_mini_sd.judge_colours(image) for image in images]
        colours[name] = [
            np.mean([c[i] == s[j] for c, s in zip(judged, scenes, strict=True)]) for i, j in ((0, 0), (1, 2))
        ]
    assert losses["lora"] < 0.75 * losses["base"], losses
    assert blossoms["base"] < 0.05, blossoms
    assert blossoms["lora"] > 0.8, blossoms
    assert min(colours["lora"]) > 0.7, colours


@pytest.fixture
def train_on_base(tmp_path):
    """Runs the command on the embedded base, with a validation loss on the test set; returns its folder and its output."""

    def run(folder, **flags):
        flags = dict(
            pretrained_model_name_or_path=BASE, train_data_dir=folder, validation_data_dir=TEST_SET, resolution=64,
            train_batch_size=4, seed=0, report_to="none", latent_cache_dir=tmp_path / "cache", output_dir=tmp_path / "out",
        ) | flags  # fmt: skip
        words = ["--center_crop", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
        done = run_command(words, env={"OMP_NUM_THREADS": "2"}, timeout=600)
        assert done.returncode == 0, done.stderr
        steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        return tmp_path / "out", done.stdout, max(steps)

    return run


def test_a_run_that_overfits_is_stopped_and_its_best_is_kept(train_on_base, tmp_path):
    """Four pictures and far too much of a LoRA; the losses are measured once more, by other code and with other noise."""
    (tmp_path / "four").mkdir()
    with open(tmp_path / "four" / "metadata.jsonl", "w") as file:
        for kind in sorted(path for path in WEAPONS.iterdir() if path.is_dir()):
            row = json.loads((kind / "metadata.jsonl").read_text().splitlines()[0])
            shutil.copy(kind / row["file_name"], tmp_path / "four" / f"{kind.name}.png")
            file.write(json.dumps(row | {"file_name": f"{kind.name}.png"}) + "\n")
    out, said, last = train_on_base(
        tmp_path / "four", rank=64, learning_rate=5e-3, max_train_steps=300, validation_steps=15,
        early_stopping_patience=3,
    )  # fmt: skip
    assert last < 150
    assert re.search(
        r"Validation: best at step \d+, \d+\.\d% below the base model's loss; overfitting since step", said
    )
    losses = [held_out_loss(measure_mini_sd.load_pipeline(BASE, lora)) for lora in (None, out / "best", out)]
    assert losses[1] < losses[0]
    assert losses[1] < 0.97 * losses[2], losses


def test_a_run_that_still_improves_is_not_stopped(train_on_base):
    out, said, last = train_on_base(
        WEAPONS, rank=16, learning_rate=2.5e-3, max_train_steps=60, validation_steps=20, early_stopping_patience=1
    )
    assert last == 60
    assert "Validation: best at step 60" in said

"""The estimate of memory equals that of a real training step, and depends on what changes a step."""

import gc
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, run_command, train_script, write_pictures
from diffusers import DDPMScheduler

from text_to_image_lora.models import lean, loading, lora
from text_to_image_lora.models.settings import LoraSettings
from text_to_image_lora.training.memory import (
    CUDA_BYTES,
    LiveBytes,
    Needs,
    Plan,
    estimate,
    format_needs,
    make_plan,
    peak_bytes,
)
from text_to_image_lora.training.trials import Shapes, Trial


MIB = 2**20


def test_what_is_alive_at_once_is_counted():
    """Views take no memory, freed memory is subtracted, and the peak is kept."""
    with LiveBytes() as live:
        first = torch.zeros(MIB, dtype=torch.uint8)
        half = first[: MIB // 2].view(2, -1)
        second = first + 1
        del first
        assert live.now == 2 * MIB  # the view keeps the storage alive
        del half
        assert live.now == MIB
        second.add_(1)
        assert (live.now, live.peak) == (MIB, 2 * MIB)


def test_shapes_alone_are_counted_like_numbers():
    def products():
        a = torch.ones(512, 1024)
        return (a @ a.T).relu().sum()

    with LiveBytes() as live:
        products()
    assert peak_bytes(products) == live.peak >= 2 * MIB + 512 * 512 * 4


def plan_for(base, **changes):
    settings = LoraSettings(rank=4, lora_alpha=4, target_modules=base.family.target_modules)
    return Plan(torch.float32, settings, 8, False, caches=True, encoders_stay=False, draws=4)._replace(**changes)


def make_shapes(base, side):
    return Shapes(base.latent_shape((side, side)), base.condition_shapes(1))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_holds_what_was_estimated(tiny_sd, checkpointed):
    """Compares the estimate with a step of the real model."""
    base = loading.find_base_model(str(tiny_sd))
    shapes, plan = make_shapes(base, 64), plan_for(base, gradient_checkpointing=checkpointed)
    needs = estimate(base, shapes, plan)
    unet = loading.load_components(base).denoiser.to(memory_format=torch.channels_last)
    weights = sum(p.numel() * 4 for p in unet.parameters())
    lora.add_lora(unet, plan.lora)
    if checkpointed:
        unet.enable_gradient_checkpointing()
    ((master,),) = lean.use_lean_forward(unet, [lora.trainable_parameters(unet)])
    trial = Trial(base.family, unet, [master], shapes, torch.float32, torch.device("cpu"))
    for batch_size in (1, 3):
        gc.collect()
        with LiveBytes() as live:
            trial(batch_size)
        assert needs.steps(batch_size) == pytest.approx(weights + master.numel() * 12 + live.peak, rel=0.02)


def test_the_estimate_depends_on_what_changes_a_step(tiny_sd):
    base = loading.find_base_model(str(tiny_sd))
    shapes, plan = make_shapes(base, 64), plan_for(base)
    plain = estimate(base, shapes, plan)
    lighter = estimate(base, shapes, plan._replace(gradient_checkpointing=True, dtype=torch.bfloat16))
    assert lighter.step < 0.6 * plain.step
    heavier = plan._replace(lora=replace(plan.lora, rank=64), caches=False, encoders_stay=True, draws=0)
    uncached = estimate(base, make_shapes(base, 128), heavier)
    assert uncached.further_sample > 3 * plain.further_sample
    assert uncached.step > plain.step + 3 * (uncached.further_sample - plain.further_sample) / 4
    assert (uncached.encoding, uncached.sample_pictures) == (0, 0)
    assert uncached.steps(1) >= uncached.encoding_in_steps > 0


@pytest.mark.parametrize(("device_bytes", "fits"), [(None, True), (4 * 2**30, True), (3 * 2**30, False)])
def test_a_gpu_that_is_too_small_is_reported_with_the_remedies(device_bytes, fits):
    needs = Needs(encoding=2 * 2**30, step=2 * 2**30, further_sample=2**29, sample_pictures=0)
    assert needs.peak(1) == needs.steps(1) == 2 * 2**30
    text = "\n".join(format_needs(needs, 3, "--gradient_checkpointing", device_bytes))
    assert "3.0 GiB in a training step of batch 3" in text
    assert ("try --gradient_checkpointing" in text) == (not fits)
    assert needs.peak(3) + CUDA_BYTES > 3 * 2**30


def test_a_dry_run_reports_it(arguments, tmp_path):
    done = run_command(arguments(dry_run=True, num_validation_images=0))
    assert done.returncode == 0, done.stderr
    assert "in a training step of batch 2, and" in done.stdout
    memory = json.loads((tmp_path / "out" / "dataset.json").read_text())["memory_bytes"]
    assert memory["step"] > memory["further_sample"] > 0
    assert memory["sample_pictures"] == 0


@pytest.mark.long
def test_the_largest_resolution_decides(arguments, tmp_path):
    """Of two, each with batches as large; only the number of steps and the cache differ."""
    folder = write_pictures(tmp_path / "large", count=5, size=(70, 80))

    def report(name, resolution):
        words = arguments(
            train_data_dir=folder, resolution=resolution, dry_run=True, output_dir=tmp_path / name,
            validation_prompt="an axe", num_train_epochs=3, max_train_steps=None,
        )  # fmt: skip
        done = run_command(words)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / name / "dataset.json").read_text()), done.stdout

    (both, said), (large, _), (small, _) = report("both", [64, 40]), report("large", 64), report("small", 40)
    assert both["memory_bytes"] == large["memory_bytes"] != small["memory_bytes"]
    assert both["steps_an_epoch"] == large["steps_an_epoch"] + small["steps_an_epoch"] == 6
    assert "training: 18 steps (3 epochs) of batch 2" in said
    latents = [row["cache_bytes"] - 5 * 77 * 96 * 4 for row in (both, large, small)]
    assert latents[0] == latents[1] + latents[2] > latents[1] > latents[2] > 0


def test_a_run_out_of_memory_ends_with_one_line(arguments, tmp_path):
    """The limit on the process is too low for a resolution of 4096."""
    limited = ("bash", "-c", 'ulimit -v 3000000; exec "$0" "$@"', sys.executable)
    words = arguments(
        resolution=4096, train_batch_size=6, max_train_steps=1, num_validation_images=0, cache_variations=0
    )
    done = run_command(words, launcher=limited)
    assert done.returncode == 1, done.stderr
    (line,) = [
        line for line in done.stderr.splitlines() if line.startswith("train_text_to_image_lora.py: Out of memory.")
    ]
    assert "--train_batch_size 1 --gradient_accumulation_steps 6" in line
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def sd15_configuration(tmp_path_factory):
    """Writes a diffusers folder with the configuration of SD1.5, without weights."""
    from scripts.benchmarks.runs import sd15_models
    from scripts.mini_sd.model import write_tokenizer

    folder = tmp_path_factory.mktemp("sd15")
    tokenizer = write_tokenizer(folder / "tokenizer")
    with torch.device("meta"):
        unet, vae, text_encoder = sd15_models(tokenizer)
    for name, model in {"unet": unet, "vae": vae, "text_encoder": text_encoder}.items():
        model.config.save_pretrained(folder / name) if name == "text_encoder" else model.save_config(folder / name)
    DDPMScheduler().save_config(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


@pytest.fixture(scope="module")
def xl_configuration(tmp_path_factory):
    """Writes a diffusers folder with the configuration of Stable Diffusion XL, without weights."""
    from family_fixtures import true_xl

    from scripts.mini_sd.model import write_tokenizer

    folder = tmp_path_factory.mktemp("xl")
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)
    for name, model in true_xl().items():
        model.config.save_pretrained(folder / name) if "text" in name else model.save_config(folder / name)
    DDPMScheduler().save_config(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return folder


RECIPES = sorted((ROOT / "recipes").glob("gpu_*.yaml"))


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_of_a_card_says_what_it_takes_and_fits(recipe, request):
    folder = request.getfixturevalue("xl_configuration" if "_xl_" in recipe.stem else "sd15_configuration")
    words = ["--config", str(recipe), "--pretrained_model_name_or_path", str(folder)]
    settings = train_script.parse_settings([*words, "--train_data_dir", "pictures", "--validation_prompt", "an axe"])
    base = loading.find_base_model(str(folder))
    plan = make_plan(settings, base, torch.float16)
    shapes = make_shapes(base, settings.sizes.resolution)
    own = base.family.picture_condition((1, 1), (0, 0), (1, 1))
    shapes = shapes._replace(condition=shapes.condition | {name: (len(row),) for name, row in own.items()})
    needs = estimate(base, shapes, plan)
    found = needs.steps(settings.batches.batch_size) / 2**30, needs.peak(settings.batches.batch_size) / 2**30
    first = recipe.read_text().splitlines()[0]
    card, *said = map(float, re.findall(r"(\d+(?:\.\d)?) Gi?B", first))
    assert said == pytest.approx(found, abs=0.06)
    assert found[1] + CUDA_BYTES / 2**30 < 0.9 * card  # leaves room for the screen and unused memory of the allocator


def test_there_are_recipes_for_cards():
    names = ["gpu_04gb", "gpu_06gb", "gpu_08gb", "gpu_12gb", "gpu_24gb"]
    assert [path.stem for path in RECIPES] == [*names, "gpu_xl_08gb", "gpu_xl_12gb", "gpu_xl_16gb", "gpu_xl_24gb"]

"""--train_text_encoder trains a LoRA of the text encoder, saves it, and stock diffusers draws with it as in training."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TORCHRUN, read_lora, read_metrics, run_command, train_script
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from text_to_image_lora.errors import InputError
from text_to_image_lora.models.families import STABLE_DIFFUSION
from text_to_image_lora.models.loading import find_base_model, load_components
from text_to_image_lora.training.run import adapt


PROMPT = "a red axe"
TEXT = dict(train_text_encoder=True)


def same(first, second):
    a, b = read_lora(first), read_lora(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def parts_of(folder):
    weights = read_lora(folder)
    return {part: {k: v for k, v in weights.items() if k.startswith(f"{part}.")} for part in ("unet", "text_encoder")}


RUN = dict(
    learning_rate=0.05, text_encoder_lr=0.04, scale_lr=True, rank=4, text_encoder_rank=2, lora_alpha=6,
    validation_prompt=PROMPT, validation_guidance_scale=3, validation_inference_steps=3, **TEXT,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(train_in, tmp_path_factory):
    """Runs that train both models, with each of these options; the output folder of the plain run comes first."""
    folders, outs = {}, {}
    for name, options in (("plain", {}), ("clip_skip", {"clip_skip": 1}), ("DoRA", {"use_dora": True})):
        folders[name] = tmp_path_factory.mktemp(name)
        outs[name] = train_in(folders[name], **RUN, **options)
    return folders["plain"], outs


# Deprecated in 0.39 and removed in 0.40, which is why 0.39 is pinned.
@pytest.mark.filterwarnings("ignore:`load_attn_procs` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["plain", "clip_skip", "DoRA"])
def test_stock_diffusers_draws_what_training_drew(runs, tiny_sd, name):
    out, pictures = runs[1][name], []
    for load in (None, "unet", "both"):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        if load == "unet":
            pipe.unet.load_attn_procs(out)
        elif load == "both":
            pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
        image = pipe(
            PROMPT, guidance_scale=3, num_inference_steps=3, height=32, width=32,
            clip_skip=1 if name == "clip_skip" else None, generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        pictures.append(np.asarray(image, dtype=int))
    drawn = [
        np.asarray(Image.open(out / "validation" / f"step-{step:06d}" / "prompt-00-0.png"), dtype=int)
        for step in (0, 2)
    ]
    assert abs(drawn[0] - pictures[0]).max() <= 1
    assert abs(drawn[1] - pictures[2]).max() <= 2
    assert abs(pictures[2] - pictures[1]).max() > 3  # the effect of the text encoder is visible


@pytest.mark.skipif("NEWEST_PYTHON" not in os.environ, reason="`make test-newest` says where the newest stack is")
def test_the_newest_stack_draws_the_same(train, tmp_path):
    """A run on the embedded base model; `infer.py` draws with its file on both stacks."""
    base = ROOT / "models" / "mini-sd"
    out = train(
        pretrained_model_name_or_path=base, train_data_dir=ROOT / "metadata" / "weapons", resolution=128, rank=4,
        max_train_steps=5, train_batch_size=4, learning_rate=5e-3, **TEXT,
    )  # fmt: skip

    def draw(python, folder, *flags):
        command = [
            python, "infer.py", "--pretrained_model_name_or_path", base, "--prompt", "a red axe on a blue background",
        ]  # fmt: skip
        command += ["--num_inference_steps", "6", "--seed", "1", "--output_dir", folder, *flags]
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True, timeout=300)
        (path,) = folder.glob("*.png")
        return np.asarray(Image.open(path), dtype=int)

    here = draw(sys.executable, tmp_path / "here", "--lora", out)
    there = draw(os.environ["NEWEST_PYTHON"], tmp_path / "there", "--lora", out)
    plain = draw(sys.executable, tmp_path / "plain")
    assert abs(here - there).max() <= 1
    assert abs(here - plain).max() > 20


def test_what_is_in_the_file(runs, tiny_sd):
    """Two blocks of six layers, each with its own rank; clip_skip omits the last block."""
    assert json.loads((tiny_sd / "text_encoder" / "config.json").read_text())["num_hidden_layers"] == 2
    out = runs[1]["plain"]
    weights = parts_of(out)["text_encoder"]
    assert len(weights) == 2 * 2 * 6
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in weights)
    assert {v.shape[0] for k, v in weights.items() if "lora_A" in k} == {2}
    assert all(v.abs().max() > 0 for k, v in weights.items() if "lora_B" in k)
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        adapters = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (adapters["unet.r"], adapters["text_encoder.r"], adapters["text_encoder.lora_alpha"]) == (4, 2, 2)
    skipped = parts_of(runs[1]["clip_skip"])["text_encoder"]
    assert {name.split(".layers.")[1][0] for name in skipped} == {"0"}


def test_its_alpha_is_in_proportion_to_its_rank(tiny_sd):
    """The file cannot show this, because its weights contain the scale."""
    words = ["--pretrained_model_name_or_path", str(tiny_sd), "--train_data_dir", "pictures", "--rank", "4"]
    words += ["--lora_alpha", "8", "--train_text_encoder", "--text_encoder_rank", "2"]
    settings = train_script.parse_settings(words)
    loaded = load_components(find_base_model(str(tiny_sd)))
    adapted = {"unet": loaded.denoiser, "text_encoder": loaded.text_encoders[0]}
    adapt(settings, adapted, STABLE_DIFFUSION, seed=0)
    settings = {name: model.peft_config["default"] for name, model in adapted.items()}
    assert {name: (own.r, own.lora_alpha) for name, own in settings.items()} == {
        "unet": (4, 8),
        "text_encoder": (2, 4),
    }


def test_each_has_its_learning_rate(runs):
    groups = torch.load(runs[1]["plain"] / "checkpoint-2" / "optimizer.pt", weights_only=True)["optimizer"][
        "param_groups"
    ]
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.08])  # times the batch size


def test_it_can_be_resumed(train, tmp_path):
    options = dict(
        max_train_steps=4, checkpointing_steps=2, lora_dropout=0.3, validation_split=0.34, use_ema=True, **TEXT
    )
    straight = train(output_dir=tmp_path / "straight", **options)
    shutil.copytree(straight, tmp_path / "parts", ignore=shutil.ignore_patterns("checkpoint-4", "*.safetensors"))
    shutil.copytree(straight / "checkpoint-2", tmp_path / "parts" / "checkpoint-2", dirs_exist_ok=True)
    parts = train(output_dir=tmp_path / "parts", **options)
    assert same(straight, parts)
    assert read_metrics(straight)[-1]["validation/loss"] == read_metrics(parts)[-1]["validation/loss"]


def test_the_validation_loss_is_of_both(train, tmp_path):
    options = dict(validation_split=0.34, learning_rate=1e-9, max_train_steps=1)
    alone = read_metrics(train(output_dir=tmp_path / "alone", **options))
    both = read_metrics(train(output_dir=tmp_path / "both", text_encoder_lr=0.1, **options, **TEXT))
    assert both[0]["validation/loss"] == pytest.approx(alone[0]["validation/loss"], rel=1e-6)
    assert abs(both[-1]["validation/loss"] / alone[-1]["validation/loss"] - 1) > 1e-4


def test_nothing_is_dropped_while_validating(runs, train):
    """Starts from a LoRA that has an effect, at a learning rate so small that it does not change."""
    folder, outs = runs
    out = train(
        train_data_dir=folder / "pictures", lora_weights=outs["plain"], text_encoder_rank=2, learning_rate=1e-12,
        lora_dropout=0.5, validation_split=0.34, validation_steps=1, **TEXT,
    )  # fmt: skip
    losses = [row["validation/loss"] for row in read_metrics(out) if "validation/loss" in row]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def assert_same_run(first, second):
    for a, b in zip(read_metrics(first), read_metrics(second), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for part, weights in parts_of(first).items():
        others = parts_of(second)[part]
        difference = torch.cat([(weights[k] - others[k]).flatten() for k in weights]).norm()
        assert difference < 2e-3 * torch.cat([weights[k].flatten() for k in weights]).norm()


@pytest.fixture(scope="module")
def whole(train_in, tmp_path_factory):
    """A run with batch size four, whose metrics other ways to the same effective batch size must reproduce."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_in(folder, train_batch_size=4, **OTHER_WAYS)


OTHER_WAYS = dict(max_train_steps=3, learning_rate=1e-3, center_crop=True, caption_dropout=0.3, **TEXT)


def test_accumulation(whole, train):
    folder, wanted = whole
    options = OTHER_WAYS | dict(train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_run(wanted, train(train_data_dir=folder / "pictures", **options))


@pytest.mark.long
def test_two_processes(whole, arguments, tmp_path):
    folder, wanted = whole
    options = OTHER_WAYS | dict(train_batch_size=1, gradient_accumulation_steps=2)
    done = run_command(
        arguments(train_data_dir=folder / "pictures", **options), TORCHRUN,
        env={"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_run(wanted, tmp_path / "out")


def test_live_pictures_and_bf16(whole, train, tmp_path):
    folder, cached = whole
    assert list((folder / "cache").rglob("latents/*.safetensors"))
    assert not list((folder / "cache").rglob("prompts/*.safetensors"))
    options = OTHER_WAYS | dict(train_batch_size=4, train_data_dir=folder / "pictures")
    live = train(output_dir=tmp_path / "live", cache_variations=0, **options)
    assert_same_run(cached, live)
    half = train(output_dir=tmp_path / "half", mixed_precision="bf16", gradient_checkpointing=True, **options)
    assert {value.dtype for value in read_lora(half).values()} == {torch.float32}
    assert read_metrics(half)[0]["train_loss"] == pytest.approx(read_metrics(cached)[0]["train_loss"], rel=0.05)
    assert all(v.abs().max() > 0 for k, v in parts_of(half)["text_encoder"].items() if "lora_B" in k)


def test_clip_skip_in_bf16(train, tmp_path):
    """The final layer norm is applied in the precision of the text encoder."""
    options = TEXT | dict(clip_skip=1)
    whole = train(output_dir=tmp_path / "whole", **options)
    half = train(output_dir=tmp_path / "half", mixed_precision="bf16", **options)
    losses = [read_metrics(out)[0]["train_loss"] for out in (half, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_it_starts_from_a_lora_of_both(runs, train, tmp_path):
    first = runs[1]["plain"]
    options = dict(lora_weights=first, learning_rate=1e-12)
    second = train(output_dir=tmp_path / "second", text_encoder_rank=2, **options, **TEXT)
    for name, value in read_lora(first).items():
        if "lora_A" in name:
            torch.testing.assert_close(read_lora(second)[name], value, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="it adapts text_encoder and unet, but this run trains the unet only"):
        train(output_dir=tmp_path / "third", **options)


def test_its_flags_without_it_are_reported(train):
    with pytest.raises(InputError, match="add --train_text_encoder"):
        train(text_encoder_rank=4)
    with pytest.raises(InputError, match="--text_encoder_lr 0: it must be more than 0"):
        train(text_encoder_lr=0, **TEXT)


def test_another_rank_of_it_is_another_run(runs, train):
    folder, outs = runs
    options = RUN | dict(text_encoder_rank=4, train_data_dir=folder / "pictures", output_dir=outs["plain"])
    with pytest.raises(InputError, match="text_encoder_rank was 2, is 4"):
        train(**options)

"""What the tests share: a tiny Stable Diffusion made from config, pictures, and the command, in this process or not."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
for name in ("WANDB_API_KEY", "ACCELERATE_MIXED_PRECISION"):
    os.environ.pop(name, None)
# Tiny layers are slower on two threads than on one, and very much slower when both cores are busy.
os.environ["OMP_NUM_THREADS"] = "1"

train_script = importlib.import_module("train_text_to_image_lora")
train_script.quiet_libraries()


@pytest.fixture(autouse=True)
def on_cpu(request, monkeypatch):
    """Bit-for-bit comparisons are of the CPU's; only tests marked gpu use another device."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A `StableDiffusionPipeline` folder with random weights: 32 px pictures, 8 px latents, 30 adapted modules."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from mini_sd import make_pipeline, make_text_encoder, write_tokenizer
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny-sd")
    write_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=96,
    )  # fmt: skip
    pipeline = make_pipeline(vae, unet, make_text_encoder(tokenizer), tokenizer)
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def write_pictures(folder, count=6, size=(40, 32), captions=None, seed=0):
    """A dataset folder: smooth random PNG pictures and a metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        text = captions[i % len(captions)] if captions else f"a {['red', 'blue', 'green'][i % 3]} axe number {i}"
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Six 40x32 pictures with captions."""
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def arguments(tiny_sd, pictures, tmp_path):
    """The flags of a run that takes a second: 2 steps of batch 2 at 32 px, no tracker."""

    def build(**changes):
        flags = dict(
            pretrained_model_name_or_path=tiny_sd, train_data_dir=pictures, resolution=32, train_batch_size=2,
            max_train_steps=2, learning_rate=1e-2, seed=0, report_to="none", output_dir=tmp_path / "out",
            latent_cache_dir=tmp_path / "cache", validation_inference_steps=2, num_validation_images=1,
        )  # fmt: skip
        words = []
        for name, value in (flags | changes).items():
            if value is True:
                words.append(f"--{name}")
            elif isinstance(value, (list, tuple)):
                words += [f"--{name}", *map(str, value)]
            elif value is not None and value is not False:
                words += [f"--{name}", str(value)]
        return words

    return build


@pytest.fixture
def train(arguments, monkeypatch):
    """Runs the script's `main` in this process with the given flags; returns the output folder."""

    def run(**changes):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        words = arguments(**changes)
        monkeypatch.setattr(sys, "argv", ["train_text_to_image_lora.py", *words])
        try:
            train_script.main(train_script.parse_args(words))
        finally:
            # Accelerate keeps its state for the process; each run is to find its own.
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            PartialState._reset_state()
        return Path(words[words.index("--output_dir") + 1])

    return run


def run_command(words, launcher=(sys.executable,), env=None, timeout=120):
    """The command as typed, from the project's folder; stdout and stderr are text."""
    return subprocess.run(
        [*map(str, launcher), "train_text_to_image_lora.py", *map(str, words)],
        cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def read_metrics(folder):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def read_lora(folder):
    """The tensors of a LoRA file."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")

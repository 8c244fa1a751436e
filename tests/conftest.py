"""What the tests share: a tiny Stable Diffusion made from config, pictures, and the command, in this process or not."""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms


pytest_plugins = ["evaluation_fixtures", "family_fixtures", "infer_fixtures"]

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
for name in ("WANDB_API_KEY", "ACCELERATE_MIXED_PRECISION"):
    os.environ.pop(name, None)
# Tiny layers are slower on two threads than on one, and very much slower when both cores are busy.
os.environ["OMP_NUM_THREADS"] = "1"

train_script = importlib.import_module("train_text_to_image_lora")
importlib.import_module("text_to_image_lora.libraries").quiet_libraries()


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
    from transformers import CLIPTokenizer

    from scripts.mini_sd.model import make_pipeline, make_text_encoder, write_tokenizer

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


def with_red_and_blue_swapped():
    """An ICC profile that says that the first channel is blue and the third red: sRGB's with two tags renamed."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    return data.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB built", b"swap built")


def read_records(train_data_dir=None, *, leave_out=None, archive_dir="archives", cache_dir=None, **flags):
    """The records of a dataset, read with these flags of the training script."""
    from dataclasses import fields

    from text_to_image_lora.pictures.layouts import ReadOptions
    from text_to_image_lora.pictures.settings import CaptionSettings, DataSettings
    from text_to_image_lora.pictures.sources import load_records

    if train_data_dir is not None:
        folders = train_data_dir if isinstance(train_data_dir, list | tuple) else [train_data_dir]
        flags["train_data_dir"] = tuple(map(str, folders))
    names = {field.name for field in fields(CaptionSettings)}
    captions = CaptionSettings(**{name: flags.pop(name) for name in names & flags.keys()})
    return load_records(ReadOptions(DataSettings(**flags), captions, cache_dir, archive_dir, leave_out))


@pytest.fixture
def said():
    """The lines that the package logs in a test."""
    import logging

    from text_to_image_lora import log

    lines, level = [], log.PACKAGE.level
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.PACKAGE.addHandler(handler)
    log.PACKAGE.setLevel(logging.INFO)
    yield lines
    log.PACKAGE.removeHandler(handler)
    log.PACKAGE.setLevel(level)


def batch_sampler(samples, *, batch_size, accumulation=1, rank=0, world_size=1, first_step=0, num_steps=0, **epoch):
    """An `EffectiveBatchSampler` of these samples; `epoch` has a seed, groups and loss weights."""
    from text_to_image_lora.training.batches import Division, EffectiveBatchSampler, Epoch

    division = Division(batch_size, accumulation, rank, world_size)
    sampler = EffectiveBatchSampler(Epoch(samples, **epoch), division)
    sampler.first_step, sampler.num_steps = first_step, num_steps
    return sampler


def make_picture_set(records, *, resolution=32, sizes=None, captions=None, interpolation="lanczos", **augmentation):
    """The `PictureSet` of records, or of a folder: its pictures looked at, all at one square or at the given sizes."""
    from text_to_image_lora.pictures.examine import examine
    from text_to_image_lora.pictures.picture_set import PictureSet, View
    from text_to_image_lora.pictures.settings import AugmentationSettings

    records = read_records(records) if isinstance(records, (str, Path)) else records
    good, bad = examine(records, range(len(records)))
    assert not bad
    return PictureSet(
        records,
        [good[index] for index in range(len(records))],
        sizes or [(resolution, resolution)] * len(records),
        captions or records["captions"][:],
        View(AugmentationSettings(**augmentation), interpolation),
    )


@pytest.fixture
def pictures(tmp_path):
    """Six 40x32 pictures with captions."""
    return write_pictures(tmp_path / "pictures")


def words_of_run(model, pictures, folder, **changes):
    """The flags of a run that takes a second: 2 steps of batch 2 at 32 px, no tracker; what is None or False is left out."""
    flags = dict(
        pretrained_model_name_or_path=model, train_data_dir=pictures, resolution=32, train_batch_size=2,
        max_train_steps=2, learning_rate=1e-2, seed=0, report_to="none", output_dir=folder / "out",
        latent_cache_dir=folder / "cache", validation_inference_steps=2, num_validation_images=1, num_cpu_threads=1,
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


def train_here(words):
    """Runs the script's `main` in this process; returns the output folder."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from text_to_image_lora.training import interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_text_to_image_lora.py", *words])
        try:
            train_script.main(train_script.parse_settings(words))
        finally:
            # Signals and Accelerate's state are the process's; each run is to find its own.
            interruption.stop_listening()
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            PartialState._reset_state()
    return Path(words[words.index("--output_dir") + 1])


@pytest.fixture(scope="session")
def train_in(tiny_sd):
    """`train_in(folder, **flags)`: a run like those of `train`, for fixtures that several tests read."""

    def run(folder, **changes):
        pictures = folder / "pictures" if (folder / "pictures").exists() else write_pictures(folder / "pictures")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            return train_here(words_of_run(tiny_sd, pictures, folder, **changes))

    return run


@pytest.fixture(scope="session")
def train_on_weapons(tmp_path_factory):
    """`train_on_weapons(output_dir, **flags)`: a run of the embedded base on the bundled weapons; all share a cache."""
    common = dict(
        resolution=128, train_batch_size=4, center_crop=True, latent_cache_dir=tmp_path_factory.mktemp("cache")
    )

    def run(output_dir, **changes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            flags = common | dict(output_dir=output_dir) | changes
            flags = dict(train_data_dir=ROOT / "metadata" / "weapons") | flags
            return train_here(words_of_run(ROOT / "models" / "mini-sd", None, output_dir, **flags))

    return run


@pytest.fixture
def arguments(tiny_sd, pictures, tmp_path):
    """The words of a tiny run, see `words_of_run`."""

    def build(**changes):
        return words_of_run(tiny_sd, pictures, tmp_path, **changes)

    return build


@pytest.fixture
def train(arguments):
    """Runs the script's `main` in this process with the given flags; returns the output folder."""

    def run(**changes):
        return train_here(arguments(**changes))

    return run


def run_command(words, launcher=(sys.executable,), env=None, timeout=120):
    """The command as typed, from the project's folder; stdout and stderr are text."""
    return subprocess.run(
        [*map(str, launcher), "train_text_to_image_lora.py", *map(str, words)],
        cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


CORES = 6
# (flag, environment, threads), on a machine of six physical cores
THREADS = [
    (None, {}, 6),
    (4, {}, 4),
    (None, {"OMP_NUM_THREADS": "3"}, 3),
    (None, {"OMP_NUM_THREADS": "1"}, 1),
    (None, {"OMP_NUM_THREADS": "12"}, 12),
    (None, {"OMP_NUM_THREADS": "3,2"}, 6),
    (None, {"OMP_NUM_THREADS": ""}, 6),
    # accelerate launch sets the 1; torchrun does with several processes.
    (None, {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 6),
    (None, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 3),
    (None, {"OMP_NUM_THREADS": "2", "ACCELERATE_MIXED_PRECISION": "no"}, 2),
    (1, {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 1),
    (4, {"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2"}, 4),
    (None, {"LOCAL_WORLD_SIZE": "4"}, 1),
    (None, {"LOCAL_WORLD_SIZE": "8"}, 1),
]


@pytest.fixture
def cores(monkeypatch):
    """An idle machine of six physical cores with two threads each, whose launcher sets OMP_NUM_THREADS itself; the number of threads is put back."""
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 2 * CORES if logical else CORES)
    monkeypatch.setattr("os.cpu_count", lambda: 2 * CORES)
    monkeypatch.setattr("psutil.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("text_to_image_lora.libraries.launchers_environment", dict)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(2 * CORES)), raising=False)
    yield
    torch.set_num_threads(before)


def read_metrics(folder):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def read_lora(folder):
    """The tensors of a LoRA file."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


@functools.cache
def held_out_weapons():
    """Latents and hidden states of the pictures of metadata/weapons_test, as the embedded base has them."""
    import torch

    from scripts.mini_sd.pipeline import load_pipeline

    pipeline, folder = load_pipeline(ROOT / "models" / "mini-sd"), ROOT / "metadata" / "weapons_test"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    pixels = torch.from_numpy(np.stack([np.asarray(im) for im in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        return latents, pipeline.encode_prompt([row["text"] for row in rows], "cpu", 1, False)[0]


def held_out_loss(lora=None, strata=4):
    """Mean noise-prediction loss on pictures never trained on, of the embedded base with the LoRA in a folder.

    By other code than the trainer's, which reads the file as anybody would; noise and timesteps are the same for all.
    """
    import torch
    from diffusers import DDPMScheduler

    from scripts.mini_sd.pipeline import load_pipeline

    pipeline = load_pipeline(ROOT / "models" / "mini-sd", lora)
    (latents, hidden_states), losses = held_out_weapons(), []
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    for k in range(strata):
        timesteps = torch.full((len(latents),), int((k + 0.5) * 1000 / strata))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(k))
        with torch.no_grad():
            pred = pipeline.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, hidden_states).sample
        losses.append(torch.nn.functional.mse_loss(pred, noise).item())
    return float(np.mean(losses))


base_loss = functools.cache(held_out_loss)


def relative_loss(lora):
    """`held_out_loss` as a share of the base's own."""
    return held_out_loss(lora) / base_loss()

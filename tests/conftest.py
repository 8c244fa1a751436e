"""Fixtures and helpers of all tests: a tiny Stable Diffusion pipeline, pictures, and runs of the training command."""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms


pytest_plugins = ["browser_fixtures", "evaluation_fixtures", "family_fixtures", "infer_fixtures"]

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
for name in ("WANDB_API_KEY", "ACCELERATE_MIXED_PRECISION"):
    os.environ.pop(name, None)
# Tiny layers are slower on two threads than on one, and very much slower when both cores are busy.
os.environ["OMP_NUM_THREADS"] = "1"

train_script = importlib.import_module("train_text_to_image_lora")
importlib.import_module("text_to_image_lora.libraries").quiet_libraries()


# The files whose tests take longest, in this order. They are started first, so that no worker runs one of them alone at the end.
LONGEST = (
    "test_learning.py",
    "test_snippets.py",
    "test_cloud_jobs.py",
    "test_signals.py",
    "test_disk.py",
    "test_kill.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


class FailuresAtOnce:
    """Names each failed test at once: the summary is missing if a time limit ends the tests."""

    def __init__(self, reporter):
        self.reporter = reporter

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.reporter.write_line(f"\nfailed: {report.nodeid} ({report.when})")


def pytest_sessionstart(session):
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(FailuresAtOnce(reporter))


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Excludes what exists already from garbage collections: each run makes one, which would look through all libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def on_cpu(request, monkeypatch):
    """Runs all tests except those marked gpu on the CPU, because bit-for-bit comparisons are made there."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """Saves a `StableDiffusionPipeline` with random weights: 32 px pictures, 8 px latents, 30 adapted modules."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from scripts.mini_sd.model import make_pipeline, make_text_encoder, write_tokenizer

    folder = tmp_path_factory.mktemp("tiny-sd")
    tokenizer = write_tokenizer(folder / "words")
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
    """Writes a dataset folder with smooth random PNG pictures and a metadata.jsonl."""
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


def make_transparent(folder, indices, *, first=40, last=255):
    """Makes pictures of `write_pictures` more opaque from left to right, with one row that is not transparent at all."""
    for index in indices:
        path = folder / f"{index}.png"
        with Image.open(path) as image:
            alpha = np.tile(np.linspace(first, last, image.width).round().astype(np.uint8), (image.height, 1))
            alpha[0] = 255
            image.putalpha(Image.fromarray(alpha))
        image.save(path)


def png_with_header(width, height, rows=b"\0"):
    """Returns a PNG with a header that states this size, whatever the amount of data."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_red_and_blue_swapped():
    """Returns an ICC profile in which the first channel is blue and the third is red: sRGB with two tags renamed."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    return data.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB built", b"swap built")


def read_records(train_data_dir=None, *, leave_out=None, archive_dir="archives", cache_dir=None, **flags):
    """Returns the records of a dataset, read with these flags of the training script."""
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


def refusal_of(function, *args, **kwargs):
    """Returns the message of the `InputError` that a call raises, which must be one line."""
    from text_to_image_lora.errors import InputError

    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def said():
    """Collects the messages that the package logs in a test."""
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
    """Returns an `EffectiveBatchSampler` of these samples; `epoch` contains a seed, groups and loss weights."""
    from text_to_image_lora.training.batches import Division, EffectiveBatchSampler, Epoch

    division = Division(batch_size, accumulation, rank, world_size)
    sampler = EffectiveBatchSampler(Epoch(samples, **epoch), division)
    sampler.first_step, sampler.num_steps = first_step, num_steps
    return sampler


def make_picture_set(
    records, *, resolution=32, sizes=None, captions=None, interpolation="lanczos", alpha_mask=False, **augmentation
):
    """Returns the `PictureSet` of records or of a folder, with square pictures or with the given sizes."""
    from text_to_image_lora.pictures.examine import examine
    from text_to_image_lora.pictures.picture_set import PictureSet, View
    from text_to_image_lora.pictures.settings import AugmentationSettings

    records = read_records(records) if isinstance(records, (str, Path)) else records
    good, bad = examine(records, range(len(records)), alpha_mask=alpha_mask)
    assert not bad
    return PictureSet(
        records, [good[index] for index in range(len(records))], sizes or [(resolution, resolution)] * len(records),
        captions or records["captions"][:], View(AugmentationSettings(**augmentation), interpolation, alpha_mask),
    )  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    """Writes six 40x32 pictures with captions."""
    return write_pictures(tmp_path / "pictures")


def words_of_run(model, pictures, folder, **changes):
    """Returns the flags of a run that takes a second: 2 steps of batch size 2 at 32 px, no tracker.

    Flags whose value is None or False are left out.
    """
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
    """Runs the script's `main` in this process and returns the output folder."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from text_to_image_lora.training import interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_text_to_image_lora.py", *words])
        try:
            train_script.main(train_script.parse_settings(words))
        finally:
            # Signal handlers and Accelerate's state belong to the process, and each run must start without them.
            interruption.stop_listening()
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            PartialState._reset_state()
    return Path(words[words.index("--output_dir") + 1])


@pytest.fixture(scope="session")
def train_in(tiny_sd):
    """Returns `train_in(folder, **flags)`, a run like those of `train` for fixtures that several tests share."""

    def run(folder, **changes):
        pictures = folder / "pictures" if (folder / "pictures").exists() else write_pictures(folder / "pictures")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            return train_here(words_of_run(tiny_sd, pictures, folder, **changes))

    return run


@pytest.fixture(scope="session")
def train_on_weapons(tmp_path_factory):
    """Returns `train_on_weapons(output_dir, **flags)`, which trains the embedded base model on the bundled weapons.

    All its runs share a cache.
    """
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
    """Returns a function that builds the flags of a tiny run, see `words_of_run`."""

    def build(**changes):
        return words_of_run(tiny_sd, pictures, tmp_path, **changes)

    return build


@pytest.fixture
def train(arguments):
    """Returns a function that runs the script's `main` here with the given flags and returns the output folder."""

    def run(**changes):
        return train_here(arguments(**changes))

    return run


@functools.cache
def quick_python():
    """Returns the `QuickPython` of this process, which starts commands without the seconds of their imports."""
    from quick_python import QuickPython

    folder = Path(tempfile.mkdtemp(prefix="quick-"))  # a socket's path must be short
    quick = QuickPython(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(quick.close)
    return quick


def run_command(words, launcher=(sys.executable,), env=None, timeout=120):
    """Runs the real command in the project's folder; stdout and stderr are text."""
    # A forked process has no limits of a shell, and has imported PyTorch and huggingface_hub, which reads its variables then.
    at_import = any(name.startswith(("HF_", "PYTHON")) for name in env or {})
    if launcher[0] == sys.executable and not at_import:
        launcher = [quick_python().python, *launcher[1:]]
    return subprocess.run(
        [*map(str, launcher), "train_text_to_image_lora.py", *map(str, words)],
        cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def read_terminal(ours):
    """Returns everything that was written into a pseudo-terminal, once its other side is closed, and closes it."""
    shown = b""
    with contextlib.suppress(OSError):  # Linux: everything has been read
        while block := os.read(ours, 10_000):
            shown += block
    os.close(ours)
    return shown.decode()


@pytest.fixture(scope="module")
def start():
    """Starts runs of the real command without the seconds of its imports."""
    from quick_start import QuickStart

    with QuickStart() as server:
        yield server


@pytest.fixture
def make_unet(tiny_sd):
    """Returns a function that returns the UNet of `tiny_sd` with adapters, see `unet_of`."""
    from lean_steps import unet_of

    return functools.partial(unet_of, tiny_sd)


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
    # accelerate launch sets the variable to 1, and so does torchrun with several processes.
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
    """Simulates an idle machine with six physical cores and two threads per core, whose launcher sets OMP_NUM_THREADS.

    Restores PyTorch's number of threads.
    """
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
    """Returns the rows of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def read_lora(folder):
    """Returns the tensors of a LoRA file."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def read_header(path):
    """Returns the header of a LoRA file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_same_weights(first, second):
    """Checks that the LoRAs of two runs are equal up to rounding."""
    import torch

    a, b = read_lora(first), read_lora(second)
    assert a.keys() == b.keys()
    difference = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm()
    assert difference < 1e-3 * torch.cat([a[k].flatten() for k in a]).norm()


@functools.cache
def held_out_weapons():
    """Returns the latents and hidden states of the embedded base model for the pictures of metadata/weapons_test."""
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
    """Returns the mean noise prediction loss of the embedded base model, with a LoRA, on pictures it was not trained on.

    The LoRA is loaded with diffusers, without code of the trainer. Noise and timesteps are equal in every call.
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
    """Returns the `held_out_loss` of a LoRA, divided by that of the base model."""
    return held_out_loss(lora) / base_loss()

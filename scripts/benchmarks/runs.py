"""Runs the commands of the benchmarks, measures them from outside and inside, and makes their model and pictures."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from .. import ROOT


INSIDE = Path(__file__).with_name("inside.py")
BARE_UNET = Path(__file__).with_name("bare_unet.py")
TRAINING_SCRIPT = ROOT / "train_text_to_image_lora.py"


def sd15_models(tokenizer):
    """Returns the UNet, autoencoder and text encoder of SD1.5's configuration with random weights (without weights on the meta device)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    return unet, vae, text_encoder


def make_sd15(folder):
    """Saves a pipeline of SD1.5's configuration with random weights in float16, about 2 GB, and returns its folder."""
    import torch

    from ..mini_sd.model import make_pipeline, write_tokenizer

    tokenizer = write_tokenizer(folder.with_name("words"))
    unet, vae, text_encoder = sd15_models(tokenizer)
    make_pipeline(vae, unet, text_encoder, tokenizer).to("cpu", torch.float16).save_pretrained(folder)
    return folder


def make_pictures(folder, resolution, count=8, ending="png"):
    """Writes a dataset of random pictures with a metadata.jsonl, and returns its folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as file:
        for i in range(count):
            pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            pixels.resize((resolution, resolution), Image.Resampling.BICUBIC).save(folder / f"{i}.{ending}")
            file.write(json.dumps({"file_name": f"{i}.{ending}", "text": f"picture number {i}"}) + "\n")
    return folder


class CommandFailed(Exception):
    """A command failed. The message is the line of its output that gives the reason; `output` is the end of its output."""

    def __init__(self, output):
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it printed nothing"]
        # The last lines of torchrun's output do not name the error of the process that failed.
        named = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?[\w.]+(Error|\.py): ", line)]
        super().__init__((named or lines)[-1])
        self.output = output
        self.out_of_memory = "out of memory" in output.lower()


class Result(NamedTuple):
    """The time and memory of a command, and the figures that inside.py measured in its process."""

    seconds: float
    memory_gib: float  # during the steps: memory of the GPU, or of the CPU in the last third of the command
    peak_memory_gib: float
    figures: dict[str, Any]


def run(command, env=None, timeout=None):
    """Runs a command and returns its `Result`. Raises `CommandFailed` if it fails or takes longer than `timeout` seconds.

    On a CPU, the memory of the steps is measured in the last third of the command, because loading the models takes more
    memory than the steps.
    """
    started = time.monotonic()
    samples = [(0, 0)]  # seconds and GiB
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        words = [str(word) for word in command]
        # The command gets a session of its own, so that it can be killed together with all processes it has started.
        process = subprocess.Popen(words, stdout=out, stderr=errors, env=env, start_new_session=True)
        watched = psutil.Process(process.pid)
        ended = 0  # the process id, once the process has ended
        timed_out = False
        try:
            while not ended:
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if ended:
                    break
                elapsed = time.monotonic() - started
                samples.append((elapsed, watched.memory_info().rss / 2**30))
                if timeout is not None and elapsed > timeout and not timed_out:
                    os.killpg(process.pid, signal.SIGKILL)
                    timed_out = True
                time.sleep(0.05)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if not ended:
                os.killpg(process.pid, signal.SIGKILL)
        seconds = time.monotonic() - started
        out.seek(0)
        errors.seek(0)
        stdout, stderr = (file.read().decode(errors="replace") for file in (out, errors))
    if process.returncode:
        if timed_out:
            raise CommandFailed(f"stopped after {timeout:.0f} s")
        killed = f"\nkilled by {signal.Signals(-process.returncode).name}" if process.returncode < 0 else ""
        raise CommandFailed(f"{stdout[-4000:]}{stderr[-4000:]}{killed}")
    printed = [line for line in stdout.splitlines() if line.startswith("BENCHMARK ")]
    figures = json.loads(printed[-1].removeprefix("BENCHMARK ")) if printed else {}
    last, _ = samples[-1]
    late = max(rss for at, rss in samples if at >= last * 2 / 3)
    peak = figures.get("peak_memory_gib", usage.ru_maxrss / 2**20)
    return Result(seconds, figures.get("memory_gib", late), peak, figures)


class Command(NamedTuple):
    """A run of a training script that inside.py measures; the flags that all runs share are those of `Setting.run`."""

    runner: str = "ours"  # or "bare UNet" or "baseline"
    how: str = "time"  # or "count"
    precision: str = "no"
    batch_size: int = 1  # per process
    processes: int = 1
    flags: tuple[str, ...] = ()


class Setting(NamedTuple):
    """The scripts that are compared, and the model, pictures and flags that they share."""

    model: Path
    pictures: Path
    work: Path  # the folder for the output of the runs
    scripts: dict[str, tuple]  # {runner: (script, further flags of this script)}
    resolution: int
    rank: int

    def run(self, command, *, steps, timeout=None):
        """Runs a `Command` for a number of steps, and returns its `Result`."""
        script, own_flags = self.scripts[command.runner]
        output = self.output_of(command.runner)
        shutil.rmtree(output, ignore_errors=True)
        launcher = ()
        if command.processes > 1:
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", command.processes)
        words = [
            sys.executable, *launcher, INSIDE, command.how, script, "--pretrained_model_name_or_path", self.model,
            "--train_data_dir", self.pictures, "--resolution", self.resolution, "--center_crop", "--rank", self.rank,
            "--train_batch_size", command.batch_size, "--max_train_steps", steps,
            "--mixed_precision", command.precision, "--checkpointing_steps", 100000, "--seed", 0,
            "--output_dir", output, *command.flags, *own_flags,
        ]  # fmt: skip
        return run(words, environment(), timeout)

    def output_of(self, runner):
        return self.work / f"out-{runner.replace(' ', '-')}"


def environment():
    """Returns the environment variables of a command: those of this process, and no access to the hub."""
    return os.environ | {"HF_HUB_OFFLINE": "1"}


def other_scripts(*, bare_unet=False, baseline=None, baseline_flags=()):
    """Returns the entries of `Setting.scripts` for the scripts that our training script is compared with."""
    found = {"bare UNet": (BARE_UNET, ())} if bare_unet else {}
    return found if baseline is None else found | {"baseline": (baseline, tuple(baseline_flags))}


def prepare(model, work, *, resolution, rank, batch_size=1, others=None):
    """Returns the `Setting` of our script and of the `others`. Makes the model and the pictures if they do not exist yet."""
    model = work / "sd15" if model is None else model
    if not (model / "model_index.json").exists():
        print(f"making {model}", flush=True)
        # In a separate process, because the peak memory of this process would count for every process that it starts.
        making = multiprocessing.get_context("spawn").Process(target=make_sd15, args=(model,))
        making.start()
        making.join()
        if making.exitcode:
            sys.exit(f"{model} could not be made")
    # A multiple of the batch size, so that all batches of an epoch are equally large.
    count = batch_size * -(-8 // batch_size)
    pictures = make_pictures(work / f"pictures-{resolution}-{count}", resolution, count)
    ours = {"ours": (TRAINING_SCRIPT, ("--latent_cache_dir", work / "cache", "--report_to", "none"))}
    return Setting(model, pictures, work, ours | (others or {}), resolution, rank)


def matrix_rates(precisions):
    """Returns (description of the machine, {precision: floating-point operations per second of a matrix product})."""
    figures = run([sys.executable, INSIDE, "rate", *precisions], environment()).figures
    return figures["machine"], figures["rates"]


def write_json(path, results, args):
    """Writes the results and the arguments of the command to a JSON file, unless `path` is None."""
    if path is not None:
        arguments = json.loads(json.dumps(vars(args), default=str))
        path.write_text(json.dumps({"arguments": arguments, **results}, indent=1) + "\n")

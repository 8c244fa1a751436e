"""What the benchmarks run and on what: whole commands, watched from outside and inside; a model and pictures for them."""

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
    """UNet, autoencoder and text encoder of SD1.5's configuration, with random weights (or on the meta device none)."""
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
    """A pipeline folder of SD1.5's configuration with random weights in float16, about 2 GB."""
    import torch
    from transformers import CLIPTokenizer

    from ..mini_sd.model import make_pipeline, write_tokenizer

    write_tokenizer(folder.with_name("words"))
    tokenizer = CLIPTokenizer.from_pretrained(folder.with_name("words"))
    unet, vae, text_encoder = sd15_models(tokenizer)
    make_pipeline(vae, unet, text_encoder, tokenizer).to("cpu", torch.float16).save_pretrained(folder)
    return folder


def make_pictures(folder, resolution, count=8, ending="png"):
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
    """A command failed: its message is the line that says why, `output` the end of all that it said."""

    def __init__(self, output):
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
        # torchrun tells at its end of itself alone.
        named = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?[\w.]+(Error|\.py): ", line)]
        super().__init__((named or lines)[-1])
        self.output = output
        self.out_of_memory = "out of memory" in output.lower()


class Ran(NamedTuple):
    """What a command took, and what it told of itself."""

    seconds: float
    memory_gib: float  # in its steps: of the GPU, or of the CPU in the command's last third
    peak_memory_gib: float
    told: dict[str, Any]  # by inside.py


def run(command, env=None, timeout=None):
    """Runs a command and returns its `Ran`; raises `CommandFailed` where it fails or takes longer than `timeout` seconds.

    While models are loaded more memory is taken than by the steps, which are what the last third of a long run does.
    """
    started = time.monotonic()
    samples = [(0, 0)]  # seconds and GiB
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        words = [str(word) for word in command]
        # A session of its own, so that its end is that of all the processes it has started.
        process = subprocess.Popen(words, stdout=out, stderr=errors, env=env, start_new_session=True)
        watched = psutil.Process(process.pid)
        ended = 0  # the process's number, once it has
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
        said, complained = (file.read().decode(errors="replace") for file in (out, errors))
    if process.returncode:
        if timed_out:
            raise CommandFailed(f"stopped after {timeout:.0f} s")
        killed = f"\nkilled by {signal.Signals(-process.returncode).name}" if process.returncode < 0 else ""
        raise CommandFailed(f"{said[-4000:]}{complained[-4000:]}{killed}")
    told = [line for line in said.splitlines() if line.startswith("BENCHMARK ")]
    told = json.loads(told[-1].removeprefix("BENCHMARK ")) if told else {}
    last, _ = samples[-1]
    late = max(rss for at, rss in samples if at >= last * 2 / 3)
    return Ran(seconds, told.get("memory_gib", late), told.get("peak_memory_gib", usage.ru_maxrss / 2**20), told)


class Command(NamedTuple):
    """A training to look at from inside, beside the flags that all have."""

    runner: str = "ours"  # or bare UNet, or baseline
    how: str = "time"  # or count
    precision: str = "no"
    batch_size: int = 1  # of each process
    processes: int = 1
    flags: tuple[str, ...] = ()


class Setting(NamedTuple):
    """What is compared: scripts that train one model on the same pictures, with the same flags."""

    model: Path
    pictures: Path
    work: Path  # the folder for what is written
    scripts: dict[str, tuple]  # runner: (script, flags of its own)
    resolution: int
    rank: int

    def run(self, command, *, steps, timeout=None):
        """The `Ran` of a `Command` of so many steps."""
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
    return os.environ | {"HF_HUB_OFFLINE": "1"}


def others(*, bare_unet=False, baseline=None, baseline_flags=()):
    """The scripts beside ours, as `Setting` has them."""
    found = {"bare UNet": (BARE_UNET, ())} if bare_unet else {}
    return found if baseline is None else found | {"baseline": (baseline, tuple(baseline_flags))}


def prepare(model, work, *, resolution, rank, batch_size=1, beside=None):
    """The `Setting` of our script and of those `beside` it; model and pictures are made where they are not there yet."""
    model = work / "sd15" if model is None else model
    if not (model / "model_index.json").exists():
        print(f"making {model}", flush=True)
        # In a process of its own: what this one once held would count as the peak of each that it starts.
        making = multiprocessing.get_context("spawn").Process(target=make_sd15, args=(model,))
        making.start()
        making.join()
        if making.exitcode:
            sys.exit(f"{model} could not be made")
    # All of an epoch's steps are to have as many pictures.
    count = batch_size * -(-8 // batch_size)
    pictures = make_pictures(work / f"pictures-{resolution}-{count}", resolution, count)
    ours = {"ours": (TRAINING_SCRIPT, ("--latent_cache_dir", work / "cache", "--report_to", "none"))}
    return Setting(model, pictures, work, ours | (beside or {}), resolution, rank)


def matrix_rates(precisions):
    """(the machine, floating-point operations a second of a matrix product in each of these precisions)."""
    told = run([sys.executable, INSIDE, "rate", *precisions], environment()).told
    return told["machine"], told["rates"]


def write_json(path, results, args):
    """What was measured, and with which arguments."""
    if path is not None:
        arguments = json.loads(json.dumps(vars(args), default=str))
        path.write_text(json.dumps({"arguments": arguments, **results}, indent=1) + "\n")

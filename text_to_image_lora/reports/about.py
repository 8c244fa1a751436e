"""What a run tells of itself beside its numbers: the command, versions, the machine, and its pictures (`about.json`)."""

import base64
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ..command_line import Parser, recorded_values
from ..files import write_whole
from ..pictures.inspection import describe


FILE = "about.json"
SCRIPT = "train_text_to_image_lora.py"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "pillow")
SHOWN = 16  # pictures of the data sheet
LISTED = 20  # of each finding
SIDE = 256  # pixels, of the data sheet's pictures
ROOT = Path(__file__).resolve().parents[2]


def describe_run(settings: Any, run: Any) -> dict[str, Any]:
    """What trackers and the LoRA's header tell of a run: its flags, and what those that were not given became."""
    settled = {
        "seed": run.seed,
        "resolution": run.resolution,
        "cache_variations": run.variations,
        "validation_prompts": settings.samples.texts,
        "learning_rate": settings.optimizer.rate,
        "perceptual_loss_weight": settings.loss.perceptual_weight if settings.loss.perceptual_loss else None,
        "max_train_steps": run.num_steps,
        "lr_warmup_steps": run.num_warmup_steps,
    }
    whole = recorded_values(settings) | settled | run.identity
    return {k: v for k, v in whole.items() if v not in (None, []) and k != "validation_prompt"}


def write_about_run(settings: Any, run: Any, described: dict[str, Any], accelerator: Any) -> dict[str, Any]:
    """Writes run.yaml, for --config, and about.json, for the page and the trackers; returns what the second holds.

    run.yaml has the run's flags, its seed, and nothing that follows from other flags: so that --config run.yaml --rank 16
    has the alpha of rank 16.
    """
    names = ("validation_prompt", "validation_prompts")
    flags = {name: value for name, value in recorded_values(settings).items() if name not in names}
    lines = [prompt.line for prompt in settings.samples.prompts]
    flags |= ({"validation_prompts": lines} if lines else {}) | {"seed": run.seed}
    words = Parser(type(settings)).to_words(flags | {"mixed_precision": accelerator.mixed_precision})
    return write_about(
        settings.run.output_dir, flags=flags, command=command_line(SCRIPT, words, accelerator),
        machine=machine(accelerator), settings=described,
        dataset=data_sheet(run.pictures, run.validated, run.sampler, run.notes),
    )  # fmt: skip


def write_about(output_dir, *, flags, command, settings: dict, machine, dataset):
    """Writes `run.yaml` and `about.json` of a run into its folder; returns what the second holds, as plain data.

    `flags` are for --config, `command` makes the same run again, `settings` are the flags and what they were settled to;
    none of them holds a token.
    """
    folder = Path(output_dir)
    write_whole(folder / "run.yaml", yaml.safe_dump(flags, sort_keys=False, allow_unicode=True))
    about = {
        "name": folder.resolve().name,
        "command": command,
        "settings": near(settings),
        "versions": versions(),
        "machine": machine,
        # Not of the pictures: what looks like a path there is a part of their bytes.
        "dataset": near(dataset | {"shown": ()}) | {"shown": dataset["shown"], "fingerprint": settings["dataset"]},
    }
    write_whole(folder / FILE, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return about


def near(value):
    """Plain data, the paths in it as from this folder or from the user's own: where those lie is nobody's business."""
    if isinstance(value, dict):
        return {name: near(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [near(each) for each in value]
    if isinstance(value, str):
        for folder, short in ((Path.cwd(), ""), (Path.home(), "~" + os.sep)):
            if folder.parent != folder:  # the root of a disk says nothing
                start = rf"(?<![\w./~-]){re.escape(str(folder) + os.sep)}"  # of a path, not within another
                value = re.sub(start, lambda _, short=short: short, value)
    return value


def command_line(script, words, accelerator):
    """The command that runs the script with these words on as many processes, as a shell takes it."""
    count, launcher = accelerator.num_processes, "accelerate launch --config_file accelerate_config.yaml"
    if count > 1 and accelerator.device.type == "cpu":
        launcher = f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {count}"
    elif count > 1:
        launcher += f" --multi_gpu --num_processes {count}"
    # A shell takes "~/" for the own folder only where it isn't quoted.
    quoted = [f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word) for word in near(words)]
    return " ".join([launcher, script, *quoted])


def machine(accelerator):
    """{name: value} of what a run computes on."""
    return {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def device_name(device):
    """What a `torch.device` is called, and how many threads compute where it is the CPU."""
    import torch

    from ..training.processes import describe_device

    return torch.cuda.get_device_name(device) if device.type == "cuda" else describe_device(device)


def versions():
    """{package: version} of what decides a run's numbers, and the commit of this code where that is known."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # none of them is needed to tell of a run
            continue
    commit = commit_of(ROOT)
    return found | ({"commit": commit} if commit else {})


def commit_of(folder):
    """The commit that is checked out in the folder, with "+" where files differ from it; None where git doesn't tell."""
    if not (folder / ".git").exists():
        return None
    said = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        said.append(done.stdout.strip())
    return said[0] + ("+" if said[1] else "")


def data_sheet(pictures, held_out, sampler, notes):
    """What is trained on, as plain data: counts, findings, and some of the pictures with their captions."""
    report = describe(
        pictures, [], sampler, num_validated=len(held_out or ()), token_counts=None, token_limit=None, cache_bytes=None
    )
    kept = ("pictures", "validated", "captions", "different_captions", "concepts", "sizes", "repeats",
            "samples_an_epoch", "steps_an_epoch")  # fmt: skip
    sheet = {name: report[name] for name in kept} | {"notes": notes}
    for name in ("enlarged", "equal", "alike"):
        sheet[name] = {"count": len(report[name]), "first": report[name][:LISTED]}
    chosen = np.unique(np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).round().astype(int))
    sheet["shown"] = [row_of(pictures, int(index)) for index in chosen]
    return sheet


def row_of(pictures, index):
    """A picture as the model sees it, and what is known of it."""
    fact, record = pictures.facts[index], pictures.records[index]
    return {
        "source": "/".join(Path(record["source"]).parts[-2:]),
        "concept": record["concept"],
        "captions": pictures.captions[index][:3],
        "size": f"{fact.width}x{fact.height}",
        "trained_at": "{}x{}".format(*pictures.sizes[index]),
        "preview": data_url(Image.fromarray(pictures.pixels(index, 0)), SIDE),
    }


def data_url(image, side, quality=80):
    """A picture as WebP in a data URL, its longer side `side` pixels at most; about 8 kB at 256 pixels."""
    small, data = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(data, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def image_of(url):
    """The picture in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))

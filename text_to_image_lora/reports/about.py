"""Writes `about.json` and `run.yaml`: a run's command, settings, software versions, machine and dataset."""

import base64
import importlib.metadata
import io
import json
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ..command_line import Parser, recorded_values
from ..files import shorten_paths, write_whole
from ..pictures.inspection import describe
from ..pictures.records import fingerprint
from ..training.inputs import concept_of_run


FILE = "about.json"
SCRIPT = "train_text_to_image_lora.py"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "pillow")
NUM_PREVIEWS = 16  # pictures in the data sheet
MAX_LISTED = 20  # pictures listed per finding in the data sheet
PREVIEW_SIDE = 256  # longer side in pixels
ROOT = Path(__file__).resolve().parents[2]


def describe_run(settings: Any, run: Any) -> dict[str, Any]:
    """Returns the settings that trackers and the LoRA's header record: the flags, with defaults resolved for this run."""
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
    # Without the configurations of the models.
    plain = {name: value for name, value in run.identity.items() if not isinstance(value, dict)}
    whole = recorded_values(settings) | settled | plain
    return {k: v for k, v in whole.items() if v not in (None, []) and k != "validation_prompt"}


def write_about_run(settings: Any, run: Any, described: dict[str, Any], accelerator: Any) -> dict[str, Any]:
    """Writes run.yaml, for --config, and about.json, for the report page and the trackers; returns the latter's contents.

    run.yaml holds the run's flags and its seed, but nothing derived from other flags, so that --config run.yaml --rank 16
    uses the default alpha of rank 16.
    """
    names = ("validation_prompt", "validation_prompts")
    flags = {name: value for name, value in recorded_values(settings).items() if name not in names}
    lines = [prompt.line for prompt in settings.samples.prompts]
    flags |= ({"validation_prompts": lines} if lines else {}) | {"seed": run.seed}
    words = Parser(type(settings)).to_words(flags | {"mixed_precision": accelerator.mixed_precision})
    return write_about(
        settings.run.output_dir, flags=flags, command=command_line(SCRIPT, words, accelerator),
        machine=machine(accelerator), settings=described,
        dataset=data_sheet(run.pictures, run.validated, run.sampler, run.notes, concept_of_run(settings, run.pictures.records))
        | {"held_out": identify(run.validated)},
    )  # fmt: skip


def write_about(
    output_dir: str | Path, *, flags: dict, command: str, settings: dict, machine: dict, dataset: dict
) -> dict[str, Any]:
    """Writes `flags` to run.yaml and the rest to about.json; returns the latter's contents. Nothing may hold a token."""
    folder = Path(output_dir)
    write_whole(folder / "run.yaml", yaml.safe_dump(flags, sort_keys=False, allow_unicode=True))
    about = {
        "name": folder.resolve().name,
        "command": command,
        "settings": shorten_paths(settings),
        "versions": versions(),
        "machine": machine,
        # Paths in "shown" are left alone: what looks like a path there may be part of an encoded picture.
        "dataset": shorten_paths(dataset | {"shown": ()})
        | {"shown": dataset["shown"], "fingerprint": settings["dataset"]},
    }
    write_whole(folder / FILE, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return about


def command_line(script: str, words: list[str], accelerator: Any) -> str:
    """Returns the shell command that runs the script with these arguments on the run's number of processes."""
    count, launcher = accelerator.num_processes, "accelerate launch --config_file accelerate_config.yaml"
    if count > 1 and accelerator.device.type == "cpu":
        launcher = f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {count}"
    elif count > 1:
        launcher += f" --multi_gpu --num_processes {count}"
    # Shells expand "~/" only outside quotes.
    words = shorten_paths(words)
    quoted = [f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word) for word in words]
    return " ".join([launcher, script, *quoted])


def machine(accelerator: Any) -> dict[str, Any]:
    """Describes the device and the system that a run computes on."""
    return {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def device_name(device: Any) -> str:
    """Returns the name of a `torch.device`; for the CPU, with its number of threads."""
    import torch

    from ..training.processes import describe_device

    return torch.cuda.get_device_name(device) if device.type == "cuda" else describe_device(device)


def versions() -> dict[str, str]:
    """Returns {package: version} of the packages that affect results, and this code's git commit if it is known."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a version may be missing, as no package is needed here
            continue
    commit = find_commit(ROOT)
    return found | ({"commit": commit} if commit else {})


def find_commit(folder: Path) -> str | None:
    """Returns the commit that is checked out in the folder, with "+" for modified files; None if git cannot tell."""
    if not (folder / ".git").exists():
        return None
    outputs = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        outputs.append(done.stdout.strip())
    commit, changes = outputs
    return commit + ("+" if changes else "")


def identify(held_out: Any) -> str | None:
    """Returns a hash of the held-out pictures, whatever their order; None without any."""
    if held_out is None:
        return None
    content_ids = sorted(held_out.content_ids)
    return fingerprint(content_ids, [[]] * len(content_ids))


def data_sheet(
    pictures: Any, held_out: Any, sampler: Any, notes: list[str], remove_concept: Any = None
) -> dict[str, Any]:
    """Describes the dataset as plain data: counts, findings, and some of the pictures with their captions.

    With a `ConceptRemover`, the captions without the concept are there too.
    """
    report = describe(
        pictures, [], sampler, num_validated=len(held_out or ()), token_counts=None, token_limit=None, cache_bytes=None
    )
    kept = ("pictures", "validated", "captions", "different_captions", "concepts", "sizes", "repeats",
            "samples_an_epoch", "steps_an_epoch")  # fmt: skip
    sheet = {name: report[name] for name in kept} | {"notes": notes}
    for name in ("enlarged", "equal", "alike"):
        sheet[name] = {"count": len(report[name]), "first": report[name][:MAX_LISTED]}
    firsts = pictures.firsts()
    chosen = np.unique(np.linspace(0, len(firsts) - 1, min(NUM_PREVIEWS, len(firsts))).round().astype(int))
    sheet["shown"] = [describe_picture(pictures, firsts[place], remove_concept) for place in chosen]
    return sheet


def describe_picture(pictures: Any, index: int, remove_concept: Any = None) -> dict[str, Any]:
    """Returns a picture's source, concept, captions, sizes, and a preview of it as the model sees it."""
    fact, record, captions = pictures.facts[index], pictures.records[index], pictures.captions[index][:3]
    without = []
    if remove_concept is not None and not pictures.is_class[index]:
        without = [remove_concept(caption) for caption in captions]
    return {
        "source": "/".join(Path(record["source"]).parts[-2:]),
        "concept": record["concept"],
        "captions": captions,
        "without_concept": without,
        "size": f"{fact.width}x{fact.height}",
        "trained_at": pictures.format_sizes(index),
        "preview": encode_image(Image.fromarray(pictures.pixels(index, 0)), PREVIEW_SIDE),
    }


def encode_image(image: Image.Image, side: int, quality: int = 80) -> str:
    """Encodes a picture as a WebP data URL, downscaled to `side` pixels; about 8 kB at 256 pixels."""
    small, data = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(data, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def decode_image(url: str) -> Image.Image:
    """Decodes the picture in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))

"""What a run tells of itself beside its numbers: the command, versions, the machine, and its pictures (`about.json`)."""

import base64
import importlib.metadata
import io
import json
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import write_whole
from ..pictures.inspection import describe


FILE = "about.json"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "pillow")
SHOWN = 16  # pictures of the data sheet
LISTED = 20  # of each finding
SIDE = 256  # pixels, of the data sheet's pictures
ROOT = Path(__file__).resolve().parents[2]


def write_about(output_dir, *, command, settings, pictures, held_out, sampler, notes, device):
    """Writes `about.json` of a run into its folder and returns what it holds, as plain data.

    `command` is what makes the same run again, `settings` the flags and what they were settled to, `pictures` the
    `PictureSet` that is trained on, `held_out` the one that is validated on or None, `notes` what was told of them, and
    `device` describes what it runs on. None of them holds a token.
    """
    about = {
        "name": Path(output_dir).resolve().name,
        "started_at": int(time.time()),
        "command": command,
        "settings": settings,
        "versions": versions(),
        "machine": device | {"python": platform.python_version(), "system": platform.platform(terse=True)},
        "dataset": data_sheet(pictures, held_out, sampler, notes) | {"fingerprint": settings["dataset"]},
    }
    write_whole(Path(output_dir) / FILE, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return about


def device_name(device):
    """What a `torch.device` is called, and how many threads compute where it is the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return device.type


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
        pictures, [], sampler.samples, num_validated=len(held_out or ()), token_counts=None, token_limit=None,
        steps_per_epoch=sampler.steps_per_epoch, cache_bytes=None,
    )  # fmt: skip
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

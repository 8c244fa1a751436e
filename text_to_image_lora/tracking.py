"""What a run reports: `metrics.jsonl` always, and trackers (W&B, TensorBoard, trackio) through Accelerate."""

import importlib.util
import json
import math
import netrc
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from .errors import InputError


TRACKERS = ("wandb", "tensorboard", "trackio")


def trackers_of(report_to):
    """The names of the trackers that `--report_to` means; needs no torch."""
    installed = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    if report_to is None:
        return ["wandb"] if "wandb" in installed else []
    if report_to == "none":
        return []
    if report_to == "all":
        return installed
    if report_to not in installed:
        raise InputError(f"--report_to {report_to}: it is not installed. Run: pip install {report_to}")
    return [report_to]


def wandb_mode():
    """W&B's mode: "online" with a key and a network, else "offline"; what WANDB_MODE says goes before."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    has_key = bool(os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))
    if not has_key:
        try:
            has_key = netrc.netrc(os.environ.get("NETRC")).authenticators(url.hostname) is not None
        except (OSError, netrc.NetrcParseError):
            has_key = False
    if not has_key:
        return "offline"
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=3).close()
    except OSError:
        return "offline"
    return "online"


def start_trackers(accelerator, project_name, config, output_dir, run_id):
    """Starts the trackers on the main process; `config` holds no secret. Returns W&B's run id, or None."""
    init_kwargs = {}
    if "wandb" in [str(getattr(name, "value", name)) for name in accelerator.log_with or []]:
        import wandb

        mode = wandb_mode()
        init_kwargs["wandb"] = {
            "name": Path(output_dir).resolve().name,
            "dir": str(output_dir),
            "id": run_id,
            "resume": "allow" if run_id and mode == "online" else None,
            "mode": mode,
            # "silent" keeps W&B's own banner off the terminal; the last line of the run says where it went.
            "settings": wandb.Settings(silent=True, console="off"),
        }
    values = {
        k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in config.items() if v is not None
    }
    accelerator.init_trackers(project_name, config=values, init_kwargs=init_kwargs)
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and accelerator.is_main_process:
            return tracker.run.id
    return run_id


def log_pictures(accelerator, images, prompts, step):
    """Validation pictures {(prompt index, image index): PIL.Image} to every tracker, with step and prompt."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            pictures = [wandb.Image(image, caption=f"{prompts[p]} ({k})") for (p, k), image in sorted(images.items())]
            tracker.run.log({"validation": pictures}, step=step)
        elif tracker.name == "trackio":
            import trackio

            pictures = {
                f"validation/{p}-{k}": trackio.Image(image, caption=prompts[p]) for (p, k), image in images.items()
            }
            tracker.run.log(pictures, step=step)
        elif tracker.name == "tensorboard":
            import numpy as np

            for p, prompt in enumerate(prompts):
                stack = np.stack([np.asarray(image) for (q, _), image in sorted(images.items()) if q == p])
                tracker.writer.add_images(f"validation/{prompt[:80]}", stack, step, dataformats="NHWC")


def finish_trackers(accelerator):
    """Ends the runs; returns the line that says where the W&B run is, or None."""
    line = None
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and accelerator.is_main_process:
            folder = Path(tracker.run.dir).parent
            near = os.path.relpath(folder)
            if tracker.run.settings.mode == "offline":
                line = f"W&B run saved offline. To upload it: wandb sync {folder if near.startswith('..') else near}"
            elif tracker.run.url:
                line = f"W&B run: {tracker.run.url}"
    accelerator.end_training()
    return line


def peak_memory_gib(device):
    """The most memory the run has held so far: of the GPU's, or this process's on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, the same numbers that the trackers get."""

    def __init__(self, path, first_step):
        """Opens for appending; lines after `first_step`, of a run that went further before it was resumed, go."""
        path = Path(path)
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
            if kept != lines:
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(kept))
                os.replace(temporary, path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 - open for as long as the run

    def write(self, step, values):
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no infinity
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self):
        self.file.close()

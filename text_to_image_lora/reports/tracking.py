"""The trackers (W&B, TensorBoard, trackio), through Accelerate."""

import importlib.util
import json
import os
import shlex
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import InputError


TRACKERS = ("wandb", "tensorboard", "trackio")


def trackers_of(report_to):
    """The names of the trackers that `--report_to` means; needs no torch."""
    specs = {name: importlib.util.find_spec(name) for name in TRACKERS}
    # A mere folder of that name, such as the one that W&B writes its runs to, has a spec without origin.
    installed = [name for name, spec in specs.items() if spec is not None and spec.origin is not None]
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
    """W&B's mode: what the user set (WANDB_MODE, `wandb offline`), else "online" with a key and a network, else "offline".

    Raises `InputError` where W&B can't read its settings or the key.
    """
    import wandb

    try:
        settings = wandb.setup(wandb.Settings(silent=True)).settings
        if "mode" in settings.model_fields_set:
            return settings.mode
        if not wandb.login(prompt=False, verify=False):
            return "offline"
    except (ValueError, wandb.Error) as error:
        raise InputError(
            f"W&B can't be used as it is set up ({' '.join(str(error).split())}). Correct that, or pass --report_to none."
        ) from error
    url = urlsplit(settings.base_url)
    proxy = None if proxy_bypass(url.hostname) else getproxies().get(url.scheme)
    url = urlsplit(proxy) if proxy else url
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=3).close()
    except OSError:
        return "offline"
    return "online"


def start_trackers(accelerator, project_name, config, output_dir, run_id, trackio_space_id=None):
    """Starts the trackers on the main process; `config` holds no secret. Returns W&B's run id, or None.

    A W&B run that the server doesn't take is kept offline.
    """
    name = Path(output_dir).resolve().name
    kwargs = {"trackio": {"name": name, "space_id": trackio_space_id}}
    values = {
        k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in config.items() if v is not None
    }
    if "wandb" not in [str(getattr(name, "value", name)) for name in accelerator.log_with or []]:
        accelerator.init_trackers(project_name, config=values, init_kwargs=kwargs)
        return run_id
    import wandb

    mode = wandb_mode()
    options = {
        "name": name,
        "dir": str(output_dir),
        "id": run_id,
        "resume": "allow" if run_id and mode == "online" else None,
        "mode": mode,
        # "silent" keeps W&B's own banner off the terminal; the last line of the run says where it went.
        "settings": wandb.Settings(silent=True, console="off"),
    }
    try:
        accelerator.init_trackers(project_name, config=values, init_kwargs=kwargs | {"wandb": options})
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        print(f"W&B's server doesn't take the run ({reason}): it is kept offline. Try `wandb login`.", file=sys.stderr)
        accelerator.trackers.clear()
        options |= {"mode": "offline", "resume": None}
        accelerator.init_trackers(project_name, config=values, init_kwargs=kwargs | {"wandb": options})
    return next(tracker.run.id for tracker in accelerator.trackers if tracker.name == "wandb")


def finish_trackers(accelerator):
    """Ends the runs; returns the line that says where the W&B run is, or None."""
    line = None
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and accelerator.is_main_process:
            if tracker.run.offline:
                # A run that was interrupted has a folder for each part; W&B uploads them in order.
                folders = sorted(Path(tracker.run.dir).parents[1].glob(f"offline-run-*-{tracker.run.id}"))
                near = [os.path.relpath(folder) for folder in folders]
                shown = [str(f) if n.startswith("..") else n for f, n in zip(folders, near)]
                line = f"W&B run saved offline. To upload it: wandb sync {shlex.join(shown)}"
            elif tracker.run.url:
                line = f"W&B run: {tracker.run.url}"
    accelerator.end_training()
    return line

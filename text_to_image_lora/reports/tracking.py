"""Starts and finishes the trackers (W&B, TensorBoard, trackio) through Accelerate."""

import contextlib
import functools
import glob
import json
import logging
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import InputError
from ..files import reason_of


logger = logging.getLogger(__name__)
SECONDS_TO_FINISH = 60  # how long a tracker may take at the end of a run, in addition to uploads
BYTES_PER_SECOND = 250_000  # upload speed of a slow connection


def wandb_mode() -> str:
    """Returns the W&B mode that the user set, or else "online" if there is an API key and a network, or "offline".

    Raises `InputError` if W&B's settings or the API key are invalid.
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
            f"W&B's configuration is invalid ({' '.join(str(error).split())}). Correct it, or pass --report_to none."
        ) from error
    url = urlsplit(settings.base_url)
    proxy = None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme)
    url = urlsplit(proxy) if proxy else url
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=3).close()
    except OSError:
        return "offline"
    return "online"


class LoggedProgress(NamedTuple):
    """What the trackers already have of a run: nothing by default, more when it is resumed."""

    step: int = 0  # after which the run is resumed
    repeated: Mapping[int, int] = {}  # {step: rows} after this step that were logged, and will be logged again
    wandb_id: str | None = None


class FailSafeTracker:
    """Wraps a tracker of Accelerate so that its errors do not stop the run: the first is printed, and ends its use.

    The rows that `repeated`, {step: number of rows}, counts are not logged: the tracker has them already.
    """

    def __init__(self, tracker: Any, repeated: Mapping[Any, int]):
        self.tracker, self.name = tracker, tracker.name
        self.repeated, self.failed = dict(repeated), False
        self.to_send = 0  # bytes of files

    def __getattr__(self, name):
        return getattr(self.tracker, name)

    def attempt(self, work: Callable[[], Any]) -> Any:
        """Returns the result of `work()`, or None if the tracker fails or has failed before."""
        if self.failed:
            return None
        try:
            return work()
        except Exception as error:  # no error of a tracker is worth losing the run
            self.failed = True
            rest = "the run continues without it, and all metrics are in metrics.jsonl"
            print(f"{self.name} failed ({reason_of(error)}): {rest}", file=sys.stderr)
            return None

    def log(self, values, step=None, **options):
        if self.repeated.get(step):
            self.repeated[step] -= 1
            return
        self.attempt(lambda: self.tracker.log(values, step=step, **options))

    def finish(self) -> None:
        """Ends the tracker's run, waiting no longer for its server than uploads take on a slow connection."""

        def end():
            self.attempt(self.tracker.finish)
            if self.failed and self.name == "wandb":
                import wandb

                with contextlib.suppress(Exception):  # or else W&B would fail at the exit of Python
                    wandb.teardown()

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        thread.join(SECONDS_TO_FINISH + self.to_send / BYTES_PER_SECOND)
        if thread.is_alive():
            self.failed = True
            print(f"{self.name} does not respond: its run may be incomplete; everything is on disk", file=sys.stderr)


def start_trackers(
    accelerator: Any, project: str, config: dict, output_dir: Path, logged: LoggedProgress, space_id: str | None = None
) -> str | None:
    """Starts the trackers on the main process; `config` must not hold secrets. Returns the id of the W&B run, or None.

    A W&B run that the server rejects is kept offline. Any other tracker that cannot be started is left out.
    """
    values = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in config.items() if v is not None}
    started = []
    for name in [str(getattr(name, "value", name)) for name in accelerator.log_with or []]:
        accelerator.log_with, accelerator.trackers = [name], []
        try:
            if name == "wandb":
                _start_wandb(accelerator, project, values, output_dir, logged.wandb_id)
            else:
                options = tracker_options(name, output_dir, space_id, logged.step)
                accelerator.init_trackers(project, config=values, init_kwargs={name: options})
        except InputError:
            raise
        except Exception as error:
            print(f"{name} could not be started ({reason_of(error)}): the run continues without it", file=sys.stderr)
            continue
        resumes = {"wandb": logged.wandb_id is not None, "trackio": logged.step > 0}.get(name, False)
        started += [FailSafeTracker(each, logged.repeated if resumes else {}) for each in accelerator.trackers]
    accelerator.trackers = started
    return next((tracker.run.id for tracker in started if tracker.name == "wandb"), logged.wandb_id)


def tracker_options(name: str, output_dir: str | Path, space_id: str | None, first_step: int) -> dict[str, Any]:
    """Returns the options to start TensorBoard or trackio with; a Space is created as private."""
    if name == "trackio":
        options = {"name": Path(output_dir).resolve().name, "resume": "allow" if first_step else "never"}
        return options if space_id is None else options | {"space_id": space_id, "private": True}
    # TensorBoard then hides the later steps that the run logged before it was resumed.
    return {"purge_step": first_step + 1} if first_step else {}


def _start_wandb(accelerator, project_name, values, output_dir, run_id):
    import wandb

    mode = wandb_mode()
    options = {
        "name": Path(output_dir).resolve().name,
        "dir": str(output_dir),
        "id": run_id,
        "resume": "allow" if run_id and mode == "online" else None,
        "mode": mode,
        # "silent" hides W&B's own banner, as the last line that is logged says where the W&B run is.
        "settings": wandb.Settings(silent=True, console="off"),
    }
    try:
        accelerator.init_trackers(project_name, config=values, init_kwargs={"wandb": options})
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        print(f"W&B's server rejected the run ({reason}): it is kept offline. Try `wandb login`.", file=sys.stderr)
        accelerator.trackers.clear()
        options |= {"mode": "offline", "resume": None}
        accelerator.init_trackers(project_name, config=values, init_kwargs={"wandb": options})


def finish_trackers(accelerator: Any) -> None:
    """Ends the trackers' runs, and logs where the W&B run is."""
    line = None
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and accelerator.is_main_process:
            line = tracker.attempt(functools.partial(_locate_wandb_run, tracker.run))
    accelerator.end_training()
    if line is not None:
        logger.info(line)


def _locate_wandb_run(run):
    """Returns a line that says where a W&B run is, or None."""
    if not run.offline:
        return f"W&B run: {run.url}" if run.url else None
    # A resumed run has one folder for each part; `wandb sync` uploads them in order.
    folders = sorted(Path(run.dir).parents[1].glob(f"offline-run-*-{glob.escape(run.id)}"))
    relative = [os.path.relpath(folder) for folder in folders]
    shown = [str(path) if short.startswith("..") else short for path, short in zip(folders, relative)]
    return f"W&B run saved offline. To upload it: wandb sync {shlex.join(shown)}"

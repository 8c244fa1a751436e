"""The trackers (W&B, TensorBoard, trackio), through Accelerate."""

import contextlib
import functools
import json
import logging
import os
import shlex
import socket
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import InputError
from ..files import reason_of


logger = logging.getLogger(__name__)
SECONDS_TO_FINISH = 60  # that a tracker has at the end of a run, and
BYTES_A_SECOND = 250_000  # of the files that it sends: a slow line


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


class Sheltered:
    """A tracker of Accelerate's that can't stop the run.

    What goes wrong with it is told once, and from then on it gets nothing more: metrics.jsonl and the pictures are on
    disk. What it was told before the run was resumed (`told`, counted by step) it isn't told again.
    """

    def __init__(self, tracker, told=None):
        self.tracker, self.name, self.told, self.failed = tracker, tracker.name, dict(told or {}), False
        self.to_send = 0  # bytes of files

    def __getattr__(self, name):
        return getattr(self.tracker, name)

    def attempt(self, work):
        """What `work()` gives, or None where the tracker fails or has failed before."""
        if self.failed:
            return None
        try:
            return work()
        except Exception as error:  # whatever it is: the training is worth more than its report
            self.failed = True
            print(
                f"{self.name} fails ({reason_of(error)}): the run goes on without it, and all numbers are in metrics.jsonl",
                file=sys.stderr,
            )
            return None

    def log(self, values, step=None, **options):
        if self.told.get(step):
            self.told[step] -= 1
            return
        self.attempt(lambda: self.tracker.log(values, step=step, **options))

    def finish(self):
        """Ends the tracker's run; a server that doesn't answer any more is not waited for longer than files take to send."""

        def end():
            self.attempt(self.tracker.finish)
            if self.failed and self.name == "wandb":
                import wandb

                with contextlib.suppress(Exception):  # it would tear down a service that is not there when Python ends
                    wandb.teardown()

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        thread.join(SECONDS_TO_FINISH + self.to_send / BYTES_A_SECOND)
        if thread.is_alive():
            self.failed = True
            print(f"{self.name} does not answer: its run is left as it is; what it had is on disk", file=sys.stderr)


def start_trackers(
    accelerator, project_name, config, output_dir, run_id, *, space_id=None, first_step=0, given_up=None
):
    """Starts the trackers on the main process; `config` holds no secret. Returns W&B's run id, or None.

    A W&B run that the server doesn't take is kept offline; another tracker that can't be started is left out. Of a run that
    is gone on from, `given_up` counts the rows after `first_step` that were reported before it was left.
    """
    values = {
        k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in config.items() if v is not None
    }
    names = [str(getattr(name, "value", name)) for name in accelerator.log_with or []]
    started = []
    for name in names:
        accelerator.log_with, accelerator.trackers = [name], []
        try:
            if name == "wandb":
                _start_wandb(accelerator, project_name, values, output_dir, run_id)
            else:
                own = options_of(name, output_dir, space_id, first_step)
                accelerator.init_trackers(project_name, config=values, init_kwargs={name: own})
        except InputError:
            raise
        except Exception as error:
            print(f"{name} can't be started ({reason_of(error)}): the run goes on without it", file=sys.stderr)
            continue
        goes_on = run_id is not None if name == "wandb" else name == "trackio" and first_step
        told = given_up if goes_on else None
        started += [Sheltered(tracker, told) for tracker in accelerator.trackers]
    accelerator.trackers = started
    return next((tracker.run.id for tracker in started if tracker.name == "wandb"), run_id)


def options_of(name, output_dir, space_id, first_step):
    """How TensorBoard or trackio is started; a Space, which anyone could look into, is made private."""
    if name == "trackio":
        options = {"name": Path(output_dir).resolve().name, "resume": "allow" if first_step else "never"}
        return options if space_id is None else options | {"space_id": space_id, "private": True}
    # TensorBoard's readers pass over what an earlier part of the run wrote of later steps.
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
        # "silent" keeps W&B's own banner off the terminal; the last line of the run says where it went.
        "settings": wandb.Settings(silent=True, console="off"),
    }
    try:
        accelerator.init_trackers(project_name, config=values, init_kwargs={"wandb": options})
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        print(f"W&B's server doesn't take the run ({reason}): it is kept offline. Try `wandb login`.", file=sys.stderr)
        accelerator.trackers.clear()
        options |= {"mode": "offline", "resume": None}
        accelerator.init_trackers(project_name, config=values, init_kwargs={"wandb": options})


def finish_trackers(accelerator):
    """Ends the runs, and says where the W&B run is."""
    line = None
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and accelerator.is_main_process:
            line = tracker.attempt(functools.partial(_where_it_is, tracker.run))
    accelerator.end_training()
    if line is not None:
        logger.info(line)


def _where_it_is(run):
    """The line that says where a W&B run is, or None."""
    if not run.offline:
        return f"W&B run: {run.url}" if run.url else None
    # A run that was interrupted has a folder for each part; W&B uploads them in order.
    folders = sorted(Path(run.dir).parents[1].glob(f"offline-run-*-{run.id}"))
    near = [os.path.relpath(folder) for folder in folders]
    shown = [str(f) if n.startswith("..") else n for f, n in zip(folders, near)]
    return f"W&B run saved offline. To upload it: wandb sync {shlex.join(shown)}"

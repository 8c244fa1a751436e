"""Logs a run to its trackers: metrics, sample pictures next to the base model's, tables, the LoRA files, the result."""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import tracking
from .about import decode_image
from .numbers import LOSS
from .panels import DASHBOARDS, LoggedSample
from .runs import RecordedRun, make_answer, open_sample, read_run
from .tracking import LoggedProgress


TABLE_PICTURE_SIDE = 256  # longer side in pixels


def make_config(about: dict[str, Any]) -> dict[str, Any]:
    """Makes the configuration that trackers store: settings, command, versions, machine and dataset."""
    parts = {f"{part}/{name}": value for part in ("versions", "machine") for name, value in about[part].items()}
    return about["settings"] | parts | {
        "command": about["command"], "dataset/fingerprint": about["dataset"]["fingerprint"],
        "dataset/pictures": about["dataset"]["pictures"], "dataset/held_out": about["dataset"]["validated"],
    }  # fmt: skip


def for_each_dashboard(accelerator: Any, show: Callable[[Any], Any]) -> None:
    """Calls `show(dashboard)` for each tracker; a tracker that fails is not used again, and training continues."""
    for tracker in accelerator.trackers:
        tracker.attempt(lambda tracker=tracker: show(DASHBOARDS[tracker.name](tracker)))


def start(
    accelerator: Any, project: str, about: dict, output_dir: Path, progress: LoggedProgress, space_id: str | None
) -> str | None:
    """Starts the trackers and, for a new run, logs the data sheet in `about`; returns the id of the W&B run, or None."""
    run_id = tracking.start_trackers(accelerator, project, make_config(about), output_dir, progress, space_id)
    for_each_dashboard(accelerator, lambda dashboard: dashboard.begin())
    if not progress.step:
        rows = [
            [decode_image(row["preview"]), " / ".join(row["captions"]), row["concept"], row["size"], row["trained_at"], row["source"]]
            for row in about["dataset"]["shown"]
        ]  # fmt: skip
        for_each_dashboard(accelerator, lambda dashboard: dashboard.show_data(about, rows))
    return run_id


def log_numbers(accelerator: Any, values: dict[str, float], step: int) -> None:
    """Logs the metrics of a step to every tracker, leaving out NaN and infinity."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    for_each_dashboard(accelerator, lambda dashboard: dashboard.log_numbers(finite, step))


def log_pictures(
    accelerator: Any, images: dict[Any, Image.Image], base: dict, prompts: list[str], seeds: dict, step: int
) -> None:
    """Logs the sample pictures of a step to every tracker, each next to the base model's picture, if there is one.

    The keys of `images`, `base` and `seeds` are (prompt index, number of the picture).
    """
    for p, prompt in enumerate(prompts):
        tasks = sorted(task for task in images if task[0] == p)
        samples = [LoggedSample(task[1], seeds[task], base.get(task), images[task]) for task in tasks]
        shown = (panel_name(p, prompt), prompt, samples, step)
        for_each_dashboard(accelerator, lambda dashboard, shown=shown: dashboard.show_pictures(*shown))


def panel_name(place: int, prompt: str) -> str:
    """Names the panel of a prompt by its number and those characters of the prompt that a file name may contain."""
    words = " ".join(re.sub(r"[^A-Za-z0-9 ,.'-]", " ", prompt).split())[:60].rstrip()
    return f"samples/{place:02d} {words}".rstrip()


def log_results(accelerator: Any, output_dir: str | Path) -> None:
    """Logs the result of a run to every tracker: the answer, a table of all sample pictures, and the LoRA files."""

    @functools.cache
    def read():
        run = read_run(output_dir)
        return run, make_answer(run), make_sample_rows(run)

    for_each_dashboard(accelerator, lambda dashboard: dashboard.show_results(*read()))


def make_sample_rows(run: RecordedRun) -> list[list]:
    """Makes a table row with the columns `panels.SAMPLES` for each sample picture that the LoRA drew."""
    losses = {row["step"]: row[LOSS] for row in run.numbers.validations}
    base_pictures, rows = {}, []
    for step, pictures in run.pictures.items():
        for key, picture in pictures.items():
            if (image := open_sample(picture.path)) is None:
                continue
            image.thumbnail((TABLE_PICTURE_SIDE, TABLE_PICTURE_SIDE), Image.Resampling.LANCZOS)
            if step == 0:
                base_pictures[key] = image
                continue
            change = None
            if key in base_pictures and base_pictures[key].size == image.size:
                distance = np.asarray(image, dtype=np.float32) - np.asarray(base_pictures[key], dtype=np.float32)
                change = round(float(np.abs(distance).mean()) / 255, 4)
            rows.append([step, picture.prompt, picture.seed, base_pictures.get(key), image, change, losses.get(step)])
    return rows

"""What trackers show of a run beside its numbers: pictures beside the base's, tables, the LoRA files, the answer."""

import functools
import math
import re

import numpy as np
from PIL import Image

from . import tracking
from .about import image_of
from .numbers import LOSS
from .panels import DASHBOARDS, Sample
from .runs import answer_of, read_run


IN_TABLES = 256  # pixels of a table's pictures


def config_of(about):
    """What trackers keep as a run's configuration: its settings, command, versions, machine and dataset."""
    parts = {f"{part}/{name}": value for part in ("versions", "machine") for name, value in about[part].items()}
    return about["settings"] | parts | {
        "command": about["command"], "dataset/fingerprint": about["dataset"]["fingerprint"],
        "dataset/pictures": about["dataset"]["pictures"], "dataset/held_out": about["dataset"]["validated"],
    }  # fmt: skip


def to_each(accelerator, show):
    """Calls `show(dashboard)` of each tracker's; one that fails gets nothing more, and the run goes on."""
    for tracker in accelerator.trackers:
        tracker.attempt(lambda tracker=tracker: show(DASHBOARDS[tracker.name](tracker)))


def start(accelerator, project_name, about, output_dir, run_id, **how):
    """Starts the trackers as `tracking.start_trackers` does, with what `about` holds; returns W&B's run id, or None.

    A run's first start shows the data sheet.
    """
    run_id = tracking.start_trackers(accelerator, project_name, config_of(about), output_dir, run_id, **how)
    to_each(accelerator, lambda dashboard: dashboard.begin())
    if not how.get("first_step", 0):
        rows = [
            [image_of(row["preview"]), " / ".join(row["captions"]), row["concept"], row["size"], row["trained_at"], row["source"]]
            for row in about["dataset"]["shown"]
        ]  # fmt: skip
        to_each(accelerator, lambda dashboard: dashboard.show_data(about, rows))
    return run_id


def log_numbers(accelerator, values, step):
    """A step's numbers to every tracker, those that are no numbers left out."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    to_each(accelerator, lambda dashboard: dashboard.log_numbers(finite, step))


def log_pictures(accelerator, images, base, prompts, seeds, step):
    """Sample pictures {(prompt index, k): PIL.Image} of a step to every tracker, each beside the base's.

    `base` has those of step 0, or nothing where they aren't there; `seeds` the seed of each.
    """
    for p, prompt in enumerate(prompts):
        tasks = sorted(task for task in images if task[0] == p)
        samples = [Sample(task[1], seeds[task], base.get(task), images[task]) for task in tasks]
        name = panel_name(p, prompt)
        to_each(accelerator, functools.partial(_show, name, prompt, samples, step))


def _show(name, prompt, samples, step, dashboard):
    dashboard.show_pictures(name, prompt, samples, step)


def panel_name(place, prompt):
    """The name of a prompt's panel: its number, and its words as far as they can be part of a file's name."""
    words = " ".join(re.sub(r"[^A-Za-z0-9 ,.'-]", " ", prompt).split())[:60].rstrip()
    return f"samples/{place:02d} {words}".rstrip()


def log_results(accelerator, output_dir):
    """What a run came to, to every tracker: the answer, a table of all sample pictures, and the LoRA files."""

    @functools.cache
    def read():
        run = read_run(output_dir)
        return run, answer_of(run), rows_of_samples(run)

    to_each(accelerator, lambda dashboard: dashboard.show_results(*read()))


def rows_of_samples(run):
    """A row for each sample picture that a LoRA drew: `SAMPLES`."""
    losses = {row["step"]: row[LOSS] for row in run.numbers.validations}
    of_base, rows = {}, []
    for step, pictures in run.pictures.items():
        for key, picture in pictures.items():
            with Image.open(picture.path) as image:
                image = image.convert("RGB")
            image.thumbnail((IN_TABLES, IN_TABLES), Image.Resampling.LANCZOS)
            if step == 0:
                of_base[key] = image
                continue
            change = None
            if key in of_base and of_base[key].size == image.size:
                distance = np.asarray(image, dtype=np.float32) - np.asarray(of_base[key], dtype=np.float32)
                change = round(float(np.abs(distance).mean()) / 255, 4)
            rows.append([step, picture.prompt, picture.seed, of_base.get(key), image, change, losses.get(step)])
    return rows

"""What trackers show of a run beside its numbers: pictures beside the base's, tables, the LoRA files, the answer."""

import functools
import importlib
import math
import re

import numpy as np
from PIL import Image

from . import tracking
from .about import image_of
from .runs import LOSS, answer_of, read_run


# What W&B's summary holds of a number instead of its last value.
SUMMARY = {LOSS: "min", "train_loss": "min", "images_per_second": "mean", "peak_memory_gib": "max", "grad_norm": "max"}
IN_TABLES = 256  # pixels of a table's pictures
SAMPLES = ("step", "prompt", "seed", "base", "LoRA", "change from the base", "relative loss, pictures held out")
DATA = ("picture", "captions", "concept", "size", "trained at", "source")


def config_of(about):
    """What trackers keep as a run's configuration: its settings, command, versions, machine and dataset."""
    parts = {f"{part}/{name}": value for part in ("versions", "machine") for name, value in about[part].items()}
    return about["settings"] | parts | {
        "command": about["command"], "dataset/fingerprint": about["dataset"]["fingerprint"],
        "dataset/pictures": about["dataset"]["pictures"], "dataset/held_out": about["dataset"]["validated"],
    }  # fmt: skip


def to_each(accelerator, tell, *what):
    """Calls `tell(tracker, *what)` of each tracker; one that fails gets nothing more, and the run goes on."""
    for tracker in accelerator.trackers:
        tracker.attempt(functools.partial(tell, tracker, *what))


def start(accelerator, project_name, about, output_dir, run_id, **how):
    """Starts the trackers as `tracking.start_trackers` does, with what `about` holds; returns W&B's run id, or None."""
    run_id = tracking.start_trackers(accelerator, project_name, config_of(about), output_dir, run_id, **how)
    to_each(accelerator, _log_start, about, how.get("first_step", 0))
    return run_id


def _log_start(tracker, about, first_step):
    """Says by what to draw numbers, and at a run's first step shows the data sheet."""
    if tracker.name == "wandb":
        define_metrics(tracker.run)
    if first_step:
        return
    dataset = about["dataset"]
    rows = [
        [image_of(row["preview"]), " / ".join(row["captions"]), row["concept"], row["size"], row["trained_at"], row["source"]]
        for row in dataset["shown"]
    ]  # fmt: skip
    if tracker.name == "tensorboard":
        lines = [f"{key}: {value}" for key, value in dataset.items() if key not in ("shown", "notes")]
        lines += [" | ".join(map(str, row[1:])) for row in rows]
        tracker.writer.add_text("data", as_written(lines), 0)
        tracker.writer.add_text("command", as_written([about["command"]]), 0)
        sheet = np.concatenate([np.asarray(row[0].resize((128, 128))) for row in rows], axis=1)
        tracker.writer.add_image("data/pictures", sheet, 0, dataformats="HWC")
    else:
        tracker.run.log({"data": table_of(tracker.name, DATA, rows)} | step_of_row(tracker, 0), step=0)


def define_metrics(run):
    """W&B: every number over the optimizer's step, and the best value in the summary."""
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    for name, summary in SUMMARY.items():
        run.define_metric(name, step_metric="step", summary=summary)


def log_numbers(accelerator, values, step):
    """A step's numbers to every tracker, those that are no numbers left out."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    for tracker in accelerator.trackers:
        tracker.log(finite | step_of_row(tracker, step), step=step)


def step_of_row(tracker, step):
    """What W&B draws a row's numbers over; the others know the step without."""
    return {"step": step} if tracker.name == "wandb" else {}


def log_pictures(accelerator, images, base, prompts, seeds, step):
    """Sample pictures {(prompt index, k): PIL.Image} of a step to every tracker, each beside the base's.

    `base` has those of step 0, or nothing where they aren't there; `seeds` the seed of each.
    """
    to_each(accelerator, _log_pictures, images, base, prompts, seeds, step)


def _log_pictures(tracker, images, base, prompts, seeds, step):
    for p, prompt in enumerate(prompts):
        name, tasks = panel_name(p, prompt), sorted(task for task in images if task[0] == p)
        if tracker.name == "tensorboard":
            pairs = [np.asarray(side_by_side(base.get(task), images[task])) for task in tasks]
            tracker.writer.add_images(name, np.stack(pairs), step, dataformats="NHWC")
        elif tracker.name == "trackio":
            library = importlib.import_module("trackio")
            pairs = {
                f"{name} {task[1]}": library.Image(side_by_side(base.get(task), images[task]), caption=prompt)
                for task in tasks
            }
            tracker.run.log(pairs, step=step)
        else:
            library, pictures = importlib.import_module("wandb"), []
            for task in tasks:
                if task in base:
                    pictures.append(library.Image(base[task], caption=f"base, seed {seeds[task]}: {prompt}"))
                words = f"step {step}, seed {seeds[task]}: {prompt}"
                pictures.append(library.Image(images[task], caption=words))
            tracker.run.log({name: pictures} | step_of_row(tracker, step), step=step)


def panel_name(place, prompt):
    """The name of a prompt's panel: its number, and its words as far as they can be part of a file's name."""
    words = " ".join(re.sub(r"[^A-Za-z0-9 ,.'-]", " ", prompt).split())[:60].rstrip()
    return f"samples/{place:02d} {words}".rstrip()


def side_by_side(left, right):
    """Two pictures as one, or the right one alone where there is no left one."""
    if left is None:
        return right.convert("RGB")
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def log_results(accelerator, output_dir):
    """What a run came to, to every tracker: the answer, a table of all sample pictures, and the LoRA files."""
    to_each(accelerator, _log_results, output_dir)


def _log_results(tracker, output_dir):
    run = read_run(output_dir)
    answer, rows = answer_of(run), rows_of_samples(run)
    if tracker.name == "tensorboard":
        tracker.writer.add_text("answer", answer.sentence, run.step)
        if rows:
            lines = [" | ".join(str(cell) for cell in row if not isinstance(cell, Image.Image)) for row in rows]
            tracker.writer.add_text("samples", as_written(lines), run.step)
        return
    if tracker.name == "wandb":
        tracker.run.summary.update(summary_of(answer))
    if rows:
        table = {"samples table": table_of(tracker.name, SAMPLES, rows)}
        tracker.run.log(table | step_of_row(tracker, run.step), step=run.step)
    log_files(tracker, run, answer)


def summary_of(answer):
    """The answer as W&B's summary holds it."""
    told = {
        "answer": answer.sentence,
        "best_step": answer.best_step,
        "gain_over_base_percent": None if answer.gain is None else round(answer.gain, 2),
        "overfitting_since": answer.worse_since,
        "take": None if answer.take is None else answer.take.place or "last",
    }
    return {name: value for name, value in told.items() if value is not None}


def rows_of_samples(run):
    """A row for each sample picture that a LoRA drew: `SAMPLES`."""
    losses = {row["step"]: row[LOSS] for row in run.rows if row.get(LOSS) is not None}
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
            if key in of_base:
                distance = np.asarray(image, dtype=np.float32) - np.asarray(of_base[key], dtype=np.float32)
                change = round(float(np.abs(distance).mean()) / 255, 4)
            rows.append([step, picture.prompt, picture.seed, of_base.get(key), image, change, losses.get(step)])
    return rows


def table_of(name, columns, rows):
    """A table for W&B or trackio; pictures are JPEG in W&B's, which would keep them as PNG."""
    library = importlib.import_module(name)
    options = {"file_type": "jpg"} if name == "wandb" else {}
    data = [
        [library.Image(cell, **options) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows
    ]
    if name == "wandb":
        return library.Table(columns=list(columns), data=data)
    import pandas

    return library.Table(dataframe=pandas.DataFrame(data, columns=list(columns)))


def log_files(tracker, run, answer):
    """The LoRA files as versions of one artifact: `epoch-N`, `best`, and `last`, which comes last."""
    library = importlib.import_module(tracker.name)
    if not hasattr(library, "Artifact"):  # older trackio
        return
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", run.name)
    for file in run.files:
        artifact = library.Artifact(
            f"{name}-lora", type="lora", metadata={"step": file.step, "answer": answer.sentence}
        )
        for path in file.paths:
            artifact.add_file(str(path))
        alias = re.sub(r"epoch-0*(?=\d)", "epoch-", file.place) or "last"
        tracker.run.log_artifact(artifact, aliases=[alias])
        tracker.to_send += sum(path.stat().st_size for path in file.paths)


def as_written(lines):
    """Lines as Markdown that shows them as they are."""
    return "\n".join(f"    {line}" for line in lines)

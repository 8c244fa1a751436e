"""Shows a run in each tracker: W&B, trackio and TensorBoard have different panels."""

import importlib
import re
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .numbers import LOSS


# How W&B's summary aggregates a metric; by default it holds the last value.
SUMMARY = {LOSS: "min", "train_loss": "min", "images_per_second": "mean", "peak_memory_gib": "max", "grad_norm": "max"}
SAMPLES = ("step", "prompt", "seed", "base", "LoRA", "change from the base", "relative loss, pictures held out")
DATA = ("picture", "captions", "concept", "size", "trained at", "source")


class LoggedSample(NamedTuple):
    """Sample picture k of a prompt and, if there is one, the base model's picture at the same seed."""

    k: int
    seed: int
    base: Image.Image | None
    image: Image.Image


class Dashboard:
    """Shows a run in one tracker."""

    def __init__(self, tracker: Any):
        self.tracker = tracker

    def begin(self):
        """Prepares the tracker before anything is logged."""

    def step_values(self, step: int) -> dict[str, int]:
        """Returns values that are added to everything that is logged at a step."""
        return {}

    def log_numbers(self, values, step):
        self.tracker.log(values | self.step_values(step), step=step)


class TableDashboard(Dashboard):
    """Logs tables with pictures, and files as versions of an artifact, as both W&B and trackio can."""

    def __init__(self, tracker):
        super().__init__(tracker)
        self.library = importlib.import_module(tracker.name)

    def log(self, values, step):
        self.tracker.run.log(values | self.step_values(step), step=step)

    def picture(self, image):
        return self.library.Image(image)

    def make_table(self, columns, rows):
        return self.library.Table(columns=list(columns), data=self.with_pictures(rows))

    def show_data(self, about, rows):
        self.log({"data": self.make_table(DATA, rows)}, 0)

    def show_results(self, run, answer, rows):
        if rows:
            self.log({"samples table": self.make_table(SAMPLES, rows)}, run.step)
        if hasattr(self.library, "Artifact"):  # older versions of trackio have no artifacts
            self.log_files(run, answer)

    def with_pictures(self, rows):
        return [[self.picture(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]

    def log_files(self, run, answer):
        """Logs the LoRA files as versions of one artifact: `epoch-N`, `best` and, as the newest, `last`."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", run.name)
        for file in run.files:
            artifact = self.library.Artifact(
                f"{name}-lora", type="lora", metadata={"step": file.step, "answer": answer.sentence}
            )
            for path in file.paths:
                artifact.add_file(str(path))
            alias = re.sub(r"epoch-0*(?=\d)", "epoch-", file.place) or "last"
            self.tracker.run.log_artifact(artifact, aliases=[alias])
            self.tracker.to_send += sum(path.stat().st_size for path in file.paths)


class Wandb(TableDashboard):
    """Plots metrics over the optimizer step, and keeps their best values in the run's summary."""

    def begin(self):
        run = self.tracker.run
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        for name, summary in SUMMARY.items():
            run.define_metric(name, step_metric="step", summary=summary)

    def step_values(self, step):
        return {"step": step}  # the x-axis of W&B's charts

    def picture(self, image):
        return self.library.Image(image, file_type="jpg")  # tables store PNG by default

    def show_pictures(self, name, prompt, samples, step):
        pictures = []
        for sample in samples:
            if sample.base is not None:
                pictures.append(self.library.Image(sample.base, caption=f"base, seed {sample.seed}: {prompt}"))
            caption = f"step {step}, seed {sample.seed}: {prompt}"
            pictures.append(self.library.Image(sample.image, caption=caption))
        self.log({name: pictures}, step)

    def show_results(self, run, answer, rows):
        self.tracker.run.summary.update(make_summary(answer))
        super().show_results(run, answer, rows)


class Trackio(TableDashboard):
    """Logs a panel for each sample picture, which shows the base model's picture on its left."""

    def make_table(self, columns, rows):
        import pandas

        return self.library.Table(dataframe=pandas.DataFrame(self.with_pictures(rows), columns=list(columns)))

    def show_pictures(self, name, prompt, samples, step):
        pairs = {
            f"{name} {sample.k}": self.library.Image(side_by_side(sample.base, sample.image), caption=prompt)
            for sample in samples
        }
        self.log(pairs, step)


class TensorBoard(Dashboard):
    """Logs pictures in panels, and tables as text."""

    def __init__(self, tracker):
        super().__init__(tracker)
        self.writer = tracker.writer

    def show_data(self, about, rows):
        lines = [f"{key}: {value}" for key, value in about["dataset"].items() if key not in ("shown", "notes")]
        lines += [" | ".join(map(str, row[1:])) for row in rows]
        self.writer.add_text("data", as_code_block(lines), 0)
        self.writer.add_text("command", as_code_block([about["command"]]), 0)
        sheet = np.concatenate([np.asarray(row[0].resize((128, 128))) for row in rows], axis=1)
        self.writer.add_image("data/pictures", sheet, 0, dataformats="HWC")

    def show_pictures(self, name, prompt, samples, step):
        white = None  # takes the place of a base picture that is missing when others are there
        if any(sample.base is not None for sample in samples):
            white = Image.new("RGB", samples[0].image.size, "white")
        pairs = [np.asarray(side_by_side(sample.base or white, sample.image)) for sample in samples]
        self.writer.add_images(name, np.stack(pairs), step, dataformats="NHWC")

    def show_results(self, run, answer, rows):
        self.writer.add_text("answer", answer.sentence, run.step)
        if rows:
            lines = [" | ".join(str(cell) for cell in row if not isinstance(cell, Image.Image)) for row in rows]
            self.writer.add_text("samples", as_code_block(lines), run.step)


DASHBOARDS = {"wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard}


def side_by_side(left: Image.Image | None, right: Image.Image) -> Image.Image:
    """Joins two pictures into one; without a left picture, returns the right one."""
    if left is None:
        return right.convert("RGB")
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def make_summary(answer: Any) -> dict[str, Any]:
    """Makes the entries of W&B's summary from an `Answer`."""
    summary = {
        "answer": answer.sentence,
        "best_step": answer.best_step,
        "gain_over_base_percent": None if answer.gain is None else round(answer.gain, 2),
        "drift": None if answer.drift is None else round(answer.drift, 4),
        "overfitting_since": answer.worse_since,
        "take": None if answer.take is None else answer.take.place or "last",
    }
    return {name: value for name, value in summary.items() if value is not None}


def as_code_block(lines: list[str]) -> str:
    """Formats lines as a Markdown code block."""
    return "\n".join(f"    {line}" for line in lines)

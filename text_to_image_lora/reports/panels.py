"""How each tracker shows what it is told of a run: W&B, trackio and TensorBoard have different panels for it."""

import importlib
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from .numbers import LOSS


# What W&B's summary holds of a number instead of its last value.
SUMMARY = {LOSS: "min", "train_loss": "min", "images_per_second": "mean", "peak_memory_gib": "max", "grad_norm": "max"}
SAMPLES = ("step", "prompt", "seed", "base", "LoRA", "change from the base", "relative loss, pictures held out")
DATA = ("picture", "captions", "concept", "size", "trained at", "source")


class Sample(NamedTuple):
    """A sample picture, number k of its prompt, beside the base's, which may not be there."""

    k: int
    seed: int
    base: Image.Image | None
    image: Image.Image


class Dashboard:
    """What one of the trackers shows of a run."""

    def __init__(self, tracker):
        self.tracker = tracker

    def begin(self):
        """What a tracker is told before the first number."""

    def of_row(self, step):
        """What a row holds beside its values."""
        return {}

    def log_numbers(self, values, step):
        self.tracker.log(values | self.of_row(step), step=step)


class WithTables(Dashboard):
    """What W&B and trackio show alike: tables with pictures in them, and files as versions of an artifact."""

    def __init__(self, tracker):
        super().__init__(tracker)
        self.library = importlib.import_module(tracker.name)

    def log(self, values, step):
        self.tracker.run.log(values | self.of_row(step), step=step)

    def picture(self, image):
        return self.library.Image(image)

    def show_data(self, about, rows):
        self.log({"data": self.table_of(DATA, rows)}, 0)

    def show_results(self, run, answer, rows):
        if rows:
            self.log({"samples table": self.table_of(SAMPLES, rows)}, run.step)
        if hasattr(self.library, "Artifact"):  # older trackio has none
            self.log_files(run, answer)

    def with_pictures(self, rows):
        return [[self.picture(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]

    def log_files(self, run, answer):
        """The LoRA files as versions of one artifact: `epoch-N`, `best`, and `last`, which comes last."""
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


class Wandb(WithTables):
    """Numbers over the optimizer's step, with the best values as the run's summary."""

    def begin(self):
        run = self.tracker.run
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        for name, summary in SUMMARY.items():
            run.define_metric(name, step_metric="step", summary=summary)

    def of_row(self, step):
        return {"step": step}  # what it draws them over; the others know it without

    def picture(self, image):
        return self.library.Image(image, file_type="jpg")  # a table would keep it as PNG

    def table_of(self, columns, rows):
        return self.library.Table(columns=list(columns), data=self.with_pictures(rows))

    def show_pictures(self, name, prompt, samples, step):
        pictures = []
        for sample in samples:
            if sample.base is not None:
                pictures.append(self.library.Image(sample.base, caption=f"base, seed {sample.seed}: {prompt}"))
            words = f"step {step}, seed {sample.seed}: {prompt}"
            pictures.append(self.library.Image(sample.image, caption=words))
        self.log({name: pictures}, step)

    def show_results(self, run, answer, rows):
        self.tracker.run.summary.update(summary_of(answer))
        super().show_results(run, answer, rows)


class Trackio(WithTables):
    """The same tables; a panel for each picture, with the base's in it."""

    def table_of(self, columns, rows):
        import pandas

        return self.library.Table(dataframe=pandas.DataFrame(self.with_pictures(rows), columns=list(columns)))

    def show_pictures(self, name, prompt, samples, step):
        pairs = {
            f"{name} {sample.k}": self.library.Image(side_by_side(sample.base, sample.image), caption=prompt)
            for sample in samples
        }
        self.log(pairs, step)


class TensorBoard(Dashboard):
    """Pictures in panels, and as text what it has no tables for."""

    def __init__(self, tracker):
        super().__init__(tracker)
        self.writer = tracker.writer

    def show_data(self, about, rows):
        lines = [f"{key}: {value}" for key, value in about["dataset"].items() if key not in ("shown", "notes")]
        lines += [" | ".join(map(str, row[1:])) for row in rows]
        self.writer.add_text("data", as_written(lines), 0)
        self.writer.add_text("command", as_written([about["command"]]), 0)
        sheet = np.concatenate([np.asarray(row[0].resize((128, 128))) for row in rows], axis=1)
        self.writer.add_image("data/pictures", sheet, 0, dataformats="HWC")

    def show_pictures(self, name, prompt, samples, step):
        white = None  # beside pictures that the base has not drawn, where it has drawn others
        if any(sample.base is not None for sample in samples):
            white = Image.new("RGB", samples[0].image.size, "white")
        pairs = [np.asarray(side_by_side(sample.base or white, sample.image)) for sample in samples]
        self.writer.add_images(name, np.stack(pairs), step, dataformats="NHWC")

    def show_results(self, run, answer, rows):
        self.writer.add_text("answer", answer.sentence, run.step)
        if rows:
            lines = [" | ".join(str(cell) for cell in row if not isinstance(cell, Image.Image)) for row in rows]
            self.writer.add_text("samples", as_written(lines), run.step)


DASHBOARDS = {"wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard}


def side_by_side(left, right):
    """Two pictures as one, or the right one alone where there is no left one."""
    if left is None:
        return right.convert("RGB")
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


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


def as_written(lines):
    """Lines as Markdown that shows them as they are."""
    return "\n".join(f"    {line}" for line in lines)

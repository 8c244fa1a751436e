"""A run as its output folder tells it: what it is, its numbers, its pictures, its LoRA files, and what they say of it."""

import json
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image

from ..errors import InputError
from . import about, stopping
from .numbers import FILE as METRICS
from .numbers import LOSS, Numbers, read_numbers


class Picture(NamedTuple):
    """A sample picture: which prompt, which of its seeds, where."""

    prompt: str
    seed: int | None  # None: of a run that didn't write it into its pictures
    path: Path


class Run(NamedTuple):
    """What is in an output folder."""

    folder: Path
    about: dict  # empty: of a run that was made without
    flags: dict  # of run.yaml
    settings: dict  # those, and what the others were settled to
    numbers: Numbers
    pictures: dict  # {step: {(prompt, seed, how many such before): Picture}}; k for the seed where it isn't known
    files: list  # of `LoraFile`

    @property
    def name(self):
        return self.folder.resolve().name

    @property
    def step(self):
        """The last step that is told of."""
        return self.numbers.last_step


class LoraFile(NamedTuple):
    """A LoRA ready for use: the folder's place in the run ("best", "epoch-0005", or "" for the last), step and files."""

    place: str
    step: int | None
    paths: list


def read_run(folder):
    """The `Run` in an output folder, finished or not; an `InputError` where there is none."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (METRICS, about.FILE)):  # before its first step, it has one
        raise InputError(f"{folder}: there is no run in it (no {METRICS}). Name a run's --output_dir, or a sweep's.")
    told, flags = _read_json(folder / about.FILE), {}
    if (folder / "run.yaml").is_file():
        flags = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    settings = told.get("settings", flags)
    return Run(folder, told, flags, settings, read_numbers(folder), read_pictures(folder), list(read_files(folder)))


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def step_of(folder):
    """The step of a validation's folder, `step-000100`."""
    return int(folder.name.partition("-")[2])


def read_pictures(folder):
    """{step: {(prompt, seed, how many such before): Picture}}: prompts may differ by their other settings alone."""
    found = {}
    for place in sorted(folder.glob("validation/step-*"), key=step_of):
        pictures = {}
        for path in sorted(place.glob("prompt-*.png")):
            with Image.open(path) as image:
                prompt, seed = str(image.info.get("prompt", "")), image.info.get("seed")
            seed = None if seed is None else int(seed)
            key = prompt, int(path.stem.rpartition("-")[2]) if seed is None else seed
            pictures[*key, sum(other[:2] == key for other in pictures)] = Picture(prompt, seed, path)
        if pictures:
            found[step_of(place)] = pictures
    return found


def read_files(folder):
    """The `LoraFile`s of a run: those of its epochs, the best, and the last."""
    from safetensors import safe_open

    from ..models import kohya
    from ..models.lora_file import WEIGHTS_NAME

    for place in [*sorted(path.name for path in folder.glob("epoch-*")), "best", ""]:
        path = folder / place / WEIGHTS_NAME
        if path.is_file():
            with safe_open(path, "np") as file:
                step = (file.metadata() or {}).get("ss_steps")
            step = None if step is None else int(step)
            kohyas = folder / place / kohya.file_name(folder, step if place else None)  # others' may lie there too
            yield LoraFile(place, step, [path, *([kohyas] if kohyas.is_file() else [])])


class Answer(NamedTuple):
    """What a run's reader wants to know first."""

    sentence: str
    best_step: int | None  # None: no step was better than the base, or there were no pictures to judge by
    gain: float | None  # how much lower the held-out loss of that step is than the base's, in percent
    worse_since: int | None  # overfitting since this step
    judged: bool  # whether pictures were held out
    take: LoraFile | None  # the file to take
    finished: bool


NOT_JUDGED = (
    "No pictures were held out, so nothing but the sample pictures tells which step was best: look for the one \
before they begin to look alike or lose what the prompt asks for. --validation_split 0.1 measures it."
)


def answer_of(run):
    """The `Answer` that a run's numbers and files give, while it goes on too."""
    last = next((file for file in run.files if file.place == ""), None)
    finished = last is not None and last.step in (run.step, None)
    last = last if finished else None
    judged = run.numbers.validations
    if not judged:
        return Answer(NOT_JUDGED, None, None, None, False, last, finished)
    newest = judged[-1]
    best_step, worse_since = newest.get("validation/best_step"), newest.get("validation/worse_since")
    of_steps = {row["step"]: row[LOSS] for row in judged}
    best_loss = newest.get("validation/best_relative_loss", of_steps.get(best_step, 1.0))
    waited = sum(row["step"] > (best_step or 0) for row in judged)
    sentence = stopping.sentence(newest["step"], best_step, best_loss, worse_since, waited, finished=finished)
    take = next((file for file in run.files if file.place == "best" and best_step is not None), None)
    gain = None if best_step is None else 100 * (1 - best_loss)
    return Answer(sentence[0].upper() + sentence[1:], best_step, gain, worse_since, True, take, finished)

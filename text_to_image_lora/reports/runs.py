"""Reads a run from its output folder: settings, metrics, sample pictures and LoRA files, and the answer they give."""

import functools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image, UnidentifiedImageError

from ..drawing.rows import SETTINGS, shown_options
from ..errors import InputError
from ..files import read_text, reason_of
from ..small_files import Values, load_yaml
from . import about, stopping
from .numbers import FILE as METRICS
from .numbers import LOSS, Numbers, read_numbers
from .read_about import REMEDY, read_about


logger = logging.getLogger(__name__)
OPTIONS = [field for field in SETTINGS if field not in ("prompt", "seed", "checkpoint")]  # of a sample picture


class SavedSample(NamedTuple):
    """A sample picture in a file."""

    prompt: str
    seed: int | None  # None: the file does not record it
    path: Path
    options: dict[str, str]  # {field of a drawing: words for people}, without prompt and seed


class LoraFile(NamedTuple):
    """The files of a LoRA that is ready for use."""

    place: str  # folder inside the output folder: "best", "epoch-0005", or "" for the final LoRA
    step: int | None
    paths: list[Path]


class RecordedRun(NamedTuple):
    """The contents of an output folder."""

    folder: Path
    about: dict  # empty if there is no about.json
    flags: dict  # from run.yaml
    settings: dict  # the flags with defaults resolved
    numbers: Numbers
    pictures: dict  # {step: {(prompt, seed or number, count of equal keys before): SavedSample}}
    files: list[LoraFile]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return self.numbers.last_step


def read_run(folder: str | Path) -> RecordedRun:
    """Reads the run in an output folder, whether it is finished or not; raises `InputError` if there is none."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (METRICS, about.FILE)):
        raise InputError(f"{folder}: there is no run in it (no {METRICS}). Pass a run's --output_dir, or a sweep's.")
    contents, flags = read_about(folder / about.FILE), _read_flags(folder / "run.yaml")
    settings = Values(contents.get("settings", flags), folder / about.FILE, REMEDY)
    for name, kind in (("early_stopping_patience", int), ("max_train_steps", int), ("max_drift", float)):
        settings.want(name, kind, None)
    numbers, pictures = read_numbers(folder), read_pictures(folder)
    return RecordedRun(folder, contents, flags, settings, numbers, pictures, list(read_files(folder)))


def _read_flags(path):
    """Returns the flags of a run, {} if there is no run.yaml."""
    if not path.is_file():
        return {}
    try:
        found = load_yaml(read_text(path))[1]
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: it can't be read as YAML ({reason_of(error)}). {REMEDY}") from error
    if not isinstance(found, dict | None):
        raise InputError(f"{path}: it must hold one flag per line. {REMEDY}")
    return {str(name): value for name, value in (found or {}).items()}


def step_of(folder: Path) -> int:
    """Returns the step of a folder of sample pictures, such as `step-000100`."""
    return int(folder.name.partition("-")[2])


def read_pictures(folder: Path) -> dict[int, dict]:
    """Reads {step: {(prompt, seed, count): SavedSample}}; `count` numbers prompts that differ in other options only.

    Damaged pictures are left out, with a line in the log.
    """
    found = {}
    places = [place for place in folder.glob("validation/step-*") if re.fullmatch(r"step-\d{1,15}", place.name)]
    for place in sorted(places, key=step_of):
        pictures = {}
        for path in sorted(place.glob("prompt-*.png")):
            if (info := read_info(path)) is None:
                continue
            prompt, seed = str(info.get("prompt", "")), info.get("seed")
            options = {field: info[field] for field in OPTIONS if info.get(field)}
            seed = int(str(seed)) if re.fullmatch(r"-?\d{1,20}", str(seed)) else None
            number = path.stem.rpartition("-")[2]
            key = prompt, (int(number) if number.isdecimal() else 0) if seed is None else seed
            pictures[*key, sum(other[:2] == key for other in pictures)] = SavedSample(
                prompt, seed, path, shown_options(options)
            )
        if pictures:
            found[step_of(place)] = pictures
    return found


def read_info(path: Path) -> dict[str, Any] | None:
    """Returns what a sample picture records; None, with a line in the log, if it is damaged."""
    return _read_info(str(path), path.stat().st_mtime_ns if path.is_file() else 0)


@functools.lru_cache(maxsize=4096)  # the page of a run is written many times, but a damaged picture is logged once
def _read_info(path, modified_at):
    try:
        if not modified_at:
            raise OSError("it is no regular file")
        with Image.open(path) as image:
            info = {name: image.info[name] for name in ("prompt", "seed", *OPTIONS) if name in image.info}
            image.verify()
            return info
    except Exception as error:  # Pillow's plugins raise many kinds of exceptions for broken files
        logger.warning(f"{path} is left out, because it can't be read as a picture ({_reason(path, error)})")
        return None


def open_sample(path: Path) -> Image.Image | None:
    """Returns a sample picture in RGB; None, with a line in the log, if it is damaged."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise many kinds of exceptions for broken files
        logger.warning(f"{path} is left out, because it can't be read as a picture ({_reason(path, error)})")
        return None


def _reason(path, error):
    return "it is no picture" if isinstance(error, UnidentifiedImageError) else reason_of(error)


def read_files(folder: Path) -> Iterator[LoraFile]:
    """Yields the LoRA files of a run: those of its epochs, the best, and the final one.

    Damaged files are left out, with a line in the log.
    """
    from safetensors import SafetensorError, safe_open

    from ..models import kohya
    from ..models.lora_file import WEIGHTS_NAME

    for place in [*sorted(path.name for path in folder.glob("epoch-*")), "best", ""]:
        path = folder / place / WEIGHTS_NAME
        if path.is_file():
            try:
                with safe_open(path, "np") as file:
                    step = (file.metadata() or {}).get("ss_steps")
            except (OSError, SafetensorError) as error:
                logger.warning(f"{path} is left out, because it is damaged ({reason_of(error)})")
                continue
            step = int(str(step)) if re.fullmatch(r"\d{1,15}", str(step)) else None
            kohyas = (
                folder / place / kohya.file_name(folder, step if place else None)
            )  # there may be files of other runs
            yield LoraFile(place, step, [path, *([kohyas] if kohyas.is_file() else [])])


class Answer(NamedTuple):
    """What a reader of the report wants to know first."""

    sentence: str
    best_step: int | None  # None: no step was better than the base model, or none was validated
    gain: float | None  # by how many percent the best step's held-out loss is below the base model's
    error: float | None  # standard error of the gain
    drift: float | None  # of the best step: the change from the base model for captions without the concept
    worse_since: int | None  # step since which the run overfits
    judged: bool  # whether a step was validated on held-out pictures
    waits: bool  # whether pictures were held out, but no step was validated yet
    take: LoraFile | None  # the recommended file
    finished: bool
    stopped_early: bool  # whether --early_stopping_patience ended the run


NOT_JUDGED = (
    "No pictures were held out, so only the sample pictures show which step was best: choose the last step before they \
start to look alike or to ignore the prompt. Train with --validation_split 0.1 to measure which step is best."
)


def make_answer(run: RecordedRun) -> Answer:
    """Makes the `Answer` from the metrics and files of a run that is finished or in progress."""
    last = next((file for file in run.files if file.place == ""), None)
    finished = last is not None and last.step in (run.step, None)
    last = last if finished else None
    judged = run.numbers.validations
    if not judged and not run.about.get("dataset", {}).get("validated"):
        return Answer(NOT_JUDGED, None, None, None, None, None, False, False, last, finished, False)
    newest: dict[str, Any] = judged[-1] if judged else {"step": 0}
    best_step, worse_since = newest.get("validation/best_step"), newest.get("validation/worse_since")
    losses = {row["step"]: row[LOSS] for row in judged}
    best_loss: Any = newest.get("validation/best_relative_loss", losses.get(best_step, 1.0))
    gain = 100 * (1 - best_loss)
    error = newest.get("validation/best_standard_error")
    error = None if error is None else 100 * error
    sure_step = newest.get("validation/sure_step", best_step if error is None else None)
    waited = sum(row["step"] > (best_step or 0) for row in judged)
    drift = newest.get("validation/best_drift")
    verdict = stopping.Verdict(
        newest["step"], best_step, gain, error, sure_step, worse_since, waited, drift, run.settings.get("max_drift")
    )
    sentence = stopping.describe(verdict, finished=finished)
    sentence = sentence[0].upper() + sentence[1:]
    patience, num_steps = run.settings.get("early_stopping_patience"), run.settings.get("max_train_steps")
    stopped_early = False
    if finished and patience and num_steps and run.step < num_steps and waited >= patience:
        stopped_early = True
        why = stopping.describe_early_stop(run.step, num_steps, patience)
        sentence = f"{sentence} The run {why}"
    take = next((file for file in run.files if file.place == "best" and best_step is not None), None)
    waits = best_step is None and newest["step"] == 0
    gain = None if best_step is None else gain
    return Answer(
        sentence,
        best_step,
        gain,
        error,
        drift,
        verdict.overfits_since,
        not waits,
        waits,
        take,
        finished,
        stopped_early,
    )

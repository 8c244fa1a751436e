"""The settings that may differ between pictures: by a flag, by an option after a prompt, or on an axis of a grid. Needs no torch."""

import argparse
import contextlib
import difflib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import counted
from ..models.samplers import SAMPLERS


def number(
    kind: type, least: float = -math.inf, most: float = math.inf, multiple_of: int | None = None
) -> Callable[[str], Any]:
    """Returns an argparse type that accepts a finite number within bounds."""
    wish = "a whole number" if kind is int else "a finite number"
    if multiple_of:
        wish += f", a multiple of {multiple_of}" + (f", from {least} to {most}" if math.isfinite(most) else "")
    elif math.isfinite(most):
        wish = f"a {'whole ' if kind is int else ''}number from {least} to {most}"
    elif math.isfinite(least):
        wish += f", {least} or more"

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and least <= value <= most and not (multiple_of and value % multiple_of):
                return value
        raise argparse.ArgumentTypeError(f"{text}: it must be {wish}.")

    return parse


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the most similar of some names."""
    return difflib.get_close_matches(name, names, 1, cutoff=0)[0]


def sampler_name(text: str) -> str:
    """The argparse type of a name in `SAMPLERS`."""
    if text in SAMPLERS:
        return text
    listed = ", ".join(SAMPLERS)
    message = f"invalid choice: {text!r}. Did you mean {nearest(text, SAMPLERS)}? There are {listed}."
    raise argparse.ArgumentTypeError(message)


SEEDS = (-(2**63), 2**64 - 1)  # those of torch.Generator
MOST_SIDE = 16384  # pixels
MOST_BATCH = 1024  # pictures that are drawn at once
MOST_SCALE = 1000  # of the guidance and of strengths, up or down; far beyond it, pictures are NaN
MOST_STEPS = max(sampler.max_steps for sampler in SAMPLERS.values())


class Setting(NamedTuple):
    """A setting that may differ between pictures."""

    short: str  # its name in grids and after prompts, where the name of the flag is accepted too
    letter: str | None  # kohya's name of the option after a prompt
    parse: Callable  # parses a value; raises argparse.ArgumentTypeError
    label: str | None  # of its values on a sheet; None: it can't be an axis of a grid
    needs: str | None = None  # the flag that it depends on


SETTINGS = {  # {field of a drawing, which is also the flag's name: row}
    "prompt": Setting("prompt", None, str, "{}"),
    "negative_prompt": Setting("negative", "n", str, "without {}"),
    "seed": Setting("seed", "d", number(int, *SEEDS), "seed {}"),
    "num_inference_steps": Setting("steps", "s", number(int, 1, MOST_STEPS), "{} steps"),
    "guidance_scale": Setting("guidance", "l", number(float, -MOST_SCALE, MOST_SCALE), "guidance {}"),
    "scheduler": Setting("scheduler", None, sampler_name, "{}"),
    "height": Setting("height", "h", number(int, 8, MOST_SIDE, multiple_of=8), None),
    "width": Setting("width", "w", number(int, 8, MOST_SIDE, multiple_of=8), None),
    "strength": Setting("strength", None, number(float, 0, 1), "strength {}", needs="image"),
    "lora_scale": Setting("lora_scale", None, number(float, -MOST_SCALE, MOST_SCALE), "LoRA at {}", needs="lora"),
    "controlnet_scale": Setting(
        "controlnet_scale", None, number(float, -MOST_SCALE, MOST_SCALE), "ControlNet at {}", needs="controlnet"
    ),
    "checkpoint": Setting("checkpoint", None, str, "{}"),
}
AXES = {name: field for field, row in SETTINGS.items() if row.label for name in (field, row.short)}
OPTIONS_OF_PROMPTS = {  # {option after a prompt: field}
    name: field
    for field, row in SETTINGS.items()
    if field not in ("prompt", "checkpoint")
    for name in (field, row.short, row.letter)
    if name
}


def shown_options(options: dict[str, Any]) -> dict[str, str]:
    """Returns {field: words for people}, such as "guidance 9", for options of a prompt {field of a drawing: value}."""
    labels = {field: SETTINGS[field].label or f"{SETTINGS[field].short} {{}}" for field in options}
    return {
        field: labels[field].format(f"{value:g}" if isinstance(value, float) else value)
        for field, value in options.items()
    }


class Lora(NamedTuple):
    """A LoRA file and its scale."""

    given: str  # on the command line, without the scale
    path: Path  # a file, or the folder of a LoRA in peft's dialect
    scale: float
    adapter: str  # its name in the pipeline
    shapes: dict[str, tuple[int, ...]]  # of its tensors
    header: dict[str, str]
    fixed: bool = False  # the scale was given with the path, so --lora_scale does not apply
    in_training: bool = False  # the weights are those of a training step, which the file may not contain

    @property
    def files(self) -> list[Path]:
        """The files that contain the weights: one, or one for each component of a folder in peft's dialect."""
        from ..models.dialects import find_weight_files  # here, because --help does not need the dialects' patterns

        return [file for file, _ in find_weight_files(self.path)]


class Drawing(NamedTuple):
    """A picture to draw: the name of its file, and every setting that may differ between pictures."""

    stem: str = ""
    prompt: str = ""
    seed: int = 0
    loras: tuple[Lora, ...] = ()
    checkpoint: Lora | None = None  # an additional LoRA, of a grid over checkpoints
    lora_scale: float = 1.0  # of the LoRAs that are given without a scale
    negative_prompt: str | None = None
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    scheduler: str | None = None
    clip_skip: int = 0
    height: int | None = (
        None  # in pixels; None: the native size of the model, or the aspect ratio of the given picture
    )
    width: int | None = None
    strength: float | None = None
    controlnet_scale: float = 1.0

    def scaled_loras(self) -> tuple[Lora, ...]:
        """All LoRAs, each with the scale that applies to it."""
        loras = (*self.loras, *([self.checkpoint] if self.checkpoint else ()))
        return tuple(lora if lora.fixed else lora._replace(scale=self.lora_scale) for lora in loras)

    def active_loras(self) -> tuple[Lora, ...]:
        """The LoRAs whose scale is not 0; without any, the picture is that of the base model, bit for bit."""
        return tuple(lora for lora in self.scaled_loras() if lora.scale)


def check_drawing(drawing: Drawing) -> None:
    """Raises `InputError` if the seed is out of range, or if the sampler can't do so many steps or can't do any of them."""
    steps, strength = drawing.num_inference_steps, drawing.strength
    name = drawing.scheduler or "dpm++"  # which usually replaces the base model's, see `make_sampler`
    most = SAMPLERS[name].max_steps
    if steps > most:
        raise InputError(f"{counted(steps, 'step')}: the sampler {name} does at most {most} steps.")
    if strength is not None and int(steps * strength) < 1:
        remedy = f"Pass a strength of {1 / steps:.2g} or more, or more steps."
        raise InputError(f"strength {strength:g} runs none of the {steps} steps. {remedy}")
    if not SEEDS[0] <= drawing.seed <= SEEDS[1]:
        raise InputError(f"seed {drawing.seed}: the seed of every picture must be from {SEEDS[0]} to {SEEDS[1]}.")

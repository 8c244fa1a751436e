"""What a picture can have of its own: by a flag, by an option behind its prompt, or as a place in a grid."""

import argparse
import contextlib
import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

from ..models.samplers import SAMPLERS


def number(kind, least=-math.inf, most=math.inf, multiple_of=None):
    """An argparse type: a finite number within bounds."""
    wish = "a whole number" if kind is int else "a finite number"
    if multiple_of:
        wish += f", a multiple of {multiple_of}"
    elif math.isfinite(most):
        wish = f"a number from {least} to {most}"
    elif math.isfinite(least):
        wish += f", {least} or more"

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and least <= value <= most and not (multiple_of and value % multiple_of):
                return value
        raise argparse.ArgumentTypeError(f"{text}: it must be {wish}.")

    return parse


def nearest(name, names):
    """The most similar of some names."""
    return difflib.get_close_matches(name, names, 1, cutoff=0)[0]


def sampler_name(text):
    """An argparse type: a name of `SAMPLERS`."""
    if text in SAMPLERS:
        return text
    listed = ", ".join(SAMPLERS)
    message = f"invalid choice: {text!r}. Did you mean {nearest(text, SAMPLERS)}? There are {listed}."
    raise argparse.ArgumentTypeError(message)


class Setting(NamedTuple):
    """Something that a picture can have of its own."""

    short: str  # its name in grids and behind prompts; the flag's name is accepted too
    letter: str | None  # kohya's option behind a prompt
    parse: Callable  # makes the value of a text; raises argparse.ArgumentTypeError
    label: str | None  # on a sheet; None: it can't be an axis of a grid
    needs: str | None = None  # a flag without which it has no meaning


SETTINGS = {  # {field of a drawing, which is also the flag's name: row}
    "prompt": Setting("prompt", None, str, "{}"),
    "negative_prompt": Setting("negative", "n", str, "without {}"),
    "seed": Setting("seed", "d", number(int), "seed {}"),
    "num_inference_steps": Setting("steps", "s", number(int, least=1), "{} steps"),
    "guidance_scale": Setting("guidance", "l", number(float), "guidance {}"),
    "scheduler": Setting("scheduler", None, sampler_name, "{}"),
    "height": Setting("height", "h", number(int, least=8, multiple_of=8), None),
    "width": Setting("width", "w", number(int, least=8, multiple_of=8), None),
    "strength": Setting("strength", None, number(float, 0, 1), "strength {}", needs="image"),
    "lora_scale": Setting("lora_scale", None, number(float), "LoRA at {}", needs="lora"),
    "controlnet_scale": Setting("controlnet_scale", None, number(float), "ControlNet at {}", needs="controlnet"),
    "checkpoint": Setting("checkpoint", None, str, "{}"),
}
AXES = {name: field for field, row in SETTINGS.items() if row.label for name in (field, row.short)}
OPTIONS_OF_PROMPTS = {  # {option behind a prompt: field}
    name: field
    for field, row in SETTINGS.items()
    if field not in ("prompt", "checkpoint")
    for name in (field, row.short, row.letter)
    if name
}

"""The optimizers by name. Their options are checked before any model is loaded."""

import ast
import difflib
import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import InputError


class Row(NamedTuple):
    """An optimizer of another library."""

    module: str
    class_name: str
    changes: dict[str, Any]  # options that differ from the defaults of the class
    package: str  # to install
    bytes_per_weight: int  # of the optimizer's state
    elementwise: bool  # whether the shape and size of tensors do not matter


OPTIMIZERS = {
    "adamw": Row("torch.optim", "AdamW", {}, "torch", 8, elementwise=True),
    "adamw8bit": Row("bitsandbytes.optim", "AdamW8bit", {}, "bitsandbytes", 2, elementwise=False),
    # Mishchenko and Defazio, 2023, https://arxiv.org/abs/2306.06101: finds the step size itself; its learning rate is 1.
    # With the default d0 of 1e-6, a LoRA, whose B is 0, hardly changes in its first 50 steps.
    "prodigy": Row(
        "prodigyopt", "Prodigy", {"use_bias_correction": True, "d0": 1e-5}, "prodigyopt", 16, elementwise=True
    ),
    # Defazio et al., 2024, https://arxiv.org/abs/2405.15682: needs no schedule
    "schedulefree": Row(
        "schedulefree", "AdamWScheduleFree", {"foreach": False}, "schedulefree", 8, elementwise=True
    ),
    # Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235; with --learning_rate instead of a relative step size
    "adafactor": Row(
        "transformers", "Adafactor", {"scale_parameter": False, "relative_step": False}, "transformers", 0,
        elementwise=False,
    ),
}  # fmt: skip
RESERVED = ("self", "params", "lr")
UNSUPPORTED = ("capturable", "differentiable")  # the training loop neither captures nor differentiates a step


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Parses words such as `d_coef=0.5`, whose values are Python literals, `true`, `false` or strings."""
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--optimizer_args {word}: write key=value, such as weight_decay=0.1")
        try:
            options[key] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def check_optimizer(name: str, words: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Returns the optimizer's class (None for AdamW without options) and the options in `words`.

    Raises `InputError` if the optimizer is not installed or does not have an option.
    """
    row = OPTIMIZERS[name]
    options = parse_options(words)
    if not options and name == "adamw":
        return None, {}  # avoids an import of torch
    try:
        optimizer_class = getattr(importlib.import_module(row.module), row.class_name)
    except ImportError as error:
        raise InputError(f"--optimizer {name} needs {row.package}. Run: pip install {row.package}") from error
    parameters = inspect.signature(optimizer_class.__init__).parameters
    known = [key for key in parameters if key not in RESERVED]
    for key, value in options.items():
        if key not in known:
            similar = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {similar[0]}?" if similar else f"It has: {', '.join(known)}."
            raise InputError(f"--optimizer_args {key}: {name} has no such option. {hint}")
        if key in UNSUPPORTED:
            raise InputError(f"--optimizer_args {key}: the training loop does not support this option. Leave it out.")
        check_value(key, value, parameters[key].default)
    try_options(name, optimizer_class, row.changes | options)
    return optimizer_class, options


def check_value(key: str, value: Any, default: Any) -> None:
    """Raises `InputError` if the value of an option is of another kind or length than its default."""

    def is_number(value):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if isinstance(default, tuple):
        right = isinstance(value, tuple | list) and len(value) == len(default) and all(map(is_number, value))
    elif isinstance(default, bool):
        right = isinstance(value, bool)
    elif isinstance(default, int | float):
        right = is_number(value)
    else:
        right = value is None or isinstance(value, bool) or is_number(value)
    if not right:
        written = str(value).replace(" ", "")
        example = "true or 0.5" if default is None else str(default).replace(" ", "")
        quoted = f' (quoted: "{key}={example}")' if isinstance(default, tuple) else ""
        raise InputError(f"--optimizer_args {key}={written}: write a value such as {example}{quoted}.")


def try_options(name: str, optimizer_class: Any, options: dict[str, Any]) -> None:
    """Creates an optimizer of a single weight; raises `InputError` if the options are out of their bounds."""
    import torch

    try:
        optimizer_class([torch.nn.Parameter(torch.zeros(1))], lr=1.0, **options)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise InputError(
            f"--optimizer {name}: {str(error) or type(error).__name__}. Check --optimizer_args."
        ) from error

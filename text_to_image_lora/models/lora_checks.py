"""Checks a LoRA before anything heavy: its dialect, its family, and the types and shapes of its tensors. Needs no torch."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from .dialects import (
    CONVERT,
    PICKLES,
    REMEDY,
    find_dialect,
    find_weight_files,
    likely_dialect,
    open_safetensors,
    parse_key,
)
from .families import family_by_width


AGAIN = "It is damaged or not a LoRA of Stable Diffusion: get the file again."
# Types as safetensors and torch name them.
FLOAT = re.compile(r"(torch\.)?b?f(loat)?\d", re.IGNORECASE)
WHOLE = re.compile(r"(torch\.)?u?i(nt)?\d|u\d", re.IGNORECASE)


class TensorFacts(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: str  # such as F32 or torch.float32
    shape: tuple[int, ...]


def facts_of(file: Any) -> dict[str, TensorFacts]:
    """Returns {key: `TensorFacts`} of an open safetensors file."""
    slices = {key: file.get_slice(key) for key in sorted(file.keys())}
    return {key: TensorFacts(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}


def check_tensors(name: str | Path, facts: Mapping[str, TensorFacts], component: str | None = None) -> None:
    """Raises `InputError` for tensors of wrong types or shapes, or if two keys mean the same tensor.

    Keys that mean nothing are left to `find_dialect`. `name` is the file, as in messages; `component` is that of `parse_key`.
    """
    places, dialect = {}, likely_dialect(facts)
    for key, (dtype, shape) in facts.items():
        place = parse_key(key, dialect, component)
        if place is None:
            continue
        if place in places:
            raise InputError(f"{name}: {places[place]} and {key} mean the same tensor. {AGAIN}")
        places[place] = key
        if place[2] == "alpha":
            if not (FLOAT.match(dtype) or WHOLE.match(dtype)):
                raise InputError(f"{name}: {key} is {dtype} instead of a real number. {AGAIN}")
            if math.prod(shape) != 1:
                raise InputError(f"{name}: {key} has the shape {list(shape)}, but must be a single number. {AGAIN}")
            continue
        if not FLOAT.match(dtype):
            raise InputError(f"{name}: {key} holds {dtype} instead of floating-point numbers. {AGAIN}")
        if place[2] in ("lora_A.weight", "lora_B.weight") and (len(shape) not in (2, 4) or 0 in shape):
            kinds = "but the factors of a LoRA are matrices or convolutions"
            raise InputError(f"{name}: {key} has the shape {list(shape)}, {kinds}. {AGAIN}")


def check_lora(path: str | Path) -> str:
    """Returns the dialect of a LoRA by its keys, without torch; raises `InputError` if it is not a LoRA or damaged."""
    dialect = ""
    for file, component in find_weight_files(path):
        if file.suffix.lower() in PICKLES and file.is_file():
            raise InputError(f"{file}: {CONVERT}")
        try:
            with open_safetensors(file, "np") as tensors:
                facts = facts_of(tensors)
            dialect = find_dialect(facts)
        except InputError as error:
            raise InputError(f"{file}: {error} {REMEDY}") from error
        check_tensors(file, facts, component)
    return dialect


def check_family(path: str | Path, base: Any) -> None:
    """Raises `InputError` if the shapes of a LoRA show that its family is not that of the `BaseModel`."""
    pattern = re.compile(r".*attn2[._](processor\.)?to_[kv].*\b(lora_A|lora_down|down)\.weight")
    for file, _ in find_weight_files(path):
        with open_safetensors(file, "np") as tensors:
            facts = facts_of(tensors)
        widths = {shape[1] for key, (_, shape) in facts.items() if pattern.fullmatch(key)}
        found = filter(None, map(family_by_width, widths - {base.cross_attention_dim}))
        if (family := next(found, None)) is not None:
            raise InputError(
                f"{path}: it is a LoRA of {family.name}, but {base.source} is of {base.family.name}. Use a base "
                "model of the LoRA's family, or another LoRA."
            )

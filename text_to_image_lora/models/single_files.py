"""What a base model in a single file says by itself, and how an old one is read without running its code."""

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..files import reason_of
from .families import FAMILIES, Family, all_supported


class SingleFile(NamedTuple):
    """What a single file says by the names of its weights alone."""

    family: Family | None  # None: they can't be read, or say nothing
    scheduler_changes: dict


# Of the original code's names those that only other models have.
OTHER_SINGLE_FILES = {
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.",
    "Flux": ("double_blocks.", "model.diffusion_model.double_blocks."),
    "Stable Diffusion XL's refiner": "conditioner.embedders.0.model.",
}


def look_into(path: Path) -> SingleFile:
    """The `SingleFile` of a path; `InputError` for one of another family. Nothing of a .ckpt is told without torch."""
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() != ".safetensors":
        return SingleFile(None, {})
    try:
        with safe_open(path, "np") as file:
            keys = set(file.keys())
    except (OSError, SafetensorError):  # what is wrong with it is told where it is loaded
        return SingleFile(None, {})
    for name, start in OTHER_SINGLE_FILES.items():
        if any(key.startswith(start) for key in keys):
            raise InputError(f"{path}: it is a model of {name}, which is not supported; supported: {all_supported()}.")
    found = (row for row in FAMILIES if any(key.startswith(row.single_file_key) for key in keys))
    # Keys without a meaning for the model, by which its maker says how it was trained.
    changes = {"prediction_type": "v_prediction"} if "v_pred" in keys else {}
    return SingleFile(next(found, None), changes | ({"rescale_betas_zero_snr": True} if "ztsnr" in keys else {}))


# What training programs leave in a .ckpt beside the weights, and loading does not need.
HARMLESS = re.compile(r"(pytorch_lightning|lightning)\..+|numpy\.(_?core\.multiarray\.scalar|dtype)")


class Inert:
    """Stands in for a class or function that a .ckpt names and loading does not need; takes anything, does nothing."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


@contextlib.contextmanager
def safe_to_read(path: str | Path) -> Iterator[None]:
    """Inside, `weights_only` loading reads the single file: stand-ins take the place of what is `HARMLESS` in it.

    No code that a file brings is ever run. Raises `InputError` for a checkpoint of torch that names anything else, and
    for one that is broken. Files of safetensors hold nothing but weights.
    """
    import torch

    if Path(path).suffix.lower() == ".safetensors":
        yield
        return
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = f"it is not a whole torch checkpoint ({reason_of(error)})"
        raise InputError(f"{path}: {reason}. Get the model as .safetensors.") from error
    if refused := [name for name in names if not HARMLESS.fullmatch(name)]:
        raise InputError(
            f"{path}: it carries more than weights ({', '.join(refused[:3])}), and unpickling that could run code. Get the "
            "model as .safetensors."
        )
    with torch.serialization.safe_globals([(Inert, name) for name in names]):
        yield

"""Detects the family and settings of a single-file base model, and loads .ckpt files without running their code."""

import contextlib
import pickle
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..files import check_regular, reason_of
from .families import FAMILIES, Family, all_supported
from .not_a_base import check_tensors
from .weights_files import check_dtypes_of_file


class SingleFile(NamedTuple):
    """The properties of a single-file model that follow from the names of its weights."""

    family: Family | None  # None: unknown, or the file cannot be read
    scheduler_changes: dict  # overrides of the pipeline's scheduler configuration
    has_vae: bool = True  # also if unknown


# Prefixes of weight names, in the original code's naming, that only unsupported models have.
OTHER_SINGLE_FILES = {
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.",
    "Flux": ("double_blocks.", "model.diffusion_model.double_blocks."),
    "Stable Diffusion XL's refiner": "conditioner.embedders.0.model.",
}

VAE_PREFIXES = ("first_stage_model.", "vae.")  # diffusers' LDM_VAE_KEYS


def look_into(path: Path) -> SingleFile:
    """Returns the `SingleFile` of a path; raises `InputError` if it is no base model of a supported family.

    A .ckpt file is not inspected, because that requires torch.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() != ".safetensors":
        return SingleFile(None, {})
    try:
        with safe_open(path, "np") as file:
            keys = set(file.keys())
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(keys)}
    except (OSError, SafetensorError):  # loading the file reports the error
        return SingleFile(None, {})
    for name, start in OTHER_SINGLE_FILES.items():
        if any(key.startswith(start) for key in keys):
            raise InputError(f"{path}: it is a model of {name}, which is not supported; supported: {all_supported()}.")
    check_tensors(str(path), shapes)
    check_dtypes_of_file(path)
    found = (row for row in FAMILIES if any(key.startswith(row.single_file_key) for key in keys))
    # These keys hold no weights: the author of a model adds them to record how it was trained.
    changes = {"prediction_type": "v_prediction"} if "v_pred" in keys else {}
    changes |= {"rescale_betas_zero_snr": True} if "ztsnr" in keys else {}
    return SingleFile(next(found, None), changes, any(key.startswith(VAE_PREFIXES) for key in keys))


# Objects that training programs store in a .ckpt beside the weights, and that loading does not need.
HARMLESS = re.compile(r"(pytorch_lightning|lightning)\..+|numpy\.(_?core\.multiarray\.scalar|dtype)")


class Inert:
    """Replaces a class or function that a .ckpt names and loading does not need; accepts any arguments and does nothing."""

    def __init__(self, *ignored):
        pass

    __setstate__ = __init__


@contextlib.contextmanager
def safe_to_read(path: str | Path) -> Iterator[str]:
    """Yields a path under which diffusers can load a single file, with `Inert` for the `HARMLESS` objects of a checkpoint.

    Code in the file is never run. Raises `InputError` if a torch checkpoint names any other object, or is damaged.
    A .safetensors file contains nothing but weights.
    """
    import torch

    check_regular(path)
    if Path(path).suffix.lower() == ".safetensors":
        with _in_small_letters(Path(path)) as readable:
            yield readable
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
        yield str(path)


@contextlib.contextmanager
def _in_small_letters(path):
    """Yields the path of a link that ends in .safetensors, because diffusers would unpickle a file named X.SAFETENSORS."""
    if path.suffix == ".safetensors":
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"{path.stem}.safetensors")
        try:
            link.symlink_to(path.absolute())
        except OSError as error:  # Windows allows links only to some users
            raise InputError(f"{path}: rename the file so that it ends in .safetensors in small letters.") from error
        yield str(link)

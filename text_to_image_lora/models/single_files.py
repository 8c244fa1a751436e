"""What a base model in a single file says by itself, and how an old one is read without running its code."""

import contextlib
from typing import NamedTuple

from ..errors import InputError
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


def look_into(path):
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


@contextlib.contextmanager
def lightning_stubs():
    """Lets `weights_only` loading pass over the Lightning callbacks that old `.ckpt` files hold.

    The stand-ins carry no behaviour: a checkpoint can name them, and nothing of Lightning's is imported or run.
    """
    import torch

    names = ("pytorch_lightning.callbacks.model_checkpoint", "lightning.pytorch.callbacks.model_checkpoint")
    with torch.serialization.safe_globals([type("ModelCheckpoint", (), {"__module__": name}) for name in names]):
        yield

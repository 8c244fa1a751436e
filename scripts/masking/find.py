"""Which models make masks, and what is checked of them before they are loaded, for `mask.py`."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import printable

from ..annotating.models import OTHER_MODEL, Accepted, check_config, check_weights, read_config


DEFAULT_MODEL = "CIDAS/clipseg-rd64-refined"
MODEL_TYPE = "clipseg"


class Model(NamedTuple):
    """A CLIPSeg model on this disk."""

    name: str  # as the user named it
    folder: Path


def check_model(name: str, folder: Path, files: Iterable[str]) -> Model:
    """Checks the configuration of a model, of which `files` exist, and returns it; raises `InputError`."""
    name, files = printable(name), {*files}
    if "config.json" not in files:
        raise InputError(f"{name}: it has no config.json, so it is not a model of transformers. {OTHER_MODEL}")
    config = read_config(name, folder)
    model_type = config.want("model_type", str, "")
    if model_type != MODEL_TYPE:
        raise InputError(
            f"{name}: its model_type is '{model_type[:60]}', and masks are made by models of the type '{MODEL_TYPE}'. "
            f"{OTHER_MODEL}"
        )
    check_config(config)
    check_weights(name, files)
    return Model(name, folder)


ACCEPTED = Accepted(check_model)

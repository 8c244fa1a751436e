"""Which models write captions, and what is checked of them before they are loaded, for `caption.py`."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import printable
from text_to_image_lora.small_files import read_json

from ..annotating.models import OTHER_MODEL, Accepted, check_config, check_weights, read_config
from .kinds import Kind, find_kind


DEFAULT_MODEL = "Salesforce/blip-image-captioning-base"
# The main branch of this repository has pickled weights only; this is the pull request by the hub's converter.
REVISIONS = {DEFAULT_MODEL: "refs/pr/38"}
TAGGER_FILES = ("model.onnx", "selected_tags.csv")
RUNTIME = "pip install -r requirements-tagger.txt"


class Model(NamedTuple):
    """A captioning model on this disk."""

    name: str  # as the user named it
    folder: Path
    kind: Kind | None  # None for a tagger
    config: dict[str, Any]


def check_model(name: str, folder: Path, files: Iterable[str]) -> Model:
    """Checks the configuration of a model, of which `files` exist, and returns it; raises `InputError`."""
    name, files = printable(name), {*files}
    if {*TAGGER_FILES} <= files:
        if importlib.util.find_spec("onnxruntime") is None:
            raise InputError(f"{name}: taggers need the package onnxruntime. Install it with `{RUNTIME}`.")
        return Model(name, folder, None, {})
    if "config.json" not in files:
        raise InputError(
            f"{name}: it has neither a config.json (a model of transformers) nor model.onnx and selected_tags.csv (a tagger). "
            f"{OTHER_MODEL}"
        )
    config = read_config(name, folder)
    kind = _kind_of(name, folder, config, files)
    check_config(config)
    check_weights(name, files)
    return Model(name, folder, kind, dict(config))


ACCEPTED = Accepted(check_model, REVISIONS, TAGGER_FILES)


def _kind_of(name, folder, config, files):
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    model_type = config.want("model_type", str, "")
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        reason = "the installed transformers has no model that describes pictures of this type"
        if "auto_map" in config:
            reason = "it needs code from its repository, which is never run"
        raise InputError(f"{name}: its model_type is '{model_type[:60]}'; {reason}. {OTHER_MODEL}")
    kind = find_kind(model_type, has_chat_template=_has_chat_template(folder, files))
    if kind is None:
        raise InputError(
            f"{name}: it is a model of type '{model_type}' without a chat template, so it is not known how to ask it. "
            "Pass its version for instructions (-Instruct, -it) as --model."
        )
    return kind


def _has_chat_template(folder, files):
    if {"chat_template.jinja", "chat_template.json"} & files:
        return True
    names = [name for name in ("processor_config.json", "tokenizer_config.json") if name in files]
    return any(read_json(folder / name, remedy=OTHER_MODEL).get("chat_template") for name in names)

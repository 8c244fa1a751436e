"""Finds a captioning model: in a folder, in the hub's cache, or on the hub, for `caption.py`.

Nothing is loaded here. From the hub come only configurations, vocabularies, safetensors or ONNX files, all of the
repository's first level; code and pickled weights are never downloaded.
"""

import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import format_bytes, printable, reason_of
from text_to_image_lora.hub import ANSWER_SECONDS, HUB_SECONDS, is_hub_id, retry_timeouts
from text_to_image_lora.models.configurations import check_no_code
from text_to_image_lora.small_files import Values, read_json

from .kinds import Kind, find_kind


DEFAULT_MODEL = "Salesforce/blip-image-captioning-base"
# The main branch of this repository has pickled weights only; this is the pull request by the hub's converter.
REVISIONS = {DEFAULT_MODEL: "refs/pr/38"}
TAGGER_FILES = ("model.onnx", "selected_tags.csv")
PROCESSOR_FILES = {"preprocessor_config.json", "processor_config.json"}
VOCABULARIES = {"tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"}
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
PICKLED = re.compile(r"(pytorch_model.*\.bin|.*\.(ckpt|pt|pth|h5|msgpack))")
SMALL = re.compile(r"[^/]+\.(json|jinja|txt|model)")
OTHER_MODEL = "Pass another --model."
RUNTIME = "pip install -r requirements-tagger.txt"


class Model(NamedTuple):
    """A captioning model on this disk."""

    name: str  # as the user named it
    folder: Path
    kind: Kind | None  # None for a tagger
    config: dict[str, Any]


def find_model(name: str, revision: str | None) -> Model:
    """Finds a model by the path of its folder or by its hub id, downloads it if needed, and checks it.

    Raises `InputError` if there is no such model, or if it can't be used.
    """
    if os.path.isdir(name):
        if revision is not None:
            raise InputError(
                f"--revision {revision}: a folder has no revisions. Leave the flag out, or pass a hub id."
            )
        return check_model(name, Path(name), os.listdir(name))
    if not is_hub_id(name):
        raise InputError(f"{name}: there is no such folder. Pass a folder or the hub id of a model as --model.")
    revision = revision or REVISIONS.get(name)
    if (cached := _cached_folder(name, revision)) is not None:
        return check_model(name, cached, os.listdir(cached))
    return _download(name, revision)


def _cached_folder(name, revision):
    """Returns the folder of a model in the hub's cache if what is needed is there, or None."""
    from huggingface_hub import try_to_load_from_cache

    for first in (TAGGER_FILES[0], "config.json"):
        found = try_to_load_from_cache(name, first, revision=revision)
        if not isinstance(found, str):
            continue
        folder, names = Path(found).parent, {*os.listdir(Path(found).parent)}
        if {*TAGGER_FILES} <= names:
            return folder
        index, wanted = folder / "model.safetensors.index.json", {"model.safetensors"}
        if index.exists():
            wanted = {*read_json(index).want("weight_map", dict).values()}
        # Another program may have downloaded a part, such as the weights without the vocabulary.
        if wanted <= names and names & PROCESSOR_FILES and names & VOCABULARIES:
            return folder
    return None


def _download(name, revision):
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{name}: it is not in the hub's cache, and HF_HUB_OFFLINE forbids downloads. {OTHER_MODEL}")
    try:
        info: Any = retry_timeouts(
            lambda: HfApi().model_info(name, revision=revision, files_metadata=True, timeout=HUB_SECONDS),
            ANSWER_SECONDS,
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = choose_files(name, sizes)
        small = [file for file in wanted if SMALL.fullmatch(file)]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=small))
        check_model(name, folder, sizes)  # before the large files
        total = format_bytes(sum(sizes[file] for file in wanted))
        print(f"{name}: licence {licence_of(info.card_data)}, {total} to download", flush=True)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except InputError:
        raise
    except Exception as error:  # httpx's errors have no class in common with those of the hub's client
        raise InputError(
            f"{name}: it can't be downloaded from the hub ({reason_of(error)}). Check the name and the connection, or pass a "
            "folder as --model."
        ) from error
    return check_model(name, folder, sizes)


def licence_of(card_data: Any) -> str:
    """Returns the licence that the card of a model names."""
    licence = getattr(card_data, "license", None)
    if licence == "other":
        licence = getattr(card_data, "license_name", None) or "other (see its card)"
    return " or ".join(licence) if isinstance(licence, list) else str(licence or "not stated")


def choose_files(name: str, files: Iterable[str]) -> list[str]:
    """Returns the files of a hub repository that are needed; raises `InputError` if it holds no weights that are loaded."""
    files = sorted(files)
    if {*TAGGER_FILES} <= {*files}:
        return [*TAGGER_FILES]
    weights = [file for file in files if WEIGHTS.fullmatch(file)]
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    _check_weights(name, files, weights)
    return [file for file in files if SMALL.fullmatch(file)] + weights


def _check_weights(name, files, weights):
    if weights:
        return
    if any(PICKLED.fullmatch(file) for file in files):
        raise InputError(
            f"{name}: it has no weights in safetensors format, only in formats that could run code when they are loaded. Pass "
            "another --model, or --revision refs/pr/N if a pull request on the hub has converted it."
        )
    raise InputError(f"{name}: it has no model.safetensors. {OTHER_MODEL}")


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
    config = read_json(folder / "config.json", f"{name}: config.json", OTHER_MODEL)
    kind = _kind_of(name, folder, config, files)
    check_no_code(Values({key: value for key, value in config.items() if key != "auto_map"}, config.name, OTHER_MODEL))
    _check_weights(name, files, [file for file in files if WEIGHTS.fullmatch(file)])
    return Model(name, folder, kind, dict(config))


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

"""Finds a model of transformers: in a folder, in the hub's cache, or on the hub.

Nothing is loaded here. From the hub come only configurations, vocabularies, safetensors or ONNX files, all of the
repository's first level; code and pickled weights are never downloaded.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import format_bytes, reason_of
from text_to_image_lora.hub import ANSWER_SECONDS, HUB_SECONDS, is_hub_id, retry_timeouts
from text_to_image_lora.models.configurations import check_no_code
from text_to_image_lora.small_files import Values, read_json


PROCESSOR_FILES = {"preprocessor_config.json", "processor_config.json"}
VOCABULARIES = {"tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"}
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
PICKLED = re.compile(r"(pytorch_model.*\.bin|.*\.(ckpt|pt|pth|h5|msgpack))")
SMALL = re.compile(r"[^/]+\.(json|jinja|txt|model)")
OTHER_MODEL = "Pass another --model."


class Accepted(NamedTuple):
    """Which models a command accepts.

    Args:
        check: Returns a model for (name, folder, names of the files that exist); raises `InputError` if it can't be used.
        revisions: The revisions of models whose main branch can't be used.
        alone: Names of files that are a model by themselves, such as a tagger.
    """

    check: Callable[[str, Path, Iterable[str]], Any]
    revisions: Mapping[str, str] = MappingProxyType({})
    alone: tuple[str, ...] = ()

    def are_alone(self, files: Iterable[str]) -> bool:
        return bool(self.alone) and {*self.alone} <= {*files}


def find_model(name: str, revision: str | None, accepted: Accepted) -> Any:
    """Finds a model by the path of its folder or by its hub id, downloads it if needed, and checks it.

    Raises `InputError` if there is no such model, or if it can't be used.
    """
    if os.path.isdir(name):
        if revision is not None:
            raise InputError(
                f"--revision {revision}: a folder has no revisions. Leave the flag out, or pass a hub id."
            )
        return accepted.check(name, Path(name), os.listdir(name))
    if not is_hub_id(name):
        raise InputError(f"{name}: there is no such folder. Pass a folder or the hub id of a model as --model.")
    revision = revision or accepted.revisions.get(name)
    if (cached := _cached_folder(name, revision, accepted)) is not None:
        return accepted.check(name, cached, os.listdir(cached))
    return _download(name, revision, accepted)


def _cached_folder(name, revision, accepted):
    """Returns the folder of a model in the hub's cache if what is needed is there, or None."""
    from huggingface_hub import try_to_load_from_cache

    for first in (*accepted.alone[:1], "config.json"):
        found = try_to_load_from_cache(name, first, revision=revision)
        if not isinstance(found, str):
            continue
        folder, names = Path(found).parent, {*os.listdir(Path(found).parent)}
        if accepted.are_alone(names):
            return folder
        index, wanted = folder / "model.safetensors.index.json", {"model.safetensors"}
        if index.exists():
            wanted = {*read_json(index).want("weight_map", dict).values()}
        # Another program may have downloaded a part, such as the weights without the vocabulary.
        if wanted <= names and names & PROCESSOR_FILES and names & VOCABULARIES:
            return folder
    return None


def _download(name, revision, accepted):
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{name}: it is not in the hub's cache, and HF_HUB_OFFLINE forbids downloads. {OTHER_MODEL}")
    try:
        info: Any = retry_timeouts(
            lambda: HfApi().model_info(name, revision=revision, files_metadata=True, timeout=HUB_SECONDS),
            ANSWER_SECONDS,
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = choose_files(name, sizes, accepted)
        small = [file for file in wanted if SMALL.fullmatch(file)]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=small))
        accepted.check(name, folder, sizes)  # before the large files
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
    return accepted.check(name, folder, sizes)


def licence_of(card_data: Any) -> str:
    """Returns the licence that the card of a model names."""
    licence = getattr(card_data, "license", None)
    if licence == "other":
        licence = getattr(card_data, "license_name", None) or "other (see its card)"
    return " or ".join(licence) if isinstance(licence, list) else str(licence or "not stated")


def choose_files(name: str, files: Iterable[str], accepted: Accepted) -> list[str]:
    """Returns the files of a hub repository that are needed; raises `InputError` if it holds no weights that are loaded."""
    files = sorted(files)
    if accepted.are_alone(files):
        return [*accepted.alone]
    weights = [file for file in files if WEIGHTS.fullmatch(file)]
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    check_weights(name, files)
    return [file for file in files if SMALL.fullmatch(file)] + weights


def check_weights(name: str, files: Iterable[str]) -> None:
    """Raises `InputError` unless there are weights in safetensors format among the files."""
    files = {*files}
    if any(WEIGHTS.fullmatch(file) for file in files):
        return
    if any(PICKLED.fullmatch(file) for file in files):
        raise InputError(
            f"{name}: it has no weights in safetensors format, only in formats that could run code when they are loaded. Pass "
            "another --model, or --revision refs/pr/N if a pull request on the hub has converted it."
        )
    raise InputError(f"{name}: it has no model.safetensors. {OTHER_MODEL}")


def read_config(name: str, folder: Path) -> Values:
    return read_json(folder / "config.json", f"{name}: config.json", OTHER_MODEL)


def check_config(config: Values) -> None:
    """Raises `InputError` if a configuration asks for code, other than a class of its own, which is not used."""
    own = {key: value for key, value in config.items() if key != "auto_map"}
    check_no_code(Values(own, config.name, OTHER_MODEL))

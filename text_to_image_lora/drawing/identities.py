"""What identifies the files that pictures are drawn with, as the pictures record it."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, TrainingError
from ..hub import hub_file
from ..models.base_model import BaseModel
from ..models.weights_files import files_identity, quick_hash


WEIGHTS_AND_CONFIG = {".json", ".safetensors", ".bin"}  # endings of the files of a VAE or ControlNet


@functools.cache
def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identities_of(base: BaseModel, vae: str | None = None, controlnet: str | None = None) -> dict[str, str]:
    """Returns {flag: what identifies the files of its model}: the commit of a model on the hub, else a quick hash.

    Of a large file only samples are read, so that this takes a moment. A model whose files can't be read is left out.
    """
    found = {}
    with contextlib.suppress(OSError, InputError):
        found["pretrained_model_name_or_path"] = files_identity(base)
    for flag, source in {"vae": vae, "controlnet": controlnet}.items():
        if source is not None:
            with contextlib.suppress(Exception):  # no network: the errors of the hub's client share no base class
                found[flag] = _identity_of_part(source, base.cache_dir)
    return found


def _identity_of_part(source, cache_dir):
    """Returns what identifies the files of a VAE or ControlNet: a file, a folder or a model on the hub."""
    path = Path(source)
    if not path.exists():
        return json.dumps([source, hub_file(source, "config.json", cache_dir=cache_dir).parent.name])
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in WEIGHTS_AND_CONFIG)
    hashes = [["" if file == path else file.name, quick_hash(file)] for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


@contextlib.contextmanager
def loading_unchanged(
    base: BaseModel, loras: Sequence[Any], vae: str | None = None, controlnet: str | None = None
) -> Iterator[dict[str, str]]:
    """Yields `identities_of` the models, which have to be loaded inside the context, and hashes the files of the LoRAs.

    Pictures record these hashes. A file that was hashed after it was loaded may be that of a later step of a training run, so
    that pictures of the old weights would be taken for pictures of the new ones. Raises `TrainingError` if a file is replaced
    inside the context.
    """
    files = [file for lora in loras for file in lora.files]
    sha256_of.cache_clear()
    identities, before = identities_of(base, vae, controlnet), {file: _stamp(file) for file in files}
    for file in files:
        with contextlib.suppress(OSError):  # the loader reports it
            sha256_of(file)
    yield identities
    changed = [str(file) for file in files if _stamp(file) != before[file]]
    after = identities_of(base, vae, controlnet)
    sources = {"pretrained_model_name_or_path": base.source, "vae": vae, "controlnet": controlnet}
    changed += [str(sources[flag]) for flag, found in identities.items() if after.get(flag, found) != found]
    identities |= after  # a model on the hub may only be here now
    if changed:
        raise TrainingError(
            f"{' or '.join(changed)}: the files were changed while they were loaded. Run the same command again."
        )


def _stamp(path):
    """Returns what changes when a file is replaced, or None if it can't be read."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns

"""Where a base model is, and of which family: told within a second, without torch."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import hub_file, is_hub_id, reason_of
from .families import Family, all_supported, families_with_pipeline, family_by_marks


class ConfigFiles(NamedTuple):
    """Where the configuration files of a base model are."""

    source: str  # folder, hub id or single file
    kind: str  # "folder", "hub" or "file"
    folder: str | None  # None: on the hub
    revision: str | None = None
    cache_dir: str | None = None

    def read(self, file: str) -> dict[str, Any]:
        """What a JSON file such as `unet/config.json` holds; `InputError` where it can't be read."""
        if self.kind == "hub":
            path = from_hub(self.source, file, self.revision, self.cache_dir)
        else:
            path = Path(self.folder, file)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.folder or self.source}/{file}: it can't be read ({error}). Fetch the model again."
            ) from error


class BaseModel(NamedTuple):
    """Where a base model is and what its configuration files say; nothing is loaded yet."""

    source: str
    kind: str  # "folder", "hub" or "file"
    family: Family
    resolution: int  # side in pixels of the pictures that it is made for
    image_factor: int  # a resolution must be a multiple of this: the VAE's factor times the UNet's
    latent_channels: int
    vae_factor: int
    cross_attention_dim: int
    text_layers: int  # of the first text encoder
    pooled_dim: int | None
    zeros_for_empty_prompt: bool  # what its pipeline takes for an empty negative prompt, see `Family.zeros_option`
    scheduler_changes: dict  # what a single file says of its diffusion by itself
    single_file_config: str | None
    revision: str | None
    variant: str | None
    cache_dir: str | None

    @property
    def config_files(self) -> ConfigFiles | None:
        """None: of a single file without a configuration of its own."""
        if self.kind == "file" and self.single_file_config is None:
            return None
        folder = {"folder": self.source, "file": self.single_file_config, "hub": None}[self.kind]
        return ConfigFiles(self.source, self.kind, folder, self.revision, self.cache_dir)

    def latent_shape(self, size):
        """(channels, height, width) of the latent of (width, height) in pixels."""
        return self.latent_channels, size[1] // self.vae_factor, size[0] // self.vae_factor

    def condition_shapes(self, num_chunks):
        """{name: shape} of what a caption becomes, in that many chunks of tokens."""
        return self.family.condition_shapes(self, num_chunks)


def locate(name, single_file_config):
    """("file", "folder" or "hub", the folder with its configuration or None) of what a base model is called."""
    path = Path(name)
    if path.suffix.lower() in (".safetensors", ".ckpt") and not path.is_dir():
        if not path.is_file():
            raise InputError(f"{name}: there is no such file (--pretrained_model_name_or_path).")
        if single_file_config is not None and not Path(single_file_config, "model_index.json").is_file():
            raise InputError(f"{single_file_config}: it holds no model_index.json (--single_file_config).")
        return "file", single_file_config
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise InputError(f"{name}: it holds no model_index.json, so it is not a diffusers model folder.")
        return "folder", name
    if not is_hub_id(name):
        raise InputError(f"{name}: there is no such folder or file, and it is not a hub id (owner/name) either.")
    return "hub", None


def find_families(name, pipeline):
    """The families whose pipeline a folder names."""
    rows = families_with_pipeline(pipeline)
    if not rows:
        raise InputError(f"{name}: a {pipeline} is not supported; supported: {all_supported()}.")
    return rows


def find_family(name, rows, unet):
    """That of the rows whose marks the UNet's configuration has."""
    family = family_by_marks(unet)
    if family not in rows:
        of = "no family that is known" if family is None else family.name
        named = " or ".join(row.name for row in rows)
        raise InputError(
            f"{name}: its UNet is of {of}, and model_index.json names the pipeline of {named}. Fetch the model again."
        )
    return family


def from_hub(name, file, revision, cache_dir):
    """`hub_file`, with an `InputError` where neither the local cache nor the hub has it."""
    try:
        return hub_file(name, file, revision=revision, cache_dir=cache_dir)
    except Exception as error:  # the client's errors have no common base: no network, no such model, gated, bad token
        raise InputError(
            f"{name}: neither a folder here nor a model that the hub gives ({reason_of(error)}). Check the spelling, your "
            "network and `hf auth login`, or pass a local folder."
        ) from error

"""Finds a base model and its family within a second, without importing torch."""

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import check_regular, reason_of
from ..hub import hub_file, is_hub_id
from ..small_files import Values, read_json
from .configurations import check_libraries, check_part
from .families import Family, all_supported, families_with_pipeline, family_by_marks
from .not_a_base import check_folder


class ConfigFiles(NamedTuple):
    """The location of the configuration files of a base model."""

    source: str  # folder, hub id or single file
    kind: str  # "folder", "hub" or "file"
    folder: str | None  # None if the files are on the hub
    revision: str | None = None
    cache_dir: str | None = None

    def read(self, file: str) -> Values:
        """Reads and checks a JSON file such as `unet/config.json`; raises `InputError` if it can't be used."""
        if self.kind == "hub":
            path = from_hub(self.source, file, self.revision, self.cache_dir)
        else:
            path = Path(str(self.folder), file)
        found = read_json(path, f"{self.folder or self.source}/{file}")
        part = file.rpartition("/")[0]
        return check_part(part, found) if part else check_libraries(found)


class BaseModel(NamedTuple):
    """The location and the configuration of a base model, before anything is loaded."""

    source: str
    kind: str  # "folder", "hub" or "file"
    family: Family
    resolution: int  # native resolution: side of the training pictures in pixels
    image_factor: int  # resolutions must be multiples of it: the downscaling factor of the VAE times that of the UNet
    latent_channels: int
    vae_factor: int
    cross_attention_dim: int
    text_layers: int  # of the first text encoder
    pooled_dim: int | None
    zeros_for_empty_prompt: bool  # whether an empty negative prompt is encoded as zeros, see `Family.zeros_option`
    scheduler_changes: dict  # scheduler options found in a single file
    single_file_config: str | None
    revision: str | None
    variant: str | None
    cache_dir: str | None
    has_vae: bool = True  # False for a single file without a VAE

    @property
    def config_files(self) -> ConfigFiles | None:
        """The configuration files; None for a single file without --single_file_config."""
        if self.kind == "file" and self.single_file_config is None:
            return None
        folder = {"folder": self.source, "file": self.single_file_config, "hub": None}[self.kind]
        return ConfigFiles(self.source, self.kind, folder, self.revision, self.cache_dir)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Returns the shape (channels, height, width) of the latents of a picture of (width, height) pixels."""
        return self.latent_channels, size[1] // self.vae_factor, size[0] // self.vae_factor

    def condition_shapes(self, num_chunks: int) -> dict[str, tuple]:
        """Returns {name: shape} of the condition of a caption in that many chunks of tokens."""
        return self.family.condition_shapes(self, num_chunks)


def locate(name: str, single_file_config: str | None) -> tuple[str, str | None]:
    """Returns the kind of a base model ("file", "folder" or "hub") and the folder with its configuration or None."""
    path = Path(name)
    if path.suffix.lower() in (".safetensors", ".ckpt") and not path.is_dir():
        if not path.is_file():
            raise InputError(f"{name}: there is no such file (--pretrained_model_name_or_path).")
        if single_file_config is not None and not Path(single_file_config, "model_index.json").is_file():
            raise InputError(f"{single_file_config}: it does not contain a model_index.json (--single_file_config).")
        if single_file_config is not None:
            check_regular(single_file_config)
        return "file", single_file_config
    if path.is_dir():
        check_folder(path)
        check_regular(path)
        if not (path / "model_index.json").is_file():
            raise InputError(f"{name}: it does not contain a model_index.json, so it is not a diffusers model folder.")
        return "folder", name
    if not is_hub_id(name):
        raise InputError(f"{name}: there is no such folder or file, and it is not a hub id (owner/name) either.")
    return "hub", None


def find_families(name: str, pipeline: str | None) -> list[Family]:
    """Returns the families with this pipeline class; raises `InputError` if there are none."""
    families = families_with_pipeline(pipeline)
    if not families:
        raise InputError(f"{name}: a {pipeline} is not supported; supported: {all_supported()}.")
    return families


def find_family(name: str, families: list[Family], unet_config: dict[str, Any]) -> Family:
    """Returns the family of a UNet's configuration; raises `InputError` if it is not one of `families`."""
    family = family_by_marks(unet_config)
    if family is None or family not in families:
        found = "an unknown family" if family is None else family.name
        expected = " or ".join(row.name for row in families)
        raise InputError(
            f"{name}: its UNet is of {found}, but model_index.json names the pipeline of {expected}. Download the model "
            "again."
        )
    return family


def from_hub(name: str, file: str, revision: str | None, cache_dir: str | None) -> Path:
    """Calls `hub_file`, but raises `InputError` if neither the local cache nor the hub has the file."""
    try:
        return hub_file(name, file, revision=revision, cache_dir=cache_dir)
    except (
        Exception
    ) as error:  # no network, no such model, gated, bad token: the client's errors have no common base class
        raise InputError(
            f"{name}: neither a local folder nor a model that the hub provides ({reason_of(error)}). Check the spelling, your "
            "network and `hf auth login`, or pass a local folder."
        ) from error

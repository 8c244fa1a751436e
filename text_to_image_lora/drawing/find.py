"""What a command names is found and looked into: base models, LoRAs, VAEs, ControlNets, pictures. Needs no torch."""

import contextlib
import glob
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import hub_file, is_hub_id, reason_of
from ..models.base_model import BaseModel
from ..models.dialects import COMPONENTS, PEFT_WEIGHTS_NAME, WEIGHTS_NAME, open_safetensors
from ..models.families import FAMILIES, families_with_pipeline
from ..models.loading import find_base_model
from . import settings
from .rows import Lora


MODEL_FLAG = "--pretrained_model_name_or_path"


class Base(NamedTuple):
    """A base model, and what its files tell before it is loaded."""

    model: BaseModel
    shapes: dict[str, tuple[int, ...]] = {}  # {"unet.conv_in.weight": shape}; {} where the files are not here
    unet_config: dict[str, Any] = {}  # {} where a single file has no configuration here
    prediction_type: str | None = None  # None: not known before it is loaded
    zero_snr: bool | None = None


class ControlNet(NamedTuple):
    """A ControlNet."""

    source: str  # folder or hub id
    config: dict[str, Any]  # its config.json


class Given(NamedTuple):
    """The pictures that drawing starts from, or holds to."""

    image: Any = None  # to start from
    control_image: Any = None
    canny: bool = False  # the control image's edges hold the picture, not the image itself


class Header(NamedTuple):
    """What the header of a safetensors file says."""

    shapes: dict[str, tuple[int, ...]]  # of its tensors
    strings: dict[str, str]


def check_folders(output: settings.Output) -> None:
    """Raises `InputError` for a folder that can't be made or written into, and for a merged model's that is not empty."""
    for flag, folder in (("--output_dir", output.output_dir), ("--save_merged", output.save_merged)):
        if folder is None:
            continue
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"{flag} {folder}: can't write into {existing}. Name another folder.")
    merged = output.save_merged
    if merged and merged.exists() and any(merged.iterdir()):
        raise InputError(f"--save_merged {merged} is not empty. Name a new folder.")


def hub_path(flag: str, name: str, file: str, revision: str | None = None) -> Path:
    """The local path of a small file of a hub repository; `InputError` where `name` is none or the hub does not give it."""
    if not is_hub_id(name) or name.endswith((".safetensors", ".ckpt")):
        raise InputError(f"{flag} {name} does not exist. Check the path (relative ones start from {Path.cwd()}).")
    try:
        return hub_file(name, file, revision=revision)
    except Exception as error:  # those of httpx and of the hub share no base class
        reason = f"is no file or folder here, and the hub does not give it: {reason_of(error)}"
        raise InputError(f"{flag} {name} {reason}") from error


def read_header(flag: str, path: Path) -> Header:
    """The header of a safetensors file; `InputError` for a file that is cut short."""
    try:
        with open_safetensors(path, "np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return Header(shapes, file.metadata() or {})
    except InputError as error:
        reason = f"is not a whole safetensors file ({error.__cause__}). Copy or download it again."
        raise InputError(f"{flag} {path} {reason}") from error


def find_base(flags: settings.Model) -> Base:
    """The base model of the flags; `InputError` for what is not there, or not of a family that can be drawn with."""
    name = str(flags.pretrained_model_name_or_path)
    path = Path(name)
    if path.is_file() and path.suffix not in (".safetensors", ".ckpt"):
        raise InputError(f"{MODEL_FLAG} {path}: a single file must be .safetensors or .ckpt.")
    if path.is_file() and flags.single_file_config is not None:
        _check_pipeline("--single_file_config", flags.single_file_config)
    elif path.is_dir():
        _check_pipeline(MODEL_FLAG, path)
    elif not path.is_file():
        _check_pipeline(MODEL_FLAG, hub_path(MODEL_FLAG, name, "model_index.json", flags.revision).parent)
    if path.is_file() and path.suffix == ".safetensors":
        read_header(MODEL_FLAG, path)
    config = flags.single_file_config and str(flags.single_file_config)
    model = find_base_model(name, revision=flags.revision, variant=flags.variant, single_file_config=config)
    unet_config, prediction_type = {}, None
    if files := model.config_files:
        unet_config = files.read(f"{model.family.denoiser}/config.json")
        with contextlib.suppress(InputError):  # the loader says what is wrong with it
            prediction_type = files.read("scheduler/scheduler_config.json").get("prediction_type", "epsilon")
    shapes = {}
    of_parts = [sorted(path.glob(f"{part}/*.safetensors")) for part in COMPONENTS if (path / part).is_dir()]
    if all(of_parts):
        for file in sum(of_parts, []):
            header = read_header(MODEL_FLAG, file)
            shapes |= {f"{file.parent.name}.{key}": shape for key, shape in header.shapes.items()}
    changes = model.scheduler_changes  # of a single file, by what it says itself
    prediction_type = changes.get("prediction_type", prediction_type)
    return Base(model, shapes, unet_config, prediction_type, changes.get("rescale_betas_zero_snr"))


def _check_pipeline(flag, folder):
    """Raises `InputError` for a folder that does not hold a pipeline of one of the families."""
    try:
        class_name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        reason = "holds no readable model_index.json. Pass the folder of a whole pipeline."
        raise InputError(f"{flag} {folder} {reason}") from error
    if not families_with_pipeline(class_name):
        known = " and ".join(dict.fromkeys(family.pipeline for family in FAMILIES))
        raise InputError(f"{flag} {folder} is a {class_name}; this script draws with {known}.")


def find_lora(given: str, scale: float, adapter: str) -> Lora:
    """The `Lora` of PATH or PATH:STRENGTH; `InputError` for what is no LoRA.

    `scale` is its strength where none is given, `adapter` the name that it gets in the pipeline.
    """
    path, fixed = Path(given), False
    head, tail = given.rsplit(":", 1) if ":" in given else ("", "")
    if head and not path.exists():  # a path may hold a colon itself
        with contextlib.suppress(ValueError):
            scale, fixed = float(tail), True
            given, path = head, Path(head)
    if not math.isfinite(scale):
        raise InputError(f"--lora {given}:{scale}: the strength must be a finite number.")
    if path.is_dir() and (path / WEIGHTS_NAME).exists():
        path = path / WEIGHTS_NAME
    elif path.is_dir() and not (path / PEFT_WEIGHTS_NAME).exists():
        found = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:3]) or "no LoRA files"
        raise InputError(f"--lora {given} holds no {WEIGHTS_NAME} (there are: {found}). Pass the LoRA file itself.")
    elif not path.exists():
        path = hub_path("--lora", given, WEIGHTS_NAME)
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(f"--lora {path}: only .safetensors files are read, since others can carry code.")
    lora = Lora(given, path, scale, adapter, {}, {}, fixed)
    header = read_header("--lora", lora.file)
    if not any("lora" in key or "hada" in key or "lokr" in key for key in header.shapes):
        count = len(header.shapes)
        raise InputError(f"--lora {path} is not a LoRA file: none of its {count} keys has 'lora' in its name.")
    return lora._replace(shapes=header.shapes, header=header.strings)


def find_loras(flags: settings.Model) -> tuple[Lora, ...]:
    """The LoRAs of --lora."""
    return tuple(find_lora(given, flags.lora_scale, f"lora{i}") for i, given in enumerate(flags.lora or ()))


def find_checkpoints(listed: Iterable[str], scale: float) -> dict[str, Lora | None]:
    """The LoRAs of paths and patterns, by labels; None for `base`, which stands for no LoRA."""

    def by_numbers(name):
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]

    found = []
    for word in listed:
        matches = [word] if word == "base" or Path(word).exists() or not glob.has_magic(word) else glob.glob(word)
        if not matches:
            raise InputError(f"--grid checkpoint={word}: no file or folder has such a name.")
        found += sorted(matches, key=by_numbers)
    loras = [None if word == "base" else find_lora(word, scale, f"checkpoint{i}") for i, word in enumerate(found)]
    names = [Path(lora.given.removesuffix(".safetensors")).absolute().parts if lora else ("base",) for lora in loras]
    length = 1  # of the labels, in parts of the paths: as short as tells them apart
    while len({parts[-length:] for parts in names}) < len(set(names)):
        length += 1
    return {"/".join(parts[-length:]): lora for parts, lora in zip(names, loras, strict=True)}


def vae_channels(source: str) -> int | None:
    """The channels of a VAE's latents, None where they are not known; `InputError` for what is no VAE."""
    path = Path(source)
    if not path.is_file():
        return _config_of("--vae", source, "AutoencoderKL", "Pass the folder of the VAE itself.").get(
            "latent_channels"
        )
    if path.suffix == ".safetensors":
        read_header("--vae", path)
    elif path.suffix not in (".ckpt", ".pt"):
        raise InputError(f"--vae {source}: a single file must be .safetensors, .ckpt or .pt.")
    return None


def find_controlnet(source: str) -> ControlNet:
    """The `ControlNet` of --controlnet; `InputError` for what is none."""
    if Path(source).is_file():
        remedy = "pass a folder in diffusers' layout, or a hub id; a single file can't be read."
        raise InputError(f"--controlnet {source}: {remedy}")
    remedy = "Pass the ControlNet's own folder."
    return ControlNet(source, _config_of("--controlnet", source, "ControlNetModel", remedy))


def _config_of(flag, source, class_name, remedy):
    """The config.json of a model of this class in diffusers, from a folder or the hub."""
    path = Path(source)
    file = path / "config.json" if path.is_dir() else hub_path(flag, source, "config.json")
    with contextlib.suppress(OSError, ValueError):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("_class_name") == class_name:
            return config
    article = "an" if class_name[0] == "A" else "a"
    raise InputError(f"{flag} {source} holds no config.json of {article} {class_name}. {remedy}")


def find_pictures(flags: settings.FromPictures) -> Given:
    """The pictures of --image and --control_image."""
    files = {"image": flags.image, "control_image": flags.control_image}
    opened = {name: open_picture(f"--{name}", path) for name, path in files.items() if path}
    return Given(**opened, canny=flags.control == "canny")


def open_picture(flag: str, path: Path) -> Any:
    """The picture that a flag names, as training reads it: an RGB `PIL.Image`."""
    from ..pictures.transforms import ImageError, open_image

    try:
        return open_image(path.read_bytes())
    except OSError as error:
        reason = error.strerror
    except ImageError as error:
        reason = str(error.__cause__ or error)
        reason = "it is no picture" if "cannot identify" in reason else reason
    raise InputError(f"{flag} {path} can't be read: {reason}. Pass a PNG, JPEG or WebP file.")

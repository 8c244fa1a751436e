"""Finds and checks base models, LoRAs, VAEs, ControlNets and pictures before a model is loaded. Needs no torch."""

import contextlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..command_line import obstacle_to_folder
from ..errors import InputError
from ..files import check_regular, expand_pattern, reason_of
from ..hub import hub_file, is_hub_id
from ..models.base_model import BaseModel
from ..models.configurations import check_part
from ..models.dialects import COMPONENTS, CONVERT, WEIGHTS_NAME, find_weight_files, open_safetensors
from ..models.families import FAMILIES, families_with_pipeline
from ..models.loading import find_base_model
from ..models.lora_checks import TensorFacts, check_tensors, facts_of
from ..models.not_a_base import check_folder
from ..small_files import Values, read_json
from . import settings
from .rows import MOST_SCALE, Lora


logger = logging.getLogger(__name__)

MODEL_FLAG = "--pretrained_model_name_or_path"


class Base(NamedTuple):
    """A base model, and what its files show before it is loaded."""

    model: BaseModel
    shapes: dict[str, tuple[int, ...]] = {}  # {"unet.conv_in.weight": shape}; {} if not known before it is loaded
    unet_config: dict[str, Any] = {}  # {} if a single file has no local configuration
    prediction_type: str | None = None  # None if not known before it is loaded
    zero_snr: bool | None = None


class ControlNet(NamedTuple):
    """A ControlNet."""

    source: str  # folder or hub id
    config: dict[str, Any]  # its config.json


class Given(NamedTuple):
    """The initial picture and the control image, `PIL.Image`s or None."""

    image: Any = None
    control_image: Any = None
    canny: bool = False  # condition the ControlNet on Canny edges of the control image or initial picture


class Header(NamedTuple):
    """The header of a safetensors file."""

    tensors: dict[str, TensorFacts]
    strings: dict[str, str]  # its metadata

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors."""
        return {key: facts.shape for key, facts in self.tensors.items()}


def check_folders(output: settings.Output) -> None:
    """Raises `InputError` if an output folder can't be written, or if the folder of --save_merged is not empty."""
    for flag, folder in (("--output_dir", output.output_dir), ("--save_merged", output.save_merged)):
        if folder is None:
            continue
        if (obstacle := obstacle_to_folder(folder)) is not None:
            raise InputError(f"{flag} {folder}: it can't be made, because {obstacle}. Name another folder.")
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"{flag} {folder}: can't write into {existing}. Name another folder.")
    merged = output.save_merged
    if merged and merged.exists() and any(merged.iterdir()):
        raise InputError(f"--save_merged {merged} is not empty. Name a new folder.")


def hub_path(flag: str, name: str, file: str, revision: str | None = None) -> Path:
    """Downloads a small file of a hub repository and returns its local path.

    Raises `InputError` if `name` is not a hub id, or if the download fails.
    """
    if not is_hub_id(name) or name.lower().endswith((".safetensors", ".ckpt")):
        raise InputError(f"{flag} {name} does not exist. Check the path (relative ones start from {Path.cwd()}).")
    try:
        return hub_file(name, file, revision=revision)
    except Exception as error:  # the errors of httpx and of huggingface_hub share no base class
        reason = f"is not a local file or folder, and can't be downloaded from the hub: {reason_of(error)}"
        raise InputError(f"{flag} {name} {reason}") from error


def read_header(flag: str, path: Path) -> Header:
    """Reads the header of a safetensors file; raises `InputError` if the file is incomplete."""
    check_regular(path, flag)
    try:
        with open_safetensors(path, "np") as file:
            return Header(facts_of(file), file.metadata() or {})
    except InputError as error:
        reason = f"is not a complete safetensors file ({error.__cause__}). Copy or download it again."
        raise InputError(f"{flag} {path} {reason}") from error


def find_base(flags: settings.Model) -> Base:
    """Finds the base model; raises `InputError` if it does not exist or its family is not supported."""
    name = str(flags.pretrained_model_name_or_path)
    path = Path(name)
    if path.is_file() and path.suffix.lower() not in (".safetensors", ".ckpt"):
        raise InputError(f"{MODEL_FLAG} {path}: a single file must be .safetensors or .ckpt.")
    if path.is_file() and flags.single_file_config is not None:
        _check_pipeline("--single_file_config", flags.single_file_config)
    elif path.is_dir():
        _check_pipeline(MODEL_FLAG, path)
    elif not path.is_file():
        _check_pipeline(MODEL_FLAG, hub_path(MODEL_FLAG, name, "model_index.json", flags.revision).parent)
    if path.is_file() and path.suffix.lower() == ".safetensors":
        read_header(MODEL_FLAG, path)
    config = flags.single_file_config and str(flags.single_file_config)
    model = find_base_model(name, revision=flags.revision, variant=flags.variant, single_file_config=config)
    unet_config: dict[str, Any] = {}
    diffusion: dict[str, Any] = {}
    if files := model.config_files:
        unet_config = files.read(f"{model.family.denoiser}/config.json")
        diffusion = {"prediction_type": "epsilon"} | files.read("scheduler/scheduler_config.json")
    shapes = {}
    of_parts = [sorted(path.glob(f"{part}/*.safetensors")) for part in COMPONENTS if (path / part).is_dir()]
    if all(of_parts):
        for file in sum(of_parts, []):
            header = read_header(MODEL_FLAG, file)
            shapes |= {f"{file.parent.name}.{key}": shape for key, shape in header.shapes.items()}
    diffusion |= model.scheduler_changes  # only a single-file model has any
    zero_snr = diffusion.get("rescale_betas_zero_snr") or None
    return Base(model, shapes, unet_config, diffusion.get("prediction_type"), zero_snr)


def _check_pipeline(flag, folder):
    """Raises `InputError` unless the folder contains a pipeline of a supported family."""
    check_folder(folder)
    try:
        class_name = read_json(folder / "model_index.json").want("_class_name", str)
    except InputError as error:
        reason = f"contains no readable model_index.json. Pass the folder of a complete pipeline. ({error})"
        raise InputError(f"{flag} {folder} {reason}") from error
    if not families_with_pipeline(class_name):
        known = " and ".join(dict.fromkeys(family.pipeline for family in FAMILIES))
        raise InputError(f"{flag} {folder} is a {class_name}, but only {known} are supported.")


def find_lora(given: str, scale: float, adapter: str) -> Lora:
    """Finds the LoRA of PATH or PATH:STRENGTH; raises `InputError` if it is not a LoRA.

    Args:
        scale: The strength of a LoRA that is given as PATH.
        adapter: The LoRA's name in the pipeline.
    """
    path, fixed = Path(given), False
    head, tail = given.rsplit(":", 1) if ":" in given else ("", "")
    if head and not path.exists():  # a path may contain a colon
        with contextlib.suppress(ValueError):
            scale, fixed = float(tail), True
            given, path = head, Path(head)
    if not abs(scale) <= MOST_SCALE:  # neither is NaN
        raise InputError(f"--lora {given}:{scale}: the strength must be a number from {-MOST_SCALE} to {MOST_SCALE}.")
    if path.is_dir() and (path / WEIGHTS_NAME).exists():
        path = path / WEIGHTS_NAME
    elif path.is_dir() and not find_weight_files(path)[0][0].exists():
        path = newest_of_run(path, "--lora")
    elif not path.exists():
        path = hub_path("--lora", given, WEIGHTS_NAME)
    if not path.is_dir():
        check_regular(path, "--lora")
    if path.is_file() and path.suffix.lower() != ".safetensors":
        raise InputError(f"--lora {path}: {CONVERT}")
    shapes, strings = {}, {}
    for file, component in find_weight_files(path):
        header = read_header("--lora", file)
        check_tensors(f"--lora {file}", header.tensors, component)
        strings |= header.strings
        for key, shape in header.shapes.items():
            # The files of a folder in peft's dialect hold one component each, which their keys do not name.
            shapes[key if component is None else f"{component}.{key.removeprefix('base_model.model.')}"] = shape
    if not any("lora" in key or "hada" in key or "lokr" in key for key in shapes):
        raise InputError(f"--lora {path} is not a LoRA file: none of its {len(shapes)} keys contains 'lora'.")
    return Lora(given, path, scale, adapter, shapes, strings, fixed)


def newest_of_run(folder: Path, flag: str) -> Path:
    """Returns the newest LoRA of a run that has no final LoRA yet, and logs which it is.

    It is that of the latest step among the folders `checkpoint-N` and `epoch-N`. Raises `InputError` if there is none; `flag`
    is the flag that names the folder.
    """
    steps = {}
    for place in folder.iterdir():
        name, file = re.fullmatch(r"(checkpoint|epoch)-(\d+)", place.name), place / WEIGHTS_NAME
        if name is None or not file.is_file():
            continue
        try:
            step = read_header(flag, file).strings.get("ss_steps", "")
        except InputError as error:
            logger.warning(f"{error} An older LoRA of the run is looked for.")
            continue
        # Files of diffusers' scripts do not record the step, but their checkpoints are named after it.
        steps[file] = (
            int(step) if step.isdecimal() and len(step) < 10 else int(name[2][:9]) * (name[1] == "checkpoint")
        )
    if not steps:
        names = ", ".join(sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".safetensors")[:3])
        reason = f"contains no {WEIGHTS_NAME} (found: {names or 'no LoRA files'}). Pass the LoRA file itself."
        raise InputError(f"{flag} {folder} {reason}")
    newest = max(steps, key=lambda file: (steps[file], file.stat().st_mtime))
    logger.info(
        f"{flag} {folder}: the run has no final LoRA yet, so the newest is used, of step {steps[newest]}: {newest}"
    )
    return newest


def find_loras(flags: settings.Model) -> tuple[Lora, ...]:
    """Finds the LoRAs of --lora."""
    return tuple(find_lora(given, flags.lora_scale, f"lora{i}") for i, given in enumerate(flags.lora or ()))


def find_checkpoints(listed: Iterable[str], scale: float) -> dict[str, Lora | None]:
    """Finds the LoRAs of paths and patterns; returns {label: LoRA}, with None for `base`, which means no LoRA."""

    def natural_order(name):
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]

    found = []
    for word in listed:
        matches = [word] if word == "base" else expand_pattern(word)
        if not matches:
            raise InputError(f"--grid checkpoint={word}: no file or folder matches this pattern.")
        found += sorted(matches, key=natural_order)
    loras = [None if word == "base" else find_lora(word, scale, f"checkpoint{i}") for i, word in enumerate(found)]
    names = [Path(lora.given.removesuffix(".safetensors")).absolute().parts if lora else ("base",) for lora in loras]
    length = 1  # of the labels, in parts of the paths: the shortest that keeps the labels distinct
    while len({parts[-length:] for parts in names}) < len(set(names)):
        length += 1
    return {"/".join(parts[-length:]): lora for parts, lora in zip(names, loras, strict=True)}


def vae_channels(source: str) -> int | None:
    """Returns the channels of a VAE's latents, or None if unknown; raises `InputError` if it is not a VAE."""
    path = Path(source)
    check_regular(path, "--vae")
    if not path.is_file():
        return _config_of("--vae", source, "AutoencoderKL", "Pass the folder of the VAE itself.").get(
            "latent_channels"
        )
    if path.suffix.lower() == ".safetensors":
        read_header("--vae", path)
    elif path.suffix.lower() not in (".ckpt", ".pt"):
        raise InputError(f"--vae {source}: a single file must be .safetensors, .ckpt or .pt.")
    return None


def find_controlnet(source: str) -> ControlNet:
    """Finds the ControlNet; raises `InputError` if it is not one."""
    check_regular(source, "--controlnet")
    if Path(source).is_file():
        remedy = "a single file can't be read. Pass a folder in diffusers' layout or a hub id."
        raise InputError(f"--controlnet {source}: {remedy}")
    remedy = "Pass the ControlNet's own folder."
    return ControlNet(source, _config_of("--controlnet", source, "ControlNetModel", remedy))


def _config_of(flag, source, class_name, remedy):
    """Reads the config.json of a diffusers model of this class from a folder or the hub."""
    path = Path(source)
    file = path / "config.json" if path.is_dir() else hub_path(flag, source, "config.json")
    found: Values | None = None
    with contextlib.suppress(InputError):
        config = read_json(file)
        if config.get("_class_name") == class_name:
            found = config
    if found is not None:
        return check_part("vae" if class_name == "AutoencoderKL" else "controlnet", found)
    article = "an" if class_name[0] == "A" else "a"
    raise InputError(f"{flag} {source} contains no config.json of {article} {class_name}. {remedy}")


def find_pictures(flags: settings.FromPictures) -> Given:
    """Opens the pictures of --image and --control_image."""
    files = {"image": flags.image, "control_image": flags.control_image}
    opened = {name: open_picture(f"--{name}", path) for name, path in files.items() if path}
    return Given(**opened, canny=flags.control == "canny")


def open_picture(flag: str, path: Path) -> Any:
    """Opens a picture in the way that training does; returns an RGB `PIL.Image`."""
    from ..pictures.inside import read_bytes
    from ..pictures.transforms import ImageError, open_image

    try:
        return open_image(read_bytes(path))
    except OSError as error:
        reason = error.strerror or error
    except ImageError as error:
        reason = str(error.__cause__ or error)
        reason = "it is not a picture" if "cannot identify" in reason else reason
    raise InputError(f"{flag} {path} can't be read: {reason}. Pass a PNG, JPEG or WebP file.")

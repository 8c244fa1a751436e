"""Recognises what was passed as a base model and is none: a LoRA, a part of a model, or a model for another task.

Needs no torch. `shapes` are the shapes of the tensors of a safetensors file, {name: shape}.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..small_files import read_json


WHOLE = "Pass a complete Stable Diffusion 1, 2 or XL as the base model"
LORA_REMEDY = f"{WHOLE}, and the LoRA with --lora in infer.py or --lora_weights in training."
VAE_REMEDY = f"{WHOLE}, and the VAE with --vae in infer.py or --pretrained_vae_model_name_or_path in training."
# Models for other tasks, by the input channels of their UNet.
TASKS = {9: "an inpainting model", 8: "a model that edits pictures by instructions (InstructPix2Pix)"}
# {what a folder with this class in its config.json is: remedy}
PARTS = {
    "AutoencoderKL": ("a VAE", VAE_REMEDY),
    "UNet2DConditionModel": ("a UNet without the other parts of a model", f"{WHOLE}."),
    "ControlNetModel": ("a ControlNet", f"{WHOLE}, and the ControlNet with --controlnet in infer.py."),
    "CLIPTextModel": ("a text encoder", f"{WHOLE}."),
    "CLIPTextModelWithProjection": ("a text encoder", f"{WHOLE}."),
}
LORA_KEY = re.compile(r"[._]lora[._]|\.lora_|^lora_|\.(hada|lokr|oft)_")
UNET_KEY = re.compile(r"(model\.diffusion_model|unet|diffusion_model)\.|(input|down)_blocks\.|conv_in\.")
TEXT_KEY = re.compile(r"(cond_stage_model|conditioner\.embedders|text_encoder(_2)?|text_model|te1?)\.")
VAE_KEY = re.compile(r"(first_stage_model|vae)\.|(encoder|decoder|quant_conv|post_quant_conv)\.")
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


def check_task(name: str, in_channels: Any) -> None:
    """Raises `InputError` if the number of input channels of a UNet shows that it is for another task."""
    if task := TASKS.get(in_channels) if isinstance(in_channels, int) else None:
        reason = f"its UNet has {in_channels} input channels instead of 4"
        raise InputError(f"{name}: it is {task} ({reason}), which is not supported. {WHOLE}.")


def check_tensors(name: str, shapes: Mapping[str, Any]) -> None:
    """Raises `InputError` if the tensors of a single file show that it is no base model."""
    if any(LORA_KEY.search(key) for key in shapes):
        raise InputError(f"{name}: it is a LoRA or a similar adapter, not a base model. {LORA_REMEDY}")
    if any(key.startswith("emb_params") or key in ("clip_l", "clip_g") for key in shapes):
        raise InputError(f"{name}: it is an embedding (textual inversion), not a base model. {WHOLE}.")
    if any(key.startswith(("control_model.", "controlnet_")) for key in shapes):
        what, remedy = PARTS["ControlNetModel"]
        raise InputError(f"{name}: it is {what}, not a base model. {remedy}")
    has = {kind: any(map(pattern.match, shapes)) for kind, pattern in (("UNet", UNET_KEY), ("text encoder", TEXT_KEY))}
    if shapes and not has["UNet"]:
        if has["text encoder"] or not any(map(VAE_KEY.match, shapes)):
            raise InputError(f"{name}: it contains no UNet, so it is not a base model. {WHOLE}.")
        raise InputError(f"{name}: it is a VAE, not a base model. {VAE_REMEDY}")
    if shapes and not has["text encoder"]:
        raise InputError(f"{name}: it contains a UNet but no text encoder. {WHOLE}.")
    if len(first := shapes.get(FIRST_LAYER, ())) > 1:
        check_task(name, first[1])


def check_folder(folder: str | Path) -> None:
    """Raises `InputError` if a folder is a LoRA, a part of a model, or a pipeline for another task."""
    folder = Path(folder)
    index, config = (_read(folder / name) for name in ("model_index.json", "config.json"))
    if not index:
        lora_files = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json")
        if any((folder / name).exists() for name in lora_files):
            raise InputError(f"{folder}: it is a LoRA, not a base model. {LORA_REMEDY}")
        listed = config.get("architectures")
        names = [config.get("_class_name"), *(listed if isinstance(listed, list) else ())]
        if found := next((PARTS[name] for name in names if isinstance(name, str) and name in PARTS), None):
            raise InputError(f"{folder}: it is {found[0]}, not a base model. {found[1]}")
        return
    check_index(str(folder), index)
    check_task(str(folder), _read(folder / "unet" / "config.json").get("in_channels"))


def check_index(name: str, index: Mapping[str, Any]) -> None:
    """Raises `InputError` if a model_index.json is that of XL's refiner or of a pipeline for another task."""
    pipeline = str(index.get("_class_name"))
    if pipeline.startswith("StableDiffusionXL") and (index.get("text_encoder") or [None]) == [None, None]:
        raise InputError(f"{name}: it is Stable Diffusion XL's refiner, which is not supported. {WHOLE}.")
    if "Inpaint" in pipeline or "InstructPix2Pix" in pipeline:
        task = TASKS[9 if "Inpaint" in pipeline else 8]
        raise InputError(f"{name}: it is {task} ({pipeline}), which is not supported. {WHOLE}.")


def _read(path):
    """Returns the object in a JSON file, or {} if there is none; whoever needs the file reports what is wrong with it."""
    try:
        return read_json(path)
    except InputError:
        return {}

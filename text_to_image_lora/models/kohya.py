"""The LoRA file in kohya's format, which A1111, ComfyUI, Forge and InvokeAI read.

The names are those of `networks/lora.py` in kohya-ss/sd-scripts. `dora_scale` is that of LyCORIS with a magnitude for each
output, as in peft: each row of W + BA is scaled to its magnitude. A1111 divides by the norms of the columns instead
(`apply_weight_decompose` in `extensions-builtin/Lora/network.py`), and ComfyUI by those of the base model's rows
(`weight_decompose` in `comfy/weight_adapter/base.py`), so that DoRA gives different pictures in both.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .dialects import LAYER
from .families import (
    FAMILIES,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_2,
    STABLE_DIFFUSION_XL,
    Family,
    KohyaNames,
    family_by_width,
)
from .lora_file import scale_of, write_tensors
from .original_names import original_name


NOT_OF_XL = re.compile(r"(down_blocks\.0|up_blocks\.[23])\.attentions\.")
OF_XL = re.compile(r"transformer_blocks\.[1-9]|add_embedding\.")


# ss_network_module and ss_network_args of kohya's LoRA, and of LyCORIS for DoRA, which kohya's code does not support.
NETWORK = {"ss_network_module": "networks.lora", "ss_network_args": json.dumps({})}
DORA_NETWORK = {
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": json.dumps({"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}),
}


def is_not_of_xl(components: dict[str, dict[str, torch.Tensor]]) -> bool:
    """Whether a LoRA has layers in attention blocks that Stable Diffusion XL lacks, and 1 and 2 have."""
    return any(NOT_OF_XL.match(key) for key in components.get("unet", {}))


def find_family(components: dict[str, dict[str, torch.Tensor]], header: dict[str, str] | None = None) -> Family | None:
    """Finds the family of a LoRA by the keys and shapes of its state dicts, or else by its header; None if unknown."""
    keys = {key: value.shape for key, value in components.get("unet", {}).items()}
    if "text_encoder_2" in components or any(OF_XL.search(key) for key in keys):
        return STABLE_DIFFUSION_XL
    widths = {shape[1] for key, shape in keys.items() if re.search(r"attn2\.to_[kv]\.lora_A", key)}
    by_shape = next(filter(None, map(family_by_width, widths)), None)
    return by_shape or _family_by_header(header or {})


def _family_by_header(header):
    """Finds the family that kohya's or Stability's keys of a header name; None if they name none."""
    version, architecture = header.get("ss_base_model_version", ""), header.get("modelspec.architecture", "")
    beginnings = {"sdxl": STABLE_DIFFUSION_XL, "sd_v2": STABLE_DIFFUSION_2, "sd_v1": STABLE_DIFFUSION}
    beginnings |= {"sd_2": STABLE_DIFFUSION_2, "sd_1": STABLE_DIFFUSION}  # other trainers write sd_1.5
    for beginning, family in beginnings.items():
        if version.startswith(beginning):
            return family
    return next((f for f in FAMILIES if architecture.removesuffix("/lora") in f.kohya.architectures.values()), None)


def guess_family(components: dict[str, dict[str, torch.Tensor]], header: dict[str, str] | None = None) -> Family:
    """Returns the family of `find_family`, or Stable Diffusion 1 if it is unknown."""
    return find_family(components, header) or STABLE_DIFFUSION


def family_header(names: KohyaNames, v_prediction: bool = False) -> dict[str, str]:
    """Returns the metadata by which A1111 recognises the family of the base model."""
    version = names.version + ("_v" if v_prediction and names.says_v else "")
    return {"ss_v2": str(names.version == "sd_v2"), "ss_base_model_version": version}


def minimal_header(
    components: dict[str, dict[str, torch.Tensor]], header: dict[str, str] | None = None
) -> dict[str, str]:
    """Returns the metadata that can be derived from folded state dicts; `header` may name the family."""
    shapes = {key: value.shape for state_dict in components.values() for key, value in state_dict.items()}
    rank = max(shape[0] for key, shape in shapes.items() if ".lora_A." in key)
    is_dora = any(key.endswith(".lora_magnitude_vector") for key in shapes)
    return {
        **family_header(guess_family(components, header).kohya),
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        **(DORA_NETWORK if is_dora else NETWORK),
    }


def file_name(output_dir: str | Path, step: int | None = None) -> str:
    """Returns the name of a run's kohya file, which prompts of A1111 refer to: that of the output folder.

    With `step`, the name of a file saved during training, so that several of them fit into one folder.
    """
    name = Path(output_dir).resolve().name
    # diffusers reads every file whose name ends like this as its own format.
    name = f"{name}-kohya" if name.endswith("pytorch_lora_weights") else name
    return f"{name}.safetensors" if step is None else f"{name}-step{step:06d}.safetensors"


def kohya_tensors(
    components: dict[str, tuple[dict, Any]], names: KohyaNames = STABLE_DIFFUSION.kohya
) -> dict[str, torch.Tensor]:
    """Returns {kohya's key: float32 tensor} of {component: (state dict of peft, `LoraConfig`)}.

    The weights are unchanged, and alpha / rank is peft's scale. If a configuration is None, lora_B contains the scale.
    """
    tensors = {}
    for component, (state_dict, config) in components.items():
        for key, value in state_dict.items():
            module, _, leaf = key.partition(".lora_")
            name = _kohya_name(component, module, names)
            if name is None:
                raise InputError(f"{component}.{module} has no name in kohya's format of {names.version}.")
            value = value.detach().to("cpu", torch.float32, copy=True).contiguous()
            if leaf == "A.weight":
                tensors[f"{name}.alpha"] = torch.tensor(scale_of(config, module, len(value)) * len(value))
                tensors[f"{name}.lora_down.weight"] = value
            elif leaf == "B.weight":
                tensors[f"{name}.lora_up.weight"] = value
            elif leaf == "magnitude_vector":
                ones = [1] * (state_dict[f"{module}.lora_A.weight"].dim() - 1)
                tensors[f"{name}.dora_scale"] = value.reshape(-1, *ones)
            else:
                raise InputError(f"{component}.{module} has a LoRA bias, which kohya's format does not support.")
    return tensors


def _kohya_name(component, module, names):
    """Returns kohya's name of a module, or None."""
    whole = module if component == "unet" or module.startswith("text_") else f"text_model.{module}"
    if component not in names.prefixes or not LAYER.fullmatch(whole):
        return None
    name = whole.replace(".", "_")
    if component == "unet" and names.original_blocks:
        name = original_name(whole)
    elif OF_XL.search(whole):
        return None
    return name and names.prefixes[component] + name


def save_kohya(
    path: str | Path, components: dict[str, tuple[dict, Any]], header: dict[str, str], dtype: torch.dtype = torch.float32,
    names: KohyaNames = STABLE_DIFFUSION.kohya,
) -> Path:  # fmt: skip
    """Writes the file atomically and returns its path; equal weights and headers give equal bytes.

    The default is float32: float16 would halve the few megabytes, but round the weights and underflow small updates.
    Readers cast by themselves. Alphas are always float32.
    """
    tensors = kohya_tensors(components, names)
    tensors = {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in tensors.items()}
    header = {key: value for key, value in header.items() if not key.endswith("token")} | {"format": "pt"}
    write_tensors(Path(path), tensors, header)
    return Path(path)

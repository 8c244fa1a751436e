"""The LoRA file in kohya's format, which A1111, ComfyUI, Forge and InvokeAI read.

Names and leaves are those of `networks/lora.py` in kohya-ss/sd-scripts; `dora_scale` is LyCORIS', of each output, which is
what peft trains: W + BA, each row brought to its magnitude. A1111 divides by the norms of the columns instead
(`apply_weight_decompose` in `extensions-builtin/Lora/network.py`), ComfyUI by those of the base's rows
(`weight_decompose` in `comfy/weight_adapter/base.py`): there DoRA draws something else.
"""

import json
import re
from pathlib import Path

import torch

from ..errors import InputError
from .dialects import LAYER
from .families import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, KohyaNames, family_by_width
from .lora_file import scale_of, write_tensors
from .original_names import original_name


OF_XL = re.compile(r"transformer_blocks\.[1-9]|add_embedding\.")


# ss_network_module and ss_network_args: kohya's own, and LyCORIS' for what it alone has.
NETWORK = {"ss_network_module": "networks.lora", "ss_network_args": json.dumps({})}
DORA_NETWORK = {
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": json.dumps({"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}),
}


def guess_family(components):
    """The family that state dicts of a LoRA are of, as far as they tell: Stable Diffusion 1, where they don't."""
    keys = {key: value.shape for key, value in components.get("unet", {}).items()}
    if "text_encoder_2" in components or any(OF_XL.search(key) for key in keys):
        return STABLE_DIFFUSION_XL
    widths = {shape[1] for key, shape in keys.items() if re.search(r"attn2\.to_[kv]\.lora_A", key)}
    return next(filter(None, map(family_by_width, widths)), STABLE_DIFFUSION)


def family_header(names, v_prediction=False):
    """The strings by which A1111 tells the family of the base."""
    version = names.version + ("_v" if v_prediction and names.says_v else "")
    return {"ss_v2": str(names.version == "sd_v2"), "ss_base_model_version": version}


def minimal_header(components):
    """The strings by which readers tell what a file is, as far as folded state dicts tell."""
    shapes = {key: value.shape for state_dict in components.values() for key, value in state_dict.items()}
    rank = max(shape[0] for key, shape in shapes.items() if ".lora_A." in key)
    is_dora = any(key.endswith(".lora_magnitude_vector") for key in shapes)
    return {
        **family_header(guess_family(components).kohya),
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        **(DORA_NETWORK if is_dora else NETWORK),
    }


def file_name(output_dir, step=None):
    """The name of the kohya file of a run: its folder's, since in A1111 the file's name is what a prompt calls it by.

    With `step`, that of a file from under way, so that several can lie in one folder of A1111's.
    """
    name = Path(output_dir).resolve().name
    # diffusers takes every file that ends so for its own.
    name = f"{name}-kohya" if name.endswith("pytorch_lora_weights") else name
    return f"{name}.safetensors" if step is None else f"{name}-step{step:06d}.safetensors"


def kohya_tensors(components, names: KohyaNames = STABLE_DIFFUSION.kohya):
    """{key: float32 tensor} by kohya's names of a family, of {component: (peft's state dict, its `LoraConfig`)}.

    The weights are as they were trained, and alpha says their scale: alpha / rank is peft's own. Where the configuration
    is None, the scale is in lora_B already.
    """
    tensors = {}
    for component, (state_dict, config) in components.items():
        for key, value in state_dict.items():
            module, _, leaf = key.partition(".lora_")
            name = _name_of(component, module, names)
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
                raise InputError(f"{component}.{module} has a bias in its LoRA, which kohya's format can't hold.")
    return tensors


def _name_of(component, module, names):
    """What kohya calls a module; None where it has no name for it."""
    whole = module if component == "unet" or module.startswith("text_model.") else f"text_model.{module}"
    if component not in names.prefixes or not LAYER.fullmatch(whole):
        return None
    name = whole.replace(".", "_")
    if component == "unet" and names.original_blocks:
        name = original_name(whole)
    elif OF_XL.search(whole):
        return None
    return name and names.prefixes[component] + name


def save_kohya(path, components, header, dtype=torch.float32, names: KohyaNames = STABLE_DIFFUSION.kohya) -> Path:
    """Writes the file whole or not at all and returns its path; the same weights and strings give the same bytes.

    In float32 unless told otherwise: float16 halves the few megabytes, but rounds what was trained, and an update that is
    still small falls below its smallest numbers. Readers cast by themselves. An alpha is always float32.
    """
    tensors = kohya_tensors(components, names)
    tensors = {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in tensors.items()}
    header = {key: value for key, value in header.items() if not key.endswith("token")} | {"format": "pt"}
    write_tensors(Path(path), tensors, header)
    return Path(path)

"""Writes a LoRA in peft's format: adapter_model.safetensors and adapter_config.json, with a folder per component."""

import collections
import json
from pathlib import Path

import torch

from ..files import write_whole
from .lora_file import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, check_dora, with_all_biases, write_tensors
from .updates import modules_of


def save_peft(
    folder: str | Path, components: dict[str, dict[str, torch.Tensor]], header: dict[str, str],
    dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """Writes folded state dicts with configurations that give each module the scale 1, and returns the folder.

    A single component is written into the folder itself, as expected by `PeftModel.from_pretrained`; several get
    subfolders. The layers of text encoders have the names of transformers before 5.6. `header` becomes the metadata of the
    weights files, which peft ignores; its `ss_sd_model_name` is also in the configurations.
    """
    check_dora(components)
    components = {name: with_all_biases(state_dict) for name, state_dict in components.items()}
    folder = Path(folder)
    header = {key: value for key, value in header.items() if not key.endswith("token")}
    for name, state_dict in components.items():
        part = folder if len(components) == 1 else folder / name
        ranks = {module: len(state_dict[f"{module}.lora_A.weight"]) for module in modules_of(state_dict)}
        (rank, _), *_ = collections.Counter(ranks.values()).most_common()
        others = {module: own for module, own in sorted(ranks.items()) if own != rank}
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": header.get("ss_sd_model_name"),
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(ranks),
            "use_rslora": False,
            "use_dora": any(key.endswith(".lora_magnitude_vector") for key in state_dict),
            "lora_bias": any(key.endswith(".lora_B.bias") for key in state_dict),
            "bias": "none",
            "inference_mode": True,
        }
        tensors = {f"base_model.model.{key}": value.to(dtype).contiguous() for key, value in state_dict.items()}
        write_tensors(part / PEFT_WEIGHTS_NAME, tensors, header | {"format": "pt"})
        write_whole(part / PEFT_CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder

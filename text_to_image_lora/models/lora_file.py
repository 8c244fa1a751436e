"""The LoRA file, in diffusers' format."""

import json
import math
import re
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..files import written_whole


# diffusers' LORA_WEIGHT_NAME_SAFE and LORA_ADAPTER_METADATA_KEY, without the seconds that importing them takes.
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
ADAPTER_METADATA_KEY = "lora_adapter_metadata"
FILE_KEY = re.compile(r"(unet|text_encoder(?:_2)?)\.(.+\.(?:lora_[AB]\.(?:weight|bias)|lora_magnitude_vector))")
# In the file a text encoder's names have this level, also where transformers (from 5.6) took it out of CLIPTextModel.
TEXT_MODEL = re.compile(r"^(text_encoder(?:_2)?)\.encoder\.")


def fold_scale(state_dict: dict[str, torch.Tensor], config: LoraConfig) -> dict[str, torch.Tensor]:
    """Copies peft's adapter state dict to float32 on the CPU with the scale in lora_B, so that the update is B·A.

    The scale is peft's: alpha/r, or alpha/√r with rsLoRA, each module with its own alpha (`alpha_pattern`) and rank.
    """
    folded = {}
    for key, value in state_dict.items():
        value = value.detach().to("cpu", torch.float32, copy=True)
        module, _, leaf = key.partition(".lora_")
        if leaf.startswith("B."):
            rank = state_dict[f"{module}.lora_A.weight"].shape[0]
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
            value *= alpha / (math.sqrt(rank) if config.use_rslora else rank)
        folded[key] = value.contiguous()
    return folded


def lora_file_metadata(components: dict[str, dict[str, torch.Tensor]], training: dict[str, str]) -> dict[str, str]:
    """The file's header: the caller's strings, and for each component the peft configuration that diffusers reads.

    `components` holds folded state dicts of one rank each. A key of `training` that ends in "token" is left out.
    """
    adapters = {}
    for name, state_dict in components.items():
        rank = next(value.shape[0] for key, value in state_dict.items() if ".lora_A." in key)
        config = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "use_dora": any(key.endswith(".lora_magnitude_vector") for key in state_dict),
            "lora_bias": any(key.endswith(".lora_B.bias") for key in state_dict),
            # Whole names: exactly these modules get an adapter. Less `text_model.`, as peft matches the end of a name.
            "target_modules": sorted({key.partition(".lora_")[0].removeprefix("text_model.") for key in state_dict}),
        }
        adapters |= {f"{name}.{key}": value for key, value in config.items()}
    header = {key: value for key, value in training.items() if not key.endswith("token")}
    return header | {"format": "pt", ADAPTER_METADATA_KEY: json.dumps(adapters, indent=2, sort_keys=True)}


def save_lora(path_or_dir, components: dict[str, tuple[dict, LoraConfig]], training: dict[str, str]) -> Path:
    """Writes the LoRA whole or not at all and returns its path; the same weights and strings give the same bytes.

    `components` maps `unet`, `text_encoder`, `text_encoder_2` to peft's state dict and configuration.
    """
    path = Path(path_or_dir)
    path = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    folded = {name: _one_rank(fold_scale(*adapter)) for name, adapter in components.items() if adapter[0]}
    tensors = {f"{name}.{key}": value for name, state_dict in folded.items() for key, value in state_dict.items()}
    tensors = {TEXT_MODEL.sub(r"\1.text_model.encoder.", key): value for key, value in tensors.items()}
    # peft's name for DoRA's magnitudes lacks this end, and transformers then leaves a text encoder's out in silence.
    tensors = {re.sub(r"(?<=\.lora_magnitude_vector)$", ".weight", key): value for key, value in tensors.items()}
    data = safetensors.torch.save(tensors, metadata=lora_file_metadata(folded, training))
    # safetensors writes its metadata in a new order every time.
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(memoryview(data)[8 + size :])
    return path


def _one_rank(state_dict):
    """Zeros fill up the smaller ranks: load_attn_procs scales by one alpha, so it misreads a file of mixed ranks."""
    rank = max(value.shape[0] for key, value in state_dict.items() if ".lora_A." in key)
    for key, value in state_dict.items():
        if key.endswith(".lora_A.weight"):
            state_dict[key] = torch.cat([value, value.new_zeros(rank - len(value), *value.shape[1:])])
        elif key.endswith(".lora_B.weight"):
            zeros = value.new_zeros(len(value), rank - value.shape[1], *value.shape[2:])
            state_dict[key] = torch.cat([value, zeros], dim=1)
    return state_dict


def load_lora(path_or_dir) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Reads a diffusers LoRA: for each component a state dict as peft names it with the scale folded, and the header.

    Text-encoder keys start `text_model.`. Raises `InputError` for anything else than such a file.
    """
    path = Path(path_or_dir)
    path = path / WEIGHTS_NAME if path.is_dir() else path
    remedy = f"Pass a diffusers LoRA: a .safetensors file, or a folder that holds {WEIGHTS_NAME}."
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        adapters = json.loads(header.get(ADAPTER_METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} can't be read as a safetensors file: {error}. {remedy}") from error
    components = {}
    for name, value in tensors.items():
        if name.startswith(("lora_unet_", "lora_te")):
            raise InputError(f"{path} is a LoRA in kohya's format, which can't be read yet. {remedy}")
        # diffusers' older names; the oldest files hold the UNet alone, without saying so.
        key = f"unet.{name}" if name.startswith(("down_blocks.", "mid_block.", "up_blocks.")) else name
        key = key.replace(".processor.", ".").replace(".to_out_lora.", ".to_out.0_lora.")
        key = re.sub(r"(?:_lora|\.lora|\.lora_linear_layer)\.down\.", ".lora_A.", key)
        key = re.sub(r"(?:_lora|\.lora|\.lora_linear_layer)\.up\.", ".lora_B.", key)
        key = TEXT_MODEL.sub(r"\1.text_model.encoder.", key)
        key = re.sub(r"(?<=\.lora_magnitude_vector)\.weight$", "", key)
        if not (match := FILE_KEY.fullmatch(key)):
            raise InputError(f"{path} is not a LoRA of Stable Diffusion: it holds {name}. {remedy}")
        components.setdefault(match[1], {})[match[2]] = value
    if not components:
        raise InputError(f"{path} holds no weights. {remedy}")
    for name, state_dict in components.items():
        for module in sorted({key.partition(".lora_")[0] for key in state_dict}):
            if not {f"{module}.lora_A.weight", f"{module}.lora_B.weight"} <= state_dict.keys():
                raise InputError(f"{path} is incomplete: {name}.{module} lacks its lora_A or its lora_B. {remedy}")
        alpha, pattern, rslora = (adapters.get(f"{name}.{k}") for k in ("lora_alpha", "alpha_pattern", "use_rslora"))
        if alpha is None:  # then it equals the rank
            components[name] = {key: value.float() for key, value in state_dict.items()}
        else:
            config = LoraConfig(lora_alpha=alpha, alpha_pattern=pattern or {}, use_rslora=bool(rslora))
            components[name] = fold_scale(state_dict, config)
    return components, header

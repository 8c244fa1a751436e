"""Writes LoRA files in diffusers' format and reads those of every dialect."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from ..errors import InputError
from ..files import written_whole
from ..small_files import Values, parse_json, read_json, shown
from .dialects import (
    COMPONENTS,
    PEFT_WEIGHTS_NAME,
    PICKLES,
    REMEDY,
    WEIGHTS_NAME,
    find_dialect,
    find_weight_files,
    open_safetensors,
    parse_key,
)
from .lora_checks import TensorFacts, check_tensors
from .modules import non_finite
from .single_files import safe_to_read


ADAPTER_METADATA_KEY = "lora_adapter_metadata"  # diffusers' constant, which would take seconds to import
PEFT_CONFIG_NAME = "adapter_config.json"
# In the file, names of text encoders have the level `text_model`, which transformers 5.6 removed from CLIPTextModel.
TEXT_MODEL = re.compile(r"^(text_encoder(?:_2)?)\.encoder\.")


# A key of `alpha_pattern`: the end of a module's name or, after ^, the whole name, or several of these.
PATTERN = re.compile(r"\^?[\w\\.-]+(\|\^?[\w\\.-]+)*")


class Scale(NamedTuple):
    """The fields of peft's `LoraConfig` that determine a module's scale; importing peft would take seconds."""

    lora_alpha: float
    alpha_pattern: dict[str, float]
    use_rslora: bool


def scale_of(config: Any, module: str, rank: int) -> float:
    """Returns peft's scale of a module's B·A: alpha/r, or alpha/√r with rsLoRA; `alpha_pattern` may override alpha.

    Without a configuration the scale is 1, because lora_B contains it already.
    """
    if config is None:
        return 1.0
    # Like peft's get_pattern_key: the first pattern that matches the end of the name, or with ^ the whole name. They are
    # names of modules; peft would also accept regular expressions, which could take forever.
    overrides = (value for key, value in config.alpha_pattern.items() if _ends_with(module, key))
    alpha = next(overrides, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _ends_with(module, pattern):
    names = pattern.replace("\\.", ".").split("|")
    return any(f".{module}".endswith(f".{name}") or f"^{module}" == name for name in names)


def fold_scale(state_dict: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Copies a state dict of peft to float32 on the CPU and multiplies lora_B by the scale, so that the update is B·A.

    `config` is its `LoraConfig`, or None if lora_B contains the scale already.
    """
    folded = {}
    for key, value in state_dict.items():
        value = value.detach().to("cpu", torch.float32, copy=True)
        module, _, leaf = key.partition(".lora_")
        if leaf.startswith("B."):
            value *= scale_of(config, module, state_dict[f"{module}.lora_A.weight"].shape[0])
        folded[key] = value.contiguous()
    return folded


def lora_file_metadata(components: dict[str, dict[str, torch.Tensor]], training: dict[str, str]) -> dict[str, str]:
    """Returns the file's metadata: `training`, and the peft configuration of each component, which diffusers reads.

    `components` holds folded state dicts of one rank each. Keys of `training` that end in "token" are left out.
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
            # Full names, so that exactly these modules are adapted; without `text_model.`, as peft matches the end of names.
            "target_modules": sorted({key.partition(".lora_")[0].removeprefix("text_model.") for key in state_dict}),
        }
        adapters |= {f"{name}.{key}": value for key, value in config.items()}
    header = {key: value for key, value in training.items() if not key.endswith("token")}
    return header | {"format": "pt", ADAPTER_METADATA_KEY: json.dumps(adapters, indent=2, sort_keys=True)}


def save_lora(
    path_or_dir: str | Path, components: dict[str, tuple[dict, Any]], training: dict[str, str],
    dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """Writes a LoRA atomically and returns its path; equal weights and metadata give equal bytes.

    `components` maps `unet`, `text_encoder` and `text_encoder_2` to peft's state dict and its `LoraConfig`, which is None for
    a folded state dict.
    """
    path = Path(path_or_dir)
    path = path if path.suffix.lower() == ".safetensors" else path / WEIGHTS_NAME
    check_dora({name: state_dict for name, (state_dict, _) in components.items()})
    folded = {name: _one_rank(fold_scale(*adapter)) for name, adapter in components.items() if adapter[0]}
    tensors = {key: value.to(dtype) for key, value in file_tensors(folded).items()}
    write_tensors(path, tensors, lora_file_metadata(folded, training))
    return path


def file_tensors(components: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns {key in the file: tensor} of folded state dicts, with the names that diffusers reads."""
    tensors = {f"{name}.{key}": value for name, state_dict in components.items() for key, value in state_dict.items()}
    tensors = {TEXT_MODEL.sub(r"\1.text_model.encoder.", key): value for key, value in tensors.items()}
    # peft's name for DoRA's magnitudes lacks `.weight`; transformers would silently ignore those of text encoders.
    return {re.sub(r"(?<=\.lora_magnitude_vector)$", ".weight", key): value for key, value in tensors.items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    """Writes a safetensors file atomically; equal tensors and headers give equal bytes.

    Adds the hashes by which programs identify files: kohya's hash of the bytes after the header, its legacy hash of 64 KiB
    of a file that has only the `ss_*` keys, and ModelSpec's hash.
    """
    data = safetensors.torch.save(tensors)
    size = int.from_bytes(data[:8], "little")
    places, body = json.loads(data[8 : 8 + size]), memoryview(data)[8 + size :]
    places.pop("__metadata__", None)

    def head(strings):
        # safetensors would write the metadata in a random order.
        text = json.dumps(places | {"__metadata__": strings}, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    digest = hashlib.sha256(body).hexdigest()
    old = head({key: value for key, value in header.items() if key.startswith("ss_")})
    first, last = (max(place - len(old), 0) for place in (0x100000, 0x110000))
    legacy = hashlib.sha256(old[0x100000:0x110000] + bytes(body[first:last])).hexdigest()[:8]
    hashes = {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        file.write(head(header | hashes))
        file.write(body)


def _one_rank(state_dict):
    """Pads smaller ranks with zeros, because `load_attn_procs` uses a single alpha and would misread mixed ranks."""
    rank = max(value.shape[0] for key, value in state_dict.items() if ".lora_A." in key)
    state_dict = with_all_biases(state_dict)
    for key, value in state_dict.items():
        if key.endswith(".lora_A.weight"):
            state_dict[key] = torch.cat([value, value.new_zeros(rank - len(value), *value.shape[1:])])
        elif key.endswith(".lora_B.weight"):
            zeros = value.new_zeros(len(value), rank - value.shape[1], *value.shape[2:])
            state_dict[key] = torch.cat([value, zeros], dim=1)
    return state_dict


def with_all_biases(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds biases of zeros if only some layers have a bias, because peft supports it for all layers or none."""
    if not any(key.endswith(".lora_B.bias") for key in state_dict):
        return state_dict
    ups = {key.removesuffix("weight"): value for key, value in state_dict.items() if key.endswith(".lora_B.weight")}
    return {f"{name}bias": value.new_zeros(len(value)) for name, value in ups.items()} | state_dict


def check_dora(components: dict[str, dict[str, torch.Tensor]]) -> None:
    """Raises `InputError` if only some layers of a component have DoRA, which peft supports for all layers or none."""
    for name, state_dict in components.items():
        layers = sum(key.endswith(".lora_A.weight") for key in state_dict)
        with_dora = sum(key.endswith(".lora_magnitude_vector") for key in state_dict)
        if with_dora not in (0, layers):
            raise InputError(
                f"{with_dora} of the {layers} layers of {name} have DoRA. diffusers and peft only read files in which all "
                "layers of a component have it, or none. Pass --to kohya."
            )


def as_diffusers(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads a LoRA of any dialect as ({key: float32 tensor}, header), with the keys of our own file.

    The scale is folded into lora_B and each component has one rank, so that the tensors can be passed to
    `load_lora_weights` of diffusers.
    """
    components, header = load_lora(path)
    tensors = file_tensors({name: _one_rank(state_dict) for name, state_dict in components.items()})
    return dict(sorted(tensors.items())), header


def load_lora(path_or_dir: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Reads a LoRA of any dialect as ({component: state dict with peft's names and folded scale}, header).

    Ranks may differ between modules. Keys of text encoders start with `text_model.`. Raises `InputError` for other files.
    """
    components, header = {}, {}
    for path, component in find_weight_files(Path(path_or_dir)):
        try:
            tensors, header = read_tensors(path)
            find_dialect(tensors)
        except InputError as error:
            raise InputError(f"{path}: {error} {REMEDY}") from error
        facts = {key: TensorFacts(str(value.dtype), tuple(value.shape)) for key, value in tensors.items()}
        check_tensors(path, facts, component)
        try:
            found, configs = _by_module(tensors, component), _read_scales(path, header)
            for name, modules in found.items():
                config = configs.get(name, configs.get(None))
                components[name] = _folded(name, modules, config)
        except InputError as error:
            raise InputError(f"{path}: {error} {REMEDY}") from error
        check_finite(path, tensors)
    for name, state_dict in components.items():
        if faults := non_finite((f"{name}.{key}", value) for key, value in state_dict.items()):
            raise InputError(f"{path_or_dir}: with its alpha, {faults}. Its alpha is damaged: get the file again.")
    return components, header


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads ({key: tensor}, header) of a safetensors file or, without running its code, of a pickled state dict."""
    if path.suffix.lower() not in PICKLES:
        with open_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata() or {}
    with safe_to_read(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    return {key: loaded[key] for key in sorted(loaded) if isinstance(loaded[key], torch.Tensor)}, {}


def check_finite(path: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Raises `InputError` if tensors of a LoRA file (read from `path` if they are not given) hold NaN or infinities."""
    tensors = read_tensors(path)[0] if tensors is None else tensors
    if faults := non_finite(tensors.items()):
        raise InputError(f"{path}: {faults}. Its training has diverged or the file is damaged: use an earlier one.")


def _read_scales(path: Path, header: dict[str, str]) -> dict[str | None, Scale]:
    """Reads {component, or None for all: `Scale`} from diffusers' metadata or from the configuration file of peft."""
    stored = path.parent / PEFT_CONFIG_NAME
    try:
        if path.name == PEFT_WEIGHTS_NAME and stored.exists():
            config = read_json(stored, PEFT_CONFIG_NAME, remedy="")
            if (kind := config.want("peft_type", str, "LORA")) != "LORA":
                raise InputError(f"{PEFT_CONFIG_NAME} says {kind}, which is not supported; only LoRA and DoRA are.")
            return {None: _scale(config)}
        adapters = read_adapter_metadata(header)
        parts = {
            name: Values({k.partition(".")[2]: v for k, v in adapters.items() if k.startswith(f"{name}.")}, name, "")
            for name in COMPONENTS
        }
        return {name: _scale(part) for name, part in parts.items() if "lora_alpha" in part}
    except InputError as error:
        raise InputError(f"its configuration can't be read ({str(error).removesuffix('.')}).") from error


def read_adapter_metadata(header: dict[str, str]) -> Values:
    """Returns the configurations of peft in the header of a LoRA file, {"component.key": value}; raises `InputError`."""
    return parse_json(header.get(ADAPTER_METADATA_KEY, "{}"), ADAPTER_METADATA_KEY, remedy="")


def _scale(stored):
    """Makes the `Scale` of the `Values` of a `LoraConfig`; raises `InputError` for values of the wrong types."""
    patterns = Values(stored.want("alpha_pattern", dict, None) or {}, "alpha_pattern", "")
    for pattern in patterns:
        patterns.want(pattern, float)
        if not PATTERN.fullmatch(pattern):
            raise patterns.refusal(
                f"{shown(pattern)} is a regular expression; only names of modules, or several with | between them, are read"
            )
    return Scale(stored.want("lora_alpha", float), patterns, bool(stored.want("use_rslora", bool, None)))


def _by_module(tensors, component):
    """Returns {component: {module: {leaf: tensor}}} by what the keys mean in the dialect of the file."""
    dialect, found = find_dialect(tensors), {}
    for key, value in tensors.items():
        name, module, leaf = parse_key(key, dialect, component)  # pyright: ignore - `find_dialect` has checked the keys
        found.setdefault(name, {}).setdefault(module, {})[leaf] = value.float()
    return found


def _folded(name, modules, config):
    """Returns a component's state dict with the scale, from the modules' alphas or the configuration, folded into lora_B."""
    state_dict = {}
    for module, leaves in modules.items():
        if not {"lora_A.weight", "lora_B.weight"} <= leaves.keys():
            raise InputError(f"it is incomplete: {name}.{module} lacks its lora_A or its lora_B.")
        a, b, mid = (leaves.get(f"lora_{leaf}.weight") for leaf in ("A", "B", "mid"))
        if a.dim() not in (2, 4) or b.dim() != a.dim() or not 0 < len(a) == b.shape[1]:
            raise InputError(f"the two tensors of {name}.{module} do not fit: {list(a.shape)} and {list(b.shape)}.")
        if mid is not None:  # Tucker decomposition of LyCORIS: a convolution between two 1x1 convolutions
            if mid.dim() != 4 or mid.shape[:2] != (len(a), len(a)) or a.shape[2:] != (1, 1):
                raise InputError(f"the tensors of {name}.{module} do not fit: {list(a.shape)} and {list(mid.shape)}.")
            a = torch.einsum("rskl,si->rikl", mid, a.flatten(1))
        rank = len(a)
        scale = leaves["alpha"].item() / rank if "alpha" in leaves else scale_of(config, module, rank)
        state_dict[f"{module}.lora_A.weight"] = a.contiguous()
        state_dict[f"{module}.lora_B.weight"] = (b * scale).contiguous()
        if "lora_B.bias" in leaves:
            if leaves["lora_B.bias"].shape != (len(b),):
                shapes = f"{list(leaves['lora_B.bias'].shape)} instead of [{len(b)}]"
                raise InputError(f"{name}.{module} is damaged: its lora_B.bias has the shape {shapes}.")
            state_dict[f"{module}.lora_B.bias"] = leaves["lora_B.bias"] * scale
        if "lora_magnitude_vector" in leaves:
            state_dict[f"{module}.lora_magnitude_vector"] = _magnitudes(name, module, leaves, b)
    return state_dict


def _magnitudes(name, module, leaves, b):
    """Returns DoRA's magnitudes in peft's shape: (out,) for a linear layer, (1, out, 1, 1) for a convolution."""
    value, out = leaves["lora_magnitude_vector"], len(b)
    if value.numel() != out or (value.dim() > 1 and value.shape[0] != out and value.shape[:2] != (1, out)):
        raise InputError(
            f"the DoRA magnitudes of {name}.{module} have the shape {list(value.shape)}: only magnitudes per output "
            f"(here {out}) are supported, not the older ones of LyCORIS per input."
        )
    return value.reshape(1, out, 1, 1) if b.dim() == 4 else value.flatten()

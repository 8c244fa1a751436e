"""The dialects of LoRA files: which component, layer and tensor each key of a file means.

A key means (component, module, leaf) in the names of our own file: `unet`, `mid_block.attentions.0.proj_in`,
`lora_A.weight`. The leaf may also be `alpha` (a scalar; scale = alpha / rank) or `lora_mid.weight` (a Tucker core).
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import special_kind
from .original_names import diffusers_name


# diffusers' LORA_WEIGHT_NAME_SAFE, which would take seconds to import, and peft's name of its weights file.
WEIGHTS_NAME, PEFT_WEIGHTS_NAME = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
REMEDY = (
    "Pass a LoRA of Stable Diffusion: a .safetensors file of diffusers' or kohya's format, "
    f"or a folder with {WEIGHTS_NAME} or {PEFT_WEIGHTS_NAME}."
)

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
CONVERT = (
    "only .safetensors files are read, because other formats can contain code. Convert it: "
    "python scripts/convert_lora.py IN OUT.safetensors."
)

# Other kinds of adapters, by parts of keys that only they have.
OTHER_ADAPTERS = {
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "(IA)3": re.compile(r"\.on_input$|\.ia3_l"),
    "OFT": re.compile(r"\.(oft|boft)_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "VeRA": re.compile(r"\.vera_lambda"),
    "a model's full difference": re.compile(r"\.(diff|diff_b|w_norm|b_norm|set_weight)$"),
}

OTHER_ARCHITECTURES = {
    "Flux": re.compile(r"double_blocks|single_blocks|single_transformer_blocks"),
    "Stable Diffusion 3": re.compile(r"joint_blocks|transformer\.transformer_blocks"),
}

KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lycoris_text_model_": "text_encoder",  # LyCORIS by itself names no component
    "lycoris_": "unet",
}
# Names of tensors in all dialects, after the name of the module.
LEAVES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_mid.weight": "lora_mid.weight",
    "dora_scale": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}
LEAVES |= {name: name for name in ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "alpha")}
# Layers of diffusers' UNets of Stable Diffusion and of CLIP, with dots.
LAYER = re.compile(
    r"""((down|up)_blocks\.\d+|mid_block)\.(
        attentions\.\d+\.(
            proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))
        )
        |resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)
        |(down|up)samplers\.0\.conv
    )
    |conv_in|conv_out|(time|add)_embedding\.linear_[12]
    |text_model\.encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])|text_projection""",
    re.VERBOSE,
)
# Parts of these names that contain an underscore, which kohya's names do not distinguish from a dot.
COMPOUND = re.compile(
    r"(?<![^.])("
    r"down\.blocks|mid\.block|up\.blocks|transformer\.blocks|to\.[qkv]|to\.out|proj\.in|proj\.out|time\.emb\.proj|"
    r"conv\.shortcut|conv\.in|conv\.out|time\.embedding|add\.embedding|linear\.[12]|text\.model|text\.projection|self\.attn|[qkv]\.proj|out\.proj"
    r")(?![^.])"
)

LEAF = re.compile(rf"(.+)\.({'|'.join(map(re.escape, LEAVES))})", re.ASCII)
# Components as ComfyUI names them, with dots.
COMFYUI_PREFIX = re.compile(r"(?:model\.)?(diffusion_model|text_encoders\.clip_[lg]\.transformer)\.")
COMFYUI_COMPONENTS = {
    "diffusion_model": "unet",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
}
UNET_PART = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\.")


def find_weight_files(path: str | Path) -> list[tuple[Path, str | None]]:
    """Returns the weights files of a LoRA file or folder, each with its component if it holds only that one."""
    path = Path(path)
    if not path.is_dir() or (path / WEIGHTS_NAME).exists():
        return [(path / WEIGHTS_NAME if path.is_dir() else path, None)]
    if (path / PEFT_WEIGHTS_NAME).exists():
        return [(path / PEFT_WEIGHTS_NAME, None)]
    parts = [(path / name / PEFT_WEIGHTS_NAME, name) for name in COMPONENTS]
    return [part for part in parts if part[0].exists()] or [(path / WEIGHTS_NAME, None)]


@contextlib.contextmanager
def open_safetensors(path: str | Path, framework: str = "pt") -> Iterator[Any]:
    """Opens a safetensors file; raises `InputError` if it is not one."""
    from safetensors import SafetensorError, safe_open

    if kind := special_kind(path):
        raise InputError(f"it is {kind}, not a file.")
    try:
        with safe_open(path, framework) as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"it can't be read as a safetensors file ({error}).") from error


def find_dialect(keys: Iterable[str]) -> str:
    """Returns "diffusers", "old diffusers", "kohya" or "peft"; raises `InputError` for other files."""
    keys = sorted(keys)
    for name, pattern in OTHER_ADAPTERS.items():
        if any(pattern.search(key) for key in keys):
            raise InputError(f"it is {name}, which is not supported; only LoRA and DoRA are.")
    if any(key.startswith("bundle_emb.") for key in keys):
        raise InputError("it contains embeddings (textual inversion) beside the LoRA, which are not supported.")
    for name, pattern in OTHER_ARCHITECTURES.items():
        if any(pattern.search(key) for key in keys):
            raise InputError(
                f"it is a LoRA of {name}, which is not supported; only those of Stable Diffusion 1, 2 and XL are."
            )
    if not keys:
        raise InputError("it contains no weights.")
    dialect = likely_dialect(keys)
    for key in keys:
        if parse_key(key, dialect) is None:
            raise InputError(f"it is not a LoRA of Stable Diffusion: it contains {key}.")
    return dialect


def likely_dialect(keys) -> str:
    """The dialect of a file's keys, as far as some of them tell, whether or not all of them are in it."""
    return next((name for name, knows in _KNOWS.items() if any(map(knows, keys))), "diffusers")


_KNOWS = {
    "kohya": lambda key: key.startswith(tuple(KOHYA_PREFIXES)),
    "peft": lambda key: key.startswith("base_model.model."),
    "old diffusers": lambda key: re.search(r"(_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight$", key),
    "diffusers": lambda key: True,
}


def parse_key(key: str, dialect: str, component: str | None = None) -> tuple[str, str, str] | None:
    """Returns the (component, module, leaf) that a key means in a dialect, or None if it means nothing.

    `component` is given if the file is known to hold only that component, as the files of peft do.
    """
    return _kohya_place(key) if dialect == "kohya" else _dotted_place(key, component)


def _kohya_place(key):
    prefix = next((prefix for prefix in KOHYA_PREFIXES if key.startswith(prefix)), None)
    match = LEAF.fullmatch(key)
    if prefix is None or match is None:
        return None
    # diffusers' converter leaves a dot in the names of DoRA's magnitudes.
    name, leaf = match[1].replace(".", "_").removeprefix(prefix), LEAVES[match[2]]
    component = KOHYA_PREFIXES[prefix]
    if prefix == "lycoris_text_model_":
        name = f"text_model_{name}"
    module = _with_dots(name, component)
    return (component, module, leaf) if LAYER.fullmatch(module) else None


def _with_dots(name, component):
    """Returns the module of a name with underscores, which may be that of the original code if it is one of the UNet."""
    if component == "unet":
        name = diffusers_name(name) or name
    return COMPOUND.sub(lambda found: found[0].replace(".", "_"), name.replace("_", "."))


def _dotted_place(key, component):
    key = key.removeprefix("base_model.model.").replace(".default.", ".")
    key = COMFYUI_PREFIX.sub(lambda found: f"{COMFYUI_COMPONENTS[found[1]]}.", key, count=1)
    # The oldest files of diffusers hold only the UNet, and neither they nor peft's name the component.
    if component is not None:
        key = f"{component}.{key}"
    elif UNET_PART.match(key):
        key = f"unet.{key}"
    elif key.startswith(("text_model.", "encoder.")):
        key = f"text_encoder.{key}"
    key = key.replace(".processor.", ".").replace(".to_out_lora.", ".to_out.0_lora.")
    key = re.sub(r"(?:_lora|\.lora|\.lora_linear_layer)\.down\.", ".lora_A.", key)
    key = re.sub(r"(?:_lora|\.lora|\.lora_linear_layer)\.up\.", ".lora_B.", key)
    match = LEAF.fullmatch(key)
    if match is None:
        return None
    component, _, module = match[1].partition(".")
    if component not in COMPONENTS or not module:
        return None
    if component == "unet" and not UNET_PART.match(f"{module}."):
        module = (
            _with_dots(module.replace(".", "_"), component) if diffusers_name(module.replace(".", "_")) else module
        )
    if component != "unet":
        # transformers 5.6 removed `text_model` from CLIPTextModel; diffusers' oldest files use the UNet's attention names.
        module = module if module.startswith("text_model.") or module == "text_projection" else f"text_model.{module}"
        module = re.sub(r"(?<=self_attn\.)to_([qkv]|out)(\.0)?$", r"\1_proj", module)
    return component, module, LEAVES[match[2]]

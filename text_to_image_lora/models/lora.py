"""LoRA adapters on a frozen model, with peft."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import InputError
from ..libraries import hide_modules
from .settings import LoraSettings


TEXT_TARGET_MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
INITIALISATIONS = {"true": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


def add_lora(model: Any, settings: LoraSettings) -> int:
    """Freezes a model, adds float32 adapters to the `target_modules`, and returns the number of adapted modules.

    Raises `InputError` if a name in `target_modules` matches no layer, or if the rank is larger than the width of all of them.
    """
    adaptable = (torch.nn.Linear, torch.nn.Conv2d)
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, adaptable)}
    targets = settings.target_modules or ()
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            kinds = sorted({".".join(p for p in name.split(".")[-3:] if not p.isdigit()) for name in linear})
            raise InputError(
                f"--target_modules {target}: the model has no such layer. Its layers are: {', '.join(kinds)}."
            )
    ends = tuple(f".{target}" for target in targets)
    _check_rank(settings.rank, {name: weight for name, weight in linear.items() if f".{name}".endswith(ends)})
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),  # any number, says peft's documentation
        lora_dropout=settings.lora_dropout,
        target_modules=list(targets),
        init_lora_weights=INITIALISATIONS[settings.init_lora_weights],
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    try:
        with hide_modules("bitsandbytes"):  # peft would import it to look for its layers
            model.add_adapter(config)
    except ValueError as error:  # such as orthogonal, which peft supports for linear layers only
        raise InputError(
            f"The LoRA can't be added ({error}). Check --init_lora_weights and --target_modules."
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return sum(isinstance(module, BaseTunerLayer) for module in model.modules())


def _check_rank(rank, weights):
    """Raises `InputError` if no layer {name: weight} is so wide; such a rank could take minutes and all memory for nothing."""
    widths = {name: max(len(weight), weight[0].numel()) for name, weight in weights.items()}
    widest = max(widths, key=lambda name: widths[name])
    if rank > widths[widest]:
        raise InputError(
            f"A rank of {rank} is larger than the width of every layer that is adapted; the widest, {widest}, has "
            f"{widths[widest]} inputs or outputs. Pass at most {widths[widest]} as --rank, or as --text_encoder_rank for the "
            "layers of a text encoder."
        )


def check_count(denoiser: torch.nn.Module, num_adapted: int, modules_per_block: int) -> None:
    """Raises `RuntimeError` if the layers of a family are not found in every block; a rename would silently train less."""
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in denoiser.modules())
    if blocks and num_adapted != modules_per_block * blocks:
        raise RuntimeError(
            f"{num_adapted} modules were adapted where {blocks} transformer blocks have {modules_per_block} each."
        )


def text_layers(text_encoder: Any, leave_out: int = 0) -> list[str]:
    """Returns the names of the layers of a CLIP text model to adapt, without those of its last `leave_out` blocks."""
    names = [name for name, _ in text_encoder.named_modules() if name.endswith(TEXT_TARGET_MODULES)]
    blocks = text_encoder.config.num_hidden_layers
    if len(names) != len(TEXT_TARGET_MODULES) * blocks:
        raise RuntimeError(
            f"{len(names)} layers were found where {blocks} blocks have {len(TEXT_TARGET_MODULES)} each."
        )
    return [name for name in names if int(name.partition("layers.")[2].partition(".")[0]) < blocks - leave_out]


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Returns a list, not a generator, because the optimizer and the gradient clipping both iterate over it."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_state(model: Any) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Returns the adapter's state dict with peft's names, and its `LoraConfig`."""
    # Without save_embedding_layers=False, peft would ask the hub about embeddings, which are not adapted.
    state_dict = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    return state_dict, model.peft_config["default"]


def load_adapter(model: Any, state_dict: dict[str, torch.Tensor]) -> None:
    """Loads a state dict of `adapter_state`; raises `ValueError` for missing or unexpected tensors and wrong shapes."""
    expected = {name: value.shape for name, value in adapter_state(model)[0].items()}
    given = {name: value.shape for name, value in state_dict.items()}
    if expected != given:
        wrong = sorted({name for name, _ in set(expected.items()) ^ set(given.items())})
        raise ValueError(f"{len(wrong)} of {len(expected)} tensors do not fit the adapter, the first: {wrong[0]}")
    set_peft_model_state_dict(model, state_dict, adapter_name="default")


@contextlib.contextmanager
def without_adapters(*models: torch.nn.Module) -> Iterator[None]:
    """Disables the adapters of models inside the context; gradients still flow through the models.

    peft's own switch would also make the weights of the layers trainable, which are views of the master weights.
    """
    layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


@contextlib.contextmanager
def scaled_adapters(scale: float, *models: torch.nn.Module) -> Iterator[None]:
    """Multiplies the updates of the adapters of models by `scale` inside the context; with 0 they are the base, bit for bit.

    The weights of B are multiplied, because the lean forward does not read peft's `scaling`; they are restored from a copy.
    """
    if scale == 0:
        with without_adapters(*models):
            yield
        return
    if scale == 1:
        yield
        return
    layers: list[Any] = [module for model in models for module in model.modules() if isinstance(module, LoraLayer)]
    weights: list[torch.Tensor] = [each.weight.detach() for layer in layers for each in layer.lora_B.values()]
    copies = [weight.clone() for weight in weights]
    for weight in weights:
        weight.mul_(scale)
    try:
        yield
    finally:
        for weight, copy in zip(weights, copies, strict=True):
            weight.copy_(copy)


def merge_states(parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Merges the state dicts of several models into one; the keys of models other than the UNet get a prefix."""
    return {
        key if name == "unet" else f"{name}:{key}": value
        for name, part in parts.items()
        for key, value in part.items()
    }


def extract_state(state_dict: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Returns the state dict of one model from the result of `merge_states`."""
    parts = [key.rpartition(":") for key in state_dict]
    return {key: state_dict[owner + colon + key] for owner, colon, key in parts if (owner or "unet") == name}


def start_from(model: Any, state_dict: dict[str, torch.Tensor], *, partial: bool = False) -> None:
    """Initializes a model's adapter from a LoRA with folded scale (B·A is the whole update), at any alpha.

    If the rank of the LoRA is smaller, the additional directions are initialized like those of a new adapter; with
    `partial`, so are layers that the LoRA lacks.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    scaling = {name: cast(Any, module).scaling["default"] for name, module in layers}
    fresh = adapter_state(model)[0]
    unfolded = {name: value for name, value in fresh.items() if partial and state_dict}
    for name, value in state_dict.items():
        module, _, leaf = name.partition(".lora_")
        own = fresh.get(name, value)
        if leaf == "A.weight" and len(value) < len(own):
            value = torch.cat([value, own[len(value) :]])
        elif leaf.startswith("B") and module in scaling:
            value = value / scaling[module]
            if leaf == "B.weight" and value.shape[1] < own.shape[1]:
                value = torch.cat(
                    [value, own.new_zeros(len(value), own.shape[1] - value.shape[1], *value.shape[2:])], dim=1
                )
        unfolded[name] = value
    load_adapter(model, unfolded)


def start_from_file(models: dict[str, Any], loaded: dict[str, dict], path: str | Path) -> None:
    """Initializes the adapters of models ({component: model}) from what `lora_file.load_lora` read from `path`.

    The LoRA may lack layers of a text encoder, because clip skip leaves out the last ones.
    """
    if set(loaded) != set(models):
        raise InputError(
            f"{path}: it adapts {' and '.join(sorted(loaded)) or 'nothing'}, but this run trains the "
            f"{' and the '.join(models)}{'' if len(models) > 1 else ' only'}. Start from a LoRA of the same models."
        )
    try:
        for name, model in models.items():
            start_from(model, loaded[name], partial=name.startswith("text_encoder"))
    except ValueError as error:
        raise InputError(
            f"{path}: {error}. Check --rank, --target_modules and --use_dora. (scripts/convert_lora.py --rank reduces "
            "the rank of a LoRA; a smaller rank is accepted.)"
        ) from error

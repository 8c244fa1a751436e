"""Adapters on a frozen model, through peft."""

import contextlib

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import InputError
from ..libraries import hide_modules
from .settings import LoraSettings


TEXT_TARGET_MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
INITIALISATIONS = {"true": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


def add_lora(model, settings: LoraSettings) -> int:
    """Freezes the model, adds float32 adapters to the `target_modules`, and returns how many modules were adapted.

    Raises `InputError` where a name in `target_modules` matches nothing.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    for target in settings.target_modules:
        if not any(name == target or name.endswith("." + target) for name in linear):
            kinds = sorted({".".join(p for p in name.split(".")[-3:] if not p.isdigit()) for name in linear})
            raise InputError(
                f"--target_modules {target}: the model has no such layer. Try some of: {', '.join(kinds)}."
            )
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        init_lora_weights=INITIALISATIONS[settings.init_lora_weights],
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    try:
        with hide_modules("bitsandbytes"):  # for whose layers peft would look
            model.add_adapter(config)
    except ValueError as error:  # such as orthogonal, which peft has for linear layers alone
        raise InputError(
            f"The LoRA can't be added ({error}). Check --init_lora_weights and --target_modules."
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return sum(isinstance(module, BaseTunerLayer) for module in model.modules())


def check_count(denoiser, num_adapted, modules_per_block):
    """Raises `RuntimeError` where a family's own layers no longer reach all of every transformer block.

    An upstream rename would otherwise train less in silence.
    """
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in denoiser.modules())
    if blocks and num_adapted != modules_per_block * blocks:
        raise RuntimeError(
            f"{num_adapted} modules were adapted where {blocks} transformer blocks have {modules_per_block} each."
        )


def text_layers(text_encoder, leave_out=0):
    """The names of the layers of a CLIP text model to adapt, less those of its last `leave_out` blocks."""
    names = [name for name, _ in text_encoder.named_modules() if name.endswith(TEXT_TARGET_MODULES)]
    blocks = text_encoder.config.num_hidden_layers
    if len(names) != len(TEXT_TARGET_MODULES) * blocks:
        raise RuntimeError(
            f"{len(names)} layers were found where {blocks} blocks have {len(TEXT_TARGET_MODULES)} each."
        )
    return [name for name in names if int(name.partition("layers.")[2].partition(".")[0]) < blocks - leave_out]


def trainable_parameters(model):
    """A list, not a generator: the optimizer and the clipping both walk through it."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_state(model):
    """The adapter's tensors as peft names them, and its `LoraConfig`."""
    # Without a look at the embeddings, for which peft would ask the hub: no adapter is on them.
    state_dict = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    return state_dict, model.peft_config["default"]


def load_adapter(model, state_dict):
    """Puts back what `adapter_state` gave; a tensor missing, left over or of another shape is a `ValueError`."""
    expected = {name: value.shape for name, value in adapter_state(model)[0].items()}
    given = {name: value.shape for name, value in state_dict.items()}
    if expected != given:
        wrong = sorted({name for name, _ in set(expected.items()) ^ set(given.items())})
        raise ValueError(f"{len(wrong)} of {len(expected)} tensors do not fit the adapter, the first: {wrong[0]}")
    set_peft_model_state_dict(model, state_dict, adapter_name="default")


@contextlib.contextmanager
def without_adapters(*models):
    """Inside, the models are as they were before their LoRA; gradients still pass through them.

    peft's own switch would also make the layers' weights trainable again, which are views of what is trained.
    """
    layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_states(parts):
    """One state dict of those of several models: the UNet's names as they are, the others' after the model's."""
    return {
        key if name == "unet" else f"{name}:{key}": value
        for name, part in parts.items()
        for key, value in part.items()
    }


def extract_state(state_dict, name):
    """What `merge_states` took from that model."""
    parts = [key.rpartition(":") for key in state_dict]
    return {key: state_dict[owner + colon + key] for owner, colon, key in parts if (owner or "unet") == name}


def start_from(model, state_dict, *, partial=False):
    """Starts from a LoRA whose scale is folded in (B·A is the whole update), at any alpha of the adapter's own.

    Where its rank is smaller, the further directions begin as a fresh adapter's do; with `partial`, so do layers that it
    lacks.
    """
    scaling = {
        name: module.scaling["default"] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
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


def start_from_file(models, loaded, path):
    """`start_from` for the adapted models ({component: model}), of what `lora_file.load_lora` read from `path`.

    A text encoder may lack layers there: with a clip skip, its last ones are not trained.
    """
    if set(loaded) != set(models):
        raise InputError(
            f"{path}: it adapts {' and '.join(sorted(loaded)) or 'nothing'}, and this trains the {' and the '.join(models)}"
            f"{'' if len(models) > 1 else ' alone'}. Start from a LoRA of the same."
        )
    try:
        for name, model in models.items():
            start_from(model, loaded[name], partial=name.startswith("text_encoder"))
    except ValueError as error:
        raise InputError(
            f"{path}: {error}. Check --rank, --target_modules and --use_dora. (scripts/convert_lora.py --rank makes a "
            "LoRA smaller; a smaller one fits as it is.)"
        ) from error

"""Checks by the shapes of weights that LoRAs, a ControlNet and a VAE fit a base model. Needs no torch."""

import json
import re
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..models.dialects import likely_dialect, parse_key
from ..models.families import family_by_width
from .find import ControlNet
from .rows import Lora


# Entries of a ControlNet's config.json that must equal those of the UNet.
CONTROLNET_FITS = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types")
# Keys of the two factors of a LoRA, in all dialects.
FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)\.weight")
OTHER_FACTOR = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
OTHER_FACTOR |= {up: down for down, up in OTHER_FACTOR.items()}
CROSS_ATTENTION = re.compile(r"unet\..*attn2\.to_[kv]")


def check_fits(
    shapes: dict[str, tuple[int, ...]], loras: Sequence[Lora], clip_skip: int, latent_channels: int | None
) -> None:
    """Raises `InputError` if LoRAs, the clip skip or a VAE do not fit the base model.

    Args:
        shapes: The shapes of the base model's weights, such as {"unet.conv_in.weight": (320, 4, 3, 3)}.
        latent_channels: The channels of the latents of --vae; None for the base model's VAE, or if they are not known.
    """
    for lora in loras:
        check_lora_fits(lora, shapes)
    pattern = re.compile(r"text_encoder\.(?:text_model\.)?encoder\.layers\.(\d+)\.")
    layers = 1 + max((int(match[1]) for match in map(pattern.match, shapes) if match), default=-1)
    if layers and clip_skip >= layers:
        reason = f"the text encoder has {layers} layers. Pass --clip_skip {layers - 1} at most."
        raise InputError(f"clip skip {clip_skip}: {reason}")
    channels = shapes.get("unet.conv_in.weight", (None, latent_channels))[1]
    if latent_channels not in (None, channels):
        reason = f"but the UNet expects {channels}. Pass another VAE."
        raise InputError(f"--vae encodes latents with {latent_channels} channels, {reason}")


def check_lora_fits(lora: Lora, model_shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises `InputError` if a LoRA is of another family, or if a factor fits no layer or lacks its partner.

    transformers would initialize a missing factor randomly, and diffusers only warns about keys that it ignores.
    """
    dialect = likely_dialect(lora.shapes)
    weights = {_layer(key.removesuffix(".weight")): shape for key, shape in model_shapes.items()}
    factors, unmatched = {}, []  # {layer: input and output features}
    for match in filter(None, map(FACTOR.fullmatch, lora.shapes)):
        key, shape = match[0], lora.shapes[match[0]]
        place = parse_key(key, dialect)
        layer = "" if place is None else _layer(f"{place[0]}.{place[1]}")
        axis = 1 if match[2] in ("lora_A", "lora_down", "lora.down") else 0
        weight = weights.get(layer)
        if axis == 1:
            factors[layer] = shape
        partner = f"{match[1]}.{OTHER_FACTOR[match[2]]}.weight"
        if not weight or len(weight) < 2 or shape[axis] != weight[axis] or partner not in lora.shapes:
            unmatched.append(key)
    own, theirs = _family_of(factors), _family_of(weights)
    if own and theirs and own is not theirs:
        families = f"is of {own.name}, but the base model is of {theirs.name}. Pass a LoRA of the base model's family."
        raise InputError(f"--lora {lora.path} {families}")
    if unmatched:
        count = f"{len(unmatched)} of its {len(lora.shapes)} keys match no layer of the model, such as {unmatched[0]}"
        reason = f"does not fit this base model: {count}. Pass the base model that the LoRA was trained on."
        raise InputError(f"--lora {lora.path} {reason}")


def _layer(name):
    """Normalizes the name of a layer, because transformers 5.6 removed a level of CLIPTextModel."""
    return name.replace(".text_model.", ".")


def _family_of(shapes):
    """Returns the family of layers {name: shape} by the input width of their cross attention, or None if unknown."""
    widths = (shape[1] for layer, shape in shapes.items() if layer and CROSS_ATTENTION.fullmatch(layer))
    return next(filter(None, map(family_by_width, widths)), None)


def check_controlnet_fits(
    controlnet: ControlNet, unet_config: dict[str, Any], vae_scale_factor: int | None = None
) -> None:
    """Raises `InputError` if the config.json of a ControlNet does not fit the UNet or the VAE."""
    source, config = controlnet
    for name in CONTROLNET_FITS:
        own, unet = config.get(name), unet_config.get(name)
        if own is not None and unet is not None and json.dumps(own) != json.dumps(unet):
            values = f"its {name} is {own}, but that of the UNet is {unet}"
            raise InputError(f"--controlnet {source} does not fit this base model: {values}.")
    factor = 2 ** (len(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))) - 1)
    if vae_scale_factor not in (None, factor):
        factors = f"by {factor}, but the VAE by {vae_scale_factor}"
        raise InputError(f"--controlnet {source} downsamples {factors}. Pass a ControlNet for this base model.")

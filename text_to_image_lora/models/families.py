"""Model families: a row of a table each, with the two functions that differ. No other file knows them apart.

A condition is what the denoiser is told beside latents and timesteps: named tensors, one row a sample, which go from
`encode` through the cache's shard and the batch to `predict`. Nothing between the two knows their names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from .prompts import encode_prompts


class TextEncoder(NamedTuple):
    """A text encoder of a family: its component's name in the pipeline, its tokenizer's, its class in transformers."""

    name: str
    tokenizer: str
    model_class: str
    # (clip_skip) -> how many of its last layers the condition does not depend on: a LoRA there would never learn
    unreached: Callable = lambda clip_skip: clip_skip


class Family(NamedTuple):
    """What differs between families of models."""

    name: str
    pipeline: str  # its class in diffusers, which model_index.json names
    denoiser: str  # its component's name in the pipeline, and in the LoRA file
    denoiser_class: str
    text_encoders: tuple[TextEncoder, ...]
    target_modules: tuple[str, ...]  # the layers that are adapted when nothing else is asked for
    # How many of them a transformer block has: else a rename upstream would train less in silence
    modules_per_block: int
    resolution: int  # side of the pictures in pixels, when nothing else is asked for
    cross_attention_dim: int  # where the configuration doesn't say
    text_layers: int  # where the configuration doesn't say
    addition_embed_type: str | None  # what the UNet is told beside timestep and prompt, as its configuration calls it
    # (tokenizers, text_encoders, captions, *, clip_skip, num_chunks) -> condition; gradients are as the caller has them
    encode: Callable
    # (denoiser, noisy_latents, timesteps, **condition) -> prediction (N, C, h, w)
    predict: Callable
    # (base model, number of chunks) -> {name: shape of a caption's row}: what `encode` will give, before it is loaded
    condition_shapes: Callable
    # (picture's (width, height), its variation, the size it is trained at) -> {name: numbers}: a variation's own condition
    picture_condition: Callable
    # name in the condition: name in the pipeline's call, where the negative prompt's has "negative_" before it
    pipeline_names: dict[str, str]
    pipeline_options: dict[str, Any]  # what its pipeline needs beside the models


def _encode_one_clip(tokenizers, text_encoders, captions, *, clip_skip, num_chunks):
    hidden_states = encode_prompts(tokenizers[0], text_encoders[0], captions, clip_skip, num_chunks)
    return {"encoder_hidden_states": hidden_states}


def _predict_from_hidden_states(unet, noisy_latents, timesteps, encoder_hidden_states):
    return unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]


# Attention and feed-forward of every transformer block (docs/findings.md has the sources).
UNET_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

STABLE_DIFFUSION = Family(
    name="Stable Diffusion 1 and 2",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    text_encoders=(TextEncoder("text_encoder", "tokenizer", "CLIPTextModel"),),
    target_modules=UNET_TARGET_MODULES,
    modules_per_block=10,
    resolution=512,
    cross_attention_dim=768,
    text_layers=12,
    addition_embed_type=None,
    encode=_encode_one_clip,
    predict=_predict_from_hidden_states,
    condition_shapes=lambda base, chunks: {"encoder_hidden_states": (77 * chunks, base.cross_attention_dim)},
    picture_condition=lambda picture_size, variation, size: {},
    pipeline_names={"encoder_hidden_states": "prompt_embeds"},
    # No safety checker: it blackens pictures that are only unusual.
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
)

FAMILIES = (STABLE_DIFFUSION,)


def family_of(pipeline):
    """The family that a pipeline's class stands for; None where there is none."""
    return next((family for family in FAMILIES if family.pipeline == pipeline), None)

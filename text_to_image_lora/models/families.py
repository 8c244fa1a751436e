"""Model families: a row of a table each, with the two functions that differ. No other file knows them apart.

A condition is what the denoiser is told beside latents and timesteps: named tensors, one row a sample, which go from
`encode` through the cache's shard and the batch to `predict`. Nothing between the two knows their names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from .prompts import encode_penultimate, encode_prompts


class TextEncoder(NamedTuple):
    """A text encoder of a family: its component's name in the pipeline, its tokenizer's, its class in transformers."""

    name: str
    tokenizer: str
    model_class: str
    # (clip_skip) -> how many of its last layers the condition does not depend on: a LoRA there would never learn
    unreached: Callable = lambda clip_skip: clip_skip


class KohyaNames(NamedTuple):
    """How kohya's trainer (kohya-ss/sd-scripts) names a family: its modules in a LoRA file, itself in the header."""

    prefixes: dict[str, str]  # {component: what its modules' names start with}
    original_blocks: bool  # the UNet's modules have the names of the original code, not diffusers'
    version: str  # ss_base_model_version
    says_v: bool  # that version says where a base predicts v
    architectures: dict[str, str]  # {what the base predicts: modelspec.architecture}


class Family(NamedTuple):
    """What differs between families of models."""

    name: str
    pipeline: str  # its class in diffusers, which model_index.json names
    denoiser: str  # its component's name in the pipeline, and in the LoRA file
    denoiser_class: str
    marks: dict[str, Any]  # of the denoiser's configuration, by which the family is known; None: not there, or false
    text_encoders: tuple[TextEncoder, ...]
    target_modules: tuple[str, ...]  # the layers that are adapted when nothing else is asked for
    # How many of them a transformer block has: else a rename upstream would train less in silence
    modules_per_block: int
    single_file_key: str  # how a key starts that a single file of this family alone has
    # Where no configuration says it:
    resolution: int  # side of the pictures in pixels
    cross_attention_dim: int
    text_layers: int  # of the first text encoder
    pooled_dim: int | None  # of the embedding that stands for a whole caption
    # (tokenizers, text_encoders, captions, *, clip_skip, num_chunks) -> condition; gradients are as the caller has them
    encode: Callable
    # (denoiser, noisy_latents, timesteps, **condition) -> prediction (N, C, h, w)
    predict: Callable
    # (base model, number of chunks) -> {name: shape of a caption's row}: what `encode` will give, before it is loaded
    condition_shapes: Callable
    # (picture's (width, height), (left, top) of what is shown of it, the size it is trained at) -> {name: numbers}: what
    # the denoiser is told of a variation of a picture; the corner is that in the resized and mirrored picture
    picture_condition: Callable
    # name in the condition: name in the pipeline's call, where the negative prompt's has "negative_" before it
    pipeline_names: dict[str, str]
    pipeline_options: dict[str, Any]  # what its pipeline needs beside the models
    zeros_option: (
        str | None
    )  # the pipeline's, and model_index.json's: an empty negative prompt is a condition of zeros
    kohya: KohyaNames
    license: str  # of the base models, for the model card
    tags: tuple[str, ...]  # the hub's

    def pipeline_of(self, kind: str = "") -> str:
        """The class in diffusers of its pipeline of one of the `PIPELINE_KINDS`."""
        return f"{self.pipeline.removesuffix('Pipeline')}{kind}Pipeline"


def _encode_one_clip(tokenizers, text_encoders, captions, *, clip_skip, num_chunks):
    hidden_states = encode_prompts(tokenizers[0], text_encoders[0], captions, clip_skip, num_chunks)
    return {"encoder_hidden_states": hidden_states}


def _predict_from_hidden_states(unet, noisy_latents, timesteps, encoder_hidden_states):
    return unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]


def _encode_two_clips(tokenizers, text_encoders, captions, *, clip_skip, num_chunks):
    """The last layer but one of both, side by side, and what the second makes of the whole caption."""
    import torch

    pairs = zip(tokenizers, text_encoders, strict=True)
    encoded = [encode_penultimate(*pair, captions, clip_skip, num_chunks) for pair in pairs]
    hidden_states, (_, text_embeds) = torch.cat([each for each, _ in encoded], dim=-1), encoded[-1]
    return {"encoder_hidden_states": hidden_states, "text_embeds": text_embeds}


def _predict_with_numbers(unet, noisy_latents, timesteps, encoder_hidden_states, text_embeds, time_ids):
    more = {"text_embeds": text_embeds, "time_ids": time_ids}
    return unet(noisy_latents, timesteps, encoder_hidden_states, added_cond_kwargs=more, return_dict=False)[0]


def _time_ids(picture_size, corner, size):
    """Original size, the crop's corner, target size, each as (height, width): Podell et al., 2023 (arXiv:2307.01952)."""
    return {"time_ids": [*picture_size[::-1], *corner[::-1], *size[::-1]]}


# Attention and feed-forward of every transformer block (docs/findings.md has the sources).
UNET_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

STABLE_DIFFUSION = Family(
    name="Stable Diffusion 1",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    marks={"addition_embed_type": None, "use_linear_projection": None},
    text_encoders=(TextEncoder("text_encoder", "tokenizer", "CLIPTextModel"),),
    target_modules=UNET_TARGET_MODULES,
    modules_per_block=10,
    single_file_key="cond_stage_model.transformer.",
    resolution=512,
    cross_attention_dim=768,
    text_layers=12,
    pooled_dim=None,
    encode=_encode_one_clip,
    predict=_predict_from_hidden_states,
    condition_shapes=lambda base, chunks: {"encoder_hidden_states": (77 * chunks, base.cross_attention_dim)},
    picture_condition=lambda picture_size, corner, size: {},
    pipeline_names={"encoder_hidden_states": "prompt_embeds"},
    # No safety checker: it blackens pictures that are only unusual.
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    zeros_option=None,
    kohya=KohyaNames(
        {"unet": "lora_unet_", "text_encoder": "lora_te_"},
        original_blocks=False,
        version="sd_v1",
        says_v=True,
        architectures={"epsilon": "stable-diffusion-v1", "v_prediction": "stable-diffusion-v1"},
    ),
    license="creativeml-openrail-m",
    tags=("stable-diffusion",),
)

# Its text encoder is OpenCLIP's of 24 layers, of which diffusers has 23: the last that is there is the last but one that
# the UNet was trained with, so nothing is left out of it.
STABLE_DIFFUSION_2 = STABLE_DIFFUSION._replace(
    name="Stable Diffusion 2",
    marks={"addition_embed_type": None, "use_linear_projection": True},
    single_file_key="cond_stage_model.model.",
    resolution=768,
    cross_attention_dim=1024,
    text_layers=23,
    kohya=STABLE_DIFFUSION.kohya._replace(
        version="sd_v2",
        architectures={"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
    ),
    license="openrail++",
)

STABLE_DIFFUSION_XL = Family(
    name="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    marks={"addition_embed_type": "text_time"},
    text_encoders=(
        # Of the first only the last layer but one is read; of the second the embedding of the whole caption too.
        TextEncoder("text_encoder", "tokenizer", "CLIPTextModel", unreached=lambda clip_skip: clip_skip + 1),
        TextEncoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", unreached=lambda clip_skip: 0),
    ),
    target_modules=UNET_TARGET_MODULES,
    modules_per_block=10,
    single_file_key="conditioner.embedders.1.",
    resolution=1024,
    cross_attention_dim=2048,
    text_layers=12,
    pooled_dim=1280,
    encode=_encode_two_clips,
    predict=_predict_with_numbers,
    condition_shapes=lambda base, chunks: {
        "encoder_hidden_states": (77 * chunks, base.cross_attention_dim),
        "text_embeds": (base.pooled_dim,),
    },
    picture_condition=_time_ids,
    pipeline_names={"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"},
    pipeline_options={"add_watermarker": False},
    zeros_option="force_zeros_for_empty_prompt",
    kohya=KohyaNames(
        {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
        original_blocks=True,
        version="sdxl_base_v1-0",
        says_v=False,
        architectures=dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-xl-v1-base"),
    ),
    license="openrail++",
    tags=("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
)

FAMILIES = (STABLE_DIFFUSION, STABLE_DIFFUSION_2, STABLE_DIFFUSION_XL)
# What diffusers' names of pipelines have before "Pipeline": all these can be made of the same models.
PIPELINE_KINDS = ("", "Img2Img", "ControlNet", "ControlNetImg2Img")


def families_with_pipeline(pipeline):
    """The families that have a pipeline of that class in diffusers."""
    return [family for family in FAMILIES if pipeline in map(family.pipeline_of, PIPELINE_KINDS)]


def all_supported():
    """In words, the pipelines and their families."""
    return ", ".join(f"{family.pipeline} ({family.name})" for family in FAMILIES)


def family_by_marks(denoiser_config):
    """The family whose marks a denoiser's configuration has; None where there is none."""

    def has_them(family):
        return all((denoiser_config.get(name) or None) == value for name, value in family.marks.items())

    return next(filter(has_them, FAMILIES), None)


def family_by_width(cross_attention_dim):
    """The family whose UNet attends to prompts of that width; None where there is none."""
    return next((family for family in FAMILIES if family.cross_attention_dim == cross_attention_dim), None)

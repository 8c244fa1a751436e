"""Model families: each is a row of a table, with the functions that differ; no other file distinguishes families.

A condition is the denoiser's input besides latents and timesteps: named tensors with a row per sample, which go from
`encode` through the cache and the batch to `predict`. Nothing in between depends on their names.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .prompts import encode_penultimate, encode_prompts


class TextEncoder(NamedTuple):
    """A text encoder: the names of its component and of its tokenizer in the pipeline, and its class in transformers."""

    name: str
    tokenizer: str
    model_class: str
    # (clip_skip) -> the number of last layers that the condition does not depend on, where a LoRA would not learn
    unreached: Callable = lambda clip_skip: clip_skip


class KohyaNames(NamedTuple):
    """How kohya's trainer (kohya-ss/sd-scripts) names a family and its modules in a LoRA file."""

    prefixes: dict[str, str]  # {component: prefix of the names of its modules}
    original_blocks: bool  # whether the UNet's modules have the names of the original code instead of diffusers'
    version: str  # ss_base_model_version
    says_v: bool  # whether the version ends in "_v" for v-prediction
    architectures: dict[str, str]  # {prediction type: modelspec.architecture}


class Family(NamedTuple):
    """Everything that differs between model families."""

    name: str
    pipeline: str  # the pipeline class in diffusers, as in model_index.json
    denoiser: str  # the name of the denoiser in the pipeline and in the LoRA file
    denoiser_class: str
    marks: dict[str, Any]  # options of the denoiser's configuration that identify the family; None: missing or false
    text_encoders: tuple[TextEncoder, ...]
    target_modules: tuple[str, ...]  # the layers that are adapted by default
    # The number of adapted layers per transformer block; without this check, a rename upstream would silently train less.
    modules_per_block: int
    single_file_key: str  # the prefix of keys that only single files of this family have
    # Defaults for models without a configuration:
    resolution: int  # side of the training pictures in pixels
    cross_attention_dim: int
    text_layers: int  # of the first text encoder
    pooled_dim: int | None  # of the pooled prompt embedding
    # (tokenizers, text_encoders, captions, *, clip_skip, num_chunks) -> condition; the caller decides on gradients
    encode: Callable
    # (denoiser, noisy_latents, timesteps, **condition) -> prediction (N, C, h, w)
    predict: Callable
    # (base model, number of chunks) -> {name: shape of a caption's row} of what `encode` will return
    condition_shapes: Callable
    # (picture's (width, height), (left, top) of the crop in the resized and flipped picture, training size) ->
    # {name: numbers} of the condition that depend on the variation of a picture
    picture_condition: Callable
    # {name in the condition: argument of the pipeline}, with the prefix "negative_" for the negative prompt
    pipeline_names: dict[str, str]
    pipeline_options: dict[str, Any]  # arguments of the pipeline besides the models
    # The option of the pipeline and of model_index.json that encodes an empty negative prompt as zeros.
    zeros_option: str | None
    kohya: KohyaNames
    license: str  # of the base models, for the model card
    tags: tuple[str, ...]  # the hub's

    def pipeline_of(self, kind: str = "") -> str:
        """Returns the name of the pipeline class in diffusers for one of the `PIPELINE_KINDS`."""
        return f"{self.pipeline.removesuffix('Pipeline')}{kind}Pipeline"


def _encode_one_clip(tokenizers, text_encoders, captions, *, clip_skip, num_chunks):
    hidden_states = encode_prompts(tokenizers[0], text_encoders[0], captions, clip_skip, num_chunks)
    return {"encoder_hidden_states": hidden_states}


def _predict_from_hidden_states(unet, noisy_latents, timesteps, encoder_hidden_states):
    return unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]


def _encode_two_clips(tokenizers, text_encoders, captions, *, clip_skip, num_chunks):
    """The concatenated penultimate hidden states of both text encoders, and the pooled embedding of the second."""
    import torch

    pairs = zip(tokenizers, text_encoders, strict=True)
    encoded = [encode_penultimate(*pair, captions, clip_skip, num_chunks) for pair in pairs]
    hidden_states, (_, text_embeds) = torch.cat([each for each, _ in encoded], dim=-1), encoded[-1]
    return {"encoder_hidden_states": hidden_states, "text_embeds": text_embeds}


def _predict_with_numbers(unet, noisy_latents, timesteps, encoder_hidden_states, text_embeds, time_ids):
    more = {"text_embeds": text_embeds, "time_ids": time_ids}
    return unet(noisy_latents, timesteps, encoder_hidden_states, added_cond_kwargs=more, return_dict=False)[0]


def _time_ids(picture_size, corner, size):
    """Original size, crop corner and target size, each as (height, width); Podell et al., 2023 (arXiv:2307.01952)."""
    return {"time_ids": [*picture_size[::-1], *corner[::-1], *size[::-1]]}


# Attention and feed-forward layers of every transformer block; docs/findings.md gives the sources.
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
    # No safety checker: it also blackens harmless pictures.
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

# The text encoder is OpenCLIP's with 24 layers, of which diffusers keeps 23: the last layer in diffusers is the penultimate
# one of OpenCLIP, which the UNet was trained with.
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
        # Of the first, only the penultimate layer is used; of the second, also the pooled embedding.
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
# Parts of the names of diffusers' pipelines before "Pipeline"; all of them use the same models.
PIPELINE_KINDS = ("", "Img2Img", "ControlNet", "ControlNetImg2Img")


def families_with_pipeline(pipeline: str | None) -> list[Family]:
    """Returns the families that have a pipeline of that class."""
    return [family for family in FAMILIES if pipeline in [family.pipeline_of(kind) for kind in PIPELINE_KINDS]]


def all_supported() -> str:
    """Lists the supported pipelines and their families, for messages."""
    return ", ".join(f"{family.pipeline} ({family.name})" for family in FAMILIES)


def family_by_marks(denoiser_config: Mapping[str, Any]) -> Family | None:
    """Returns the family whose `marks` a denoiser's configuration has, or None."""

    def matches(family):
        return all((denoiser_config.get(name) or None) == value for name, value in family.marks.items())

    return next(filter(matches, FAMILIES), None)


def family_by_width(cross_attention_dim: int) -> Family | None:
    """Returns the family whose UNet has this `cross_attention_dim`, or None."""
    return next((family for family in FAMILIES if family.cross_attention_dim == cross_attention_dim), None)

"""Checks the configuration files of a base model, which may come from anyone, before anything is loaded. Needs no torch."""

import re
from collections.abc import Iterator
from typing import Any

from ..command_line import above_up_to, between, count, from_up_to
from ..small_files import Values, is_kind


# Libraries whose classes a model_index.json may name; the last is the old name of the safety checker's module.
LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}
ATTENTION = {"eager", "sdpa"}  # other implementations may be kernels that are downloaded
# Keys with which a configuration names code, or another way to load its weights.
CODE = re.compile(r"auto_map|auto_mapping|custom_pipelines?|trust_remote_code|use_kernels|quantization_config")
SIZE = between(1, 65536, int)
SIZES = [SIZE]
EPSILON, SHARE = above_up_to(0, 1), from_up_to(0, 1)
ACTIVATIONS = {"gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish"}
TEXT = str
# {part of a model: {key: (kind, default of diffusers or transformers)}}, see `Values.want`
KINDS: dict[str, dict[str, tuple[Any, Any]]] = {
    "unet": {
        "sample_size": ((SIZE, SIZES), None),
        "in_channels": (SIZE, 4),
        "out_channels": (SIZE, 4),
        "block_out_channels": (SIZES, [320, 640, 1280, 1280]),
        "layers_per_block": ((between(1, 100, int), [between(1, 100, int)]), 2),
        "transformer_layers_per_block": ((between(0, 100, int), [(between(0, 100, int), [between(0, 100, int)])]), 1),
        "cross_attention_dim": (SIZE, 1280),
        "attention_head_dim": ((SIZE, SIZES), 8),
        "num_attention_heads": ((SIZE, SIZES), None),
        "norm_num_groups": (SIZE, 32),
        "down_block_types": ([TEXT], []),
        "up_block_types": ([TEXT], []),
        "mid_block_type": (TEXT, None),
        "addition_embed_type": (TEXT, None),
        "use_linear_projection": (bool, False),
        "norm_eps": (EPSILON, 1e-5),
        "dropout": (SHARE, 0.0),
        "mid_block_scale_factor": (float, 1),
        "downsample_padding": (between(0, 16, int), 1),
        "freq_shift": (float, 0),
        "flip_sin_to_cos": (bool, True),
        "center_input_sample": (bool, False),
        "upcast_attention": (bool, None),
        "act_fn": (TEXT, "silu"),
        "resnet_time_scale_shift": (TEXT, "default"),
    },
    "vae": {
        "block_out_channels": (SIZES, [64]),
        "latent_channels": (SIZE, 4),
        "in_channels": (between(3, 3, int), 3),
        "layers_per_block": (between(1, 100, int), 1),
        "norm_num_groups": (SIZE, 32),
        "scaling_factor": (above_up_to(0, 10_000), 0.18215),
        "shift_factor": (float, None),
        "latents_mean": (list, None),
        "latents_std": (list, None),
        "force_upcast": (bool, None),
        "use_quant_conv": (bool, True),
        "use_post_quant_conv": (bool, True),
        "mid_block_add_attention": (bool, True),
        "act_fn": (TEXT, "silu"),
        "down_block_types": ([TEXT], []),
        "up_block_types": ([TEXT], []),
    },
    "text_encoder": {
        "num_hidden_layers": (between(1, 1000, int), 12),
        "num_attention_heads": (SIZE, 8),
        "hidden_size": (SIZE, 512),
        "intermediate_size": (between(1, 10**6, int), 2048),
        "max_position_embeddings": (between(3, 10**5, int), 77),
        "vocab_size": (between(1, 10**7, int), 49408),
        "projection_dim": (SIZE, 512),
        "hidden_act": (ACTIVATIONS, "quick_gelu"),
        "layer_norm_eps": (EPSILON, 1e-5),
        "attention_dropout": (SHARE, 0.0),
    },
    "scheduler": {
        "_class_name": (TEXT, ""),
        "num_train_timesteps": (between(2, 10**5, int), 1000),
        "beta_start": (from_up_to(0, 1), 0.0001),
        "beta_end": (from_up_to(0, 1), 0.02),
        "beta_schedule": (TEXT, "linear"),
        "trained_betas": ([between(0, 1)], None),
        "prediction_type": ({"epsilon", "v_prediction", "sample", "flow_prediction"}, "epsilon"),
        "rescale_betas_zero_snr": (bool, None),
        "timestep_spacing": ({"leading", "trailing", "linspace"}, "leading"),
        "steps_offset": (count(0), 0),
        "clip_sample": (bool, None),
    },
}


def check_part(part: str, config: Values) -> Values:
    """Returns the configuration of a part of a model; raises `InputError` if it names code, or if a value is unusable.

    `part` is the folder of the part; the second text encoder is checked like the first.
    """
    check_no_code(config)
    for key, (kind, default) in KINDS.get(part.removesuffix("_2"), {}).items():
        config.want(key, kind, default)
    if part == "scheduler":
        _check_schedule(config)
    return config


def _check_schedule(config):
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if betas is not None and len(betas) != steps:
        raise config.refusal(
            f"'trained_betas' has {len(betas)} values, but must have one for each of the {steps} timesteps"
        )
    if config.get("beta_start", 0) > config.get("beta_end", 1):
        raise config.refusal("'beta_start' is larger than 'beta_end'")
    if config.get("steps_offset", 0) >= steps:
        raise config.refusal(f"'steps_offset' must be less than the number of timesteps, {steps}")
    name = config.get("_class_name", "")
    if name and not re.fullmatch(r"\w+(Scheduler|Solver\w*)", name):
        raise config.refusal(f"'_class_name' is {name!r}, which is no scheduler")


def check_no_code(config: Values) -> None:
    """Raises `InputError` if a configuration names code that would be run, or kernels that would be downloaded."""
    for key, value in _pairs(config):
        if CODE.fullmatch(key) and value:
            raise config.refusal(f"'{key}' names code or a special way to load the model, which is not used")
        if "attn_implementation" in key and not isinstance(value, bool | None) and not is_kind(value, ATTENTION):
            raise config.refusal(f"'{key}' is {str(value)[:60]!r}, which may be code on the hub; remove the entry")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the keys and values of a mapping and of all mappings inside it."""
    for key, each in value.items() if isinstance(value, dict) else ((None, each) for each in value):
        if key is not None:
            yield key, each
        if isinstance(each, dict | list):
            yield from _pairs(each)


def check_libraries(index: Values) -> Values:
    """Returns a model_index.json; raises `InputError` if it names a class of another library, or code."""
    check_no_code(index)
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if value == [None, None]:
            continue
        library, class_name = value if len(value) == 2 else (None, None)
        if not isinstance(class_name, str) or not isinstance(library, str) or library not in LIBRARIES:
            raise index.refusal(
                f"'{name}' must name a class of diffusers or transformers, not of {str(library)[:60]!r}"
            )
    return index

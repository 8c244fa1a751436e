"""Configurations of base models that name code, or that hold nonsense, are refused before anything is loaded."""

import json
import shutil

import pytest
import torch
from conftest import refusal_of
from safetensors.torch import load_file, save_file

from text_to_image_lora.models.loading import find_base_model, load_components
from text_to_image_lora.models.samplers import make_noise_scheduler, make_sampler


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
UNET, VAE, TEXT_ENCODER = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def model(tiny_sd, tmp_path):
    """Returns a function that returns a copy of `tiny_sd` with other values, or another text, in a file."""

    def make(file, changes):
        folder = tmp_path / "model"
        shutil.copytree(tiny_sd, folder)
        text = changes if isinstance(changes, str) else json.dumps(json.loads((folder / file).read_text()) | changes)
        (folder / file).write_text(text)
        return folder

    return make


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", "null", '"x"', '{"a": 1, "a": 2}'])
@pytest.mark.parametrize("file", [INDEX, UNET, VAE, TEXT_ENCODER, SCHEDULER])
def test_a_file_that_holds_no_mapping_is_refused(model, file, text):
    folder = model(file, text)
    assert refusal_of(find_base_model, str(folder)).startswith(f"{folder}/{file}: it can't be read (")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (INDEX, {"custom_pipeline": "someone/pipeline"}),
        (INDEX, {"auto_map": {"AutoModel": "someone/repo--file.Class"}}),
        (INDEX, {"unet": ["my_module", "MyUNet"]}),
        (INDEX, {"text_encoder": ["diffusers_modules.local.evil", "Encoder"]}),
        (INDEX, {"scheduler": ["os", "system"]}),
        (INDEX, {"vae": ["diffusers", 5]}),
        (INDEX, {"tokenizer": [["a"], "b"]}),
        (UNET, {"auto_map": {"AutoModel": "evil.Model"}}),
        (UNET, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
        (TEXT_ENCODER, {"attn_implementation": "kernels-community/flash-attn"}),
        (TEXT_ENCODER, {"_attn_implementation": "someone/kernel@main:attention"}),
        (TEXT_ENCODER, {"_attn_implementation_internal": "flash_attention_2"}),
        (TEXT_ENCODER, {"attn_implementation": {"text": "someone/kernel"}}),
        (TEXT_ENCODER, {"text_config": {"attn_implementation": "someone/kernel"}}),
        (TEXT_ENCODER, {"quantization_config": 5}),
        (SCHEDULER, {"auto_map": ["evil"]}),
    ],
)
def test_a_configuration_that_names_code_is_refused(model, file, changes):
    folder = model(file, changes)
    message = refusal_of(find_base_model, str(folder))
    assert message.startswith(f"{folder}/{file}: '")
    assert any(
        f"'{key}'" in message for each in (changes, *changes.values()) for key in each if isinstance(each, dict)
    )


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_the_attention_of_pytorch_may_be_named(model, value):
    base = find_base_model(str(model(TEXT_ENCODER, {"attn_implementation": value})))
    (text_encoder,) = load_components(base).text_encoders
    assert text_encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("file", "key", "values"),
    [
        (INDEX, "_class_name", [5, ["a"], {}, None]),
        (UNET, "block_out_channels", ["x", 5, [], None, [8, "a"], [8, 0], [8, -1]]),
        (UNET, "sample_size", ["x", 0, -16, 1e9, 10**9, True, [8, "a"], NAN]),
        (UNET, "in_channels", ["4", -1, NAN, [4], {}, None, True]),
        (UNET, "cross_attention_dim", ["x", -1, 10**9, None]),
        (UNET, "layers_per_block", ["x", 10**9, 0]),
        (UNET, "use_linear_projection", ["x", 1]),
        (UNET, "norm_eps", ["x", 0, NAN, None, [1e-5], True]),
        (UNET, "dropout", ["x", 1, -0.5]),
        (UNET, "mid_block_scale_factor", ["x", [1]]),
        (UNET, "downsample_padding", ["x", 1.5, -1, 10**9]),
        (UNET, "flip_sin_to_cos", ["x", 1]),
        (UNET, "freq_shift", ["x", NAN]),
        (UNET, "act_fn", [5, ["silu"]]),
        (VAE, "block_out_channels", ["x", 5, [], None]),
        (VAE, "latent_channels", ["x", -1, None]),
        (VAE, "scaling_factor", [0, -1, NAN, INFINITY, 1e308, "x", None, True, [1]]),
        (TEXT_ENCODER, "num_hidden_layers", ["x", -1, 10**9, None]),
        (TEXT_ENCODER, "max_position_embeddings", ["x", 0]),
        (TEXT_ENCODER, "hidden_act", [5]),
        (TEXT_ENCODER, "layer_norm_eps", ["x", 0, NAN]),
        (TEXT_ENCODER, "attention_dropout", ["x", 1.5]),
        (SCHEDULER, "num_train_timesteps", [0, 1, -5, 10**9, "x", 1.5, None, NAN]),
        (SCHEDULER, "beta_start", ["x", NAN, -1, None, 2]),
        (SCHEDULER, "beta_end", [INFINITY, 1, "x"]),
        (SCHEDULER, "trained_betas", ["x", 5, [NAN], [0.1], [2.0] * 1000, []]),
        (SCHEDULER, "beta_schedule", [5, None]),
        (SCHEDULER, "prediction_type", [5, "x", None, ["epsilon"]]),
        (SCHEDULER, "rescale_betas_zero_snr", ["x", 1]),
        (SCHEDULER, "timestep_spacing", ["x", 5]),
        (SCHEDULER, "steps_offset", ["x", -5, 10**9]),
        (SCHEDULER, "_class_name", [5, ["a", "b"], "StableDiffusionPipeline", "system"]),
    ],
)
def test_values_of_other_kinds_are_refused(model, tmp_path, file, key, values):
    for value in values:
        folder = model(file, {key: value})
        message = refusal_of(find_base_model, str(folder))
        assert message.startswith(f"{folder}/{file}: '{key}'")
        shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize("changes", [{"beta_schedule": "x"}, {"beta_schedule": "squaredcos"}, {"beta_start": "x"}])
def test_a_schedule_that_diffusers_does_not_have_is_refused(changes):
    assert "scheduler can't be used" in refusal_of(make_noise_scheduler, {"num_train_timesteps": 1000} | changes)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "utils", "Nonsense", ""])
def test_a_class_that_is_no_scheduler_does_not_draw(name):
    assert type(make_sampler({"_class_name": name})).__name__ == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_no_floating_point_numbers_are_refused(model, part, dtype):
    folder = model(INDEX, {})
    (path,) = folder.glob(f"{part}/*.safetensors")
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    message = refusal_of(find_base_model, str(folder))
    assert message.startswith(f"{path}: ")
    assert "of its weights are no floating-point numbers" in message


@pytest.mark.parametrize(
    "changes", ["[]", "5", "[" * 100_000, '{"model_max_length": -1}', '{"model_max_length": "x"}', {"pad_token": None}]
)
def test_a_tokenizer_that_cannot_be_used_is_refused_in_one_line(model, changes):
    folder = model("tokenizer/tokenizer_config.json", changes)
    assert refusal_of(load_components, find_base_model(str(folder))).startswith(
        f"{folder}: this model can't be loaded"
    )

"""The check of LoRA files passes for complete files and fails if anything is lost, also on SD's real geometry."""

import re
import time

import pytest
import torch
from conftest import read_header
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from small_pipeline import (
    ADAPTERS,
    adapters_of,
    small_pipeline,
    trained_models,
)
from transformers import CLIPTextConfig, CLIPTextModel

from text_to_image_lora.errors import TrainingError
from text_to_image_lora.models import kohya, lora, lora_file, readers
from text_to_image_lora.models.receipt import check_lora_file, layer_shapes
from text_to_image_lora.models.settings import LoraSettings


pytestmark = pytest.mark.lora_file


@pytest.fixture(scope="module")
def base():
    return small_pipeline()


def written(base, folder, options, rank=None):
    """Returns what was trained, the layers of the base model, our file, and kohya's file."""
    models = trained_models(base, options)
    components = adapters_of(models)
    layers = {name: layer_shapes(model) for name, model in models.items()}
    ours = lora_file.save_lora(folder, components, {})
    return components, layers, ours, kohya.save_kohya(folder / "kohya.safetensors", components, {})


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_what_is_written_is_read_as_trained(base, tmp_path, options):
    components, layers, ours, kohyas = written(base, tmp_path, options)
    assert layers == {"unet": layer_shapes(base.unet), "text_encoder": layer_shapes(base.text_encoder)}
    assert check_lora_file(ours, components, layers) == 64
    assert check_lora_file(kohyas, components, layers, by_kohyas_names=True) == 64


def change(path, edit):
    tensors = load_file(path)
    edited = edit(tensors, sorted(tensors))
    save_file({key: value.contiguous() for key, value in edited.items()}, path, read_header(path))


def without(tensors, pattern):
    return {key: value for key, value in tensors.items() if not re.search(pattern, key)}


def renamed(tensors, pattern, new):
    return {re.sub(pattern, new, key): value for key, value in tensors.items()}


FAULTS = {
    "alpha missing": (
        without,
        (r"\.alpha$",),
        "64 of 64 modules are not read correctly by ComfyUI,.* differs by 3.3e-01",
    ),
    "one alpha missing": (without, (r"mid_block_attentions_0_proj_in\.alpha$",), "1 of 64 .*proj_in differs by"),
    "keys renamed": (renamed, ("to_out_0", "to_out"), r"8 of 64 .*to_out\.0 is not found"),
    "another prefix": (renamed, ("^lora_te_", "lora_te2_"), "12 of 64 .*: text_encoder.* is not found"),
    "one pair lost": (
        without,
        ("mid_block_attentions_0_proj_in",),
        "1 of 64 .*: unet.mid_block.attentions.0.proj_in is not found",
    ),
    "one half lost": (without, (r"mid_block_attentions_0_proj_in\.lora_up",), "1 of 64 .*proj_in is not found"),
    "two swapped": (renamed, (r"attn1_to_(q|k)\b", r"attn1_to_\g<1>k"), "8 of 64 "),
}


@pytest.mark.parametrize(("edit", "how", "message"), FAULTS.values(), ids=FAULTS)
def test_what_is_lost_in_kohyas_file_is_an_error(base, tmp_path, edit, how, message):
    components, layers, _, kohyas = written(base, tmp_path, {"lora_alpha": 6})
    change(kohyas, lambda tensors, _: edit(tensors, *how))
    with pytest.raises(TrainingError, match=message) as caught:
        check_lora_file(kohyas, components, layers, by_kohyas_names=True)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, keys: without(tensors, r"mid_block\.attentions\.0\.proj_in"), "1 of 64 .* diffusers, .* is not found"),
        (lambda tensors, keys: renamed(tensors, r"\.to_out\.0\.", ".to_out."), "8 of 64 .* is not found"),
        (lambda tensors, keys: tensors | {keys[0]: tensors[keys[0]] * 1.00001}, r"1 of 64 .* differs by 1\.0e-05"),
        (lambda tensors, keys: {key: value.half() for key, value in tensors.items()}, "64 of 64 .* differs by"),
        (lambda tensors, keys: {key: value[..., :-1] if key == keys[0] else value for key, value in tensors.items()}, "another shape"),
    ],
)  # fmt: skip
def test_what_is_lost_in_our_file_is_an_error(base, tmp_path, edit, message):
    components, layers, ours, _ = written(base, tmp_path, {"lora_alpha": 6})
    change(ours, edit)
    with pytest.raises(TrainingError, match=message):
        check_lora_file(ours, components, layers)


def test_a_header_that_would_scale_once_more_is_an_error(base, tmp_path):
    components, layers, ours, _ = written(base, tmp_path, {"lora_alpha": 6})
    header = read_header(ours)
    for old, new in (
        ('unet.lora_alpha": 4', 'unet.lora_alpha": 6'),
        ('unet.use_rslora": false', 'unet.use_rslora": true'),
    ):
        changed = header["lora_adapter_metadata"].replace(old, new)
        assert changed != header["lora_adapter_metadata"]
        save_file(load_file(ours), ours, header | {"lora_adapter_metadata": changed})
        with pytest.raises(TrainingError, match="52 of 64 .* differs by nan"):
            check_lora_file(ours, components, layers)


def test_magnitudes_that_differ_are_an_error(base, tmp_path):
    components, layers, ours, kohyas = written(base, tmp_path, ADAPTERS["dora"])
    for path, options in ((ours, {}), (kohyas, {"by_kohyas_names": True})):
        change(
            path,
            lambda tensors, keys: {k: v * 1.001 if "magnitude" in k or "dora" in k else v for k, v in tensors.items()},
        )
        with pytest.raises(TrainingError, match="64 of 64 .* differs in its DoRA magnitudes"):
            check_lora_file(path, components, layers, **options)
        change(path, lambda tensors, keys: without(tensors, "magnitude|dora"))
        with pytest.raises(TrainingError, match="64 of 64 .* differs in its DoRA magnitudes"):
            check_lora_file(path, components, layers, **options)


def test_float16_differs_only_by_its_rounding(base, tmp_path):
    components, layers, _, _ = written(base, tmp_path, {"lora_alpha": 6})
    path = kohya.save_kohya(tmp_path / "half.safetensors", components, {}, dtype=torch.float16)
    assert {str(value.dtype) for key, value in load_file(path).items() if not key.endswith("alpha")} == {
        "torch.float16"
    }
    assert check_lora_file(path, components, layers, by_kohyas_names=True, tolerance=2**-9) == 64
    with pytest.raises(TrainingError, match="64 of 64"):
        check_lora_file(path, components, layers, by_kohyas_names=True)


def sd_models(cross_attention_dim):
    """Returns the UNet and text encoder of Stable Diffusion 1.5 (768) or 2 (1024) on the meta device, fully adapted."""
    heads = (5, 10, 20, 20) if cross_attention_dim == 1024 else 8
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=heads,
            use_linear_projection=cross_attention_dim == 1024,
        )
        clip = CLIPTextConfig(
            num_hidden_layers=12 if cross_attention_dim == 768 else 23, hidden_size=cross_attention_dim,
            num_attention_heads=cross_attention_dim // 64, intermediate_size=4 * cross_attention_dim,
        )  # fmt: skip
        text_encoder = CLIPTextModel(clip)
        layers = {"unet": layer_shapes(unet), "text_encoder": layer_shapes(text_encoder)}
        lora.add_lora(unet, LoraSettings(rank=16, lora_alpha=8, target_modules=list(layers["unet"])))
        lora.add_lora(text_encoder, LoraSettings(rank=16, lora_alpha=8, target_modules=lora.text_layers(text_encoder)))
    return {"unet": unet, "text_encoder": text_encoder}, layers


@pytest.mark.parametrize(("width", "count"), [(768, 282 + 72), (1024, 282 + 138)])
def test_every_layer_of_stable_diffusion_is_read_as_trained_and_quickly(tmp_path, width, count):
    """Includes convolutions, resnets and embeddings, for all three readers; A1111's rules know only these blocks."""
    models, layers = sd_models(width)
    torch.manual_seed(0)
    components = {}
    for name, model in models.items():
        state_dict, config = lora.adapter_state(model)
        components[name] = {key: torch.randn(value.shape) / 100 for key, value in state_dict.items()}, config
    ours, kohyas = lora_file.save_lora(tmp_path, components, {}), tmp_path / "kohya.safetensors"
    kohya.save_kohya(kohyas, components, {})
    started = time.process_time()
    assert check_lora_file(ours, components, layers) == count
    first = time.process_time() - started
    assert check_lora_file(kohyas, components, layers, by_kohyas_names=True) == count
    assert first < 4  # processor seconds of a slow machine, for twice the layers that are trained by default
    flat = {
        (component, name.removeprefix("text_model.")): shape
        for component, names in layers.items()
        for name, shape in names.items()
    }
    assert readers.has_the_geometry_of_a1111(flat)
    tensors = load_file(kohyas)
    assert len(readers.a1111(tensors, {}, flat)) == count
    # The text encoder of Stable Diffusion 2 has the four projections of attention in one module.
    fewer = without(tensors, "layers_3_self_attn_v_proj")
    assert len(readers.a1111(fewer, {}, flat)) == count - (4 if width == 1024 else 1)
    assert len(readers.comfyui(fewer, {}, flat)) == count - 1


def test_names_of_the_original_code():
    """Checks some names that are known from checkpoints of A1111."""
    known = {
        "lora_unet_conv_in": "diffusion_model_input_blocks_0_0",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "diffusion_model_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_0_downsamplers_0_conv": "diffusion_model_input_blocks_3_0_op",
        "lora_unet_down_blocks_3_resnets_1_conv2": "diffusion_model_input_blocks_11_0_out_layers_3",
        "lora_unet_mid_block_attentions_0_proj_in": "diffusion_model_middle_block_1_proj_in",
        "lora_unet_mid_block_resnets_1_time_emb_proj": "diffusion_model_middle_block_2_emb_layers_1",
        "lora_unet_up_blocks_0_upsamplers_0_conv": "diffusion_model_output_blocks_2_1_conv",
        "lora_unet_up_blocks_1_upsamplers_0_conv": "diffusion_model_output_blocks_5_2_conv",
        "lora_unet_up_blocks_3_attentions_2_proj_out": "diffusion_model_output_blocks_11_1_proj_out",
        "lora_te_text_model_encoder_layers_11_mlp_fc1": "transformer_text_model_encoder_layers_11_mlp_fc1",
    }
    assert {name: readers._in_the_original(name, is_sd2=False) for name in known} == known

"""Base models and LoRAs whose weights are missing, NaN or infinite are refused in one line, and nothing is drawn."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from damaged_models import DAMAGES
from infer_fixtures import draw, flat
from original_weights import to_ldm
from safetensors.torch import load_file, save_file

import infer
from text_to_image_lora.models.lora_file import ADAPTER_METADATA_KEY


pytestmark = pytest.mark.usefixtures("library_settings")

FILES = {
    "UNet": ("unet/diffusion_pytorch_model.safetensors", "attn1.to_q.weight"),
    "VAE": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
    "text encoder": ("text_encoder/model.safetensors", "q_proj.weight"),
}


def damage(path, end, kind):
    """Removes the first tensor whose name ends like this, or puts NaN or an infinity into it; returns its name."""
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith(end))
    if kind == "missing":
        del tensors[name]
    else:
        tensors[name].view(-1)[-1] = {"NaN": float("nan"), "infinity": float("-inf")}[kind]
    save_file(tensors, path, {"format": "pt"})
    return name


@pytest.fixture
def refused(tmp_path, capsys):
    """A function that returns the line with which `draw` refuses."""

    def refuse(*argv):
        with pytest.raises(SystemExit) as stop:
            draw(*argv[:1], tmp_path / "out", *argv[1:])
        err = capsys.readouterr().err
        assert (stop.value.code, len(err.splitlines())) == (2, 1), err
        assert not (tmp_path / "out").exists()
        return err

    return refuse


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("kind", ["missing", "NaN", "infinity"])
def test_a_base_model_with_damaged_weights_is_refused(model, refused, tmp_path, part, kind):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    name = damage(folder / FILES[part][0], FILES[part][1], kind)
    fault = (
        f"the {part} lacks 1 of its weights, the first: " if kind == "missing" else f"the {part} is damaged: 1 of its "
    )
    line = refused(folder)
    assert line.startswith(f"infer.py: error: {folder} can't be loaded: {fault}")
    assert line.rstrip().endswith(f"{name.removeprefix('text_model.')}. Download the model again.")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_model_is_explained(model, refused, tmp_path, damage):
    folder = shutil.copytree(model, tmp_path / "model")
    make, words = DAMAGES[damage]
    make(folder)
    line = refused(folder).rstrip()
    assert str(folder) in line
    assert all(word in line for word in words), line
    assert line.endswith("ownload the model again.")
    assert "ignore_mismatched_sizes" not in line


SINGLE = {
    "UNet": "transformer_blocks.0.attn1.to_q.weight",
    "VAE": "decoder.conv_in.weight",
    "text encoder": "self_attn.q_proj.weight",
}


@pytest.mark.parametrize("part", SINGLE)
@pytest.mark.parametrize("kind", ["missing", "NaN"])
def test_a_single_file_with_damaged_weights_is_refused(model, refused, tmp_path, part, kind):
    path = tmp_path / "model.safetensors"
    save_file(to_ldm(Path(model)), path)
    damage(path, SINGLE[part], kind)
    line = refused(path, "--single_file_config", model)
    if kind == "NaN":
        assert f"{path} can't be loaded: the {part} is damaged: 1 of its tensors is not finite, the first: " in line
    elif part == "text encoder":
        assert f"{path} can't be loaded: the text encoder lacks 1 of its weights, the first: " in line
    else:  # diffusers fails by itself
        assert f"{path} can't be loaded: some of its weights are missing. Download the model again." in line


@pytest.mark.parametrize("kind", ["NaN", "infinity"])
@pytest.mark.parametrize("dialect", ["by stock diffusers", "mixed ranks", "kohya"])
def test_a_lora_that_is_not_finite_is_refused(model, lora_weights, refused, tmp_path, dialect, kind):
    tensors, path = flat(lora_weights), tmp_path / "lora.safetensors"
    down = next(key for key in tensors if key.endswith("to_k.lora_A.weight"))
    up = down.replace("lora_A", "lora_B")
    if dialect == "mixed ranks":
        tensors |= {down: tensors[down][:1].clone(), up: tensors[up][:, :1].clone()}
    elif dialect == "kohya":
        name = "lora_unet_" + down.removeprefix("unet.").removesuffix(".lora_A.weight").replace(".", "_")
        down, tensors = f"{name}.lora_down.weight", {
            f"{name}.lora_down.weight": tensors[down], f"{name}.lora_up.weight": tensors[up],
            f"{name}.alpha": torch.tensor(4.0),
        }  # fmt: skip
    save_file(tensors, path)
    damage(path, down, kind)
    line = refused(model, "--lora", path)
    assert f"--lora {path}: 1 of its tensors is not finite, the first: {down}. " in line


def test_another_vae_that_lacks_a_weight_is_refused(model, refused, tmp_path):
    shutil.copytree(os.path.join(model, "vae"), tmp_path / "vae")
    damage(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.weight", "missing")
    assert f"{tmp_path / 'vae'} can't be loaded: the VAE lacks 1 of its weights" in refused(
        model, "--vae", tmp_path / "vae"
    )


def test_a_controlnet_that_lacks_a_weight_is_refused(model, controlnet, photo, refused, tmp_path):
    shutil.copytree(controlnet, tmp_path / "edges")
    damage(tmp_path / "edges" / "diffusion_pytorch_model.safetensors", "conv_in.weight", "missing")
    flags = ("--controlnet", tmp_path / "edges", "--image", photo, "--control", "canny")
    assert f"{tmp_path / 'edges'} can't be loaded: the ControlNet lacks 1 of its weights" in refused(model, *flags)


@pytest.mark.parametrize("layer", ["mid_block.resnets.0.norm1", "conv_norm_out", "mid_block.nothing"])
def test_a_lora_of_layers_that_are_no_matrices_is_refused(model, refused, tmp_path, layer):
    tensors = {f"unet.{layer}.lora_A.weight": torch.ones(4, 64), f"unet.{layer}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert "2 of its 2 keys match no layer of the model" in refused(model, "--lora", tmp_path / "lora.safetensors")


PLAIN = {"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {}, "unet.alpha_pattern": {}}


@pytest.mark.parametrize(
    "config", [{"unet.lora_alpha": 1e300}, {"unet.alpha_pattern": {"to_q": 1e300}}, {"unet.lora_alpha": -1e45}]
)
def test_a_lora_whose_header_makes_it_infinite_is_refused(model, lora_weights, refused, tmp_path, config):
    """Stock diffusers reads the first and the last of them, and would multiply by the scale when it draws."""
    weights = {f"unet.{key}": value for key, value in lora_weights["unet"].items()}
    targets = {"unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    header = {ADAPTER_METADATA_KEY: json.dumps(PLAIN | targets | config)}
    save_file(weights, tmp_path / "lora.safetensors", header)
    line = refused(model, "--lora", tmp_path / "lora.safetensors")
    assert f"--lora {tmp_path / 'lora.safetensors'}: with its alpha, " in line
    assert "not finite" in line


@pytest.mark.parametrize("flags", [["--lora_scale", "1e30"], ["--lora_scale=-1001"], ["--guidance_scale", "1e30"]])
def test_strengths_without_sense_are_refused(model, lora, refused, flags):
    assert "it must be a number from -1000 to 1000" in refused(model, "--lora", lora, *flags)


@pytest.mark.parametrize("strength", ["1e39", "-1000.5", "1e400", "nan"])
def test_a_strength_after_the_path_of_a_lora_has_bounds(model, lora, refused, strength):
    line = refused(model, "--lora", f"{lora}:{strength}")
    assert "the strength must be a number from -1000 to 1000." in line


def test_a_strength_that_makes_a_lora_infinite_is_refused(model, lora_weights, refused, tmp_path):
    weights = {key: value * (1e37 if "lora_B" in key else 1) for key, value in flat(lora_weights).items()}
    save_file(weights, tmp_path / "lora.safetensors")
    line = refused(model, "--lora", f"{tmp_path / 'lora.safetensors'}:1000")
    assert f"--lora {tmp_path / 'lora.safetensors'}: at the strength 1000, " in line


@pytest.mark.parametrize(("down", "up"), [(1e25, 1e25), (1e38, 10), (1e-3, 1e38)])
def test_pictures_of_numbers_that_are_not_finite_end_the_command(model, lora_weights, tmp_path, capsys, down, up):
    weights = {key: value * (up if "lora_B" in key else down) for key, value in flat(lora_weights).items()}
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(SystemExit) as stop:
        draw(model, tmp_path / "out", "--lora", tmp_path / "lora.safetensors")
    err = capsys.readouterr().err
    assert (stop.value.code, len(err.splitlines())) == (3, 1), err
    assert "the picture is not finite (NaN)" in err
    assert "Lower the guidance scale or the strength" in err
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("down", "up"), [(1e25, 1e25), (1e35, 1e10), (-1e20, 1e25)])
def test_a_merge_that_is_not_finite_is_not_saved(model, lora_weights, tmp_path, capsys, down, up):
    weights = {key: value * (up if "lora_B" in key else down) for key, value in flat(lora_weights).items()}
    save_file(weights, tmp_path / "lora.safetensors")
    flags = ("--pretrained_model_name_or_path", model, "--lora", tmp_path / "lora.safetensors")
    with pytest.raises(SystemExit) as stop:
        infer.main([str(word) for word in (*flags, "--save_merged", tmp_path / "merged")])
    err = capsys.readouterr().err
    assert (stop.value.code, len(err.splitlines())) == (2, 1), err
    assert f"--save_merged {tmp_path / 'merged'}: the merged " in err
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]

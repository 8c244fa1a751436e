"""A base model with merged LoRAs draws the pictures of the base model with these LoRAs."""

import pytest
import torch
from infer_fixtures import PROMPT, difference, draw, stock

import infer


pytestmark = pytest.mark.usefixtures("library_settings")


def test_a_merged_model_draws_as_with_the_loras(model, lora, lora_weights, write_lora, tmp_path, capsys):
    hat = write_lora(
        "hat", {f"unet.{key}": value.flip(-1).contiguous() for key, value in lora_weights["unet"].items()}
    )
    flags = ["--lora", f"{lora}:0.8", f"{hat}:0.5"]
    (drawn,) = draw(model, tmp_path / "1", *flags, "--save_merged", tmp_path / "deep" / "merged").values()
    (again,) = draw(tmp_path / "deep" / "merged", tmp_path / "2").values()
    assert difference(drawn, again) <= 1
    stock_picture = stock("StableDiffusionPipeline", tmp_path / "deep" / "merged")(
        PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert difference(stock_picture, again) == 0
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"merged"}
    assert not [*(tmp_path / "deep" / "merged").rglob("*.bin")]
    assert capsys.readouterr().err == ""


def test_a_merged_model_without_pictures(model, lora, tmp_path, capsys):
    """No prompt is needed, and settings that a pipeline folder cannot contain are printed."""
    (tmp_path / "merged").mkdir()
    flags = ["--lora", lora, "--lora_scale", "0", "--save_merged", tmp_path / "merged", "--clip_skip", 1]
    infer.main(["--pretrained_model_name_or_path", model, *map(str, flags), "--output_dir", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert out == f"loading {model}\n{tmp_path / 'merged'}: the base model with the LoRA merged into it\n"
    assert "does not record clip skip 1" in err
    assert not (tmp_path / "out").exists()
    from safetensors.torch import load_file

    name = "unet/diffusion_pytorch_model.safetensors"
    base, merged = (load_file(f"{folder}/{name}") for folder in (model, tmp_path / "merged"))
    assert base.keys() == merged.keys()
    assert all(torch.equal(base[key], merged[key]) for key in base)

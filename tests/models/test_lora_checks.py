"""Tensors of wrong types and shapes, and two names of one tensor, are refused by everything that reads a LoRA."""

import pytest
import torch
from conftest import refusal_of
from safetensors.torch import save_file

from scripts import convert_lora
from text_to_image_lora.drawing.find import find_lora
from text_to_image_lora.models.lora_checks import check_lora
from text_to_image_lora.models.lora_file import load_lora


MODULE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "encoder.layers.0.self_attn.q_proj"
DOWN, UP = torch.ones(4, 8), torch.ones(8, 4)
PLAIN = {f"{MODULE}.lora_A.weight": DOWN, f"{MODULE}.lora_B.weight": UP}
OF_KOHYA = {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}

FAULTS = {
    "int8": (PLAIN | {f"{MODULE}.lora_A.weight": DOWN.to(torch.int8)}, "instead of floating-point numbers"),
    "bool": (PLAIN | {f"{MODULE}.lora_B.weight": UP > 0}, "instead of floating-point numbers"),
    "complex": (PLAIN | {f"{MODULE}.lora_A.weight": DOWN.to(torch.complex64)}, "instead of floating-point numbers"),
    "int64 by kohya's names": (OF_KOHYA | {f"{KOHYA}.lora_up.weight": UP.long()}, "instead of floating-point numbers"),
    "uint8 magnitudes": (
        PLAIN | {f"{MODULE}.lora_magnitude_vector": torch.ones(8, dtype=torch.uint8)}, "instead of floating-point"
    ),
    "peft's name too": (PLAIN | {f"base_model.model.{MODULE}.lora_A.weight": DOWN * 2}, "mean the same tensor"),
    "an old name too": (PLAIN | {f"{MODULE}.lora.down.weight": DOWN * 2}, "mean the same tensor"),
    "the older level of names too": (
        {f"text_encoder.{level}{TEXT}.lora_{leaf}.weight": value for level in ("", "text_model.") for leaf, value in zip("AB", (DOWN, UP))},
        "mean the same tensor",
    ),
    "XL's prefix too": (
        {f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": DOWN for prefix in ("lora_te", "lora_te1")},
        "mean the same tensor",
    ),
    "two alphas": (OF_KOHYA | {f"{KOHYA}.alpha": torch.tensor([4.0, 8.0])}, "but must be a single number"),
    "no alpha in it": (OF_KOHYA | {f"{KOHYA}.alpha": torch.zeros(0)}, "but must be a single number"),
    "a complex alpha": (OF_KOHYA | {f"{KOHYA}.alpha": torch.tensor(4j)}, "instead of a real number"),
    "a bool as alpha": (OF_KOHYA | {f"{KOHYA}.alpha": torch.tensor(True)}, "instead of a real number"),
    "flat": (PLAIN | {f"{MODULE}.lora_A.weight": DOWN.flatten()}, "has the shape [32]"),
    "three dimensions": (PLAIN | {f"{MODULE}.lora_B.weight": UP[None]}, "has the shape [1, 8, 4]"),
    "a scalar": (PLAIN | {f"{MODULE}.lora_A.weight": torch.tensor(1.0)}, "has the shape []"),
    "rank 0": (PLAIN | {f"{MODULE}.lora_A.weight": DOWN[:0]}, "has the shape [0, 8]"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_lora_is_refused_by_every_reader(tmp_path, tensors, reason):
    path = tmp_path / "lora.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    for read in (check_lora, load_lora, lambda path: find_lora(str(path), 1.0, "lora0")):
        line = refusal_of(read, path)
        assert reason in line
        assert str(path) in line
        assert "get the file again" in line


@pytest.mark.parametrize("fault", ["int8", "an old name too", "two alphas", "a scalar"])
def test_a_damaged_lora_in_a_pickle_is_refused(tmp_path, fault):
    tensors, reason = FAULTS[fault]
    torch.save(tensors, tmp_path / "lora.pt")
    words = [str(tmp_path / "lora.pt"), str(tmp_path / "out.safetensors")]
    assert reason in refusal_of(convert_lora.main, convert_lora.parse_args(words))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("shape", [(7,), (8, 1), ()])
def test_a_bias_of_another_shape_is_refused(tmp_path, shape):
    save_file(PLAIN | {f"{MODULE}.lora_B.bias": torch.ones(shape)}, tmp_path / "lora.safetensors")
    assert f"its lora_B.bias has the shape {list(shape)} instead of [8]" in refusal_of(
        load_lora, tmp_path / "lora.safetensors"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_all_floating_point_numbers_and_whole_alphas_are_read(tmp_path, dtype):
    tensors = {key: value.to(dtype) for key, value in OF_KOHYA.items()} | {f"{KOHYA}.alpha": torch.tensor([4])}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert check_lora(tmp_path / "lora.safetensors") == "kohya"
    assert find_lora(str(tmp_path / "lora.safetensors"), 1.0, "lora0").shapes
    components, _ = load_lora(tmp_path / "lora.safetensors")
    assert components["unet"][f"{MODULE.removeprefix('unet.')}.lora_B.weight"].unique().tolist() == [1]


@pytest.mark.parametrize("reader", [find_lora, check_lora, load_lora])
@pytest.mark.parametrize("kind", ["a file", "a file with a header", "a folder of peft", "a folder"])
def test_a_file_without_tensors_is_refused(tmp_path, reader, kind):
    folder = tmp_path / "lora"
    folder.mkdir()
    file = folder / ("adapter_model.safetensors" if kind == "a folder of peft" else "pytorch_lora_weights.safetensors")
    save_file({}, file, {"ss_network_dim": "4"} if "header" in kind else None)
    given = str(folder if "folder" in kind else file)
    message = refusal_of(reader, *([given, 1.0, "lora0"] if reader is find_lora else [given]))
    assert "no weights" in message or "none of its 0 keys" in message

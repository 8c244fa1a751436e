"""LoRA files under the names of other programs, and of layers outside the blocks, are drawn as the same LoRA under ours."""

import pytest
import torch
from infer_fixtures import difference, draw
from safetensors.torch import save_file

from text_to_image_lora.models import dialects, kohya, lora_file
from text_to_image_lora.models.families import STABLE_DIFFUSION_XL


pytestmark = [pytest.mark.usefixtures("library_settings"), pytest.mark.lora_file]

OUTSIDE = ["time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1", "add_embedding.linear_2"]
OUTSIDE += ["conv_in", "conv_out"]
BLOCKS = ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.time_emb_proj"]
BLOCKS += ["up_blocks.0.upsamplers.0.conv", "down_blocks.1.downsamplers.0.conv", "up_blocks.1.resnets.2.conv_shortcut"]


def random_lora(model, names, rank=2):
    """A folded state dict of peft for these layers of a model."""
    torch.manual_seed(1)
    state_dict = {}
    for name in names:
        out, inner, *size = model.get_submodule(name).weight.shape
        state_dict[f"{name}.lora_A.weight"] = torch.randn(rank, inner, *size) / inner**0.5
        state_dict[f"{name}.lora_B.weight"] = torch.randn(out, rank, *[1 for _ in size]) / 3
    return state_dict


@pytest.fixture(scope="module")
def xl(tiny_xl):
    import diffusers

    return diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_xl)


def drawn(model, folder, lora):
    (picture,) = draw(model, folder / "drawn" / lora.stem, "--lora", lora).values()
    return picture


@pytest.mark.parametrize(
    "names", [OUTSIDE, BLOCKS, OUTSIDE + BLOCKS, ["conv_out"]], ids=["outside", "blocks", "both", "one"]
)
def test_kohyas_names_of_xl(xl, tiny_xl, tmp_path, names):
    components = {"unet": (random_lora(xl.unet, names), None)}
    ours = lora_file.save_lora(tmp_path / "ours.safetensors", components, {})
    theirs = kohya.save_kohya(tmp_path / "theirs.safetensors", components, {}, names=STABLE_DIFFUSION_XL.kohya)
    (base,) = draw(tiny_xl, tmp_path / "base").values()
    first = drawn(tiny_xl, tmp_path, ours)
    assert difference(first, base) > 3
    assert difference(first, drawn(tiny_xl, tmp_path, theirs)) <= 1


def test_a_run_with_layers_outside_the_blocks(train, tiny_xl, tmp_path):
    """Its own file in kohya's format, as the training command writes it."""
    out = train(
        pretrained_model_name_or_path=tiny_xl, target_modules=["to_q", "linear_1", "linear_2", "conv_out"],
        output_kohya_format=True, train_text_encoder=True, learning_rate=0.3, output_dir=tmp_path / "axe",
    )  # fmt: skip
    first, second = (
        drawn(tiny_xl, tmp_path, out / "pytorch_lora_weights.safetensors"),
        drawn(tiny_xl, tmp_path, out / "axe.safetensors"),
    )
    assert difference(first, second) <= 1


MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYAS = "lora_unet_" + MODULE.replace(".", "_")
OF_SGM = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
NAMES = {
    f"{KOHYAS}.lora_down.weight": ("unet", MODULE, DOWN),
    f"lora_unet_{OF_SGM.replace('.', '_')}.lora_up.weight": ("unet", MODULE, UP),
    # a magnitude with a dot that diffusers' converter leaves in its name
    KOHYAS.replace("_to_q", ".to_q") + ".lora_magnitude_vector": ("unet", MODULE, MAGNITUDE),
    f"{KOHYAS}.lora_magnitude_vector.weight": ("unet", MODULE, MAGNITUDE),
    f"lycoris_{MODULE.replace('.', '_')}.lora_down.weight": ("unet", MODULE, DOWN),
    "lycoris_text_model_encoder_layers_0_mlp_fc1.alpha": ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "alpha"),
    "lora_te2_text_projection.lora_up.weight": ("text_encoder_2", "text_projection", UP),
    "text_encoder_2.text_projection.lora_A.weight": ("text_encoder_2", "text_projection", DOWN),
    f"diffusion_model.{OF_SGM}.lora_A.weight": ("unet", MODULE, DOWN),
    f"model.diffusion_model.{OF_SGM}.lora_up.weight": ("unet", MODULE, UP),
    f"unet.{OF_SGM}.dora_scale": ("unet", MODULE, MAGNITUDE),
    "diffusion_model.middle_block.1.proj_in.alpha": ("unet", "mid_block.attentions.0.proj_in", "alpha"),
    "diffusion_model.time_embed.0.lora_B.weight": ("unet", "time_embedding.linear_1", UP),
    "diffusion_model.label_emb.0.2.lora_B.weight": ("unet", "add_embedding.linear_2", UP),
    "diffusion_model.out.2.lora_A.weight": ("unet", "conv_out", DOWN),
    f"unet.{MODULE}.lora_down.weight": ("unet", MODULE, DOWN),
    f"unet.{MODULE}.dora_scale": ("unet", MODULE, MAGNITUDE),
    "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc2.lora_A.weight": (
        "text_encoder_2", "text_model.encoder.layers.3.mlp.fc2", DOWN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", NAMES)
def test_names_of_other_programs(key):
    assert dialects.parse_key(key, dialects.likely_dialect([key])) == NAMES[key]


WRITERS = {
    "ComfyUI": lambda key: f"diffusion_model.{key}".replace(MODULE, OF_SGM),
    "LyCORIS": lambda key: f"lycoris_{key.replace('.', '_', MODULE.count('.'))}".replace(
        "lora_A", "lora_down"
    ).replace("lora_B", "lora_up"),
    "diffusers' converter": lambda key: (
        "lora_unet_" + key.replace(".", "_", MODULE.count(".") - (1 if "magnitude" in key else 0))
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_other_programs_with_dora(xl, tiny_xl, tmp_path, writer):
    state_dict = random_lora(xl.unet, [MODULE])
    state_dict[f"{MODULE}.lora_magnitude_vector"] = torch.rand(16) + 0.5
    ours = lora_file.save_lora(tmp_path / "ours.safetensors", {"unet": (state_dict, None)}, {})
    save_file({WRITERS[writer](key): value for key, value in state_dict.items()}, tmp_path / "theirs.safetensors")
    assert (
        drawn(tiny_xl, tmp_path, ours).tobytes() == drawn(tiny_xl, tmp_path, tmp_path / "theirs.safetensors").tobytes()
    )


def test_the_text_projection_of_xl(xl, tiny_xl, tmp_path):
    """By kohya's name and by ours; its effect is that of the update in the weight."""
    layer = next(name for name, _ in xl.text_encoder_2.named_modules() if name.endswith("q_proj"))
    state_dict = random_lora(xl.text_encoder_2, [layer, "text_projection"])
    components = {"text_encoder_2": (state_dict, None)}
    ours = lora_file.save_lora(tmp_path / "ours.safetensors", components, {})
    theirs = kohya.save_kohya(tmp_path / "theirs.safetensors", components, {}, names=STABLE_DIFFUSION_XL.kohya)
    first, second = drawn(tiny_xl, tmp_path, ours), drawn(tiny_xl, tmp_path, theirs)
    assert difference(first, second) <= 1
    without = lora_file.save_lora(
        tmp_path / "without.safetensors", {"text_encoder_2": (random_lora(xl.text_encoder_2, [layer]), None)}, {}
    )
    assert difference(first, drawn(tiny_xl, tmp_path, without)) > 1


def test_embeddings_in_a_lora_are_refused_by_name(tiny_xl, tmp_path, capsys):
    tensors = {f"{KOHYAS}.lora_down.weight": torch.ones(2, 16), f"{KOHYAS}.lora_up.weight": torch.ones(16, 2)}
    tensors |= {"bundle_emb.axe.clip_l": torch.ones(1, 32)}
    save_file(tensors, tmp_path / "axe.safetensors")
    with pytest.raises(SystemExit):
        draw(tiny_xl, tmp_path / "out", "--lora", tmp_path / "axe.safetensors")
    assert "it contains embeddings (textual inversion) beside the LoRA" in capsys.readouterr().err

"""What was passed as a base model and is none is called by its name, in training and in drawing, before anything is loaded."""

import json
import re
import shutil

import pytest
import torch
from conftest import train_script
from infer_fixtures import draw
from original_weights import to_ldm
from safetensors.torch import load_file, save_file

from text_to_image_lora.errors import InputError
from text_to_image_lora.models import loading
from text_to_image_lora.models.modules import sample_identity


pytestmark = pytest.mark.usefixtures("library_settings")


@pytest.fixture(scope="module")
def weights(tiny_sd):
    return to_ldm(tiny_sd)


@pytest.fixture
def told(arguments, tmp_path, capsys):
    """A function that returns the line with which both commands refuse a base model."""

    def refuse(path, *flags):
        from text_to_image_lora.training.inputs import find_inputs

        words = arguments(pretrained_model_name_or_path=path)
        with pytest.raises(InputError) as caught:
            find_inputs(train_script.parse_settings([*words, *map(str, flags)]))
        with pytest.raises(SystemExit) as stop:
            draw(path, tmp_path / "drawn", *flags)
        err = capsys.readouterr().err
        assert (stop.value.code, len(err.splitlines())) == (2, 1)
        assert not (tmp_path / "drawn").exists()
        assert "\n" not in str(caught.value)
        assert str(caught.value) in err
        return str(caught.value)

    return refuse


def starting(weights, *beginnings):
    return {key: value for key, value in weights.items() if key.startswith(beginnings)}


def wide(weights, channels):
    """The weights with a UNet of other input channels."""
    return weights | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}


FILES = {
    "inpainting": (lambda w: wide(w, 9), "it is an inpainting model (its UNet has 9 input channels instead of 4)"),
    "instruct": (lambda w: wide(w, 8), "it is a model that edits pictures by instructions (InstructPix2Pix)"),
    "refiner": (
        lambda w: starting(w, "model.") | {"conditioner.embedders.0.model.ln_final.weight": torch.ones(2)},
        "it is a model of Stable Diffusion XL's refiner, which is not supported",
    ),
    "vae": (lambda w: starting(w, "first_stage_model."), "it is a VAE, not a base model."),
    "bare vae": (
        lambda w: {k.removeprefix("first_stage_model."): v for k, v in starting(w, "first_stage_model.").items()},
        "it is a VAE, not a base model.",
    ),
    "unet": (lambda w: starting(w, "model.diffusion_model."), "it contains a UNet but no text encoder."),
    "lora": (
        lambda w: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2)},
        "it is a LoRA or a similar adapter, not a base model.",
    ),
    "our lora": (lambda w: {"unet.conv_in.lora_A.weight": torch.ones(2, 2)}, "it is a LoRA or a similar adapter"),
    "lokr": (lambda w: {"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)}, "it is a LoRA or a similar adapter"),
    "embedding": (lambda w: {"emb_params": torch.ones(2, 2)}, "it is an embedding (textual inversion)"),
    "text encoder": (lambda w: {"text_model.final_layer_norm.weight": torch.ones(2)}, "it contains no UNet"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_single_file_that_is_no_base_model(weights, tiny_sd, told, tmp_path, kind):
    make, message = FILES[kind]
    save_file(make(weights), tmp_path / "given.safetensors")
    line = told(tmp_path / "given.safetensors", "--single_file_config", tiny_sd)
    assert line.startswith(f"{tmp_path / 'given.safetensors'}: {message}")


@pytest.fixture
def copied(tiny_sd, tmp_path):
    """A function that copies the base model, with changes of JSON files {file: entries}; returns the folder."""

    def copy(**changes):
        shutil.copytree(tiny_sd, tmp_path / "given")
        for name, entries in changes.items():
            path = tmp_path / "given" / name.replace("__", "/")
            path = path.with_suffix(".json")
            path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return tmp_path / "given"

    return copy


FOLDERS = {
    "inpainting pipeline": (
        {"model_index": {"_class_name": "StableDiffusionInpaintPipeline"}},
        "it is an inpainting model (StableDiffusionInpaintPipeline)",
    ),
    "inpainting UNet": (
        {"unet__config": {"in_channels": 9}},
        "it is an inpainting model (its UNet has 9 input channels",
    ),
    "instruct UNet": ({"unet__config": {"in_channels": 8}}, "it is a model that edits pictures by instructions"),
    "refiner": (
        {"model_index": {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}},
        "it is Stable Diffusion XL's refiner, which is not supported.",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_a_model_for_another_task(copied, told, kind):
    changes, message = FOLDERS[kind]
    folder = copied(**changes)
    assert told(folder).startswith(f"{folder}: {message}")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vae", "it is a VAE, not a base model."),
        ("unet", "it is a UNet without"),
        ("text_encoder", "it is a text encoder"),
    ],
)
def test_a_folder_of_a_part_of_a_model(tiny_sd, told, part, message):
    assert told(tiny_sd / part).startswith(f"{tiny_sd / part}: {message}")


@pytest.mark.parametrize(
    "file", ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json"]
)
def test_a_folder_of_a_lora(told, tmp_path, file):
    (tmp_path / "axe").mkdir()
    (tmp_path / "axe" / file).write_bytes(b"")
    assert told(tmp_path / "axe").startswith(f"{tmp_path / 'axe'}: it is a LoRA, not a base model.")


def load(path, pretrained_vae=None, **options):
    return loading.load_components(loading.find_base_model(str(path), **options), pretrained_vae=pretrained_vae)


def test_a_single_file_without_a_vae_takes_another_one(weights, tiny_sd, tmp_path, capsys):
    path = tmp_path / "no_vae.safetensors"
    save_file({key: value for key, value in weights.items() if not key.startswith("first_stage_model.")}, path)
    with pytest.raises(InputError, match=r"it contains no VAE. Pass one with --pretrained_vae_model_name_or_path\."):
        load(path, single_file_config=str(tiny_sd))
    whole, other = load(tiny_sd), load(path, str(tiny_sd / "vae"), single_file_config=str(tiny_sd))
    for one, two in zip(
        (whole.vae, whole.denoiser, *whole.text_encoders), (other.vae, other.denoiser, *other.text_encoders)
    ):
        assert sample_identity(one) == sample_identity(two)
    flags = ("--single_file_config", tiny_sd)
    with pytest.raises(SystemExit):
        draw(path, tmp_path / "a", *flags)
    assert f"{path}: it contains no VAE. Pass one with --vae." in capsys.readouterr().err
    (picture,) = draw(path, tmp_path / "b", *flags, "--vae", tiny_sd / "vae").values()
    (wanted,) = draw(tiny_sd, tmp_path / "c").values()
    assert picture.tobytes() == wanted.tobytes()


def as_variant(folder, *parts):
    for part in parts:
        (file,) = folder.glob(f"{part}/*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))


PARTS = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize("parts", [PARTS, ("unet",), ("vae", "text_encoder")])
def test_weights_that_are_only_there_as_a_variant(copied, tiny_sd, told, tmp_path, parts):
    """Without --variant this is told; with it, the parts without the variant come from their usual files."""
    folder = copied()
    as_variant(folder, *parts)
    assert re.search(r"the weights of \w+ are only there as a variant. Pass --variant fp16\.$", told(folder))
    line = told(folder, "--variant", "fp8")
    assert line == f"--variant fp8: {folder} contains no weights of this variant. Pass --variant fp16."
    one, two = load(folder, variant="fp16"), load(tiny_sd)
    for a, b in zip((one.vae, one.denoiser, *one.text_encoders), (two.vae, two.denoiser, *two.text_encoders)):
        assert sample_identity(a) == sample_identity(b)
    (picture,) = draw(folder, tmp_path / "a", "--variant", "fp16").values()
    (wanted,) = draw(tiny_sd, tmp_path / "b").values()
    assert picture.tobytes() == wanted.tobytes()


def test_a_variant_that_no_folder_has(tiny_sd, told):
    assert told(tiny_sd, "--variant", "fp16").endswith("contains no weights of this variant. Omit --variant.")


def test_shards_and_other_files_are_no_variants(copied):
    """Both ways in which diffusers and transformers have named shards of a variant."""
    folder = copied()
    (file,) = folder.glob("unet/*.safetensors")
    tensors = load_file(file)
    save_file(tensors, file.with_name("diffusion_pytorch_model-00001-of-00002.fp16.safetensors"))
    save_file(tensors, file.with_name("diffusion_pytorch_model.fp16-00001-of-00002.safetensors"))
    save_file(tensors, file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    loading.find_base_model(str(folder))
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    loading.find_base_model(str(folder))


def test_names_in_capital_letters(weights, tiny_sd, tmp_path):
    """SOMETHING.SAFETENSORS, as Windows has it: a base model and a VAE."""
    save_file(weights, tmp_path / "MODEL.SAFETENSORS")
    save_file(starting(weights, "first_stage_model."), tmp_path / "VAE.SAFETENSORS")
    (wanted,) = draw(tiny_sd, tmp_path / "a").values()
    config = ("--single_file_config", tiny_sd)
    (picture,) = draw(tmp_path / "MODEL.SAFETENSORS", tmp_path / "b", *config).values()
    assert picture.tobytes() == wanted.tobytes()
    (picture,) = draw(tiny_sd, tmp_path / "c", "--vae", tmp_path / "VAE.SAFETENSORS").values()
    assert picture.tobytes() == wanted.tobytes()
    base = load(tmp_path / "MODEL.SAFETENSORS", str(tmp_path / "VAE.SAFETENSORS"), single_file_config=str(tiny_sd))
    assert sample_identity(base.denoiser) == sample_identity(load(tiny_sd).denoiser)

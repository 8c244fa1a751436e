"""The pipeline that draws loads LoRAs of every format on its device, and each model once."""

import copy
import json
import re
import shutil

import pytest
import torch
from infer_fixtures import NAME, difference, draw, flat
from PIL import Image

from scripts import convert_lora
from text_to_image_lora.models.samplers import make_sampler


pytestmark = pytest.mark.usefixtures("library_settings")


@pytest.fixture(scope="module")
def kohya(lora_weights, tmp_path_factory):
    """Returns the LoRA with kohya's names and with its strength in alpha; its header contains no settings."""
    import torch
    from safetensors.torch import save_file

    weights = {}
    for key, value in flat(lora_weights).items():
        path, leaf = re.fullmatch(r"(.+)\.(lora_[AB]\.weight)", key).groups()
        path = path.replace("text_encoder.", "te.", 1).replace(".", "_")
        leaf, strength = {"lora_A.weight": ("lora_down.weight", 1), "lora_B.weight": ("lora_up.weight", 2)}[leaf]
        weights[f"lora_{path}.{leaf}"] = value * strength
        weights[f"lora_{path}.alpha"] = torch.tensor(2.0)  # the rank is 4
    path = tmp_path_factory.mktemp("kohya") / "kohya.safetensors"
    save_file(weights, path, {"ss_clip_skip": "2", "ss_v2": "False"})
    return path


@pytest.fixture(scope="module")
def peft_folder(tiny_pipeline, tmp_path_factory):
    """Returns a LoRA of the UNet in the format of peft, with alpha different from the rank, and {module: B·A·scale}."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(tiny_pipeline.unet), config)
    folder = tmp_path_factory.mktemp("peft") / "hat"
    wrapped.save_pretrained(folder)
    return folder, wrapped.merge_and_unload()


def test_other_dialects(tiny_pipeline, model, compared, kohya, peft_folder, tmp_path, capsys):
    """Draws kohya's names with an alpha and a peft folder, which stock diffusers would misread or ignore."""
    from diffusers import StableDiffusionPipeline

    (theirs,) = draw(model, tmp_path / "kohya", "--lora", kohya).values()
    assert difference(compared[1], theirs) <= 1
    folder, unet = peft_folder
    (theirs,) = draw(model, tmp_path / "peft", "--lora", folder, "--scheduler", "ddim").values()
    parts = {**tiny_pipeline.components, "unet": unet}
    parts["scheduler"] = make_sampler(parts["scheduler"].config, "ddim")
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "merged")
    (merged,) = draw(tmp_path / "merged", tmp_path / "1", "--scheduler", "ddim").values()
    assert difference(merged, theirs) <= 1
    assert difference(merged, compared[0]) > 3
    assert capsys.readouterr().err == ""


def test_a_folder_of_peft_with_a_folder_for_each_component(
    model, lora, compared, lora_weights, write_lora, tmp_path, capsys
):
    """As written by scripts/convert_lora.py: with both components, with one of them, and with a strength."""
    convert_lora.main(convert_lora.parse_args([lora, str(tmp_path / "both"), "--to", "peft"]))
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["text_encoder", "unet"]
    capsys.readouterr()
    pictures = draw(model, tmp_path / "1", "--lora", tmp_path / "both", "--batch_size", 1)
    assert difference(compared[1], pictures[f"{NAME}.png"]) <= 1
    stored = json.loads(Image.open(tmp_path / "1" / f"{NAME}.png").text["repeat"])
    assert len(stored["sha256"]["lora"]) == 2
    (half,) = draw(model, tmp_path / "2", "--lora", f"{tmp_path / 'both'}:0.5").values()
    (expected,) = draw(model, tmp_path / "3", "--lora", f"{lora}:0.5").values()
    assert difference(half, expected) <= 1 < difference(half, compared[1])
    shutil.rmtree(tmp_path / "both" / "text_encoder")
    (one,) = draw(model, tmp_path / "4", "--lora", tmp_path / "both").values()
    unet = write_lora("unet", {f"unet.{key}": value for key, value in lora_weights["unet"].items()})
    (expected,) = draw(model, tmp_path / "5", "--lora", unet).values()
    assert difference(one, expected) <= 1 < difference(one, compared[1])
    assert capsys.readouterr().err == ""


def test_a_damaged_part_of_a_folder_of_peft_is_named(lora, refusal, tmp_path, capsys):
    convert_lora.main(convert_lora.parse_args([lora, str(tmp_path / "both"), "--to", "peft"]))
    capsys.readouterr()
    (tmp_path / "both" / "text_encoder" / "adapter_model.safetensors").write_bytes(b"cut")
    assert f"{tmp_path / 'both' / 'text_encoder'}" in refusal("--lora", tmp_path / "both")


def test_no_model_is_held_twice(model, controlnet, photo, tmp_path, monkeypatch):
    import diffusers

    loaded = []
    for kind in (diffusers.AutoencoderKL, diffusers.UNet2DConditionModel, diffusers.ControlNetModel):
        original = kind.from_pretrained.__func__

        def counting(cls, *args, original=original, **options):
            loaded.append(cls.__name__)
            return original(cls, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(counting))
    draw(model, tmp_path, "--controlnet", controlnet, "--control", "canny", "--image", photo)
    assert sorted(loaded) == ["AutoencoderKL", "ControlNetModel", "UNet2DConditionModel"]


def test_offload_on_a_cpu_is_said_to_do_nothing(model, tmp_path, capsys):
    draw(model, tmp_path, "--offload", "--device", "cpu")
    assert capsys.readouterr().err == "note: --offload has no effect on cpu: it only applies to CUDA GPUs.\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_draws_the_same_picture(model, controlnet, lora, photo, tmp_path):
    flags = ["--device", "cuda", "--controlnet", controlnet, "--control", "canny", "--image", photo, "--lora", lora]
    (kept, _), (moved, _) = (
        draw(model, tmp_path / name, *flags, *more).values() for name, more in (("1", []), ("2", ["--offload"]))
    )
    assert difference(kept, moved) <= 1


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_blocks_draw_the_same_picture(model, lora, compared, tmp_path):
    flags = ["--lora", lora, "--compile", "--grid", "lora_scale=0,1", "--batch_size", 1]
    pictures = draw(model, tmp_path, *flags)
    for scale in (0, 1):
        assert difference(pictures[f"{NAME}-lora_scale{scale}.png"], compared[scale]) <= 2
    repeat = json.loads(Image.open(tmp_path / f"{NAME}-lora_scale1.png").text["repeat"])
    assert repeat["machine"]["compiled"] == "yes"

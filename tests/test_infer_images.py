"""`infer.py`: image to image, ControlNet, and Stable Diffusion XL."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from infer_fixtures import NAME, PROMPT, difference, disk, draw, stock, write_controlnet
from PIL import Image
from safetensors.torch import save_file

import infer
from text_to_image_lora.drawing.draw import fitted
from text_to_image_lora.drawing.find import Given
from text_to_image_lora.models.dialects import WEIGHTS_NAME
from text_to_image_lora.models.families import STABLE_DIFFUSION_XL


pytestmark = pytest.mark.usefixtures("library_settings")


# Image to image.


def test_image_to_image_is_that_of_stock_diffusers(model, lora, photo, tmp_path):
    flags = ["--image", photo, "--strength", 0.5, 0.8, "--num_inference_steps", 6, "--lora", lora, "--batch_size", 1]
    pictures = draw(model, tmp_path, *flags)
    assert [*pictures] == [f"{NAME}-strength0.5.png", f"{NAME}-strength0.8.png"]
    pipe = stock("StableDiffusionImg2ImgPipeline", model)
    pipe.load_lora_weights(lora, weight_name=WEIGHTS_NAME)
    start = disk().resize(
        (80, 56), Image.Resampling.LANCZOS, box=(2.29, 0, 93.71, 64)
    )  # an area of 64² pixels in the picture's aspect ratio, cropped
    for (_, own), strength in zip(pictures.items(), (0.5, 0.8)):
        options = dict(
            image=start, strength=strength, num_inference_steps=6, generator=torch.Generator().manual_seed(0)
        )
        assert own.size == (80, 56)
        assert difference(own, pipe(PROMPT, **options).images[0]) <= 3  # the crop's rounding
    text = Image.open(tmp_path / f"{NAME}-strength0.5.png").text
    assert ", Denoising strength: 0.5, Lora: axe:1" in text["parameters"]
    assert (text["image"], text["strength"]) == (str(photo), "0.5")


def test_more_strength_goes_further_from_the_picture(tmp_path):
    """Uses the real weights of the embedded base model."""
    start = ROOT / "metadata" / "weapons_test" / "axe_001.png"
    flags = ["--image", start, "--strength", 0.65, 0.8, "--guidance_scale", 4, "--num_inference_steps", 10]
    near, far = draw(ROOT / "models" / "mini-sd", tmp_path, *flags, prompt=["a red axe on a gray background"]).values()
    given = np.asarray(Image.open(start).convert("RGB"), dtype=float)
    near, far = (abs(np.asarray(picture, dtype=float) - given).mean() for picture in (near, far))
    assert 0 < near < 0.8 * far


def test_a_picture_from_a_picture_draws_itself_again(model, lora, photo, tmp_path, capsys):
    flags = ["--image", photo, "--num_images", 3, "--lora", lora, "--num_inference_steps", 3]
    draw(model, tmp_path / "1", *flags)
    name = f"{NAME[:-1]}2.png"
    infer.main(["--from_png", str(tmp_path / "1" / name), "--output_dir", str(tmp_path / "2")])
    assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    assert capsys.readouterr().err == ""
    disk(colour="green").save(tmp_path / "other.png")
    flags = ["--image", tmp_path / "other.png", "--output_dir", tmp_path / "3"]
    infer.main(["--from_png", str(tmp_path / "1" / name), *map(str, flags)])
    assert "note: --image is not what" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "3").iterdir()] == [name]


def test_a_sheet_shows_where_its_pictures_start(model, photo, tmp_path):
    pictures = draw(model, tmp_path, "--image", photo, "--strength", 0.6, 1, "--grid", "strength", "guidance=1,5")
    assert len(pictures) == 5
    colours = {colour: count for count, colour in pictures["grid.png"].getcolors(maxcolors=1 << 20)}
    assert colours[0, 0, 128] > 10000  # navy


# ControlNet.


def test_controlnet_is_that_of_stock_diffusers(model, controlnet, lora, photo, tmp_path):
    flags = ["--controlnet", controlnet, "--control_image", photo, "--controlnet_scale", 0.7, "--lora", lora]
    (own,) = draw(model, tmp_path / "1", *flags).values()
    from diffusers import ControlNetModel

    pipe = stock("StableDiffusionControlNetPipeline", model, controlnet=ControlNetModel.from_pretrained(controlnet))
    pipe.load_lora_weights(lora, weight_name=WEIGHTS_NAME)
    control = fitted(Given(control_image=disk()), 80, 56).control_image
    options = dict(image=control, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    theirs = pipe(PROMPT, controlnet_conditioning_scale=0.7, **options).images[0]
    assert difference(own, theirs) == 0
    assert difference(own, pipe(PROMPT, controlnet_conditioning_scale=0.0, **options).images[0]) > 3
    text = Image.open(tmp_path / "1" / f"{NAME}.png").text
    assert text["parameters"].endswith('Lora: axe:1, ControlNet 0: "Module: none, Model: edges, Weight: 0.7"')


def test_a_controlnet_of_no_strength_changes_nothing(model, controlnet, photo, tmp_path):
    flags = ["--controlnet", controlnet, "--control_image", photo, "--grid", "controlnet_scale=0,1", "--batch_size", 1]
    pictures = draw(model, tmp_path / "1", *flags)
    (plain,) = draw(model, tmp_path / "2", "--height", 56, "--width", 80).values()
    assert difference(pictures[f"{NAME}-controlnet_scale0.png"], plain) == 0
    assert difference(pictures[f"{NAME}-controlnet_scale1.png"], plain) > 3


def test_canny_makes_the_edges(model, controlnet, photo, tmp_path):
    """Edges come from the input picture or from another picture; different edges draw different pictures."""
    disk(centre=(60, 30)).save(tmp_path / "other.png")
    flags = ["--controlnet", controlnet, "--control", "canny"]
    both = draw(model, tmp_path / "both", *flags, "--image", photo, "--strength", 1)
    start, other = (
        draw(model, tmp_path / name, *flags, "--control_image", path)
        for name, path in (("disk", photo), ("other", tmp_path / "other.png"))
    )
    name = f"{NAME}.png"
    assert difference(start[name], other[name]) > 3
    assert difference(start[name], both[name]) > 0  # some of the picture remains even at strength 1
    edges = np.asarray(start["edges.png"].convert("L"))
    assert edges.shape == (56, 80)
    assert set(np.unique(edges)) == {0, 255}
    y, x = np.nonzero(edges)
    scale = 56 / 64
    away = np.hypot(x - (30 * scale - 2), y - 30 * scale)  # the crop takes 2 pixels from the left
    assert abs(away - 20 * scale).max() < 2.5
    assert len(x) > 60
    assert difference(start["edges.png"], both["edges.png"]) == 0
    assert json.loads(Image.open(tmp_path / "both" / name).text["repeat"])["flags"]["control"] == ["canny"]
    infer.main(["--from_png", str(tmp_path / "both" / name), "--output_dir", str(tmp_path / "again")])
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()


# Merged models.


# Bad input.


@pytest.fixture(scope="module")
def bad_pictures(bad_files, tiny_pipeline, controlnet, photo):
    from diffusers import ControlNetModel

    config = json.loads((controlnet / "config.json").read_text())
    for name, changes in {"wide": {"cross_attention_dim": 768}, "deep": {"block_out_channels": [32, 64, 64]}}.items():
        folder = bad_files / f"controlnet-{name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | changes))
    (bad_files / "text.png").write_text("no picture")
    (bad_files / "cut.png").write_bytes(photo.read_bytes()[:60])
    (bad_files / "full").mkdir()
    (bad_files / "full" / "file").touch()
    model = ControlNetModel.from_unet(tiny_pipeline.unet)
    model.save_pretrained(bad_files / "controlnet-eight")
    return bad_files


BAD_INPUT = {
    "--image {bad}/text.png": "--image {bad}/text.png can't be read: it is not a picture.",
    "--image {bad}/cut.png": "--image {bad}/cut.png can't be read: ",
    "--image {bad}/gone.png": "can't be read: No such file or directory",
    "--image {bad}": "can't be read: Is a directory",
    "--image {photo} --strength 1.5": "1.5: it must be a number from 0 to 1",
    "--image {photo} --strength -0.1": "-0.1: it must be a number from 0 to 1",
    "--image {photo} --strength 0": "strength 0 runs none of the 2 steps. Pass a strength of 0.5 or more, or more steps",
    "--image {photo} --strength 0.4 0.6": "strength 0.4 runs none of the 2 steps",
    "--strength 0.5": "--strength needs --image",
    "--controlnet_scale 0.5": "--controlnet_scale needs --controlnet",
    "--control_image {photo}": "--control_image needs --controlnet",
    "--control canny --image {photo}": "--control needs --controlnet",
    "--controlnet {good}": "--controlnet needs --control_image, or --control canny with --image",
    "--controlnet {good} --image {photo}": "--controlnet needs --control_image, or --control canny with --image",
    "--controlnet {good} --control edges --image {photo}": "invalid choice: 'edges'",
    "--controlnet {good} --control_image {bad}/text.png": "--control_image {bad}/text.png can't be read",
    "--controlnet {bad}/wide --control_image {photo}": "contains no config.json of a ControlNetModel",
    "--controlnet {bad}/lora.bin --control_image {photo}": "a single file can't be read",
    "--controlnet ./none --control_image {photo}": "does not exist",
    "--controlnet {bad}/controlnet-wide --control_image {photo}": "its cross_attention_dim is 768, but that of the UNet is 96",
    "--controlnet {bad}/controlnet-deep --control_image {photo}": "its block_out_channels is [32, 64, 64], but that of the UNet is [32, 64]",
    "--save_merged {bad}/merged": "--save_merged needs --lora",
    "--save_merged {bad}/full --lora {bad}/skip.safetensors": "is not empty. Name a new folder",
    "--save_merged {bad}/empty.txt/x --lora {bad}/skip.safetensors": "empty.txt is a file. Name another folder.",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input(flags, bad_pictures, controlnet, photo, refusal):
    names = dict(bad=bad_pictures, good=controlnet, photo=photo)
    assert BAD_INPUT[flags].format(**names) in refusal(*flags.format(**names).split())


def test_a_controlnet_for_another_vae(model, bad_pictures, photo, tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(model, tmp_path, "--controlnet", bad_pictures / "controlnet-eight", "--control_image", photo)
    assert "downsamples by 8, but the VAE by 4." in capsys.readouterr().err


# Families and machines.


MODES = {
    "": ([], {}),
    "Img2Img": (["--image", "{photo}", "--strength", "0.7"], {"image": 1, "strength": 0.7}),
    "ControlNet": (["--controlnet", "{controlnet}", "--control_image", "{photo}"], {"image": 1}),
    "ControlNetImg2Img": (
        ["--controlnet", "{controlnet}", "--control_image", "{photo}", "--image", "{photo}", "--strength", "0.7"],
        {"image": 1, "control_image": 1, "strength": 0.7},
    ),
}


@pytest.fixture(scope="module")
def controlnet_of_xl(tiny_xl, tmp_path_factory):
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_xl, subfolder="unet")
    return write_controlnet(unet, tmp_path_factory.mktemp("controlnets") / "xl")


@pytest.mark.parametrize("negative", [None, "dark"])
@pytest.mark.parametrize("mode", MODES)
def test_stable_diffusion_xl(mode, negative, tiny_xl, controlnet_of_xl, photo, tmp_path):
    """Compares two prompts with the stock pipeline of each mode."""
    words, options = MODES[mode]
    flags = [word.format(photo=photo, controlnet=controlnet_of_xl) for word in words]
    flags += ["--negative_prompt", negative] if negative else []
    size = ["--height", 64, "--width", 64, "--num_inference_steps", 4]
    pictures = draw(tiny_xl, tmp_path, *flags, *size, prompt=[PROMPT, "a dog"])
    more = {}
    if "ControlNet" in mode:
        more["controlnet"] = diffusers.ControlNetModel.from_pretrained(controlnet_of_xl)
        options = options | {"controlnet_conditioning_scale": 1.0}
    pipe = getattr(diffusers, STABLE_DIFFUSION_XL.pipeline_of(mode)).from_pretrained(tiny_xl, **more)
    pipe.set_progress_bar_config(disable=True)
    start = fitted(Given(disk()), 64, 64).image
    options = {k: start if "image" in k else v for k, v in options.items()}
    options |= {"height": 64, "width": 64} if not mode else {}
    for prompt, own in zip((PROMPT, "a dog"), pictures.values()):
        generator = torch.Generator().manual_seed(0)
        asked = dict(negative_prompt=negative, num_inference_steps=4, guidance_scale=7.5)
        theirs = pipe(prompt, generator=generator, **asked, **options).images[0]
        assert difference(own, theirs) <= 2
    assert difference(*pictures.values()) > 3


def test_a_lora_of_stable_diffusion_xl_under_the_original_names(tiny_xl, tmp_path):
    """Written like kohya's trainer, with alpha different from the rank and with mixed ranks, which diffusers misreads."""
    a, b = 3 * torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(4))
    own = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    kohya = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2"
    files = {
        "own": {f"{own}.to_out.0.lora_A.weight": a, f"{own}.to_out.0.lora_B.weight": b.T / 2},
        "kohya": {
            f"{kohya}_to_out_0.lora_down.weight": a, f"{kohya}_to_out_0.lora_up.weight": b.T,
            f"{kohya}_to_out_0.alpha": torch.tensor(2.0),
        },
    }  # fmt: skip
    zeros = torch.zeros(2, 16)
    files["own mixed"] = files["own"] | {
        f"{own}.to_q.lora_A.weight": torch.cat([a[:2], zeros]),
        f"{own}.to_q.lora_B.weight": torch.cat([b[:2], zeros]).T,
    }
    files["kohya mixed"] = files["kohya"] | {
        f"{kohya}_to_q.lora_down.weight": a[:2],
        f"{kohya}_to_q.lora_up.weight": b[:2].T,
    }
    (base,), drawn = draw(tiny_xl, tmp_path / "base").values(), {}
    for name, weights in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value.clone().contiguous() for key, value in weights.items()}, path)
        (drawn[name],) = draw(tiny_xl, tmp_path / name, "--lora", path).values()
    assert difference(drawn["own"], drawn["kohya"]) <= 1
    assert difference(drawn["own mixed"], drawn["kohya mixed"]) <= 1
    assert difference(drawn["own"], base) > 3
    assert difference(drawn["own"], drawn["own mixed"]) > 3

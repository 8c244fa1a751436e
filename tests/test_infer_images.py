"""`infer.py`: pictures from pictures, ControlNet, merged models, and the families and machines that they are drawn with."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from infer_fixtures import PROMPT, command, difference, draw
from PIL import Image, ImageDraw

import infer


pytestmark = pytest.mark.usefixtures("library_settings")
NAME = f"00-{PROMPT.replace(' ', '-')}-seed0"


def stock(name, folder, **more):
    """A pipeline of diffusers with the sampler that infer.py takes instead of PNDM."""
    import diffusers

    pipe = getattr(diffusers, name).from_pretrained(folder, safety_checker=None, **more)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def disk(size=(96, 64), centre=(30, 30), colour="red", mode="RGB", ground="navy"):
    """A disk on a ground, which edges can be found in."""
    image = Image.new(mode, size, ground)
    ImageDraw.Draw(image).ellipse([c - 20 for c in centre] + [c + 20 for c in centre], fill=colour)
    return image


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "disk.png"
    disk().save(path)
    return path


# Image to image.


def test_image_to_image_is_that_of_stock_diffusers(model, lora, photo, tmp_path):
    flags = ["--image", photo, "--strength", 0.5, 0.8, "--num_inference_steps", 6, "--lora", lora, "--batch_size", 1]
    pictures = draw(model, tmp_path, *flags)
    assert [*pictures] == [f"{NAME}-strength0.5.png", f"{NAME}-strength0.8.png"]
    pipe = stock("StableDiffusionImg2ImgPipeline", model)
    pipe.load_lora_weights(lora, weight_name=infer.WEIGHT_NAME)
    start = disk().resize(
        (80, 56), Image.Resampling.LANCZOS, box=(2.29, 0, 93.71, 64)
    )  # 64² pixels in its shape, cropped
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
    """On the embedded base, with real weights."""
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


def png_of_16_bits(values):
    """A greyscale PNG of 16 bits, which Pillow writes in other ways."""
    rows = b"".join(b"\0" + struct.pack(f">{len(row)}H", *row) for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", len(values[0]), len(values), 16, 0, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_pictures_as_people_have_them(tmp_path):
    """Turned by EXIF, with transparency, of 16 bits, moving: each as it is meant."""
    turned = Image.Exif()
    turned[0x0112] = 6
    disk((32, 16), (0, 0)).save(tmp_path / "turned.png", exif=turned)
    image = infer.read_image("--image", tmp_path / "turned.png")
    assert image.size == (16, 32)
    assert image.getpixel((15, 0)) == (255, 0, 0)
    hidden = disk((8, 8), (4, 4), (9, 9, 9, 0), "RGBA", (0, 0, 0, 0))
    hidden.putpixel((3, 3), (0, 255, 0, 255))
    hidden.save(tmp_path / "clear.png")
    image = infer.read_image("--image", tmp_path / "clear.png")
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((3, 3))) == ("RGB", (255, 255, 255), (0, 255, 0))
    (tmp_path / "deep.png").write_bytes(png_of_16_bits([[0, 128 * 257, 65535]] * 2))
    deep = infer.read_image("--image", tmp_path / "deep.png")
    assert [deep.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    disk(mode="P", colour=1, ground=0).save(
        tmp_path / "moving.gif", save_all=True, append_images=[disk(mode="P", ground=2)]
    )
    assert infer.read_image("--image", tmp_path / "moving.gif").size == (96, 64)


@pytest.mark.parametrize(
    ("wanted", "shape", "size"),
    [
        ((None, None), None, (512, 512)),
        ((None, 640), None, (512, 640)),
        ((None, None), (1000, 1000), (512, 512)),
        ((None, None), (4000, 3000), (440, 592)),
        ((None, None), (30, 40), (592, 440)),
        ((None, 768), (4000, 3000), (576, 768)),
        ((768, None), (4000, 3000), (768, 1024)),
        ((320, 640), (30, 40), (320, 640)),
        ((None, None), (9000, 9), (16, 16192)),
    ],
)
def test_sizes(wanted, shape, size):
    """(height, width): the model's own area in the shape (width, height) of the picture."""
    assert infer.size_of(infer.Drawing(height=wanted[0], width=wanted[1]), (512, 512), shape) == size


# ControlNet.


@pytest.fixture(scope="module")
def controlnet(tiny_pipeline, tmp_path_factory):
    """A ControlNet of the tiny UNet that holds on to edges in no useful way, but strongly."""
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    model = ControlNetModel.from_unet(tiny_pipeline.unet, conditioning_embedding_out_channels=(8, 16, 16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "controlnet_" in name and parameter.ndim > 1:  # they start as zeros
                torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("controlnets") / "edges"
    model.save_pretrained(folder)
    return folder


def test_controlnet_is_that_of_stock_diffusers(model, controlnet, lora, photo, tmp_path):
    flags = ["--controlnet", controlnet, "--control_image", photo, "--controlnet_scale", 0.7, "--lora", lora]
    (own,) = draw(model, tmp_path / "1", *flags).values()
    from diffusers import ControlNetModel

    pipe = stock("StableDiffusionControlNetPipeline", model, controlnet=ControlNetModel.from_pretrained(controlnet))
    pipe.load_lora_weights(lora, weight_name=infer.WEIGHT_NAME)
    control = infer.fitted(infer.Studio(pipe, {}, None, {}, control_image=disk()), 80, 56)["control_image"]
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
    """From the picture to start from, or from another one; the edges of two pictures draw two pictures."""
    disk(centre=(60, 30)).save(tmp_path / "other.png")
    flags = ["--controlnet", controlnet, "--control", "canny"]
    both = draw(model, tmp_path / "both", *flags, "--image", photo, "--strength", 1)
    start, other = (
        draw(model, tmp_path / name, *flags, "--control_image", path)
        for name, path in (("disk", photo), ("other", tmp_path / "other.png"))
    )
    name = f"{NAME}.png"
    assert difference(start[name], other[name]) > 3
    assert difference(start[name], both[name]) > 0  # noise is added to the picture, at its least
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


# Merged models.


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
    """No prompt is needed then; what the folder can't say is told."""
    (tmp_path / "merged").mkdir()
    flags = ["--lora", lora, "--lora_scale", "0", "--save_merged", tmp_path / "merged", "--clip_skip", 1]
    infer.main(["--pretrained_model_name_or_path", model, *map(str, flags), "--output_dir", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'merged'}: the base model with the LoRA merged into it\n"
    assert "can't say that it is to be drawn with clip skip 1" in err
    assert not (tmp_path / "out").exists()
    from safetensors.torch import load_file

    name = "unet/diffusion_pytorch_model.safetensors"
    base, merged = (load_file(f"{folder}/{name}") for folder in (model, tmp_path / "merged"))
    assert base.keys() == merged.keys()
    assert all(torch.equal(base[key], merged[key]) for key in base)


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
    "--image {bad}/text.png": "--image {bad}/text.png can't be read: it is no picture.",
    "--image {bad}/cut.png": "--image {bad}/cut.png can't be read: ",
    "--image {bad}/gone.png": "can't be read: No such file or directory",
    "--image {bad}": "can't be read: Is a directory",
    "--image {photo} --strength 1.5": "1.5: it must be a number from 0 to 1",
    "--image {photo} --strength -0.1": "-0.1: it must be a number from 0 to 1",
    "--image {photo} --strength 0": "strength 0 of 2 steps is none. Pass 0.5 or more, or more steps",
    "--image {photo} --strength 0.4 0.6": "strength 0.4 of 2 steps is none",
    "--strength 0.5": "--strength needs --image",
    "--controlnet_scale 0.5": "--controlnet_scale needs --controlnet",
    "--control_image {photo}": "--control_image needs --controlnet",
    "--control canny --image {photo}": "--control needs --controlnet",
    "--controlnet {good}": "--controlnet needs --control_image, or --control canny with --image",
    "--controlnet {good} --image {photo}": "--controlnet needs --control_image, or --control canny with --image",
    "--controlnet {good} --control edges --image {photo}": "invalid choice: 'edges'",
    "--controlnet {good} --control_image {bad}/text.png": "--control_image {bad}/text.png can't be read",
    "--controlnet {bad}/wide --control_image {photo}": "holds no config.json of a ControlNetModel",
    "--controlnet {bad}/lora.bin --control_image {photo}": "a single file can't be read",
    "--controlnet ./none --control_image {photo}": "does not exist",
    "--controlnet {bad}/controlnet-wide --control_image {photo}": "its cross_attention_dim is 768, the UNet's is 96",
    "--controlnet {bad}/controlnet-deep --control_image {photo}": "its block_out_channels is [32, 64, 64], the UNet's is [32, 64]",
    "--save_merged {bad}/merged": "--save_merged needs --lora",
    "--save_merged {bad}/full --lora {bad}/skip.safetensors": "is not empty. Name a new folder",
    "--save_merged {bad}/empty.txt/x --lora {bad}/skip.safetensors": "can't write into",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input(flags, model, bad_pictures, controlnet, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "load_pipeline", lambda *args: pytest.fail("a model is loaded"))
    names = dict(bad=bad_pictures, good=controlnet, photo=photo)
    with pytest.raises(SystemExit) as stop:
        draw(model, tmp_path / "out", *flags.format(**names).split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert BAD_INPUT[flags].format(**names) in err
    assert not list(tmp_path.iterdir())


def test_a_controlnet_for_another_vae(model, bad_pictures, photo, tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(model, tmp_path, "--controlnet", bad_pictures / "controlnet-eight", "--control_image", photo)
    assert "makes pictures 8 times smaller, and the VAE 4 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--image", "{bad}/text.png"], "it is no picture"),
        (["--lora", "{bad}/lora.pt"], "only .safetensors files are read, since others can carry code"),
    ],
)
def test_bad_input_of_the_command(flags, reason, model, bad_pictures, tmp_path):
    torch.save({"weights": torch.zeros(1)}, bad_pictures / "lora.pt")
    words = [flag.format(bad=bad_pictures) for flag in flags]
    given = ["--pretrained_model_name_or_path", model, "--prompt", "a dog", "--output_dir", tmp_path / "out"]
    code, out, err, seconds = command(*given, *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert reason in err
    assert seconds < 3


# Families and machines.


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory):
    """A `StableDiffusionXLPipeline` folder with random weights, for 64 px pictures, and a ControlNet for it."""
    from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from scripts.mini_sd.model import make_scheduler, write_tokenizer

    folder = tmp_path_factory.mktemp("tiny-sdxl")
    write_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, projection_dim=48)
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **sizes, **ids)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=make_scheduler(),
    ).save_pretrained(folder / "model")  # fmt: skip
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16))
    for name, parameter in controlnet.named_parameters():
        if "controlnet_" in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    controlnet.save_pretrained(folder / "controlnet")
    return folder


MODES = {
    "text to image": ([], {}),
    "image to image": (["--image", "{photo}", "--strength", "0.7"], {"image": 1, "strength": 0.7}),
    "ControlNet": (["--controlnet", "{controlnet}", "--control_image", "{photo}"], {"image": 1}),
    "image to image, ControlNet": (
        ["--controlnet", "{controlnet}", "--control_image", "{photo}", "--image", "{photo}", "--strength", "0.7"],
        {"image": 1, "control_image": 1, "strength": 0.7},
    ),
}


@pytest.mark.parametrize("negative", [None, "dark"])
@pytest.mark.parametrize("mode", MODES)
def test_stable_diffusion_xl(mode, negative, tiny_sdxl, photo, tmp_path):
    """What the stock pipeline of each mode draws, two prompts at once."""
    import diffusers

    words, options = MODES[mode]
    flags = [word.format(photo=photo, controlnet=tiny_sdxl / "controlnet") for word in words]
    flags += ["--negative_prompt", negative] if negative else []
    size = ["--height", 64, "--width", 64, "--num_inference_steps", 4]
    pictures = draw(tiny_sdxl / "model", tmp_path, *flags, *size, prompt=[PROMPT, "a dog"])
    more = {}
    if "ControlNet" in mode:
        more["controlnet"] = diffusers.ControlNetModel.from_pretrained(tiny_sdxl / "controlnet")
        options = options | {"controlnet_conditioning_scale": 1.0}
    name = infer.PIPELINES[mode][0]["sdxl"]
    pipe = getattr(diffusers, name).from_pretrained(tiny_sdxl / "model", **more)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    start = infer.fitted(infer.Studio(pipe, {}, None, {}, image=disk()), 64, 64)["image"]
    options = {k: start if "image" in k else v for k, v in options.items()}
    options |= {"height": 64, "width": 64} if mode == "text to image" else {}
    for prompt, own in zip((PROMPT, "a dog"), pictures.values()):
        generator = torch.Generator().manual_seed(0)
        asked = dict(negative_prompt=negative, num_inference_steps=4, guidance_scale=7.5)
        theirs = pipe(prompt, generator=generator, **asked, **options).images[0]
        assert difference(own, theirs) <= 2
    assert difference(*pictures.values()) > 3


def test_a_lora_of_stable_diffusion_xl_under_the_original_names(tiny_sdxl, tmp_path):
    """As kohya's trainer writes it, alpha not the rank; ranks may differ, which diffusers by itself would misread."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    own, theirs = (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2",
    )
    parts = {f"{theirs}_to_out_0.lora_down.weight": a, f"{theirs}_to_out_0.lora_up.weight": b}
    save_file(parts | {f"{theirs}_to_out_0.alpha": torch.tensor(2.0)}, tmp_path / "kohya.safetensors")
    save_file(
        {f"{own}.to_out.0.lora_A.weight": a, f"{own}.to_out.0.lora_B.weight": b / 2}, tmp_path / "own.safetensors"
    )
    size = ["--height", 64, "--width", 64]
    (one,), (two,), (base,) = (
        draw(tiny_sdxl / "model", tmp_path / name, *size, *flags).values()
        for name, flags in (
            ("1", ["--lora", tmp_path / "own.safetensors"]), ("2", ["--lora", tmp_path / "kohya.safetensors"]), ("3", [])
        )
    )  # fmt: skip
    assert difference(one, two) <= 1
    assert difference(one, base) > 3
    mixed = parts | {
        f"{theirs}_to_q.lora_down.weight": a[:2].clone(),
        f"{theirs}_to_q.lora_up.weight": b[:, :2].clone(),
    }
    save_file(mixed | {f"{theirs}_to_out_0.alpha": torch.tensor(2.0)}, tmp_path / "mixed.safetensors")
    (three,) = draw(tiny_sdxl / "model", tmp_path / "4", *size, "--lora", tmp_path / "mixed.safetensors").values()
    zeros = torch.zeros(2, 64)
    own_mixed = {
        f"{own}.to_out.0.lora_A.weight": a, f"{own}.to_out.0.lora_B.weight": b / 2,
        f"{own}.to_q.lora_A.weight": torch.cat([a[:2], zeros]),
        f"{own}.to_q.lora_B.weight": torch.cat([b[:, :2], zeros.T], dim=1),
    }  # fmt: skip
    save_file(own_mixed, tmp_path / "own mixed.safetensors")
    (four,) = draw(tiny_sdxl / "model", tmp_path / "5", *size, "--lora", tmp_path / "own mixed.safetensors").values()
    assert difference(three, four) <= 1
    assert difference(three, one) > 3


def test_stable_diffusion_xl_with_long_prompts(tiny_sdxl, write_lora):
    """A prompt of one chunk is as stock diffusers has it; of a longer one, what follows is not cut."""
    lora = write_lora("long", long_prompts="True", num_chunks="1")
    model = infer.find_model(str(tiny_sdxl / "model"), None, None, None)
    pipe = infer.load_pipeline(model, None, torch.float32, "text to image", None)
    with torch.no_grad():
        found = infer.encode_chunks(pipe, "a red axe", 1, 0)
        embeds, _, pooled, _ = pipe.encode_prompt("a red axe", device="cpu", do_classifier_free_guidance=False)
        assert torch.equal(found["prompt_embeds"], embeds)
        assert torch.equal(found["pooled_prompt_embeds"], pooled)
        long = infer.encode_chunks(pipe, "a red axe " * 40, 2, 1)
    assert (long["prompt_embeds"].shape, long["pooled_prompt_embeds"].shape) == ((1, 154, 64), (1, 48))
    settings, _ = infer.settle([infer.find_lora(str(lora), 1.0, "lora0")], model, None, {})
    assert settings["long_prompts"]


def test_large_pictures_are_decoded_in_tiles(model, tmp_path, monkeypatch):
    """By their own size, whatever is drawn beside them."""
    flags = ["--guidance_scale", 1]
    whole = draw(model, tmp_path / "whole", *flags, prompt=["a dog", "a dog --width 128"])
    monkeypatch.setattr(infer, "TILED_FROM", 64 * 64)
    tiled = draw(model, tmp_path / "tiled", *flags, prompt=["a dog", "a dog --width 128"])
    (small, large), (small_too, large_too) = whole.values(), tiled.values()
    assert difference(small, small_too) == 0
    assert difference(large, large_too) > 0


def test_offload_on_a_cpu_is_said_to_do_nothing(model, tmp_path, capsys):
    draw(model, tmp_path, "--offload", "--device", "cpu")
    assert capsys.readouterr().err == "note: --offload does nothing on cpu: it is for CUDA GPUs.\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_draws_the_same_picture(model, controlnet, lora, photo, tmp_path):
    flags = ["--device", "cuda", "--controlnet", controlnet, "--control", "canny", "--image", photo, "--lora", lora]
    (kept, _), (moved, _) = (
        draw(model, tmp_path / name, *flags, *more).values() for name, more in (("1", []), ("2", ["--offload"]))
    )
    assert difference(kept, moved) <= 1


def test_too_little_memory_is_told_in_one_line(model, tmp_path, monkeypatch, capsys):
    def full(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", full)
    with pytest.raises(SystemExit) as stop:
        draw(model, tmp_path, "--num_images", 2)
    assert stop.value.code == 1
    line = "the GPU's memory is too small for 2 pictures of 64x64 at once. Pass a smaller --batch_size, or --offload."
    assert capsys.readouterr().err == f"infer.py: error: {line}\n"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_blocks_draw_the_same_picture(model, lora, compared, tmp_path):
    flags = ["--lora", lora, "--compile", "--grid", "lora_scale=0,1", "--batch_size", 1]
    pictures = draw(model, tmp_path, *flags)
    for scale in (0, 1):
        assert difference(pictures[f"{NAME}-lora_scale{scale}.png"], compared[scale]) <= 2
    repeat = json.loads(Image.open(tmp_path / f"{NAME}-lora_scale1.png").text["repeat"])
    assert repeat["machine"]["compiled"] == "yes"

"""LoRAs with their strengths, checkpoints, and pictures in various formats are found."""

import os
import struct
import zlib

import pytest
from conftest import with_red_and_blue_swapped
from infer_fixtures import NAME, difference, disk, draw
from PIL import Image

from text_to_image_lora.drawing import find
from text_to_image_lora.errors import InputError
from text_to_image_lora.models.dialects import WEIGHTS_NAME
from text_to_image_lora.pictures.transforms import open_image


pytestmark = pytest.mark.usefixtures("library_settings")


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no colon in a name")
def test_strength_after_the_last_colon(write_lora, tmp_path):
    odd = tmp_path / "odd:0.5"
    odd.mkdir()
    write_lora("hat").rename(odd / WEIGHTS_NAME)
    for given, path, scale in ((odd, odd, 0.7), (f"{odd}:-0.25", odd, -0.25), (f"{odd}:1e-1", odd, 0.1)):
        found = find.find_lora(str(given), 0.7, "lora0")
        assert (found.given, found.path, found.scale) == (str(path), odd / WEIGHTS_NAME, scale)


def test_labels_of_checkpoints_are_as_short_as_tells_them_apart(write_lora, tmp_path):
    for name in ("a/last", "b/last"):
        (tmp_path / name).mkdir(parents=True)
        write_lora("axe").rename(tmp_path / name / WEIGHTS_NAME)
    assert [*find.find_checkpoints([f"{tmp_path}/*/last"], 1.0)] == ["a/last", "b/last"]


STOPPED_RUNS = [
    ({"checkpoint-9": 9, "checkpoint-10": 10, "epoch-0001": 4}, "checkpoint-10"),
    ({"checkpoint-10": 10, "epoch-0002": 8, "epoch-0003": 12}, "epoch-0003"),
    ({"epoch-0009": 36, "epoch-0010": 40, "best": 90, "checkpoint-old": 99}, "epoch-0010"),
    ({"checkpoint-9": None, "checkpoint-10": None}, "checkpoint-10"),  # of diffusers' scripts, which record no step
    ({"checkpoint-5": 5, "checkpoint-10": "damaged"}, "checkpoint-5"),
]


@pytest.mark.parametrize(("places", "newest"), STOPPED_RUNS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_stopped_run_is_drawn_with_its_newest_lora(write_lora, tmp_path, said, places, newest):
    folder = tmp_path / "run [1]"
    for name, step in places.items():
        (folder / name).mkdir(parents=True)
        path = write_lora("axe", **({"ss_steps": str(step)} if isinstance(step, int) else {}))
        if step == "damaged":
            path.write_bytes(path.read_bytes()[:-100])
        path.rename(folder / name / WEIGHTS_NAME)
    found = find.find_lora(f"{folder}:0.5", 1.0, "lora0")
    assert (found.path, found.scale) == (folder / newest / WEIGHTS_NAME, 0.5)
    assert "no final LoRA yet" in said[-1]
    assert str(found.path) in said[-1]
    assert ["not a complete safetensors file" in line for line in said[:-1]] == [True] * ("damaged" in places.values())
    del said[:]
    write_lora("axe").rename(folder / WEIGHTS_NAME)  # the run has finished
    assert find.find_lora(str(folder), 1.0, "lora0").path == folder / WEIGHTS_NAME
    assert said == []


def test_a_folder_without_any_lora_is_refused(write_lora, tmp_path):
    for name in ("checkpoint-5", "epoch-0001"):  # what a run leaves that was stopped while it wrote
        (tmp_path / name).mkdir()
    write_lora("other").rename(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"contains no pytorch_lora_weights.safetensors \(found: other.safetensors\)"):
        find.find_lora(str(tmp_path), 1.0, "lora0")


def png_of_16_bits(values):
    """Returns a 16-bit greyscale PNG, which Pillow would write in another form."""
    rows = b"".join(b"\0" + struct.pack(f">{len(row)}H", *row) for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", len(values[0]), len(values), 16, 0, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_pictures_as_people_have_them(tmp_path):
    """Pictures with EXIF rotation, transparency, 16 bits or several frames are read as they are meant to be seen."""
    turned = Image.Exif()
    turned[0x0112] = 6
    disk((32, 16), (0, 0)).save(tmp_path / "turned.png", exif=turned)
    image = find.open_picture("--image", tmp_path / "turned.png")
    assert image.size == (16, 32)
    assert image.getpixel((15, 0)) == (255, 0, 0)
    hidden = disk((8, 8), (4, 4), (9, 9, 9, 0), "RGBA", (0, 0, 0, 0))
    hidden.putpixel((3, 3), (0, 255, 0, 255))
    hidden.save(tmp_path / "clear.png")
    image = find.open_picture("--image", tmp_path / "clear.png")
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((3, 3))) == ("RGB", (255, 255, 255), (0, 255, 0))
    (tmp_path / "deep.png").write_bytes(png_of_16_bits([[0, 128 * 257, 65535]] * 2))
    deep = find.open_picture("--image", tmp_path / "deep.png")
    assert [deep.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    disk(mode="P", colour=1, ground=0).save(
        tmp_path / "moving.gif", save_all=True, append_images=[disk(mode="P", ground=2)]
    )
    assert find.open_picture("--image", tmp_path / "moving.gif").size == (96, 64)


@pytest.mark.parametrize("what", ["ICC profile", "float TIFF"])
def test_a_picture_is_drawn_from_as_it_is_trained_on(model, tmp_path, what):
    """ICC profiles are applied, and float TIFFs with values from 0 to 1 are not read as values up to 255."""
    if what == "ICC profile":
        odd, meant = Image.new("RGB", (64, 64), (250, 30, 0)), Image.new("RGB", (64, 64), (0, 30, 250))
        odd.save(tmp_path / "odd.tiff", icc_profile=with_red_and_blue_swapped())
    else:
        odd, meant = (
            Image.linear_gradient("L").convert("F").point(lambda value: value / 255 + 0),
            Image.linear_gradient("L"),
        )
        odd.save(tmp_path / "odd.tiff")
    meant.save(tmp_path / "meant.png")
    trained_on = open_image((tmp_path / "odd.tiff").read_bytes())
    assert difference(trained_on, meant.convert("RGB")) <= 1
    flags = ["--strength", 0.5, "--guidance_scale", 1]
    odd, meant = (
        draw(model, tmp_path / path.stem, "--image", path, *flags)[f"{NAME}.png"]
        for path in (tmp_path / "odd.tiff", tmp_path / "meant.png")
    )
    assert difference(odd, meant) <= 1

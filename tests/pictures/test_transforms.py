"""From the bytes of a picture to pixels: in every format, the model is trained on what a viewer shows."""

import io
import math
import struct
import subprocess
import zlib
from dataclasses import replace

import numpy as np
import pytest
from conftest import png_with_header, with_red_and_blue_swapped
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from text_to_image_lora.pictures import transforms
from text_to_image_lora.pictures.settings import INTERPOLATIONS, AugmentationSettings
from text_to_image_lora.pictures.transforms import (
    PIXEL_LIMIT,
    ImageError,
    Variation,
    apply_variation,
    apply_variation_to_mask,
    covering_size,
    draw_variation,
    open_image,
    resized_size,
    window_size,
)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(image, kind="PNG", **options):
    opened = open_image(encoded(image, kind, **options))
    assert opened.mode == "RGB"
    return np.asarray(opened).astype(int)


def noise(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


# Orientation.

# How a camera stores an upright picture for each value of EXIF's orientation tag (EXIF 2.3, 4.6.4.A).
STORED = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_pictures_stand_upright(orientation, kind):
    upright = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (pixels_of(stored, kind, exif=exif, **options) == upright).all()


# Transparency: transparent pixels become white, whatever colour is stored below them.


@given(hidden=st.tuples(*[st.integers(0, 255)] * 3), alpha=st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_transparency_is_over_white(hidden, alpha):
    expected = np.array(hidden) * (alpha / 255) + 255 * (1 - alpha / 255)
    image = Image.new("RGBA", (2, 2), (*hidden, alpha))
    for kind, options in (("PNG", {}), ("WEBP", dict(lossless=True, exact=True)), ("TIFF", {})):
        assert np.abs(pixels_of(image, kind, **options) - expected).max() <= 1
    grey = Image.new("LA", (2, 2), (hidden[0], alpha))
    assert np.abs(pixels_of(grey) - expected[0]).max() <= 1


def palette_picture():
    """Returns a picture with a palette, red (entry 0) on the left and green (entry 1) on the right."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize(
    ("image", "kind", "transparency", "expected"),
    [
        (palette_picture(), "PNG", 0, [(255, 255, 255), (0, 255, 0)]),
        (palette_picture(), "PNG", bytes([127, 255]), [(255, 128, 128), (0, 255, 0)]),
        (palette_picture(), "GIF", 0, [(255, 255, 255), (0, 255, 0)]),
        (Image.fromarray(np.array([[0, 9]], np.uint8)), "PNG", 0, [(255, 255, 255), (9, 9, 9)]),
        (Image.fromarray(np.array([[0, 65535]], np.uint16)), "PNG", 0, [(255, 255, 255), (255, 255, 255)]),
        (Image.fromarray(np.array([[512, 32896]], np.uint16)), "PNG", 512, [(255, 255, 255), (128, 128, 128)]),
        (Image.new("RGB", (2, 1), (1, 2, 3)), "PNG", (1, 2, 3), [(255, 255, 255), (255, 255, 255)]),
        (Image.new("RGB", (2, 1), (1, 2, 3)), "PNG", (0, 0, 0), [(1, 2, 3), (1, 2, 3)]),
    ],
)
def test_a_transparent_colour_is_white(image, kind, transparency, expected):
    assert (pixels_of(image, kind, transparency=transparency) == [expected]).all()


def shallow_png(depth, kind, rows, transparent):
    """Returns a PNG of this depth and kind (0: grey, 2: RGB), whose transparent colour is stated at this depth."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = len(rows[0]) // (3 if kind == 2 else 1)
    packed = b""
    for row in rows:
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        packed += b"\0" + int(bits, 2).to_bytes(len(bits) // 8)
    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    hidden = b"".join(value.to_bytes(2) for value in transparent)
    parts = [(b"IHDR", header), (b"tRNS", hidden), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, [1, 0, 1], [1], [0, 0, 0]),
        (1, [1, 0, 1], [0], [255, 0, 255]),
        (2, [1, 3, 2], [1], [0, 255, 170]),
        (2, [1, 3, 2], [3], [85, 0, 170]),
        (4, [7, 15, 2, 0], [7], [0, 255, 34, 0]),
        (4, [1, 15, 2, 0], [15], [17, 0, 34, 0]),
        (8, [7, 200], [200], [7, 0]),
    ],
)
def test_a_transparent_grey_is_one_of_the_depth_of_the_file(depth, row, transparent, expected):
    found = np.asarray(open_image(shallow_png(depth, 0, [row, row], transparent), background="black"))
    assert found[:, :, 0].tolist() == found[:, :, 2].tolist() == [expected, expected]


def test_a_transparent_colour_of_16_bits():
    row = [0xFF00, 0x1234, 0, 0xFE00, 0x1200, 0x8000]
    found = np.asarray(open_image(shallow_png(16, 2, [row], row[:3])))
    assert found.tolist() == [[[255, 255, 255], [0xFE, 0x12, 0x80]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_palette_has_the_colours_of_its_profile(kind):
    found = pixels_of(palette_picture(), kind, icc_profile=with_red_and_blue_swapped())
    assert np.abs(found.astype(int) - [[(0, 0, 255), (0, 255, 0)]]).max() <= 2


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        (palette_picture(), 0),
        (palette_picture(), bytes([0, 255])),
        (Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8)), (255, 0, 0)),
    ],
)
def test_a_transparent_colour_is_one_before_the_conversion_by_a_profile(image, transparency):
    found = pixels_of(image, "PNG", transparency=transparency, icc_profile=with_red_and_blue_swapped())
    assert np.abs(found.astype(int) - [[(255, 255, 255), (0, 255, 0)]]).max() <= 2
    seen = pixels_of(
        image,
        "PNG",
        transparency=bytes([255, 0]) if image.mode == "P" else (0, 255, 0),
        icc_profile=with_red_and_blue_swapped(),
    )
    assert np.abs(seen.astype(int) - [[(0, 0, 255), (255, 255, 255)]]).max() <= 2


# Deep pictures.


def big_endian(values):
    height, width = values.shape
    return Image.frombytes("I;16B", (width, height), values.astype(">u2").tobytes())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF"])
@pytest.mark.parametrize("brightest", [65535, 20000, 200])
def test_sixteen_bits_keep_their_range(kind, brightest):
    values = np.linspace(0, brightest, 1000, dtype=np.uint16).reshape(10, 100)
    image = big_endian(values) if kind == "big-endian TIFF" else Image.fromarray(values)
    pixels = pixels_of(image, kind.split()[-1])
    assert np.abs(pixels - values[..., None] / 257).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.5, 1, np.nan]], np.float32), [0, 128, 255, 0]),
        (np.array([[0, 100, 255, -3]], np.float32), [0, 100, 255, 0]),
        (np.array([[0, 0.5, 1.004]], np.float32), [0, 128, 255]),  # resampling exceeds the range
        (np.array([[0.25, 0.5, 1.5, 20]], np.float32), [64, 128, 255, 255]),
        (np.array([[0, 100, 255, -3]], np.int32), [0, 100, 255, 0]),
        (np.array([[0, 2, 1]], np.float32), [0, 2, 1]),  # whole numbers are 8-bit values
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
    ],
)
def test_floats_and_long_integers(values, expected):
    assert (pixels_of(Image.fromarray(values), "TIFF")[0, :, 1] == expected).all()


# Other formats.


def test_cmyk():
    assert np.abs(pixels_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG") - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_plain_modes(mode):
    image = noise(6, 5, mode)
    assert (pixels_of(image) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("name", ["EPS", "PDF", "ICO", "XPM"])
def test_formats_that_are_not_pictures_of_datasets_are_not_opened(name, monkeypatch):
    """Pillow starts Ghostscript for EPS, whatever the file is called."""
    data = {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
        "PDF": b"%PDF-1.4\n%%EOF\n",
        "ICO": encoded(noise(16, 16), "ICO"),
        "XPM": b'/* XPM */\nstatic char * a[] = {\n"1 1 1 1",\n"a c #ff0000",\n"a"};\n',
    }[name]
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: pytest.fail(f"it starts {words}"))
    with pytest.raises(ImageError, match="not a picture in a format that Pillow can read"):
        open_image(data)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    assert (pixels_of(frames[0], "GIF", save_all=True, append_images=frames[1:]) == (255, 0, 0)).all()


# Files that are not pictures.


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"a caption, not a picture\n", "not a picture in a format that Pillow can read"),
        (b"\0" * 1000, "not a picture in a format that Pillow can read"),
        (encoded(noise(64, 64))[:2000], "can't be decoded"),
        (encoded(noise(64, 64), "JPEG")[:1000], "can't be decoded"),
        (encoded(noise(64, 64), "WEBP")[:1000], "can't be decoded"),
        (encoded(noise(64, 64), "GIF")[:1000], "can't be decoded"),
        (png_with_header(2**16, 2**16), f"65536x65536 is more than the limit of {PIXEL_LIMIT:,} pixels"),
        (png_with_header(100, 100), "can't be decoded"),
    ],
)
def test_unusable_files_are_reported(data, reason):
    with pytest.raises(ImageError) as caught:
        open_image(data)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


# Resize, crop, flip: Resize, CenterCrop or RandomCrop, and RandomHorizontalFlip of torchvision, as in diffusers' script.

sides = st.integers(1, 300)
resolutions = st.sampled_from([8, 24, 64])


def torchvision_resize(image, resolution, interpolation):
    """Computes `torchvision.transforms.Resize(resolution)` of a PIL picture (its `_compute_resized_output_size`)."""
    short, long = sorted(image.size)
    new_long = int(resolution * long / short)
    size = (resolution, new_long) if image.width <= image.height else (new_long, resolution)
    return image if image.size == size else image.resize(size, interpolation)


@given(width=sides, height=sides, resolution=resolutions)
@settings(max_examples=100, deadline=None)
def test_the_short_side_becomes_the_resolution(width, height, resolution):
    size = resized_size(width, height, (resolution, resolution))
    assert min(size) == resolution
    assert size == torchvision_resize(Image.new("1", (width, height)), resolution, Image.Resampling.NEAREST).size
    assert resized_size(height, width, (resolution, resolution)) == size[::-1]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(50, 31), (31, 50), (20, 20), (24, 40), (25, 24), (27, 24), (24, 27)])
def test_center_crop(interpolation, size):
    image, resolution = noise(*size), 24
    options = dict(augmentation=AugmentationSettings(center_crop=True), image_id="a", index=0)
    variation = draw_variation(*size, (resolution, resolution), **options)
    pil = getattr(Image.Resampling, interpolation.upper().removesuffix("_EXACT"))
    whole = torchvision_resize(image, resolution, pil)
    left, top = (int(round((side - resolution) / 2.0)) for side in whole.size)  # torchvision's center_crop
    expected = np.asarray(whole)[top : top + resolution, left : left + resolution]
    assert (apply_variation(image, variation, (resolution, resolution), interpolation) == expected).all()


@given(width=sides, height=sides, resolution=resolutions, index=st.integers(0, 2**31), flip=st.booleans())
@settings(max_examples=100, deadline=None)
def test_crops_lie_inside(width, height, resolution, index, flip):
    options = dict(augmentation=AugmentationSettings(random_flip=flip), image_id="a", index=index)
    left, top, mirrored, *rest = draw_variation(width, height, (resolution, resolution), **options)
    new_width, new_height = resized_size(width, height, (resolution, resolution))
    assert 0 <= left <= new_width - resolution
    assert 0 <= top <= new_height - resolution
    assert mirrored == (flip and index % 2 == 1)
    assert rest == [1, 0, 1, 1, 1, 0]


def test_every_crop_occurs():
    crops = {draw_variation(64, 40, (32, 32), AugmentationSettings(), image_id="a", index=i).left for i in range(400)}
    assert crops == set(range(51 - 32 + 1))


def test_a_flip_mirrors_the_same_crop():
    image = noise(50, 24)
    plain, mirrored = (apply_variation(image, Variation(7, 0, flip), (24, 24)) for flip in (False, True))
    assert plain.dtype == np.uint8
    assert (plain == np.asarray(image)[:, 7:31]).all()
    assert (mirrored == plain[:, ::-1]).all()


def test_a_variation_is_a_function_of_its_arguments():
    def draw(image_id="a", index=0):
        augmentation = AugmentationSettings(random_flip=True)
        return draw_variation(900, 500, (64, 64), augmentation, image_id=image_id, index=index)

    first = draw()
    np.random.seed(5)
    assert draw() == first
    assert len({draw(index=index).left for index in range(20)}) > 5
    assert len({draw(image_id=name).left for name in "abcdefghij"}) > 3


@pytest.mark.parametrize(("center_crop", "random_flip", "count"), [(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 2)])
def test_square_pictures_have_one_crop(center_crop, random_flip, count):
    augmentation = AugmentationSettings(center_crop=bool(center_crop), random_flip=bool(random_flip))
    options = dict(augmentation=augmentation, image_id="a")
    drawn = {draw_variation(70, 70, (32, 32), index=index, **options) for index in range(20)}
    assert drawn == {Variation(0, 0, False), Variation(0, 0, True)} if count == 2 else {Variation(0, 0, False)}


# Thin strips would take gigabytes if they were resized completely before they are cropped, like other pictures.

STRIPS = [(1, 1000), (1000, 1), (3, 1500), (900, 37)]


def smooth(width, height):
    """Returns a picture without edges, because at edges the two methods overshoot and Pillow clips after different passes."""
    return noise(-(-width // 8), -(-height // 8)).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("size", STRIPS)
@pytest.mark.parametrize("interpolation", ["lanczos", "bicubic", "bilinear"])
def test_only_what_is_seen_of_a_strip_is_enlarged_with_the_same_pixels(monkeypatch, size, interpolation):
    image, mask = smooth(*size), smooth(*size).convert("L")
    assert np.ptp(np.asarray(image)) > 100
    augmentations = (
        AugmentationSettings(center_crop=True),
        AugmentationSettings(random_flip=True),
        AugmentationSettings(random_flip=True, random_crop_scale=0.6, random_rotation=40),
    )
    for augmentation, index in ((a, i) for a in augmentations for i in range(4)):
        variation = draw_variation(*size, (24, 32), augmentation, image_id="a", index=index)
        covering = covering_size(*size, (24, 32), variation.share, variation.turn)
        results = []
        for limit in (math.prod(covering), math.prod(covering) - 1):
            monkeypatch.setattr(transforms, "WHOLE_LIMIT", limit)
            pixels = apply_variation(image, variation, (24, 32), interpolation).astype(int)
            results.append((pixels, apply_variation_to_mask(mask, variation, (24, 32), 4)))
        (whole, whole_mask), (seen, seen_mask) = results
        assert seen.shape == (32, 24, 3)
        assert np.abs(seen - whole).max() <= 1
        assert np.abs(seen_mask - whole_mask).max() <= 1 / 255


@pytest.mark.parametrize("size", [(1, 4000), (6000, 3)])
def test_a_strip_is_never_enlarged_beyond_the_limit(monkeypatch, size):
    made, resize = [], Image.Image.resize

    def spy(image, size, *args, **kwargs):
        assert math.prod(size) <= transforms.WHOLE_LIMIT
        made.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy)
    image = Image.new("RGB", size, (200, 90, 40))
    variation = draw_variation(*size, (512, 512), AugmentationSettings(center_crop=True), image_id="a", index=0)
    assert (apply_variation(image, variation, (512, 512)) == (200, 90, 40)).all()
    assert made == [(512, 512)]
    # Less thin pictures are resized completely.
    apply_variation(Image.new("RGB", (30, 600)), Variation(0, 0, False), (512, 512))
    assert made[1:] == [(512, 10240)]


# Augmentation.


def test_how_many_variations_hold_all_there_is():
    assert AugmentationSettings(center_crop=True).variations() == 1
    assert AugmentationSettings(center_crop=True, random_flip=True).variations() == 2
    assert AugmentationSettings(random_flip=True).variations() is None
    for name in ("rotation", "brightness", "contrast", "saturation", "hue"):
        assert AugmentationSettings(center_crop=True, **{f"random_{name}": 0.1}).variations() is None
    assert AugmentationSettings(center_crop=True, random_crop_scale=0.9).variations() is None


STRONG = AugmentationSettings(
    random_flip=True, random_rotation=180, random_crop_scale=0.5, random_brightness=0.5, random_contrast=0.5,
    random_saturation=0.5, random_hue=0.5,
)  # fmt: skip


@given(sides, sides, st.sampled_from([(24, 24), (40, 16), (16, 40)]), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_variation_has_its_size_and_no_corner_from_outside(width, height, size, index, center_crop):
    augmentation = replace(
        STRONG, center_crop=center_crop, random_brightness=0, random_contrast=0, random_saturation=0, random_hue=0
    )
    variation = draw_variation(width, height, size, augmentation, image_id="a", index=index)
    assert 0.5 <= variation.share <= 1
    assert -180 <= variation.turn <= 180
    pixels = apply_variation(Image.new("RGB", (width, height), (200, 90, 40)), variation, size)
    assert pixels.shape == (size[1], size[0], 3)
    assert (abs(pixels.astype(int) - (200, 90, 40)) <= 1).all()


@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
@pytest.mark.parametrize("turn", [5.0, 30.0, -77.0, 135.0])
def test_rotation_fills_no_corner(size, turn):
    """A rotated gradient is a gradient up to its corners: nothing is mirrored, repeated or black."""
    window = window_size(size, turn)
    y, x = np.mgrid[0 : window[1], 0 : window[0]]
    slope = np.dstack([40 + 2 * x, 40 + 2 * y, 0 * x]).astype(np.uint8)
    turned = apply_variation(Image.fromarray(slope), Variation(0, 0, False, turn=turn), size).astype(float)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    plane = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], axis=1)
    for channel in (0, 1):
        values = turned[..., channel].ravel()
        coefficients = np.linalg.lstsq(plane, values, rcond=None)[0]
        assert np.hypot(*coefficients[:2]) == pytest.approx(2, abs=0.05)
        assert np.abs(plane @ coefficients - values).max() < 1.5


def test_a_turn_is_anticlockwise_and_about_the_middle():
    image = Image.new("RGB", (46, 46), "white")
    image.paste((255, 0, 0), (20, 0, 26, 23))  # the hand of a clock at twelve
    turned = apply_variation(image, Variation(0, 0, False, turn=90.0), (46, 46))
    red = turned[..., 1] < 128
    ys, xs = np.nonzero(red)
    assert ys.min() >= 19
    assert ys.max() <= 26
    assert xs.max() <= 24  # now at nine


def test_colours_are_changed_as_pillow_changes_them():
    from PIL import ImageEnhance

    image = Image.fromarray(np.asarray(noise(24, 24)) // 2 + 40)
    for name, enhancer in (("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast)):
        pixels = apply_variation(image, Variation(0, 0, False, **{name: 0.7}), (24, 24))
        assert abs(pixels.astype(int) - np.asarray(enhancer(image).enhance(0.7))).max() <= 2
    grey = apply_variation(image, Variation(0, 0, False, saturation=0.0), (24, 24))
    assert np.ptp(grey.astype(int), axis=2).max() <= 1
    red = Image.new("RGB", (8, 8), (200, 20, 20))
    assert apply_variation(red, Variation(0, 0, False, hue=1 / 3), (8, 8))[0, 0].tolist() == pytest.approx(
        [20, 200, 20], abs=2
    )


def test_each_strength_bounds_its_draw():
    drawn = [draw_variation(60, 60, (32, 32), STRONG, image_id="a", index=i) for i in range(300)]
    for name, least, most in (
        ("share", 0.5, 1), ("turn", -180, 180), ("brightness", 0.5, 1.5), ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5), ("hue", -0.5, 0.5),
    ):  # fmt: skip
        values = [getattr(variation, name) for variation in drawn]
        assert least <= min(values) < least + 0.05 * (most - least)
        assert most - 0.05 * (most - least) < max(values) <= most

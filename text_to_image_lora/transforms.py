"""A picture file becomes pixels: EXIF, transparency over white, 16 bit, resize, crop, flip. Needs no torch."""

import io
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps


# Sizes are checked below, from the header and before anything is decoded; Pillow's own limit only warns at first.
Image.MAX_IMAGE_PIXELS = None
PIXEL_LIMIT = 2**28

INTERPOLATIONS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
}


class ImageError(Exception):
    """A picture that can't be used, with the reason."""


class Variation(NamedTuple):
    """What is random about a picture: the crop's corner in the resized picture (pixels), and the flip."""

    left: int
    top: int
    flip: bool


def open_image(data):
    """Bytes of a picture file to an RGB `PIL.Image`, upright, transparency composed on white.

    16-bit greyscale keeps its range (Pillow would clip it); of an animation the first frame is used. Raises
    `ImageError` for what can't be decoded or has more than `PIXEL_LIMIT` pixels.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > PIXEL_LIMIT:
            raise ImageError(f"{image.width}x{image.height} is more than the limit of {PIXEL_LIMIT:,} pixels")
        image.load()
        image = ImageOps.exif_transpose(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise what they like on broken files
        reason = str(error) or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "not a picture in a format that Pillow reads"
        raise ImageError(f"it can't be decoded ({reason})") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
        top, deep = values.max(initial=0), image.mode not in ("I", "F")
        scale = 255 if top <= 1 and image.mode == "F" else 1 if top <= 255 and not deep else 255 / max(top, 65535)
        grey = np.round(values * scale).clip(0, 255).astype(np.uint8)
        alpha = np.where(values == image.info.get("transparency"), 0, 255).astype(np.uint8)
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resized_size(width, height, resolution):
    """Width and height after the short side has become `resolution`, as torchvision's `Resize` rounds."""
    if width <= height:
        return resolution, max(resolution, int(resolution * height / width))
    return max(resolution, int(resolution * width / height)), resolution


def draw_variation(width, height, resolution, *, center_crop, random_flip, seed, image_id, index):
    """Variation `index` of a picture of width x height: a function of its arguments alone.

    With `random_flip`, even and odd indices are each other's orientation, so two variations hold both.
    """
    width, height = resized_size(width, height, resolution)
    room = (width - resolution, height - resolution)
    if center_crop:
        left, top = (round(r / 2) for r in room)
    else:
        rng = np.random.default_rng([seed, zlib.crc32(image_id.encode()), index])
        left, top = (int(rng.integers(r + 1)) for r in room)
    return Variation(left, top, bool(random_flip and index % 2))


def apply_variation(image, variation, resolution, interpolation="lanczos"):
    """An RGB picture to uint8 pixels (resolution, resolution, 3): resized, cropped, flipped."""
    size = resized_size(image.width, image.height, resolution)
    if image.size != size:
        image = image.resize(size, INTERPOLATIONS[interpolation])
    left, top, flip = variation
    image = image.crop((left, top, left + resolution, top + resolution))
    return np.array(ImageOps.mirror(image) if flip else image)

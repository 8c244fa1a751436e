"""From a picture file to pixels: EXIF orientation, transparency, 16 bit, resize, crop, flip. Imports no torch."""

import io
import math
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from .formats import plugin_for, readable_formats, register_plugins
from .settings import INTERPOLATIONS, AugmentationSettings


# `open_image` checks the size in the header before it decodes; Pillow's own limit would only warn at first.
Image.MAX_IMAGE_PIXELS = None
PIXEL_LIMIT = 2**28
MOST_FRACTION = 32  # floats below this are fractions of white, if they are not whole numbers
WHOLE_LIMIT = 2**26  # pixels; a picture that would be resized to more is cropped first

RESAMPLING = {
    name: Image.Resampling["NEAREST" if name == "nearest_exact" else name.upper()] for name in INTERPOLATIONS
}
# A PNG states its transparent colour at the depth of the file. At these depths, Pillow scales only the pixels to 8 bits.
IN_8_BITS = {
    "L;2": lambda value: 85 * value,
    "L;4": lambda value: 17 * value,
    "RGB;16B": lambda values: tuple(value >> 8 for value in values),
}


class ImageError(Exception):
    """A picture cannot be used; the message is the reason."""


class Variation(NamedTuple):
    """The random choices for one variation of a picture."""

    left: int  # of the crop in the resized picture, in pixels
    top: int
    flip: bool
    share: float = 1.0  # of the sides of the picture that the crop shows
    turn: float = 0.0  # degrees
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0  # shift, as a share of the colour circle

    @property
    def is_augmented(self) -> bool:
        """Whether the picture is rotated or its colours are changed."""
        colours = (self.brightness, self.contrast, self.saturation, self.hue)
        return self.turn != 0 or colours != (1.0, 1.0, 1.0, 0.0)


def open_image(data: bytes, background: str = "white", least_side: int | None = None) -> Image.Image:
    """Decodes a picture file as `decode` does, to an RGB `PIL.Image` with transparency composed over the background."""
    return compose(decode(data, least_side), background)


def compose(image: Image.Image, background: str = "white") -> Image.Image:
    """Returns a picture from `decode` as RGB, with transparency composed over the background."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def decode(data: bytes, least_side: int | None = None) -> Any:
    """Decodes a picture file to an upright `PIL.Image` in sRGB: RGBA if it can have transparent parts, or else RGB.

    With `least_side`, a JPEG is decoded at the smallest of a few sizes whose sides are at least that, which takes less time.

    16-bit greyscale keeps its range (Pillow would clip it), and of an animation the first frame is used. Raises
    `ImageError` for a file that cannot be decoded or has more than `PIXEL_LIMIT` pixels.
    """
    if not data:
        raise ImageError("the file is empty")
    register_plugins()
    try:
        image: Any = Image.open(io.BytesIO(data), formats=readable_formats())
        if image.width * image.height > PIXEL_LIMIT:
            raise ImageError(f"{image.width}x{image.height} is more than the limit of {PIXEL_LIMIT:,} pixels")
        if least_side is not None:
            image.draft(None, (least_side, least_side))
        depth = image.tile[0].args if image.format == "PNG" and image.tile else None
        image.load()
        if depth in IN_8_BITS and "transparency" in image.info:
            image.info["transparency"] = IN_8_BITS[depth](image.info["transparency"])
        image = _in_srgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds of exceptions on broken files
        reason = str(error) or type(error).__name__
        if "cannot identify image file" in reason:
            if plugin := plugin_for(data):
                raise ImageError(
                    f"it is a {plugin.format} picture, which needs `pip install {plugin.package}` to be read"
                ) from None
            reason = "not a picture in a format that Pillow can read"
        raise ImageError(f"it can't be decoded ({reason})") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
        scale = 255 / white_of(values, image.mode)
        grey = np.round(values * scale).clip(0, 255).astype(np.uint8)
        alpha = np.where(values == image.info.get("transparency"), 0, 255).astype(np.uint8)
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    is_transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if is_transparent else "RGB")


def white_of(values: np.ndarray, mode: str) -> float:
    """Returns the value that is white in a greyscale picture of more than 8 bits.

    That of 16 bits keeps its range. Integers of 32 bits and floats are 8-bit values, if none is larger; floats that are
    small and not whole numbers are fractions of white, which can exceed 1 a little after a resampling.
    """
    top = values.max(initial=0)
    if mode == "F" and (top <= 1 or (top < MOST_FRACTION and (values % 1).any())):
        return 1.0
    return 255.0 if top <= 255 and mode in ("I", "F") else max(float(top), 65535.0)


def _in_srgb(image: Any) -> Any:
    """Converts a picture to sRGB by its ICC profile; without a profile, or with a broken one, it is sRGB already."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    # The transparent colour is one before the conversion.
    if "transparency" in image.info or image.mode in ("P", "PA"):
        opaque = "transparency" not in image.info and image.mode == "P"
        image = image.convert("RGB" if opaque else "LA" if image.mode == "L" else "RGBA")
    if image.mode not in ("RGB", "RGBA", "CMYK", "L", "LA"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
        seen: Any = image if alpha is None else image.convert(image.mode[:-1])
        seen = ImageCms.profileToProfile(seen, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    if alpha is not None:
        seen.putalpha(alpha)
    return seen


def resized_size(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the smallest size of the picture that covers `size` (width, height), rounded as torchvision's `Resize` does."""
    if width * size[1] <= height * size[0]:
        return size[0], max(size[1], int(size[0] * height / width))
    return max(size[0], int(size[1] * width / height)), size[1]


def window_size(size: tuple[int, int], turn: float) -> tuple[int, int]:
    """Returns the size of the crop that, after a rotation by `turn` degrees, still covers `size`."""
    if not turn:
        return size
    c, s = abs(math.cos(math.radians(turn))), abs(math.sin(math.radians(turn)))
    return math.ceil(size[0] * c + size[1] * s), math.ceil(size[0] * s + size[1] * c)


def covering_size(width: int, height: int, size: tuple[int, int], share: float, turn: float) -> tuple[int, int]:
    """Returns the size to which a picture is resized before the crop, which shows `share` of its sides."""
    window = window_size(size, turn)
    return resized_size(width, height, (math.ceil(window[0] / share), math.ceil(window[1] / share)))


def draw_variation(
    width: int, height: int, size: tuple[int, int], augmentation: AugmentationSettings, *, image_id: str, index: int
) -> Variation:
    """Draws variation `index` of a picture of width x height, for the training size `size`; depends on its arguments only.

    With `random_flip`, odd indices are flipped and even ones are not, so that two variations contain both orientations.
    """
    rng = np.random.default_rng([zlib.crc32(image_id.encode()), index])
    place = rng.random(2)

    def between(least, most):  # rounded, because the values are part of the cache's keys
        return round(float(rng.uniform(least, most)), 4)

    share = between(augmentation.random_crop_scale, 1)
    turn = between(-augmentation.random_rotation, augmentation.random_rotation)
    ranges = (augmentation.random_brightness, augmentation.random_contrast, augmentation.random_saturation)
    brightness, contrast, saturation = (between(1 - x, 1 + x) for x in ranges)
    hue = between(-augmentation.random_hue, augmentation.random_hue)
    covering, window = covering_size(width, height, size, share, turn), window_size(size, turn)
    room = [covering[axis] - window[axis] for axis in (0, 1)]
    if augmentation.center_crop:
        left, top = (round(r / 2) for r in room)
    else:
        left, top = (min(int(p * (r + 1)), r) for p, r in zip(place, room))
    flip = bool(augmentation.random_flip and index % 2)
    return Variation(left, top, flip, share, turn, brightness, contrast, saturation, hue)


def corner_shown(width: int, height: int, variation: Variation, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the corner (left, top) of the crop in the resized and flipped picture, in pixels."""
    covering = covering_size(width, height, size, variation.share, variation.turn)
    window = window_size(size, variation.turn)
    left = covering[0] - window[0] - variation.left if variation.flip else variation.left
    return left, variation.top


def apply_variation(
    image: Image.Image, variation: Variation, size: tuple[int, int], interpolation: str = "lanczos"
) -> np.ndarray:
    """Resizes, crops and augments an RGB picture to `size` (width, height); returns uint8 pixels (height, width, 3)."""
    pixels = _cut(image, variation, size, interpolation)
    return _augment(pixels, variation, size) if variation.is_augmented else pixels


def apply_variation_to_mask(mask: Image.Image, variation: Variation, size: tuple[int, int], factor: int) -> np.ndarray:
    """Crops and rotates a mask like its picture; returns float32 (height / factor, width / factor) from 0 to 1."""
    rotation = Variation(0, 0, False, turn=variation.turn)
    pixels = _cut(mask, variation, size, "bilinear")
    if variation.turn:
        pixels = _augment(np.repeat(pixels[..., None], 3, axis=2), rotation, size)[..., 0]
    blocks = pixels.reshape(size[1] // factor, factor, size[0] // factor, factor)
    return (blocks.mean(axis=(1, 3)) / 255).astype(np.float32)


def _cut(image, variation, size, interpolation):
    """Resizes, crops and flips a picture."""
    covering = covering_size(image.width, image.height, size, variation.share, variation.turn)
    window = window_size(size, variation.turn)
    box = (variation.left, variation.top, variation.left + window[0], variation.top + window[1])
    if covering[0] * covering[1] > WHOLE_LIMIT:  # a thin strip: enlarge only the part that is cropped
        scale = image.width / covering[0], image.height / covering[1]
        seen = tuple(side * scale[i % 2] for i, side in enumerate(box))
        image = image.resize(window, RESAMPLING[interpolation], box=seen)
    else:
        if image.size != covering:
            image = image.resize(covering, RESAMPLING[interpolation])
        image = image.crop(box)
    return np.array(ImageOps.mirror(image) if variation.flip else image)


def _augment(pixels, variation, size):
    """Rotates the crop, takes its center, and changes its colours, with kornia."""
    import torch
    from kornia import enhance
    from kornia.geometry.transform import get_rotation_matrix2d, warp_affine

    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    if variation.turn:
        middle, target = ((torch.tensor([sides], dtype=torch.float32) - 1) / 2 for sides in (image.shape[:1:-1], size))
        matrix = get_rotation_matrix2d(middle, torch.tensor([variation.turn]), torch.ones(1, 2))
        matrix[:, :, 2] += target - middle
        image = warp_affine(image, matrix, dsize=size[::-1], padding_mode="reflection")
    if variation.brightness != 1:
        image = enhance.adjust_brightness_accumulative(image, variation.brightness)
    if variation.contrast != 1:
        image = enhance.adjust_contrast_with_mean_subtraction(image, variation.contrast)
    if variation.saturation != 1:
        image = enhance.adjust_saturation(image, variation.saturation)
    if variation.hue:
        image = enhance.adjust_hue(image, 2 * math.pi * variation.hue)
    return (image[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()

"""A picture file becomes pixels: EXIF, transparency over white, 16 bit, resize, crop, flip. Needs no torch."""

import io
import math
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from .settings import INTERPOLATIONS, AugmentationSettings


# Sizes are checked below, from the header and before anything is decoded; Pillow's own limit only warns at first.
Image.MAX_IMAGE_PIXELS = None
PIXEL_LIMIT = 2**28
WHOLE_LIMIT = 2**26  # pixels to which a picture is resized whole, before it is cropped

RESAMPLING = {
    name: Image.Resampling["NEAREST" if name == "nearest_exact" else name.upper()] for name in INTERPOLATIONS
}


class ImageError(Exception):
    """A picture that can't be used, with the reason."""


class Variation(NamedTuple):
    """What was drawn for a picture.

    The corner (pixels) of the window in the resized picture, the flip, the window's share of the picture, the turn in
    degrees, the factors of brightness, contrast and saturation, and the shift of the hue.
    """

    left: int
    top: int
    flip: bool
    share: float = 1.0
    turn: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    @property
    def is_augmented(self):
        """Whether the picture is turned or its colours are changed."""
        colours = (self.brightness, self.contrast, self.saturation, self.hue)
        return self.turn != 0 or colours != (1.0, 1.0, 1.0, 0.0)


def open_image(data, background="white"):
    """Bytes of a picture file to an RGB `PIL.Image`, upright, transparency composed on white or another background.

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
        image = _in_srgb(ImageOps.exif_transpose(image))
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
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def open_mask(data, size):
    """Bytes of a mask to a grey `PIL.Image` of the picture's `size`: white counts, black and transparent don't."""
    try:
        mask = open_image(data, background="black").convert("L")
    except ImageError as error:
        raise ImageError(f"its mask: {error}") from error
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def _in_srgb(image):
    """The picture with its colours as its ICC profile means them; one without profile, or a broken one, is sRGB."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        seen = image.convert("RGB") if alpha is not None else image
        seen = ImageCms.profileToProfile(seen, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    if alpha is not None:
        seen.putalpha(alpha)
    elif "transparency" in image.info:
        return image
    return seen


def resized_size(width, height, size):
    """Width and height after the picture covers `size` (width, height); rounded as torchvision's `Resize` does."""
    if width * size[1] <= height * size[0]:
        return size[0], max(size[1], int(size[0] * height / width))
    return max(size[0], int(size[1] * width / height)), size[1]


def window_size(size, turn):
    """Sides (pixels) of what must be cut out, so that a picture of `size` can be cut from it turned, without corners."""
    if not turn:
        return size
    c, s = abs(math.cos(math.radians(turn))), abs(math.sin(math.radians(turn)))
    return math.ceil(size[0] * c + size[1] * s), math.ceil(size[0] * s + size[1] * c)


def covering_size(width, height, size, share, turn):
    """The size to which a picture is resized before a window is cut out of it that shows that share of its sides."""
    return resized_size(width, height, tuple(math.ceil(side / share) for side in window_size(size, turn)))


def draw_variation(width, height, size, augmentation: AugmentationSettings, *, image_id, index):
    """Variation `index` of a picture of width x height, for pixels of `size`: a function of its arguments alone.

    With `random_flip`, even and odd indices are each other's orientation, so two variations hold both.
    """
    rng = np.random.default_rng([zlib.crc32(image_id.encode()), index])
    place = rng.random(2)

    def between(least, most):  # in few digits: they are a part of the cache's keys
        return round(float(rng.uniform(least, most)), 4)

    share = between(augmentation.random_crop_scale, 1)
    turn = between(-augmentation.random_rotation, augmentation.random_rotation)
    ranges = (augmentation.random_brightness, augmentation.random_contrast, augmentation.random_saturation)
    factors = [between(1 - x, 1 + x) for x in ranges]
    hue = between(-augmentation.random_hue, augmentation.random_hue)
    covering, window = covering_size(width, height, size, share, turn), window_size(size, turn)
    room = [covering[axis] - window[axis] for axis in (0, 1)]
    if augmentation.center_crop:
        left, top = (round(r / 2) for r in room)
    else:
        left, top = (min(int(p * (r + 1)), r) for p, r in zip(place, room))
    flip = bool(augmentation.random_flip and index % 2)
    return Variation(left, top, flip, share, turn, *factors, hue)


def corner_shown(width, height, variation, size):
    """(left, top) in pixels of what is shown of a picture, in the picture as it was resized and mirrored."""
    covering = covering_size(width, height, size, variation.share, variation.turn)
    window = window_size(size, variation.turn)
    left = covering[0] - window[0] - variation.left if variation.flip else variation.left
    return left, variation.top


def apply_variation(image, variation, size, interpolation="lanczos"):
    """An RGB picture to uint8 pixels (height, width, 3) of `size` (width, height): resized, cropped, flipped, ..."""
    pixels = _cut(image, variation, size, interpolation)
    return _augment(pixels, variation, size) if variation.is_augmented else pixels


def apply_variation_to_mask(mask, variation, size, factor):
    """A grey mask to float32 (height / factor, width / factor) from 0 to 1: cut and turned as its picture is."""
    still = Variation(0, 0, False, turn=variation.turn)
    pixels = _cut(mask, variation, size, "bilinear")
    if variation.turn:
        pixels = _augment(np.repeat(pixels[..., None], 3, axis=2), still, size)[..., 0]
    blocks = pixels.reshape(size[1] // factor, factor, size[0] // factor, factor)
    return (blocks.mean(axis=(1, 3)) / 255).astype(np.float32)


def _cut(image, variation, size, interpolation):
    """Resized, cropped to the window, mirrored."""
    covering = covering_size(image.width, image.height, size, variation.share, variation.turn)
    window = window_size(size, variation.turn)
    box = (variation.left, variation.top, variation.left + window[0], variation.top + window[1])
    if covering[0] * covering[1] > WHOLE_LIMIT:  # a thin strip: only what is seen of it is enlarged
        scale = image.width / covering[0], image.height / covering[1]
        seen = tuple(side * scale[i % 2] for i, side in enumerate(box))
        image = image.resize(window, RESAMPLING[interpolation], box=seen)
    else:
        if image.size != covering:
            image = image.resize(covering, RESAMPLING[interpolation])
        image = image.crop(box)
    return np.array(ImageOps.mirror(image) if variation.flip else image)


def _augment(pixels, variation, size):
    """Turns the window and cuts the middle out of it, then changes its colours (kornia's functions)."""
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

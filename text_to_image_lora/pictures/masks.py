"""Which parts of a picture count in the loss: its mask, and with --alpha_mask what of it is opaque."""

from typing import Any, NamedTuple

from PIL import Image, ImageChops

from .transforms import ImageError, compose, decode, open_image


OPAQUE, PARTLY, WHOLLY = 0, 1, 2  # how transparent a picture is; the last: nothing that its mask shows is opaque


class Opened(NamedTuple):
    """A decoded picture."""

    image: Any  # RGB
    mask: Any  # greyscale, of the picture's size; None without one
    alpha: Any  # greyscale: how opaque each pixel is; None if all are opaque

    def weights(self, *, alpha_mask: bool) -> Any:
        """Returns which parts count, as a greyscale picture; None if all count equally."""
        if self.alpha is None or not alpha_mask:
            return self.mask
        return self.alpha if self.mask is None else ImageChops.multiply(self.mask, self.alpha)

    @property
    def transparency(self) -> int:
        if self.alpha is None:
            return OPAQUE
        return WHOLLY if is_black(self.weights(alpha_mask=True)) else PARTLY


def open_masked(data: bytes, mask: bytes | None) -> Opened:
    """Decodes the files of a picture and of its mask, if it has one; raises `ImageError`."""
    decoded = decode(data)
    alpha = decoded.getchannel("A") if decoded.mode == "RGBA" else None
    if alpha is not None and alpha.getextrema()[0] == 255:
        alpha = None
    return Opened(compose(decoded), None if mask is None else open_mask(mask, decoded.size), alpha)


def is_black(mask: Any) -> bool:
    return mask.getextrema()[1] == 0


def open_mask(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Decodes a mask to a greyscale `PIL.Image` of the picture's `size`; transparent areas become black."""
    try:
        mask = open_image(data, background="black").convert("L")
    except ImageError as error:
        raise ImageError(f"its mask: {error}") from error
    if mask.size == size:
        return mask
    if abs(mask.width * size[1] - mask.height * size[0]) > 1.5 * max(*mask.size, *size):  # more than rounding
        turned = ", after it is turned upright as its EXIF data says" if mask.size == size[::-1] else ""
        raise ImageError(
            f"its mask has {mask.width}x{mask.height} pixels, which is another shape than the {size[0]}x{size[1]} of the "
            f"picture{turned}"
        )
    return mask.resize(size, Image.Resampling.BILINEAR)

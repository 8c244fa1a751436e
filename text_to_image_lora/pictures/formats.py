"""The formats of pictures that can be read, and the packages that Pillow needs for further ones."""

import contextlib
import functools
from typing import NamedTuple


class Plugin(NamedTuple):
    """A package that teaches Pillow a format."""

    format: str
    package: str  # as `pip install` names it


HEIC = Plugin("HEIC", "pillow-heif")
JPEG_XL = Plugin("JPEG XL", "pillow-jxl-plugin")
PLUGINS = {".heic": HEIC, ".heif": HEIC, ".hif": HEIC, ".jxl": JPEG_XL}
# Formats of working files, such as .psd, are not among them: the picture that was exported usually lies beside the file.
PICTURE_ENDINGS = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".jp2", ".j2k", ".jpf", ".jpx", ".tga", ".qoi", ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip
BRANDS_OF_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@functools.cache
def register_plugins() -> None:
    """Registers the optional packages that are installed with Pillow."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401 - importing it registers it


def readable_formats() -> list[str]:
    """Returns Pillow's names of the formats that are read, for `PIL.Image.open`.

    Pillow knows others, of which EPS starts another program, whatever the file is called.
    """
    from PIL import Image

    register_plugins()
    known = Image.registered_extensions()
    return sorted({known[ending] for ending in (*PICTURE_ENDINGS, *PLUGINS) if ending in known} & Image.OPEN.keys())


def missing_plugin(ending: str) -> Plugin | None:
    """Returns the plugin that Pillow lacks for files with this ending, or None."""
    plugin = PLUGINS.get(ending.lower())
    if plugin is None:
        return None
    from PIL import Image

    register_plugins()
    return None if ending.lower() in Image.registered_extensions() else plugin


def plugin_for(data: bytes) -> Plugin | None:
    """Returns the plugin that reads a file with this content, or None."""
    if data[4:8] == b"ftyp" and data[8:12] in BRANDS_OF_HEIC:
        return HEIC
    return JPEG_XL if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) else None


def is_readable(ending: str) -> bool:
    """Whether pictures with this ending of their name can be read."""
    ending = ending.lower()
    return ending in PICTURE_ENDINGS or (ending in PLUGINS and missing_plugin(ending) is None)

"""Every kind of unusual or invalid input that users have, and its result.

Each is used correctly, or refused with file, row and remedy in one line, and left out and named with --skip_bad_images.
None ends in a traceback, and none silently changes what is trained on.
"""

import io
import json
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import png_with_header, read_records, with_red_and_blue_swapped
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures.examine import examine
from text_to_image_lora.pictures.records import read_image_bytes
from text_to_image_lora.pictures.transforms import open_image


def picture(colour=(200, 30, 60), size=(48, 32), kind="PNG", **options):
    file = io.BytesIO()
    (colour if isinstance(colour, Image.Image) else Image.new("RGB", size, colour)).save(file, kind, **options)
    return file.getvalue()


def noise(mode="RGB", size=(48, 32)):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def animation(kind):
    frames = [Image.new("RGB", (48, 32), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    file = io.BytesIO()
    frames[0].save(
        file, kind, save_all=True, append_images=frames[1:], duration=100,
        **{"lossless": True} if kind == "WEBP" else {},
    )  # fmt: skip
    return file.getvalue()


def deep(dtype, top):
    return picture(Image.fromarray(np.full((32, 48), top, dtype=dtype)))


def transparent(mode):
    image = Image.new("RGBA", (48, 32), (255, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (48, 32), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        return picture(image, transparency=1)
    return picture(image.convert(mode))


def turned(orientation):
    """Returns a picture whose upper left quarter is red when it is shown upright, stored as the EXIF tag says."""
    upright = Image.new("RGB", (48, 32), "blue")
    upright.paste("red", (0, 0, 24, 16))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(stored, exif=exif)


class Odd(NamedTuple):
    """A picture next to a good one: its bytes, and its colour at (2, 2) and size, or the reason why it is refused."""

    data: bytes
    colour: tuple | None = None
    size: tuple = (48, 32)
    refused: str | None = None
    name: str = "odd.png"


PICTURES = {
    "truncated JPEG": Odd(picture(noise(), kind="JPEG")[:700], refused="it can't be decoded", name="odd.jpg"),
    "truncated PNG": Odd(picture(noise())[:700], refused="it can't be decoded"),
    "truncated WebP": Odd(picture(noise(), kind="WEBP")[:300], refused="it can't be decoded", name="odd.webp"),
    "zero bytes": Odd(b"", refused="the file is empty"),
    "text called jpg": Odd(b"Dear Sir or Madam,\n", refused="not a picture in a format that Pillow can read", name="odd.jpg"),
    "wrong extension": Odd(picture(), (200, 30, 60), name="odd.jpg"),
    "upper-case extension": Odd(picture(), (200, 30, 60), name="ODD.PNG"),
    "name with spaces": Odd(picture(), (200, 30, 60), name="an odd one, really.png"),
    "name in NFC": Odd(picture(), (200, 30, 60), name=unicodedata.normalize("NFC", "épée.png")),
    "name in NFD": Odd(picture(), (200, 30, 60), name=unicodedata.normalize("NFD", "épée.png")),
    "CMYK": Odd(picture(Image.new("CMYK", (48, 32), (0, 255, 255, 0)), kind="JPEG"), (255, 0, 0), name="odd.jpg"),
    "16 bit, bright": Odd(deep(np.uint16, 65535), (255, 255, 255)),
    "16 bit, middle": Odd(deep(np.uint16, 32768), (128, 128, 128)),
    "1 bit": Odd(picture(Image.new("1", (48, 32), 1)), (255, 255, 255)),
    "grey with alpha": Odd(transparent("LA"), (255, 255, 255)),
    "palette with transparency": Odd(transparent("P"), (255, 255, 255)),
    "RGBA, red under glass": Odd(transparent("RGBA"), (255, 255, 255)),
    "RGBA, half of black": Odd(picture(Image.new("RGBA", (48, 32), (0, 0, 0, 128))), (127, 127, 127)),
    "animated GIF": Odd(animation("GIF"), (250, 0, 0), name="odd.gif"),
    "animated WebP": Odd(animation("WEBP"), (250, 0, 0), name="odd.webp"),
    **{f"EXIF orientation {i}": Odd(turned(i), (255, 0, 0)) for i in range(1, 9)},
    "ICC profile": Odd(picture((255, 0, 0), icc_profile=with_red_and_blue_swapped()), (0, 0, 255)),
    "ICC profile, red under glass": Odd(picture(Image.new("RGBA", (48, 32), (255, 0, 0, 0)), icc_profile=with_red_and_blue_swapped()), (255, 255, 255)),
    "ICC profile, half of red": Odd(picture(Image.new("RGBA", (48, 32), (255, 0, 0, 128)), icc_profile=with_red_and_blue_swapped()), (127, 127, 255)),
    "ICC profile, red is transparent": Odd(picture((255, 0, 0), icc_profile=with_red_and_blue_swapped(), transparency=(255, 0, 0)), (255, 255, 255)),
    "broken ICC profile": Odd(picture(icc_profile=b"no profile"), (200, 30, 60)),
    "a strip": Odd(picture(size=(1, 4000)), None, (1, 4000)),
    "one pixel": Odd(picture(size=(1, 1)), None, (1, 1)),
    "decompression bomb": Odd(png_with_header(60000, 60000), refused="60000x60000 is more than the limit of 268,435,456 pixels"),
    "less data than stated": Odd(png_with_header(48, 32, b"\0\0\0"), refused="it can't be decoded"),
}  # fmt: skip


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", PICTURES)
@pytest.mark.parametrize("layout", ["metadata", "caption_files"])
def test_odd_pictures(tmp_path, case, layout):
    odd = PICTURES[case]
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / odd.name).write_bytes(odd.data)
    if layout == "metadata":
        rows = [{"file_name": name, "text": "a cat"} for name in ("good.png", odd.name)]
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for name in ("good.png", odd.name):
            (tmp_path / name).with_suffix(".txt").write_text("a cat")
    dataset = read_records(tmp_path)
    index = [Path(row["image"]["path"]).name for row in dataset].index(odd.name)
    good, bad = examine(dataset, range(len(dataset)))
    assert len(dataset) == 2
    if odd.refused is not None:
        assert list(bad) == [index]
        assert odd.refused in bad[index]
        assert odd.name in dataset[index]["source"]
        return
    assert not bad
    assert (good[index].width, good[index].height) == odd.size
    image = open_image(read_image_bytes(dataset[index]["image"]))
    assert image.mode == "RGB"
    if odd.colour is not None:
        x, y = (2, 2)
        assert np.abs(np.subtract(image.getpixel((x, y)), odd.colour)).max() <= 3


# Files, rows and folders.


class Case(NamedTuple):
    """Makes a folder, which is refused with this message, or whose captions are trained on, with this message."""

    make: object
    refused: str | None = None
    captions: list = [["a cat"]]
    said: str | None = None
    left_out: str | None = None  # with --skip_bad_images


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_csv", ".csv").replace("_jsonl", ".jsonl").replace(
            "_png", ".png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(*texts, name="good.png"):
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for text in texts)


def linked(folder):
    outside = folder.parent / "secret.png"
    outside.write_bytes(picture())
    (folder / "good.png").unlink()
    (folder / "good.png").symlink_to(outside)


FOLDERS = {
    "an empty folder": Case(lambda f: (f / "good.png").unlink(), "it contains no pictures and no metadata file"),
    "no captions": Case(lambda f: None, "the pictures have no captions"),
    "a link out of the folder": Case(
        lambda f: (write(f, metadata_jsonl=rows("a cat")), linked(f)), "leaves the dataset folder"
    ),
    "../": Case(
        lambda f: (write(f.parent, up_png=picture()), write(f, metadata_jsonl=rows("a cat", name="../up.png"))),
        "leaves the dataset folder",
    ),
    "an absolute path": Case(
        lambda f: (
            write(f.parent, up_png=picture()),
            write(f, metadata_jsonl=rows("a", name=str(f.parent / "up.png"))),
        ),
        "leaves the dataset folder",
    ),
    "a URL": Case(
        lambda f: write(f, metadata_jsonl=rows("a cat") + rows("a dog", name="https://a.org/b.png")),
        "is a URL, and pictures are read from files only",
        left_out="metadata.jsonl:2",
    ),
    "a row with no picture": Case(
        lambda f: write(f, metadata_jsonl=rows("a cat") + rows("a dog", name="god.png")),
        "'god.png' does not exist (there is 'good.png')",
        left_out="metadata.jsonl:2",
    ),
    "a picture with no row": Case(
        lambda f: write(f, metadata_jsonl=rows("a cat"), other_png=picture()),
        said="1 picture has no row in a metadata file and will not be trained on",
    ),
    "duplicate rows": Case(
        lambda f: write(f, metadata_jsonl=rows("a cat", "a cat")),
        captions=[["a cat"], ["a cat"]],
        said="1 rows name a picture that another row names too; each row is used",
    ),
    "a CSV with a BOM": Case(lambda f: write(f, metadata_csv=b"\xef\xbb\xbffile_name,text\ngood.png,a cat\n")),
    "a CSV with semicolons": Case(lambda f: write(f, metadata_csv="file_name;text\ngood.png;a cat\n")),
    "a CSV with quotes and newlines": Case(
        lambda f: write(f, metadata_csv='file_name,text\ngood.png,"a ""big"" cat,\nold"\n'),
        captions=[['a "big" cat,\nold']],
    ),
    "a CSV with an open quote": Case(
        lambda f: write(f, metadata_csv='file_name,text\ngood.png,"a cat\n'), "metadata.csv:2: this row is not CSV"
    ),
    "a CSV in UTF-16": Case(lambda f: write(f, metadata_csv="file_name,text\ngood.png,a cat\n".encode("utf-16"))),
    "a CSV in Latin-1": Case(
        lambda f: write(f, metadata_csv="file_name,text\ngood.png,un café\n".encode("latin-1")),
        "Save it again as UTF-8",
    ),
    "a CSV without rows": Case(lambda f: write(f, metadata_csv="file_name,text\n"), "it has no usable row"),
    "a JSONL with a broken line": Case(
        lambda f: write(f, metadata_jsonl=rows("a cat") + '{"file_name": "good.png", \n'),
        "metadata.jsonl:2: this line is not JSON",
    ),
    "a null caption": Case(
        lambda f: write(f, metadata_jsonl=rows("a cat", None)), "column 'text' is empty", left_out="metadata.jsonl:2"
    ),
    "an empty caption": Case(
        lambda f: write(f, metadata_jsonl=rows("a cat", " ")), "column 'text' is empty", left_out="metadata.jsonl:2"
    ),
    "a caption of 10,000 characters": Case(
        lambda f: write(f, metadata_jsonl=rows("cat " * 2500)), captions=[["cat " * 2500]]
    ),
    "two metadata files": Case(
        lambda f: write(f, metadata_jsonl=rows("a cat"), metadata_csv="file_name,text\ngood.png,a cat\n"),
        "its pictures would be used twice. Keep only one of the two files",
    ),
    "hidden files": Case(
        lambda f: write(
            f, metadata_jsonl=rows("a cat"), **{".DS_Store": b"x", "Thumbs.db": b"x", "__MACOSX__._good_png": b"x"}
        )
    ),
    "an empty metadata file": Case(lambda f: write(f, metadata_jsonl=""), "it has no usable row"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_odd_folders(tmp_path, case, said):
    make, refused, captions, logged, left_out = FOLDERS[case]
    folder, skipped = tmp_path / "set", []
    write(folder, good_png=picture())
    make(folder)
    if refused is not None:
        with pytest.raises(InputError) as error:
            read_records(folder)
        message = one_line(error)
        assert message.startswith(str(folder))
        assert refused in message
        if left_out is None:  # nothing is left to train on, even with --skip_bad_images
            with pytest.raises(InputError):
                read_records(folder, leave_out=print)
            return
    said.clear()  # removes the messages before the error
    dataset = read_records(folder, leave_out=(lambda *what: skipped.append(what)) if left_out else None)
    assert dataset["captions"][:] == captions
    assert not examine(dataset, range(len(dataset)))[1]
    assert (logged or "") in " ".join(said)
    assert bool(said) == bool(logged)
    assert [source.endswith(left_out) for source, _ in skipped] == ([True] if left_out else [])


def test_an_unreadable_file():
    """Nobody has the permission to read the file; if the test runs as root, it changes to another user."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        write(folder, good_png=picture(), other_png=picture((0, 0, 0)))
        (folder / "metadata.jsonl").write_text(rows("a cat") + rows("a dog", name="other.png"))
        (folder / "other.png").chmod(0)
        dataset = read_records(folder)
        is_root = os.geteuid() == 0
        try:
            if is_root:
                os.seteuid(65534)
            _, bad = examine(dataset, range(len(dataset)))
        finally:
            if is_root:
                os.seteuid(0)
        assert list(bad) == [1]
        assert "Permission denied" in bad[1]
    finally:
        shutil.rmtree(folder)


def test_there_are_as_many_kinds_as_promised():
    assert len(PICTURES) + len(FOLDERS) + 1 >= 50

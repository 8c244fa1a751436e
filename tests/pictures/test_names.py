"""Pictures are told from what only looks like pictures, and what is passed over is named with the remedy."""

import io
import os

import numpy as np
import pytest
from conftest import read_records
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures import formats
from text_to_image_lora.pictures.records import read_image_bytes
from text_to_image_lora.pictures.transforms import ImageError, open_image


FORMATS = {".jfif": "JPEG", ".jpe": "JPEG", ".jp2": "JPEG2000", ".tga": "TGA", ".ppm": "PPM", ".apng": "PNG"}


def save(path, shade=0):
    """A picture in the format that its ending says; PNG for endings that are made up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = FORMATS.get(path.suffix.lower()) or Image.registered_extensions().get(path.suffix.lower(), "PNG")
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 0, 90)).save(file, kind if kind in ("JPEG2000", "TGA", "PPM", "JPEG") else "PNG")
    path.write_bytes(file.getvalue())
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def captioned(folder, *names):
    """Pictures with caption files beside them."""
    for shade, name in enumerate(names):
        path = save(folder / name, shade)
        write(path.with_suffix(".txt"), f"of {name}")
    return folder


def captions_of(records):
    return [captions for (captions,) in records["captions"]]


# What is not a picture.


def test_the_masks_and_conditioning_pictures_of_onetrainer(tmp_path, said):
    folder = captioned(tmp_path, "a.jpg", "b.png", "c.webp", "d.png")
    for name in ("a-masklabel.png", "b-masklabel.png", "d.mask.png", "gone-masklabel.png"):
        save(folder / name, 200)
    for name in ("a-condlabel.png", "c-condlabel.png"):
        save(folder / name)
    records = read_records(folder)
    assert captions_of(records) == ["of a.jpg", "of b.png", "of c.webp", "of d.png"]
    masks = [row["mask"] and row["mask"]["path"] for row in records]
    names = ["a-masklabel.png", "b-masklabel.png", None, "d.mask.png"]
    assert masks == [name and str(folder / name) for name in names]
    assert said == [
        f"{folder}: 2 -condlabel.png files will not be read (these are OneTrainer's conditioning pictures); the first: "
        f"{folder}/a-condlabel.png",
        f"{folder}: 1 masks match no picture by their names; the first: gone-masklabel.png",
    ]


@pytest.mark.parametrize("layout", ["instance", "metadata"])
def test_onetrainers_masks_in_the_other_layouts(tmp_path, layout):
    save(tmp_path / "a.png")
    save(tmp_path / "a-masklabel.png")
    if layout == "metadata":
        write(tmp_path / "metadata.csv", "file_name,text\na.png,x\n")
    records = read_records(tmp_path, instance_prompt="x")
    assert [row["mask"]["path"] for row in records] == [f"{tmp_path}/a-masklabel.png"]


@pytest.mark.parametrize(
    "name", ["@eaDir", "#recycle", "Thumbs", "thumbs", ".thumbnails", "$RECYCLE.BIN", "sub/@eaDir", "@Recycle/old"]
)
@pytest.mark.parametrize("beside", [True, False])
def test_folders_of_thumbnails_and_of_deleted_files(tmp_path, said, name, beside):
    folder = captioned(tmp_path / "set", "a.jpg", "sub/b.jpg")
    save(folder / name / "a.jpg")
    if beside:  # deleted pictures were moved with their captions
        write(folder / name / "a.txt", "deleted")
    assert captions_of(read_records(folder)) == ["of a.jpg", "of sub/b.jpg"]
    assert captions_of(read_records(folder, dataset_layout="instance", instance_prompt="x")) == ["x", "x"]
    ignored = next((part for part in name.split("/") if part != "sub"), None)
    assert all(f"(rename those you mean): {ignored} (1 folder)" in line for line in said)
    assert bool(said) == (name != ".thumbnails")
    # One that is passed itself is meant.
    assert len(read_records(folder / name, instance_prompt="x")) == 1


def test_the_output_of_a_run_inside_the_dataset(tmp_path, said):
    folder = captioned(tmp_path / "set", "a.png")
    write(folder / "my-lora" / "run.yaml", "seed: 0\n")
    save(folder / "my-lora" / "validation" / "step-000010" / "prompt-0.png")
    assert len(read_records(folder, instance_prompt="x", dataset_layout="instance")) == 1
    assert said == [
        f"{folder}: folders of thumbnails, deleted files or runs will not be read (rename those you mean): my-lora (1 folder)"
    ]


def test_kohyas_folders_beside_its_pictures(tmp_path, said):
    folder = tmp_path / "set"
    save(folder / "img" / "3_girl" / "a.png")
    for name in ("model/sample/s.png", "log/s.png", "reg/1_woman/r.png"):
        save(folder / name)
    records = read_records(folder)
    assert (captions_of(records), records["num_repeats"][:]) == (["girl"], [3])
    assert said[0] == (
        f"{folder}: not training on log, model, reg, where kohya's programs keep other pictures (for class pictures, pass "
        f"--class_data_dir {folder}/reg)"
    )
    # Without img; and names that mean nothing without kohya's folders.
    (folder / "img" / "3_girl").rename(folder / "3_girl")
    assert captions_of(read_records(folder)) == ["girl"]
    other = captioned(tmp_path / "other", "model/a.png", "log/b.png")
    assert captions_of(read_records(other)) == ["of log/b.png", "of model/a.png"]
    assert captions_of(read_records(folder / "reg")) == ["woman"]


def test_pictures_outside_of_kohyas_folders(tmp_path, said):
    """They need a caption file; kohya's own script reads none of them."""
    save(tmp_path / "2_girl" / "a.png")
    save(tmp_path / "sample" / "s.png")
    captioned(tmp_path / "more", "m.png")
    records = read_records(tmp_path)
    assert captions_of(records) == ["girl", "of m.png"]
    assert records["num_repeats"][:] == [2, 1]
    line = "1 picture will not be trained on, having neither a caption file nor a folder named as kohya's, such as 10_sks dog"
    assert f"{tmp_path}: {line}; the first: {tmp_path}/sample/s.png" in said
    with pytest.raises(InputError, match="contains no picture to train on. Name the folders as kohya does"):
        read_records(tmp_path / "sample", dataset_layout="kohya")


@pytest.mark.parametrize(
    ("path", "below", "caption", "repeats"),
    [
        ("10_girl/images/a.png", "", "girl", 10),
        ("10_girl/images/deep/a.png", "", "girl", 10),
        ("10_x/more/a.png", "10_x", "x", 10),
        ("img/10_blue dog/a.png", "", "blue dog", 10),
        ("1_images/10_girl/a.png", "", "girl", 10),
    ],
)
def test_kohyas_folders_one_level_off(tmp_path, path, below, caption, repeats):
    save(tmp_path / path)
    save(tmp_path / "10_x" / "c.png")
    records = read_records(tmp_path / below)
    rows = {row["image"]["path"]: (row["captions"], row["num_repeats"], row["concept"]) for row in records}
    assert rows.pop(f"{tmp_path}/10_x/c.png") == (["x"], 10, "x")
    assert list(rows.values()) == [([caption], repeats, caption)]


def test_a_number_above_other_folders(tmp_path):
    """A year above classes is no number of repeats, nor is the name of the dataset itself."""
    for name in ("2024_summer", "3_sets"):
        captioned(tmp_path / name, "axe/a.png", "spear/b.png")
    year = read_records(tmp_path / "2024_summer")
    numbered = read_records(tmp_path / "3_sets")
    for records in (year, numbered):
        assert records["num_repeats"][:] == [1, 1]
        assert records["concept"][:] == ["axe", "spear"]


# Formats.


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.jp2", "a.TGA", "a.ppm", "a.apng"])
def test_formats_that_pillow_reads(tmp_path, name, said):
    records = read_records(captioned(tmp_path, "0.png", name))
    assert captions_of(records) == ["of 0.png", f"of {name}"]
    assert open_image(read_image_bytes(records[1]["image"])).size == (6, 5)
    assert said == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.heic", "run `pip install pillow-heif`, or save as PNG or JPEG"),
        ("a.HEIF", "run `pip install pillow-heif`, or save as PNG or JPEG"),
        ("a.jxl", "run `pip install pillow-jxl-plugin`, or save as PNG or JPEG"),
        ("a.psd", "save as PNG or JPEG"),
        ("a.CR2", "save as PNG or JPEG"),
        ("a.jpg_large", "save as PNG or JPEG"),
        ("a", "add the ending of the format, such as .png"),
    ],
)
def test_formats_that_are_passed_over(tmp_path, name, remedy, said):
    folder, ending = captioned(tmp_path / "set", name), os.path.splitext(name)[1].lower()
    kind = f"{ending} file" if ending else "file without an ending"
    line = f"1 {kind} will not be read ({remedy}); the first: {folder}/{name}"
    with pytest.raises(InputError, match="it contains no pictures and no metadata file.") as caught:
        read_records(folder)
    assert str(caught.value).endswith(f" {line}.")
    captioned(folder, "b.png")
    assert captions_of(read_records(folder)) == ["of b.png"]
    assert said == [f"{folder}: {line}"]
    # The picture that was saved from a working file is there.
    said.clear()
    save(folder / "a.png")
    assert len(read_records(folder)) == 2
    assert said == []


def test_files_that_are_no_pictures_are_not_named(tmp_path, said):
    folder = captioned(tmp_path, "a.png")
    for name in ("a.npz", "b.json", "notes.md", "Thumbs.db", "a.safetensors"):
        write(folder / name, "x")
    write(folder / "b.txt", "its picture was deleted")
    assert len(read_records(folder)) == 1
    assert said == []


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(40)
JPEG_XL = b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (HEIC, "it is a HEIC picture, which needs `pip install pillow-heif` to be read"),
        (HEIC.replace(b"heic", b"mif1"), "it is a HEIC picture, which needs `pip install pillow-heif` to be read"),
        (JPEG_XL, "it is a JPEG XL picture, which needs `pip install pillow-jxl-plugin` to be read"),
        (b"\xff\x0a" + bytes(9), "it is a JPEG XL picture, which needs `pip install pillow-jxl-plugin` to be read"),
        (b"no picture at all", "it can't be decoded (not a picture in a format that Pillow can read)"),
    ],
)
def test_content_that_needs_a_package(data, words):
    """Also where the name says something else, as for phones that send HEIC as .jpg."""
    with pytest.raises(ImageError) as caught:
        open_image(data)
    assert str(caught.value) == words


@pytest.fixture
def stub_of_heif(monkeypatch):
    """Pillow with an opener for .heic, as pillow-heif registers it."""
    from PIL import ImageFile

    class StubImageFile(ImageFile.ImageFile):
        format = "STUBHEIF"

        def _open(self):
            self._size, self._mode = (6, 5), "RGB"

        def load(self):
            self._im = Image.new("RGB", self.size, "red").im
            return Image.Image.load(self)

    Image.init()
    for name in ("OPEN", "ID", "EXTENSION"):
        copied = getattr(Image, name).copy()
        monkeypatch.setattr(Image, name, copied)
    Image.register_open("STUBHEIF", StubImageFile, lambda prefix: prefix[4:12] == b"ftypheic")
    Image.register_extension("STUBHEIF", ".heic")


def test_heic_where_pillow_reads_it(tmp_path, stub_of_heif, said):
    folder = captioned(tmp_path, "a.png")
    for name in ("b.heic", "c.HEIC"):
        write(folder / name, HEIC)
        write((folder / name).with_suffix(".txt"), f"of {name}")
    records = read_records(folder)
    assert captions_of(records) == ["of a.png", "of b.heic", "of c.HEIC"]
    assert said == []
    for row in list(records)[1:]:
        assert np.asarray(open_image(read_image_bytes(row["image"])))[0, 0].tolist() == [255, 0, 0]


def test_installed_packages_are_registered(monkeypatch):
    """pillow-heif registers when it is asked to, pillow-jxl-plugin when it is imported."""
    import sys
    import types

    registered = []
    heif = types.SimpleNamespace(register_heif_opener=lambda: registered.append("heif"))
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    monkeypatch.setitem(sys.modules, "pillow_jxl", types.SimpleNamespace())
    formats.register_plugins.cache_clear()
    formats.register_plugins()
    formats.register_plugins()
    assert registered == ["heif"]
    formats.register_plugins.cache_clear()


# Caption files.


@pytest.mark.parametrize("ending", [".TXT", ".Txt", ".CAPTION"])
def test_caption_files_in_capitals(tmp_path, ending):
    save(tmp_path / "a.PNG")
    write(tmp_path / f"a{ending}", "a cat")
    assert captions_of(read_records(tmp_path)) == ["a cat"]


def test_accents_of_a_caption_file(tmp_path):
    save(tmp_path / "e\u0301pe\u0301e.png")
    write(tmp_path / "\u00e9p\u00e9e.txt", "a sword")
    assert captions_of(read_records(tmp_path)) == ["a sword"]


TEXTS = ["кот", "γάτα", "ein Käter", "a cat\nmy cat", "кот на диване", "猫, 长\n黑猫 on a sofa"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-8", "utf-8-sig"])
def test_caption_files_in_utf_16_without_a_mark(tmp_path, text, encoding):
    save(tmp_path / "a.png")
    write(tmp_path / "a.txt", text.encode(encoding))
    assert read_records(tmp_path)["captions"][:] == [text.split("\n")]


@pytest.mark.parametrize(
    "data", [b"a cat\0", b"a blue cat\0 on a sofa, sleeping", b"caf\xe9", "日本".encode("utf-16-le")]
)
def test_caption_files_in_no_known_encoding(tmp_path, data):
    save(tmp_path / "a.png")
    write(tmp_path / "a.txt", data)
    with pytest.raises(InputError, match=r"a\.txt: it can't be read \(it is not UTF-8 text: byte 0x.. at position"):
        read_records(tmp_path)


# Names that are not UTF-8.


def bad(folder, name):
    """A path whose name is in Latin 1."""
    return os.fsdecode(os.fsencode(folder) + b"/" + name.encode("latin-1"))


@pytest.mark.parametrize("layout", ["beside", "kohya", "instance"])
@pytest.mark.parametrize("name", ["café.png", "10_café/a.png", "10_x/café/b.png"])
def test_names_that_are_not_utf_8(tmp_path, layout, name):
    folder, escaped = captioned(tmp_path / "set", "10_good/a.png"), name.replace("é", "\\xe9")
    path = bad(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save(tmp_path / "p.png").rename(path)
    write(type(folder)(path).with_suffix(".txt"), "x")
    options = {
        "beside": dict(dataset_layout="caption_files"),
        "kohya": {},
        "instance": dict(instance_prompt="x", dataset_layout="instance"),
    }[layout]
    with pytest.raises(InputError) as caught:
        read_records(folder, **options)
    assert str(caught.value) == (
        f"{folder}/{escaped}: its name holds bytes that are not UTF-8. Rename it (for example with convmv), or pass "
        "--skip_bad_images to leave such pictures out."
    )
    left_out = []
    assert len(read_records(folder, leave_out=lambda *row: left_out.append(row), **options)) == 1
    assert left_out == [(f"{folder}/{escaped}", "its name holds bytes that are not UTF-8")]


def test_a_dataset_whose_name_is_not_utf_8(tmp_path):
    path = bad(tmp_path, "café")
    os.makedirs(path)
    for given in (path, path + ".zip", path + "/more"):
        with pytest.raises(InputError, match=r"caf\\xe9.*: its name holds bytes that are not UTF-8. Rename it"):
            read_records(given)


def test_other_files_whose_names_are_not_utf_8(tmp_path, said):
    folder = captioned(tmp_path, "a.png")
    for name in ("café.md", "café.psd", "café.rar", "café.mask.png"):
        save(folder / "x.png").rename(bad(folder, name))
    assert len(read_records(folder)) == 1
    assert all("caf\\xe9" in line for line in said)
    assert len(said) == 3

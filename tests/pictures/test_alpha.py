"""--alpha_mask: only what is opaque counts in the loss, for every way in which a file stores its transparency."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from conftest import make_picture_set, make_transparent, read_metrics, read_records, refusal_of, write_pictures
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures.examine import KNOWN_PICTURES, examine
from text_to_image_lora.pictures.masks import OPAQUE, PARTLY, WHOLLY, open_mask, open_masked
from text_to_image_lora.pictures.transforms import apply_variation_to_mask


ALPHA = np.array([[0, 51, 255], [102, 255, 204]], dtype=np.uint8)  # 3 wide, 2 high


def data_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_16_bits(values, colour_type):
    """Returns a PNG with 16 bits for each channel, which Pillow can't write with colours; `values` is (height, width, channels)."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_alpha(mode, alpha=ALPHA):
    image = Image.new(mode.removesuffix("A"), alpha.shape[::-1])
    image.putalpha(Image.fromarray(alpha))
    return image


def palette(alpha=ALPHA):
    """Returns a palette picture in which each pixel has its own colour, and the transparencies of these colours."""
    image = Image.fromarray(np.arange(alpha.size, dtype=np.uint8).reshape(alpha.shape), "P")
    image.putpalette([value for index in range(alpha.size) for value in (40 * index, 9, 200)])
    return data_of(image, transparency=alpha.tobytes())


WHOLE = np.full_like(ALPHA, 255)
GREY = np.array([[7, 90, 7], [1, 2, 200]])
ONE_COLOUR = np.where(GREY == 7, 0, 255)
DEEP = 257 * ALPHA.astype(int)[..., None]  # 16 bits
FORMS = {
    "RGBA": (data_of(with_alpha("RGBA")), ALPHA),
    "LA": (data_of(with_alpha("LA")), ALPHA),
    "palette": (palette(), ALPHA),
    "one colour of a palette": (
        data_of(Image.fromarray(GREY.astype(np.uint8)).convert("P"), "GIF", transparency=7), ONE_COLOUR
    ),
    "one grey": (data_of(Image.fromarray(GREY.astype(np.uint8)), transparency=7), ONE_COLOUR),
    "one colour": (
        data_of(Image.fromarray(np.repeat(GREY[..., None].astype(np.uint8), 3, axis=2)), transparency=(7, 7, 7)),
        ONE_COLOUR,
    ),
    "one grey of 16 bits": (data_of(Image.fromarray((GREY * 256 + 3).astype(np.uint16)), transparency=7 * 256 + 3), ONE_COLOUR),
    "RGBA of 16 bits": (png_of_16_bits(np.concatenate([DEEP // 2] * 3 + [DEEP], axis=2), 6), ALPHA),
    "LA of 16 bits": (png_of_16_bits(np.concatenate([DEEP // 2, DEEP], axis=2), 4), ALPHA),
    "WebP": (data_of(with_alpha("RGBA"), "WEBP", lossless=True), ALPHA),
    "RGB": (data_of(Image.new("RGB", (3, 2))), None),
    "opaque RGBA": (data_of(with_alpha("RGBA", WHOLE)), None),
    "opaque palette": (palette(WHOLE), None),
    "unused colour": (data_of(Image.fromarray(GREY.astype(np.uint8)), transparency=8), None),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_is_opaque_is_the_mask(form):
    data, expected = FORMS[form]
    opened = open_masked(data, None)
    assert opened.image.mode == "RGB"
    assert opened.weights(alpha_mask=False) is None
    mask = opened.weights(alpha_mask=True)
    assert (opened.transparency, mask is None) == ((OPAQUE, True) if expected is None else (PARTLY, False))
    if expected is not None:
        assert (mask.mode, np.asarray(mask).tolist()) == ("L", expected.tolist())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_upright_with_its_picture(orientation):
    """A corner of its own for each colour shows how the picture was turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.merge("RGBA", [*Image.fromarray(255 - ALPHA).convert("RGB").split(), Image.fromarray(ALPHA)])
    opened = open_masked(data_of(image, exif=exif), None)
    mask = np.asarray(opened.weights(alpha_mask=True)).astype(int)
    assert opened.image.size == ((3, 2) if orientation < 5 else (2, 3))
    over_white = 255 + mask / 255 * ((255 - mask) - 255)
    assert np.abs(np.asarray(opened.image)[..., 0] - over_white).max() <= 1
    assert (mask.tolist() == ALPHA.tolist()) == (orientation == 1)


def test_it_is_multiplied_with_a_mask():
    mask = np.array([[255, 128, 60], [0, 51, 255]], dtype=np.uint8)
    opened = open_masked(FORMS["RGBA"][0], data_of(Image.fromarray(mask)))
    assert np.asarray(opened.weights(alpha_mask=False)).tolist() == mask.tolist()
    assert np.asarray(opened.weights(alpha_mask=True)).tolist() == (mask.astype(int) * ALPHA // 255).tolist()
    assert opened.transparency == PARTLY


@pytest.fixture
def cut_out(tmp_path):
    """Four pictures of 40x32, of which the second and the last are more transparent on the left."""
    folder = write_pictures(tmp_path / "cut out", count=4)
    make_transparent(folder, (1, 3))
    return folder


@pytest.mark.parametrize(
    "augmentation",
    [
        dict(center_crop=True, random_flip=True),
        dict(random_crop_scale=0.8, random_rotation=30.0, random_flip=True),
        {},
    ],
)
def test_it_is_cropped_rotated_and_flipped_as_masks_are(cut_out, augmentation):
    """Equals what becomes of a mask file with the same values."""
    sizes = [(32, 32), (48, 16), (16, 48), (32, 24)]
    pictures = make_picture_set(cut_out, alpha_mask=True, sizes=sizes, **augmentation)
    assert pictures.has_mask == [False, True, False, True]
    for index in (1, 3):
        with Image.open(cut_out / f"{index}.png") as image:
            as_mask = open_mask(data_of(image.getchannel("A")), image.size)
        for k in range(3):
            variation = pictures.variation(index, k)
            expected = apply_variation_to_mask(as_mask, variation, sizes[index], 4).astype(np.float16)
            assert (pictures.mask(index, k, 4) == expected).all()
            assert 0 < expected.min() < expected.max()


def test_a_flipped_picture_has_a_flipped_mask(cut_out):
    pictures = make_picture_set(cut_out, alpha_mask=True, center_crop=True, random_flip=True, resolution=32)
    first, second = pictures.mask(1, 0, 4), pictures.mask(1, 1, 4)
    assert first.dtype == np.float16
    assert (np.diff(first[1:].astype(float), axis=1) > 0).all()  # more opaque from left to right
    assert (first[:, ::-1] == second).all()
    values = np.linspace(40, 255, 40).round()[4:36].reshape(8, 4).mean(axis=1) / 255
    assert np.abs(first[1:] - values).max() < 1e-3
    assert np.abs(first[0] - (3 * values + 1) / 4).max() < 1e-3  # its first row of pixels is opaque
    assert (pictures.mask(0, 0, 4) == 1).all()


def test_without_the_flag_the_picture_counts_everywhere(cut_out):
    pictures = make_picture_set(cut_out)
    assert not pictures.masked
    assert (pictures.mask(1, 0, 4) == 1).all()
    assert [fact.transparency for fact in pictures.facts] == [OPAQUE, PARTLY, OPAQUE, PARTLY]


def test_the_flag_belongs_to_what_identifies_transparent_pictures(cut_out):
    whole, opaque = (make_picture_set(cut_out, alpha_mask=alpha_mask) for alpha_mask in (False, True))
    assert [a == b for a, b in zip(whole.content_ids, opaque.content_ids, strict=True)] == [True, False, True, False]
    assert whole.fingerprint() != opaque.fingerprint()
    assert whole.select([0, 2]).fingerprint() == opaque.select([0, 2]).fingerprint()
    assert opaque.for_validation().masked
    assert [whole.variation(1, k) for k in range(4)] == [opaque.variation(1, k) for k in range(4)]


# What can't be trained.


@pytest.mark.parametrize("masked", [False, True])
def test_a_picture_of_which_nothing_is_opaque_is_refused(train, cut_out, tmp_path, masked, capsys):
    """Also if an earlier run without the flag has examined it."""
    make_transparent(cut_out, (0,), first=0, last=0)
    with Image.open(cut_out / "0.png") as image:
        alpha = np.zeros((32, 40), dtype=np.uint8)
        if masked:  # what is opaque is not in the mask, and the other way round
            alpha[:, 20:] = 255
            mask = Image.new("L", (40, 32))
            mask.paste(200, (0, 0, 20, 32))
            mask.save(cut_out / "0.mask.png")
        image.putalpha(Image.fromarray(alpha))
    image.save(cut_out / "0.png")
    train(train_data_dir=cut_out, max_train_steps=1, output_dir=tmp_path / "before")
    where = "wherever its mask is white" if masked else "everywhere"
    reason = f"{cut_out}/metadata.jsonl:1: '0.png': it is transparent {where}, so that nothing of the picture would be trained"
    message = refusal_of(train, train_data_dir=cut_out, alpha_mask=True)
    assert message == f"{reason}. Fix it, or pass --skip_bad_images to leave it out."
    with pytest.raises(InputError, match=re.escape(reason)):
        train(train_data_dir=cut_out, alpha_mask=True, dry_run=True, output_dir=tmp_path / "dry")
    said = capsys.readouterr().out
    assert reason in said
    assert "\n2 of 3 pictures with a mask\n" in said


def test_how_transparent_a_picture_is_is_known_to_later_runs(cut_out, tmp_path):
    records = read_records(cut_out)
    first, _ = examine(records, range(4), tmp_path / "memo")
    lines = (tmp_path / "memo" / KNOWN_PICTURES).read_text().splitlines()
    assert [line[-2:] for line in lines] == [" 0", " 1", " 0", " 1"]
    again, _ = examine(records, range(4), tmp_path / "memo", alpha_mask=True)
    assert again == first
    wholly = "\n".join(line[:-1] + str(WHOLLY) for line in lines) + "\n"
    (tmp_path / "memo" / KNOWN_PICTURES).write_text(wholly)
    assert examine(records, range(4), tmp_path / "memo", alpha_mask=True)[1].keys() == {0, 1, 2, 3}
    assert not examine(records, range(4), tmp_path / "memo")[1]


# What is trained.


def test_the_colour_under_transparent_parts_is_not_learned(train, tmp_path):
    """The loss of a picture with a transparent half is that of a picture with a mask over that half, and not of the whole."""
    folders = {}
    for name in ("alpha", "mask", "neither"):
        folders[name] = write_pictures(tmp_path / name, count=3, size=(32, 32))
        with Image.open(folders[name] / "1.png") as image:
            half = Image.new("L", image.size, 255)
            half.paste(0, (0, 0, 16, 32))
            white = Image.composite(image, Image.new("RGB", image.size, "white"), half)
            image.putalpha(half)
        (image if name == "alpha" else white).save(folders[name] / "1.png")
    half.save(folders["mask"] / "1.mask.png")
    losses = {
        name: [
            row["train_loss"]
            for row in read_metrics(
                train(
                    train_data_dir=folder, alpha_mask=name == "alpha", output_dir=tmp_path / f"{name} out",
                    center_crop=True, resolution=32, train_batch_size=3, max_train_steps=2,
                )
            )
        ]
        for name, folder in folders.items()
    }  # fmt: skip
    assert losses["alpha"] == pytest.approx(losses["mask"], rel=1e-6)
    assert losses["alpha"] != pytest.approx(losses["neither"], rel=1e-3)


def test_a_picture_in_a_dataset_file_has_transparency_too(cut_out, tmp_path):
    """The flag needs no files beside the pictures."""
    import datasets

    files = [{"bytes": (cut_out / f"{i}.png").read_bytes(), "path": None} for i in range(4)]
    rows = {"image": files, "text": ["a", "b", "c", "d"]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    records = read_records(dataset_name=str(tmp_path / "set"))
    pictures = make_picture_set(records, alpha_mask=True)
    assert pictures.has_mask == [False, True, False, True]


def test_a_broken_picture_is_refused_as_before(train, cut_out):
    (cut_out / "1.png").write_bytes((cut_out / "1.png").read_bytes()[:90])
    with pytest.raises(InputError, match="it can't be decoded"):
        train(train_data_dir=cut_out, alpha_mask=True)

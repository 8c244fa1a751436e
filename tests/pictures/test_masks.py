"""Masks weight the loss, wherever they come from; they are cropped like their pictures."""

import io
import json

import numpy as np
import pytest
from conftest import make_picture_set, read_metrics, read_records, refusal_of, write_pictures
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures.masks import open_mask
from text_to_image_lora.pictures.records import read_image_bytes
from text_to_image_lora.pictures.transforms import Variation, apply_variation, apply_variation_to_mask


def half(size=(40, 32)):
    """Returns a mask that is white on the left half and black on the right half."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.mark.parametrize(
    "variation", [Variation(0, 0, False), Variation(8, 0, True), Variation(3, 2, False, share=0.8), Variation(2, 1, True, turn=30.0)]
)  # fmt: skip
def test_a_mask_is_cut_as_its_picture(variation):
    """Uses each picture as its own mask; after cropping they are still equal."""
    rng = np.random.default_rng(1)
    mask = Image.fromarray(rng.integers(0, 256, (4, 5), dtype=np.uint8)).resize((90, 70), Image.Resampling.BICUBIC)
    pixels = apply_variation(mask.convert("RGB"), variation, (32, 32), "bilinear")[..., 0]
    expected = pixels.reshape(8, 4, 8, 4).mean(axis=(1, 3)) / 255
    cut = apply_variation_to_mask(mask, variation, (32, 32), 4)
    assert cut.dtype == np.float32
    assert np.abs(cut - expected).max() < 1e-6


@pytest.fixture
def masked(tmp_path):
    folder = write_pictures(tmp_path / "masked", count=4)
    half().save(folder / "1.mask.png")
    return folder


def test_a_mask_beside_its_picture(masked, said):
    dataset = read_records(masked)
    assert [row["mask"] is not None for row in dataset] == [False, True, False, False]
    assert len(dataset) == 4
    assert said == []  # a mask is not reported as a picture without a row
    pictures = make_picture_set(dataset, center_crop=True)
    assert (pictures.mask(0, 0, 4) == 1).all()
    mask = pictures.mask(1, 0, 4)
    assert (mask[:, :4] == 1).all()
    assert (mask[:, 4:] == 0).all()
    # Caption files behave equally.
    for i in range(4):
        (masked / f"{i}.txt").write_text("a cat")
    (masked / "metadata.jsonl").unlink()
    assert [row["mask"] is not None for row in read_records(masked)] == [False, True, False, False]


def test_a_column_of_masks(tmp_path):
    folder = write_pictures(tmp_path / "set", count=2)
    half().save(folder / "left.png")
    rows = [
        {"file_name": "0.png", "text": "a", "where": "left.png"},
        {"file_name": "1.png", "text": "b", "where": None},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = read_records(folder, mask_column="where")
    assert read_image_bytes(dataset[0]["mask"]) == (folder / "left.png").read_bytes()
    assert dataset[1]["mask"] is None
    assert dataset["captions"][:] == [["a"], ["b"]]
    with pytest.raises(InputError, match="no column 'were' \\(--mask_column\\)"):
        read_records(folder, mask_column="were")
    rows[1]["where"] = "../left.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        InputError, match=r"metadata.jsonl:2: its mask '../left.png' does not exist in the dataset folder"
    ):
        read_records(folder, mask_column="where")


def test_a_broken_mask_is_reported(train, masked):
    (masked / "1.mask.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1\.png'?: its mask: it can't be decoded"):
        train(train_data_dir=masked)


@pytest.mark.parametrize("layout", ["metadata", "caption_files"])
def test_a_mask_without_a_picture_is_reported(masked, layout, said):
    for name in ("11.mask.png", "one.mask.png"):  # typos of 1.mask.png
        half().save(masked / name)
    if layout == "caption_files":
        for i in range(4):
            (masked / f"{i}.txt").write_text("a cat")
        (masked / "metadata.jsonl").unlink()
    dataset = read_records(masked)
    assert [row["mask"] is not None for row in dataset] == [False, True, False, False]
    assert said == [f"{masked}: 2 masks match no picture by their names; the first: 11.mask.png"]


def erased(mode):
    """Returns the mask of `half` as an editor may save it: white everywhere, with its right half transparent."""
    if mode == "P":
        mask = Image.new("P", (40, 32), 0)
        mask.putpalette([255, 255, 255] * 2)
        mask.paste(1, (20, 0, 40, 32))
        return mask, {"transparency": 1}
    mask = Image.new(mode, (40, 32), "white")
    mask.putalpha(half())
    return mask, {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_in_a_mask_does_not_count(tmp_path, mode):
    mask, options = erased(mode)
    mask.save(tmp_path / "mask.png", **options)
    with Image.open(tmp_path / "mask.png") as stored:
        assert stored.mode == mode
    cut = apply_variation_to_mask(
        open_mask((tmp_path / "mask.png").read_bytes(), (40, 32)), Variation(4, 0, False), (32, 32), 4
    )
    assert (cut[:, :4] == 1).all()
    assert (cut[:, 4:] == 0).all()


def test_what_is_half_transparent_in_a_mask_counts_half(tmp_path):
    Image.new("LA", (40, 32), (255, 128)).save(tmp_path / "mask.png")
    mask = open_mask((tmp_path / "mask.png").read_bytes(), (40, 32))
    assert mask.getextrema() == (128, 128)


# Class pictures.


def test_masks_weight_what_is_learned(train, masked, tmp_path):
    """Also from the cache, which does not return the latents of a previous mask."""

    def losses(name, **options):
        out = train(train_data_dir=masked, center_crop=True, output_dir=tmp_path / name, **options)
        # Two steps, which train on each of the four pictures once.
        return [row["train_loss"] for row in read_metrics(out)]

    cached = losses("cached")
    assert losses("live", cache_variations=0) == pytest.approx(cached, rel=1e-4)
    half().rotate(180).save(masked / "1.mask.png")
    turned = losses("turned")
    (masked / "1.mask.png").unlink()
    without = losses("without")
    for a, b in ((cached, turned), (cached, without), (turned, without)):
        assert a != pytest.approx(b, rel=1e-4)


def test_an_empty_mask_is_reported_or_left_out_with_its_picture(train, masked, capsys):
    """Also if the picture was examined without the mask: the list of known pictures is keyed by content."""
    (masked / "1.mask.png").unlink()
    train(train_data_dir=masked, max_train_steps=1, output_dir=masked.parent / "before")
    (masked / "1.mask.png").write_bytes(b"")
    reason = f"{masked}/metadata.jsonl:2: '1.png': its mask: the file is empty"
    message = refusal_of(train, train_data_dir=masked)
    assert message == f"{reason}. Fix it, or pass --skip_bad_images to leave it out."
    train(train_data_dir=masked, skip_bad_images=True)
    out = capsys.readouterr().out
    assert f"left out: {reason}\n" in out
    assert "\n3 pictures, " in out


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((32, 40), "upright as its EXIF data says"),
        ((40, 20), "another shape"),
        ((200, 50), "another shape"),
        ((40, 40), ""),
    ],
)
def test_a_mask_of_another_shape_is_refused(train, masked, size, words):
    """It would be stretched over the picture, and weight other places."""
    half(size).save(masked / "1.mask.png")
    message = refusal_of(train, train_data_dir=masked)
    assert f"its mask has {size[0]}x{size[1]} pixels, which is another shape than the 40x32 of the picture" in message
    assert words in message


@pytest.mark.parametrize("size", [(20, 16), (80, 64), (1024, 819), (13, 10)])
def test_a_mask_of_another_size_may_be_rounded(size):
    data = io.BytesIO()
    half(size).save(data, "PNG")
    assert open_mask(data.getvalue(), (40, 32)).size == (40, 32)


@pytest.mark.parametrize(
    "mask", [Image.new("L", (40, 32)), Image.new("1", (20, 16)), Image.new("RGBA", (40, 32), "#ffffff00")]
)
def test_a_mask_that_is_black_everywhere_is_refused(train, masked, mask):
    mask.save(masked / "1.mask.png")
    assert "its mask is black everywhere" in refusal_of(train, train_data_dir=masked)

"""Pictures are looked at once: the bad ones are told, those that are the same or look alike are found."""

import os

import numpy as np
import pytest
from conftest import write_pictures
from PIL import Image

from text_to_image_lora.pictures import Picture, alike_pictures, difference_hash, examine
from text_to_image_lora.records import image_id, load_records


def inspect(dataset, folder):
    good, bad = examine(dataset, range(len(dataset)), folder)
    assert not bad
    return [good[index] for index in range(len(dataset))]


def test_pictures_are_measured_and_the_bad_ones_told(tmp_path):
    folder = write_pictures(tmp_path / "set")
    Image.new("RGB", (7, 9)).save(folder / "1.png")
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_text("words")
    (folder / "4.png").write_bytes((folder / "0.png").read_bytes()[:200])
    dataset = load_records(train_data_dir=folder)
    (folder / "5.png").unlink()
    for _ in range(2):  # what is bad stays bad
        good, bad = examine(dataset, range(6), tmp_path / "memo")
        assert good == {
            i: (image_id((folder / f"{i}.png").read_bytes()), *size, good[i].hash)
            for i, size in enumerate([(40, 32), (7, 9)])
        }
        assert bad.keys() == {2, 3, 4, 5}
        assert "empty" in bad[2]
        assert "not a picture" in bad[3]
        assert "decoded" in bad[4]
        assert "No such file" in bad[5]
    assert examine(dataset, [1], tmp_path / "memo")[0].keys() == {1}


def test_a_row_without_picture_is_told(tmp_path):
    import datasets

    dataset = datasets.Dataset.from_dict(
        {"image": [None]}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    assert examine(dataset, [0], tmp_path) == ({}, {0: "there is no picture"})


def test_a_picture_seen_before_is_not_decoded_again(pictures, tmp_path):
    dataset = load_records(train_data_dir=pictures)
    first = inspect(dataset, tmp_path)
    memo = tmp_path / "pictures.txt"
    assert len(memo.read_text().splitlines()) == 6
    memo.write_text(memo.read_text().replace(f"{first[2].image_id} 40 32", f"{first[2].image_id} 61 49"))
    assert inspect(dataset, tmp_path)[2] == first[2]._replace(width=61, height=49)
    assert len(memo.read_text().splitlines()) == 6


@pytest.mark.parametrize("lost", range(1, 12))
def test_a_torn_memo_gives_no_wrong_sizes(pictures, tmp_path, lost):
    """A run that was killed while it wrote leaves half a line."""
    dataset = load_records(train_data_dir=pictures)
    first = inspect(dataset, tmp_path)
    memo = tmp_path / "pictures.txt"
    memo.write_bytes(memo.read_bytes()[:-lost])
    for _ in range(3):
        assert inspect(dataset, tmp_path) == first
    memo.write_bytes(b"\xff\x00 12 13\n" + os.urandom(100))
    assert inspect(dataset, tmp_path) == first


def test_alike_is_the_same_picture_and_not_another():
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
        for _ in range(40)
    ]
    found = []
    for i, picture in enumerate(pictures):
        found.append(Picture(f"{i}", 96, 96, difference_hash(picture)))
    for i, picture in enumerate(pictures):
        smaller = picture.resize((50, 50))
        found.append(Picture(f"{40 + i}", 50, 50, difference_hash(smaller)))
    assert alike_pictures(found) == [[i, 40 + i] for i in range(40)]

"""Pictures are examined once: they are measured, and bad pictures are reported."""

import os
from types import SimpleNamespace

import pytest
from conftest import read_records, refusal_of, write_pictures
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures import examine as examine_module
from text_to_image_lora.pictures.examine import KNOWN_PICTURES, examine, select_usable, usable_pictures
from text_to_image_lora.pictures.masks import OPAQUE
from text_to_image_lora.pictures.records import image_id


def inspect(records, folder):
    good, bad = examine(records, range(len(records)), folder)
    assert not bad
    return [good[index] for index in range(len(records))]


def test_pictures_are_measured_and_bad_pictures_are_reported(tmp_path):
    folder = write_pictures(tmp_path / "set")
    Image.new("RGB", (7, 9)).save(folder / "1.png")
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_text("words")
    (folder / "4.png").write_bytes((folder / "0.png").read_bytes()[:200])
    dataset = read_records(folder)
    (folder / "5.png").unlink()
    for _ in range(2):  # the second time, bad pictures are reported again
        good, bad = examine(dataset, range(6), tmp_path / "memo")
        assert good == {
            i: (image_id((folder / f"{i}.png").read_bytes()), *size, good[i].hash, OPAQUE)
            for i, size in enumerate([(40, 32), (7, 9)])
        }
        assert bad.keys() == {2, 3, 4, 5}
        assert "empty" in bad[2]
        assert "not a picture" in bad[3]
        assert "decoded" in bad[4]
        assert "No such file" in bad[5]
    assert examine(dataset, [1], tmp_path / "memo")[0].keys() == {1}


def test_a_row_without_picture_is_reported(tmp_path):
    import datasets

    dataset = datasets.Dataset.from_dict(
        {"image": [None]}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    assert examine(dataset, [0], tmp_path) == ({}, {0: "there is no picture"})


def test_a_picture_seen_before_is_not_decoded_again(pictures, tmp_path):
    dataset = read_records(pictures)
    first = inspect(dataset, tmp_path)
    memo = tmp_path / KNOWN_PICTURES
    assert len(memo.read_text().splitlines()) == 6
    memo.write_text(memo.read_text().replace(f"{first[2].image_id} 40 32", f"{first[2].image_id} 61 49"))
    assert inspect(dataset, tmp_path)[2] == first[2]._replace(width=61, height=49)
    assert len(memo.read_text().splitlines()) == 6


def test_a_list_of_another_version_is_not_believed(pictures, tmp_path, monkeypatch):
    """Another version may examine pictures differently; lists of the first version had no version number."""
    dataset = read_records(pictures)
    first = inspect(dataset, tmp_path)
    lies = (tmp_path / KNOWN_PICTURES).read_text().replace(" 40 32 ", " 61 49 ")
    assert lies.count(" 61 49 ") == 6
    (tmp_path / KNOWN_PICTURES).unlink()
    (tmp_path / "pictures.txt").write_text(lies)
    assert inspect(dataset, tmp_path) == first
    (tmp_path / KNOWN_PICTURES).write_text(lies)
    monkeypatch.setattr(examine_module, "KNOWN_PICTURES", "pictures-4.txt")
    assert inspect(dataset, tmp_path) == first
    assert (tmp_path / "pictures-3.txt").exists()


@pytest.mark.parametrize("lost", range(1, 12))
def test_a_torn_memo_gives_no_wrong_sizes(pictures, tmp_path, lost):
    """A run that was killed while it wrote the list leaves an incomplete line."""
    dataset = read_records(pictures)
    first = inspect(dataset, tmp_path)
    memo = tmp_path / KNOWN_PICTURES
    memo.write_bytes(memo.read_bytes()[:-lost])
    for _ in range(3):
        assert inspect(dataset, tmp_path) == first
    memo.write_bytes(b"\xff\x00 12 13\n" + os.urandom(100))
    assert inspect(dataset, tmp_path) == first


def test_without_a_folder_nothing_is_kept(pictures):
    records = read_records(pictures)
    before = sorted(pictures.parent.rglob("*"))
    assert inspect(records, None) == inspect(records, None)
    assert sorted(pictures.parent.rglob("*")) == before


def test_a_mask_belongs_to_the_picture(pictures, tmp_path):
    """A picture with another mask is examined again; an unreadable mask is reported as a mask."""
    plain = inspect(read_records(pictures), tmp_path / "memo")
    Image.new("L", (40, 32), 255).save(pictures / "1.mask.png")
    masked = inspect(read_records(pictures), tmp_path / "memo")
    assert [a == b for a, b in zip(plain, masked, strict=True)] == [True, False, True, True, True, True]
    assert masked[1] == plain[1]._replace(image_id=masked[1].image_id)
    for data, reason in ((b"no picture", "its mask: it can't be decoded"), (b"", "its mask: the file is empty")):
        (pictures / "1.mask.png").write_bytes(data)
        _, bad = examine(read_records(pictures), range(6), tmp_path / "memo")
        assert list(bad) == [1]
        assert bad[1].startswith(reason)


@pytest.fixture
def usable(tmp_path):
    from accelerate.state import PartialState

    def usable(records, *, skip_bad_images):
        return usable_pictures(
            records, tmp_path / "memo", skip_bad_images=skip_bad_images,
            accelerator=SimpleNamespace(process_index=0, num_processes=1),
        )  # fmt: skip

    yield usable
    PartialState._reset_state()


def test_bad_pictures_are_refused_or_left_out(pictures, usable, said):
    (pictures / "1.png").write_bytes(b"")
    (pictures / "4.png").write_text("words")
    records = read_records(pictures)
    message = refusal_of(usable, records, skip_bad_images=False)
    assert message == (
        f"{pictures}/metadata.jsonl:2: '1.png': the file is empty (2 unusable pictures in total). Fix it, or pass "
        "--skip_bad_images to leave it out."
    )
    kept, facts = usable(records, skip_bad_images=True)
    assert kept["source"][:] == [records["source"][index] for index in (0, 2, 3, 5)]
    assert facts == inspect(kept, None)
    assert [line.partition("'")[0] for line in said] == [
        f"left out: {pictures}/metadata.jsonl:{line}: " for line in (2, 5)
    ]


def test_not_one_picture_that_can_be_used(pictures):
    with pytest.raises(InputError, match="0.png': broken. None of the pictures can be used"):
        select_usable(read_records(pictures), {}, dict.fromkeys(range(6), "broken"))

"""Equal and similar pictures are found, and are never divided between training and validation."""

import json
import shutil

import numpy as np
import pytest
from conftest import make_picture_set, read_records, write_pictures
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures.alike import alike_pictures, divide, equal_pictures, group_alike, hold_out, pick_probe
from text_to_image_lora.pictures.examine import Picture, difference_hash, examine
from text_to_image_lora.pictures.records import with_class_pictures


def random_pictures(count, rng):
    return [Picture(rng.bytes(16).hex(), 9, 9, int.from_bytes(rng.bytes(16))) for _ in range(count)]


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


def test_equal_is_the_same_file():
    a, b, c = random_pictures(3, np.random.default_rng(0))
    others = [a, b._replace(hash=a.hash), c, a, c, a]
    assert equal_pictures(others) == [[0, 3, 5], [2, 4]]
    assert alike_pictures(others) == [[0, 1]]  # a copy of a file is not another picture
    assert group_alike(others) == [0, 0, 2, 0, 2, 0]


# A division.


@pytest.fixture
def divided(tmp_path):
    """A set with copies, smaller copies and recompressed copies, divided into pictures for training and for validation."""
    folder = write_pictures(tmp_path / "3_axe", count=12, size=(64, 64))
    (folder / "metadata.jsonl").unlink()
    for i in range(4):
        shutil.copy(folder / f"{i}.png", folder / f"copy{i}.png")
        Image.open(folder / f"{i + 4}.png").resize((48, 48)).save(folder / f"small{i}.jpg", quality=80)
    pictures = make_picture_set(read_records(folder))
    assert len(set(group_alike(pictures.facts))) == 12
    return divide(pictures, None, 0.3)


def test_what_looks_alike_is_never_on_both_sides(divided):
    """No picture with the content of a held-out picture is trained on."""
    kept, held_out = divided
    assert 4 <= len(held_out) <= 6
    assert len(kept) + len(held_out) == 20
    groups = group_alike([*kept.facts, *held_out.facts])
    assert not set(groups[: len(kept)]) & set(groups[len(kept) :])
    assert set(kept.records["num_repeats"]) == {3}
    for part in divided:
        looked_at, _ = examine(part.records, range(len(part)))
        assert [looked_at[index] for index in range(len(part))] == part.facts
        assert part.captions == part.records["captions"][:]


def test_the_split_is_the_pictures_own():
    """The split depends only on content, not on the order, and one more picture moves few others."""
    rng = np.random.default_rng(0)
    images = random_pictures(100, rng)
    chosen = {images[i].image_id for i in hold_out(images, 0.1)}
    assert len(chosen) == 10
    assert {images[::-1][i].image_id for i in hold_out(images[::-1], 0.1)} == chosen
    more = [*images, *random_pictures(10, rng)]
    assert len({more[i].image_id for i in hold_out(more, 0.1)} & chosen) >= 8
    assert len(hold_out(images[:3], 0.01)) == 1
    assert hold_out(images[:1] * 5, 0.2) == []
    # A large group of similar pictures would be too large a share, so other pictures are held out.
    crowd = [image._replace(hash=images[0].hash) for image in images[:60]] + images[60:]
    assert all(index >= 60 for index in hold_out(crowd, 0.1))


@pytest.fixture
def others(tmp_path):
    return write_pictures(tmp_path / "others", count=3, seed=9)


def with_class(pictures, class_pictures):
    return make_picture_set(with_class_pictures(read_records(pictures), read_records(class_pictures)))


def test_what_is_in_the_validation_folder_is_not_trained_on(pictures, others, said):
    shutil.copy(pictures / "2.png", others / "same.png")
    Image.open(pictures / "4.png").resize((80, 64)).save(others / "larger.png")
    with open(others / "metadata.jsonl", "a") as file:
        for name in ("same.png", "larger.png"):
            file.write(json.dumps({"file_name": name, "text": "x"}) + "\n")
    whole, validated = make_picture_set(pictures), make_picture_set(others)
    kept, held_out = divide(whole, validated, 0.0)
    assert kept.facts == [whole.facts[index] for index in (0, 1, 3, 5)]
    assert held_out is validated
    assert said == [
        "2 pictures are not trained on, because they look like a validation picture",
        "only 5 validation pictures: the validation loss is a rough estimate (use 10 or more)",
    ]


def test_a_validation_folder_with_training_pictures_is_reported(pictures):
    pictures = make_picture_set(pictures)
    with pytest.raises(
        InputError, match="All training pictures look like validation pictures. Put different pictures"
    ):
        divide(pictures, pictures, 0.0)


def test_class_pictures_are_not_validated_on(pictures, tmp_path, said):
    both = with_class(pictures, write_pictures(tmp_path / "class", count=6, seed=5))
    kept, held_out = divide(both, None, 0.34)
    assert len(held_out) == 2
    assert held_out.is_class == [False] * 2
    assert sorted(kept.is_class) == [False] * 4 + [True] * 6
    assert [line.partition(":")[0] for line in said] == ["only 2 validation pictures"]


def test_class_pictures_alone_are_nothing_to_train_on(pictures, tmp_path):
    both = with_class(pictures, write_pictures(tmp_path / "class", count=3, seed=5))
    with pytest.raises(InputError, match="All training pictures look like validation pictures"):
        divide(both, make_picture_set(pictures), 0.0)


def test_copies_alone_cannot_be_divided(tmp_path):
    pictures = make_picture_set(write_pictures(tmp_path / "one", count=1)).select([0] * 4)
    with pytest.raises(InputError, match="4 pictures can't be split"):
        divide(pictures, None, 0.25)


def test_a_dry_run_divides_too(train, tmp_path, capsys):
    train(dry_run=True, validation_split=0.34)
    assert "4 pictures, 4 captions (4 different); 2 more for validation" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["validated"] == 2


def test_the_probe_is_of_ones_own_pictures(pictures, tmp_path):
    both = with_class(pictures, write_pictures(tmp_path / "class", count=30, seed=5))
    probe = pick_probe(both, 6, seed=0)
    assert probe.is_class == [False] * 6
    assert probe.facts == both.facts[:6]
    some = [pick_probe(both, 3, seed=seed) for seed in (0, 0, 1)]
    assert some[0].facts == some[1].facts != some[2].facts
    assert len(set(some[0].facts)) == 3


def test_the_probe_has_each_picture_once_at_its_largest_size(pictures, tmp_path):
    """It is the probe that pictures of one size have."""
    both = with_class(pictures, write_pictures(tmp_path / "class", count=30, seed=5))
    entries = both.at_sizes([[(32, 32), (24, 24), (16, 16)]] * 36)
    probe = pick_probe(entries, 4, seed=1)
    assert probe.sizes == [(32, 32)] * 4
    assert probe.facts == pick_probe(both, 4, seed=1).facts

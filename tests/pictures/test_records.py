"""Records: changed captions, class pictures, and the identities by which caches and checkpoints are found."""

import time

import pytest
from conftest import read_lora, read_metrics, read_records, write_pictures

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures.records import (
    fingerprint,
    image_id,
    in_threads,
    read_image_bytes,
    read_mask_bytes,
    with_captions,
    with_class_pictures,
)


def test_other_captions_change_nothing_else(pictures):
    records = read_records(pictures)
    others = [[f"a cat {i}", "a cat"] for i in range(len(records))]
    changed = with_captions(records, others)
    assert changed["captions"][:] == others
    assert sorted(changed.column_names) == sorted(records.column_names)
    for name in set(records.column_names) - {"captions"}:
        assert changed[name][:] == records[name][:]
    # The user's files are read-only.
    assert sorted(path.name for path in pictures.iterdir()) == [*(f"{i}.png" for i in range(6)), "metadata.jsonl"]


def test_class_pictures_do_not_take_the_trigger(pictures, tmp_path):
    dogs = read_records(write_pictures(tmp_path / "dogs", count=3, seed=5, captions=["a dog"]))
    records = with_class_pictures(read_records(pictures, trigger_word="sks"), dogs)
    assert records["is_class"][:] == [False] * 6 + [True] * 3
    assert all(group[0].startswith("sks, ") for group in records["captions"][:6])
    assert records["captions"][6:] == [["a dog"]] * 3
    assert records["source"][6:] == dogs["source"][:]
    assert [read_image_bytes(row["image"]) for row in records][6:] == [read_image_bytes(row["image"]) for row in dogs]


def test_prior_preservation_trains(train, tmp_path, capsys):
    dogs = write_pictures(tmp_path / "dogs", count=3, seed=5)
    (dogs / "metadata.jsonl").unlink()
    folder = train(class_data_dir=dogs, class_prompt="a dog", prior_loss_weight=0.5, trigger_word="sks")
    assert "9 pictures, 6 steps an epoch" in capsys.readouterr().out
    assert len(read_metrics(folder)) == 2
    with pytest.raises(InputError, match="the pictures have no captions"):
        train(class_data_dir=dogs)
    with pytest.raises(
        InputError,
        match="--class_prompt describes class pictures: add --num_class_images, such as 100, or --class_data_dir",
    ):
        train(class_prompt="a dog")


def test_a_run_leaves_the_class_pictures_captions_alone(train, tmp_path):
    """A trigger word is added to the captions of the user's own pictures, and not to those of class pictures."""
    plain, by_hand = (
        write_pictures(tmp_path / text, count=2, captions=[text]) for text in ("a cat", "my sks, a cat, old")
    )
    dogs = write_pictures(tmp_path / "dogs", count=2, seed=5, captions=["a dog"])
    options = dict(class_data_dir=dogs, class_prompt="a dog")

    def captions():
        return sorted(path.name for path in (tmp_path / "cache" / "prompts").iterdir())

    written = train(train_data_dir=by_hand, output_dir=tmp_path / "by hand", **options)
    before = captions()
    with_trigger = train(
        train_data_dir=plain, trigger_word="sks", caption_prefix="my ", caption_suffix=", old", **options
    )
    assert captions() == before
    expected, weights = read_lora(written), read_lora(with_trigger)
    assert all((weights[name] == value).all() for name, value in expected.items())


def test_bytes_of_a_cell(tmp_path):
    (tmp_path / "0.png").write_bytes(b"a picture")
    in_a_file = {"bytes": None, "path": str(tmp_path / "0.png")}
    assert read_image_bytes(in_a_file) == read_mask_bytes(in_a_file) == b"a picture"
    assert read_image_bytes({"bytes": b"inside", "path": "0.png"}) == b"inside"
    assert read_mask_bytes(None) is None
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(OSError, match="there is no picture"):
            read_image_bytes(nothing)


def test_identity_of_pictures_and_of_the_set():
    red, blue = image_id(b"red"), image_id(b"blue")
    assert red == image_id(b"red") != blue
    assert len({red, image_id(b"red", b"mask"), image_id(b"red", b"other"), image_id(b"redmask")}) == 4
    sets = [
        ([red, blue], [["a"], ["b"]]), ([blue, red], [["a"], ["b"]]), ([red, blue], [["b"], ["a"]]),
        ([red, blue], [["a", "b"], ["b"]]), ([red], [["a"]]), ([red, blue], [["a"], ["c"]]),
        ([red, blue], [["a"], ["b"]], [0, 1]), ([red, blue], [["a"], ["b"]], [0, 1, 1]),
    ]  # fmt: skip
    assert len({fingerprint(*one) for one in sets}) == len(sets)
    assert fingerprint(*sets[0]) == fingerprint(*sets[0])


def test_threads_keep_the_order():
    assert list(in_threads(lambda number: 2 * number, range(2500))) == list(range(0, 5000, 2))


def test_threads_run_no_further_ahead_than_they_may():
    begun = []
    results = in_threads(lambda number: begun.append(number) or number, range(100), ahead=3)
    assert [next(results), next(results)] == [0, 1]
    time.sleep(0.1)
    assert len(begun) <= 5
    results.close()
    assert len(begun) <= 5

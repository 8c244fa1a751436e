"""--check_captions: training pictures whose captions may be wrong are found after the training."""

import json
import re
import signal

import numpy as np
import pytest
from conftest import (
    ROOT,
    TORCHRUN,
    assert_same_weights,
    read_metrics,
    refusal_of,
    run_command,
    write_pictures,
)
from PIL import Image

from text_to_image_lora.errors import Stopped
from text_to_image_lora.reports import caption_check, report_page
from text_to_image_lora.reports.read_about import CAPTION_CHECK
from text_to_image_lora.reports.validation_loss import LossMeter, ValidationSet
from text_to_image_lora.training.checkpoint import read_state


MANY = [f"a {colour} {kind}" for colour in ("red", "blue", "green") for kind in ("axe", "spear", "whip", "bow")]


def found_in(folder):
    return json.loads((folder / CAPTION_CHECK).read_text())


@pytest.fixture
def many(tmp_path):
    """21 pictures of two shapes with 12 captions."""
    folder = write_pictures(tmp_path / "many", count=21, captions=MANY)
    with Image.open(folder / "4.png") as image:
        image.resize((30, 50)).save(folder / "4.png")
    return folder


# Which captions are compared, and what follows from the losses.


def test_other_captions_are_never_a_pictures_own_and_do_not_depend_on_the_order():
    captions = ["a", "b", "b", "c", "a b", "d", "a"]
    keys = [f"key {number}" for number in range(7)]
    chosen = caption_check.choose_others(captions, keys, count=3)
    for own, others in zip(captions, chosen, strict=True):
        assert own not in others
        assert len(others) == len({*others}) == 3
    assert len({tuple(sorted(others)) for others in chosen}) > 1
    turned = caption_check.choose_others(captions[::-1], keys[::-1], count=3)
    assert turned == chosen[::-1]
    assert caption_check.choose_others(["a", "a", "b"], keys[:3], count=8) == [["b"], ["b"], ["a"]]


def test_gains_are_compared_with_those_of_the_other_pictures():
    """The losses of the pictures are of very different sizes, which does not matter."""
    rng = np.random.default_rng(3)
    size = np.array([0.01, 3.0, 0.2, 0.5, 0.04])[:, None]
    others = size[:, None] * rng.uniform(0.9, 1.1, (5, 4, 3))
    own = others.mean(1) * np.array([0.7, 0.8, 0.75, 1.2, 0.72])[:, None]
    judged = caption_check.judge(own, others)
    assert [each.gain for each in judged] == pytest.approx([0.3, 0.2, 0.25, -0.2, 0.28])
    spread = 1.4826 * 0.05  # of the distances 0.05, 0.05, 0, 0.45, 0.03 from the median
    assert [each.deviation for each in judged] == pytest.approx(
        [0.05 / spread, -0.05 / spread, 0, -0.45 / spread, 0.03 / spread]
    )
    assert [each.better for each in judged] == [0, 0, 0, 4, 0]


def test_equal_gains_are_no_reason_for_doubt():
    others = np.ones((3, 2, 2))
    assert [each.deviation for each in caption_check.judge(others[:, 0] / 2, others)] == [0, 0, 0]


def test_other_captions_are_measured_as_if_they_were_the_pictures_own(train, many, monkeypatch):
    """Each with equal noise: a picture that got another caption would have exactly these losses."""
    seen = []
    original = LossMeter.with_captions

    def look(meter, validation_set, captions):
        table = original(meter, validation_set, captions)
        for k in range(len(captions[0])):
            swapped = [[group[k]] for group in captions]
            pictures = validation_set.pictures.select(range(len(swapped)))
            pictures.captions = swapped
            seen.append((table[:, k], meter(ValidationSet(pictures, validation_set.latents, validation_set.prompts))))
        seen.append((meter(validation_set), meter(validation_set)))
        return table

    monkeypatch.setattr(LossMeter, "with_captions", look)
    train(train_data_dir=many, check_captions=True, random_flip=True, resolution=[32, 24])
    assert len(seen) == caption_check.NUM_OTHERS + 1
    for table, expected in seen:
        assert (table == expected).all()
        assert table.shape == (21, 3)
    assert len({table.tobytes() for table, _ in seen}) == len(seen)


# In a run.


def test_swapped_captions_are_found(train_on_weapons, tmp_path, said):
    """Of 36 weapons, two pairs have each other's captions; the embedded base already knows what it sees."""
    folder = tmp_path / "weapons"
    folder.mkdir()
    rows = []
    for kind in ("axe", "spear", "whip"):
        place = ROOT / "metadata" / "weapons" / kind
        for row in map(json.loads, (place / "metadata.jsonl").read_text().splitlines()[:12]):
            name = f"{len(rows)}.png"
            with Image.open(place / row["file_name"]) as image:
                image.convert("RGB").save(folder / name)
            rows.append({"file_name": name, "text": row["text"]})
    swapped = {0: 12, 12: 0, 5: 30, 30: 5}
    texts = [rows[swapped.get(i, i)]["text"] for i in range(len(rows))]
    lines = [json.dumps(row | {"text": text}) for row, text in zip(rows, texts, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    out = train_on_weapons(
        tmp_path / "out", train_data_dir=folder, check_captions=True, max_train_steps=20, learning_rate=1e-3, rank=8
    )
    found = found_in(out)
    doubtful = {int(re.search(r"(\d+)\.png", row["source"])[1]) for row in found["first"]}
    assert len(doubtful & {*swapped}) >= 3
    assert len(doubtful - {*swapped}) <= 1
    assert found["step"] == 20
    assert found["count"] == len(doubtful)
    (line,) = [line for line in said if line.startswith("captions:")]
    assert f"{len(doubtful)} of 36 may be wrong" in line
    page = (out / "report.html").read_text()
    assert "Captions that may be wrong" in page
    for row in found["first"]:
        assert f"{row['better']} of 8 captions of other pictures fit it better" in page
        assert row["captions"][0] in page


@pytest.mark.parametrize(
    "flags",
    [
        dict(train_text_encoder=True),
        dict(shuffle_tags=True),
        dict(use_ema=True),
        dict(use_dora=True),
        dict(caption_dropout=0.2),
    ],
    ids=str,
)
def test_each_way_to_train(train, many, flags):
    found = found_in(train(train_data_dir=many, check_captions=True, **flags))
    assert (found["step"], found["pictures"], found["others"]) == (2, 21, 8)


def test_it_changes_nothing_else(train, many, tmp_path):
    one = train(train_data_dir=many, output_dir=tmp_path / "one")
    two = train(train_data_dir=many, output_dir=tmp_path / "two", check_captions=True)
    assert_same_weights(one, two)
    assert not (one / CAPTION_CHECK).exists()


def test_two_processes_equal_one(train, arguments, many, tmp_path):
    alone = found_in(train(train_data_dir=many, check_captions=True, output_dir=tmp_path / "alone"))
    words = arguments(train_data_dir=many, check_captions=True, output_dir=tmp_path / "both", train_batch_size=1)
    done = run_command(words, TORCHRUN, {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    both = found_in(tmp_path / "both")
    assert [row["source"] for row in both["first"]] == [row["source"] for row in alone["first"]]
    assert both["count"] == alone["count"]
    assert done.stdout.count("captions: ") == 1


def test_a_run_that_is_stopped_in_it_does_it_when_it_is_resumed(train, many, tmp_path, monkeypatch):
    flags = dict(train_data_dir=many, check_captions=True, checkpointing_steps=2)
    straight = found_in(train(**flags, output_dir=tmp_path / "straight"))
    original = LossMeter.with_captions

    def stop(*args):
        signal.raise_signal(signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LossMeter, "with_captions", stop)
        with pytest.raises(Stopped):
            train(**flags)
    out = tmp_path / "out"
    assert not (out / CAPTION_CHECK).exists()
    assert read_state(out / "checkpoint-2")[0].due == ["captions"]
    assert found_in(train(**flags)) == straight


def test_a_finished_run_can_be_checked_later(train, many, monkeypatch):
    train(train_data_dir=many)
    out = train(train_data_dir=many, check_captions=True)
    assert found_in(out)["step"] == 2
    assert read_metrics(out)[-1]["step"] == 2
    monkeypatch.setattr(caption_check, "judge", None)  # it is not done twice
    assert found_in(train(train_data_dir=many, check_captions=True))["step"] == 2


def test_a_result_is_not_kept_for_another_run(train, many):
    out = train(train_data_dir=many, check_captions=True)
    assert found_in(train(train_data_dir=many, max_train_steps=4))["step"] == 2, "the page says after which step"
    train(train_data_dir=many, resume_from_checkpoint="none", seed=1)
    assert not (out / CAPTION_CHECK).exists()


def test_it_is_done_when_each_picture_has_been_seen_three_times(train, many, tmp_path):
    """Also where the pictures of an epoch are repeated, or batches are larger."""
    (many / "metadata.jsonl").write_text(
        "".join(
            json.dumps(json.loads(line) | {"num_repeats": 2 + number % 2}) + "\n"
            for number, line in enumerate((many / "metadata.jsonl").read_text().splitlines())
        )
    )
    flags = dict(train_data_dir=many, check_captions=True, max_train_steps=20)
    out = train(**flags, train_batch_size=7, output_dir=tmp_path / "repeated")
    assert found_in(out)["step"] == 10, "52 samples of 21 pictures in 8 steps: 3 * 21 / 52 * 8 = 9.7"


@pytest.mark.parametrize(
    ("count", "captions", "reason"),
    [(19, MANY, "19 pictures are too few"), (21, ["a red axe"], "all pictures have one caption")],
)
def test_what_can_not_be_compared_is_said(train, tmp_path, said, count, captions, reason):
    folder = write_pictures(tmp_path / "some", count=count, captions=captions)
    out = train(train_data_dir=folder, check_captions=True)
    assert f"captions: not checked, because {reason}" in said
    assert not (out / CAPTION_CHECK).exists()


def test_pictures_have_to_be_in_the_cache(train):
    assert "leave out --cache_variations 0" in refusal_of(train, check_captions=True, cache_variations=0)


# On the page.


@pytest.mark.parametrize("change", [{"count": "two"}, {"step": None}, {"first": [{"source": 3}], "count": 1}])
def test_a_file_of_the_wrong_kind_is_refused_and_replaced_by_the_next_check(train, many, change):
    out = train(train_data_dir=many, check_captions=True)
    (out / CAPTION_CHECK).write_text(json.dumps(found_in(out) | change))
    assert CAPTION_CHECK in refusal_of(report_page.write_page, out)
    assert found_in(train(train_data_dir=many, check_captions=True))["step"] == 2


def test_a_page_without_doubtful_captions_says_so(train, many):
    out = train(train_data_dir=many, check_captions=True)
    (out / CAPTION_CHECK).write_text(json.dumps(found_in(out) | {"count": 0, "first": []}))
    assert "explained its picture about as well" in report_page.write_page(out).read_text()

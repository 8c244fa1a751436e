"""Captions with a trigger word, shuffled tags or caption dropout, which are equal with and without the cache."""

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_picture_set, read_metrics, read_records, refusal_of, write_pictures
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from text_to_image_lora.models.loading import find_base_model
from text_to_image_lora.pictures.captions import edit_caption, leave_out_phrase, tag_variations, vary_tags
from text_to_image_lora.pictures.settings import CaptionSettings
from text_to_image_lora.training.batches import Sample
from text_to_image_lora.training.data import Draws, TrainingSet


def test_edited_captions(tmp_path):
    captions = ["a red axe", "a blue axe, old", "écru spear 绿", 'a "long" spear']
    folder = write_pictures(tmp_path / "set", count=4, captions=captions)
    edited = read_records(folder, trigger_word="axe", caption_prefix="<", caption_suffix=">")["captions"][:]
    assert edited == [["<a red axe>"], ["<a blue axe, old>"], ["<axe, écru spear 绿>"], ['<axe, a "long" spear>']]


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("two axes", "axe", "axe, two axes"),  # the trigger is found only as a whole word
        ("(AXE), big", "axe", "(AXE), big"),
        ("c++ code", "c++", "c++ code"),
        ("a cat", None, "a cat"),
    ],
)
def test_a_trigger_is_put_in_front_where_it_is_missing(caption, trigger, expected):
    assert edit_caption(caption, CaptionSettings(trigger_word=trigger)) == expected


tags = st.lists(st.text("abc ", min_size=1, max_size=5).map(str.strip).filter(bool), min_size=1, max_size=6)


@given(tags, st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_shuffling_loses_no_tag_and_keeps_the_first(words, keep, seed):
    rules = CaptionSettings(shuffle_tags=True, keep_tags=keep)
    out = vary_tags(" ,  ".join(words) + ",", np.random.default_rng(seed), rules).split(", ")
    assert out[:keep] == words[:keep]
    assert Counter(out) == Counter(words)


def test_every_order_occurs():
    rules = CaptionSettings(shuffle_tags=True, keep_tags=1)
    orders = {vary_tags("sks, a, b, c", np.random.default_rng(seed), rules) for seed in range(200)}
    assert len(orders) == 6


@pytest.mark.parametrize("shuffles", [False, True])
def test_each_tag_is_left_out_by_chance_except_the_first(shuffles):
    """With 2 kept tags and a probability of 0.3, each of the other tags stays in 70% of the captions, independently."""
    rules = CaptionSettings(caption_tag_dropout=0.3, keep_tags=2, shuffle_tags=shuffles)
    captions = [vary_tags("sks, axe, a, b, c", np.random.default_rng(seed), rules) for seed in range(2000)]
    assert all(caption.startswith("sks, axe") for caption in captions)
    counts = Counter(tag for caption in captions for tag in caption.split(", "))
    assert counts["sks"] == counts["axe"] == 2000
    assert all(counts[tag] == pytest.approx(1400, abs=80) for tag in "abc")
    pairs = sum({"a", "b"} <= set(caption.split(", ")) for caption in captions)
    assert pairs == pytest.approx(980, abs=90)
    in_order = [caption for caption in captions if caption.split(", ")[2:] == sorted(caption.split(", ")[2:])]
    assert (len(in_order) == 2000) is not shuffles


def test_all_tags_can_be_left_out():
    assert vary_tags("a, b", np.random.default_rng(0), CaptionSettings(caption_tag_dropout=1.0)) == ""


def test_cached_orders_are_the_same_each_time_and_differ_by_caption():
    rules = CaptionSettings(shuffle_tags=True, tag_variations=8)
    first = tag_variations(["a, b, c, d"], rules)
    assert first == tag_variations(["a, b, c, d"], rules)
    assert len(first) == 8
    assert len(set(first)) >= 4

    def orders(caption):
        tags = caption.split(", ")
        return [[tags.index(tag) for tag in order.split(", ")] for order in tag_variations([caption], rules)]

    assert orders("a, b, c, d") != orders("e, f, g, h")
    assert tag_variations(["one tag"], rules) == ["one tag"] * 8
    assert all(order.startswith("a, b, ") for order in tag_variations(["a, b, c, d"], replace(rules, keep_tags=2)))
    # A caption without tags is drawn as often as one with many.
    many = tag_variations(["a sentence", "a, b"], replace(rules, tag_variations=30))
    assert many.count("a sentence") == 30


@pytest.fixture
def make_set(tiny_sd, tmp_path):
    """Returns a `TrainingSet` without a cache, of one picture with one caption."""
    pictures = make_picture_set(write_pictures(tmp_path / "set", count=1, captions=["sks, red, old, big"]))

    def make(**rules):
        return TrainingSet(pictures, find_base_model(str(tiny_sd)), Draws(0, 1000, CaptionSettings(**rules)))

    return make


def test_caption_dropout(make_set):
    plain, dropping = make_set(), make_set(caption_dropout=0.3)
    samples = [(plain[Sample(0, step, 0, 1.0)], dropping[Sample(0, step, 0, 1.0)]) for step in range(300)]
    dropped = [b["captions"] == "" for _, b in samples]
    assert 60 < sum(dropped) < 120
    assert all(b["captions"] == a["captions"] for (a, b), gone in zip(samples, dropped, strict=True) if not gone)
    # Caption dropout changes no other draw.
    assert all((a["noise"] == b["noise"]).all() and a["timesteps"] == b["timesteps"] for a, b in samples)
    assert all((a["pixels"] == b["pixels"]).all() for a, b in samples)


def test_tags_are_shuffled_anew_each_step_when_live(make_set):
    shuffling = make_set(shuffle_tags=True, keep_tags=1)
    drawn = Counter(shuffling[Sample(0, step, 0, 1.0)]["captions"] for step in range(120))
    assert len(drawn) == 6
    assert all(caption.startswith("sks, ") for caption in drawn)


def test_tags_left_out_are_drawn_from_the_cached_variations(train, pictures, tmp_path):
    """A run with --caption_tag_dropout trains on other captions than one without, and the file records the flag."""
    folder = write_pictures(tmp_path / "tags", count=2, captions=["sks, a, b, c", "sks, d, e, f"])

    def losses(name, **options):
        out = train(train_data_dir=folder, max_train_steps=3, center_crop=True, output_dir=tmp_path / name, **options)
        return [row["train_loss"] for row in read_metrics(out)]

    assert losses("dropped", caption_tag_dropout=0.5, keep_tags=1) != pytest.approx(losses("plain"), rel=1e-4)
    with safe_open(tmp_path / "dropped" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["ss_caption_tag_dropout_rate"] == "0.5"
    live = losses("live", caption_tag_dropout=0.9999, keep_tags=1, cache_variations=0)
    assert live == pytest.approx(losses("cached", caption_tag_dropout=0.9999, keep_tags=1), rel=1e-4)


def test_dropped_captions_are_the_same_cached_and_live(train, pictures):
    """Drops most captions, with one variation of each picture; the losses with the cache equal those without it."""

    def losses(name, **options):
        folder = train(max_train_steps=4, center_crop=True, output_dir=pictures.parent / name, **options)
        return [row["train_loss"] for row in read_metrics(folder)]

    cached = losses("cached", caption_dropout=0.9)
    assert cached == pytest.approx(losses("live", caption_dropout=0.9, cache_variations=0), rel=1e-4)
    assert cached != pytest.approx(losses("plain"), rel=1e-4)


def test_each_different_order_is_encoded_once(train, pictures, tmp_path):
    """`--tag_variations` orders of each caption are encoded and trained on."""
    folder = write_pictures(tmp_path / "tags", count=2, captions=["sks, a, b, c", "sks, d, e, f"])
    train(train_data_dir=folder, shuffle_tags=True, keep_tags=1, tag_variations=4, max_train_steps=3)
    shards = list((tmp_path / "cache" / "prompts").glob("*.safetensors"))
    with safe_open(shards[0], "pt") as file:
        counts = [file.get_slice(name).get_shape()[0] for name in sorted(file.keys())]
    rules = CaptionSettings(shuffle_tags=True, keep_tags=1, tag_variations=4)
    expected = sum(len(set(tag_variations([c], rules))) for c in ("sks, a, b, c", "sks, d, e, f"))
    assert len(shards) == 1
    assert counts == [expected]
    assert expected > 4


# Long prompts.


LONG = "a red axe on a blue background, " * 20


def test_long_prompts_train_and_validate(train, tmp_path, capsys):
    """Complete and truncated captions train differently; the cache changes nothing."""
    folder = write_pictures(tmp_path / "long", captions=[LONG, "a cat"])

    def losses(name, **options):
        out = train(train_data_dir=folder, center_crop=True, output_dir=tmp_path / name, **options)
        return [row["train_loss"] for row in read_metrics(out)]

    whole = losses("whole", long_prompts=True, validation_prompt="an axe")
    assert "3 captions have more than 77 tokens; every prompt is encoded in" in capsys.readouterr().out
    assert list((tmp_path / "whole" / "validation").iterdir())
    assert losses("live", long_prompts=True, cache_variations=0) == pytest.approx(whole, rel=1e-4)
    capsys.readouterr()
    cut = losses("cut")
    assert "3 captions have more than 77 tokens and are truncated (--long_prompts reads them completely)" in (
        capsys.readouterr().out
    )
    assert cut != pytest.approx(whole, rel=1e-4)


def test_a_caption_that_is_longer_than_any_is_refused_by_name(train, tmp_path):
    """All prompts get as many chunks as the longest one, so a whole book as a caption would fill the memory."""
    folder = write_pictures(tmp_path / "book", count=2, captions=["a cat", "axe " * 751])
    message = refusal_of(train, train_data_dir=folder, long_prompts=True)
    assert message == (
        f"{folder}/metadata.jsonl:2: '1.png': its caption of 753 tokens would make every prompt 11 chunks long. Shorten "
        "it (the limit is 10 chunks), or remove --long_prompts."
    )
    assert not (tmp_path / "out").exists()
    write_pictures(folder, count=2, captions=["a cat", "axe " * 750])
    assert read_metrics(train(train_data_dir=folder, long_prompts=True))


@pytest.mark.parametrize("caption", ["a sks" + " " * 200_000 + "x", "sks" + " " * 200_000, ("sks" + " " * 1000) * 200])
def test_spaces_take_no_time(caption):
    started = time.monotonic()
    assert "sks" not in leave_out_phrase(caption, "sks")
    assert time.monotonic() - started < 5

"""What is done to captions: tags in another order, the empty caption, and the same in the cache and live."""

from collections import Counter

import numpy as np
import pytest
from conftest import read_metrics, write_pictures
from hypothesis import given
from hypothesis import strategies as st

from text_to_image_lora import prompts
from text_to_image_lora.captions import shuffle_tags, shuffled_variations
from text_to_image_lora.data import Sample, TrainingSet
from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures import Picture
from text_to_image_lora.records import load_records
from text_to_image_lora.transforms import Augmentation


tags = st.lists(st.text("abc ", min_size=1, max_size=5).map(str.strip).filter(bool), min_size=1, max_size=6)


@given(tags, st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_shuffling_loses_no_tag_and_keeps_the_first(words, keep, seed):
    out = shuffle_tags(" ,  ".join(words) + ",", np.random.default_rng(seed), keep).split(", ")
    assert out[:keep] == words[:keep]
    assert Counter(out) == Counter(words)


def test_every_order_occurs():
    orders = {shuffle_tags("sks, a, b, c", np.random.default_rng(seed), 1) for seed in range(200)}
    assert len(orders) == 6


def test_cached_orders_are_the_same_each_time_and_differ_by_caption():
    first = shuffled_variations(["a, b, c, d"], 8, seed=0)
    assert first == shuffled_variations(["a, b, c, d"], 8, seed=0)
    assert len(first) == 8
    assert len(set(first)) >= 4
    assert first != shuffled_variations(["a, b, c, d"], 8, seed=1)
    assert shuffled_variations(["one tag"], 8, seed=0) == ["one tag"] * 8
    # A caption without tags is drawn as often as one with many.
    assert shuffled_variations(["a sentence", "a, b"], 30, seed=0).count("a sentence") == 30


@pytest.fixture
def make_set(tmp_path):
    folder = write_pictures(tmp_path / "set", count=1, captions=["sks, red, old, big"])
    dataset = load_records(train_data_dir=folder)

    def make(**changes):
        return TrainingSet(
            dataset, [Picture("0" * 32, 40, 32)], [(32, 32)], dataset["captions"][:], latents=(None, None), prompts=(None, None),
            latent_shapes=[(4, 8, 8)], seed=0, num_train_timesteps=1000, interpolation="lanczos",
            augmentation=Augmentation(), **changes,
        )  # fmt: skip

    return make


def test_caption_dropout(make_set):
    plain, dropping = make_set(), make_set(caption_dropout=0.3)
    samples = [(plain[Sample(0, step, 0, 1.0)], dropping[Sample(0, step, 0, 1.0)]) for step in range(300)]
    dropped = [b["captions"] == "" for _, b in samples]
    assert 60 < sum(dropped) < 120
    assert all(b["captions"] == a["captions"] for (a, b), gone in zip(samples, dropped, strict=True) if not gone)
    # What is dropped changes no other draw.
    assert all((a["noise"] == b["noise"]).all() and a["timesteps"] == b["timesteps"] for a, b in samples)


def test_tags_are_shuffled_anew_each_step_when_live(make_set):
    shuffling = make_set(shuffle_tags=True, keep_tags=1)
    drawn = Counter(shuffling[Sample(0, step, 0, 1.0)]["captions"] for step in range(120))
    assert len(drawn) == 6
    assert all(caption.startswith("sks, ") for caption in drawn)


def test_dropped_captions_are_the_same_cached_and_live(train, pictures):
    """With most captions dropped, and one variation of each picture, the cache gives the losses of encoding live."""

    def losses(name, **options):
        folder = train(max_train_steps=4, center_crop=True, output_dir=pictures.parent / name, **options)
        return [row["train_loss"] for row in read_metrics(folder)]

    cached = losses("cached", caption_dropout=0.9)
    assert cached == pytest.approx(losses("live", caption_dropout=0.9, cache_variations=0), rel=1e-4)
    assert cached != pytest.approx(losses("plain"), rel=1e-4)


def test_each_different_order_is_encoded_once(train, pictures, tmp_path):
    """`--tag_variations` orders of each caption are encoded, and trained on."""
    from safetensors import safe_open

    folder = write_pictures(tmp_path / "tags", count=2, captions=["sks, a, b, c", "sks, d, e, f"])
    train(train_data_dir=folder, shuffle_tags=True, keep_tags=1, tag_variations=4, max_train_steps=3)
    shards = list((tmp_path / "cache" / "prompts").glob("*.safetensors"))
    with safe_open(shards[0], "pt") as file:
        count = file.get_slice("hidden_states").get_shape()[0]
    expected = sum(len(set(shuffled_variations([c], 4, 0, 1))) for c in ("sks, a, b, c", "sks, d, e, f"))
    assert len(shards) == 1
    assert count == expected > 4


# Long prompts.


@pytest.fixture(scope="module")
def text_models(tiny_sd):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd, subfolder="tokenizer")
    return tokenizer, CLIPTextModel.from_pretrained(tiny_sd, subfolder="text_encoder").eval()


LONG = "a red axe on a blue background, " * 20


def test_chunks_hold_every_token_of_a_long_caption(text_models):
    import torch

    tokenizer, text_encoder = text_models
    whole = tokenizer(LONG, add_special_tokens=False).input_ids
    num_chunks = prompts.chunks_needed(tokenizer, len(whole) + 2)
    assert num_chunks == -(-len(whole) // 75) > 1
    ids = prompts.tokenize(tokenizer, [LONG, "a cat"], num_chunks)
    assert ids.shape == (2 * num_chunks, 77)
    read = [i for row in ids[:num_chunks].tolist() for i in row[1 : row.index(tokenizer.eos_token_id)]]
    assert read == whole
    states = prompts.encode_prompts(tokenizer, text_encoder, [LONG, "a cat"], num_chunks=num_chunks)
    assert states.shape == (2, 77 * num_chunks, 96)
    # The first chunk is what is read without the flag, and the rest of a short caption is the empty caption.
    plain = prompts.encode_prompts(tokenizer, text_encoder, [LONG, "a cat", ""])
    torch.testing.assert_close(states[:, :77], plain[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[1, 77:154], plain[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "chunks"), [(2, 1), (77, 1), (78, 2), (152, 2), (153, 3)])
def test_how_many_chunks_a_caption_needs(text_models, count, chunks):
    assert prompts.chunks_needed(text_models[0], count) == chunks


@pytest.mark.parametrize("cache_variations", [4, 0])
def test_long_prompts_train_and_validate(train, tmp_path, capsys, cache_variations):
    folder = write_pictures(tmp_path / "long", captions=[LONG, "a cat"])
    options = dict(
        train_data_dir=folder, cache_variations=cache_variations, validation_prompt="an axe", max_train_steps=3
    )
    whole = read_metrics(train(long_prompts=True, output_dir=tmp_path / "whole", **options))
    assert "3 captions have more than 77 tokens; every prompt is encoded in" in capsys.readouterr().out
    cut = read_metrics(train(output_dir=tmp_path / "cut", **options))
    assert "3 captions have more than 77 tokens, and what follows is cut (--long_prompts reads them whole)" in (
        capsys.readouterr().out
    )
    assert [row["train_loss"] for row in whole] != [row["train_loss"] for row in cut]


def test_a_caption_that_is_longer_than_any_is_refused_by_name(train, tmp_path):
    """All prompts get as many chunks as the longest, so one that is a whole book would fill the memory."""
    folder = write_pictures(tmp_path / "book", count=2, captions=["a cat", "axe " * 751])
    with pytest.raises(InputError) as caught:
        train(train_data_dir=folder, long_prompts=True)
    assert str(caught.value) == (
        f"{folder}/metadata.jsonl:2: '1.png': its caption of 753 tokens would make every prompt 11 chunks long. Shorten "
        "it (10 chunks are the limit), or leave --long_prompts out."
    )
    assert not (tmp_path / "out").exists()
    write_pictures(folder, count=2, captions=["a cat", "axe " * 750])
    assert read_metrics(train(train_data_dir=folder, long_prompts=True))

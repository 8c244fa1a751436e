"""Captions become the conditions of diffusers' pipeline, completely even if they are long, and each has one identity."""

import json
import shutil

import pytest
import torch
from conftest import read_metrics, write_pictures
from diffusers import StableDiffusionPipeline

from text_to_image_lora.errors import InputError
from text_to_image_lora.models import loading, prompts
from text_to_image_lora.models.families import STABLE_DIFFUSION
from text_to_image_lora.models.prompts import PromptEncoder


CAPTIONS = ["a red axe", "", "a very long caption " * 30]


@pytest.fixture(scope="module")
def loaded(tiny_sd):
    """Returns the tokenizer and the text encoder of the tiny model."""
    components = loading.load_components(loading.find_base_model(str(tiny_sd)))
    return components.tokenizers[0], components.text_encoders[0]


def make_encoder(tokenizer, text_encoder, *, clip_skip=None, num_chunks=1, dtype=torch.float32, **options):
    return PromptEncoder(
        STABLE_DIFFUSION, (tokenizer,), (text_encoder,), clip_skip=clip_skip, num_chunks=num_chunks, dtype=dtype,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_prompts_are_encoded_as_in_the_pipeline(tiny_sd, loaded, clip_skip):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    wanted, _ = pipe.encode_prompt(CAPTIONS, "cpu", 1, False, clip_skip=clip_skip)
    given = prompts.encode_prompts(*loaded, CAPTIONS, clip_skip)
    assert given.shape == (3, 77, 96)
    assert torch.equal(given, wanted)
    plain = prompts.encode_prompts(*loaded, CAPTIONS)
    if clip_skip:
        assert not torch.allclose(given, plain, atol=1e-2)
    encoder = make_encoder(*loaded, clip_skip=clip_skip)
    condition, negative = encoder(CAPTIONS), encoder(CAPTIONS, with_clip_skip=False)
    assert condition.keys() == negative.keys() == {"encoder_hidden_states"}
    assert torch.equal(condition["encoder_hidden_states"], wanted)
    assert torch.equal(negative["encoder_hidden_states"], plain)


def test_prompts_have_the_text_encoders_length_whatever_the_tokenizer_says(tiny_sd, loaded, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_max_length"}))
    components = loading.load_components(loading.find_base_model(str(tmp_path / "model")))
    given = prompts.encode_prompts(components.tokenizers[0], components.text_encoders[0], CAPTIONS)
    assert torch.equal(given, prompts.encode_prompts(*loaded, CAPTIONS))


def test_a_run_encodes_in_its_precision_without_gradients_and_in_eval_mode(loaded):
    tokenizer, text_encoder = loaded
    text_encoder.train()
    given = make_encoder(tokenizer, text_encoder, dtype=torch.bfloat16)(CAPTIONS)["encoder_hidden_states"]
    assert text_encoder.training
    text_encoder.eval()
    wanted = prompts.encode_prompts(tokenizer, text_encoder, CAPTIONS)
    assert not given.requires_grad
    assert torch.equal(given, wanted.bfloat16())


def test_a_text_encoder_in_training_has_gradients_and_its_own_precision(loaded):
    tokenizer, text_encoder = loaded
    entered = []

    class Autocast(torch.autocast):
        def __enter__(self):
            entered.append(self)
            return super().__enter__()

    encoder = make_encoder(
        tokenizer, text_encoder, dtype=torch.bfloat16, autocast=lambda: Autocast("cpu", torch.bfloat16)
    )
    text_encoder.requires_grad_(True)
    try:
        given = encoder.in_training((text_encoder,), CAPTIONS)["encoder_hidden_states"]
    finally:
        text_encoder.requires_grad_(False)
    assert given.requires_grad
    assert len(entered) == 1


def test_the_identity_is_of_all_that_a_condition_depends_on(loaded, tiny_sd):
    tokenizer, text_encoder = loaded
    identity = make_encoder(*loaded).identity
    assert make_encoder(*loaded, dtype=torch.bfloat16).identity == identity  # the cache stores the dtype separately
    others = [make_encoder(*loaded, clip_skip=1), make_encoder(*loaded, num_chunks=2)]
    again = loading.load_components(loading.find_base_model(str(tiny_sd)))
    assert make_encoder(again.tokenizers[0], again.text_encoders[0]).identity == identity
    encoder = make_encoder(again.tokenizers[0], again.text_encoders[0])
    encoder(CAPTIONS)  # leaves its padding in the tokenizer
    assert make_encoder(again.tokenizers[0], again.text_encoders[0]).identity == identity
    list(again.text_encoders[0].parameters())[0].data.view(-1)[0] += 1e-3
    others.append(make_encoder(tokenizer, again.text_encoders[0]))
    again.tokenizers[0].model_max_length = 50
    others.append(make_encoder(again.tokenizers[0], text_encoder))
    (another,) = loading.load_components(loading.find_base_model(str(tiny_sd))).tokenizers
    another.add_tokens("trident-of-gold")
    others.append(make_encoder(another, text_encoder))
    assert len({identity, *(other.identity for other in others)}) == 6


def test_whole_and_cut_prompts_share_a_cache(train, tmp_path):
    """Encodes equal captions first in two chunks and then in one; only the number of chunks differs."""
    folder = write_pictures(tmp_path / "pictures", captions=["red axe " * 50])
    losses = [
        read_metrics(train(train_data_dir=folder, long_prompts=whole, output_dir=tmp_path / f"{i}"))[0]["train_loss"]
        for i, whole in enumerate([True, False, True])
    ]
    assert losses[0] == losses[2] != losses[1]
    assert len(list((tmp_path / "cache").rglob("prompts/*.safetensors"))) == 2


def test_a_long_prompt_is_read_whole_in_chunks(loaded):
    """A chunk equals a separate prompt: start token, 75 tokens, end token."""
    tokenizer, text_encoder = loaded
    words = ["red", "blue", "green", "axe", "gold"] * 20
    given = prompts.encode_prompts(tokenizer, text_encoder, [" ".join(words), "a red axe"], num_chunks=2)
    assert given.shape == (2, 154, 96)
    parts = [" ".join(words[:75]), " ".join(words[75:]), "a red axe", ""]
    wanted = prompts.encode_prompts(tokenizer, text_encoder, parts)
    torch.testing.assert_close(given.reshape(4, 77, 96), wanted, rtol=1e-5, atol=1e-5)


def test_how_many_chunks_a_run_needs(loaded):
    tokenizer, _ = loaded
    captions = [["a red axe"], ["axe " * 76, "axe " * 150], [""]]
    counts = prompts.count_tokens(tokenizer, captions)
    assert counts == [[5], [78, 152], [2]]
    assert [prompts.chunks_needed(tokenizer, count) for count in (2, 77, 78, 152, 153)] == [1, 1, 2, 2, 3]
    sources = ["a.png", "b.png", "c.png"]
    num_chunks, line = prompts.choose_num_chunks(tokenizer, counts, sources, long_prompts=True)
    assert (num_chunks, line.startswith("2 captions ")) == (2, True)
    num_chunks, line = prompts.choose_num_chunks(tokenizer, counts, sources, long_prompts=False)
    assert (num_chunks, line.startswith("2 captions "), line.endswith("the first: b.png")) == (1, True, True)
    assert prompts.choose_num_chunks(tokenizer, counts[:1], sources, long_prompts=True) == (1, None)
    assert prompts.choose_num_chunks(tokenizer, counts[:1], sources, long_prompts=False) == (1, None)
    with pytest.raises(InputError, match="^c.png: its caption of 800 tokens would make every prompt 11 chunks long"):
        prompts.choose_num_chunks(tokenizer, [[5], [5], [800]], sources, long_prompts=True)

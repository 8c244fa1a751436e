"""Prompts are encoded as the pipeline expects them."""

from unittest import mock

import pytest
import torch
from infer_fixtures import draw

from text_to_image_lora.drawing.as_trained import settle
from text_to_image_lora.drawing.encode import PromptEncoder
from text_to_image_lora.drawing.find import find_base, find_lora
from text_to_image_lora.drawing.pipeline import Job, open_studio
from text_to_image_lora.drawing.rows import Drawing
from text_to_image_lora.drawing.settings import Machine, Model


pytestmark = pytest.mark.usefixtures("library_settings")


@pytest.mark.parametrize("chunks", ["1", "3"])
def test_prompts_are_padded_as_in_training(tiny_pipeline, model, write_lora, tmp_path, capsys, chunks):
    """The UNet also attends to padding, so prompts get as many chunks as in training, or more if a prompt needs them."""
    lora, seen = write_lora("axe", long_prompts="True", num_chunks=chunks), []
    encode = PromptEncoder.__call__

    def look(*args):
        seen.append(encode(*args))
        return seen[-1]

    with mock.patch.object(PromptEncoder, "__call__", look):
        draw(model, tmp_path, "--lora", lora, prompt=("a red axe", "a red axe " * 80))
    said = capsys.readouterr().err
    assert ("3 chunks per prompt" in said) == (chunks == "3")
    short, long = ([v.shape[1] // 77 for k, v in options.items() if k.endswith("embeds")] for options in seen)
    assert (short, long) == ([int(chunks)] * 2, [4, 4])


def test_stable_diffusion_xl_with_long_prompts(tiny_xl, write_lora):
    """A prompt of one chunk is encoded like in stock diffusers; a longer prompt is not truncated."""
    lora = write_lora("long", long_prompts="True", num_chunks="1")
    base = find_base(Model(str(tiny_xl)))
    trained, _ = settle([find_lora(str(lora), 1.0, "lora0")], base, None)
    studio = open_studio(Job(base, (), trained), Machine(), "cpu", torch.float32)
    found = studio.encoder(Drawing(prompt="a red axe", guidance_scale=1))
    with torch.no_grad():
        embeds, _, pooled, _ = studio.pipe.encode_prompt("a red axe", device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(found["prompt_embeds"], embeds)
    assert torch.equal(found["pooled_prompt_embeds"], pooled)
    long = studio.encoder(Drawing(prompt="a red axe " * 40, clip_skip=1))
    assert [(name, tuple(value.shape)) for name, value in long.items()] == [
        ("prompt_embeds", (1, 154, 96)), ("pooled_prompt_embeds", (1, 64)),
        ("negative_prompt_embeds", (1, 154, 96)), ("negative_pooled_prompt_embeds", (1, 64)),
    ]  # fmt: skip

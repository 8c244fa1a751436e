"""A model family is a row: the row of Stable Diffusion XL is used by the cache, the loader and training.

No code outside the row knows of its two text encoders, its pooled embedding, and its numbers of each picture.
"""

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_picture_set, read_lora, read_metrics, write_pictures
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from text_to_image_lora.models import loading
from text_to_image_lora.models.families import (
    FAMILIES,
    PIPELINE_KINDS,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    families_with_pipeline,
)
from text_to_image_lora.models.latents import LatentEncoder
from text_to_image_lora.models.prompts import PromptEncoder
from text_to_image_lora.training.batches import Sample
from text_to_image_lora.training.caching import Cache
from text_to_image_lora.training.data import Draws, TrainingSet


CAPTIONS = ["a red axe", "a very long caption " * 30, ""]


@pytest.fixture
def stock(tiny_xl):
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_xl, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_a_condition_has_the_shapes_that_were_predicted(tiny_sd, tiny_xl, num_chunks):
    for folder, family in ((tiny_sd, STABLE_DIFFUSION), (tiny_xl, STABLE_DIFFUSION_XL)):
        base = loading.find_base_model(str(folder))
        assert base.family is family
        components = loading.load_components(base)
        encoder = PromptEncoder(
            family, components.tokenizers, components.text_encoders, clip_skip=None, num_chunks=num_chunks,
            dtype=torch.float32,
        )  # fmt: skip
        condition = encoder(CAPTIONS)
        assert {name: tuple(value.shape[1:]) for name, value in condition.items()} == base.condition_shapes(num_chunks)
        assert family.pipeline_names.keys() == condition.keys()
        latents, timesteps = torch.zeros(3, *base.latent_shape((32, 32))), torch.tensor([1, 500, 999])
        own = family.picture_condition((40, 32), (4, 0), (32, 32))
        own = {name: torch.tensor([value] * 3, dtype=torch.float32) for name, value in own.items()}
        assert family.predict(components.denoiser, latents, timesteps, **condition, **own).shape == latents.shape


def test_a_row_of_stable_diffusion_xl_goes_from_cache_to_prediction(tiny_xl, stock, tmp_path):
    base = loading.find_base_model(str(tiny_xl))
    components = loading.load_components(base)
    assert [type(model) for model in components.text_encoders] == [CLIPTextModel, CLIPTextModelWithProjection]
    family, unet = base.family, components.denoiser
    # Pictures of two shapes at two sizes: original size, corner and target size all differ.
    folder = write_pictures(tmp_path / "wide", count=2, size=(48, 32))
    write_pictures(tmp_path / "wide" / "tall", count=2, size=(32, 40), captions=["a blue axe"], seed=1)
    (folder / "tall" / "metadata.jsonl").unlink()
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    rows += ['{"file_name": "tall/0.png", "text": "a blue axe"}', '{"file_name": "tall/1.png", "text": "a green axe"}']
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    pictures = make_picture_set(folder, center_crop=True, random_flip=True)
    latent_encoder = LatentEncoder(components.vae, torch.float32)
    prompt_encoder = PromptEncoder(
        family, components.tokenizers, components.text_encoders, clip_skip=None, num_chunks=1, dtype=torch.float32
    )
    cache = Cache(tmp_path / "cache", base, latent_encoder, prompt_encoder)
    captions = [caption for group in pictures.captions for caption in group]
    latents, prompts = cache.build(pictures, 2, captions, Accelerator(cpu=True))
    draws = Draws(seed=0, num_train_timesteps=1000)
    samples = [Sample(index, 3, position, 0.25) for position, index in enumerate((0, 1, 2, 3, 0, 2))]

    def batch_of(**cached):
        training_set = TrainingSet(pictures, base, draws, **cached)
        return torch.utils.data.default_collate([training_set[sample] for sample in samples])

    def prediction_of(batch):
        latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * latent_encoder.scaling_factor
        with torch.no_grad():
            return family.predict(unet, latents + batch["noise"], batch["timesteps"], **batch["condition"])

    cached, live = batch_of(latents=latents, prompts=prompts), batch_of()
    live["mean"], live["std"] = latent_encoder(live["pixels"])
    live["condition"] |= prompt_encoder(live["captions"])
    assert cached["condition"].keys() == live["condition"].keys() == {
        "encoder_hidden_states", "text_embeds", "time_ids"
    }  # fmt: skip
    assert torch.equal(cached["condition"]["time_ids"], live["condition"]["time_ids"])
    for name in ("encoder_hidden_states", "text_embeds"):
        torch.testing.assert_close(cached["condition"][name], live["condition"][name])
    torch.testing.assert_close(prediction_of(cached), prediction_of(live))

    # The pipeline of stock diffusers gives equal tensors for the captions and the numbers of the pictures.
    embeds, _, pooled, _ = stock.encode_prompt(live["captions"], device="cpu", do_classifier_free_guidance=False)
    shown = [pictures.facts[sample.index] for sample in samples]
    corners = [(0, 8) if fact.width == 48 else (4, 0) for fact in shown]
    assert {fact.width for fact in shown} == {48, 32}
    time_ids = torch.cat(
        [
            stock._get_add_time_ids((fact.height, fact.width), corner, (32, 32), torch.float32, 64)
            for fact, corner in zip(shown, corners, strict=True)
        ]
    )
    noisy = (live["mean"] + live["std"] * live["posterior_noise"]) * stock.vae.config.scaling_factor + live["noise"]
    with torch.no_grad():
        wanted = stock.unet(
            noisy, live["timesteps"], embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample
    torch.testing.assert_close(prediction_of(cached), wanted)
    # Each of the numbers has an effect.
    for name, value in cached["condition"].items():
        changed = cached | {"condition": cached["condition"] | {name: value + 1}}
        assert not torch.allclose(prediction_of(changed), wanted, atol=1e-4), name


def test_one_vae_for_two_families_has_shards_for_each(tiny_xl, pictures, tmp_path):
    base = loading.find_base_model(str(tiny_xl))
    vae = AutoencoderKL.from_pretrained(tiny_xl / "vae").eval()
    pictures, accelerator = make_picture_set(pictures), Accelerator(cpu=True)
    for family, names in ((STABLE_DIFFUSION, set()), (STABLE_DIFFUSION_XL, {"time_ids"})):
        cache = Cache(tmp_path / "cache", base._replace(family=family), LatentEncoder(vae, torch.float32), None)
        latents, _ = cache.build(pictures, 1, [], accelerator)
        assert latents.row(0, 0)[1].keys() == names


def test_clip_skip_and_both_text_encoders(tiny_xl, stock, train):
    """Layers that clip skip omits in the first text encoder are not adapted; the second one is used completely."""
    options = {"train_text_encoder": True, "clip_skip": 1}
    out = train(pretrained_model_name_or_path=tiny_xl, learning_rate=0.1, **options)
    assert [row["step"] for row in read_metrics(out) if "train_loss" in row] == [1, 2]
    weights = read_lora(out)
    assert [name for name, value in weights.items() if ".lora_B." in name and value.abs().max() == 0] == []
    layers = {
        part: {name.split(".layers.")[1][0] for name in weights if name.startswith(f"{part}.")}
        for part in ("text_encoder", "text_encoder_2")
    }
    assert layers == {"text_encoder": {"0"}, "text_encoder_2": {"0", "1", "2"}}

    def draw():
        image = stock(
            "a red axe", num_inference_steps=2, height=32, width=32, clip_skip=1,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        return np.asarray(image, dtype=int)

    before = draw()
    stock.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    assert abs(draw() - before).max() > 3


def test_the_pipelines_of_a_family_are_diffusers_own():
    for family in FAMILIES:
        for kind in PIPELINE_KINDS:
            assert hasattr(diffusers, family.pipeline_of(kind))
    assert families_with_pipeline("StableDiffusionXLControlNetImg2ImgPipeline") == [STABLE_DIFFUSION_XL]
    assert families_with_pipeline("FluxPipeline") == []

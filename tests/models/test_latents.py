"""Pixels become the latents that diffusers computes."""

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from text_to_image_lora.models import latents
from text_to_image_lora.models.latents import LatentEncoder
from text_to_image_lora.models.modules import place, weights_identity


@pytest.fixture(scope="module")
def vae(tiny_sd):
    return AutoencoderKL.from_pretrained(tiny_sd / "vae").eval()


def test_pictures_are_encoded_as_in_diffusers(vae):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    encoder = LatentEncoder(vae, torch.float16)
    mean, std = encoder(torch.from_numpy(pixels))
    processed = VaeImageProcessor(vae_scale_factor=4).preprocess([Image.fromarray(picture) for picture in pixels])
    with torch.no_grad():
        wanted = vae.encode(processed).latent_dist
    assert mean.shape == std.shape == (2, *encoder.shape((40, 32))) == (2, 4, 8, 10)
    assert mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad
    torch.testing.assert_close(mean, wanted.mean)
    torch.testing.assert_close(std, wanted.std)


def test_what_the_cache_must_know_of_the_vae(vae):
    encoder = LatentEncoder(vae, torch.float16)
    assert (encoder.factor, encoder.scaling_factor, encoder.dtype) == (4, vae.config.scaling_factor, torch.float16)
    assert encoder.identity == f"{weights_identity(vae)} cpu"


def test_the_identity_is_of_the_device_and_of_its_arithmetic(vae, monkeypatch):
    """GPU kernels round differently from CPU kernels, TF32 even more. The test needs no GPU."""
    identities = set()
    for device, tf32 in (("cpu", False), ("cpu", True), ("mps", True), ("cuda", False), ("cuda", True)):
        monkeypatch.setattr("torch.backends.cudnn.allow_tf32", tf32)
        monkeypatch.setattr(type(vae), "device", torch.device(device))
        identities.add(LatentEncoder(vae, torch.float16).identity)
    assert len(identities) == 4  # a CPU has no TF32


def test_the_vae_is_read_when_it_is_needed_and_then_once(vae, monkeypatch):
    """It is not read if the cache is full; its identity, which is a hash of all values, does not depend on this."""
    half, moved = copy.deepcopy(vae).half(), []
    encoder = LatentEncoder(half, torch.float16)
    before = encoder.identity
    assert before == LatentEncoder(half.float(), torch.float16).identity
    half.half()
    assert half.dtype == torch.float16
    monkeypatch.setattr(latents, "place", lambda *to: (moved.append(to), place(*to)))
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    first, again = encoder(pixels), encoder(pixels)
    assert half.dtype == torch.float32
    assert moved == [(half, torch.device("cpu"), torch.float32)]
    torch.testing.assert_close(first, again, rtol=0, atol=0)

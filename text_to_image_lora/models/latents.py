"""Encodes pixels to latents with the VAE of a run."""

import functools
from typing import Any

import torch

from .modules import place, weights_identity


ENCODE_PIXELS = 512 * 512  # per batch of the VAE: four times as many take more memory than a training step


def encoded_at_once(width: int, height: int) -> int:
    """Returns the batch size for encoding pictures of this size."""
    return max(1, ENCODE_PIXELS // (width * height))


class LatentEncoder:
    """Encodes uint8 pixels with a VAE in small batches; latents are cached in `dtype`.

    The VAE is moved to the device when it is first needed, in float32, because some VAEs overflow in float16.
    """

    def __init__(self, vae: Any, dtype: torch.dtype, device: torch.device | None = None):
        self.vae = vae
        self.dtype = dtype
        self.device = device or vae.device
        self.ready = False
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scaling_factor = vae.config.scaling_factor

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the VAE, with the type of the device, on which the rounding of latents depends."""
        reduced = self.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return f"{weights_identity(self.vae, torch.float32)} {self.device.type}{' tf32' if reduced else ''}"

    def get_ready(self) -> None:
        """Freezes the VAE and moves it to its device, unless that is done already."""
        if not self.ready:
            place(self.vae.requires_grad_(False), self.device, torch.float32)
            self.ready = True

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Returns the shape (channels, height, width) of the latents of a picture of (width, height) pixels."""
        return self.channels, size[1] // self.factor, size[0] // self.factor

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes uint8 pixels (N, H, W, 3) to the posterior mean and standard deviation, each float32 (N, C, h, w).

        They are not multiplied by the scaling factor of the VAE.
        """
        self.get_ready()
        means, stds = [], []
        for part in pixels.split(encoded_at_once(*pixels.shape[1:3])):
            part = part.to(self.vae.device).permute(0, 3, 1, 2).to(self.vae.dtype) / 127.5 - 1
            with torch.no_grad():
                posterior = self.vae.encode(part).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
        return torch.cat(means), torch.cat(stds)

"""Pixels become latents: the VAE of a run, and what the cache must know of it."""

import functools

import torch

from .modules import place, weights_identity


ENCODE_PIXELS = 512 * 512  # at once: four such pictures take more memory than a training step


def encoded_at_once(width, height):
    """How many pictures of that size are encoded together."""
    return max(1, ENCODE_PIXELS // (width * height))


class LatentEncoder:
    """A VAE that encodes uint8 pixels, a few at once; latents are cached in `dtype`.

    It is brought to the device, in float32, as some VAEs overflow in float16, when it is first needed.
    """

    def __init__(self, vae, dtype, device=None):
        self.vae, self.dtype, self.device, self.ready = vae, dtype, device or vae.device, False
        self.channels, self.factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
        self.scaling_factor = vae.config.scaling_factor

    @functools.cached_property
    def identity(self):
        """A hash of the VAE's configuration and weights, and of the kind of device, whose kernels round in their own way."""
        reduced = self.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return f"{weights_identity(self.vae, torch.float32)} {self.device.type}{' tf32' if reduced else ''}"

    def get_ready(self):
        """Brings the VAE, frozen, to its device, once."""
        if not self.ready:
            place(self.vae.requires_grad_(False), self.device, torch.float32)
            self.ready = True

    def shape(self, size):
        """(channels, height, width) of the latent of (width, height) in pixels."""
        return self.channels, size[1] // self.factor, size[0] // self.factor

    def __call__(self, pixels):
        """Posterior mean and standard deviation, float32 (N, C, h, w) each, of uint8 pixels (N, H, W, 3).

        They are the VAE's own latents, not yet multiplied by its scaling factor.
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

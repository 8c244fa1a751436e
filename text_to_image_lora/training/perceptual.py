"""Perceptual losses without another network: features of the VAE's decoder, or of the frozen base itself.

Both compare the clean latents that a prediction stands for with the true ones, are zero where they are equal, and are
added to the objective by a weight.
"""

import contextlib
from typing import Any

import torch

from ..models.lora import without_adapters
from .settings import LossSettings


DECODER_BLOCKS = 2  # of the decoder's upward blocks that are looked at, beside its middle; later ones cost far more


def decoder_features(vae, latents):
    """What the decoder's middle and its first upward blocks make of latents (already over the scaling factor)."""
    hidden = vae.decoder.conv_in(latents if vae.post_quant_conv is None else vae.post_quant_conv(latents))
    features = [vae.decoder.mid_block(hidden)]
    for block in vae.decoder.up_blocks[:DECODER_BLOCKS]:
        features.append(block(features[-1]))
    return features


def decoder_loss(vae, predicted, clean, scaling_factor):
    """Mean squared difference of the decoder's features, (N,), each channel by the true features' own deviation.

    After Latent Perceptual Loss (Berrada et al., 2024, https://arxiv.org/abs/2411.04873), less its mask of outliers and
    its later blocks. `predicted` and `clean` are latents as the UNet has them.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        with torch.no_grad():
            wanted = decoder_features(vae, (clean / scaling_factor).to(vae.dtype))
        given = decoder_features(vae, (predicted / scaling_factor).to(vae.dtype))
        losses = []
        for a, b in zip(given, wanted, strict=True):
            deviation = b.float().std(dim=(2, 3), keepdim=True).clamp(min=1e-4)
            losses.append(((a.float() - b.float()) / deviation).square().mean(dim=(1, 2, 3)))
    return torch.stack(losses).mean(dim=0)


@contextlib.contextmanager
def plain(unet):
    """The UNet as it was before its LoRA, for what runs inside; gradients still pass through it."""
    was_checkpointing = unet.is_gradient_checkpointing
    if was_checkpointing:  # it would run again in the backward pass, with the LoRA
        unet.disable_gradient_checkpointing()
    try:
        with without_adapters(unet):
            yield
    finally:
        if was_checkpointing:
            unet.enable_gradient_checkpointing()


class _Enough(Exception):
    """Leaves the UNet after its middle block."""


def middle_of(unet):
    """The UNet's middle block, or its last downward one where it has none (as distilled models have)."""
    return unet.down_blocks[-1] if unet.mid_block is None else unet.mid_block


def middle_features(family, unet, noisy_latents, timesteps, condition):
    """The output of the UNet's middle (N, C, h, w); what comes after it is not computed."""
    found = []

    def keep(module, given, output):
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    handle = middle_of(unet).register_forward_hook(keep)
    try:
        family.predict(unet, noisy_latents, timesteps, **condition)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


class PerceptualLoss:
    """The perceptual loss of a run, for its loop to add, as its `LossSettings` say; `dtype` is the denoiser's.

    The decoder looks only at samples below `perceptual_max_timestep`: beyond it, what is predicted is no picture yet.
    """

    def __init__(self, loss, *, family, denoiser, vae, diffusion, scaling_factor, dtype):
        self.loss, self.family, self.denoiser, self.vae, self.diffusion = loss, family, denoiser, vae, diffusion
        self.scaling_factor, self.dtype = scaling_factor, dtype

    def __call__(self, model_pred, latents, noise, batch):
        """Sum over the samples of weight x loss.

        `noise` is the target's, without any input perturbation. `batch` has "weights" and "timesteps"; for "self" also
        "perceptual_noise", "perceptual_timesteps" and "condition".
        """
        timesteps, weights = batch["timesteps"], batch["weights"]
        noisy_latents = self.diffusion.add_noise(latents, noise, timesteps)
        predicted = self.diffusion.clean_estimate(noisy_latents, model_pred, timesteps)
        if self.loss.perceptual_loss == "self":
            return (self._self_loss(predicted, latents, batch) * weights).sum()
        # By the numbers that never left the CPU: to ask the device would wait for it.
        seen = (batch["timesteps_on_cpu"] < self.loss.perceptual_max_timestep).nonzero()[:, 0]
        if not len(seen):
            return predicted.sum() * 0
        seen = seen.to(timesteps.device, non_blocking=timesteps.device.type == "cuda")
        return (decoder_loss(self.vae, predicted[seen], latents[seen], self.scaling_factor) * weights[seen]).sum()

    def _self_loss(self, predicted, clean, batch):
        """Mean squared difference of the base's middle features of both latents, noised alike, (N,).

        Diffusion Model with Perceptual Loss (Lin and Yang, 2023, https://arxiv.org/abs/2401.00110): the base is the
        network that perceives; noise and timesteps are new ones, the same for both.
        """
        noise, timesteps = batch["perceptual_noise"], batch["perceptual_timesteps"]
        condition = {name: value.detach() for name, value in batch["condition"].items()}

        def features(latents):
            seen = self.diffusion.add_noise(latents, noise, timesteps).to(self.dtype)
            return middle_features(self.family, self.denoiser, seen, timesteps, condition)

        with plain(self.denoiser):
            with torch.no_grad():
                wanted = features(clean)
            given = features(predicted)
        return (given.float() - wanted.float()).square().mean(dim=(1, 2, 3))


def make_perceptual_loss(settings: LossSettings, models: Any) -> PerceptualLoss | None:
    """The perceptual loss of a run, or None."""
    if settings.perceptual_loss is None:
        return None
    return PerceptualLoss(
        settings, family=models.family, denoiser=models.denoiser, vae=models.vae, diffusion=models.diffusion,
        scaling_factor=models.scaling_factor, dtype=models.dtype,
    )  # fmt: skip

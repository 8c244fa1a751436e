"""Perceptual losses on features of the VAE's decoder, or of the frozen base model itself.

Both compare the clean latents according to the prediction with the true ones, and are added to the objective with a weight.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..models.lora import without_adapters
from .objective import Diffusion
from .objective_settings import LossSettings
from .preservation import num_preserved


DECODER_BLOCKS = 2  # number of up blocks that are compared, beside the middle block; later blocks cost far more


def decoder_features(vae: Any, latents: torch.Tensor) -> list[torch.Tensor]:
    """Returns the outputs of the decoder's middle block and first up blocks for unscaled latents (N, C, h, w)."""
    hidden = vae.decoder.conv_in(latents if vae.post_quant_conv is None else vae.post_quant_conv(latents))
    features = [vae.decoder.mid_block(hidden)]
    for block in vae.decoder.up_blocks[:DECODER_BLOCKS]:
        features.append(block(features[-1]))
    return features


def decoder_loss(vae: Any, predicted: torch.Tensor, clean: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """Returns the mean squared difference (N,) of decoder features, with channels normalized by those of the clean latents.

    This is Latent Perceptual Loss (Berrada et al., 2024, https://arxiv.org/abs/2411.04873) without its outlier mask and its
    later blocks. `predicted` and `clean` are scaled latents (N, C, h, w).
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
def frozen_base(unet: Any) -> Iterator[None]:
    """Disables the LoRA of the UNet; gradients still pass through the UNet."""
    was_checkpointing = unet.is_gradient_checkpointing
    if was_checkpointing:  # otherwise the backward pass would recompute activations with the LoRA
        unet.disable_gradient_checkpointing()
    try:
        with without_adapters(unet):
            yield
    finally:
        if was_checkpointing:
            unet.enable_gradient_checkpointing()


class _Finished(Exception):
    """Leaves the UNet after its middle block."""


def find_middle_block(unet: Any) -> torch.nn.Module:
    """Returns the UNet's middle block, or its last down block if it has none, as in distilled models."""
    return unet.down_blocks[-1] if unet.mid_block is None else unet.mid_block


def middle_features(
    family: Any, unet: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Returns the output (N, C, h, w) of the UNet's middle block, without running later blocks."""
    found = []

    def keep(module, given, output):
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Finished

    handle = find_middle_block(unet).register_forward_hook(keep)
    try:
        family.predict(unet, noisy_latents, timesteps, **condition)
    except _Finished:
        pass
    finally:
        handle.remove()
    return found[0]


@dataclass
class PerceptualLoss:
    """The perceptual loss of a run.

    The decoder's features are only compared below `perceptual_max_timestep`, as later predictions are no pictures yet.
    """

    loss: LossSettings
    family: Any
    denoiser: Any
    vae: Any
    diffusion: Diffusion
    scaling_factor: float  # of the VAE's latents
    dtype: torch.dtype  # of the denoiser

    def __call__(
        self, model_pred: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, batch: dict[str, Any]
    ) -> torch.Tensor:
        """Returns the weighted sum of the samples' losses; prediction, clean latents and noise are (N, C, h, w).

        Samples at the end of the batch that preserve the base model have no perceptual loss.

        `noise` is that of the target, without input perturbation. `batch` has "weights" and "timesteps"; for "self" also
        "perceptual_noise", "perceptual_timesteps" and "condition".
        """
        own = slice(len(latents) - num_preserved(batch))
        model_pred, latents, noise = model_pred[own], latents[own], noise[own]
        timesteps, weights = batch["timesteps"][own], batch["weights"][own]
        noisy_latents = self.diffusion.add_noise(latents, noise, timesteps)
        predicted = self.diffusion.clean_estimate(noisy_latents, model_pred, timesteps)
        if self.loss.perceptual_loss == "self":
            return (self._self_loss(predicted, latents, batch) * weights).sum()
        # Uses the timesteps on the CPU, as reading them from the device would wait for it.
        seen = (batch["timesteps_on_cpu"][own] < self.loss.perceptual_max_timestep).nonzero()[:, 0]
        if not len(seen):
            return predicted.sum() * 0
        seen = seen.to(timesteps.device, non_blocking=timesteps.device.type == "cuda")
        return (decoder_loss(self.vae, predicted[seen], latents[seen], self.scaling_factor) * weights[seen]).sum()

    def _self_loss(self, predicted, clean, batch):
        """Returns the mean squared difference (N,) of the base model's middle features of both latents.

        This is the self-perceptual objective of Lin and Yang, 2023, https://arxiv.org/abs/2401.00110. Both latents get equal
        noise at equal timesteps, which are drawn for this loss.
        """
        count = len(clean)
        noise, timesteps = batch["perceptual_noise"][:count], batch["perceptual_timesteps"][:count]
        condition = {name: value[:count].detach() for name, value in batch["condition"].items()}

        def features(latents):
            seen = self.diffusion.add_noise(latents, noise, timesteps).to(self.dtype)
            return middle_features(self.family, self.denoiser, seen, timesteps, condition)

        with frozen_base(self.denoiser):
            with torch.no_grad():
                wanted = features(clean)
            given = features(predicted)
        return (given.float() - wanted.float()).square().mean(dim=(1, 2, 3))


def make_perceptual_loss(settings: LossSettings, models: Any) -> PerceptualLoss | None:
    """Creates the perceptual loss of a run, or returns None."""
    if settings.perceptual_loss is None:
        return None
    return PerceptualLoss(
        settings, family=models.family, denoiser=models.denoiser, vae=models.vae, diffusion=models.diffusion,
        scaling_factor=models.scaling_factor, dtype=models.dtype,
    )  # fmt: skip

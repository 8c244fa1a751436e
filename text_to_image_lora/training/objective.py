"""The training objective as pure tensor functions: noise in, weighted loss out."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .settings import LossSettings


def snr_of(alphas_cumprod, timesteps):
    """Signal-to-noise ratio of each timestep, float32 (N,): alpha_bar / (1 - alpha_bar)."""
    alpha_bar = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    return alpha_bar / (1 - alpha_bar)


class Prediction(NamedTuple):
    """What differs between the things a model can predict; tensors are (N, C, H, W), SNRs and weights (N,).

    Min-SNR is Hang et al., 2023, https://arxiv.org/abs/2303.09556; its weight of noise prediction goes to 1 at SNR 0.
    Debiased estimation is Yu et al., 2023, https://arxiv.org/abs/2310.08442.
    """

    target: Callable  # (noise_scheduler, latents, noise, timesteps) -> what is to be predicted
    clean: (
        Callable  # (noisy_latents, model_pred, signal, noise) -> the clean latents; signal and noise are their shares
    )
    min_snr_weights: Callable  # (snr, snr_gamma) -> loss weights
    debiased_weights: Callable  # (snr) -> loss weights


PREDICTIONS = {
    "epsilon": Prediction(
        target=lambda noise_scheduler, latents, noise, timesteps: noise,
        clean=lambda noisy_latents, model_pred, signal, noise: (noisy_latents - noise * model_pred) / signal,
        min_snr_weights=lambda snr, snr_gamma: snr_gamma / snr.clamp(min=snr_gamma),
        debiased_weights=lambda snr: snr.rsqrt(),
    ),
    # The velocity of Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512
    "v_prediction": Prediction(
        target=lambda noise_scheduler, latents, noise, timesteps: noise_scheduler.get_velocity(
            latents, noise, timesteps
        ),
        clean=lambda noisy_latents, model_pred, signal, noise: signal * noisy_latents - noise * model_pred,
        min_snr_weights=lambda snr, snr_gamma: snr.clamp(max=snr_gamma) / (snr + 1),
        debiased_weights=lambda snr: 1 / (snr + 1),
    ),
}


class Diffusion:
    """The diffusion that a model is trained on: its noise schedule, and its row of `PREDICTIONS`."""

    def __init__(self, noise_scheduler):
        self.noise_scheduler, self.config = noise_scheduler, noise_scheduler.config
        self.num_train_timesteps = noise_scheduler.config.num_train_timesteps
        self.prediction = PREDICTIONS[noise_scheduler.config.prediction_type]

    def add_noise(self, latents, noise, timesteps):
        return self.noise_scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents, noise, timesteps):
        """What the model is to predict."""
        return self.prediction.target(self.noise_scheduler, latents, noise, timesteps)

    def clean_estimate(self, noisy_latents, model_pred, timesteps):
        """The clean latents (N, C, H, W) that a prediction stands for, float32."""
        alpha_bar = self.noise_scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
        signal, noise = alpha_bar.view(-1, 1, 1, 1).sqrt(), (1 - alpha_bar.view(-1, 1, 1, 1)).sqrt()
        return self.prediction.clean(noisy_latents.float(), model_pred.float(), signal, noise)

    def weights(self, timesteps: torch.Tensor, loss: LossSettings) -> torch.Tensor:
        """How much each sample's loss counts by its timestep, float32 (N,)."""
        if loss.snr_gamma is None and not loss.debiased_estimation:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = snr_of(self.noise_scheduler.alphas_cumprod, timesteps)
        if loss.debiased_estimation:
            return self.prediction.debiased_weights(snr.clamp(1e-3, 1e3))
        return self.prediction.min_snr_weights(snr, loss.snr_gamma)


def scheduled_huber_c(loss: LossSettings, timesteps: torch.Tensor, num_train_timesteps: int) -> torch.Tensor | None:
    """The width of the Huber loss at each timestep (N,): from 1 at the first, falling to `huber_c` at the last.

    None for the squared error. The exponential schedule of Khrapov et al., 2024, https://arxiv.org/abs/2403.16728.
    """
    if loss.loss_type != "huber":
        return None
    return torch.exp(math.log(loss.huber_c) * timesteps.float() / num_train_timesteps)


def loss_of_samples(model_pred, target, mask=None, huber_c=None):
    """Mean squared error of each sample, float32 (N,), of shapes (N, C, H, W).

    With `huber_c` (N,) the pseudo-Huber loss 2c (sqrt(error^2 + c^2) - c), which counts outliers less. A `mask`
    (N, 1, H, W) from 0 to 1 makes the mean one that is weighted by it: what it hides counts nothing, and a picture with a
    small subject as much as any other.
    """
    error = (model_pred.float() - target.float()).square()
    if huber_c is not None:
        c = huber_c[:, None, None, None]
        error = 2 * c * error / ((error + c.square()).sqrt() + c)  # the same, without the difference of near equals
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    return (mask * error).mean(dim=(1, 2, 3)) / mask.mean(dim=(1, 2, 3)).clamp(min=1e-6)


def losses_by_name(batch, model_pred, target, huber_c=None):
    """{loss_for_NAME: the loss of that sample, without its weight} of a batch with "names"."""
    losses = loss_of_samples(model_pred.detach(), target, batch.get("mask"), huber_c)
    return {f"loss_for_{name}": loss for name, loss in zip(batch["names"], losses, strict=True)}


def diffusion_loss(model_pred, target, weights, mask=None, huber_c=None):
    """Sum over the samples of weight x loss; weights (N,), the rest as in `loss_of_samples`.

    The caller's weights carry the normalisation, so that the sums of all micro-batches and ranks add up to the mean
    over the effective batch.
    """
    return (loss_of_samples(model_pred, target, mask, huber_c) * weights).sum()

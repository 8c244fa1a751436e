"""The training objective as pure functions of tensors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .objective_settings import LossSettings


def snr_of(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Returns the signal-to-noise ratio of each timestep, float32 (N,): alpha_bar / (1 - alpha_bar)."""
    alpha_bar = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    return alpha_bar / (1 - alpha_bar)


class Prediction(NamedTuple):
    """The formulas for a prediction type; tensors are (N, C, H, W), SNRs and weights (N,).

    Min-SNR weighting is that of Hang et al., 2023, https://arxiv.org/abs/2303.09556; the weight of noise prediction tends to
    1 at SNR 0. Debiased estimation is that of Yu et al., 2023, https://arxiv.org/abs/2310.08442.
    """

    target: Callable  # (noise_scheduler, latents, noise, timesteps) -> target
    clean: Callable  # (noisy_latents, model_pred, signal, noise) -> clean latents; signal and noise are scale factors
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
    """The noise schedule and the prediction type that a model is trained with."""

    def __init__(self, noise_scheduler: Any):
        self.noise_scheduler, self.config = noise_scheduler, noise_scheduler.config
        self.num_train_timesteps = noise_scheduler.config.num_train_timesteps
        self.prediction = PREDICTIONS[noise_scheduler.config.prediction_type]

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.noise_scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the target (N, C, H, W) of the model's prediction."""
        return self.prediction.target(self.noise_scheduler, latents, noise, timesteps)

    def describe_schedule(self) -> list[float]:
        """Returns the share of the signal that is left, at about ten timesteps, rounded."""
        left = self.noise_scheduler.alphas_cumprod.sqrt().tolist()
        return [round(value, 4) for value in (*left[:: max(1, len(left) // 10)], left[-1])]

    def clean_estimate(
        self, noisy_latents: torch.Tensor, model_pred: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Returns the clean latents (N, C, H, W), float32, according to a prediction."""
        alpha_bar = self.noise_scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
        signal, noise = alpha_bar.view(-1, 1, 1, 1).sqrt(), (1 - alpha_bar.view(-1, 1, 1, 1)).sqrt()
        return self.prediction.clean(noisy_latents.float(), model_pred.float(), signal, noise)

    def weights(self, timesteps: torch.Tensor, loss: LossSettings) -> torch.Tensor:
        """Returns the loss weight of each timestep, float32 (N,)."""
        if loss.snr_gamma is None and not loss.debiased_estimation:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = snr_of(self.noise_scheduler.alphas_cumprod, timesteps)
        if loss.debiased_estimation:
            return self.prediction.debiased_weights(snr.clamp(1e-3, 1e3))
        return self.prediction.min_snr_weights(snr, loss.snr_gamma)


def scheduled_huber_c(loss: LossSettings, timesteps: torch.Tensor, num_train_timesteps: int) -> torch.Tensor | None:
    """Returns the width (N,) of the Huber loss, which falls from 1 to `huber_c` with the timestep; None for other losses.

    The schedule is the exponential one of Khrapov et al., 2024, https://arxiv.org/abs/2403.16728.
    """
    if loss.loss_type != "huber":
        return None
    return torch.exp(math.log(loss.huber_c) * timesteps.float() / num_train_timesteps)


def loss_of_samples(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    huber_c: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the mean loss, float32 (N,), of predictions and targets (N, C, H, W).

    A `mask` (N, 1, H, W) from 0 to 1 contains the weights of the mean, so that the size of a subject does not matter. With
    `huber_c` (N,), the squared error is replaced by the pseudo-Huber loss 2c (sqrt(error^2 + c^2) - c).
    """
    error = (model_pred.float() - target.float()).square()
    if huber_c is not None:
        c = huber_c[:, None, None, None]
        error = 2 * c * error / ((error + c.square()).sqrt() + c)  # the formula above, without cancellation
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    return (mask * error).mean(dim=(1, 2, 3)) / mask.mean(dim=(1, 2, 3)).clamp(min=1e-6)


def losses_by_name(
    batch: dict[str, Any], model_pred: torch.Tensor, target: torch.Tensor, huber_c: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Returns {"loss_for_NAME": unweighted loss of the sample} for a batch with "names"."""
    losses = loss_of_samples(model_pred.detach(), target, batch.get("mask"), huber_c)
    return {f"loss_for_{name}": loss for name, loss in zip(batch["names"], losses, strict=True)}


def diffusion_loss(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor | None = None,
    huber_c: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the sum of the losses from `loss_of_samples` times the `weights` (N,).

    The weights contain the normalization: summed over micro-batches and averaged over ranks, this is the mean loss of the
    effective batch.
    """
    return (loss_of_samples(model_pred, target, mask, huber_c) * weights).sum()

"""The training objective as pure tensor functions: noise in, weighted loss out."""

import torch
import torch.nn.functional as F


def snr_of(alphas_cumprod, timesteps):
    """Signal-to-noise ratio of each timestep, float32 (N,): alpha_bar / (1 - alpha_bar)."""
    alpha_bar = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(snr, snr_gamma, prediction_type):
    """Loss weights of Min-SNR (Hang et al., 2023, https://arxiv.org/abs/2303.09556), float32 (N,).

    For noise prediction min(SNR, gamma) / SNR, whose limit at SNR 0 is 1; for v-prediction min(SNR, gamma) / (SNR + 1).
    """
    if prediction_type == "v_prediction":
        return snr.clamp(max=snr_gamma) / (snr + 1)
    return snr_gamma / snr.clamp(min=snr_gamma)


def target_of(noise_scheduler, latents, noise, timesteps):
    """What the model is to predict: the noise, or the velocity (Salimans and Ho, 2022, arXiv:2202.00512)."""
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return noise


def loss_of_samples(model_pred, target, mask=None):
    """Mean squared error of each sample, float32 (N,), of shapes (N, C, H, W).

    A `mask` (N, 1, H, W) from 0 to 1 makes it a mean that is weighted by it: what it hides counts nothing, and a picture
    with a small subject as much as any other.
    """
    error = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    return (mask * error).mean(dim=(1, 2, 3)) / mask.mean(dim=(1, 2, 3)).clamp(min=1e-6)


def diffusion_loss(model_pred, target, weights, mask=None):
    """Sum over the samples of weight x loss; weights (N,), the rest as in `loss_of_samples`.

    The caller's weights carry the normalisation, so that the sums of all micro-batches and ranks add up to the mean
    over the effective batch.
    """
    return (loss_of_samples(model_pred, target, mask) * weights).sum()

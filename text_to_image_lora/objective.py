"""The training objective as pure tensor functions: noise in, weighted loss out."""

import math

import torch


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


def debiased_weights(snr, prediction_type):
    """Loss weights that count noisy timesteps more (Yu et al., 2023, https://arxiv.org/abs/2310.08442), float32 (N,).

    1 / sqrt(SNR) for noise prediction, and 1 / (SNR + 1) for v-prediction, with the SNR from 1e-3 to 1e3.
    """
    snr = snr.clamp(1e-3, 1e3)
    return 1 / (snr + 1) if prediction_type == "v_prediction" else snr.rsqrt()


def timestep_weights(noise_scheduler, timesteps, *, snr_gamma=None, debiased=False):
    """How much each sample's loss counts by its timestep, float32 (N,): one of the two above, or all alike."""
    if snr_gamma is None and not debiased:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr, predicted = snr_of(noise_scheduler.alphas_cumprod, timesteps), noise_scheduler.config.prediction_type
    return debiased_weights(snr, predicted) if debiased else min_snr_weights(snr, snr_gamma, predicted)


def scheduled_huber_c(huber_c, timesteps, num_train_timesteps):
    """The width of the Huber loss at each timestep (N,): from 1 at the first, falling to `huber_c` at the last.

    The exponential schedule of Khrapov et al., 2024, https://arxiv.org/abs/2403.16728.
    """
    return torch.exp(math.log(huber_c) * timesteps.float() / num_train_timesteps)


def target_of(noise_scheduler, latents, noise, timesteps):
    """What the model is to predict: the noise, or the velocity (Salimans and Ho, 2022, arXiv:2202.00512)."""
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return noise


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


def diffusion_loss(model_pred, target, weights, mask=None, huber_c=None):
    """Sum over the samples of weight x loss; weights (N,), the rest as in `loss_of_samples`.

    The caller's weights carry the normalisation, so that the sums of all micro-batches and ranks add up to the mean
    over the effective batch.
    """
    return (loss_of_samples(model_pred, target, mask, huber_c) * weights).sum()

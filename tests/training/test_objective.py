"""The formulas of the objective, compared with plain float64 code and with the scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from text_to_image_lora.training import objective
from text_to_image_lora.training.objective import PREDICTIONS, Diffusion
from text_to_image_lora.training.objective_settings import LossSettings


SCHEDULES = [
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon"),
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"),
    dict(beta_schedule="linear", prediction_type="epsilon"),
    dict(beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True),
]


@pytest.fixture(params=SCHEDULES)
def noise_scheduler(request):
    return DDPMScheduler(num_train_timesteps=1000, **request.param)


def reference_weight(alpha_bar, snr_gamma, prediction_type):
    """Computes the weight of Section 3.4 of Min-SNR (arXiv:2303.09556) for one timestep."""
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "v_prediction":
        return min(snr, snr_gamma) / (snr + 1)
    return min(snr, snr_gamma) / snr if snr > 0 else 1.0


@pytest.mark.parametrize("snr_gamma", [0.5, 5.0, 20.0])
def test_min_snr_weights(noise_scheduler, snr_gamma):
    weights = Diffusion(noise_scheduler).weights(torch.arange(1000), LossSettings(snr_gamma=snr_gamma))
    alphas, prediction_type = noise_scheduler.alphas_cumprod.double().tolist(), noise_scheduler.config.prediction_type
    expected = [reference_weight(alpha_bar, snr_gamma, prediction_type) for alpha_bar in alphas]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32), rtol=1e-3, atol=1e-7)


def test_the_weights_hold_at_no_signal_and_at_no_noise():
    snr = torch.tensor([0.0, 1e-38, 1e-20, 1e20, torch.inf])
    for prediction_type, expected in (("epsilon", [1, 1, 1, 5e-20, 0]), ("v_prediction", [0, 0, 0, 5e-20, 0])):
        weights = PREDICTIONS[prediction_type].min_snr_weights(snr, 5.0)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-19)


def test_zero_terminal_snr_is_used():
    """Fault 7: the last timestep of the rescaled schedule has no signal, and its loss is finite."""
    diffusion = Diffusion(DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))
    timesteps = torch.tensor([998, 999])
    snr = objective.snr_of(diffusion.noise_scheduler.alphas_cumprod, timesteps)
    assert snr[1] == 0 < snr[0]
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(diffusion.add_noise(latents, noise, timesteps)[1], noise[1])
    target, weights = (
        diffusion.target(latents, noise, timesteps),
        diffusion.weights(timesteps, LossSettings(snr_gamma=5.0)),
    )
    assert objective.diffusion_loss(torch.zeros_like(target), target, weights).isfinite()


def test_the_target_is_the_schedulers(noise_scheduler):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    target = Diffusion(noise_scheduler).target(latents, noise, timesteps)
    if noise_scheduler.config.prediction_type == "epsilon":
        assert torch.equal(target, noise)
        return
    assert torch.equal(target, noise_scheduler.get_velocity(latents, noise, timesteps))
    # The target as prediction gives the clean latents: x0 = sqrt(a) x - sqrt(1-a) v.
    alpha_bar = noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    clean = alpha_bar.sqrt() * noisy_latents - (1 - alpha_bar).sqrt() * target
    torch.testing.assert_close(clean, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_true_prediction_stands_for_the_true_latents(prediction_type):
    diffusion = Diffusion(DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type))
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([10, 500, 990])
    target, noisy_latents = (part(clean, noise, timesteps) for part in (diffusion.target, diffusion.add_noise))
    found = diffusion.clean_estimate(noisy_latents, target, timesteps)
    torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-4)


@given(
    weights=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    seed=st.integers(0, 100),
)
@settings(max_examples=50, deadline=None)
def test_the_loss_is_the_same_however_the_batch_is_cut(weights, cuts, seed):
    weights = torch.tensor(weights)
    generator = torch.Generator().manual_seed(seed)
    model_pred, target = torch.randn(2, len(weights), 4, 3, 3, generator=generator)
    errors = ((model_pred.double() - target.double()) ** 2).mean(dim=(1, 2, 3))
    expected = (errors * weights.double()).sum().float()
    edges = [0, *sorted(min(cut, len(weights)) for cut in cuts), len(weights)]
    parts = [slice(*edge) for edge in zip(edges, edges[1:])]
    losses = [objective.diffusion_loss(model_pred[part], target[part], weights[part]) for part in parts]
    torch.testing.assert_close(sum(losses), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_with_equal_weights_and_leaves_fillers_out():
    generator = torch.Generator().manual_seed(0)
    model_pred, target = torch.randn(2, 5, 4, 8, 8, generator=generator)
    mean = torch.nn.functional.mse_loss(model_pred, target)
    torch.testing.assert_close(objective.diffusion_loss(model_pred, target, torch.full((5,), 1 / 5)), mean)
    three = objective.diffusion_loss(model_pred, target, torch.tensor([1, 1, 1, 0, 0]) / 3)
    torch.testing.assert_close(three, torch.nn.functional.mse_loss(model_pred[:3], target[:3]))


def test_half_precision_predictions_are_compared_in_float32():
    model_pred = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)  # its square is beyond float16
    loss = objective.diffusion_loss(model_pred, torch.zeros_like(model_pred), torch.ones(1))
    assert loss.dtype == torch.float32
    assert loss == 90000


@pytest.mark.parametrize("huber_c", [0.01, 0.1, 1.0])
def test_huber(huber_c):
    """Compares it with the formula in float64; it is the squared error near the target and linear far off."""
    timesteps = torch.tensor([0, 500, 1000])
    c = objective.scheduled_huber_c(LossSettings(loss_type="huber", huber_c=huber_c), timesteps, 1000)
    assert c.tolist() == pytest.approx([1, huber_c**0.5, huber_c])
    model_pred, target = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    losses = objective.loss_of_samples(model_pred, target, huber_c=c)
    for i, width in enumerate(c.tolist()):
        pairs = zip(model_pred[i].flatten().tolist(), target[i].flatten().tolist())
        each = [2 * width * (((a - b) ** 2 + width**2) ** 0.5 - width) for a, b in pairs]
        assert losses[i].item() == pytest.approx(sum(each) / len(each), rel=1e-5)
    close, far = torch.full((1, 1, 1, 1), 1e-3), torch.full((1, 1, 1, 1), 1e3)
    zero, width = torch.zeros(1, 1, 1, 1), torch.tensor([1.0])
    assert objective.loss_of_samples(close, zero, huber_c=width).item() == pytest.approx(1e-6, rel=0.1)
    assert objective.loss_of_samples(far, zero, huber_c=width).item() == pytest.approx(2e3, rel=1e-2)
    assert objective.loss_of_samples(zero, zero, huber_c=width).item() == 0


def test_debiased_weights(noise_scheduler):
    timesteps, kind = torch.arange(0, 1000, 37), noise_scheduler.config.prediction_type
    snr = objective.snr_of(noise_scheduler.alphas_cumprod, timesteps)
    weights = Diffusion(noise_scheduler).weights(timesteps, LossSettings(debiased_estimation=True))
    for value, weight in zip(snr.double().tolist(), weights.tolist(), strict=True):
        value = min(max(value, 1e-3), 1e3)
        assert weight == pytest.approx(1 / (value + 1) if kind == "v_prediction" else value**-0.5, rel=1e-4)
    assert weights.isfinite().all()


def test_a_masked_loss_is_a_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    mask, weights = torch.rand(3, 1, 8, 8, generator=generator), torch.tensor([0.2, 0.3, 0.5])
    expected = sum(
        w * float((m * (p - t).square()).double().sum() / (4 * m.double().sum()))
        for w, m, p, t in zip(weights.tolist(), mask, pred, target, strict=True)
    )
    assert float(objective.diffusion_loss(pred, target, weights, mask)) == pytest.approx(expected, rel=1e-5)
    ones = torch.ones_like(mask)
    assert torch.equal(
        objective.diffusion_loss(pred, target, weights, ones), objective.diffusion_loss(pred, target, weights)
    )
    # Masked areas have no gradient, and a fully masked picture gives no NaN.
    pred.requires_grad_(True)
    mask[0], mask[1, :, :, 4:] = 0, 0
    objective.diffusion_loss(pred, target, weights, mask).backward()
    assert (pred.grad[0] == 0).all()
    assert (pred.grad[1, :, :, 4:] == 0).all()
    assert (pred.grad[1, :, :, :4] != 0).any()

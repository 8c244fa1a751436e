"""Samplers are configured from the base model's scheduler and from how the denoiser was trained."""

import inspect

import diffusers
import pytest
import torch

from text_to_image_lora.models.samplers import NO_ZERO_SNR, SAMPLERS, make_sampler


LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
PNDM = LINEAR | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("own", "name", "zero_snr", "expected"),
    [
        ("PNDMScheduler", None, False, "DPMSolverMultistepScheduler"),
        ("PNDMScheduler", "pndm", False, "PNDMScheduler"),
        ("PNDMScheduler", None, True, "DDIMScheduler"),
        ("EulerDiscreteScheduler", None, False, "EulerDiscreteScheduler"),
        ("EulerDiscreteScheduler", None, True, "DDIMScheduler"),
        ("EulerDiscreteScheduler", "lcm", False, "LCMScheduler"),
        ("NotYetKnownScheduler", None, False, "DPMSolverMultistepScheduler"),
    ],
)
def test_which_sampler(own, name, zero_snr, expected):
    sampler = make_sampler(PNDM | {"_class_name": own}, name, prediction_type="v_prediction", zero_snr=zero_snr)
    assert type(sampler).__name__ == expected
    assert sampler.config.prediction_type == "v_prediction"
    assert sampler.config.beta_end == 0.012
    assert (sampler.config.get("timestep_spacing") == "trailing") == zero_snr
    assert make_sampler(PNDM | {"_class_name": own}, name).config.prediction_type == "epsilon"


def test_zero_terminal_snr_starts_at_the_last_timestep():
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, (scheduler, *_) in SAMPLERS.items():
        can = "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, scheduler)).parameters
        assert can == (name not in NO_ZERO_SNR), name
        if can:
            sampler = make_sampler(PNDM, name, prediction_type="v_prediction", zero_snr=True)
            sampler.set_timesteps(3)
            assert sampler.timesteps[0] == 999, name
            sample = latents * sampler.init_noise_sigma
            for timestep in sampler.timesteps:
                prediction = sampler.scale_model_input(sample, timestep)
                sample = sampler.step(prediction, timestep, sample).prev_sample
            assert sample.isfinite().all(), name


def test_no_sampler_clips_latents():
    """DDIM and DDPM would clip latents at 1 unless their config disables it; latents reach 4."""
    settings = {key: value for key, value in PNDM.items() if key != "clip_sample"}
    for name in SAMPLERS:
        assert not make_sampler(settings, name).config.get("clip_sample"), name


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_most_steps_of_a_sampler_give_numbers(name):
    """With one more, some samplers raise an error, and others give NaN at their second step."""
    config = PNDM | {"steps_offset": 1, "timestep_spacing": "leading"}

    def begins(steps):
        sampler = make_sampler(config, name)
        try:
            sampler.set_timesteps(steps)
            x = torch.ones(1, 1, 1, 1)
            for t in [*sampler.timesteps[:3]]:
                x = sampler.step(x, t, sampler.scale_model_input(x, t)).prev_sample
        except (ValueError, IndexError):
            return False
        return bool(x.isfinite().all())

    most = SAMPLERS[name].max_steps
    assert begins(most)
    assert most == 1000 or not begins(most + 1)

"""The noise scheduler of training, and the samplers that draw pictures, by the names that --scheduler accepts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import reason_of
from ..small_files import AGAIN


class Sampler(NamedTuple):
    """A scheduler of diffusers and how it is configured."""

    scheduler: str  # the name of its class in diffusers
    changes: dict[str, Any]  # overrides of the base model's scheduler configuration
    name_in_a1111: str
    max_steps: int = 1000  # with more, diffusers raises an error or draws NaN, for the usual `steps_offset` of 1


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", {"clip_sample": False}, "DDIM", 999),
    "ddpm": Sampler("DDPMScheduler", {"clip_sample": False}, "DDPM", 999),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}, "PLMS", 999),
    "euler": Sampler("EulerDiscreteScheduler", {}, "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", {}, "Heun"),
    "dpm++": Sampler("DPMSolverMultistepScheduler", {}, "DPM++ 2M", 998),
    "dpm++_karras": Sampler("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
    "unipc": Sampler("UniPCMultistepScheduler", {}, "UniPC", 998),
    "lcm": Sampler("LCMScheduler", {}, "LCM", 50),
}
NO_ZERO_SNR = ("pndm", "heun")  # these schedulers of diffusers cannot start at zero terminal SNR


def make_sampler(
    scheduler_config: Mapping[str, Any],
    name: str | None = None,
    *,
    prediction_type: str | None = None,
    zero_snr: bool = False,
) -> Any:
    """Creates the scheduler of diffusers that draws pictures.

    By default it is the base model's scheduler, with two exceptions: DPM++ 2M (Lu et al., 2022, arXiv:2211.01095) replaces
    PNDM, which overshoots in 30 steps at strong guidance, and DDIM is used for zero terminal SNR.

    Args:
        scheduler_config: The configuration of the base model's scheduler, including its `_class_name`.
        name: A key of `SAMPLERS`, which overrides the default scheduler.
        prediction_type: What the denoiser predicts, if this differs from the configuration.
        zero_snr: Whether the denoiser was trained with zero terminal SNR. Sampling must then start at the last timestep
            (Lin et al., 2023, arXiv:2305.08891).
    """
    import diffusers

    own = scheduler_config.get("_class_name", "")
    is_scheduler = isinstance(getattr(diffusers, own, None), type) and hasattr(
        getattr(diffusers, own), "set_timesteps"
    )
    own = own if is_scheduler else "PNDMScheduler"
    if name is None and zero_snr:
        name = "ddim"
    elif name is None and own == "PNDMScheduler":
        name = "dpm++"
    sampler = Sampler(own, {}, "") if name is None else SAMPLERS[name]
    changes = sampler.changes | ({} if prediction_type is None else {"prediction_type": prediction_type})
    if zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    return getattr(diffusers, sampler.scheduler).from_config(scheduler_config, **changes)


def make_noise_scheduler(
    scheduler_config: dict[str, Any], *, prediction_type: str | None = None, rescale_betas_zero_snr: bool = False
) -> Any:
    """Makes the noise scheduler (DDPM) for training; zero terminal SNR is that of Lin et al., 2023 (arXiv:2305.08891).

    The rescaling is part of the scheduler's configuration, so it affects everything computed from `alphas_cumprod`.
    """
    import diffusers

    kind = scheduler_config.get("_class_name", "")
    if "beta_schedule" not in scheduler_config and kind.startswith(("EDM", "FlowMatch")):
        raise InputError(f"The base model's scheduler is a {kind}, a kind of diffusion that can't be trained here.")
    changes: dict[str, Any] = {"prediction_type": prediction_type} if prediction_type is not None else {}
    if rescale_betas_zero_snr:
        changes["rescale_betas_zero_snr"] = True
    try:
        noise_scheduler: Any = diffusers.DDPMScheduler.from_config(scheduler_config, **changes)
    except Exception as error:  # the scheduler raises many kinds of exceptions for unusable values
        raise InputError(f"The base model's scheduler can't be used ({reason_of(error)}). {AGAIN}") from error
    config = noise_scheduler.config
    if not bool(noise_scheduler.alphas_cumprod.isfinite().all()):
        raise InputError(f"The base model's noise schedule is not finite. {AGAIN}")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"--prediction_type {config.prediction_type}: choose epsilon or v_prediction.")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise InputError(
            "--rescale_betas_zero_snr needs --prediction_type v_prediction: at zero SNR, the noise contains no information "
            "about the picture."
        )
    return noise_scheduler

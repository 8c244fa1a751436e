"""The samplers that pictures are drawn with, by the names of their flag."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Sampler(NamedTuple):
    """A sampler of diffusers."""

    scheduler: str  # its class in diffusers
    changes: dict[str, Any]  # what differs from the base model's own configuration
    name_in_a1111: str


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", {"clip_sample": False}, "DDIM"),
    "ddpm": Sampler("DDPMScheduler", {"clip_sample": False}, "DDPM"),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
    "euler": Sampler("EulerDiscreteScheduler", {}, "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", {}, "Heun"),
    "dpm++": Sampler("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
    "dpm++_karras": Sampler("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
    "unipc": Sampler("UniPCMultistepScheduler", {}, "UniPC"),
    "lcm": Sampler("LCMScheduler", {}, "LCM"),
}
NO_ZERO_SNR = ("pndm", "heun")  # samplers that diffusers can't start at zero signal


def make_sampler(
    scheduler_config: Mapping[str, Any],
    name: str | None = None,
    *,
    prediction_type: str | None = None,
    zero_snr: bool = False,
) -> Any:
    """The scheduler of diffusers that pictures are drawn with.

    The sampler is the base model's own, but DPM++ 2M (Lu et al., 2022, arXiv:2211.01095) instead of PNDM, which in 30
    steps overshoots at strong guidance, and DDIM for zero terminal SNR.

    Args:
        scheduler_config: The configuration of the base model's own scheduler, with its `_class_name`.
        name: A sampler of `SAMPLERS`, instead of that.
        prediction_type: What the denoiser predicts, if it was trained otherwise than the configuration says.
        zero_snr: Whether the denoiser was trained at zero terminal SNR: sampling must then start at the last timestep
            (Lin et al., 2023, arXiv:2305.08891).
    """
    import diffusers

    own = scheduler_config.get("_class_name", "")
    own = own if hasattr(diffusers, own) else "PNDMScheduler"
    if name is None and zero_snr:
        name = "ddim"
    elif name is None and own == "PNDMScheduler":
        name = "dpm++"
    sampler = Sampler(own, {}, "") if name is None else SAMPLERS[name]
    changes = sampler.changes | ({} if prediction_type is None else {"prediction_type": prediction_type})
    if zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    return getattr(diffusers, sampler.scheduler).from_config(scheduler_config, **changes)

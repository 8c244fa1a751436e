"""The samplers that pictures are drawn with, by the names of their flag."""

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

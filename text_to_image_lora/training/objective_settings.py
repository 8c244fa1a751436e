"""The flags of the objective: loss, preservation and timesteps. Does not import torch."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..command_line import (
    above,
    above_up_to,
    at_least,
    between,
    count,
    flag,
)
from ..config_file import Conflict, Remark
from ..errors import InputError


GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
PERCEPTUAL_WEIGHTS = {"decoder": 0.1, "self": 0.01}  # docs/findings.md


@dataclass(frozen=True)
class LossSettings:
    """The loss."""

    title: ClassVar = "loss"
    conflicts: ClassVar = (
        Conflict(
            "perceptual_loss", "compile",
            "--perceptual_loss self can't be combined with --compile, which hides the features inside the UNet. Leave one of "
            "them out.",
            lambda flags: flags["perceptual_loss"] == "self" and flags["compile"] != "off",
        ),
        Conflict(
            "snr_gamma", "debiased_estimation",
            "Pass one of --snr_gamma and --debiased_estimation: both weight the loss by the timestep.",
        ),
    )  # fmt: skip
    remarks: ClassVar = (
        Remark("huber_c", "has no effect without --loss_type huber", lambda flags: flags["loss_type"] != "huber"),
        Remark(
            "perceptual_loss_weight", "has no effect without --perceptual_loss",
            lambda flags: flags["perceptual_loss"] is None,
        ),
        Remark(
            "perceptual_max_timestep", "has no effect without --perceptual_loss decoder",
            lambda flags: flags["perceptual_loss"] != "decoder",
        ),
    )  # fmt: skip
    # fmt: off
    loss_type: str = flag("mse", "mse: mean squared error; huber: pseudo-Huber loss with a schedule, for datasets that contain bad pictures or captions", choices=["mse", "huber"])
    huber_c: float = flag(0.1, "width of --loss_type huber at the noisiest timestep", above(0))
    snr_gamma: float | None = flag(None, "gamma of Min-SNR loss weighting; 5.0 is usual (default: no Min-SNR weighting)", above(0))
    debiased_estimation: bool = flag(False, "weight the loss by 1 / sqrt(SNR), so that noisy timesteps count more")
    perceptual_loss: str | None = flag(None, "add a loss on features of the VAE's decoder (which then stays in memory) or of the base model itself; needs no further network", choices=["decoder", "self"])
    perceptual_loss_weight: float | None = flag(None, "weight of the perceptual loss (default: 0.1 for decoder, 0.01 for self)", at_least(0))
    perceptual_max_timestep: int = flag(400, "--perceptual_loss decoder is only used at timesteps below this one, at which pictures are not yet lost in noise", count(1))
    noise_offset: float = flag(0.0, "scale of additional noise that is constant over each channel", at_least(0))
    input_perturbation: float = flag(0.0, "scale of noise that is only added to the model's input; 0.1 is usual", at_least(0))
    # fmt: on

    @property
    def perceptual_weight(self) -> Any:
        """The weight of the perceptual loss, or None without one."""
        given = self.perceptual_loss_weight
        return PERCEPTUAL_WEIGHTS.get(self.perceptual_loss or "") if given is None else given


@dataclass(frozen=True)
class PreservationSettings:
    """Preservation of how the base model draws prompts without the concept."""

    title: ClassVar = "preservation"
    # With --preservation none on the command line, the phrases of a recipe are ignored where nothing else needs them.
    conflicts: ClassVar = tuple(
        Conflict("preservation", name, clash=lambda flags: not _needs_concept(flags), one_way=True)
        for name in ("concept_phrases", "preservation_prompt")
    )
    remarks: ClassVar = tuple(
        Remark(name, "has no effect without --preservation", lambda flags: flags["preservation"] == "none")
        for name in ("preservation_weight", "preservation_share")
    )
    # fmt: off
    preservation: str = flag("none", "output: train some samples a second time under their caption without the concept, with the base model's own prediction as the target, so that prompts without the concept are drawn as by the base model", choices=["none", "output"])
    preservation_weight: float = flag(1.0, "weight of the preservation loss; the diffusion loss has weight 1", above(0))
    preservation_share: float = flag(0.25, "proportion of the samples that are trained a second time; a smaller one is faster", above_up_to(0, 1))
    concept_phrases: tuple[str, ...] = flag((), "phrases that name the concept in captions and are left out for --preservation, to measure the drift, and for the prompts of --num_class_images, such as 'with pink blossoms' (default: --trigger_word, or the trigger of folders named [trigger]_[class])", nargs="+", metavar="TEXT")
    preservation_prompt: str | None = flag(None, "caption without the concept for --preservation and the drift, in which {caption} stands for the caption without --concept_phrases (default: {caption}, and --class_prompt or the empty caption for captions without a phrase)", metavar="TEXT")
    # fmt: on

    @property
    def preserves(self) -> bool:
        return self.preservation != "none"

    @property
    def share(self) -> float:
        return self.preservation_share if self.preserves else 0.0

    @property
    def sample_weight(self) -> float:
        """The weight of a preserved sample; a sample of the diffusion loss has weight 1."""
        return self.preservation_weight / self.preservation_share

    def includes(self, number: int) -> bool:
        """Whether sample `number` of the run is preserved.

        The multiples of the golden ratio modulo 1 are spread evenly, also among every second or fourth number. So batches
        and processes have almost equal numbers of preserved samples.
        """
        return number * GOLDEN_RATIO % 1 < self.share

    def most(self, count: int) -> int:
        """Returns the largest number of preserved samples among `count` samples."""
        return min(count, math.ceil(count * self.share) + 1) if self.share else 0

    def check(self, settings):
        validates = settings.validation.validates
        if not self.preserves and self.preservation_prompt is not None and not validates:
            raise InputError(
                "--preservation_prompt is only used for --preservation, and to measure the drift of validated runs: add "
                "--preservation output or --validation_split 0.1."
            )
        used = validates or settings.class_pictures.from_captions
        if not self.preserves and self.concept_phrases and not used:
            raise InputError(
                "--concept_phrases is only used for --preservation, for --num_class_images without --class_prompt, and to "
                "measure the drift of validated runs: add --preservation output or --validation_split 0.1."
            )
        if any(not phrase.strip() for phrase in self.concept_phrases):
            raise InputError("--concept_phrases contains an empty text: write the words that name the concept.")


def _needs_concept(flags):
    """Whether a run with these flags has to know what names the concept in captions."""
    validates = flags["validation_split"] or flags["validation_data_dir"]
    return flags["preservation"] != "none" or validates or flags["num_class_images"]


NO_PRESERVATION = PreservationSettings()


@dataclass(frozen=True)
class TimestepSettings:
    """The prediction type and the sampling of timesteps."""

    title: ClassVar = "timesteps"
    remarks: ClassVar = tuple(
        Remark(
            name, f"has no effect without --timestep_sampling {scheme}",
            lambda flags, scheme=scheme: flags["timestep_sampling"] != scheme,
        )
        for name, scheme in {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}.items()
    )  # fmt: skip
    # fmt: off
    prediction_type: str | None = flag(None, "what the model predicts (default: that of the base model)", choices=["epsilon", "v_prediction"])
    rescale_betas_zero_snr: bool = flag(False, "rescale the noise schedule so that the last timestep is pure noise (zero terminal SNR); needs v_prediction")
    timestep_sampling: str = flag("uniform", "distribution of the timesteps, as in diffusers' compute_density_for_timestep_sampling", choices=["uniform", "logit_normal", "mode"])
    timestep_range: tuple[int, int] | None = flag(None, "train only on this range of timesteps, from 0 (clean) to 1000 (noise)", int, nargs=2, metavar=("FIRST", "LAST"))
    logit_mean: float = flag(0.0, "mean of --timestep_sampling logit_normal; negative values prefer noisier timesteps", between(-100, 100))
    logit_std: float = flag(1.0, "standard deviation of --timestep_sampling logit_normal", above(0))
    mode_scale: float = flag(1.29, "scale of --timestep_sampling mode; positive values prefer the middle timesteps", between(-1, 1.75))
    # fmt: on

    @property
    def is_uniform(self) -> bool:
        """Whether all timesteps are equally likely."""
        return self.timestep_sampling == "uniform" and self.timestep_range is None

    def draw(self, generator: Any, num_train_timesteps: int) -> int:
        """Draws a timestep from the range that is trained on.

        The schemes are those of diffusers (Esser et al., 2024, https://arxiv.org/abs/2403.03206), in which a negative
        `logit_mean` prefers noisy timesteps.
        """
        import torch

        if self.timestep_sampling == "uniform":
            share = torch.rand((), generator=generator).item()
        else:
            from diffusers.training_utils import compute_density_for_timestep_sampling

            density = compute_density_for_timestep_sampling(
                self.timestep_sampling, 1, self.logit_mean, self.logit_std, self.mode_scale, generator=generator
            )
            share = 1 - density.item()
        first, last = self.timestep_range or (0, num_train_timesteps)
        last = min(last, num_train_timesteps)
        return max(first, min(first + int(share * (last - first)), last - 1))

    def check(self, settings):
        if self.timestep_range is not None and not 0 <= self.timestep_range[0] < self.timestep_range[1] <= 1000:
            given = " ".join(map(str, self.timestep_range))
            raise InputError(f"--timestep_range {given}: write two numbers from 0 to 1000, the smaller one first.")

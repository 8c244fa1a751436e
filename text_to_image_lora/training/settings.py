"""The flags of a training run. Does not import torch."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..command_line import (
    COMPATIBILITY,
    above,
    above_up_to,
    at_least,
    between,
    duration,
    flag,
    from_up_to,
    to_seconds,
    user_path,
)
from ..config_file import Conflict, Remark
from ..errors import InputError
from ..files import counted
from ..models.compiling import OPTIONS as COMPILED
from .optimizers import OPTIMIZERS, check_optimizer


ENDLESS_VARIATIONS_CACHED = 4
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
WITHOUT_WARMUP = ("constant", "piecewise_constant")  # schedules of diffusers
PERCEPTUAL_WEIGHTS = {"decoder": 0.1, "self": 0.01}  # docs/findings.md


def _is_prodigy(flags):
    return flags["optimizer"] == "prodigy"


@dataclass(frozen=True)
class RunSettings:
    """The output folder, the seed and the time limit of the run."""

    title: ClassVar = "run"
    # fmt: off
    config: str | None = flag(None, "YAML file with flags, one per line; flags on the command line override it (each run saves its flags as run.yaml)", user_path, metavar="FILE", may_change=True, recorded=False)
    output_dir: str = flag("sd-model-finetuned-lora", "folder for the LoRA, checkpoints, sample pictures and metrics", user_path, may_change=True)
    seed: int | None = flag(None, "random seed, for reproducible runs (default: drawn at random and saved in run.yaml)", between(0, 2**63 - 1, int))
    max_train_time: str | None = flag(None, "maximum time for the whole command, such as 3h50m; the run stops early enough, with a checkpoint and exit code 75", duration, metavar="TIME", may_change=True)
    num_cpu_threads: int | None = flag(None, "number of threads for computing on a CPU (default: OMP_NUM_THREADS, or else the number of physical cores that are not busy, divided by the processes)", at_least(1), may_change=True)
    local_rank: int = flag(-1, "set by the launcher; not for users", int, may_change=True, recorded=False, title=COMPATIBILITY)
    # fmt: on

    @property
    def max_seconds(self) -> int | None:
        return to_seconds(self.max_train_time)


@dataclass(frozen=True)
class CacheSettings:
    """The cache of latents and prompt embeddings."""

    title: ClassVar = "cache"
    # fmt: off
    cache_variations: int | None = flag(None, "number of cached variations of each picture; 0: no cache, encode pictures in each step (default: 1, 2 with --random_flip, 4 with random crops and other augmentation)", at_least(0))
    latent_cache_dir: str = flag("~/.cache/text_to_image_lora", "folder in which latents and prompt embeddings are cached for later runs", metavar="FOLDER", may_change=True)
    latent_cache_limit: float | None = flag(None, "maximum size of --latent_cache_dir in GiB; the least recently used files are deleted, except those that this run needs (default: no limit)", above(0), metavar="GIB", may_change=True)
    # fmt: on

    @property
    def folder(self) -> Path:
        return Path(self.latent_cache_dir).expanduser()

    def num_variations(self, augmentation: Any) -> int:
        """Returns the number of cached variations of each picture; 0 if pictures are encoded in each step."""
        if self.cache_variations is not None:
            return self.cache_variations
        return augmentation.variations() or ENDLESS_VARIATIONS_CACHED


@dataclass(frozen=True)
class BatchSettings:
    """The batch size and the number of training steps."""

    title: ClassVar = "batches and length"
    conflicts: ClassVar = (
        Conflict("num_train_epochs", "max_train_steps", clash=lambda flags: flags["max_train_steps"] is not None),
    )
    # fmt: off
    train_batch_size: int | str = flag(16, "number of pictures per process and forward pass; auto: as many of the --gradient_accumulation_steps pictures of a step as fit in memory", at_least(1, word="auto"), may_change=True)
    gradient_accumulation_steps: int = flag(1, "number of forward passes per optimizer step", at_least(1), may_change=True)
    num_train_epochs: int = flag(100, "number of passes over the pictures", at_least(1), may_change=True)
    max_train_steps: int | None = flag(None, "total number of optimizer steps; overrides --num_train_epochs", at_least(1), may_change=True)
    dataloader_num_workers: int = flag(0, "number of processes that load data; useful with --cache_variations 0", at_least(0), may_change=True)
    # fmt: on

    @property
    def is_auto(self) -> bool:
        """Whether the batch size is chosen to fit in memory."""
        return self.train_batch_size == "auto"

    @property
    def batch_size(self) -> int:
        """Pictures per process and forward pass. With `auto` this is 1, until the sampler's batch size is set to what fits."""
        return 1 if self.is_auto else int(self.train_batch_size)

    def num_steps(self, steps_per_epoch: int) -> int:
        """Returns the total number of optimizer steps."""
        return self.max_train_steps or self.num_train_epochs * steps_per_epoch

    def describe_length(self, steps_per_epoch: int) -> str:
        """Describes the length of the run: "300 steps (6.25 epochs)"."""
        num_steps = self.num_steps(steps_per_epoch)
        epochs = round(num_steps / steps_per_epoch, 2)
        noun = "epoch" if epochs == 1 else "epochs"
        return f"{counted(num_steps, 'step')} ({epochs:,g} {noun})"

    def check(self, settings):
        if self.is_auto and self.gradient_accumulation_steps == 1:
            raise InputError(
                "--train_batch_size auto processes as many of a step's pictures at once as fit in memory. Pass the number of "
                "pictures per step as --gradient_accumulation_steps, such as 8."
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning rates."""

    title: ClassVar = "optimizer"
    conflicts: ClassVar = (
        Conflict(
            "use_8bit_adam", "optimizer", "Pass one of --use_8bit_adam and --optimizer {optimizer}.",
            lambda flags: flags["use_8bit_adam"] and flags["optimizer"] not in (None, "adamw8bit"),
        ),
        Conflict(
            "optimizer", "lr_scheduler",
            "--optimizer schedulefree can't be combined with --lr_scheduler {lr_scheduler}. Leave the scheduler out, or use "
            "another optimizer.",
            lambda flags: flags["optimizer"] == "schedulefree" and not flags["lr_scheduler"].startswith("constant"),
            one_way=True,
        ),
        # The learning rate in the file is meant for the optimizer in the file.
        Conflict("optimizer", "learning_rate", clash=_is_prodigy, one_way=True),
        *(
            Conflict(
                "optimizer", name, f"--optimizer prodigy {reason}. Leave --{name} out.",
                lambda flags, name=name: _is_prodigy(flags) and flags[name], one_way=True,
            )
            for name, reason in {
                "loraplus_lr_ratio": "has a single learning rate", "text_encoder_lr": "has a single learning rate",
                "scale_lr": "finds the learning rate itself",
            }.items()
        ),
    )  # fmt: skip
    remarks: ClassVar = (
        Remark(
            "learning_rate", "is a factor of the learning rate that --optimizer prodigy finds itself, and should be near 1: leave it out",
            lambda flags: _is_prodigy(flags) and not 0.1 <= flags["learning_rate"] <= 10,
        ),
        Remark("ema_decay", "has no effect without --use_ema", lambda flags: not flags["use_ema"]),
    )  # fmt: skip
    # fmt: off
    optimizer: str | None = flag(None, "optimizer (default: adamw)", choices=[*OPTIMIZERS])
    optimizer_args: tuple[str, ...] = flag((), "further options of the optimizer, such as d_coef=0.5", nargs="+", metavar="KEY=VALUE", may_change=True)
    learning_rate: float | None = flag(None, "learning rate after warmup (default: 1e-4, or 1 with --optimizer prodigy)", above(0), may_change=True)
    text_encoder_lr: float | None = flag(None, "learning rate of the text encoder's LoRA (default: --learning_rate)", above(0), may_change=True)
    loraplus_lr_ratio: float | None = flag(None, "LoRA+: ratio of the learning rate of the B matrices to that of the A matrices; 16 is usual", above(0), may_change=True)
    scale_lr: bool = flag(False, "multiply the learning rate by processes x accumulation steps x batch size", may_change=True)
    adam_beta1: float = flag(0.9, "decay rate of the optimizer's first moment", from_up_to(0, 1), may_change=True)
    adam_beta2: float = flag(0.999, "decay rate of the optimizer's second moment", from_up_to(0, 1), may_change=True)
    adam_weight_decay: float = flag(1e-2, "weight decay of the optimizer", at_least(0, float), may_change=True)
    adam_epsilon: float = flag(1e-8, "epsilon that the optimizer adds to its denominator", at_least(0, float), may_change=True)
    max_grad_norm: float = flag(1.0, "maximum gradient norm, for clipping; 0: no clipping", at_least(0, float), may_change=True)
    use_ema: bool = flag(False, "validate and save the exponential moving average of the LoRA's weights")
    ema_decay: float = flag(0.999, "maximum decay of the moving average of --use_ema, which rises to it from lower values", from_up_to(0, 1), may_change=True)
    use_8bit_adam: bool = flag(False, "equivalent to --optimizer adamw8bit", may_change=True, title=COMPATIBILITY)
    # fmt: on

    @property
    def name(self) -> str:
        """The key in `OPTIMIZERS`."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer or "adamw"

    @property
    def rate(self) -> float:
        """The learning rate, with the default for the optimizer."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.name == "prodigy" else 1e-4

    def scaled(self, effective_batch_size: int) -> "OptimizerSettings":
        """Returns these settings with --scale_lr applied to the learning rates."""
        if not self.scale_lr:
            return self
        text_encoder_lr = None if self.text_encoder_lr is None else effective_batch_size * self.text_encoder_lr
        rate = effective_batch_size * self.rate
        return dataclasses.replace(self, learning_rate=rate, text_encoder_lr=text_encoder_lr)

    def check(self, settings):
        check_optimizer(self.name, self.optimizer_args)


@dataclass(frozen=True)
class ScheduleSettings:
    """The schedule of the learning rate."""

    title: ClassVar = "learning rate schedule"
    conflicts: ClassVar = (
        Conflict("lr_warmup_steps", "lr_warmup_ratio", "Pass one of --lr_warmup_steps and --lr_warmup_ratio."),
    )
    remarks: ClassVar = (
        *(
            Remark(
                name, "has no effect with --lr_scheduler constant and piecewise_constant, which have no warmup; use "
                "constant_with_warmup or another scheduler",
                lambda flags, name=name: flags[name] and flags["lr_scheduler"] in WITHOUT_WARMUP,
            )
            for name in ("lr_warmup_steps", "lr_warmup_ratio")
        ),
        *(
            Remark(
                name, f"has no effect without --lr_scheduler {scheduler}",
                lambda flags, scheduler=scheduler: flags["lr_scheduler"] != scheduler,
            )
            for name, scheduler in {
                "lr_num_cycles": "cosine_with_restarts", "lr_power": "polynomial", "lr_step_rules": "piecewise_constant",
            }.items()
        ),
    )  # fmt: skip
    # fmt: off
    lr_scheduler: str = flag("constant", "schedule of the learning rate", choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant"], may_change=True)
    lr_warmup_steps: int | None = flag(None, "number of optimizer steps in which the learning rate rises from 0 (default: 500, but at most a tenth of the run)", at_least(0), may_change=True)
    lr_warmup_ratio: float | None = flag(None, "fraction of the run in which the learning rate rises from 0, instead of --lr_warmup_steps", between(0, 1), may_change=True)
    lr_num_cycles: int = flag(1, "number of cycles of --lr_scheduler cosine_with_restarts", at_least(1), may_change=True)
    lr_power: float = flag(1.0, "power of --lr_scheduler polynomial", at_least(0, float), may_change=True)
    lr_step_rules: str = flag("", "factors of --lr_scheduler piecewise_constant and the steps at which they end, such as 1:100,0.1:200,0.01", may_change=True)
    # fmt: on

    def num_warmup_steps(self, num_steps: int) -> int:
        """Returns the number of warmup steps; raises `InputError` if they leave none for a polynomial schedule."""
        if self.lr_warmup_ratio is not None:
            warmup_steps = round(self.lr_warmup_ratio * num_steps)
        elif self.lr_warmup_steps is not None:
            warmup_steps = self.lr_warmup_steps
        else:
            warmup_steps = min(500, num_steps // 10)
        if self.lr_scheduler == "polynomial" and warmup_steps >= num_steps:
            raise InputError(
                f"--lr_scheduler polynomial: {warmup_steps} of {num_steps} steps are warmup. Use fewer warmup steps."
            )
        return warmup_steps

    def describe_long_warmup(self, num_steps: int) -> str | None:
        """Returns a line about warmup that does not end before the run, or None."""
        warmup_steps = self.num_warmup_steps(num_steps)
        if self.lr_scheduler in WITHOUT_WARMUP or warmup_steps < num_steps:
            return None
        flag = "lr_warmup_steps" if self.lr_warmup_ratio is None else "lr_warmup_ratio"
        return (
            f"--{flag}: the warmup of {counted(warmup_steps, 'step')} does not end in the run of "
            f"{counted(num_steps, 'step')}, so the learning rate stays below --learning_rate; use fewer warmup steps"
        )

    def check_rate(self, learning_rate: float) -> None:
        """Raises `InputError` for a learning rate below that at which diffusers' polynomial schedule ends."""
        if self.lr_scheduler == "polynomial" and learning_rate <= 1e-7:
            raise InputError(
                f"--learning_rate {learning_rate}: --lr_scheduler polynomial ends at 1e-07. Pass a higher learning rate."
            )

    def check(self, settings):
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            raise InputError("--lr_scheduler piecewise_constant needs --lr_step_rules, such as 1:100,0.1:200,0.01.")
        factor = r"\d*\.?\d+(e[+-]?\d+)?"
        if not re.fullmatch(rf"({factor}:\d+,)*{factor}", self.lr_step_rules or "1"):
            raise InputError(
                f"--lr_step_rules {self.lr_step_rules}: write pairs factor:step and then the last factor, such as "
                "1:100,0.1:200,0.01."
            )
        if not settings.optimizer.scale_lr:
            self.check_rate(settings.optimizer.rate)


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
    perceptual_loss_weight: float | None = flag(None, "weight of the perceptual loss (default: 0.1 for decoder, 0.01 for self)", at_least(0, float))
    perceptual_max_timestep: int = flag(400, "--perceptual_loss decoder is only used at timesteps below this one, at which pictures are not yet lost in noise", at_least(1))
    noise_offset: float = flag(0.0, "scale of additional noise that is constant over each channel", at_least(0, float))
    input_perturbation: float = flag(0.0, "scale of noise that is only added to the model's input; 0.1 is usual", at_least(0, float))
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
    remarks: ClassVar = tuple(
        Remark(name, "has no effect without --preservation", lambda flags: flags["preservation"] is None)
        for name in ("preservation_weight", "preservation_share")
    )
    # fmt: off
    preservation: str | None = flag(None, "output: train some samples a second time under their caption without the concept, with the base model's own prediction as the target, so that prompts without the concept are drawn as by the base model", choices=["output"])
    preservation_weight: float = flag(1.0, "weight of the preservation loss; the diffusion loss has weight 1", above(0))
    preservation_share: float = flag(0.25, "proportion of the samples that are trained a second time; a smaller one is faster", above_up_to(0, 1))
    concept_phrases: tuple[str, ...] = flag((), "phrases that name the concept in captions and are left out for --preservation, such as 'with pink blossoms' (default: --trigger_word, or the trigger of folders named [trigger]_[class])", nargs="+", metavar="TEXT")
    preservation_prompt: str | None = flag(None, "caption without the concept for --preservation, in which {caption} stands for the caption without --concept_phrases (default: {caption}, and --class_prompt or the empty caption for captions without a phrase)", metavar="TEXT")
    # fmt: on

    @property
    def share(self) -> float:
        return 0.0 if self.preservation is None else self.preservation_share

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
        given = [name for name in ("concept_phrases", "preservation_prompt") if getattr(self, name) not in (None, ())]
        if self.preservation is None and given:
            raise InputError(f"--{given[0]} is only used for --preservation: add --preservation output.")
        if any(not phrase.strip() for phrase in self.concept_phrases):
            raise InputError("--concept_phrases contains an empty text: write the words that name the concept.")


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


@dataclass(frozen=True)
class SpeedSettings:
    """The precision and the kernels of training steps."""

    title: ClassVar = "speed and memory"
    conflicts: ClassVar = (
        Conflict(
            "deterministic", "enable_xformers_memory_efficient_attention",
            "--deterministic needs plain attention. Leave --enable_xformers_memory_efficient_attention out.",
        ),
    )  # fmt: skip
    # fmt: off
    mixed_precision: str | None = flag(None, "precision of the frozen base model; the LoRA is always float32 (default: the launcher's setting)", choices=["no", "fp16", "bf16"], may_change=True)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass, which saves memory but is slower", may_change=True)
    allow_tf32: bool = flag(True, "use TF32 matrix products on GPUs that support them", may_change=True)
    compile: str = flag("off", "torch.compile for runs of thousands of steps; blocks: each kind of transformer block once; full: the whole denoiser; graphs: the whole denoiser with CUDA graphs. The gain is logged at the start", choices=["off", *COMPILED], may_change=True)
    enable_xformers_memory_efficient_attention: bool = flag(False, "use xformers attention instead of PyTorch's", may_change=True)
    deterministic: bool = flag(False, "make results on a GPU reproducible bit for bit, with deterministic kernels and plain attention; slower, and memory grows with the square of the picture's area", may_change=True)
    enable_npu_flash_attention: bool = flag(False, "use flash attention on Ascend NPUs (needs torch_npu)", may_change=True, title=COMPATIBILITY)
    # fmt: on

    @property
    def precision(self) -> str:
        """The precision from the flag or the launcher; raises `InputError` if the launcher's is unknown."""
        precision = self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if precision not in ("no", "fp16", "bf16"):
            raise InputError(f"ACCELERATE_MIXED_PRECISION={precision}: choose no, fp16 or bf16.")
        return precision

    @property
    def unused_libraries(self) -> list[str]:
        """Libraries that diffusers and peft would import although the run does not need them (8-bit Adam imports bitsandbytes itself)."""
        return ["bitsandbytes", *([] if self.enable_xformers_memory_efficient_attention else ["xformers"])]


@dataclass(frozen=True)
class CheckpointSettings:
    """Saving and resuming checkpoints."""

    title: ClassVar = "checkpoints"
    # fmt: off
    resume_from_checkpoint: str = flag("latest", "checkpoint folder to resume from; latest: the newest intact checkpoint in --output_dir; hf://owner/name[/checkpoint-N]: that checkpoint, or the newest one on the hub or in --output_dir; none: start over", user_path, may_change=True)
    checkpointing_steps: int = flag(500, "number of optimizer steps between checkpoints, from which a killed run resumes; a run also saves one at the end, or when it is asked to stop; 0: only when it is asked to stop", at_least(0), may_change=True)
    checkpoints_total_limit: int | None = flag(None, "maximum number of checkpoints to keep; older ones are deleted (default: keep all)", at_least(1), may_change=True)
    save_every_n_epochs: int = flag(0, "number of epochs between LoRA files that are ready for use (epoch-0005/...); 0: only at the end", at_least(0), may_change=True)
    # fmt: on

    def due_after(self, step: int) -> bool:
        """Whether a checkpoint is due after an optimizer step."""
        return bool(self.checkpointing_steps) and step % self.checkpointing_steps == 0


def ways_to_save_memory(settings: Any) -> str:
    """Returns the flags that reduce a run's memory, the cheapest first; the last ones require a new run."""
    batches, ways = settings.batches, []
    if settings.speed.precision == "no":
        ways.append("--mixed_precision bf16 (fp16 on GPUs before 2020)")
    if batches.train_batch_size not in (1, "auto"):
        accumulation = batches.train_batch_size * batches.gradient_accumulation_steps
        ways.append(f"--train_batch_size 1 --gradient_accumulation_steps {accumulation}")
    if not settings.speed.gradient_checkpointing:
        ways.append("--gradient_checkpointing (slower)")
    if not settings.cache.num_variations(settings.augmentation):
        ways.append("--cache_variations 4")
    return " or ".join([*ways, "a smaller --resolution, which begins a new run (another --output_dir)"])

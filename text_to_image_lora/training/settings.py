"""The flags of a training run. Imports nothing heavy."""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..command_line import COMPATIBILITY, above, at_least, between, duration, flag, from_up_to, to_seconds
from ..errors import InputError
from ..models.compiling import OPTIONS as COMPILED
from .optimizers import OPTIMIZERS, check_optimizer


ENDLESS_VARIATIONS_CACHED = 4
PERCEPTUAL_WEIGHTS = {"decoder": 0.1, "self": 0.01}  # docs/findings.md


@dataclass(frozen=True)
class RunSettings:
    """The run as a whole: where it writes, its seed, how long it may take."""

    title: ClassVar = "run"
    # fmt: off
    config: str | None = flag(None, "a YAML file with flags, one a line; the command line goes before it (each run saves its own as run.yaml)", metavar="FILE", may_change=True, recorded=False)
    output_dir: str = flag("sd-model-finetuned-lora", "folder for the LoRA, checkpoints, sample pictures and metrics", may_change=True)
    seed: int | None = flag(None, "makes a run reproducible; when not given, one is drawn and saved in run.yaml", between(0, 2**63 - 1, int))
    max_train_time: str | None = flag(None, "stop in time, with a checkpoint and exit code 75, so that the whole command takes no longer than this, such as 3h50m", duration, metavar="TIME", may_change=True)
    num_cpu_threads: int | None = flag(None, "threads for computing on a CPU; when not given, the physical cores divided by the processes, unless OMP_NUM_THREADS says otherwise", at_least(1), may_change=True)
    local_rank: int = flag(-1, "set by the launcher, not by you", int, may_change=True, recorded=False, title=COMPATIBILITY)
    # fmt: on

    @property
    def max_seconds(self) -> int | None:
        return to_seconds(self.max_train_time)


@dataclass(frozen=True)
class CacheSettings:
    """The cache of latents and prompt embeddings."""

    title: ClassVar = "cache"
    # fmt: off
    cache_variations: int | None = flag(None, "variations of each picture in the cache; when not given 1, 2 with --random_flip, 4 with random crops and other augmentation; 0: no cache, encode in each step", at_least(0))
    latent_cache_dir: str = flag("~/.cache/text_to_image_lora", "where latents and prompt embeddings are kept for later runs", metavar="FOLDER", may_change=True)
    latent_cache_limit: float | None = flag(None, "delete what has not been used for longest from --latent_cache_dir, beyond so many GiB; never what this run needs; no limit when not given", above(0), metavar="GIB", may_change=True)
    # fmt: on

    @property
    def folder(self) -> Path:
        return Path(self.latent_cache_dir).expanduser()

    def num_variations(self, augmentation: Any) -> int:
        """How many variations of each picture are cached; 0 where pictures are encoded in each step."""
        if self.cache_variations is not None:
            return self.cache_variations
        return augmentation.variations() or ENDLESS_VARIATIONS_CACHED


@dataclass(frozen=True)
class BatchSettings:
    """How many pictures a step has, and how many steps a run."""

    title: ClassVar = "batches and length"
    # fmt: off
    train_batch_size: int | str = flag(16, "pictures per process and forward pass; auto: of the --gradient_accumulation_steps pictures of a step, as many at once as fit", at_least(1, word="auto"), may_change=True)
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step", at_least(1), may_change=True)
    num_train_epochs: int = flag(100, "passes over the pictures", at_least(1), may_change=True)
    max_train_steps: int | None = flag(None, "optimizer steps; goes before --num_train_epochs", at_least(1), may_change=True)
    dataloader_num_workers: int = flag(0, "processes that load data; worth it with --cache_variations 0", at_least(0), may_change=True)
    # fmt: on

    @property
    def is_auto(self) -> bool:
        """Whether the batch size is what fits."""
        return self.train_batch_size == "auto"

    @property
    def batch_size(self) -> int:
        """Pictures per process and forward pass; with `auto` one until it is found how many fit: the steps' samples stay."""
        return 1 if self.is_auto else int(self.train_batch_size)

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_train_steps or self.num_train_epochs * steps_per_epoch

    def check(self, settings):
        if self.is_auto and self.gradient_accumulation_steps == 1:
            raise InputError(
                "--train_batch_size auto takes as many of a step's pictures at once as fit: say how many a step has with "
                "--gradient_accumulation_steps, such as 8."
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning rates."""

    title: ClassVar = "optimizer"
    # fmt: off
    optimizer: str | None = flag(None, "which optimizer; adamw when not given", choices=[*OPTIMIZERS])
    optimizer_args: tuple[str, ...] = flag((), "more options of the optimizer, such as d_coef=0.5", nargs="+", metavar="KEY=VALUE", may_change=True)
    learning_rate: float | None = flag(None, "learning rate after warm-up; 1e-4 when not given, 1 with --optimizer prodigy", above(0), may_change=True)
    text_encoder_lr: float | None = flag(None, "learning rate of the text encoder's LoRA; --learning_rate when not given", above(0), may_change=True)
    loraplus_lr_ratio: float | None = flag(None, "LoRA+: how many times the learning rate the B matrices have; 16 is usual", above(0), may_change=True)
    scale_lr: bool = flag(False, "multiply the learning rate by processes x accumulation x batch size", may_change=True)
    adam_beta1: float = flag(0.9, "decay of the optimizer's first moment", from_up_to(0, 1), may_change=True)
    adam_beta2: float = flag(0.999, "decay of the optimizer's second moment", from_up_to(0, 1), may_change=True)
    adam_weight_decay: float = flag(1e-2, "the optimizer's weight decay", at_least(0, float), may_change=True)
    adam_epsilon: float = flag(1e-8, "what the optimizer adds to its denominator", at_least(0, float), may_change=True)
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0: don't", at_least(0, float), may_change=True)
    use_ema: bool = flag(False, "validate and save the moving average of the LoRA's weights")
    ema_decay: float = flag(0.999, "decay of the moving average of --use_ema; it begins lower", from_up_to(0, 1), may_change=True)
    use_8bit_adam: bool = flag(False, "another way to write --optimizer adamw8bit", may_change=True, title=COMPATIBILITY)
    # fmt: on

    @property
    def name(self) -> str:
        """The row of `OPTIMIZERS`."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer or "adamw"

    @property
    def rate(self) -> float:
        """The learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.name == "prodigy" else 1e-4

    def scaled(self, effective_batch_size: int) -> "OptimizerSettings":
        """With the learning rates that --scale_lr makes of them."""
        if not self.scale_lr:
            return self
        text_encoder_lr = None if self.text_encoder_lr is None else effective_batch_size * self.text_encoder_lr
        rate = effective_batch_size * self.rate
        return dataclasses.replace(self, learning_rate=rate, text_encoder_lr=text_encoder_lr)

    def check(self, settings):
        if self.use_8bit_adam and self.optimizer not in (None, "adamw8bit"):
            raise InputError(f"Pass one of --use_8bit_adam and --optimizer {self.optimizer}.")
        scheduler = settings.schedule.lr_scheduler
        if self.name == "schedulefree" and scheduler not in ("constant", "constant_with_warmup"):
            raise InputError(
                f"--optimizer schedulefree needs no --lr_scheduler {scheduler}: leave that out, or take another optimizer."
            )
        if self.name == "prodigy" and (self.loraplus_lr_ratio is not None or self.text_encoder_lr is not None):
            raise InputError(
                "--optimizer prodigy has one learning rate for all: leave --loraplus_lr_ratio and --text_encoder_lr out."
            )
        if self.name == "prodigy" and self.scale_lr:
            raise InputError("--optimizer prodigy finds the learning rate itself: leave --scale_lr out.")
        check_optimizer(self.name, self.optimizer_args)


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate changes over a run."""

    title: ClassVar = "learning rate schedule"
    # fmt: off
    lr_scheduler: str = flag("constant", "how the learning rate changes over the run", choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant"], may_change=True)
    lr_warmup_steps: int | None = flag(None, "optimizer steps in which the learning rate rises from 0; when not given, the smaller of 500 and a tenth of the run", at_least(0), may_change=True)
    lr_warmup_ratio: float | None = flag(None, "share of the run in which the learning rate rises from 0, instead of --lr_warmup_steps", between(0, 1), may_change=True)
    lr_num_cycles: int = flag(1, "restarts of --lr_scheduler cosine_with_restarts", at_least(1), may_change=True)
    lr_power: float = flag(1.0, "power of --lr_scheduler polynomial", at_least(0, float), may_change=True)
    lr_step_rules: str = flag("", "factors of --lr_scheduler piecewise_constant and the steps they end at, such as 1:100,0.1:200,0.01", may_change=True)
    # fmt: on

    def num_warmup_steps(self, num_steps: int) -> int:
        """Optimizer steps of warm-up in a run of `num_steps`; `InputError` where a polynomial is left none to fall in."""
        if self.lr_warmup_ratio is not None:
            warmup_steps = round(self.lr_warmup_ratio * num_steps)
        elif self.lr_warmup_steps is not None:
            warmup_steps = self.lr_warmup_steps
        else:
            warmup_steps = min(500, num_steps // 10)
        if self.lr_scheduler == "polynomial" and warmup_steps >= num_steps:
            raise InputError(
                f"--lr_scheduler polynomial: {warmup_steps} of {num_steps} steps are warm-up. Leave some for it."
            )
        return warmup_steps

    def check_rate(self, learning_rate: float) -> None:
        """Raises `InputError` for a learning rate that is below the one at which diffusers' polynomial ends."""
        if self.lr_scheduler == "polynomial" and learning_rate <= 1e-7:
            raise InputError(
                f"--learning_rate {learning_rate}: polynomial ends at 1e-07, so it must be more than that."
            )

    def check(self, settings):
        if self.lr_warmup_ratio is not None and self.lr_warmup_steps is not None:
            raise InputError("Pass one of --lr_warmup_steps and --lr_warmup_ratio.")
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            raise InputError("--lr_scheduler piecewise_constant needs --lr_step_rules, such as 1:100,0.1:200,0.01.")
        factor = r"\d*\.?\d+(e[+-]?\d+)?"
        if not re.fullmatch(rf"({factor}:\d+,)*{factor}", self.lr_step_rules or "1"):
            raise InputError(
                f"--lr_step_rules {self.lr_step_rules}: write factor:step pairs and the last factor, such as "
                "1:100,0.1:200,0.01."
            )
        if not settings.optimizer.scale_lr:
            self.check_rate(settings.optimizer.rate)


@dataclass(frozen=True)
class LossSettings:
    """What is minimized, beside what the model predicts."""

    title: ClassVar = "loss"
    # fmt: off
    loss_type: str = flag("mse", "mse: squared error; huber: a scheduled pseudo-Huber loss, for sets with broken pictures or captions in them", choices=["mse", "huber"])
    huber_c: float = flag(0.1, "width of --loss_type huber at the noisiest timestep", above(0))
    snr_gamma: float | None = flag(None, "gamma of Min-SNR loss weighting; 5.0 is usual; not used when not given", above(0))
    debiased_estimation: bool = flag(False, "weight the loss by 1 / sqrt(SNR), so that noisy timesteps count more")
    perceptual_loss: str | None = flag(None, "add a loss on features of the VAE's decoder (which then stays in memory), or of the base model itself; no other network is needed", choices=["decoder", "self"])
    perceptual_loss_weight: float | None = flag(None, "how much the perceptual loss counts; when not given, 0.1 for decoder and 0.01 for self", at_least(0, float))
    perceptual_max_timestep: int = flag(400, "--perceptual_loss decoder looks only at timesteps below this one, where pictures can be seen", at_least(1))
    noise_offset: float = flag(0.0, "scale of a noise that is constant over each channel", at_least(0, float))
    input_perturbation: float = flag(0.0, "scale of noise that is added to the model's input only; 0.1 is usual", at_least(0, float))
    # fmt: on

    @property
    def perceptual_weight(self) -> float | None:
        """What the perceptual loss is multiplied by; None without one."""
        given = self.perceptual_loss_weight
        return PERCEPTUAL_WEIGHTS.get(self.perceptual_loss or "") if given is None else given

    def check(self, settings):
        if settings.speed.compile != "off" and self.perceptual_loss == "self":
            raise InputError(
                "--perceptual_loss self looks into the UNet where --compile leaves nothing to see: leave one out."
            )
        if self.snr_gamma is not None and self.debiased_estimation:
            raise InputError(
                "Pass one of --snr_gamma and --debiased_estimation: both weight the loss by the timestep."
            )


@dataclass(frozen=True)
class TimestepSettings:
    """The diffusion that is trained, and which of its timesteps are drawn."""

    title: ClassVar = "timesteps"
    # fmt: off
    prediction_type: str | None = flag(None, "what the model predicts; the base model's own when not given", choices=["epsilon", "v_prediction"])
    rescale_betas_zero_snr: bool = flag(False, "let the last timestep be noise alone (zero terminal SNR); needs v_prediction")
    timestep_sampling: str = flag("uniform", "which timesteps are drawn more often, as in diffusers' training helpers", choices=["uniform", "logit_normal", "mode"])
    timestep_range: tuple[int, int] | None = flag(None, "train on these timesteps only, of 0 (clean) to 1000 (noise)", int, nargs=2, metavar=("FIRST", "LAST"))
    logit_mean: float = flag(0.0, "mean of --timestep_sampling logit_normal; below 0: noisier timesteps", between(-100, 100))
    logit_std: float = flag(1.0, "standard deviation of --timestep_sampling logit_normal", above(0))
    mode_scale: float = flag(1.29, "scale of --timestep_sampling mode; above 0, the middle timesteps come more often", between(-1, 1.75))
    # fmt: on

    @property
    def all_alike(self) -> bool:
        """Whether every timestep is as likely."""
        return self.timestep_sampling == "uniform" and self.timestep_range is None

    def draw(self, generator: Any, num_train_timesteps: int) -> int:
        """A timestep from the range that is trained on.

        The schemes are diffusers' (Esser et al., 2024, https://arxiv.org/abs/2403.03206): as there, a `logit_mean` below 0
        prefers noisy timesteps.
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
    """How the steps are computed."""

    title: ClassVar = "speed and memory"
    # fmt: off
    mixed_precision: str | None = flag(None, "precision of the frozen base model; the launcher's when not given. The LoRA is always float32", choices=["no", "fp16", "bf16"], may_change=True)
    gradient_checkpointing: bool = flag(False, "compute activations again in the backward pass: less memory, slower", may_change=True)
    allow_tf32: bool = flag(True, "TF32 matrix products where the GPU has them", may_change=True)
    compile: str = flag("off", "torch.compile of the training steps, for runs of thousands of steps: each kind of transformer block once, the full denoiser, or that with CUDA graphs; what it gives is said at the start", choices=["off", *COMPILED], may_change=True)
    enable_xformers_memory_efficient_attention: bool = flag(False, "xformers attention instead of PyTorch's own", may_change=True)
    deterministic: bool = flag(False, "a seed gives equal bits each time on a GPU too: deterministic kernels and plain attention, whose memory grows with the square of the picture's area; slower", may_change=True)
    enable_npu_flash_attention: bool = flag(False, "flash attention of Ascend NPUs (needs torch_npu)", may_change=True, title=COMPATIBILITY)
    # fmt: on

    @property
    def precision(self) -> str:
        """The precision that the flag or the launcher asks for; raises `InputError`."""
        precision = self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if precision not in ("no", "fp16", "bf16"):
            raise InputError(f"ACCELERATE_MIXED_PRECISION={precision}: choose no, fp16 or bf16.")
        return precision

    @property
    def unused_libraries(self) -> list[str]:
        """Libraries that diffusers and peft would import and the run does without (8-bit Adam imports its own)."""
        return ["bitsandbytes", *([] if self.enable_xformers_memory_efficient_attention else ["xformers"])]

    def check(self, settings):
        if self.deterministic and self.enable_xformers_memory_efficient_attention:
            raise InputError(
                "--deterministic needs plain attention: leave --enable_xformers_memory_efficient_attention out."
            )


@dataclass(frozen=True)
class CheckpointSettings:
    """What a run keeps on its way, and what it resumes from."""

    title: ClassVar = "checkpoints"
    # fmt: off
    resume_from_checkpoint: str = flag("latest", "a checkpoint folder to go on from; latest: the newest in --output_dir that is whole; hf://owner/name[/checkpoint-N]: the newest there or in --output_dir; none: start over", may_change=True)
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints, from which a killed run goes on (one more comes at the end, or where the run is asked to stop); 0: only there where it is asked to stop", at_least(0), may_change=True)
    checkpoints_total_limit: int | None = flag(None, "keep so many checkpoints and delete the oldest; all when not given", at_least(1), may_change=True)
    save_every_n_epochs: int = flag(0, "write a LoRA ready for use (epoch-0005/...) every so many epochs; 0: only at the end", at_least(0), may_change=True)
    # fmt: on

    def due_after(self, step: int) -> bool:
        """Whether a checkpoint is due after an optimizer step."""
        return bool(self.checkpointing_steps) and step % self.checkpointing_steps == 0


def ways_to_save_memory(settings: Any) -> str:
    """In words, the flags that make a run take less, the cheapest first; the last of them make it another run."""
    batches, ways = settings.batches, []
    if settings.speed.precision == "no":
        ways.append("--mixed_precision bf16 (fp16 on GPUs before 2020)")
    if batches.train_batch_size not in (1, "auto"):
        accumulation = batches.train_batch_size * batches.gradient_accumulation_steps
        ways.append(f"--train_batch_size 1 --gradient_accumulation_steps {accumulation}")
    if not settings.speed.gradient_checkpointing:
        ways.append("--gradient_checkpointing (slower)")
    anew = "a smaller --resolution, which begins a new run (another --output_dir)"
    caches = settings.cache.num_variations(settings.augmentation)
    return " or ".join([*ways, anew if caches else f"--cache_variations 4 or {anew}"])

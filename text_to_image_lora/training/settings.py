"""The flags of a training run. Does not import torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..command_line import (
    COMPATIBILITY,
    above,
    between,
    count,
    duration,
    flag,
    obstacle_to_folder,
    output_folder,
    path_text,
    to_seconds,
    user_path,
)
from ..config_file import Conflict
from ..errors import InputError
from ..files import counted
from ..libraries import MOST_CPU_THREADS
from ..models.compiling import OPTIONS as COMPILED


ENDLESS_VARIATIONS_CACHED = 4
# Larger numbers are mistakes, which would take all memory or processes of the machine.
MOST_VARIATIONS = 1000
MOST_WORKERS = 256


@dataclass(frozen=True)
class RunSettings:
    """The output folder, the seed and the time limit of the run."""

    title: ClassVar = "run"
    # fmt: off
    config: str | None = flag(None, "YAML file with flags, one per line; flags on the command line override it (each run saves its flags as run.yaml)", user_path, metavar="FILE", may_change=True, recorded=False)
    output_dir: str = flag("sd-model-finetuned-lora", "folder for the LoRA, checkpoints, sample pictures and metrics", output_folder, may_change=True)
    seed: int | None = flag(None, "random seed, for reproducible runs (default: drawn at random and saved in run.yaml)", between(0, 2**63 - 1, int))
    max_train_time: str | None = flag(None, "maximum time for the whole command, such as 3h50m; the run stops early enough, with a checkpoint and exit code 75", duration, metavar="TIME", may_change=True)
    num_cpu_threads: int | None = flag(None, "number of threads for computing on a CPU (default: OMP_NUM_THREADS, or else the number of physical cores that are not busy, divided by the processes)", between(1, MOST_CPU_THREADS, int), may_change=True)
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
    cache_variations: int | None = flag(None, "number of cached variations of each picture; 0: no cache, encode pictures in each step (default: 1, 2 with --random_flip, 4 with random crops and other augmentation)", between(0, MOST_VARIATIONS, int))
    latent_cache_dir: str = flag("~/.cache/text_to_image_lora", "folder in which latents, prompt embeddings and the class pictures that are drawn are kept for later runs", path_text, metavar="FOLDER", may_change=True)
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

    def check(self, settings):
        if (obstacle := obstacle_to_folder(self.folder)) is not None:
            raise InputError(
                f"{self.latent_cache_dir}: it can't be made, because {obstacle}. Pass another --latent_cache_dir."
            )


@dataclass(frozen=True)
class BatchSettings:
    """The batch size and the number of training steps."""

    title: ClassVar = "batches and length"
    conflicts: ClassVar = (
        Conflict("num_train_epochs", "max_train_steps", clash=lambda flags: flags["max_train_steps"] is not None),
    )
    # fmt: off
    train_batch_size: int | str = flag(16, "number of pictures per process and forward pass; auto: as many of the --gradient_accumulation_steps pictures of a step as fit in memory", count(1, 65536, word="auto"), may_change=True)
    gradient_accumulation_steps: int = flag(1, "number of forward passes per optimizer step", count(1, 10**6), may_change=True)
    num_train_epochs: int = flag(100, "number of passes over the pictures", count(1), may_change=True)
    max_train_steps: int | None = flag(None, "total number of optimizer steps; overrides --num_train_epochs", count(1), may_change=True)
    dataloader_num_workers: int = flag(0, "number of processes that load data; useful with --cache_variations 0", between(0, MOST_WORKERS, int), may_change=True)
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
    checkpointing_steps: int = flag(500, "number of optimizer steps between checkpoints, from which a killed run resumes; a run also saves one at the end, or when it is asked to stop; 0: only when it is asked to stop", count(0), may_change=True)
    checkpoints_total_limit: int | None = flag(None, "maximum number of checkpoints to keep; older ones are deleted (default: keep all)", count(1), may_change=True)
    save_every_n_epochs: int = flag(0, "number of epochs between LoRA files that are ready for use (epoch-0005/...); 0: only at the end", count(0), may_change=True)
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

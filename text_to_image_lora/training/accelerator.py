"""Creation of the `Accelerator`, with checks of the flags against the device."""

import logging
import os
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, ProjectConfiguration

from ..errors import InputError
from ..libraries import num_cpu_threads
from . import processes


logger = logging.getLogger(__name__)


def make_accelerator(settings: Any, trackers: list[str]) -> Accelerator:
    """Creates the `Accelerator` and sets the number of threads; raises `InputError` for flags that need another device."""
    speed, precision = settings.speed, settings.speed.precision
    if precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise InputError("--mixed_precision fp16 needs a GPU: on a CPU it would train in float32. Use bf16 or no.")
    processes.use_deterministic_kernels(speed.deterministic)
    logging_dir = os.path.join(settings.run.output_dir, settings.tracking.logging_dir)
    accelerator = Accelerator(
        mixed_precision=precision,
        # Set explicitly, as ACCELERATE_GRADIENT_ACCUMULATION_STEPS would divide the gradients a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=cast(Any, trackers or None),
        project_config=ProjectConfiguration(settings.run.output_dir, logging_dir=logging_dir),
        # Plain adapters compute in the base model's precision; peft's float32 adapters need autocast.
        kwargs_handlers=[AutocastKwargs(enabled=settings.lora.needs_autocast)],
    )
    device = accelerator.device
    if speed.enable_xformers_memory_efficient_attention and device.type != "cuda":
        raise InputError("--enable_xformers_memory_efficient_attention needs a CUDA GPU. Leave the flag out.")
    if speed.enable_npu_flash_attention and device.type != "npu":
        raise InputError("--enable_npu_flash_attention needs an Ascend NPU and torch_npu. Leave the flag out.")
    if speed.compile == "graphs" and device.type != "cuda":
        raise InputError("--compile graphs needs a CUDA GPU. Use --compile blocks or full.")
    if device.type == "cpu":
        torch.set_num_threads(num_cpu_threads(settings.run.num_cpu_threads, os.environ))
    torch.set_float32_matmul_precision("high" if speed.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = speed.allow_tf32  # PyTorch's default is True
    if settings.sharing.hub_token is not None:
        logger.info(
            "--hub_token: a launcher that fails prints its command, including the token. `hf auth login`, or HF_TOKEN in "
            "the environment, does not leak the token."
        )
    if precision == "bf16" and processes.emulates_bf16(device):
        logger.info("this GPU has no bf16 and emulates it slowly: --mixed_precision fp16 is faster")
    return accelerator

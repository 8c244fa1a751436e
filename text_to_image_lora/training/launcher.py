"""What launched this process, as far as that matters; no torch is needed to know it."""

import os

from ..errors import InputError


# What accelerate launch and torchrun set for the processes that they start.
MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def check_launcher():
    """Raises `InputError` for launches that this training is not made for."""
    engines = {
        "DeepSpeed": "DEEPSPEED",
        "FSDP": "FSDP",
        "Megatron-LM": "MEGATRON_LM",
        "ND parallelism": "PARALLELISM_CONFIG",
    }
    for name, variable in engines.items():
        variable = f"ACCELERATE_USE_{variable}"
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise InputError(
                f"{name} divides a model that doesn't fit one GPU; a LoRA of Stable Diffusion does, and plain data "
                "parallelism is faster. Launch with --multi_gpu instead (or run `accelerate config` again)."
            )


def launchers_pid():
    """The number of the process that launched this one and waits for it; None where that is a shell, or whatever else.

    A run that outlives its shell was left in the background on purpose.
    """
    return os.getppid() if any(name in os.environ for name in MARKS) else None


def lives(pid):
    """Whether this process's parent, who had that number when it began, is still there."""
    if os.name == "nt":  # where a process keeps the number of a parent that is no more
        import psutil

        return psutil.pid_exists(pid)
    return os.getppid() == pid

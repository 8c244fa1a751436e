"""What launched this process. Does not import torch."""

import multiprocessing
import os
import signal
import sys

from ..errors import InputError


PR_SET_PDEATHSIG = 1  # of Linux
# accelerate launch and torchrun set these variables for the processes that they start.
MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def check_launcher() -> None:
    """Raises `InputError` for ways to launch that this training does not support."""
    engines = {
        "DeepSpeed": "DEEPSPEED",
        "FSDP": "FSDP",
        "Megatron-LM": "MEGATRON_LM",
        "ND parallelism": "PARALLELISM_CONFIG",
    }
    for name, variable in engines.items():
        if os.environ.get(f"ACCELERATE_USE_{variable}", "false").lower() in ("true", "1", "yes"):
            raise InputError(
                f"{name} divides a model that does not fit on one GPU. A LoRA of Stable Diffusion does fit, and plain data "
                "parallelism is faster. Launch with --multi_gpu instead (or run `accelerate config` again)."
            )


def launchers_pid() -> int | None:
    """Returns the process ID of the launcher that waits for this process, or None if something else started it.

    A shell is not a launcher: a run that outlives its shell was left in the background on purpose.
    """
    return os.getppid() if any(name in os.environ for name in MARKS) else None


def end_with_parent() -> None:
    """Lets the system kill this process, which `multiprocessing` started, when its parent ends; only Linux can do that."""
    if sys.platform != "linux":
        return
    import ctypes  # only for the workers

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before
        os._exit(1)


def lives(pid: int) -> bool:
    """Whether the parent of this process, which had this process ID at the start, is still running."""
    if os.name == "nt":  # Windows does not change the parent's ID when the parent ends
        import psutil

        return psutil.pid_exists(pid)
    return os.getppid() == pid

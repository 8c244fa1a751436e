"""What the libraries load and say while they are imported, and how many threads they compute with."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Mapping


def quiet_libraries():
    """Keeps the libraries' import-time advice off the terminal: none of it is about the user's run."""
    # diffusers 0.39 passes it to huggingface_hub 1.x, which doesn't know it any more.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns when a loader's worker is forked
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("xformers", "bitsandbytes", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def hide_modules(*names):
    """Inside, these modules can't be found; afterwards they can, and who imports them gets them.

    diffusers and peft import bitsandbytes and xformers wherever they are installed, which takes a second and 44 MB.
    Those that are imported already stay in sight.
    """
    names = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def num_cpu_threads(wanted: int | None, environment: Mapping[str, str]) -> int:
    """How many threads a process on a CPU computes with.

    The physical cores divided by this machine's processes, unless OMP_NUM_THREADS says otherwise; the 1 that launchers set
    in silence doesn't.
    """
    if wanted is not None:
        return wanted
    said = environment.get("OMP_NUM_THREADS")
    launched = "ACCELERATE_MIXED_PRECISION" in environment or "LOCAL_WORLD_SIZE" in environment
    if said is not None and said.isdigit() and not (launched and said == "1"):
        return max(1, int(said))
    return max(1, physical_cores() // int(environment.get("LOCAL_WORLD_SIZE", "1")))


def physical_cores() -> int:
    """Those that this process may use."""
    import psutil

    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(logical, psutil.cpu_count(logical=False) or logical)


def set_num_threads(wanted: int | None) -> None:
    """Lets torch compute with `num_cpu_threads` threads on the CPU."""
    import torch

    torch.set_num_threads(num_cpu_threads(wanted, os.environ))

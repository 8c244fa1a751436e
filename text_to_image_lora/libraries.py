"""Which modules libraries import, what they print while they are imported, and how many threads they use."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping


def quiet_libraries() -> None:
    """Silences what libraries print at import time, none of which is about the user's run."""
    # diffusers 0.39 passes this argument to huggingface_hub 1.x, which has deprecated it.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns when a DataLoader worker is forked
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("xformers", "bitsandbytes", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def hide_modules(*names: str) -> Iterator[None]:
    """Makes the import of these modules fail inside the context, unless they are imported already.

    diffusers and peft import bitsandbytes and xformers wherever they are installed, which takes a second and 44 MB.
    """
    missing = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # pyright: ignore - None makes an import fail
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def num_cpu_threads(wanted: int | None, environment: Mapping[str, str]) -> int:
    """Returns the number of CPU threads of a process, which is `wanted` if given.

    By default this is OMP_NUM_THREADS, or else the physical cores divided by the number of processes on this machine.
    Launchers set OMP_NUM_THREADS=1 silently, so that 1 is ignored there.
    """
    if wanted is not None:
        return wanted
    omp_threads = environment.get("OMP_NUM_THREADS")
    launched = "ACCELERATE_MIXED_PRECISION" in environment or "LOCAL_WORLD_SIZE" in environment
    if omp_threads is not None and omp_threads.isdigit() and not (launched and omp_threads == "1"):
        return max(1, int(omp_threads))
    return max(1, physical_cores() // int(environment.get("LOCAL_WORLD_SIZE", "1")))


def physical_cores() -> int:
    """The number of physical cores that this process may use."""
    import psutil

    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(logical, psutil.cpu_count(logical=False) or logical)


def set_num_threads(wanted: int | None) -> None:
    """Sets the number of CPU threads of PyTorch, see `num_cpu_threads`."""
    import torch

    torch.set_num_threads(num_cpu_threads(wanted, os.environ))

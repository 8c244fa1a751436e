"""Which modules libraries import, what they print while they are imported, and how many threads they use."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping


logger = logging.getLogger(__name__)
MOST_CPU_THREADS = 1024  # more than any machine has cores; with very many, OpenMP ends the process


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


# accelerate launch and torchrun set one of these for the processes that they start.
LAUNCHERS_MARKS = ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE")


def num_cpu_threads(wanted: int | None, environment: Mapping[str, str], *, alone: bool = False) -> int:
    """Returns the number of CPU threads of a process, which is `wanted` if given.

    By default this is OMP_NUM_THREADS, or else the physical cores that other programs leave idle (with `alone`, all physical
    cores) divided by the number of processes on this machine. Launchers set OMP_NUM_THREADS=1 silently, so that 1 only counts
    if the launcher has it in its own environment.
    """
    if wanted is not None:
        return wanted
    omp_threads = environment.get("OMP_NUM_THREADS")
    launched = any(name in environment for name in LAUNCHERS_MARKS)
    by_launcher = omp_threads == "1" and launched and launchers_environment().get("OMP_NUM_THREADS") != "1"
    if omp_threads is not None and omp_threads.isdigit() and not by_launcher:
        return min(max(1, int(omp_threads[:9])), os.cpu_count() or 1)  # very many threads would end the process
    cores = physical_cores()
    busy = 0 if alone else min(cores - 1, round(busy_cores()))
    if busy > 0:
        logger.info(
            f"other programs keep about {busy} of {cores} cores busy, so this one computes on {cores - busy}; "
            f"--num_cpu_threads {cores} uses all of them"
        )
    return max(1, (cores - busy) // int(environment.get("LOCAL_WORLD_SIZE", "1")))


def launchers_environment() -> dict[str, str]:
    """Returns the environment that the launcher of this process was started with; empty if it can't be read.

    The launcher is the nearest parent process that does not have the variables that launchers set for their processes.
    """
    import psutil

    try:
        for parent in psutil.Process().parents():
            environment = parent.environ()
            if not any(name in environment for name in LAUNCHERS_MARKS):
                return environment
    except (psutil.Error, OSError):  # such as a process of another user
        pass
    return {}


def busy_cores() -> float:
    """The number of cores that other programs use: those of the last minute that are still used at this moment.

    The load of the last minute alone would count a run that has just ended.
    """
    import psutil

    load = psutil.getloadavg()[0]
    if load < 0.5:
        return 0.0
    shares = dict(enumerate(psutil.cpu_percent(interval=0.3, percpu=True)))
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else shares.keys()
    return min(load, sum(shares.get(core, 0.0) for core in usable) / 100)


def physical_cores() -> int:
    """The number of physical cores that this process may use."""
    import psutil

    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(logical, psutil.cpu_count(logical=False) or logical)


def set_num_threads(wanted: int | None) -> None:
    """Sets the number of CPU threads of PyTorch, see `num_cpu_threads`."""
    import torch

    torch.set_num_threads(num_cpu_threads(wanted, os.environ))

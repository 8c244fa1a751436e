"""Whether freed memory stays with the process or is returned to the system or the GPU."""

import ctypes
import platform
from typing import Any

import torch


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
M_ARENA_MAX = -8
LARGEST_IN_HEAP = 32 * 2**20  # bytes; glibc accepts no larger M_MMAP_THRESHOLD
HEAP = 2 * 2**30  # bytes of address space


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_for_reuse() -> None:
    """Makes the process keep the memory that a training step frees, so that the next step reuses it (only with glibc).

    Otherwise a step on a CPU touches its memory anew each time, page by page (docs/performance.md has the measurements).
    glibc returns blocks of more than 32 MiB, such as convolutions' copies of weights, to the system unless the heap has
    room for them. This function therefore reserves a heap of addresses, which take no memory until they are used.
    """
    libc = _glibc()
    if libc is None:
        return
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
    libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    libc.mallopt(M_ARENA_MAX, 1)  # otherwise the thread of the backward pass would have its own heap
    blocks = [libc.malloc(LARGEST_IN_HEAP - 2**20) for _ in range(HEAP // LARGEST_IN_HEAP)]
    for block in blocks[
        :-1
    ]:  # the last block stays allocated, as free memory at the end of the heap would be returned
        libc.free(block)


def release(device: torch.device) -> None:
    """Returns the memory that is free now, such as that of models which are no longer needed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu" and (libc := _glibc()) is not None:
        libc.malloc_trim(0)

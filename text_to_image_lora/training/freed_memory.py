"""What becomes of memory that was freed: whether it stays with the process, or goes back to the system or the GPU."""

import ctypes
import platform

import torch


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
LARGEST_IN_HEAP = 32 * 2**20  # bytes, the most that glibc takes
HEAP = 2 * 2**30  # bytes of addresses


def _glibc():
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep():
    """The process keeps what a step frees, for the next step, instead of handing it back to the system (glibc alone).

    A step on a CPU would touch its memory anew each time, page by page (docs/performance.md has what that took). Blocks of
    more than 32 MiB, such as the copies of weights that convolutions make, are the system's unless the heap has a free
    place for them: so it gets one, of addresses that take no memory until they are used.
    """
    libc = _glibc()
    if libc is None:
        return
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
    libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    libc.mallopt(M_ARENA_MAX, 1)  # the backward's thread would have a heap of its own
    blocks = [libc.malloc(LARGEST_IN_HEAP - 2**20) for _ in range(HEAP // LARGEST_IN_HEAP)]
    for block in blocks[:-1]:  # the last one stays: what lies at the end of the heap would be handed back
        libc.free(block)


def give_back(device):
    """What was freed until now goes back: models that were loaded and are no longer needed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu" and (libc := _glibc()) is not None:
        libc.malloc_trim(0)

"""Whether freed memory stays with the process or is returned to the system."""

import platform
import subprocess
import sys

import pytest
from conftest import ROOT


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only for glibc")


def test_memory_that_a_step_frees_is_reused_by_the_next():
    """Counts the page faults of 20 steps, with and without `keep_for_reuse`.

    This includes blocks of more than 32 MiB, which glibc does not keep by itself, and a thread like that of backward passes.
    """
    code = """
import resource, sys, threading, torch
from text_to_image_lora.training import freed_memory
torch.set_num_threads(1)
if "keep" in sys.argv:
    freed_memory.keep_for_reuse()
def faults():
    blocks = [torch.ones(2**21) for _ in range(4)] + [torch.ones(10 * 2**20) for _ in range(2)]
    thread = threading.Thread(target=lambda: blocks.append(torch.ones(2**21)))
    thread.start()
    thread.join()
    blocks.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults()
before = faults()
for _ in range(20):
    after = faults()
print(after - before)
"""

    def touched(*words):
        command = [sys.executable, "-c", code, *words]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    # Not zero, as the heap sometimes places a block where there was none before.
    assert touched("keep") < touched() / 4


def test_release_returns_memory_that_is_no_longer_needed():
    """Blocks below one that stays, such as those of a released text encoder, are not returned by themselves."""
    code = """
import psutil, torch
from text_to_image_lora.training import freed_memory
freed_memory.keep_for_reuse()
dropped, stays = [torch.ones(2**20) for _ in range(50)], torch.ones(2**20)
def rss():
    return psutil.Process().memory_info().rss / 2**20
del dropped
before = rss()
freed_memory.release(torch.device("cpu"))
print(before - rss())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 190  # of 200 MiB

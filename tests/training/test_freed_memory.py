"""Whether memory that was freed stays with the process, or goes back."""

import platform
import subprocess
import sys

import pytest
from conftest import ROOT


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory")


def test_what_a_step_frees_is_there_for_the_next():
    """Counted by the pages that a process touches for the first time in 20 steps, with and without it.

    Also for blocks of more than 32 MiB, which glibc never keeps, and in a thread of its own, as a backward pass has.
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

    assert (
        touched("keep") < touched() / 4
    )  # where a block goes is the heap's choice: now and then to a place not used before


def test_what_is_no_longer_needed_goes_back():
    """Blocks that lie below one that stays, as a dropped text encoder's do, are kept until then."""
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

"""Tests how the benchmarks run commands: how failures are reported, how commands are stopped, and what is read from them."""

import sys
import time

import pytest

from scripts.benchmarks.runs import CommandFailed, run


def test_the_error_of_a_failed_command_is_its_last_error_message():
    code = "import sys; print('x' * 9000); print('ValueError: no', file=sys.stderr); print('50%', file=sys.stderr); sys.exit(3)"
    with pytest.raises(CommandFailed, match="^ValueError: no$") as caught:
        run([sys.executable, "-c", code])
    assert not caught.value.out_of_memory
    with pytest.raises(CommandFailed, match="^killed by SIGKILL$"):
        run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    code = "raise RuntimeError('CUDA out of memory. Tried ...')"
    with pytest.raises(CommandFailed) as caught:
        run([sys.executable, "-c", code])
    assert caught.value.out_of_memory


def test_a_command_that_takes_too_long_is_stopped_with_its_child_processes():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    with pytest.raises(CommandFailed, match=r"^stopped after 1 s$"):
        run([sys.executable, "-c", code], timeout=0.6)
    assert time.monotonic() - began < 20


def test_the_figures_that_a_command_prints_are_read():
    result = run([sys.executable, "-c", 'print(\'\\nBENCHMARK {"median": 2, "memory_gib": 3.5}\')'])
    assert (result.figures["median"], result.memory_gib) == (2, 3.5)
    assert 0 < result.peak_memory_gib < 5

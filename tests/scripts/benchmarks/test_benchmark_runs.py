"""Commands that the benchmarks run: how they fail, how they are ended, and what they tell."""

import sys
import time

import pytest

from scripts.benchmarks.runs import CommandFailed, run


def test_a_command_that_fails_says_why():
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


def test_a_command_that_takes_too_long_is_ended_with_what_it_has_started():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    with pytest.raises(CommandFailed, match=r"^stopped after 1 s$"):
        run([sys.executable, "-c", code], timeout=0.6)
    assert time.monotonic() - began < 20


def test_what_a_command_tells_is_read():
    ran = run([sys.executable, "-c", 'print(\'\\nBENCHMARK {"median": 2, "memory_gib": 3.5}\')'])
    assert (ran.told["median"], ran.memory_gib) == (2, 3.5)
    assert 0 < ran.peak_memory_gib < 5

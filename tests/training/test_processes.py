"""What a process computes with: as many threads as it should, and a number format that its device has."""

import pytest
import torch
from conftest import CORES, THREADS

from text_to_image_lora.training import processes


@pytest.mark.parametrize(("wanted", "environment", "threads"), THREADS)
def test_how_many_threads(cores, wanted, environment, threads):
    assert processes.num_cpu_threads(wanted, environment) == threads


def test_cores_that_it_may_not_use_are_not_counted(cores, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert processes.num_cpu_threads(None, {}) == 2
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: None)  # where the machine doesn't tell
    assert processes.num_cpu_threads(None, {}) == 2
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # macOS and Windows
    assert processes.num_cpu_threads(None, {}) == 2 * CORES


def test_a_launched_run_computes_with_the_physical_cores_and_says_so(train, monkeypatch, capsys):
    """In the environment that `accelerate launch` makes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(processes, "physical_cores", lambda: 2)
    try:
        train(num_cpu_threads=None, max_train_steps=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert " on 1 x cpu (2 threads) in float32; " in capsys.readouterr().out


def test_bf16_that_is_emulated_is_told(train, monkeypatch, capsys):
    """A T4 says that it has bf16, and counts what it emulates."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert processes.emulates_bf16(torch.device("cuda"))
    assert not processes.emulates_bf16(torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert not processes.emulates_bf16(torch.device("cuda"))
    monkeypatch.setattr(processes, "emulates_bf16", lambda device: True)
    line = "this GPU has no bf16 and emulates it slowly: --mixed_precision fp16 is faster here"
    for precision in ("no", "bf16"):
        train(mixed_precision=precision, max_train_steps=1, resume_from_checkpoint="none")
        assert (line in capsys.readouterr().out) == (precision == "bf16")

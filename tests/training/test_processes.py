"""The threads of a launched run, emulated bf16, and deterministic kernels."""

import os

import pytest
import torch
from conftest import train_script

from text_to_image_lora import libraries
from text_to_image_lora.errors import InputError
from text_to_image_lora.training import interruption, processes


def test_a_launched_run_uses_the_physical_cores_and_logs_it(train, monkeypatch, capsys):
    """Uses the environment of `accelerate launch`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(libraries, "physical_cores", lambda: 2)
    monkeypatch.setattr(libraries, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(libraries, "launchers_environment", dict)
    try:
        train(num_cpu_threads=None, max_train_steps=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert " on 1 x cpu (2 threads) in float32; " in capsys.readouterr().out


def test_emulated_bf16_is_logged(train, monkeypatch, capsys):
    """PyTorch reports bf16 support for a T4, which emulates it."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert processes.emulates_bf16(torch.device("cuda"))
    assert not processes.emulates_bf16(torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert not processes.emulates_bf16(torch.device("cuda"))
    monkeypatch.setattr(processes, "emulates_bf16", lambda device: True)
    line = "this GPU has no bf16 and emulates it slowly: --mixed_precision fp16 is faster"
    for precision in ("no", "bf16"):
        train(mixed_precision=precision, max_train_steps=1, resume_from_checkpoint="none")
        assert (line in capsys.readouterr().out) == (precision == "bf16")


@pytest.fixture
def kernels():
    """Restores what --deterministic sets in the process."""
    yield
    processes.use_deterministic_kernels(False)


@pytest.mark.usefixtures("kernels")
def test_deterministic_sets_what_pytorch_asks_for(train, monkeypatch):
    """Checks the settings in each step of a run."""
    seen, monitored = [], interruption.reduce_loss_and_stop

    def look(*values):
        flags = [
            getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()
            for kind in ("flash", "mem_efficient", "cudnn", "math")
        ]
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, *flags))
        return monitored(*values)

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that monkeypatch restores it
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(interruption, "reduce_loss_and_stop", look)
    train(max_train_steps=1)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert seen == [(False, False, True, True, True, True)]
    train(max_train_steps=1, deterministic=True, resume_from_checkpoint="none")
    assert seen[1:] == [(True, True, False, False, False, True)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_deterministic_and_xformers_are_refused_together(arguments):
    with pytest.raises(InputError, match="--deterministic needs plain attention"):
        train_script.parse_settings(arguments(deterministic=True, enable_xformers_memory_efficient_attention=True))

"""The meaning of exceptions, whichever library raised them."""

import errno
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, words_of_run, write_pictures
from safetensors.torch import save_file

from scripts.annotating.command import run_command
from text_to_image_lora.errors import Stopped, is_out_of_memory
from text_to_image_lora.training import ending


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.9 GB, other allocations: 1 GB)"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (ImportError("libc10.so: failed to map segment from shared object"), True),
        (OSError("libc10.so: failed to map segment from shared object: Cannot allocate memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (ImportError("libc10.so: failed to map segment from shared object: Operation not permitted"), False),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), False),
        (ImportError("No module named 'torch'"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("a caption about being out of memory"), False),
    ],
    ids=lambda value: None if isinstance(value, bool) else str(value)[:24],
)
def test_out_of_memory_is_known_by_its_words(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    "script", ["train_text_to_image_lora.py", "infer.py", "scripts/convert_lora.py", "scripts/evaluate.py"]
)
def test_too_little_memory_for_a_library_is_one_line(tiny_sd, tmp_path, script):
    """As with a small `ulimit -v`, torch can't be imported."""
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.to_q.lora_A.weight": torch.ones(2, 4), "unet.to_q.lora_B.weight": torch.ones(4, 2)}, lora)
    words = {
        "train_text_to_image_lora.py": words_of_run(tiny_sd, write_pictures(tmp_path / "pictures"), tmp_path / "run"),
        "infer.py": [
            "--pretrained_model_name_or_path",
            tiny_sd,
            "--prompt",
            "a cat",
            "--output_dir",
            tmp_path / "out",
        ],
        "scripts/convert_lora.py": [lora, tmp_path / "out.safetensors"],
        "scripts/evaluate.py": [
            "--pretrained_model_name_or_path",
            tiny_sd,
            "--lora",
            lora,
            "--validation_data_dir",
            tmp_path,
        ],
    }[script]
    lines = [
        "import importlib.abc, runpy, sys",
        "class Finder(importlib.abc.MetaPathFinder):",
        "    def find_spec(self, name, *_):",
        "        if name in ('torch', 'safetensors'):",
        "            raise ImportError('libc10.so: failed to map segment from shared object')",
        "sys.meta_path.insert(0, Finder())",
        f"sys.argv = {[script, *map(str, words)]!r}",
        f"runpy.run_path({script!r}, run_name='__main__')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    reason = "Out of memory (libc10.so: failed to map segment from shared object). Close other programs"
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


class StoppedWhenNamed:
    """Stands for a signal that arrives while a library makes a class, where Python raises a RuntimeError instead."""

    def __set_name__(self, owner, name):
        raise Stopped("SIGTERM", 143, "after 3 of 40 pictures")


def make_class():
    type("Made", (), {"field": StoppedWhenNamed()})


@pytest.mark.parametrize(
    "run",
    [
        lambda: run_command("caption.py", make_class),
        lambda: end_with_error_of(make_class, "caption.py"),
    ],
    ids=["scripts", "training"],
)
def test_a_stop_that_a_library_turns_into_another_error_is_a_stop(run, capsys):
    with pytest.raises(SystemExit) as exit_:
        run()
    assert exit_.value.code == 143
    assert "caption.py: SIGTERM: stopped after 3 of 40 pictures. Run the same command again" in capsys.readouterr().err


def end_with_error_of(work, name):
    try:
        work()
    except BaseException as error:
        ending.end(error, name, str)

"""Two processes never write into one output folder, and a dead process locks nothing."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_metrics

from text_to_image_lora import locks
from text_to_image_lora.errors import InputError


HOLDER = """
import os, sys, time, pathlib
from text_to_image_lora.locks import alone_in
with alone_in(pathlib.Path(sys.argv[1]), "--output_dir"):
    if "forks" in sys.argv and os.fork() == 0:
        os.write(1, f"{os.getpid()}\\n".encode())
        time.sleep(60)
        os._exit(0)
    os.write(1, b"held\\n")
    time.sleep(60)
"""


@pytest.fixture
def hold():
    """Returns `hold(folder, *words)`, which starts a process that locks a folder and returns it with its first line."""
    started = []

    def start(folder, *words):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, folder, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def lock(folder):
    with locks.alone_in(Path(folder), "--output_dir"):
        return sorted(os.listdir(folder))


@pytest.mark.parametrize("flags", [{}, {"resume_from_checkpoint": "none"}, {"max_train_steps": 4, "rank": 2}])
def test_a_run_does_not_touch_the_folder_of_another(train, tmp_path, hold, flags):
    output_dir = train(max_train_steps=2, checkpointing_steps=1, output_dir=tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in sorted(output_dir.rglob("*"))}
    hold(output_dir)
    with pytest.raises(InputError) as refused:
        train(output_dir=output_dir, **flags)
    assert str(refused.value) == (
        f"{output_dir}: another process is writing into this folder. Wait until it has ended, or pass another --output_dir."
    )
    (output_dir / ".lock").unlink()
    assert {path: path.stat().st_mtime_ns for path in sorted(output_dir.rglob("*"))} == before


def test_an_evaluation_does_not_touch_the_folder_of_another(tmp_path, hold):
    out = tmp_path / "evaluation"
    out.mkdir()
    (out / "evaluation.md").write_text("of the other one")
    hold(out)
    words = ["--pretrained_model_name_or_path", "x", "--lora", "x", "--validation_data_dir", "x", "--output_dir", out]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "evaluate.py", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"evaluate.py: {out}: another process is writing into this folder. Wait until it has ended, or pass another "
        "--output_dir.\n"
    )
    assert (out / "evaluation.md").read_text() == "of the other one"


def test_a_killed_process_locks_nothing(train, tmp_path, hold):
    output_dir = train(max_train_steps=2, checkpointing_steps=1, output_dir=tmp_path / "run")
    half = [".best.0123abcd.tmp", ".checkpoint-1.0123abcd.old"]
    for name in half:
        (output_dir / name).mkdir()
    holder, _ = hold(output_dir)
    holder.kill()
    holder.wait()
    assert (output_dir / ".lock").exists()
    train(max_train_steps=3, output_dir=output_dir)
    assert [row["step"] for row in read_metrics(output_dir)] == [1, 2, 3]
    assert not {".lock", *half} & {*os.listdir(output_dir)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_the_orphans_of_a_killed_process_lock_nothing(tmp_path, hold):
    """Data loading workers are forked, and take some seconds to notice that their main process is gone."""
    holder, child = hold(tmp_path, "forks")
    child = int(child if child != "held" else holder.stdout.readline())
    with pytest.raises(InputError):
        lock(tmp_path)
    holder.kill()
    holder.wait()
    try:
        os.kill(child, 0)  # it lives
        assert lock(tmp_path) == [".lock"]
    finally:
        os.kill(child, 9)


@pytest.mark.parametrize("file", [None, "kept.txt"])
def test_a_signal_leaves_no_lock(tmp_path, file):
    """For commands that end at once, such as evaluate.py."""
    lines = [
        "import pathlib, signal",
        "from text_to_image_lora.locks import alone_in",
        "from text_to_image_lora.signals import exit_on_signals",
        "exit_on_signals()",
        f"folder = pathlib.Path({str(tmp_path)!r}, 'new')",
        "with alone_in(folder, '--output_dir'):",
        f"    (folder / {file!r}).write_text('')" if file else "    pass",
        "    signal.raise_signal(signal.SIGTERM)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "kept.txt"] if file else [])


def test_an_error_leaves_no_new_folder(tmp_path):
    for name, file in (("a/new", None), ("b/new", "kept.txt")):
        with contextlib.suppress(InputError), locks.alone_in(tmp_path / name, "--output_dir"):
            if file:
                (tmp_path / name / file).write_text("")
            raise InputError("a wrong flag")
    assert not (tmp_path / "a" / "new").exists()
    assert os.listdir(tmp_path / "b" / "new") == ["kept.txt"]
    (tmp_path / "old").mkdir()
    lock(tmp_path / "old")
    assert os.listdir(tmp_path / "old") == []


def test_wrong_flags_leave_no_new_folder(train, tmp_path):
    with pytest.raises(InputError):
        train(train_data_dir=tmp_path / "nowhere", output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), OSError(95, "Operation not supported"),
                                   OSError(37, "No locks available")])  # fmt: skip
def test_a_disk_without_locks_is_named(tmp_path, monkeypatch, said, error):
    import fcntl

    def flock(*_):
        raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    assert [name for name in lock(tmp_path) if name != ".lock"] == []
    assert [line for line in said if line.startswith(f"{tmp_path}: this disk does not support locks")]

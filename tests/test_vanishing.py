"""What a command uses disappears while it runs: files, the working directory, the reader of its output. It ends in one line."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, words_of_run, write_pictures
from test_signals import of_scripts


HOOK = """
import importlib, os, shutil
owner = importlib.import_module("text_to_image_lora.{module}")
function, calls = owner.{name}, []

def hooked(*values, **options):
    calls.append(0)
    if len(calls) == {nth}:
        {action}
    return function(*values, **options)

owner.{name} = hooked
"""


def acting_before(function, action, nth=1):
    """Returns Python code for a `Run` that executes a statement before the nth call of a function of the package."""
    module, _, name = function.rpartition(".")
    return HOOK.format(module=module, name=name, action=action, nth=nth)


@pytest.mark.parametrize("script", of_scripts())
def test_a_deleted_working_directory_is_one_line(script, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["bash", "-c", 'rmdir "$1" && exec "${@:2}"', "bash", gone, sys.executable, ROOT / script, "--help"],
        cwd=gone, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{os.path.basename(script)}: the working directory can't be found (No such file or directory). It may have been "
        "deleted: change to another one."
    ]


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_out_of_memory_without_the_file_of_config(start, tiny_sd, tmp_path, kind):
    """The line at the end suggests flags, for which it must not read --config again."""
    words = words_of_run(tiny_sd, write_pictures(tmp_path / "pictures"), tmp_path, train_batch_size=3)
    config = tmp_path / "config.yaml"
    config.write_text(
        "".join(f"{name[2:]}: {json.dumps(str(value))}\n" for name, value in zip(words[::2], words[1::2]))
    )
    given, writing = config, contextlib.nullcontext()
    if kind == "pipe":
        given = tmp_path / "pipe"
        os.mkfifo(given)
        writing = subprocess.Popen(["cp", config, given])
    action = f"os.remove({str(given)!r}); raise RuntimeError('CUDA out of memory')"
    with writing:
        code, said = start(["--config", given], tmp_path, acting_before("training.caching.fill", action)).wait()
    assert code == 1, said
    assert "Out of memory. Saved files are intact" in said.splitlines()[-1]
    assert "--train_batch_size 1 --gradient_accumulation_steps 3" in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize("what", ["deleted", "a named pipe"])
def test_a_picture_that_disappears_is_one_line(start, tiny_sd, tmp_path, what):
    pictures = write_pictures(tmp_path / "pictures")
    action = f"os.remove({str(pictures / '3.png')!r})"
    if what != "deleted":
        action += f"; os.mkfifo({str(pictures / '3.png')!r})"
    words = words_of_run(tiny_sd, pictures, tmp_path, cache_variations=0, max_train_steps=9)
    code, said = start(words, tmp_path, acting_before("training.interruption.reduce_loss_and_stop", action, 2)).wait()
    assert code == 1, said
    reason = "No such file or directory" if what == "deleted" else "it is not a regular file, but a named pipe"
    assert f"'3.png': the picture or its mask can't be read any more ({reason})." in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_deleted_output_folder_is_one_line(start, tiny_sd, tmp_path):
    words = words_of_run(tiny_sd, write_pictures(tmp_path / "pictures"), tmp_path, max_train_steps=9)
    action = f"shutil.rmtree({str(tmp_path / 'out')!r})"
    code, said = start(words, tmp_path, acting_before("training.interruption.reduce_loss_and_stop", action, 3)).wait()
    assert code == 1, said
    assert f"{tmp_path}/out/metrics.jsonl: No such file or directory. Correct the cause" in said.splitlines()[-1]
    assert "Traceback" not in said


def words_of(script, lora, tmp_path):
    """Returns the words of a command that prints a line at its end."""
    if script == "report.py":
        shutil.copytree(lora, tmp_path / "run")
        return [tmp_path / "run"]
    return [lora, tmp_path / "kohya.safetensors", "--to", "kohya"]


@pytest.mark.parametrize("script", ["report.py", "convert_lora.py"])
def test_nobody_reads_the_last_line(train, tmp_path, script):
    """As with `| head -0`: the file is written, and its name can't be told."""
    words = words_of(script, train(max_train_steps=1), tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *words],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / {"report.py": "run/report.html", "convert_lora.py": "kohya.safetensors"}[script]).is_file()


def test_a_report_on_a_full_disk_is_one_line(train, tmp_path):
    """The limit on the size of files stands for a disk that is full."""
    words = words_of("report.py", train(max_train_steps=1), tmp_path)
    before = (tmp_path / "run" / "report.html").read_bytes()
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, ROOT / "scripts" / "report.py", *words],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "report.html: it can't be written (File too large;" in done.stderr
    assert (tmp_path / "run" / "report.html").read_bytes() == before

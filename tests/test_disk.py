"""A full disk, at every file that is written: one error message, no older file is lost, and the next run resumes."""

import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import words_of_run, write_pictures
from PIL import Image
from quick_start import assert_same_end, signal_before
from safetensors import safe_open

from text_to_image_lora.errors import TrainingError
from text_to_image_lora.files import explaining_disk_errors, write_whole, written_whole
from text_to_image_lora.training.checkpoint import find_damage, list_checkpoints


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EIO"])
def test_a_disk_that_can_not_be_written_is_reported_in_one_line(tmp_path, name):
    import errno

    number = getattr(errno, name)
    write_whole(tmp_path / "file", "old")

    def write_half():
        with written_whole(tmp_path / "file") as temporary:
            temporary.write_text("ne")
            raise OSError(number, os.strerror(number))

    with pytest.raises(TrainingError) as caught:
        write_half()
    assert caught.value.exit_code == 1
    start = f"{tmp_path / 'file'}: it can't be written ({os.strerror(number)}; "
    assert str(caught.value).startswith(start)
    assert str(caught.value).removeprefix(start).split(" are free there). ")[0].endswith("iB")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), explaining_disk_errors(tmp_path):
        (tmp_path / "nothing").read_text()


def test_a_file_that_can_not_be_copied_is_one_too(tmp_path, monkeypatch):
    """shutil.copytree gives the reason only as text."""
    write_whole(tmp_path / "from" / "file", "text")

    def full(*_, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(TrainingError, match="No space left on device"), explaining_disk_errors(tmp_path / "to"):
        shutil.copytree(tmp_path / "from", tmp_path / "to")


# Every place.


# Lists the paths that are opened for writing below a folder, and writes only half of the data to the nth.
WRITER = """
import builtins, errno, io, json, os
opened, real = [], io.open

class Full:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
    def fileno(self):
        raise io.UnsupportedOperation
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()

def open_counted(path, mode="r", *options, **named):
    file = real(path, mode, *options, **named)
    name = os.fspath(path) if not isinstance(path, int) else ""
    # A temporary file without a name is opened by its folder.
    if not set(mode) & set("wax") or not name.startswith({folder!r}) or os.path.isdir(name):
        return file
    opened.append(os.path.relpath(name, {folder!r}))
    with real({record!r}, "w") as record:
        json.dump(opened, record)
    return Full(file) if len(opened) == {nth} else file

io.open = builtins.open = open_counted
"""
FLAGS = dict(
    max_train_steps=4, checkpointing_steps=2, checkpoints_total_limit=2, use_ema=True, validation_split=0.34,
    validation_steps=4, validation_prompt="a red axe", save_every_n_epochs=1, output_kohya_format=True,
)  # fmt: skip


def written(start, words, folder, nth):
    """Runs the command with a disk that is full at the nth file, and returns its exit code, its output, and the files."""
    before = WRITER.format(folder=str(folder / "run"), record=str(folder / "record.json"), nth=nth)
    code, said = start(words, folder, before=before).wait()
    opened = json.loads((folder / "record.json").read_text())
    # The names of temporary files contain random digits.
    return code, said, [re.sub(r"\.[0-9a-f]{8}\.tmp", ".tmp", path) for path in opened]


def assert_all_is_whole(folder):
    """Checks that each file that a reader may use can be read."""
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert len(file.keys())
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    for checkpoint in list_checkpoints(folder / "out"):
        assert find_damage(checkpoint) is None


def places(opened, resumed):
    """Returns numbers of files, from 1: the first write to each path, and the last write to metrics.jsonl.

    For a new run, these are only files before its first step; for a resumed run, all files.
    """
    first = {path: number for number, path in reversed([*enumerate(opened, 1)])}
    numbers = sorted({*first.values(), max(k for k, path in enumerate(opened, 1) if path == "out/metrics.jsonl")})
    begins = first["out/metrics.jsonl"] if not resumed else len(opened)
    return [number for number in numbers if number <= begins]


@pytest.mark.long
@pytest.mark.parametrize("resumed", [False, True], ids=["from the beginning", "resumed"])
def test_a_full_disk_at_every_file_in_turn(start, tiny_sd, tmp_path, resumed):
    pictures = write_pictures(tmp_path / "pictures")

    def words(folder, **changes):
        flags = FLAGS | dict(output_dir=folder / "run" / "out", latent_cache_dir=folder / "run" / "cache") | changes
        return words_of_run(tiny_sd, pictures, folder, **flags)

    undisturbed, template = tmp_path / "undisturbed", tmp_path / "template"
    assert start(words(undisturbed), undisturbed).wait()[0] == 0
    (template / "run").mkdir(parents=True)
    if resumed:
        stop = signal_before("training.interruption.reduce_loss_and_stop", 3, "SIGUSR1")
        assert start(words(template), template, before=stop).wait()[0] == 75
    looking = shutil.copytree(template, tmp_path / "looking")
    code, said, opened = written(start, words(looking), looking, 0)
    assert code == 0, said
    kinds, parts = set(), set()
    for number in places(opened, resumed):
        site, folder = opened[number - 1], shutil.copytree(template, tmp_path / f"full-{number}")
        code, said, _ = written(start, words(folder), folder, number)
        if site.endswith(("pictures-3.txt", ".report.html.tmp")):  # a run does not depend on this list and this page
            assert code == 0, said
            assert_same_end(undisturbed / "run" / "out", folder / "run" / "out")
            continue
        kinds.add(os.path.basename(site))
        parts |= {*site.split("/")}
        assert code == 1, (site, said)
        assert "Traceback" not in said
        last = said.strip().splitlines()[-1]
        assert last.startswith(f"train_text_to_image_lora.py: {folder / 'run'}/"), (site, last)
        assert "it can't be written (No space left on device; " in last
        assert " are free there). The old content is intact. Free some space and run the same command again" in last
        assert_all_is_whole(folder / "run")
        assert list_checkpoints(folder / "run" / "out") or not resumed
        code, said = start(words(folder), folder).wait()
        assert code == 0, said
        assert_same_end(undisturbed / "run" / "out", folder / "run" / "out")
        shutil.rmtree(folder)
    if resumed:
        assert {"metrics.jsonl", "optimizer.pt", "ema.pt", "state.json", "manifest.json", ".sheet.png.tmp"} <= kinds
        assert {".best.tmp", ".checkpoint-4.tmp", ".README.md.tmp"} <= parts
    else:
        assert {"latents", "prompts", ".run.yaml.tmp", ".step-000000.tmp"} <= parts


@pytest.mark.long
@pytest.mark.parametrize("kib", [40, 300, 700])
def test_a_small_disk(start, tiny_sd, tmp_path, kib):
    """Uses a real file system in memory with a limited size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    try:
        pictures = write_pictures(tmp_path / "pictures", count=8)
        words = words_of_run(tiny_sd, pictures, tmp_path, **FLAGS | dict(output_dir=disk / "out"))
        code, said = start(words, tmp_path).wait()
        assert code == 1, said
        assert "Traceback" not in said
        last = said.strip().splitlines()[-1]
        assert last.startswith(f"train_text_to_image_lora.py: {disk}/out/"), last
        assert "No space left on device" in last
        checkpoints = list_checkpoints(disk / "out")
        assert [find_damage(path) for path in checkpoints] == [None] * len(checkpoints)
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        code, said = start(words, tmp_path).wait()
        assert code == 0, said
        straight = tmp_path / "straight"
        words = words_of_run(tiny_sd, pictures, straight, **FLAGS | dict(latent_cache_dir=tmp_path / "cache"))
        assert start(words, straight).wait()[0] == 0
        assert_same_end(straight / "out", disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.long
def test_a_read_only_disk_is_reported_before_anything_is_loaded(start, tiny_sd, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    try:
        pictures = write_pictures(tmp_path / "pictures")
        words = words_of_run(tiny_sd, pictures, tmp_path, output_dir=disk / "out")
        code, said = start(words, tmp_path).wait(10)
        assert code == 2
        assert f"{disk / 'out'}: it can't be written (Read-only file system). Pass another --output_dir." in said
    finally:
        subprocess.run(["umount", disk], check=True)

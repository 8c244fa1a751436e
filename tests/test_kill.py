"""A run that is killed anywhere and resumed ends like an undisturbed run, bit for bit: weights, metrics, pictures."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT, TORCHRUN, words_of_run, write_pictures
from quick_start import assert_same_end

from text_to_image_lora.training.checkpoint import find_damage, list_checkpoints


# Kills its own process at the nth moment: a change of the files below a folder, or the end of a step.
KILLING = """
import os, signal, sys
from text_to_image_lora.training import interruption
moments, look = [], interruption.reduce_loss_and_stop

def pass_by(what):
    moments.append(what)
    if len(moments) == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if (writes or event in ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree")) and (
        isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]).startswith({folder!r})
    ):
        pass_by(os.path.relpath(arguments[0], {folder!r}))

def end_of_step(*values):
    pass_by("step")
    return look(*values)

sys.addaudithook(watch)
interruption.reduce_loss_and_stop = end_of_step
import atexit, json
atexit.register(lambda: json.dump(moments, open({record!r}, "w")))
"""
FLAGS = dict(
    max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2, aspect_ratio_buckets=True, validation_split=0.34,
    validation_steps=3, use_ema=True, validation_prompt="a red axe", lora_dropout=0.1, random_flip=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = write_pictures(tmp_path_factory.mktemp("kill") / "pictures")
    write_pictures(folder / "tall", count=4, size=(32, 44), seed=1)
    return folder


def drawn_from(moments, count, drawn):
    """Returns numbers of moments, from 1: one of each kind, and then one in each of equal parts of the run."""
    kinds = ("cache/", "step", "checkpoint-", "validation/")
    numbers = [drawn.choice([nth for nth, what in enumerate(moments, 1) if kind in what]) for kind in kinds]
    parts = count - len(kinds)
    return numbers + [1 + int((part + drawn.random()) * len(moments) / parts) for part in range(parts)]


def killing(folder, nth):
    return KILLING.format(folder=str(folder / "run"), record=str(folder / "record.json"), nth=nth)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "kills"), [(1, 14), (2, 8)])
def test_killed_anywhere(start, tiny_sd, pictures, tmp_path, processes, kills):
    """Kills the run at moments of each kind and in each part of the run."""
    import json

    def words(folder):
        folders = dict(output_dir=folder / "run" / "out", latent_cache_dir=folder / "run" / "cache")
        return words_of_run(tiny_sd, pictures, folder, **FLAGS | folders | dict(train_batch_size=2 // processes))

    def run(folder, before=""):
        """Runs all processes, which are killed when the first one kills itself; returns its exit code and its output."""
        runs = (
            start.together(words(folder), folder, processes, {0: before})
            if processes > 1
            else [start(words(folder), folder, before)]
        )
        code, said = runs[0].wait()
        for other in runs[1:]:
            if code < 0 and not other.ended():
                os.kill(other.pid, signal.SIGKILL)
            other.wait()
        return code, said

    undisturbed, seed = tmp_path / "undisturbed", random.randrange(2**32)
    code, said = run(undisturbed, killing(undisturbed, 0))
    assert code == 0, said
    moments = json.loads((undisturbed / "record.json").read_text())
    for nth in drawn_from(moments, kills, random.Random(seed)):
        folder = tmp_path / f"killed-{nth}"
        what = f"seed {seed}, moment {nth} of {len(moments)}: {moments[nth - 1]}"
        code, said = run(folder, killing(folder, nth))
        assert code == -signal.SIGKILL, (what, said)
        whole = [find_damage(path) is None for path in list_checkpoints(folder / "run" / "out")]
        assert all(whole), what  # no file is ever incomplete
        code, said = run(folder)
        assert code == 0, (what, said)
        assert "Traceback" not in said
        try:
            assert_same_end(undisturbed / "run" / "out", folder / "run" / "out")
        except AssertionError as error:
            raise AssertionError(what) from error
        shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.parametrize("base", ["tiny_xl", "tiny_sd2"])
def test_other_families_killed_in_the_middle(start, request, pictures, tmp_path, base):
    """Kills the run at the end of its fifth step; its latest checkpoint is that of the fourth step."""
    import json

    def run(folder, before=""):
        folders = dict(output_dir=folder / "run" / "out", latent_cache_dir=folder / "run" / "cache")
        words = words_of_run(request.getfixturevalue(base), pictures, folder, **FLAGS | folders)
        return start(words, folder, before).wait()

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    code, said = run(undisturbed, killing(undisturbed, 0))
    assert code == 0, said
    moments = json.loads((undisturbed / "record.json").read_text())
    nth = [number for number, what in enumerate(moments, 1) if what == "step"][4]
    assert run(killed, killing(killed, nth))[0] == -signal.SIGKILL
    code, said = run(killed)
    assert code == 0, said
    assert "checkpoint-4 (step 4)" in said
    assert_same_end(undisturbed / "run" / "out", killed / "run" / "out")


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_ends_the_others(tiny_sd, pictures, tmp_path, lost):
    """Under torchrun, nothing hangs, and the remaining process reports which process was lost."""
    flags = FLAGS | dict(max_train_steps=4000, validation_steps=4000)
    words = words_of_run(tiny_sd, pictures, tmp_path, **flags, train_batch_size=1)
    said = open(tmp_path / "said", "wb")  # noqa: SIM115 (closed below)
    process = subprocess.Popen(
        [*TORCHRUN, "train_text_to_image_lora.py", *words], cwd=ROOT, stdout=said, stderr=said,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    said.close()
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("train_loss") < 5:
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(pid_of_rank(process.pid, lost), signal.SIGKILL)
    assert process.wait(60) == 1
    text = (tmp_path / "said").read_text()
    assert f"Process {1 - lost} has lost process {lost} (" in text
    assert [find_damage(path) for path in list_checkpoints(tmp_path / "out")][-1] is None


def pid_of_rank(launcher, rank):
    import psutil

    children = psutil.Process(launcher).children()
    return next(child.pid for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.long
def test_a_data_loader_worker_that_dies_is_reported(start, tiny_sd, pictures, tmp_path):
    import psutil

    words = words_of_run(
        tiny_sd, pictures, tmp_path, max_train_steps=4000, checkpointing_steps=3, cache_variations=0,
        dataloader_num_workers=2,
    )  # fmt: skip
    run = start(words, tmp_path)
    run.until(lambda: (tmp_path / "out" / "checkpoint-3").exists())
    workers = [child for child in psutil.Process(run.pid).children() if child.is_running()]
    workers[0].kill()
    code, said = run.wait(60)
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert "DataLoader worker" in last
    assert "resume with fewer --dataloader_num_workers" in last
    assert "Traceback" not in said

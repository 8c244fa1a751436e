"""A sweep whose files can't be written ends in one line, and goes on when they can."""

import csv
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts import sweep


LAUNCHER = f"{sys.executable} {ROOT / 'tests' / 'sweep_launcher.py'}"
FLAGS = ["validation_split=0.1", "train_data_dir=a", "max_train_steps=2"]


def words_of(folder, launcher=LAUNCHER):
    return ["--sweep_dir", str(folder), "--launcher", launcher, "--sweep", "rank=2,4", "--flags", *FLAGS]


def states(folder):
    with open(folder / "results.csv", newline="") as file:
        return sorted((row["rank"], row["state"]) for row in csv.DictReader(file))


@pytest.mark.parametrize(("limit", "file"), [(16384, "command.txt"), (300, "trials.log")])
def test_a_full_disk_ends_a_sweep_in_one_line(tmp_path, limit, file):
    """No file may become larger than the limit; only command.txt contains the long launcher."""
    resource = pytest.importorskip("resource")
    launcher = f"env X={'x' * 20000} {LAUNCHER}"
    done = subprocess.run(
        [sys.executable, "scripts/sweep.py", *words_of(tmp_path / "sweep", launcher)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("sweep.py: ")
    assert "File too large" in line
    assert (file == "command.txt") == (file in line)
    assert not (tmp_path / "sweep" / "trial-0000" / "command.txt").exists()
    sweep.main(words_of(tmp_path / "sweep"))
    assert states(tmp_path / "sweep") == [("2", "complete"), ("4", "complete")]


@pytest.mark.parametrize("blocked", ["open.lock", "results.md", "trial-0000/log.txt"])
def test_a_file_that_cannot_be_written_is_named_in_one_line(tmp_path, blocked):
    (tmp_path / "sweep" / blocked).mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "scripts/sweep.py", *words_of(tmp_path / "sweep")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("sweep.py: ")
    assert blocked in line

"""A sweep whose journal was cut by a full disk or a power cut goes on; a broken line in its middle is named."""

import csv
import sys

import pytest
from conftest import ROOT

from scripts import sweep
from scripts.sweeping.settings import SweepError
from scripts.sweeping.study import open_journal


LAUNCHER = f"{sys.executable} {ROOT / 'tests' / 'sweep_launcher.py'}"
FLAGS = ["validation_split=0.1", "train_data_dir=a", "max_train_steps=2"]


def words_of(folder, launcher=LAUNCHER):
    return ["--sweep_dir", str(folder), "--launcher", launcher, "--sweep", "rank=2,4", "--flags", *FLAGS]


@pytest.fixture
def finished(tmp_path):
    """A sweep whose two trials have ended."""
    sweep.main(words_of(tmp_path / "sweep"))
    return tmp_path / "sweep"


def states(folder):
    with open(folder / "results.csv", newline="") as file:
        return sorted((row["rank"], row["state"]) for row in csv.DictReader(file))


DAMAGES = {
    "cut": lambda text: text[:-20],
    "without its line break": lambda text: text[:-1],
    "one letter": lambda text: text + b"{",
    "NUL bytes": lambda text: text[:-20] + bytes(20),
    "a line of NUL bytes": lambda text: text + bytes(20) + b"\n",
    "cut in its first line": lambda text: text[:20],
    "empty": lambda text: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_sweep_goes_on_after_a_cut_journal(finished, damage, capsys):
    journal = finished / "trials.log"
    journal.write_bytes(DAMAGES[damage](journal.read_bytes()))
    capsys.readouterr()
    sweep.main(words_of(finished))
    out = capsys.readouterr().out
    assert out.count("the unfinished last line was removed") == (damage != "empty")
    assert states(finished) == [("2", "complete"), ("4", "complete")]
    sweep.main(words_of(finished))
    assert "unfinished" not in capsys.readouterr().out


@pytest.mark.parametrize("cut_at", range(0, 1200, 97))
def test_a_journal_may_be_cut_anywhere(finished, cut_at):
    journal = finished / "trials.log"
    journal.write_bytes(journal.read_bytes()[:cut_at])
    for _ in range(2):
        sweep.main(words_of(finished))
        assert states(finished) == [("2", "complete"), ("4", "complete")]


@pytest.mark.parametrize("broken", [b'{"op_code":4,{"op_code"', b"", bytes(9), b"7", b"\xff"])
def test_a_broken_line_in_the_middle_is_named(finished, broken):
    journal = finished / "trials.log"
    lines = journal.read_bytes().split(b"\n")
    lines[2] = broken
    before = b"\n".join(lines)
    journal.write_bytes(before)
    with pytest.raises(
        SweepError, match=r"trials\.log:3: the line is broken\. Restore the file from a backup, or pass an"
    ):
        sweep.main(words_of(finished))
    assert journal.read_bytes() == before


def test_a_worker_removes_what_another_one_left_unfinished(tmp_path):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(storage=open_journal(tmp_path / "trials.log"), study_name="sweep")
    with open(tmp_path / "trials.log", "ab") as file:
        file.write(b'{"op_code":')
    study.enqueue_trial({"rank": 4})
    again = optuna.load_study(storage=open_journal(tmp_path / "trials.log"), study_name="sweep")
    assert len(again.trials) == len(study.trials) == 1

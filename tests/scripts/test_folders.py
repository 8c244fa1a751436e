"""The commands of scripts/ and the folders of their parts: what they import, and how they are found."""

import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT


SCRIPTS = ROOT / "scripts"
COMMANDS = sorted(path for path in SCRIPTS.glob("*.py") if path.name != "__init__.py")
PARTS = sorted(path for path in SCRIPTS.glob("*/*.py") if path.name != "__init__.py")
WORKSHOP = ("draw", "make", "controlnet", "measure")
STARTED_BY_PATH = {
    "inside.py": 2,
    "bare_unet.py": 2,
}  # {file that the benchmarks run in a separate process: its depth below the root}
BELOW = {
    "sweeping": set(),
    "annotating": set(),
    "captioning": {"annotating"},
    "masking": {"annotating"},
    "comparing": set(),
    "evaluation": {"mini_sd"},
    "benchmarks": {"mini_sd"},
    "mini_sd": set(),
}


def help_of(*words, cwd):
    done = subprocess.run([sys.executable, *words, "--help"], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_a_command_is_found_from_any_folder(command, tmp_path):
    assert help_of(command, cwd=tmp_path).startswith(f"usage: {command.name}")


@pytest.mark.parametrize("name", WORKSHOP)
def test_a_command_of_the_workshop_runs_as_a_module(name):
    assert help_of("-m", f"scripts.mini_sd.{name}", cwd=ROOT).startswith("usage: ")


@pytest.mark.parametrize("path", [*COMMANDS, *PARTS], ids=lambda path: path.relative_to(SCRIPTS).as_posix())
def test_only_what_is_started_by_its_path_changes_where_modules_are_found(path):
    """In one line; `inside.py` also replaces its own folder by that of the script that it runs."""
    depth = 1 if path.parent == SCRIPTS else STARTED_BY_PATH.get(path.name)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if "sys.path" in line]
    own = [
        line
        for line in lines
        if line.startswith(f"sys.path.insert(0, str(Path(__file__).resolve().parents[{depth}]))")
    ]
    others = [line for line in lines if line not in own]
    assert len(own) <= 1
    assert others == (["sys.path[0] = str(Path(script).resolve().parent)"] if path.name == "inside.py" else [])


def test_no_file_hides_another_module():
    """The folder of a file that is run by its path is on sys.path before the standard library and packages."""
    others = sys.stdlib_module_names | packages_distributions().keys()
    for path in [*COMMANDS, *(SCRIPTS / "benchmarks").glob("*.py")]:
        assert path.stem == "__init__" or path.stem not in others


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.relative_to(SCRIPTS).as_posix())
def test_a_part_uses_its_own_folder_and_the_workshop_alone(path):
    """Imports are relative, so that each module has one name, and no command is imported."""
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) scripts\b", source, flags=re.MULTILINE)
    assert set(re.findall(r"from \.\.(\w+)[.\w]* import", source)) <= BELOW[path.parent.name]
    assert set(re.findall(r"from \.\. import (.*)", source)) <= {"ROOT"}

"""Runs uv, and the programs of requirements-tools.txt in separate environments."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def requirements(name):
    """Returns the lines of a requirements file without comments and references to other files."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


PINS = {line.partition("==")[0]: line for line in requirements("requirements-tools.txt")}


def copy_project(folder):
    """Copies the files that the package is built from, and the recipes."""
    for name in ("text_to_image_lora", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "pyproject.toml",
        "requirements.txt",
        "README.md",
        "LICENSE",
        "train_text_to_image_lora.py",
        "infer.py",
    ):
        shutil.copy(ROOT / name, folder)
    return folder


class Uv:
    """uv in a folder; `env` makes child processes find it, and makes uv use the installed PyTorch."""

    def __init__(self, folder):
        (folder / "constraints.txt").write_text(f"torch=={importlib.metadata.version('torch')}\n")
        pip = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
        found = os.environ.get("PIP_FIND_LINKS") or subprocess.run(pip, capture_output=True, text=True).stdout
        self.env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.env |= {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "UV_PYTHON": "{}.{}".format(*sys.version_info),
        }
        if found.split():  # uv ignores pip's settings, and would download gigabytes of CUDA packages
            self.env |= {"UV_FIND_LINKS": ",".join(found.split()), "UV_CONSTRAINT": str(folder / "constraints.txt")}

    def __call__(self, *words, cwd=ROOT, env=None, timeout=900):
        """Runs `uv WORDS` and returns the finished process, with stdout and stderr as text."""
        return subprocess.run(
            ["uv", *map(str, words)], cwd=cwd, env=self.env | (env or {}), capture_output=True, text=True, timeout=timeout
        )  # fmt: skip

    def run_tool(self, package, *words):
        """Runs a program of requirements-tools.txt in an environment that contains only this program."""
        return self("tool", "run", "--from", PINS[package], *words)


@pytest.fixture(scope="session", name="uv")
def uv_of_the_session(tmp_path_factory):
    """Returns a `Uv`; skips the test if the package index cannot be reached."""
    folder = tmp_path_factory.mktemp("uv")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--target", folder, PINS["uv"]]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode and "connection broken by" in done.stderr:
        pytest.skip("the package index can't be reached, and uv comes from there")
    assert done.returncode == 0, done.stderr
    return Uv(Path(folder))

"""The items that are compared: commands that write one folder of results for each checkout."""

import hashlib
import json
import re
import shutil
import time
from importlib.metadata import version
from typing import NamedTuple

from filelock import FileLock

from . import commands, drawings, inputs, mistakes, runs


class Item(NamedTuple):
    """Commands {label: line}, as `commands.run` takes them, whose results are kept in one folder."""

    name: str
    lines: dict
    may_fail: bool = False  # wrong commands: each has its own output folder
    begun_before: bool = False  # the first command is run by the earlier checkout for both


class Side(NamedTuple):
    """One of the two checkouts. Its results are kept if it has a commit."""

    name: str  # "before" or "after"
    checkout: object  # Path
    commit: str | None = None


def all_items():
    """Returns {name: `Item`}, the fastest items first."""
    found = [Item("help", {program: f"COLUMNS=1000 {program} --help" for program in ("train", "infer")})]
    found += [Item(name, mistakes.lines_of(name), may_fail=True) for name in mistakes.MISTAKES]
    found += [Item(name, numbered(drawings.lines_of(name))) for name in drawings.DRAWINGS]
    found += [Item(name, numbered(runs.lines_of(name))) for name in runs.RUNS]
    found += [Item(name, numbered(runs.lines_of(name)), begun_before=True) for name in runs.RESUMED]
    return {item.name: item for item in found}


def numbered(lines):
    return {str(number): line for number, line in enumerate(lines, 1)}


def make_inputs(work_dir):
    """Writes the inputs of the commands, and returns {name in a line: folder}."""
    kinds = {"data": inputs.pictures(), "drawing": inputs.drawing_inputs(), "broken": inputs.broken_inputs()}
    return {kind: inputs.write(kind, files, work_dir) for kind, files in kinds.items()}


def folder_of(item, side, given, work_dir):
    """Returns the folder for the results of an item. For a commit, its name is a hash of everything that they depend on."""
    used = {name: str(path) for name, path in given.items() if any(f"${name}" in line for line in item.lines.values())}
    versions = [version(package) for package in ("torch", "diffusers", "transformers", "peft")]
    lines = {label: line.split() for label, line in item.lines.items()}
    what = [side.commit, used, lines, versions] if side.commit else [side.name, str(side.checkout)]
    return work_dir / f"{item.name}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"


def make(item, side, given, work_dir, begun=None):
    """Runs the commands of an item unless their results exist, and returns the folder of the results and its `made.json`.

    `begun` is the folder of the earlier checkout's results, from which the later one resumes an item with `begun_before`.
    """
    folder = folder_of(item, side, given, work_dir)
    with FileLock(f"{folder}.lock"):  # a second call waits for the results of the first
        if side.commit and (folder / "made.json").is_file():
            return folder, json.loads((folder / "made.json").read_text()) | {"kept": True}
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        started, labels, codes = time.time(), [*item.lines], {}
        if begun is not None:
            shutil.copytree(begun / "begun", folder / "out", dirs_exist_ok=True)
            labels = labels[1:]
        for label in labels:
            out = folder / "out" / label if item.may_fail else folder / "out"
            values = {"out": out} | given
            codes[label] = commands.run(item.lines[label], side.checkout, folder, label, values)
            if codes[label] and not item.may_fail:
                error = (folder / f"{label}.stderr").read_text(errors="replace")
                error = re.sub(r"(?s)\n[^\n]*torch/distributed/elastic/.*", "", error).strip()
                raise commands.Failed(f"{(error or 'no error message').splitlines()[-1]} (see {folder})")
            if item.begun_before and begun is None and label == labels[0]:
                shutil.copytree(folder / "out", folder / "begun")
        made = {"seconds": round(time.time() - started), "checkout": str(side.checkout), "codes": codes}
        (folder / "made.json").write_text(json.dumps(made))
        return folder, made | {"kept": False}

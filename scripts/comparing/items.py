"""What is compared: each item is some commands, which leave a folder for each checkout."""

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
    """Commands, `{label: line}` as `commands.run` takes them, that leave one folder."""

    name: str
    lines: dict
    may_fail: bool = False  # wrong commands: each has an output folder of its own
    begun_before: bool = False  # the earlier checkout runs the first command for both sides


class Side(NamedTuple):
    """One of the two checkouts; without a commit, nothing of it is kept."""

    name: str  # "before" or "after"
    checkout: object  # Path
    commit: str | None = None


def all_items():
    """{name: `Item`}, in the order in which they are reported: the quick ones first."""
    found = [Item("help", {program: f"COLUMNS=1000 {program} --help" for program in ("train", "infer")})]
    found += [Item(name, mistakes.lines_of(name), may_fail=True) for name in mistakes.MISTAKES]
    found += [Item(name, numbered(drawings.lines_of(name))) for name in drawings.DRAWINGS]
    found += [Item(name, numbered(runs.lines_of(name))) for name in runs.RUNS]
    found += [Item(name, numbered(runs.lines_of(name)), begun_before=True) for name in runs.RESUMED]
    return {item.name: item for item in found}


def numbered(lines):
    return {str(number): line for number, line in enumerate(lines, 1)}


def make_inputs(work_dir):
    """{name in a line: folder} of what the commands are given."""
    kinds = {"data": inputs.pictures(), "drawing": inputs.drawing_inputs(), "broken": inputs.broken_inputs()}
    return {kind: inputs.write(kind, files, work_dir) for kind, files in kinds.items()}


def folder_of(item, side, given, work_dir):
    """Where a side's part of an item lies; its name tells all that the content depends on, if the side has a commit."""
    used = {name: str(path) for name, path in given.items() if any(f"${name}" in line for line in item.lines.values())}
    versions = [version(package) for package in ("torch", "diffusers", "transformers", "peft")]
    lines = {label: line.split() for label, line in item.lines.items()}
    what = [side.commit, used, lines, versions] if side.commit else [side.name, str(side.checkout)]
    return work_dir / f"{item.name}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"


def make(item, side, given, work_dir, begun=None):
    """Makes a side's part of an item, if it isn't kept; returns its folder and what `made.json` there says.

    `begun` is the folder of the earlier checkout's part, from which an item that is `begun_before` starts.
    """
    folder = folder_of(item, side, given, work_dir)
    with FileLock(f"{folder}.lock"):  # of two calls at the same time, one waits for what the other makes
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
                said = (folder / f"{label}.stderr").read_text(errors="replace")
                said = re.sub(r"(?s)\n[^\n]*torch/distributed/elastic/.*", "", said).strip()
                raise commands.Failed(f"{(said or 'it said nothing').splitlines()[-1]} (see {folder})")
            if item.begun_before and begun is None and label == labels[0]:
                shutil.copytree(folder / "out", folder / "begun")
        made = {"seconds": round(time.time() - started), "checkout": str(side.checkout), "codes": codes}
        (folder / "made.json").write_text(json.dumps(made))
        return folder, made | {"kept": False}

"""Reads `metrics.jsonl` into curves."""

import collections
import json
from array import array
from pathlib import Path
from typing import Any, NamedTuple

from ..small_files import is_kind


FILE = "metrics.jsonl"
LOSS = "validation/relative_loss"


class Curve(NamedTuple):
    """The values of one metric, without nulls, and the step of each value."""

    steps: array  # of int64
    values: array  # of float64


class Numbers(NamedTuple):
    """The metrics of a run, as arrays: 100,000 steps take 10 MB, and would take 85 MB as a dict per row."""

    curves: dict  # {name: `Curve`}
    validations: list  # the complete rows of the steps that were validated
    last_step: int  # 0 if there is none


def parse_row(line: str) -> dict[str, Any] | None:
    """Returns the row of a line of `metrics.jsonl`; None if the line is partial, or not a row of numbers with a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(step := row.get("step")) is not int or not 0 <= step < 2**53:
        return None
    return row if all(value is None or is_kind(value, float) for value in row.values()) else None


def read_numbers(folder: str | Path) -> Numbers:
    """Reads the `Numbers` in an output folder, skipping lines that are no rows; without the file they are empty."""
    columns = collections.defaultdict(lambda: Curve(array("q"), array("d")))
    validations, last_step = [], 0
    path = Path(folder) / FILE
    if not path.exists():
        return Numbers({}, [], 0)
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if (row := parse_row(line)) is None:
                continue
            step = last_step = row["step"]
            for name, value in row.items():
                if name != "step" and value is not None:
                    columns[name].steps.append(step)
                    columns[name].values.append(value)
            if row.get(LOSS) is not None:
                validations.append(row)
    return Numbers(dict(columns), validations, last_step)

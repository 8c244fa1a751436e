"""`metrics.jsonl` as it is read: each number with the steps it was told at."""

import collections
import json
from array import array
from pathlib import Path
from typing import NamedTuple


FILE = "metrics.jsonl"
LOSS = "validation/relative_loss"


class Curve(NamedTuple):
    """A number of a run: its values, and the step of each. None are left in between."""

    steps: array  # of int64
    values: array  # of float64


class Numbers(NamedTuple):
    """What a run has told.

    A page is made of them while the run goes on: of 100,000 steps they take 10 MB so; rows as dicts took 85.
    """

    curves: dict  # {name: `Curve`}
    validations: list  # the rows of the steps whose held-out loss was measured, whole
    last_step: int  # that is told of; 0 where there is none


def read_numbers(folder):
    """The `Numbers` in an output folder; a line that is half written is left out, and without the file there are none."""
    columns, validations, last_step = collections.defaultdict(lambda: Curve(array("q"), array("d"))), [], 0
    path = Path(folder) / FILE
    if not path.exists():
        return Numbers({}, [], 0)
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            step = last_step = row["step"]
            for name, value in row.items():
                if name != "step" and value is not None:
                    columns[name].steps.append(step)
                    columns[name].values.append(value)
            if row.get(LOSS) is not None:
                validations.append(row)
    return Numbers(dict(columns), validations, last_step)

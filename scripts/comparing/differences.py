"""Describes how the results of two checkouts differ."""

import difflib
import re
from typing import NamedTuple

import torch

from .texts import Lines


NUMBERS_DIFFER = "THE NUMBERS DIFFER"


class Difference(NamedTuple):
    """A value that differs: where it is, how it differs, and the lines of both sides if it is text."""

    where: str
    how: str
    lines: tuple | None = None

    def __str__(self):
        return f"{self.where}: {self.how}"


def differences(before, after):
    """Returns the `Difference`s of two results of `reading.read_item`."""
    found = []
    for where in before | after:
        if where not in before or where not in after:
            found.append(Difference(where, f"only there {'before' if where in before else 'after'}"))
            continue
        a, b = before[where], after[where]
        how = difference(a, b)
        if how is not None:
            found.append(Difference(where, how, (a, b) if isinstance(a, Lines) and isinstance(b, Lines) else None))
    return found


def difference(a, b):
    """Returns how two values differ as text, or None. Tensors are compared bit by bit, other values with their type."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{tuple(a.shape)} {a.dtype} became {tuple(b.shape)} {b.dtype}"
        if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            return None
        return f"differs by {(a.double() - b.double()).abs().max().item():.3g} at most"
    # repr, because nan must equal nan, and 1 must equal neither True nor 1.0
    if type(a) is type(b) and repr(a) == repr(b):
        return None
    if isinstance(a, Lines) and isinstance(b, Lines):
        line, old, new = next(changes(a, b))
        return (f"line {line}: " if len(a) > 1 or len(b) > 1 else "") + shown("\n".join(old), "\n".join(new))
    if isinstance(a, list) and isinstance(b, list):
        gone, new = ([x for x in one if x not in other] for one, other in ((a, b), (b, a)))
        listed = [f"only {when}: {', '.join(map(str, x))}" for when, x in (("before", gone), ("after", new)) if x]
        return "; ".join(listed) or "another order"
    return shown(a, b)


def shown(a, b, room=160):
    """Returns the text "a became b"; long values are truncated to the surroundings of their first difference."""
    a, b = repr(a), repr(b)
    start = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    start = max(0, start - room // 2) if max(len(a), len(b)) > room else 0
    cut = [
        ("..." if start else "") + x[start : start + room] + ("..." if len(x) > start + room else "") for x in (a, b)
    ]
    return " became ".join(cut)


def changes(a, b):
    """Yields (line number, old lines, new lines) for each place where two texts differ."""
    for kind, a_start, a_end, b_start, b_end in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            yield a_start + 1, a[a_start:a_end], b[b_start:b_end]


def list_of_words(found):
    """Returns the list of --words: each change of lines once, with one of the places where it occurs.

    `found` is {item: its `Difference`s of text}. Changes of numbers are marked, because new wording should not change them.
    """
    places = {}
    for item, each in found.items():
        for one in each:
            for _, old, new in changes(*one.lines):
                places.setdefault((old, new), []).append(f"{item}, {one.where}")
    blocks = []
    for (old, new), where in places.items():
        numbers = [sorted(re.findall(r"\d+(?:[.,]\d+)*", " ".join(lines))) for lines in (old, new)]
        mark = f"  {NUMBERS_DIFFER}" if numbers[0] != numbers[1] else ""
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        blocks.append("\n".join([f"# {where[0]}{more}{mark}", *(f"- {x}" for x in old), *(f"+ {x}" for x in new)]))
    return "\n\n".join(blocks) + "\n"

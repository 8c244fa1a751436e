"""Reads small JSON and YAML files, which may come from anyone: with limits, and with types that are checked.

Raises `InputError`, which names the file and the key. Imports nothing heavy.
"""

import json
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError


MOST_BYTES = 16 * 2**20  # of a file
MOST_LEVELS = 50  # of lists and mappings inside each other
MOST_NODES = 1_000_000  # values in a YAML file, with its aliases written out
REQUIRED: Any = object()
AGAIN = "Correct the file, or download the model again."
NAMES = {
    str: "text", bool: "true or false", dict: "a mapping", list: "a list", int: "a whole number", float: "a number"
}  # fmt: skip


class Values(dict):
    """The mapping in a small file, whose values `want` checks.

    Args:
        name: The file, as in messages.
        remedy: The sentence that ends messages.
    """

    def __init__(self, values: dict, name: str | Path, remedy: str = AGAIN):
        super().__init__(values)
        self.name = str(name)
        self.remedy = remedy

    def refusal(self, reason: str) -> InputError:
        """Returns an `InputError` about the file."""
        return _refusal(self.name, reason, self.remedy)

    def want(self, key: str, kind: Any, default: Any = REQUIRED) -> Any:
        """Returns the value of a key, or `default` if the key is missing, or null while the default is None.

        `kind` is a type, a `command_line.Number`, a list [kind] for a list of such values that is not empty, a set of texts, or a tuple of
        kinds of which one must fit. Numbers must be finite. Raises `InputError` if the value is of another kind.
        """
        if key not in self and default is not REQUIRED:
            return default
        value = self.get(key)
        if (value is None and default is None) or is_kind(value, kind):
            return value
        reason = f"'{key}' is missing" if key not in self else f"'{key}' is {shown(value)}"
        raise self.refusal(f"{reason}, but must be {describe_kind(kind)}")


def _refusal(name, reason, remedy):
    return InputError(f"{name}: {reason}. {remedy}".rstrip())


def is_kind(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON or YAML file is of a kind, see `Values.want`."""
    if isinstance(kind, tuple):
        return any(is_kind(value, each) for each in kind)
    if isinstance(kind, list):
        return isinstance(value, list | tuple) and bool(value) and all(is_kind(each, kind[0]) for each in value)
    if isinstance(kind, set | frozenset):
        return isinstance(value, str) and value in kind
    bounds = None if isinstance(kind, type) else kind
    kind = kind if bounds is None else bounds.kind
    if kind not in (int, float):
        return isinstance(value, kind)
    number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max and (bounds is None or bool(bounds.accepts(value)))


def describe_kind(kind: Any) -> str:
    """Describes a kind of values for a message, see `Values.want`."""
    if isinstance(kind, tuple):
        return " or ".join(map(describe_kind, kind))
    if isinstance(kind, list):
        return f"a list that is not empty, each value {describe_kind(kind[0])}"
    if isinstance(kind, set | frozenset):
        return f"one of {', '.join(sorted(kind))}"
    if isinstance(kind, type):
        return NAMES[kind]
    return f"{NAMES[kind.kind]}, {kind.allowed}"


def shown(value: Any) -> str:
    """Formats a value of a file for a message, as JSON in at most 60 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: str | Path, name: str | Path | None = None, remedy: str = AGAIN) -> Values:
    """Reads the mapping in a JSON file; raises `InputError` if it can't be read, or holds something else."""
    name = path if name is None else name
    try:
        facts = Path(path).stat()
        size, regular = facts.st_size, stat.S_ISREG(facts.st_mode)  # reading a pipe or a device could take forever
        data = Path(path).read_bytes() if regular and size <= MOST_BYTES else b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _refusal(name, f"it can't be read ({reason})", remedy) from error
    if not regular:
        raise _refusal(name, "it can't be read (it is no file)", remedy)
    if size > MOST_BYTES:
        raise _refusal(name, f"it can't be read (it has {size:,} bytes, the limit is {MOST_BYTES:,})", remedy)
    return parse_json(data, name, remedy)


def parse_json(text: str | bytes, name: str | Path, remedy: str = AGAIN) -> Values:
    """Parses a mapping in JSON; raises `InputError` if it is something else, a key is double or the nesting too deep."""
    try:
        found = json.loads(text, object_pairs_hook=without_doubles)
        check_levels(found)
    except RecursionError:
        raise _refusal(name, f"it can't be read (it has more than {MOST_LEVELS} levels)", remedy) from None
    except ValueError as error:
        raise _refusal(name, f"it can't be read ({error})", remedy) from error
    if not isinstance(found, dict):
        raise _refusal(
            name,
            f"it can't be read (it holds {'a list' if isinstance(found, list) else shown(found)} instead of a mapping)",
            remedy,
        )
    return Values(found, name, remedy)


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of pairs; raises `ValueError` if a key is double, where `json` would take the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return found


def check_levels(found: Any, most: int = MOST_LEVELS) -> None:
    """Raises `ValueError` if lists and mappings are nested in more than `most` levels."""
    level: Iterable[Any] = [found]
    for _ in range(most + 1):
        level = [part for each in level for part in _parts(each)]
        if not level:
            return
    raise ValueError(f"it has more than {most} levels")


def _parts(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in parts if isinstance(part, dict | list)]


def load_yaml(text: str, loader_class: Any = None) -> tuple[Any, Any]:
    """Parses a YAML document without code, and returns (its node, its value); both are None for an empty document.

    `loader_class` (default: `yaml.SafeLoader`) determines which words are numbers. Raises `ValueError` or `yaml.YAMLError` if
    the text can't be parsed, is too large, is nested too deep, or grows too much by its aliases.
    """
    import yaml

    base: Any = loader_class or yaml.SafeLoader

    class Loader(base):
        levels = 0

        def compose_node(self, parent, index):
            self.levels += 1
            if self.levels > MOST_LEVELS:
                raise ValueError(f"it has more than {MOST_LEVELS} levels")
            is_alias = self.check_event(yaml.AliasEvent)
            node = super().compose_node(parent, index)
            self.levels -= 1
            if is_alias and node not in sizes:  # it is not yet complete
                raise ValueError("an alias in it stands for a part that contains the alias")
            sizes.setdefault(node, _size_of(node, sizes))
            return node

    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text):,} characters, the limit is {MOST_BYTES:,}")
    sizes: dict[Any, int] = {}  # {node: number of nodes in it, with its aliases written out}
    loader = Loader(text)
    node = loader.get_single_node()
    if sizes.get(node, 0) > MOST_NODES:
        raise ValueError(f"its aliases make it longer than {MOST_NODES:,} values")
    return node, None if node is None else loader.construct_document(node)


def _size_of(node, sizes):
    if isinstance(node.value, str):
        return 1
    parts = [part for each in node.value for part in (each if isinstance(each, tuple) else (each,))]
    return 1 + sum(sizes[part] for part in parts)

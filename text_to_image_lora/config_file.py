"""YAML files of flags, as for --config: their text keeps its spelling, and the command line overrides them."""

import difflib
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError
from .files import printable, read_text, reason_of
from .small_files import load_yaml


# YAML would convert all other plain words: 007 to 7, 12:30 to 750, no to False and 2024_01_15 to 20240115.
CONVERTED = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
# Stands before the items of a list in a YAML file, so that argparse takes none that begins with "--" for a flag.
AS_TEXT = "\ue000"
SWITCH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_yaml(path: str | Path, flag: str) -> Any:
    """Reads a YAML file whose values are text as it is spelled, as on a command line; only an empty value is None.

    Raises `InputError` if the file can't be read, or a key is written twice. `flag` is the flag that names the file.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [row for row in rows if row[0] in CONVERTED]
            for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    try:
        node, value = load_yaml(_read(path), Loader)
        check_keys(node, path)
        return value
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file ({flag}).{similar_file(path)}") from error
    except OSError as error:
        raise InputError(f"{path}: it can't be read ({error.strerror or reason_of(error)}; {flag}).") from error
    except (ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        reason = (getattr(error, "problem", None) or reason_of(error)).replace("character '\\t'", "a tab")
        if reason.startswith("but found another document"):
            reason = "another document starts there"
        raise InputError(f"{path}: it can't be read as YAML{where} ({reason}).") from error


def _read(path):
    """Reads a text file in UTF-8 or UTF-16; raises `OSError` if it can't be opened and `InputError` if it can't be decoded."""
    try:
        return read_text(path, may_wait=True)  # such as --config <(command)
    except InputError as error:
        raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from None


def check_utf8(values: Mapping[str, Any]) -> None:
    """Raises `InputError` if the text of a flag, such as a path, has bytes that are not UTF-8, because no record can hold them."""
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii() and text != text.encode(errors="replace").decode():
                reason = (
                    "it has bytes that are not UTF-8, which the records of a run can't hold. Rename the file or folder"
                )
                raise InputError(f"--{name} {printable(text)}: {reason}, or pass another.")


def check_keys(node: Any, path: str | Path) -> None:
    """Raises `InputError` if a mapping in a YAML file has a key twice, of which YAML would only read the last."""
    if getattr(node, "id", None) == "sequence":
        for value in node.value:
            check_keys(value, path)
    if getattr(node, "id", None) != "mapping":
        return
    first_lines: dict[Any, int] = {}
    for key, value in node.value:
        line, name = key.start_mark.line + 1, key.value if isinstance(key.value, str) else id(key)
        if name in first_lines:
            first = first_lines[name]
            where = f"in line {line} twice" if first == line else f"in lines {first} and {line}"
            raise InputError(f"{path}: '{key.value}' is written {where}. Keep one of them.")
        first_lines[name] = line
        check_keys(value, path)


def similar_file(path: str | Path) -> str:
    """Returns a question that names the most similar file in the folder of `path`, or an empty string."""
    folder = Path(path).parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    similar = difflib.get_close_matches(Path(path).name, names, n=1)
    return f" Did you mean {folder / similar[0]}?" if similar else ""


def read_flags(path: str, actions: Mapping[str, Any]) -> dict[str, list[str]]:
    """Reads the flags in a YAML file and returns the command-line arguments of each.

    Args:
        path: The file.
        actions: The argparse actions by the names of the flags.
    """
    values = read_yaml(path, "--config")
    if not isinstance(values, dict | None):
        raise InputError(f"{path}: it must hold one flag per line, such as 'rank: 16'.")
    words = {}
    for key, value in (values or {}).items():
        if key not in actions:
            similar = difflib.get_close_matches(str(key), actions, n=1)
            hint = f" Did you mean {similar[0]}?" if similar else ""
            raise InputError(f"{path}: there is no flag '{key}'.{hint}")
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, dict | list) or (part is None and parts is value) for part in parts):
            raise InputError(
                f"{path}: '{key}' must be one value or a list of values. Quote a value that is no plain text."
            )
        if value is None or value == []:
            continue
        if actions[key].nargs == 0:
            switched = SWITCH_WORDS.get(str(value).lower())
            if switched is None:
                raise InputError(f"{path}: '{key}' is a switch: write true or false, not {value}.")
            words[key] = [f"--{key}" if switched else f"--no-{key}"]
        else:
            several = actions[key].nargs is not None
            if len(parts) > 1 and not several:
                raise InputError(f"{path}: '{key}' takes one value, not {len(parts)}. Keep one of them.")
            marked = [f"{AS_TEXT}{part}" for part in parts]
            words[key] = [f"--{key}", *marked] if several and parts is value else [f"--{key}={parts[0]}"]
    return words


class FlagsOfFile(NamedTuple):
    """The flags whose values are those in the file of --config, because the command line does not give them."""

    path: str  # of the file
    values: dict[str, Any]

    def explain(self, message: str) -> str:
        """Adds to a message which flags of the file it is about: those that its first sentence names or begins with the value of."""
        sentence = re.split(r"\.\s", message)[0]
        named = [name for name in re.findall(r"--(\w+)", sentence) if name in self.values]
        for name, value in self.values.items():
            texts = [str(text) for text in (value if isinstance(value, list | tuple) else [value])]
            named += [name for text in texts if text and message.startswith((f"{text}:", f"{text}{os.sep}"))]
        if not named:
            return message
        named = list(dict.fromkeys(named))
        verb = "is" if len(named) == 1 else "are"
        return f"{message} ({' and '.join(f'--{name}' for name in named)} {verb} in {self.path}.)"


def explains_file(command: Callable[[Any], None]) -> Callable[[Any], None]:
    """Lets the errors of a command, a function of its settings, say which of their flags are in the file of --config."""

    @functools.wraps(command)
    def run(given):
        try:
            command(given)
        except InputError as error:
            raise InputError(given.from_file.explain(str(error))) from error

    return run


class Conflict(NamedTuple):
    """Two flags that exclude each other, or of which one makes the other ineffective.

    If one of them is on the command line and the other in the file of --config, the latter is ignored. If both come from
    the same place, the command is refused with the message `refusal`, in which {flag} stands for the value of a
    flag; without a message, both are accepted.
    """

    first: str
    second: str
    refusal: str | None = None
    clash: Callable[[Mapping[str, Any]], Any] | None = None  # by default, both values differ from their defaults
    one_way: bool = False  # only the first on the command line overrides the second, not the other way round

    def applies(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
        """Whether flags with these values conflict."""
        if self.clash is not None:
            return bool(self.clash(values))
        return all(values[name] != defaults[name] for name in (self.first, self.second))

    def overridden(self, on_command_line: set[str], in_file: set[str]) -> tuple[str, str] | None:
        """Returns the flag on the command line and the flag in the file that it overrides, if there are such."""
        for flag, other in [(self.first, self.second), (self.second, self.first)][: 1 if self.one_way else 2]:
            if flag in on_command_line and other in in_file - on_command_line:
                return flag, other
        return None


def override_file(
    conflicts: Iterable[Conflict],
    values: dict[str, Any],
    defaults: Mapping[str, Any],
    given: set[str],
    in_file: set[str],
) -> dict[str, str]:
    """Returns the flags in the file that the command line overrides, each with the flag on the command line.

    Args:
        values: The values of all flags; those of the overridden flags are reset to their defaults.
        given: The flags on the command line.
        in_file: The flags in the file.
    """
    overridden = {}
    for conflict in conflicts:
        pair = conflict.overridden(given, in_file - overridden.keys())
        if pair is not None and conflict.applies(values, defaults):
            overridden[pair[1]] = pair[0]
            values[pair[1]] = defaults[pair[1]]
    return overridden


class Remark(NamedTuple):
    """A line to log if a flag differs from its default and other flags make it ineffective or harmful."""

    flag: str
    text: str  # follows the flag
    applies: Callable[[Mapping[str, Any]], Any]  # to the values of all flags

    def line(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str | None:
        """Returns the line, or None if there is nothing to say."""
        value = values[self.flag]
        said = value not in (None, defaults[self.flag]) and self.applies(values)
        return f"--{self.flag} {self.text}" if said else None

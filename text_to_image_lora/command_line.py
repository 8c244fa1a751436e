"""The command line of the scripts: flags as fields of dataclasses, numbers within bounds, and flags from a YAML file."""

import argparse
import dataclasses
import difflib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import reason_of


def installed_command():
    """What `train-text-to-image-lora` of an installed package runs: the script, as `python` runs it."""
    runpy.run_module("train_text_to_image_lora", run_name="__main__", alter_sys=True)


class Number:
    """An argparse type: a number, and what it may be in words; another one is refused with them.

    With `word`, that word is taken too.
    """

    def __init__(self, kind, allowed, accepts, word=None):
        self.kind, self.accepts, self.word = kind, accepts, word
        self.allowed = allowed if word is None else f"{allowed}, or {word}"

    def __call__(self, text):
        if text == self.word:
            return text
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if value is None or not self.accepts(value):  # nan is within no bounds
            whole = "a whole number, " if value is None and self.kind is int else ""
            raise argparse.ArgumentTypeError(f"{text}: it must be {whole}{self.allowed}")
        return value


def at_least(least, kind=int, word=None):
    finite = " and finite" if kind is float else ""
    return Number(kind, f"{least} or more{finite}", lambda value: least <= value < float("inf"), word)


def between(least, most, kind=float):
    """Both ends included."""
    return Number(kind, f"from {least} to {most}", lambda value: least <= value <= most)


def above(least, kind=float):
    return Number(kind, f"more than {least} and finite", lambda value: least < value < float("inf"))


def from_up_to(least, end, kind=float):
    """The end is not included."""
    return Number(kind, f"at least {least} and less than {end}", lambda value: least <= value < end)


def hub_id(text):
    """An argparse type: a name on the hub, with its owner or without."""
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text}: it must be a name on the hub such as me/dashboard")
    return text


UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def duration(text):
    """An argparse type: a time such as 3h50m, which stays as it is written."""
    if not re.fullmatch(r"(?=\d)(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text) or to_seconds(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: it must be a time such as 3h50m, 90m or 45s")
    return text


def to_seconds(text):
    """How many seconds a time such as 3h50m is; None for none."""
    return (
        None if text is None else sum(int(count) * UNITS[unit] for count, unit in re.findall(r"(\d+)([dhms])", text))
    )


COMPATIBILITY = "compatibility"  # the title of flags that exist for commands written for diffusers' scripts


def flag(
    default: Any,
    help: str,
    type: Any = None,
    *,
    may_change=False,
    recorded=True,
    secret=False,
    title=None,
    **options: Any,
) -> Any:
    """A field of a frozen dataclass that is a flag of the command line, with the field's name.

    Args:
        default: The field's value where the flag is not given. A flag whose default is a bool is a switch.
        help: One line for `--help`.
        type: Makes the value of a word, such as `at_least(1)`; raises `argparse.ArgumentTypeError`.
        may_change: Whether a run that is resumed may have another value than before.
        recorded: Whether trackers and files of the run record the value.
        secret: Whether the value is a secret: it is not recorded, and is removed from `sys.argv`.
        title: Another title for the flag in `--help` than its group's; such flags come last.
        options: Further options of `argparse.ArgumentParser.add_argument`, such as `choices` or `nargs`.
    """
    kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type}
    options = kind | options | {"help": help}
    metadata = dict(
        options=options, may_change=may_change, recorded=recorded and not secret, secret=secret, title=title
    )
    return dataclasses.field(default=default, metadata=metadata)


def iterate_flags(settings: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Every flag of a command in the order of `--help`: its field, and its value.

    `settings` is a dataclass of groups of flags, as `Parser.settings` returns it.
    """
    for group in dataclasses.fields(settings):
        values = getattr(settings, group.name)
        for field in dataclasses.fields(values):
            yield field, getattr(values, field.name)


def flag_values(settings: Any) -> dict[str, Any]:
    """The value of every flag of a command by the flag's name, as plain data: what JSON and YAML can hold."""
    return {field.name: plain(value) for field, value in iterate_flags(settings)}


def plain(value: Any) -> Any:
    """The value of a flag as plain data: tuples as lists, and what has no plain form as it is written."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def recorded_values(settings: Any) -> dict[str, Any]:
    """What files and trackers record of the flags: those that say something, without secrets."""
    values = flag_values(settings)
    recorded = [field.name for field, _ in iterate_flags(settings) if field.metadata["recorded"]]
    return {name: values[name] for name in recorded if values[name] not in (None, [])}


def hide_secrets(settings: Any) -> None:
    """Takes the values of secret flags out of `sys.argv`, which trackers record."""
    for field, value in iterate_flags(settings):
        if field.metadata["secret"] and value:
            sys.argv[:] = [word.replace(value, "***") for word in sys.argv]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something, and one letter for what a flag takes."""

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(getattr(action.type, "kind", action.type), "NAME")

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "", [], ()) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parses flags; a mistake is an `InputError` of one line that names the nearest flag.

    `settings_class` is a frozen dataclass whose fields are groups of flags: frozen dataclasses of fields made by `flag`,
    each with a `title` for `--help` and, if its flags have to be checked together, a method `check(settings)`.
    """

    def __init__(self, settings_class: Any = None, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)
        self.settings_class = settings_class
        if settings_class is None:
            return
        by_title = {group.type.title: [] for group in dataclasses.fields(settings_class)}
        for group in dataclasses.fields(settings_class):
            for field in dataclasses.fields(group.type):
                by_title.setdefault(field.metadata["title"] or group.type.title, []).append(field)
        for title, fields in by_title.items():
            add = self.add_argument_group(title).add_argument
            for field in fields:
                add(f"--{field.name}", default=field.default, **field.metadata["options"])

    def settings(self, argv: list[str] | None = None) -> Any:
        """The groups of flags of a command line, checked; raises `InputError`."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(self.parse(argv)).items()}
        groups = {
            group.name: group.type(**{field.name: values[field.name] for field in dataclasses.fields(group.type)})
            for group in dataclasses.fields(self.settings_class)
        }
        settings = self.settings_class(**groups)
        for group in groups.values():
            if hasattr(group, "check"):
                group.check(settings)
        return settings

    def error(self, message):
        if "unrecognized arguments:" in message:
            words = [word.partition("=")[0] for word in message.split(": ", 1)[1].split()]  # a value may be a secret
            unknown = [word for word in words if word.startswith("-")]
            known = [option for action in self._actions for option in action.option_strings]
            if unknown:
                near = difflib.get_close_matches(unknown[0], known, n=1)
                message = f"there is no flag {unknown[0]}." + (f" Did you mean {near[0]}?" if near else " See --help.")
        elif refused := re.fullmatch(r"argument (--\w+): (.*: it must be .*)", message):
            message = f"{refused[1]} {refused[2]}."
        raise InputError(message)

    def parse(self, argv=None):
        """The flags as a namespace: those of the file that `--config` names, and over them those of the command line."""
        argv = list(sys.argv[1:] if argv is None else argv)
        if "--help" in argv or "-h" in argv:
            return self.parse_args(argv)
        config = self.parse_known_args(argv)[0].config
        return self.parse_args(argv if config is None else [*self._read_config(config), *argv])

    def to_words(self, values):
        """The command line that means these values of flags; those that are as by default are left out."""
        words = []
        for action in self._actions:
            value = values.get(action.dest, action.default)
            if value == action.default:
                continue
            if action.nargs == 0:
                words.append(f"--{action.dest}" if value else f"--no-{action.dest}")
            elif isinstance(value, list | tuple):
                words += [f"--{action.dest}", *map(str, value)]
            else:
                words += (
                    [f"--{action.dest}={value}"] if str(value).startswith("-") else [f"--{action.dest}", str(value)]
                )
        return words

    def _read_config(self, config):
        """The flags in a YAML file as words of a command line."""
        import yaml

        try:
            values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{config}: it can't be read as YAML ({reason_of(error)}).") from error
        if not isinstance(values, dict | None):
            raise InputError(f"{config}: it must hold one flag a line, such as 'rank: 16'.")
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        words = []
        for key, value in (values or {}).items():
            if key not in actions:
                near = difflib.get_close_matches(str(key), actions, n=1)
                raise InputError(
                    f"{config}: there is no flag '{key}'." + (f" Did you mean {near[0]}?" if near else "")
                )
            if isinstance(value, bool):
                if actions[key].nargs != 0:
                    raise InputError(
                        f"{config}: '{key}' takes a value, not {str(value).lower()}; quote it if it is a word."
                    )
                words.append(f"--{key}" if value else f"--no-{key}")
            elif isinstance(value, list):
                words += [f"--{key}", *map(str, value)]
            elif value is not None:
                words.append(f"--{key}={value}")
        try:
            self.parse_args(words)
        except InputError as error:
            raise InputError(f"{config}: {error}") from error
        return words

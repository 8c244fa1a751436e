"""The command line of the scripts: flags as dataclass fields, numbers with bounds, and what overrides a YAML file."""

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import log
from .config_file import AS_TEXT, Conflict, FlagsOfFile, Remark, check_utf8, override_file, read_flags
from .errors import InputError
from .redaction import hide, hide_values, redact


MOST_COUNT = 10**9
MOST_NUMBER = 10**12  # of numbers without a bound of their own: the weights are float32, whose squares end at 3e38


def installed_command() -> None:
    """The entry point `train-text-to-image-lora` of the installed package: runs the training script as `python` would."""
    import runpy  # only for this command

    runpy.run_module("train_text_to_image_lora", run_name="__main__", alter_sys=True)


class Number:
    """An argparse type for a number that `accepts` returns True for; `allowed` describes such numbers in error messages.

    A `word` such as "auto" is accepted instead of a number. `most` is a bound that only values above it are told about,
    because nobody else has to know it.
    """

    def __init__(
        self, kind: type, allowed: str, accepts: Callable[[Any], bool], word: str | None = None,
        most: float = float("inf"),
    ):  # fmt: skip
        self.kind = kind
        self.accepts = accepts
        self.word = word
        self.most = most
        self.allowed = allowed if word is None else f"{allowed}, or {word}"

    def __call__(self, text):
        if text == self.word:
            return text
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if value is None or not self.accepts(value):  # NaN lies within no bounds
            whole = "a whole number, " if value is None and self.kind is int else ""
            is_above = value is not None and self.most < value < float("inf")
            allowed = f"at most {self.most:,}" if is_above else self.allowed
            raise argparse.ArgumentTypeError(f"{text}: it must be {whole}{allowed}")
        return value


def at_least(least: float) -> Number:
    """A finite number that is not smaller than `least`."""
    return Number(float, f"{least} or more and finite", lambda value: least <= value <= MOST_NUMBER, most=MOST_NUMBER)


def count(least: int, most: int = MOST_COUNT, word: str | None = None) -> Number:
    """A whole number of things, such as pictures or steps. The bound keeps sums with it quick, and small enough for tensors."""
    allowed = f"{least} or more" if most == MOST_COUNT else f"from {least} to {most:,}"
    return Number(int, allowed, lambda value: least <= value <= most, word, most)


def between(least: float, most: float, kind: type = float) -> Number:
    """A number in the closed interval [least, most]."""
    return Number(kind, f"from {least} to {most}", lambda value: least <= value <= most)


def above(least: float, kind: type = float) -> Number:
    """A number that is larger than `least`."""
    allowed = f"more than {least} and finite"
    return Number(kind, allowed, lambda value: least < value <= MOST_NUMBER, most=MOST_NUMBER)


def above_up_to(least: float, most: float, kind: type = float) -> Number:
    """A number in the half-open interval (least, most]."""
    return Number(kind, f"more than {least} and at most {most}", lambda value: least < value <= most)


def from_up_to(least: float, end: float, kind: type = float) -> Number:
    """A number in the half-open interval [least, end)."""
    return Number(kind, f"at least {least} and less than {end}", lambda value: least <= value < end)


def filled_text(text: str) -> str:
    """An argparse type for a text that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: it must be a text that is not empty; or leave the flag out")
    return text


def inner_folder(text: str) -> str:
    """An argparse type for a folder inside another one: a relative path that never leads out of it."""
    parts = re.split(r"[/\\]", text)
    if os.path.isabs(user_path(text)) or ".." in parts or not parts[0]:
        raise argparse.ArgumentTypeError(f"{text}: it must be a relative path without .., such as logs")
    return text


def hub_id(text: str) -> str:
    """An argparse type for the id of a hub repository, with or without its owner."""
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text}: it must be a name on the hub such as me/dashboard")
    return text


def path_text(text: str) -> str:
    """An argparse type for the text of a path, which is returned unchanged."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be a path, not an empty text or one with a NUL character")
    return text


def user_path(text: str) -> str:
    """An argparse type for a path, or for a name on the hub; expands a leading `~`, which shells do not always do."""
    return os.path.expanduser(path_text(text))


def output_folder(text: str) -> str:
    """An argparse type for a folder to write into, which need not exist yet."""
    folder = user_path(text)
    if (obstacle := obstacle_to_folder(folder)) is not None:
        raise argparse.ArgumentTypeError(f"{folder}: it must be a folder that can be made, but {obstacle}")
    return folder


def obstacle_to_folder(folder: str | Path) -> str | None:
    """Returns why a folder does not exist and can't be made, or None: a link that leads nowhere, a file, or a bad name."""
    for path in (Path(folder), *Path(folder).parents):
        try:
            path.stat()
        except FileNotFoundError:
            if path.is_symlink():
                return f"{path} is a link to {os.readlink(path)}, which does not exist"
        except NotADirectoryError:  # one of the parents is a file
            pass
        except OSError as error:
            return f"{path} can't be used ({error.strerror})"
        else:
            return None if path.is_dir() else f"{path} is a file"
    return None


UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def duration(text: str) -> str:
    """An argparse type for a duration such as 3h50m; returns the text unchanged."""
    if not re.fullmatch(r"(?=\d)(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text) or to_seconds(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: it must be a time such as 3h50m, 90m or 45s")
    return text


def to_seconds(text: str | None) -> int | None:
    """Converts a duration such as 3h50m to seconds; returns None for None."""
    if text is None:
        return None
    return sum(int(count) * UNITS[unit] for count, unit in re.findall(r"(\d+)([dhms])", text))


COMPATIBILITY = (
    "compatibility"  # the --help section of flags that exist only so that commands for diffusers' scripts work
)


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
    """A dataclass field that becomes a flag of the command line with the name of the field.

    Args:
        default: The value if the flag is not given. A flag whose default is a bool is a switch.
        help: One line for `--help`.
        type: The argparse type, such as `count(1)`; raises `argparse.ArgumentTypeError`.
        may_change: Whether the value may change when a run is resumed.
        recorded: Whether the trackers and the files of the run record the value.
        secret: Whether the value is a secret, which is not recorded, and is masked wherever it appears.
        title: The section of the flag in `--help` (default: the title of its group).
        options: Further arguments of `argparse.ArgumentParser.add_argument`, such as `choices` or `nargs`.
    """
    kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type}
    options = kind | options | {"help": help}
    metadata = dict(
        options=options, may_change=may_change, recorded=recorded and not secret, secret=secret, title=title
    )
    return dataclasses.field(default=default, metadata=metadata)


def iterate_flags(settings: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Yields the field and the value of every flag of a command.

    `settings` is a dataclass of groups of flags, as returned by `Parser.settings`.
    """
    for group in dataclasses.fields(settings):
        values = getattr(settings, group.name)
        for field in dataclasses.fields(values):
            yield field, getattr(values, field.name)


def flag_values(settings: Any) -> dict[str, Any]:
    """Maps the name of every flag to its value as plain data that JSON and YAML can represent."""
    return {field.name: plain(value) for field, value in iterate_flags(settings)}


def plain(value: Any) -> Any:
    """Converts the value of a flag to plain data: tuples to lists, and other objects to strings."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def recorded_values(settings: Any) -> dict[str, Any]:
    """Maps flags to the values that files and trackers record: no secrets, and no None or empty lists."""
    values = flag_values(settings)
    recorded = [field.name for field, _ in iterate_flags(settings) if field.metadata["recorded"]]
    return {name: redacted(values[name]) for name in recorded if values[name] not in (None, [])}


def redacted(value: Any) -> Any:
    """Masks secrets in the plain data of a flag, see `redaction.redact`."""
    if isinstance(value, list):
        return [redacted(each) for each in value]
    return redact(value) if isinstance(value, str) else value


# argparse itself takes -5e-1 for a flag. NaN and infinity are here so that the bounds of the flag refuse them.
NEGATIVE_NUMBER = re.compile(r"-((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|infinity|nan)$", re.IGNORECASE)


class OneOrSeveral(argparse.Action):
    """Stores one value as it is, and several as a list in ascending order; the same value must not be given twice."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        ordered = sorted(set(values))
        if len(ordered) < len(values):
            raise argparse.ArgumentError(self, f"{' '.join(map(str, values))}: it must be different numbers")
        setattr(namespace, self.dest, ordered if len(ordered) > 1 else ordered[0])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults unless they are empty or False, and short placeholders for values."""

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(getattr(action.type, "kind", action.type), "NAME")

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "", [], ()) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parses flags; an unknown flag is an `InputError` that suggests the most similar flag.

    `settings_class` is a frozen dataclass of groups of flags. A group is a frozen dataclass of fields made by `flag`, with
    a `title` for `--help` and, if its flags have to be checked together, `conflicts` (a tuple of `Conflict`) and a method
    `check(settings)`. Its `remarks` (a tuple of `Remark`) are logged.
    """

    def __init__(self, settings_class: Any = None, **options: Any):
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter} | options)
        self.settings_class = settings_class
        self.conflicts: list[Conflict] = []
        self.remarks: list[Remark] = []
        self.notes: list[str] = []  # about flags in the file of --config that the command line overrides
        self.from_file = FlagsOfFile("", {})
        self.secrets: set[str] = set()  # the flags whose values are secrets
        self._negative_number_matcher = NEGATIVE_NUMBER
        self.register("type", Path, lambda text: Path(user_path(text)))
        if settings_class is None:
            return
        groups: list[Any] = [field.type for field in dataclasses.fields(settings_class)]
        self.conflicts = [conflict for group in groups for conflict in getattr(group, "conflicts", ())]
        self.remarks = [remark for group in groups for remark in getattr(group, "remarks", ())]
        fields = [field for group in groups for field in dataclasses.fields(group)]
        self.secrets = {f"--{field.name}" for field in fields if field.metadata["secret"]}
        by_title = {group.title: [] for group in groups}
        for group in groups:
            for field in dataclasses.fields(group):
                by_title.setdefault(field.metadata["title"] or group.title, []).append(field)
        for title, fields in by_title.items():
            add = self.add_argument_group(title).add_argument
            for field in fields:
                add(f"--{field.name}", default=field.default, **field.metadata["options"])

    def settings(self, argv: list[str] | None = None) -> Any:
        """Parses and checks a command line and returns the groups of flags; raises `InputError`."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(self.parse(argv)).items()}
        classes: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(self.settings_class)}
        groups = {
            name: group_class(**{field.name: values[field.name] for field in dataclasses.fields(group_class)})
            for name, group_class in classes.items()
        }
        settings = self.settings_class(**groups)
        defaults = {name: self.get_default(name) for name in values}
        remarks = [line for remark in self.remarks if (line := remark.line(values, defaults)) is not None]
        object.__setattr__(settings, "notes", [*self.notes, *remarks])  # the classes of settings are frozen
        object.__setattr__(settings, "from_file", self.from_file)
        try:
            check_utf8(recorded_values(settings))
            for conflict in self.conflicts:
                if conflict.refusal is not None and conflict.applies(values, defaults):
                    raise InputError(conflict.refusal.format_map(values))
            for group in groups.values():
                if hasattr(group, "check"):
                    group.check(settings)
        except InputError as error:
            raise InputError(self.from_file.explain(str(error))) from error
        return settings

    def _get_value(self, action, arg_string):
        return super()._get_value(action, arg_string.removeprefix(AS_TEXT))

    def error(self, message):
        if "unrecognized arguments:" in message:
            words = [word.partition("=")[0] for word in message.split(": ", 1)[1].split()]  # a value may be a secret
            unknown = [word for word in words if word.startswith("-")]
            known = [option for action in self._actions for option in action.option_strings]
            if unknown:
                similar = difflib.get_close_matches(unknown[0], known, n=1)
                message = f"there is no flag {unknown[0]}."
                message += f" Did you mean {similar[0]}?" if similar else " See --help."
        elif refused := re.fullmatch(r"argument (--\w+): (.*: it must be .*)", message):
            message = f"{refused[1]} {refused[2].rstrip('.')}."
        raise InputError(message)

    def take_words(self, argv: list[str] | None) -> list[str]:
        """Returns the words of a command line (None: this process's), and hides their secrets, also in `sys.argv`.

        Trackers record `sys.argv`.
        """
        log.protect_streams()  # --help may be read by `head`
        words = list(sys.argv[1:] if argv is None else argv)
        hide_values(words, self.secrets)
        hide(os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"))
        sys.argv[1:] = map(redact, sys.argv[1:])
        return words

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parses the flags in the file of `--config`, if there is one, and the flags on the command line, which override it."""
        argv = self.take_words(argv)
        self.notes, self.from_file = [], FlagsOfFile("", {})
        if "--help" in argv or "-h" in argv:
            return self.parse_args(argv)
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        nothing = argparse.Namespace(**dict.fromkeys(actions))  # instead of the defaults
        given = {
            name: value for name, value in vars(self.parse_known_args(argv, nothing)[0]).items() if value is not None
        }
        config: Any = given.get("config")
        if config is None:
            return self.parse_args(argv)
        words = read_flags(config, {name: action for name, action in actions.items() if name != "config"})
        for part in words.values():
            hide_values(part, self.secrets)
        try:
            self.parse_args([word for part in words.values() for word in part])
        except InputError as error:
            raise InputError(f"{config}: {error}") from error
        flags = self.parse_args([*(word for part in words.values() for word in part), *argv])
        defaults = {name: self.get_default(name) for name in actions}
        overridden = override_file(self.conflicts, vars(flags), defaults, {*given}, {*words})
        self.notes = [
            f"{config}: '{name}' is ignored, because --{flag} on the command line overrides it"
            for name, flag in overridden.items()
        ]
        names = words.keys() - given.keys() - overridden.keys()
        self.from_file = FlagsOfFile(config, {name: getattr(flags, name) for name in words if name in names})
        return flags

    def to_words(self, values: dict[str, Any]) -> list[str]:
        """Returns the arguments that give flags these values; flags with their default value are omitted."""
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
                negative = str(value).startswith("-")
                words += [f"--{action.dest}={value}"] if negative else [f"--{action.dest}", str(value)]
        return words

"""Reads the settings of a sweep from its YAML file and the command line, and makes training commands, for `sweep.py`."""

import difflib
import functools
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from text_to_image_lora.command_line import redacted
from text_to_image_lora.config_file import SWITCH_WORDS, read_yaml
from text_to_image_lora.errors import InputError
from text_to_image_lora.redaction import MASK, hide, redact

from .. import ROOT


SAMPLERS = ("grid", "random", "tpe")
# A variable that a launcher such as 'env WANDB_API_KEY=... accelerate launch' sets.
SECRET_VARIABLE = re.compile(r"\b[A-Z_]*(?:TOKEN|KEY|SECRET|PASSWORD)[A-Z_]*=[\"']?([^\s\"']+)")


class SweepError(InputError):
    """Invalid input or a missing package. The message is one sentence with the remedy."""


@functools.cache
def _parser():
    from train_text_to_image_lora import build_parser

    return build_parser()


def _flags():
    """Returns the argparse actions of the training command's flags."""
    return [action for action in _parser()._actions if action.dest != "help"]


def _kind(name):
    """Returns int or float for a flag whose values are numbers, otherwise its type."""
    action = next(action for action in _flags() if action.dest == name)
    return getattr(action.type, "kind", action.type)


def secret_flags():
    """Returns the names of the training command's flags whose values are secrets."""
    return {flag.removeprefix("--") for flag in _parser().secrets}


def take_words(argv=None):
    """Returns the words of the command line (None: this process's), and hides the values of secret flags in them."""
    for word in sys.argv[1:] if argv is None else argv:
        name, *rest = re.split("[=:]", word.lstrip("-"), maxsplit=1)
        hide_texts({name: rest})
    return _parser().take_words(argv)


def hide_texts(flags):
    """From here on, `redact` masks the values of secret flags in a mapping, which may still hold mistakes."""

    def texts(value):
        if isinstance(value, dict | list):
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            return [text for part in parts for text in texts(part)]
        return [value, *value.split(",")] if isinstance(value, str) else []

    for name in flags.keys() & secret_flags() if isinstance(flags, dict) else ():
        hide(texts(flags[name]))


def without_secrets(flags):
    """Returns flags as they may be written down: without those whose values are secrets, and with all other secrets masked."""
    return {name: redacted(value) for name, value in flags.items() if name not in secret_flags()}


def to_number(text):
    """Converts the text of a number, and returns other text and other values as they are."""
    if not isinstance(text, str) or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text):
        return text
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def to_value(name, text):
    """Converts a value by the kind of its flag: only numbers, switches and null are no text. 007 can be a trigger word."""
    if not isinstance(text, str) or text == "null":
        return None if text == "null" else text
    action = next((action for action in _flags() if action.dest == name), None)
    if action is None:
        return text
    if action.nargs == 0:
        return SWITCH_WORDS.get(text.lower(), text)
    return to_number(text) if _kind(name) in (int, float) else text


def parse_values(name, text):
    """Parses the values of a flag: `4,16` into a list, or `1e-4..1e-2` into the mapping of a range."""
    low, dots, high = text.partition("..")
    least, most = to_value(name, low), to_value(name, high)
    if dots and isinstance(least, int | float) and isinstance(most, int | float):
        return {"min": least, "max": most, "log": True}
    return [to_value(name, word) for word in text.split(",")]


def read_settings(path):
    """Reads the YAML file of a sweep. The texts of flags keep their spelling."""

    def option(value):
        return SWITCH_WORDS.get(value.lower(), to_number(value)) if isinstance(value, str) else value

    try:
        given = read_yaml(path, "the file of the sweep")
    except InputError as error:
        raise SweepError(str(error)) from error
    if not isinstance(given, dict):
        return given
    hide_texts(given.get("flags"))
    hide_texts(given.get("sweep"))
    given |= {name: option(given[name]) for name in ("num_trials", "seed", "prune") if name in given}
    flags, sweep = given.get("flags"), given.get("sweep")
    switches = {action.dest for action in _flags() if action.nargs == 0}
    if isinstance(flags, dict):
        flags |= {name: to_value(name, value) for name, value in flags.items() if name in switches}
    if isinstance(sweep, dict):
        for name, values in sweep.items():
            if isinstance(values, dict):  # a range
                sweep[name] = {key: option(value) for key, value in values.items()}
            elif isinstance(values, list):
                sweep[name] = [to_value(name, value) for value in values]
    return given


def settle(args):
    """Returns the settings of the sweep as a mapping; options on the command line override the YAML file."""
    settings = dict(
        sampler="grid", num_trials=20, prune=False, launcher=None, seed=0, flags={}, sweep={}, sweep_dir=None
    )
    if args.config is not None:
        given = read_settings(args.config)
        if not isinstance(given, dict) or set(given) - set(settings):
            wrong = sorted(set(given) - set(settings), key=str) if isinstance(given, dict) else "a file without keys"
            raise SweepError(f"{args.config}: {wrong} is not known. The keys are: {', '.join(settings)}.")
        settings |= {key: value for key, value in given.items() if value is not None}
    for name in ("sweep_dir", "sampler", "num_trials", "prune", "launcher", "seed"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    for name, words in (("sweep", args.sweep or []), ("flags", args.flags or [])):
        for word in words:
            key, equals, text = word.partition("=")
            if not equals:
                raise SweepError(f"--{name} {word}: write flag=value, such as rank=4,16.")
            if not isinstance(settings[name], dict):
                break  # `check` reports it
            if name == "sweep" and isinstance(
                settings["flags"], dict
            ):  # the command line can vary a flag that the file fixes
                settings["flags"] = {k: v for k, v in settings["flags"].items() if k != key.removeprefix("--")}
            settings[name] = settings[name] | {
                key.removeprefix("--"): parse_values(key.removeprefix("--"), text) if name == "sweep" else text
            }
    hide(SECRET_VARIABLE.findall(str(settings["launcher"])))
    check(settings)
    for key, values in settings["sweep"].items():
        if isinstance(values, dict) and _kind(key) is float:  # Optuna would only draw whole numbers from 0 to 1
            settings["sweep"][key] = values | {"min": float(values["min"]), "max": float(values["max"])}
    return settings | {"sweep_dir": Path(settings["sweep_dir"]).expanduser()}


def check(settings):
    for key in ("sweep", "flags"):
        if not isinstance(settings[key], dict):
            raise SweepError(f"{key}: it must contain one flag per line, such as 'rank: [4, 16]'.")
    for key, least in (("num_trials", 1), ("seed", 0)):
        if type(settings[key]) is not int or settings[key] < least:
            raise SweepError(f"{key} {settings[key]}: it must be a whole number, {least} or more.")
    if settings["sweep_dir"] is None:
        raise SweepError("Pass --sweep_dir, the folder of the sweep.")
    if (
        not isinstance(settings["sweep_dir"], str)
        or not settings["sweep_dir"].strip()
        or "\0" in settings["sweep_dir"]
    ):
        raise SweepError(f"sweep_dir {settings['sweep_dir']}: it must be the path of a folder.")
    if not isinstance(settings["prune"], bool):
        raise SweepError(f"prune {settings['prune']}: write true or false.")
    check_launcher(settings["launcher"])
    if not settings["sweep"]:
        raise SweepError("No flag is varied: add --sweep, such as --sweep rank=4,16.")
    if settings["sampler"] not in SAMPLERS:
        raise SweepError(f"sampler {settings['sampler']}: choose {', '.join(SAMPLERS)}.")
    known = [action.dest for action in _flags()]
    for key in [*settings["sweep"], *settings["flags"]]:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise SweepError(f"there is no flag --{key}." + (f" Did you mean --{near[0]}?" if near else ""))
    check_no_secret_varies(settings["sweep"])
    for key, values in settings["sweep"].items():
        if isinstance(values, dict):
            check_range(key, values, settings["sampler"])
        elif not isinstance(values, list) or not values:
            raise SweepError(f"{key}: list its values, such as [4, 16].")
        else:
            for value in values:
                check_value(key, value)
    for key, value in settings["flags"].items():
        if value is not None:  # the flag is left out
            check_value(key, value)
    both = settings["flags"].keys() & settings["sweep"].keys()
    if both:
        raise SweepError(f"{', '.join(sorted(both))}: it is both varied and fixed. Take it out of one of them.")
    every = settings["flags"].keys() | settings["sweep"].keys()
    if not every & {"validation_split", "validation_data_dir"}:
        raise SweepError("Trials are ranked by the loss on held-out pictures: add validation_split=0.1 to --flags.")
    check_held_out(settings)
    for name in ("output_dir", "latent_cache_dir"):
        if name in settings["sweep"]:
            raise SweepError(f"{name} can't be varied: each trial has its own folder in --sweep_dir.")


def check_no_secret_varies(sweep):
    """Raises `SweepError` if a varied value is a secret, as the journal and the tables of a sweep hold the varied values."""
    for key, values in sweep.items():
        listed = values if isinstance(values, list) else [values]
        if key in secret_flags() or any(redacted(value) != value for value in listed):
            reason = "its values are or contain secrets, which the tables of the sweep would show"
            raise SweepError(f"{key} can't be varied: {reason}. Pass a token to --flags, or run hf auth login.")


def check_launcher(launcher):
    """Raises `SweepError` if the launcher is no command that this machine has."""
    if launcher is None:
        return
    try:
        words = shlex.split(launcher) if isinstance(launcher, str) else []
    except ValueError as error:
        raise SweepError(f"launcher {launcher}: it can't be divided into words ({error}).") from error
    if not words:
        raise SweepError(f"launcher {launcher!r}: it must be a command, such as 'accelerate launch --multi_gpu'.")
    if words[0] != "python" and shutil.which(words[0]) is None:
        raise SweepError(f"launcher {launcher}: there is no command {words[0]}. Check the spelling, or install it.")


def check_range(key, values, sampler):
    """Raises `SweepError` if the values of a flag are no range of numbers that the training command accepts."""
    if sampler == "grid":
        raise SweepError(f"{key} is a range: list its values for a grid, or pass --sampler random or tpe.")
    if unknown := sorted(values.keys() - {"min", "max", "log"}, key=str):
        raise SweepError(f"{key}: {unknown[0]} is not known. The keys of a range are min, max and log.")
    if _kind(key) not in (int, float):
        raise SweepError(f"{key}: only numbers have a range. List its values, such as [a, b].")
    low, high, log = values.get("min"), values.get("max"), values.get("log", False)
    # NaN and infinity are not in the interval.
    numbers = all(isinstance(v, int | float) and abs(v) <= sys.float_info.max for v in (low, high))
    if not numbers or not low < high or not isinstance(log, bool) or (log and low <= 0):
        raise SweepError(
            f"{key}: a range is min..max of two finite numbers, the smaller one first (above 0 with log)."
        )
    check_value(key, low)
    check_value(key, high)


def check_value(key, value):
    """Raises `SweepError` if the training command does not accept this value of a flag."""
    action = next(action for action in _flags() if action.dest == key)
    if value is None:
        if action.default is not None:
            raise SweepError(f"{key}: null is no value of this flag. Write its default, {action.default}.")
        return
    if action.nargs == 0 and value not in (True, False, "true", "false"):
        raise SweepError(f"{key} is a switch: write true or false, not {value}.")
    if isinstance(value, dict) or (isinstance(value, list) and (action.nargs in (None, 0) or not value)):
        raise SweepError(f"{key}: {value} is no value of this flag. Write one value, such as those in docs/flags.md.")
    if isinstance(value, list) and any(isinstance(part, list | dict | None) for part in value):
        raise SweepError(f"{key}: {value} holds more than plain values. Write a list of plain values.")
    if isinstance(value, list) and any(str(part).startswith("--") for part in value):
        raise SweepError(f"{key}: {value} holds a text that begins with --, which a command can't pass on. Reword it.")
    try:
        _parser().parse_args(to_words({key: value}))
    except InputError as error:
        raise SweepError(str(error)) from error


def check_held_out(settings):
    """Raises `SweepError` if the trials would hold out different pictures, as their losses could not be compared."""
    varied = settings["sweep"].keys() & {"validation_split", "validation_data_dir"}
    if "validation_data_dir" not in settings["flags"]:
        varied |= settings["sweep"].keys() & {"train_data_dir", "dataset_name", "dataset_config_name"}
    if varied:
        raise SweepError(
            f"{', '.join(sorted(varied))}: trials that are validated on different pictures can't be ranked. Pass one "
            "validation_data_dir for all trials to --flags, and vary neither it nor validation_split."
        )


def to_words(flags):
    """Converts flags to command-line arguments. Only for a switch, true and false turn it on and off."""
    switches, words = {action.dest for action in _flags() if action.nargs == 0}, []
    for key, value in flags.items():
        if isinstance(value, bool):
            value = str(value).lower()
        if key in switches and value in ("true", "false"):
            words.append(f"--{key}" if value == "true" else f"--no-{key}")
        elif value is not None:
            words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def make_command(settings, params, output_dir):
    """Returns the arguments of the training command for one trial, whose varied flags are `params`."""
    launcher = shlex.split(settings["launcher"]) if settings["launcher"] else ["python"]
    cache = {"latent_cache_dir": Path(settings["sweep_dir"]) / "cache"}
    flags = cache | settings["flags"] | params | {"output_dir": output_dir}
    return [*launcher, os.path.relpath(ROOT / "train_text_to_image_lora.py"), *to_words(flags)]


def describe_command(settings, params, output_dir):
    """Returns the training command for one trial as text to write down: `***` stands for each secret.

    Every word is masked before it is quoted, because quotes would change a secret.
    """
    secret = {name for name in secret_flags() if settings["flags"].get(name) is not None}
    masked = settings["flags"] | dict.fromkeys(secret, MASK)
    return shlex.join(map(redact, make_command(settings | {"flags": masked}, params, output_dir)))

"""Parses prompts that are followed by options, from a command line or a file. Needs no torch."""

import argparse
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command_line import user_path
from ..errors import InputError
from ..files import read_text
from .rows import OPTIONS_OF_PROMPTS, SETTINGS, nearest


LINE_BREAK = re.compile(r"\r\n|\n|\r")  # unlike str.splitlines, which also divides at letters such as U+2028


class RecordedPrompt(str):
    """The prompt that a picture records: read literally, never as the name of a file or as options."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, the options that followed it {field of `Drawing`: value}, and the line as it was written."""

    text: str
    options: dict[str, Any]
    line: str

    def __str__(self):
        return self.line


def parse_prompt(line: str, where: str) -> Prompt:
    """Parses a line such as `a red axe --seed 3 --negative blurry`.

    Raises `InputError` for an unknown option or an invalid value; its message starts with `where`, the line's origin.
    """
    text, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line)
    found = {}
    for option in options:
        name, value = re.findall(r"\A([\w-]+)[\s=]*+(.*)", option.rstrip(), re.DOTALL)[0]
        field = OPTIONS_OF_PROMPTS.get(name.replace("-", "_"))
        if field is None:
            known = [name for name in OPTIONS_OF_PROMPTS if len(name) > 1]
            raise InputError(f"{where}: unknown option --{name}. Did you mean --{nearest(name, known)}?")
        try:
            found[field] = SETTINGS[field].parse(value)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{where}: --{name} {error}" if value else f"{where}: --{name} has no value.") from error
    if options and not text.strip():
        flag, example = options[0].split()[0], f"a red axe {line.strip()}"
        raise InputError(f"{where}: there is no prompt before --{flag}. Write the prompt first, such as: {example}.")
    return Prompt(text.strip(), found, line)


def read_prompts(flag: str, values: Iterable[str]) -> list[Prompt]:
    """Reads the prompts of a flag; a value that ends in .txt is a file with one prompt per line.

    If there is no such file and the value has several words, such as `a sign that says readme.txt`, it is a prompt. Lines that
    start with # are skipped. An empty value draws without a prompt. Raises `InputError` if a file can't be read or a line can't be parsed.
    """
    prompts = []
    for value in values:
        if isinstance(value, RecordedPrompt):
            prompts.append(Prompt(value, {}, value))
            continue
        if not value.lower().endswith(".txt") or (is_sentence(value) and not is_file(Path(os.path.expanduser(value)))):
            prompts.append(parse_prompt(value, flag))
            continue
        try:
            path = Path(user_path(value))
        except argparse.ArgumentTypeError as error:  # it contains NUL
            raise InputError(f"{flag} {error}.") from error
        try:
            lines = [line.strip(" \t") for line in LINE_BREAK.split(read_text(path))]
        except InputError as error:
            hint = "" if path.exists() else " A prompt of one word must not end in .txt."
            raise InputError(f"{flag} {error}{hint}") from error
        numbered = [(i, line) for i, line in enumerate(lines, 1) if line and not line.startswith("#")]
        if not numbered:
            raise InputError(f"{flag} {value} is empty. Write one prompt per line.")
        prompts += [parse_prompt(line, f"{value}:{i}") for i, line in numbered]
    return prompts


def is_sentence(text: str) -> bool:
    """Whether text consists of several words and is not written as a path."""
    return len(text.split()) > 1 and "/" not in text and "\\" not in text


def is_file(path: Path) -> bool:
    """Whether there is such a file; text that is too long for the name of a file is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


# Weights such as (red:1.3) and ((red)), networks such as <lora:x:0.8>, BREAK, and the change of a prompt at a step, such as
# [a:b:0.5].
A1111S_SYNTAX = re.compile(
    r"\([^()]+:\s*+(?:\d++(?:\.\d++)?|\.\d++)\s*+\)|\(\([^()]+\)\)|<(?:lora|lyco|hypernet):[^<>]*>|\bBREAK\b|"
    r"\[[^][]*:\s*+(?:\d++(?:\.\d++)?|\.\d++)\s*+\]",
    re.ASCII,
)


def note_of_a1111s_syntax(texts: Iterable[str]) -> str | None:
    """Returns a line that says that prompts contain A1111's syntax, which has no meaning here; None if they don't."""
    found = dict.fromkeys(match for text in texts for match in A1111S_SYNTAX.findall(text))
    if not found:
        return None
    return (
        f"prompts are read literally, so A1111's syntax has no effect: {', '.join([*found][:3])}. Write the words alone; "
        "a LoRA is added with --lora PATH:STRENGTH"
    )

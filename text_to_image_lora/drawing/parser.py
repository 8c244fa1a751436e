"""The parser of `infer.py`. Needs no torch."""

import argparse
import dataclasses
import re
from typing import Any

from ..command_line import Parser
from ..errors import InputError
from .png import PATHS, locate, read_repeat
from .prompts import RecordedPrompt
from .rows import nearest


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default except None and False, in lines of up to 119 characters."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=119)

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


class DrawingParser(Parser):
    """Parses the flags of `infer.py` and suggests the nearest name for an unknown flag.

    With --from_png, the flags that the picture's file records are the defaults; the command line overrides them.
    """

    def __init__(self, settings_class: Any, **options: Any):
        super().__init__(settings_class, formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> None:
        if "unrecognized arguments: --" in message:
            message += ". Write a flag and its value as two words, and quote only the value."
        raise InputError(message)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        argv = self.take_words(argv)
        known = list(self._option_string_actions)
        given = [word.split("=")[0] for word in argv if re.match(r"--\w", word)]
        for name in given:
            if (
                name not in known and " " not in name
            ):  # argparse takes a word with a space as a value, such as a prompt
                raise InputError(f"unknown flag {name}. Did you mean {nearest(name, known)}?")
        flags = self.parse_args(argv)
        if flags.from_png is None:
            return flags
        # Flags of the machine and of the output are not recorded.
        groups: list[Any] = [group.type for group in dataclasses.fields(self.settings_class)]
        recorded = {f"--{f.name}" for group in groups for f in dataclasses.fields(group) if f.metadata["recorded"]}
        stored = {f"--{name}": words for name, words in read_repeat(flags.from_png).flags.items()}
        wanted = recorded - {*given}
        for name in [name for name in stored if name in wanted and name[2:] in PATHS]:
            stored[name] = [locate(name[2:], word, flags.from_png) for word in stored[name]]
        flags = self.parse_args(
            [f"{name}={w}" for name, words in stored.items() if name in wanted for w in words] + argv
        )
        if "--prompt" in wanted and flags.prompt is not None:
            flags.prompt = [RecordedPrompt(text) for text in flags.prompt]
        return flags

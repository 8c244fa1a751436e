#!/usr/bin/env python
"""Writes docs/flags.md from the training command's own parser; `--check` only tells whether it is current.

python scripts/make_docs.py
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

import argparse

from scripts import ROOT
from train_text_to_image_lora import build_parser


HEAD = """# Flags of train_text_to_image_lora.py

Written by `make docs` from the command's own `--help`. Every flag can also stand in a YAML file for `--config`, without
its dashes. A switch takes no value, and has its `--no-...`.
"""


def takes(action):
    """What a flag takes, in words."""
    if action.nargs == 0:
        return "a switch"
    if action.choices is not None:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    kind = getattr(action.type, "kind", action.type)
    what = {int: "a whole number", float: "a number"}.get(kind, "text")
    if hasattr(action.type, "allowed"):
        what += f", {action.type.allowed}"
    if isinstance(action.nargs, int):
        return f"{action.nargs} x {what}"
    return f"{what}; one or several" if action.nargs == "+" else what


def default_of(action):
    """The default where it says something."""
    if action.default in (None, "", []):
        return ""
    return ("yes" if action.default else "") if action.nargs == 0 else f"`{action.default}`"


def in_a_cell(text):
    return text.replace("|", "\\|").replace("<", "&lt;").replace("%%", "%")


def flags_page():
    """The page as Markdown: a table for each group of flags."""
    lines = [HEAD]
    for group in build_parser()._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        lines += [
            f"## {group.title[0].upper()}{group.title[1:]}",
            "| flag | takes | default | what it does |",
            "|---|---|---|---|",
        ]
        for action in actions:
            cells = f"`{action.option_strings[0]}`", takes(action), default_of(action), action.help
            lines.append(f"| {' | '.join(map(in_a_cell, cells))} |")
        lines.append("")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where the page is not current"
    )
    args = parser.parse_args()
    page = ROOT / "docs" / "flags.md"
    if args.check:
        sys.exit(0 if page.read_text(encoding="utf-8") == flags_page() else f"{page.name} is not current: make docs")
    page.write_text(flags_page(), encoding="utf-8")


if __name__ == "__main__":
    main()

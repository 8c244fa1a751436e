"""Keeps the folders of this machine out of the report page, which may be shared."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..files import shorten_paths
from .runs import RecordedRun


def folders_to_hide(runs: Iterable[RecordedRun]) -> list[str]:
    """Returns the folders outside the current one in which runs have their files, the longest first."""
    found = set()

    def search(value):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and (os.path.isabs(each) or each.startswith("~")):
                found.update({str(Path(each).parent), str(Path(shorten_paths(each)).parent)})

    for run in runs:
        for value in [*run.flags.values(), *run.settings.values(), str(run.folder.absolute())]:
            search(value)
    return sorted(found - {".", "~", os.sep}, key=len, reverse=True)


def hide_parents(text: Any, folders: Sequence[str]) -> Any:
    """Removes these folders from the start of the paths in a text, because a page may be shared; leaves other values alone."""
    if not isinstance(text, str) or hasattr(text, "__html__"):
        return text
    for folder in (folder for folder in folders if folder in text):  # searching for a pattern takes longer
        text = re.sub(rf"(?<![\w./~-]){re.escape(folder + os.sep)}", "", text)
    return text

"""Reads `about.json` and `caption_check.json`, whose parts are of the types that the report page needs."""

from pathlib import Path
from typing import Any

from ..small_files import Values, read_json


REMEDY = "Restore the file, or delete it if the run is to be reported without it."
NUMBERS = ("pictures", "captions", "different_captions", "validated", "samples_an_epoch", "steps_an_epoch")
CAPTION_CHECK = "caption_check.json"  # the file of --check_captions in the output folder
TABLES = ("sizes", "concepts", "repeats")


def read_about(path: Path) -> dict[str, Any]:
    """Returns the description of a run, {} if there is none; raises `InputError` if its parts are of the wrong types."""
    if not path.is_file():
        return {}
    found = read_json(path, remedy=REMEDY)
    for part in ("settings", "machine", "versions"):
        found.want(part, dict, {})
    found.want("command", str, "")
    if sheet := found.want("dataset", dict, {}):
        _check_data_sheet(Values(sheet, f"{path} (dataset)", REMEDY))
    return found


def _check_data_sheet(sheet):
    for name in NUMBERS:
        sheet.want(name, int)
    sheet.want("fingerprint", str)
    sheet.want("held_out", str, None)  # runs of earlier versions do not record it
    for name in TABLES:
        for row in sheet.want(name, dict).values():
            if isinstance(row, dict):
                _within(sheet, name, row, pictures=int, samples_an_epoch=int)
    for row in sheet.want("shown", list):
        _check_picture(sheet, "shown", row)
    _check_texts(sheet, "notes", sheet.want("notes", list, []))
    for name in ("enlarged", "equal", "alike"):
        found = _within(sheet, name, sheet.want(name, dict, {"count": 0, "first": []}), count=int, first=list)
        for line in found["first"]:
            _check_texts(found, "first", line if isinstance(line, list) else [line])


def read_caption_check(path: Path) -> dict[str, Any]:
    """Returns the result of --check_captions, {} if there is none; raises `InputError` if its parts are of the wrong types."""
    if not path.is_file():
        return {}
    found = read_json(path, remedy=REMEDY)
    for name in ("step", "pictures", "others", "count"):
        found.want(name, int)
    for row in found.want("first", list, []) if found["count"] else ():
        shown = _check_picture(found, "first", row)
        for name, kind in (("gain", float), ("deviation", float), ("better", int)):
            shown.want(name, kind)
    return found


def _check_picture(values, name, row):
    """Returns a row that `about.describe_picture` has made."""
    shown = _within(values, name, row, source=str, preview=str, concept=str, size=str, trained_at=str)
    _check_texts(shown, "captions", shown.want("captions", list))
    _check_texts(shown, "without_concept", shown.want("without_concept", list, []))
    return shown


def _within(sheet, name, row, **kinds):
    """Returns a mapping inside the data sheet, whose keys are of these kinds."""
    if not isinstance(row, dict):
        raise sheet.refusal(f"'{name}' holds {row!r:.60}, but must hold mappings")
    found = Values(row, f"{sheet.name} ({name})", REMEDY)
    for key, kind in kinds.items():
        found.want(key, kind)
    return found


def _check_texts(values, name, texts):
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise values.refusal(f"'{name}' holds {wrong[0]!r:.60}, but must hold texts")

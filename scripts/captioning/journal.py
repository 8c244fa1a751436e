"""The captions of an unfinished run, by which the same command continues it after a kill, for `caption.py`.

A caption is first recorded here and then written to its place, so that no kill separates the captions of the run from those
that a person wrote.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from text_to_image_lora.files import explaining_disk_errors, write_whole


NAME = "unfinished.jsonl"


class Journal:
    """The record of a run: a first line with its settings, and a line for each batch of captions.

    Args:
        folder: The folder that contains the record.
        settings: What determines the captions; a record with other settings is not continued.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / NAME
        self.settings = settings
        self.captions: dict[str, str] = {}  # {name of a picture: caption}, in the order of writing
        self.last: dict[str, str] = {}  # the last batch, which a kill may have left unwritten
        self.batches: list[dict[str, str]] = []
        self.before: str | None = None  # the folder with the old captions
        self.is_resumed = self._read()

    def _read(self):
        """Reads the record, and returns whether there is one of the same settings. A kill can leave half a line at the end."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            first, *others = [json.loads(line) for line in lines]
            if first["settings"] != self.settings:
                return False
            self.before = first["before"]
            self.batches = [dict(batch) for batch in others]
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
            return False
        self._write_all()  # without half a line, to which the next caption would be added
        self.captions = {name: caption for batch in self.batches for name, caption in batch.items()}
        self.last = self.batches[-1] if self.batches else {}
        return True

    def _write_all(self):
        rows = [{"settings": self.settings, "before": self.before}, *self.batches]
        write_whole(self.path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())

    def begin(self, before: Path | None) -> None:
        """Starts a record; `before` is the folder with the old captions."""
        self.before = None if before is None else before.name
        self.batches, self.captions = [], {}
        self._write_all()

    def add(self, captions: Mapping[str, str]) -> None:
        """Records captions, on the disk when this returns."""
        if not captions:
            return
        self.captions |= captions
        with explaining_disk_errors(self.path), open(self.path, "ab") as file:
            file.write(f"{json.dumps(captions)}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def end(self) -> None:
        """Deletes the record of a run that is complete."""
        self.path.unlink(missing_ok=True)

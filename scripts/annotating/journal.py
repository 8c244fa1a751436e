"""What an unfinished run has done, by which the same command continues it after a kill.

A caption or mask is first recorded here and then written to its place, so that no kill separates those of the run from those
that a person made.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from text_to_image_lora.files import explaining_disk_errors, write_whole


NAME = "unfinished.jsonl"


class Journal:
    """The record of a run: a first line with its settings, and a line for each batch of pictures.

    Args:
        folder: The folder that contains the record.
        settings: What determines the results; a record with other settings is not continued.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / NAME
        self.settings = settings
        self.done: dict[str, Any] = {}  # {name of a picture: what the run records of it}, in the order of writing
        self.last: dict[str, Any] = {}  # the last batch, which a kill may have left unwritten
        self.batches: list[dict[str, Any]] = []
        self.before: str | None = None  # the folder with the files that the run replaces
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
        self._write_all()  # without half a line, to which the next batch would be added
        self.done = {name: result for batch in self.batches for name, result in batch.items()}
        self.last = self.batches[-1] if self.batches else {}
        return True

    def _write_all(self):
        rows = [{"settings": self.settings, "before": self.before}, *self.batches]
        write_whole(self.path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())

    def begin(self, before: Path | None) -> None:
        """Starts a record; `before` is the folder with the files that the run replaces."""
        self.before = None if before is None else before.name
        self.batches, self.done = [], {}
        self._write_all()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Records a batch, on the disk when this returns."""
        if not batch:
            return
        self.done |= batch
        with explaining_disk_errors(self.path), open(self.path, "ab") as file:
            file.write(f"{json.dumps(batch)}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def end(self) -> None:
        """Deletes the record of a run that is complete."""
        self.path.unlink(missing_ok=True)

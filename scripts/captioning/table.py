"""Metadata files: which pictures they name, and a `metadata.jsonl` that keeps the rows of others, for `caption.py`."""

import json
from pathlib import Path
from typing import Any

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import printable, write_whole
from text_to_image_lora.pictures.inside import home_folders
from text_to_image_lora.pictures.tables import choose_caption_column, read_table, text_columns

from ..annotating.folder import key_of, keys_in


NAME = "metadata.jsonl"
FILE_COLUMN = "file_name"
CAPTION_COLUMN = "text"
MOVE = "or move the file out of the folder"


def pictures_in(file: Path, homes: tuple[Path, ...]) -> set[str]:
    """Returns the keys of the pictures that a metadata file names."""
    return {key for _, row in read_table(file, homes) for key in keys_in(row, file.parent)}


class Table:
    """The `metadata.jsonl` of a folder, which need not exist yet; raises `InputError` if it can't be continued."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / NAME
        self.lines: list[str] = []
        self.places: dict[str, list[int]] = {}  # {key of a picture: its lines}
        self.column = CAPTION_COLUMN
        if self.path.exists():
            self._read()

    def _read(self):
        rows = read_table(self.path, home_folders([self.folder]))
        try:
            self.lines = self.path.read_bytes().decode().split("\n")
        except UnicodeDecodeError:
            raise InputError(f"{printable(self.path)}: it is not UTF-8. Save it as UTF-8, {MOVE}.") from None
        if self.lines[-1] == "":
            self.lines.pop()
        names = list(dict.fromkeys(name for _, row in rows for name in row))
        if rows:
            textual = text_columns([name for name in names if name != FILE_COLUMN], [row for _, row in rows], None)
            try:
                self.column = choose_caption_column(str(self.path), names, textual, None)
            except InputError:
                textual = []
            if FILE_COLUMN not in names or not textual:
                raise InputError(
                    f"{printable(self.path)}: rows can't be added, because it has no columns {FILE_COLUMN} and "
                    f"{CAPTION_COLUMN}, but {', '.join(names)}. Rename its columns, {MOVE}."
                )
        for number, row in rows:
            for key in keys_in({FILE_COLUMN: row.get(FILE_COLUMN)}, self.folder):
                self.places.setdefault(key, []).append(number - 1)

    def put(self, picture: Path, caption: str) -> None:
        """Sets the caption of a picture in each of its rows, or adds a row."""
        found = self.places.get(key_of(picture))
        if found is None:
            row: dict[str, Any] = {FILE_COLUMN: picture.relative_to(self.folder).as_posix(), self.column: caption}
            self.places[key_of(picture)] = [len(self.lines)]
            self.lines.append(json.dumps(row, ensure_ascii=False))
            return
        for index in found:
            row = json.loads(self.lines[index].removeprefix("\ufeff")) | {self.column: caption}
            self.lines[index] = json.dumps(row, ensure_ascii=False)

    def write(self) -> None:
        """Writes the table completely or not at all."""
        write_whole(self.path, "".join(f"{line}\n" for line in self.lines).encode())

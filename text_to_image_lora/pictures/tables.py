"""Reads metadata files (.csv, .jsonl, .parquet) and finds the column with the captions."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import format_bytes, reason_of
from ..small_files import without_doubles
from .inside import check_file, read_text_file


# Limits of what a dataset by somebody else can make a run read into memory. Real captions are far shorter.
MOST_ROWS = 5_000_000
MOST_TABLE_BYTES = 2**29
MOST_CAPTION_BYTES = 2**17  # of all captions of a picture together
MOST_COLUMNS = 1000
ROWS_TOGETHER = 64
SHOWN = 200  # characters of a cell in a message
DIVIDE = "Divide the dataset into several folders, each with its own table, and pass all: --train_data_dir A B"

CAPTION_COLUMNS = (
    "text", "caption", "captions", "texts", "prompt", "en_text", "additional_feature", "blip_caption", "description",
    "title", "txt", "label_text", "sentences",
)  # fmt: skip


def read_table(file: Path, homes: tuple[Path, ...]) -> list[tuple[int, dict]]:
    """Reads the rows of a .csv, .jsonl or .parquet file as (line, dict); the `InputError` of a broken row names its line.

    The file has to be in one of the folders `homes`, see `inside.py`, and must not exceed `MOST_TABLE_BYTES` and `MOST_ROWS`.
    """
    if file.suffix.lower() == ".parquet":
        check_file(file, homes)
        return _read_parquet(file)
    text = read_text_file(file, homes, most_bytes=MOST_TABLE_BYTES, remedy=DIVIDE)
    return _read_csv(file, text) if file.suffix.lower() == ".csv" else _read_jsonl(file, text)


def check_rows(where: str | Path, count: int, remedy: str = DIVIDE) -> None:
    """Raises `InputError` if a table or a stored dataset has more than `MOST_ROWS` rows."""
    if count > MOST_ROWS:
        raise InputError(f"{where}: it has more than the limit of {MOST_ROWS:,} rows. {remedy}")


def _check_columns(file, names):
    """Raises `InputError` if two columns have one name, of which the last would be read."""
    doubles = [name for name in names if names.count(name) > 1 and name]
    if doubles:
        raise InputError(f"{file}: two columns are named '{doubles[0]}'. Rename or remove one of them.")


def _read_parquet(file):
    """Reads Parquet in small parts, because a part of a compressed file can be far larger than the file."""
    import pyarrow.parquet

    rows, room = [], MOST_TABLE_BYTES
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            check_rows(file, opened.metadata.num_rows)
            _check_columns(file, opened.schema_arrow.names)
            # Dates are no captions, and can be out of the range of Python's.
            dates = [field.name for field in opened.schema_arrow if pyarrow.types.is_temporal(field.type)]
            columns = [name for name in opened.schema_arrow.names if name not in dates] if dates else None
            for part in opened.iter_batches(batch_size=ROWS_TOGETHER, columns=columns):
                room -= part.nbytes
                if room < 0:
                    raise InputError(
                        f"{file}: its cells take more than the limit of {format_bytes(MOST_TABLE_BYTES)}. {DIVIDE}"
                    )
                rows += part.to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise InputError(f"{file}: it can't be read ({reason_of(error)}). Save it again.") from error
    return list(enumerate(rows, start=1))


def _read_csv(file, text):
    """Reads CSV; the delimiter is a comma, or a semicolon or tab (as saved by Excel) if the header has more of those."""
    skipped = 0
    if match := re.match(r"\"?sep=(.)\"?\r?\n", text, re.IGNORECASE):  # Excel's first line, which names the delimiter
        text, skipped = text[match.end() :], 1
    header = text.split("\n", 1)[0]
    delimiter = match[1] if match else max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    quote = "Enclose captions with commas, quotes or line breaks in double quotes, and double the quotes inside."
    rows, number = [], 1 + skipped
    try:
        _check_columns(file, reader.fieldnames or ())
        for row in reader:
            number = reader.line_num + skipped
            check_rows(file, len(rows) + 1)
            if any(row.get(None, ())):
                raise InputError(f"{file}:{number}: there are more fields than columns. {quote}")
            rows.append((number, row))
    except csv.Error as error:
        raise InputError(f"{file}:{number + 1}: this row is not CSV ({error}). {quote}") from error
    return rows


def _read_jsonl(file, text):
    check_rows(file, text.count("\n"))  # before any row is parsed, which takes minutes for so many
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        check_rows(file, len(rows) + 1)
        try:
            row = json.loads(line, object_pairs_hook=without_doubles)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, but not valid text
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or getattr(error, "reason", None) or reason_of(error)
            raise InputError(f"{file}:{number}: this line is not JSON ({reason}). Fix or remove it.") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: this line is not a JSON object. Write one object per line.")
        rows.append((number, row))
    return rows


def shortened(text: str) -> str:
    """Returns text as messages show it: its beginning, if it is long."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def is_caption(value: Any) -> bool:
    """Whether a cell can hold captions: it is text, a list of texts, or None."""
    texts = value if isinstance(value, list) else [value]
    return all(text is None or isinstance(text, str) for text in texts)


def text_columns(columns: list[str], rows: list[dict], asked: str | None) -> list[str]:
    """Returns the columns that hold captions in every row, and those with a caption's name that do so in some rows.

    In the second kind, the other rows are faults, which `reason_against_caption` describes.
    """
    return [
        name
        for name in columns
        if all(is_caption(row.get(name)) for row in rows)
        or (
            (name == asked or name in CAPTION_COLUMNS) and any(row.get(name) and is_caption(row[name]) for row in rows)
        )
    ]


def reason_against_caption(value: Any, column: str) -> str | None:
    """Returns why the caption in a cell can't be used, or None."""
    if not is_caption(value):
        return f"column '{column}' holds {shortened(repr(value))}, which is not text"
    captions = nonempty_captions(value)
    size = sum(map(len, captions)) + len(captions)
    if size > MOST_CAPTION_BYTES:
        return f"column '{column}' has {size:,} characters, more than the limit of {MOST_CAPTION_BYTES:,}"
    return None if captions else f"column '{column}' is empty"


def nonempty_captions(value: str | list | None) -> list[str]:
    """Returns the captions in a cell that are not empty."""
    return [c for c in (value if isinstance(value, list) else [value]) if c is not None and c.strip()]


def choose_caption_column(where: str, columns: list[str], textual: list[str], asked: str | None) -> str:
    """Returns the column `asked` for, else the first column with a common name, else the only text column."""
    listed = ", ".join(columns)
    if asked is not None:
        if asked not in columns:
            raise InputError(f"{where}: there is no column '{asked}' (--caption_column). The columns are: {listed}.")
        if asked not in textual:
            raise InputError(f"{where}: column '{asked}' holds no text (--caption_column). The columns are: {listed}.")
        return asked
    for name in CAPTION_COLUMNS:
        if name in textual:
            return name
    if len(textual) == 1:
        return textual[0]
    if not textual:
        if no_text := [name for name in CAPTION_COLUMNS if name in columns]:
            raise InputError(f"{where}: column '{no_text[0]}' holds no text. Write the captions into it as text.")
        raise InputError(f"{where}: there are no captions. The columns are: {listed}; add a column 'text'.")
    raise InputError(f"{where}: which column holds the captions? Pass --caption_column, one of: {', '.join(textual)}.")

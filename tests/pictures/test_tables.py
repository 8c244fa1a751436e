"""Metadata files: rows, captions and columns are found, and a broken line is reported with its number."""

import csv
import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import read_records, refusal_of
from PIL import Image

from text_to_image_lora.pictures.records import read_image_bytes
from text_to_image_lora.pictures.tables import CAPTION_COLUMNS


def save_pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (40 * i, 0, 0)).save(folder / name)
    return folder


def names_of(dataset):
    return [Path(row["image"]["path"]).name for row in dataset]


def refusal(folder, **options):
    """Returns the error message of a folder: one line that starts with the place of the error."""
    message = refusal_of(read_records, folder, **options)
    assert message.startswith(str(folder))
    return message


CAPTIONS = ["plain", 'commas, and "quotes"', "two\nlines", "odd \u2028 breaks \x85 of \x0c lines", "écru 绿"]


def write_metadata(folder, kind, rows):
    file = folder / f"metadata.{kind}"
    if kind == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write_text(text, encoding="utf-8")
    elif kind == "csv":
        with open(file, "w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return folder


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_metadata_file(tmp_path, kind):
    files = [f"{i}.png" for i in range(5)]
    folder = save_pictures(tmp_path / "animals", *files)
    write_metadata(folder, kind, [{"file_name": f, "text": c} for f, c in zip(files, CAPTIONS)])
    dataset = read_records(folder)
    assert names_of(dataset) == files
    assert dataset["captions"][:] == [[caption] for caption in CAPTIONS]
    assert set(dataset["concept"]) == {"animals"}
    assert set(dataset["num_repeats"]) == {1}
    assert read_image_bytes(dataset[3]["image"]) == (folder / "3.png").read_bytes()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_as_excel_saves_it(tmp_path, kind):
    folder = save_pictures(tmp_path, "0.png", "1.png")
    write_metadata(folder, kind, [{"file_name": f"{i}.png", "text": f"é {i}"} for i in range(2)])
    file = folder / f"metadata.{kind}"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_records(folder)["captions"][:] == [["é 0"], ["é 1"]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_captions(tmp_path, kind):
    folder = save_pictures(tmp_path, "0.png", "1.png")
    rows = [{"file_name": "0.png", "text": ["a cat", "my cat"]}, {"file_name": "1.png", "text": ["a dog"]}]
    assert read_records(write_metadata(folder, kind, rows))["captions"][:] == [r["text"] for r in rows]


@pytest.mark.parametrize("column", [*CAPTION_COLUMNS, "words of the artist"])
def test_the_caption_column_is_found(tmp_path, column):
    folder = save_pictures(tmp_path, "0.png")
    other = {} if column not in CAPTION_COLUMNS else {"author": "me"}
    write_metadata(folder, "jsonl", [{"width": 4, **other, "file_name": "0.png", column: "a cat"}])
    assert read_records(folder)["captions"][:] == [["a cat"]]


def test_the_caption_column_that_is_asked_for(tmp_path):
    folder = save_pictures(tmp_path, "0.png")
    write_metadata(folder, "jsonl", [{"file_name": "0.png", "text": "a cat", "notes": "blurred", "width": 4}])
    assert read_records(folder, caption_column="notes")["captions"][:] == [["blurred"]]
    for asked in ("txet", "width"):
        message = refusal(folder, caption_column=asked)
        assert f"'{asked}'" in message
        assert "file_name, text, notes, width" in message


def test_columns_that_cannot_be_found(tmp_path):
    folder = save_pictures(tmp_path, "0.png")
    write_metadata(folder, "jsonl", [{"file_name": "0.png", "author": "me", "notes": "blurred", "width": 4}])
    assert "--caption_column, one of: author, notes." in refusal(folder)
    write_metadata(folder, "jsonl", [{"file_name": "0.png", "width": 4}])
    assert "no captions. The columns are: file_name, width" in refusal(folder)
    write_metadata(folder, "jsonl", [{"file": "0.png", "text": "a cat"}])
    assert "no column 'file_name'. The columns are: file, text." in refusal(folder)
    assert "no column 'path'. The columns are: file, text." in refusal(folder, image_column="path")
    assert names_of(read_records(folder, image_column="file")) == ["0.png"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_that_contradict_each_other(tmp_path, kind):
    """The pictures of the wrong column would be trained, or each picture would be its own mask."""
    folder = save_pictures(tmp_path, "0.png", "1.png")
    write_metadata(folder, kind, [{"file_name": "0.png", "image": "1.png", "text": "a cat"}])
    assert "a column 'image' beside file_name" in refusal(folder, image_column="image")
    assert names_of(read_records(folder)) == ["0.png"]
    assert "can't name their masks (--mask_column)" in refusal(folder, mask_column="file_name")


GOOD = '{"file_name": "0.png", "text": "a cat"}\n'
BAD_LINES = [
    ("metadata.jsonl", GOOD + '\n{"file_name": "1.png", "text": \n', 3, "not JSON"),
    ("metadata.jsonl", GOOD + "[1, 2]\n", 2, "not a JSON object"),
    ("metadata.jsonl", GOOD + '{"file_name": "1.png", "text": "half of an emoji \\ud83d"}\n', 2, "surrogates"),
    ("metadata.csv", 'file_name,text\n0.png,"a cat\n', 2, "this row is not CSV"),
    ("metadata.csv", "file_name,text\n0.png,a cat\n1.png,a dog, running\n", 3, "more fields"),
    ("metadata.csv", b"file_name,text\n0.png,caf\xe9\n", None, "UTF-8"),
    ("metadata.parquet", b"PAR1 and no more", None, "can't be read"),
]
BAD_ROWS = [
    ("metadata.jsonl", GOOD + '\n{"file_name": "1.jpg", "text": "a dog"}\n', 3, "'1.jpg' does not exist"),
    ("metadata.jsonl", GOOD + '{"file_name": "", "text": "a dog"}\n', 2, "'file_name' is empty"),
    ("metadata.jsonl", GOOD + '{"text": "a dog"}\n', 2, "'file_name' is empty"),
    ("metadata.jsonl", GOOD + '{"file_name": "https://a.org/1.png", "text": "a dog"}\n', 2, "is a URL"),
    ("metadata.jsonl", GOOD + '{"file_name": "1\\u0000.png", "text": "a dog"}\n', 2, "does not exist"),
    ("metadata.jsonl", GOOD + json.dumps({"file_name": 300 * "1", "text": "a dog"}) + "\n", 2, "does not exist"),
    ("metadata.jsonl", GOOD + '{"file_name": "1.png", "text": null}\n', 2, "'text' is empty"),
    ("metadata.jsonl", GOOD + '{"file_name": "1.png", "text": []}\n', 2, "'text' is empty"),
    ("metadata.csv", "file_name,text\n0.png,a cat\n1.png\n", 3, "'text' is empty"),
    ("metadata.csv", "file_name,text\n\n0.png,a cat\n\n1.jpg,a dog\n", 5, "'1.jpg' does not exist"),
    ("metadata.csv", 'file_name,text\n0.png,"a\ncat"\n1.jpg,a dog\n', 4, "'1.jpg' does not exist"),
]


@pytest.mark.parametrize(("file", "content", "line", "reason"), BAD_LINES + BAD_ROWS)
def test_a_bad_line_is_named(tmp_path, file, content, line, reason):
    folder = save_pictures(tmp_path, "0.png", "1.png")
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(folder)
    assert message.startswith(f"{folder / file}:" + (f"{line}: " if line else " "))
    assert reason in message


@pytest.mark.parametrize(("file", "content", "line", "reason"), BAD_ROWS)
def test_bad_rows_are_left_out_when_asked(tmp_path, file, content, line, reason):
    folder, left_out = save_pictures(tmp_path, "0.png", "1.png"), []
    (folder / file).write_text(content)
    assert names_of(read_records(folder, leave_out=lambda *row: left_out.append(row))) == ["0.png"]
    assert [where for where, _ in left_out] == [f"{folder / file}:{line}"]
    assert reason in left_out[0][1]
    (folder / "0.png").unlink()
    assert "it has no usable row" in refusal(folder, leave_out=print)


def test_a_table_without_rows(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert "it has no usable row" in refusal(tmp_path)


def test_trailing_commas_say_nothing(tmp_path):
    folder = save_pictures(tmp_path, "0.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a cat,,\n")
    assert read_records(folder)["captions"][:] == [["a cat"]]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("metadata.csv", "file_name,text,text\n0.png,a cat,a dog\n", "two columns are named 'text'"),
        ("metadata.csv", "file_name;text;file_name\n0.png;a cat;1.png\n", "two columns are named 'file_name'"),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": "a cat", "text": "a dog"}\n',
            'the key "text" is there twice',
        ),
        ("metadata.parquet", None, "two columns are named 'text'"),
    ],
)
def test_two_columns_of_one_name(tmp_path, name, content, line):
    """The last one would be read in silence."""
    folder = save_pictures(tmp_path, "0.png", "1.png")
    if content is None:
        columns = [pyarrow.array([text]) for text in ("0.png", "a cat", "a dog")]
        table = pyarrow.Table.from_arrays(columns, names=["file_name", "text", "text"])
        pyarrow.parquet.write_table(table, folder / name)
    else:
        (folder / name).write_text(content)
    assert line in refusal(folder)


@pytest.mark.parametrize(
    "kind", [pyarrow.date64(), pyarrow.timestamp("s"), pyarrow.duration("s"), pyarrow.time64("ns")]
)
def test_dates_in_a_parquet_file_are_not_read(tmp_path, kind):
    """They can be out of the range of Python's."""
    folder = save_pictures(tmp_path, "0.png")
    large = 1 if pyarrow.types.is_time(kind) else 2**53
    columns = {"file_name": ["0.png"], "when": pyarrow.array([large], pyarrow.int64()).cast(kind), "text": ["a cat"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "metadata.parquet")
    assert read_records(folder)["captions"][:] == [["a cat"]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pipe.png", "does not exist as a regular file"),
        (5, "holds 5, which is not the name of a file"),
        ("", "is empty"),
    ],
)
def test_names_that_name_no_file(tmp_path, name, words):
    folder = save_pictures(tmp_path, "0.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a cat"}) + "\n")
    assert words in refusal(folder)


def test_two_metadata_files_of_one_folder(tmp_path):
    folder = save_pictures(tmp_path, "0.png")
    for kind in ("csv", "jsonl"):
        write_metadata(folder, kind, [{"file_name": "0.png", "text": "a cat"}])
    message = refusal(folder)
    assert "metadata.csv" in message
    assert "metadata.jsonl" in message


@pytest.mark.parametrize("how", ["up", "absolute", "link"])
def test_a_picture_outside_of_the_dataset_is_refused(tmp_path, how):
    folder = save_pictures(tmp_path / "set", "0.png")
    save_pictures(tmp_path, "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    name = {"up": "../secret.png", "absolute": str(tmp_path / "secret.png"), "link": "link.png"}[how]
    write_metadata(folder, "jsonl", [{"file_name": name, "text": "mine"}])
    for leave_out in (None, print):
        assert "leaves the dataset folder" in refusal(folder, leave_out=leave_out)


def test_a_picture_elsewhere_inside_of_the_dataset(tmp_path):
    save_pictures(tmp_path, "all/0.png", "axe/parts/1.png")
    rows = [{"file_name": name, "text": "an axe"} for name in ("../all/0.png", "parts/1.png", "parts/../parts/1.png")]
    write_metadata(tmp_path / "axe", "jsonl", rows)
    assert names_of(read_records(tmp_path)) == ["0.png", "1.png", "1.png"]


# Rows as other programs write them.


@pytest.mark.parametrize("first", ["sep=;", "SEP=;", '"sep=;"', "sep=,", "sep=\t"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_excels_line_that_names_the_delimiter(tmp_path, first, line_break):
    folder, delimiter = save_pictures(tmp_path, "0.png", "1.png"), first.strip('"')[4]
    rows = [
        first,
        *(f"{name}{delimiter}{text}" for name, text in (("file_name", "text"), ("0.png", "a"), ("1.png", "b"))),
    ]
    (folder / "metadata.csv").write_bytes(line_break.join([*rows, ""]).encode())
    dataset = read_records(folder)
    assert dataset["captions"][:] == [["a"], ["b"]]
    assert [source.split(": ")[0] for source in dataset["source"]] == [f"{folder}/metadata.csv:{i}" for i in (3, 4)]
    (folder / "1.png").unlink()
    assert refusal(folder).startswith(f"{folder}/metadata.csv:4: '1.png' does not exist")


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("metadata.csv", "axe\\0.png"),
        ("metadata.csv", "axe\\deep\\1.png"),
        ("axe/metadata.csv", "axe/0.png"),
        ("axe/metadata.csv", "set/axe/0.png"),
        ("axe/metadata.csv", "set\\axe\\deep\\1.png"),
        ("axe/deep/metadata.csv", "axe\\deep/1.png"),
        ("axe/metadata.csv", "..\\axe\\0.png"),
    ],
)
def test_names_with_backslashes_or_with_their_folder(tmp_path, table, name):
    folder = save_pictures(tmp_path / "set", "axe/0.png", "axe/deep/1.png")
    (folder / table).write_text(f"file_name,text\n{name},x\n")
    assert names_of(read_records(folder)) == [name.replace("\\", "/").split("/")[-1]]


def test_the_name_as_it_is_written_goes_first(tmp_path):
    folder = save_pictures(tmp_path / "axe", "axe/0.png", "0.png", "axe\\0.png")
    for name, found in (("axe/0.png", "axe/0.png"), ("axe\\0.png", "axe\\0.png"), ("axe/axe/0.png", "axe/0.png")):
        (folder / "metadata.csv").write_text(f"file_name,text\n{name},x\n")
        assert read_records(folder)[0]["image"]["path"] == f"{folder}/{found}"


@pytest.mark.parametrize("name", ["..\\secret.png", "set/../secret.png", "set\\..\\secret.png"])
def test_other_spellings_leave_the_dataset_no_more_than_others(tmp_path, name):
    folder = save_pictures(tmp_path / "set", "0.png")
    save_pictures(tmp_path, "secret.png")
    (folder / "metadata.csv").write_text(f"file_name,text\n{name},x\n")
    assert "leaves the dataset folder" in refusal_of(read_records, folder)


@pytest.mark.parametrize("column", ["text", "prompt", "words"])
@pytest.mark.parametrize(
    ("value", "shown"), [(5, "5"), (True, "True"), ({"en": "a"}, "{'en': 'a'}"), (["a", 1], "['a', 1]")]
)
def test_a_caption_that_is_no_text(tmp_path, column, value, shown):
    folder = save_pictures(tmp_path, "0.png", "1.png", "2.png")
    rows = [{"file_name": f"{i}.png", column: text} for i, text in enumerate(("a", value, "c"))]
    write_metadata(folder, "jsonl", rows)
    options = {"caption_column": "words"} if column == "words" else {}
    reason = f"column '{column}' holds {shown}, which is not text"
    assert refusal(folder, **options) == (
        f"{folder}/metadata.jsonl:2: {reason}. Fix the row, or pass --skip_bad_images to leave such rows out."
    )
    left_out = []
    assert names_of(read_records(folder, leave_out=lambda *row: left_out.append(row), **options)) == ["0.png", "2.png"]
    assert left_out == [(f"{folder}/metadata.jsonl:2", reason)]


@pytest.mark.parametrize(
    ("row", "taken", "others"),
    [
        (dict(text="t", caption="c"), "text", "caption"),
        (dict(zh_text="z", en_text="e", author="me"), "en_text", "zh_text, author"),
        (dict(title="t", prompt="p", width=4), "prompt", "title"),
    ],
)
def test_of_several_caption_columns_the_log_says_which_is_read(tmp_path, said, row, taken, others):
    save_pictures(tmp_path / "set", "axe/0.png", "spear/0.png")
    for kind in ("axe", "spear"):
        write_metadata(tmp_path / "set" / kind, "jsonl", [{"file_name": "0.png", **row}])
    folder = tmp_path / "set"
    assert read_records(folder)["captions"][:] == [[row[taken]]] * 2
    assert said == [f"{folder}: the captions are read from column '{taken}', not from {others} (--caption_column)"]
    said.clear()
    read_records(folder, caption_column=others.split(", ")[0])
    assert said == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("captions.csv", "save it as metadata.csv with the columns file_name and text."),
        ("metadata.tsv", "save it as metadata.csv with the columns file_name and text."),
        ("train.jsonl", "save it as metadata.jsonl with the columns file_name and text, one object per line."),
        ("metadata.json", "save it as metadata.jsonl with the columns file_name and text, one object per line."),
        ("labels.xlsx", "save it as metadata.csv with the columns file_name and text."),
    ],
)
def test_a_table_under_another_name(tmp_path, said, name, remedy):
    folder = save_pictures(tmp_path / "set", "0.png", "1.png")
    for file in (name, "0.json"):  # a .json of a picture's name is no table
        (folder / file).write_text("file_name,text\n0.png,a\n")
    hint = f"If {name} holds the captions, {remedy}"
    assert refusal(folder).endswith(f" {hint}")
    # Where something else gives the captions, the log says it.
    assert read_records(folder, instance_prompt="x")["captions"][:] == [["x"], ["x"]]
    assert said == [f"{folder}: captions are not read from a table. {hint}"]
    said.clear()
    for i in range(2):
        (folder / f"{i}.txt").write_text("beside")
    assert len(read_records(folder)) == 2
    assert said == []


def test_why_every_row_fails(tmp_path):
    """Where bad rows are left out too, as by --dry_run, which lists them in a report that is never written then."""
    folder = save_pictures(tmp_path, "0.png")
    rows = [{"file_name": f"{i}.jpg", "text": "a"} for i in range(3)]
    write_metadata(folder, "jsonl", rows)
    assert refusal(folder, leave_out=lambda *row: None) == (
        f"{folder}: it has no usable row. The first of 3 that are left out: {folder}/metadata.jsonl:1: '0.jpg' does not exist "
        "(there is '0.png')."
    )
    (folder / "metadata.jsonl").unlink()
    assert refusal(folder, dataset_layout="caption_files", leave_out=lambda *row: None) == (
        f"{folder}: it has no usable row. The first of 1 that are left out: {folder}/0.png: there is no 0.txt beside it."
    )


@pytest.mark.parametrize("name", ["text", "caption", "prompt"])
@pytest.mark.parametrize("value", [5, {"en": "an axe"}])
def test_a_column_of_captions_that_are_no_text_is_named(tmp_path, name, value):
    assert name in CAPTION_COLUMNS
    save_pictures(tmp_path, "a.png", "b.png")
    rows = [{"file_name": file, "size": 3, name: value} for file in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert f"column '{name}' holds no text. Write the captions into it as text." in refusal(tmp_path)

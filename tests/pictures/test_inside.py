"""Files that a dataset names are read only if they are regular files in the folders that the command names."""

import bz2
import gzip
import json
import lzma
import os
import socket
import zipfile

import pytest
from conftest import read_records, refusal_of
from PIL import Image

from text_to_image_lora.pictures import tables
from text_to_image_lora.pictures.inside import home_folders, read_bytes
from text_to_image_lora.pictures.records import read_image_bytes


SECRET = "the secret"
LINE = json.dumps({"file_name": "0.png", "text": SECRET}) + "\n"


def make_set(folder, **files):
    """Writes a picture, and files by their names with `_` for the dot."""
    folder.mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(folder / "0.png")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def put_special(path, kind):
    """Puts something at a path that would make its reader wait for ever, or that reads from elsewhere."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
    elif kind == "circle":
        path.symlink_to(path.name)
    else:
        target = path.parent.parent / "elsewhere" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(LINE)
        path.symlink_to(target if kind == "link" else f"../elsewhere/{path.name}")


@pytest.mark.parametrize("kind", ["link", "relative link", "device", "pipe", "socket", "circle"])
@pytest.mark.parametrize("name", ["0.txt", "0.caption", "metadata.jsonl", "metadata.csv", "1.png", "0.mask.png"])
def test_what_is_not_a_regular_file_of_the_dataset_is_refused(tmp_path, monkeypatch, name, kind):
    folder = make_set(tmp_path / "set", **({} if name.startswith(("metadata", "0.txt")) else {"0_txt": "a cat"}))
    if name == "0.caption":
        (folder / "0.txt").unlink()
    monkeypatch.chdir(folder)  # the path of a socket has to be short
    put_special(folder / name, kind)
    if name == "1.png":
        (folder / "1.txt").write_text("a dog")
    for leave_out in (None, print):
        message = refusal_of(read_records, folder, leave_out=leave_out)
        assert message.startswith(f"{folder / name}: ")
        assert SECRET not in message


def test_a_table_that_is_a_link_to_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = make_set(tmp_path / "set")
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["0.png"], "text": [SECRET]}), tmp_path / "other.parquet")
    (folder / "metadata.parquet").symlink_to(tmp_path / "other.parquet")
    assert "a link out of the dataset folder" in refusal_of(read_records, folder)


@pytest.mark.parametrize("kind", ["device", "pipe", "socket"])
def test_a_picture_that_becomes_special_later_does_not_block(tmp_path, monkeypatch, kind):
    folder = make_set(tmp_path / "set")
    monkeypatch.chdir(folder)
    (folder / "0.png").unlink()
    put_special(folder / "0.png", kind)
    with pytest.raises(OSError, match="not a regular file|No such device"):
        read_image_bytes({"bytes": None, "path": str(folder / "0.png")})


def test_regular_files_are_read(tmp_path):
    (tmp_path / "0").write_bytes(b"abc")
    assert read_bytes(tmp_path / "0") == b"abc"


# What stays allowed.


def test_links_inside_of_the_dataset(tmp_path):
    folder = make_set(tmp_path / "set", words_txt="a cat")
    (folder / "0.txt").symlink_to("words.txt")
    (folder / "1.png").symlink_to("0.png")
    (folder / "1.txt").symlink_to(folder / "words.txt")
    assert read_records(folder)["captions"][:] == [["a cat"], ["a cat"]]


def test_a_folder_that_is_a_link(tmp_path):
    make_set(tmp_path / "set", **{"metadata_jsonl": LINE})
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert read_records(tmp_path / "link")["captions"][:] == [[SECRET]]


@pytest.mark.parametrize("how", ["files", "folder", "metadata"])
def test_links_between_the_folders_of_a_command(tmp_path, how):
    first, second = make_set(tmp_path / "first", **{"0_txt": "a cat"}), tmp_path / "second"
    if how == "files":
        second.mkdir()
        for name in ("0.png", "0.txt"):
            (second / name).symlink_to(first / name)
    elif how == "folder":
        make_set(second, **{"0_txt": "a cat"})
        (second / "more").symlink_to(first)
    else:
        second.mkdir()
        (second / "metadata.csv").write_text("file_name,text\n../first/0.png,a cat\n")
    assert read_records([first, second])["captions"][:] == [["a cat"], ["a cat"]]
    if how == "folder":
        assert "Pass that folder too" in refusal_of(read_records, second)


def test_a_snapshot_in_the_cache_of_the_hub(tmp_path):
    """Its files are links to the folder `blobs` of the repository, but may not lead to another repository."""
    place = tmp_path / "hub" / "datasets--me--cats"
    snapshot, blobs = place / "snapshots" / "0123", place / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    make_set(tmp_path / "set", **{"0_txt": "a cat"})
    for number, name in enumerate(("0.png", "0.txt")):
        (tmp_path / "set" / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert home_folders([snapshot]) == (snapshot, blobs)
    assert read_records(snapshot)["captions"][:] == [["a cat"]]
    (blobs / "1").rename(tmp_path / "hub" / "other")
    (snapshot / "0.txt").unlink()
    (snapshot / "0.txt").symlink_to("../../../other")
    assert "a link out of the dataset folder" in refusal_of(read_records, snapshot)


# Datasets of the `datasets` library.


@pytest.fixture
def stored(tmp_path):
    """Writes a dataset with a caption, saved by `save_to_disk` or as a parquet file, and returns its folder."""
    import datasets

    def store(name, caption="a cat", *, parquet=False):
        make_set(tmp_path / f"{name} pictures")
        cells = [{"bytes": (tmp_path / f"{name} pictures" / "0.png").read_bytes(), "path": None}]
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        dataset = datasets.Dataset.from_dict({"image": cells, "text": [caption]}, features=features)
        if parquet:
            dataset.to_parquet(tmp_path / name / "train.parquet")
        else:
            dataset.save_to_disk(tmp_path / name)
        return tmp_path / name

    datasets.disable_progress_bars()
    yield store
    datasets.enable_progress_bars()


def load(folder, tmp_path):
    return read_records(folder, cache_dir=str(tmp_path / "cache"))


def card(files, folder=""):
    lines = [f"  data_files: {files}\n"] if files else []
    lines += [f"  data_dir: {folder}\n"] if folder else []
    return "configs:\n- config_name: default\n" + "".join(lines)


CARDS = {
    "an absolute path": lambda other: card(f"{other}/train.parquet"),
    "a pattern": lambda other: card(f"{other}/*"),
    "a path upwards": lambda other: card(f"../{other.name}/train.parquet"),
    "a path down and upwards": lambda other: card(f"data/../../{other.name}/*.parquet"),
    "an address": lambda other: card("http://127.0.0.1:9/train.parquet"),
    "an address on the hub": lambda other: card("hf://datasets/me/cats/train.parquet"),
    "an archive of an address": lambda other: card("zip://*::http://127.0.0.1:9/a.zip"),
    "one of several": lambda other: card(f"[train.parquet, {other}/train.parquet]"),
    "a split": lambda other: card(f"\n  - split: train\n    path: {other}/train.parquet"),
    "a folder": lambda other: card(None, other),
    "a folder upwards": lambda other: card(None, f"../{other.name}"),
    "another configuration": lambda other: card("train.parquet") + f"- config_name: b\n  data_files: {other}/*\n",
}


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("case", CARDS)
def test_a_card_cannot_name_files_elsewhere(stored, tmp_path, case, name):
    other, folder = stored("other", SECRET, parquet=True), stored("set", parquet=True)
    text = CARDS[case](other)
    (folder / name).write_text(f"---\n{text}---\nabout\n" if name == "README.md" else text)
    message = refusal_of(load, folder, tmp_path)
    assert message.startswith(f"{folder / name}: it names ")
    assert "not in the dataset folder" in message


@pytest.mark.parametrize("files", ["train.parquet", "'*.parquet'", "[train.parquet]", "./train.parquet"])
def test_a_card_may_name_its_own_files(stored, tmp_path, files):
    folder = stored("set", parquet=True)
    (folder / "README.md").write_text(f"---\nlicense: mit\n{card(files)}---\nabout\n")
    assert load(folder, tmp_path)["captions"][:] == [["a cat"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x]\nb: *a\n", "contains references"),
        ("a: [\n", "can't be read as YAML"),
        ("a: " + "[" * 5000, "can't be read as YAML"),
    ],
)
def test_a_card_that_is_no_plain_yaml(stored, tmp_path, text, words):
    folder = stored("set", parquet=True)
    (folder / "README.md").write_text(f"---\n{text}\n---\n")
    assert words in refusal_of(load, folder, tmp_path)


BOMB = b'{"text": "a cat"}\n' + b" " * (2**20 - 18)  # repeated


def pack_zip(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as pack:
        for number in range(3):
            pack.writestr(f"{number}.jsonl", BOMB * 40)


def pack_by(opener):
    def pack(file):
        with opener(file, "wb") as packed:
            for _ in range(120):
                packed.write(BOMB)

    return pack


PACKED = {
    "a.jsonl.gz": pack_by(gzip.open),
    "a.csv": pack_by(gzip.open),
    "a.txt": pack_by(bz2.open),
    "a.jsonl": pack_by(lzma.open),
    "a.json": pack_zip,
    "a.zip": pack_zip,
}


@pytest.mark.parametrize("name", PACKED)
def test_a_data_file_that_unpacks_to_far_too_much(stored, tmp_path, name):
    folder = stored("set", parquet=True)
    PACKED[name](folder / name)
    (folder / "README.md").write_text(f"---\n{card(name)}---\n")
    assert "unpacks to far more than its size" in refusal_of(load, folder, tmp_path)
    assert not list(tmp_path.rglob("extracted"))


def test_a_data_file_in_a_format_that_has_no_limit(stored, tmp_path):
    folder = stored("set", parquet=True)
    (folder / "a.jsonl").write_bytes(bytes.fromhex("28b52ffd") + bytes(20))
    (folder / "README.md").write_text(f"---\n{card('a.jsonl')}---\n")
    assert "data files in the format zstd are not read" in refusal_of(load, folder, tmp_path)


@pytest.mark.parametrize("name", ["README.md", "train.parquet", "more.parquet", "dataset_infos.json"])
def test_files_of_a_stored_dataset_that_are_links_out_of_it(stored, tmp_path, name):
    other, folder = stored("other", SECRET, parquet=True), stored("set", parquet=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(other / "train.parquet")
    assert "a link out of the dataset folder" in refusal_of(load, folder, tmp_path)


NAMES = {
    "an absolute path": lambda other: str(next(other.glob("*.arrow"))),
    "a path upwards": lambda other: f"../{other.name}/{next(other.glob('*.arrow')).name}",
    "an address": lambda other: "http://127.0.0.1:9/data.arrow",
    "a number": lambda other: 5,
}


@pytest.mark.parametrize("case", NAMES)
def test_state_json_cannot_name_files_elsewhere(stored, tmp_path, case):
    other, folder = stored("other", SECRET), stored("set")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": NAMES[case](other)}]
    (folder / "state.json").write_text(json.dumps(state))
    message = refusal_of(load, folder, tmp_path)
    assert message.startswith(f"{folder / 'state.json'}: it names ")


@pytest.mark.parametrize("split", ["../other", "absolute", "train/../../other", "http://127.0.0.1:9/a"])
def test_dataset_dict_json_cannot_name_folders_elsewhere(stored, tmp_path, split):
    other, folder = stored("other", SECRET), tmp_path / "set"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [split.replace("absolute", str(other))]}))
    assert "it names " in refusal_of(load, folder, tmp_path)


@pytest.mark.parametrize("kind", ["link", "device", "pipe", "circle"])
@pytest.mark.parametrize("file", ["*.arrow", "state.json", "dataset_info.json"])
def test_files_of_a_saved_dataset_are_regular(stored, tmp_path, file, kind):
    folder = stored("set")
    (path,) = folder.glob(file)
    path.unlink()
    put_special(path, kind)
    message = refusal_of(load, folder, tmp_path)
    assert message.startswith(f"{folder}")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"_data_files": 5}'])
def test_a_state_json_of_another_kind(stored, tmp_path, text):
    folder = stored("set")
    (folder / "state.json").write_text(text)
    assert refusal_of(load, folder, tmp_path).startswith(f"{folder}")


# Limits.


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_table_of_too_many_rows(tmp_path, monkeypatch, name):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(tables, "MOST_ROWS", 2)
    folder = make_set(tmp_path / "set")
    for count in (2, 3):
        if name.endswith("parquet"):
            columns = {"file_name": ["0.png"] * count, "text": ["a"] * count}
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
        else:
            head, row = ("file_name,text\n", "0.png,a\n") if name.endswith("csv") else ("", LINE)
            (folder / name).write_text(head + row * count)
        if count == 2:
            assert len(read_records(folder)) == 2
    assert refusal_of(read_records, folder) == (
        f"{folder / name}: it has more than the limit of 2 rows. Divide the dataset into several folders, each with its own "
        "table, and pass all: --train_data_dir A B"
    )


@pytest.mark.parametrize("parquet", [True, False])
def test_a_stored_dataset_of_too_many_rows(stored, tmp_path, monkeypatch, parquet):
    folder = stored("set", parquet=parquet)
    monkeypatch.setattr(tables, "MOST_ROWS", 0)
    assert "it has more than the limit of 0 rows. Save a part of it" in refusal_of(load, folder, tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_table_that_is_too_large(tmp_path, monkeypatch, name):
    """A parquet file can be small and its cells large."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(tables, "MOST_TABLE_BYTES", 20_000)
    folder = make_set(tmp_path / "set")
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(
            pyarrow.table({"file_name": ["0.png"] * 5, "text": ["a" * 9000] * 5}), folder / name
        )
        assert (folder / name).stat().st_size < 10_000
    else:
        (folder / name).write_text("file_name,text\n" + "0.png,a\n" * 5000)
    message = refusal_of(read_records, folder)
    assert message.startswith(f"{folder / name}: ")
    assert "more than the limit of 0.0 MiB. Divide the dataset into several folders" in message


@pytest.mark.parametrize("kind", ["0.txt", "lines", "metadata.jsonl", "a list", "stored"])
def test_a_caption_that_is_too_long(stored, tmp_path, kind):
    size = tables.MOST_CAPTION_BYTES
    if kind == "stored":
        folder = stored("set", "a" * size)
    elif kind in ("0.txt", "lines"):
        folder = make_set(tmp_path / "set", **{"0_txt": "a" * (size + 1) if kind == "0.txt" else "a\n" * size})
    else:
        text = "a" * size if kind == "metadata.jsonl" else ["a"] * size
        folder = make_set(tmp_path / "set", metadata_jsonl=json.dumps({"file_name": "0.png", "text": text}))
    message = refusal_of(load, folder, tmp_path)
    assert "more than the limit of" in message
    assert len(message) < 500


@pytest.mark.parametrize("name", ["a/" * 10_000_000 + "0.png", "a" * 10_000_000, "http://" + "a" * 10_000_000])
def test_a_name_that_is_too_long_for_a_file(tmp_path, name):
    folder = make_set(tmp_path / "set", metadata_jsonl=json.dumps({"file_name": name, "text": "a"}))
    message = refusal_of(read_records, folder)
    assert message.startswith(f"{folder}/metadata.jsonl:1: '{name[:100]}")
    assert "too long for the name of a file" in message
    assert len(message) < 500


def test_a_table_of_too_many_columns(tmp_path):
    """Each row has a column of its own, and each column is looked for in each row."""
    lines = "".join(json.dumps({"file_name": "0.png", f"text{i}": "a"}) + "\n" for i in range(20_000))
    folder = make_set(tmp_path / "set", metadata_jsonl=lines)
    assert "it has more than the limit of 1,000 columns" in refusal_of(read_records, folder)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, '{"file_name": ' + "[" * 100_000])
def test_a_row_that_is_nested_without_end(tmp_path, line):
    folder = make_set(tmp_path / "set", metadata_jsonl=line)
    assert refusal_of(read_records, folder).startswith(f"{folder}/metadata.jsonl:1: this line is not JSON")


# Numbers that would take all memory or processes of the machine.


@pytest.mark.parametrize(
    ("flag", "most"),
    [
        ("cache_variations", 1000), ("dataloader_num_workers", 256), ("tag_variations", 1000), ("num_class_images", 100_000),
        ("sample_batch_size", 1024), ("resolution", 16384), ("bucket_max_size", 16384), ("bucket_step", 16384),
    ],
)  # fmt: skip
def test_flags_have_an_upper_bound(flag, most):
    from train_text_to_image_lora import build_parser

    words = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"]
    assert vars(build_parser().parse([*words, f"--{flag}", str(most)]))[flag] == most
    message = refusal_of(build_parser().parse, [*words, f"--{flag}", str(most + 1)])
    assert message.startswith(f"--{flag} {most + 1}: it must be from ")

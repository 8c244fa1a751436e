"""Datasets as users have them: each layout loads, and whatever is wrong is told in one line that says where."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.records import fingerprint, image_id, load_records, read_image_bytes
from text_to_image_lora.tables import CAPTION_COLUMNS


def save_pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (40 * i, 0, 0)).save(folder / name)
    return folder


def picture_bytes(colour):
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return file.getvalue()


def names_of(dataset):
    return [Path(row["image"]["path"]).name for row in dataset]


def refusal(folder, **options):
    """The message of the `InputError` that loading a folder ends in: one line that starts with where."""
    with pytest.raises(InputError) as caught:
        load_records(train_data_dir=folder, **options)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


# Folders with metadata files.

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
    dataset = load_records(train_data_dir=folder)
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
    assert load_records(train_data_dir=folder)["captions"][:] == [["é 0"], ["é 1"]]


def test_a_folder_for_each_class(tmp_path):
    # The dataset itself may lie in a hidden folder; hidden folders in it are somebody's backup.
    folder = tmp_path / ".data" / "weapons"
    for kind in ("spear", "axe", ".ipynb_checkpoints", "__MACOSX"):
        write_metadata(save_pictures(folder / kind, "0.png"), "jsonl", [{"file_name": "0.png", "text": f"a {kind}"}])
    dataset = load_records(train_data_dir=folder)
    assert dataset["concept"][:] == ["axe", "spear"]
    assert dataset["captions"][:] == [["a axe"], ["a spear"]]
    assert load_records(dataset_name=str(folder))[:] == dataset[:]


def test_the_folder_one_stands_in(tmp_path, monkeypatch):
    folder = save_pictures(tmp_path / "axes", "0.png")
    write_metadata(folder, "csv", [{"file_name": "0.png", "text": "an axe"}])
    monkeypatch.chdir(folder)
    assert load_records(train_data_dir=".")["concept"][:] == ["axes"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_captions(tmp_path, kind):
    folder = save_pictures(tmp_path, "0.png", "1.png")
    rows = [{"file_name": "0.png", "text": ["a cat", "my cat"]}, {"file_name": "1.png", "text": ["a dog"]}]
    assert load_records(train_data_dir=write_metadata(folder, kind, rows))["captions"][:] == [r["text"] for r in rows]


@pytest.mark.parametrize("column", [*CAPTION_COLUMNS, "words of the artist"])
def test_the_caption_column_is_found(tmp_path, column):
    folder = save_pictures(tmp_path, "0.png")
    other = {} if column not in CAPTION_COLUMNS else {"author": "me"}
    write_metadata(folder, "jsonl", [{"width": 4, **other, "file_name": "0.png", column: "a cat"}])
    assert load_records(train_data_dir=folder)["captions"][:] == [["a cat"]]


def test_the_caption_column_that_is_asked_for(tmp_path):
    folder = save_pictures(tmp_path, "0.png")
    write_metadata(folder, "jsonl", [{"file_name": "0.png", "text": "a cat", "notes": "blurred", "width": 4}])
    assert load_records(train_data_dir=folder, caption_column="notes")["captions"][:] == [["blurred"]]
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
    assert names_of(load_records(train_data_dir=folder, image_column="file")) == ["0.png"]


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
def test_bad_rows_are_left_out_when_asked(tmp_path, capsys, file, content, line, reason):
    folder = save_pictures(tmp_path, "0.png", "1.png")
    (folder / file).write_text(content)
    assert names_of(load_records(train_data_dir=folder, skip_bad_images=True)) == ["0.png"]
    assert f"left out: {folder / file}:{line}: " in capsys.readouterr().out
    (folder / "0.png").unlink()
    assert "no row" in refusal(folder, skip_bad_images=True)


def test_trailing_commas_say_nothing(tmp_path):
    folder = save_pictures(tmp_path, "0.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a cat,,\n")
    assert load_records(train_data_dir=folder)["captions"][:] == [["a cat"]]


@pytest.mark.parametrize("how", ["up", "absolute", "link"])
def test_a_picture_outside_of_the_dataset_is_refused(tmp_path, how):
    folder = save_pictures(tmp_path / "set", "0.png")
    save_pictures(tmp_path, "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    name = {"up": "../secret.png", "absolute": str(tmp_path / "secret.png"), "link": "link.png"}[how]
    write_metadata(folder, "jsonl", [{"file_name": name, "text": "mine"}])
    for skip in (False, True):
        assert "leaves the dataset folder" in refusal(folder, skip_bad_images=skip)


def test_a_picture_elsewhere_inside_of_the_dataset(tmp_path):
    save_pictures(tmp_path, "all/0.png", "axe/parts/1.png")
    rows = [{"file_name": name, "text": "an axe"} for name in ("../all/0.png", "parts/1.png", "parts/../parts/1.png")]
    write_metadata(tmp_path / "axe", "jsonl", rows)
    assert names_of(load_records(train_data_dir=tmp_path)) == ["0.png", "1.png", "1.png"]


def test_folders_without_a_dataset(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no pictures and no metadata" in refusal(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert "no row" in refusal(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    save_pictures(tmp_path, "deep/down/0.png")
    assert "no captions" in refusal(tmp_path)


def test_two_metadata_files_of_one_folder(tmp_path):
    folder = save_pictures(tmp_path, "0.png")
    for kind in ("csv", "jsonl"):
        write_metadata(folder, kind, [{"file_name": "0.png", "text": "a cat"}])
    message = refusal(folder)
    assert "metadata.csv" in message
    assert "metadata.jsonl" in message


def test_max_train_samples_draws_as_upstream_does(pictures):
    whole = load_records(train_data_dir=pictures)
    some = load_records(train_data_dir=pictures, max_train_samples=4, seed=3)
    assert some[:] == whole.shuffle(seed=3).select(range(4))[:]
    assert load_records(train_data_dir=pictures, max_train_samples=99)[:] == whole[:]


# Datasets of the `datasets` library, in a folder and on the hub.


@pytest.fixture
def stored(tmp_path):
    """Writes a dataset with a picture column in one of the library's formats; returns the folder."""
    import datasets

    def store(kind, image="image", splits=("train",), pictures=("red", "blue"), **texts):
        texts = texts or {"en_text": ["a red cat", "a blue cat"], "zh_text": ["红猫", "蓝猫"]}
        features = {name: datasets.Value("string") for name in texts} | {image: datasets.Image()}
        for name, values in texts.items():
            if isinstance(values[0], list):
                features[name] = datasets.List(datasets.Value("string"))
        cells = [c and {"bytes": picture_bytes(c), "path": None} for c in pictures]
        dataset = datasets.Dataset.from_dict(texts | {image: cells}, features=datasets.Features(features))
        folder = tmp_path / kind
        if kind == "parquet":
            (folder / "data").mkdir(parents=True)
            for split in splits:
                dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        elif kind == "dictionary":
            datasets.DatasetDict(dict.fromkeys(splits, dataset)).save_to_disk(folder)
        else:
            dataset.save_to_disk(folder)
        return folder

    datasets.disable_progress_bars()
    yield store
    datasets.enable_progress_bars()


@pytest.fixture
def load(tmp_path):
    return lambda folder, **options: load_records(
        dataset_name=str(folder), cache_dir=str(tmp_path / "datasets-cache"), **options
    )


KINDS = ["parquet", "disk", "dictionary"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_dataset(stored, load, kind):
    folder = stored(kind, splits=("test", "train"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    dataset = load(folder)
    assert dataset["captions"][:] == [["a red cat"], ["a blue cat"]]
    assert [read_image_bytes(row["image"]) for row in dataset] == [picture_bytes("red"), picture_bytes("blue")]
    assert dataset["concept"][:] == [kind] * 2
    assert dataset["num_repeats"][:] == [1, 1]
    assert [source.endswith(f"row {i}") for i, source in enumerate(dataset["source"])] == [True, True]
    assert load(folder, caption_column="zh_text")["captions"][:] == [["红猫"], ["蓝猫"]]
    assert load(folder, max_train_samples=1, seed=3)["captions"][:] == [["a blue cat"]]
    # A user's dataset is read, never written to.
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_columns_of_a_stored_dataset(stored, load):
    folder = stored("disk", image="photo", words=[["a", "b"], ["c", None]])
    assert load(folder)["captions"][:] == [["a", "b"], ["c"]]
    # `image` is upstream's default, so it may be passed without meaning a name.
    assert load(folder, image_column="image")[:] == load(folder, image_column="photo")[:]
    for options, wrong in (
        (dict(caption_column="txet"), "'txet' (--caption_column)"),
        (dict(caption_column="photo"), "'photo' holds no text"),
        (dict(image_column="words"), "'words' holds no pictures"),
        (dict(image_column="foto"), "'foto' (--image_column)"),
    ):
        with pytest.raises(InputError, match="words") as caught:
            load(folder, **options)
        assert wrong in str(caught.value)


def test_rows_without_picture_or_caption_in_a_stored_dataset(stored, load):
    dataset = load(stored("disk", pictures=("red", None), text=["a", "b"]))
    with pytest.raises(OSError, match="no picture"):
        read_image_bytes(dataset[1]["image"])
    with pytest.raises(InputError, match="row 1: column 'text' is empty"):
        load(stored("parquet", text=["a", None]))


@pytest.mark.parametrize("kind", ["parquet", "disk"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(text=["a", " ", "c"]), "column 'text' is empty"),
        (dict(text=["a", None, "c"]), "column 'text' is empty"),
        (dict(text=["a", "b", "c"], pictures=("red", None, "blue")), "there is no picture"),
    ],
    ids=["empty caption", "null caption", "null picture"],
)
def test_a_bad_row_of_a_stored_dataset_is_refused_or_left_out(stored, train, tmp_path, capsys, kind, changes, reason):
    folder = stored(kind, **dict(pictures=("red", "green", "blue")) | changes)
    options = dict(train_data_dir=folder, cache_dir=tmp_path / "datasets-cache")
    with pytest.raises(InputError) as caught:
        train(**options)
    message = str(caught.value)
    assert message.startswith(f"{folder}: row 1: {reason}")
    assert "--skip_bad_images" in message
    assert "\n" not in message
    train(skip_bad_images=True, **options)
    out = capsys.readouterr().out
    assert f"left out: {folder}: row 1: {reason}\n" in out
    assert out.count("left out") == 1
    assert "\n2 pictures, 1 steps an epoch" in out


def test_the_rows_that_stay_keep_their_pictures_and_numbers(stored, load):
    dataset = load(stored("parquet", pictures=("red", "green", "blue"), text=["a", "", "c"]), skip_bad_images=True)
    assert dataset["captions"][:] == [["a"], ["c"]]
    assert [read_image_bytes(row["image"]) for row in dataset] == [picture_bytes("red"), picture_bytes("blue")]
    assert [source.rpartition(": ")[2] for source in dataset["source"]] == ["row 0", "row 2"]


@pytest.mark.parametrize("instance_prompt", [None, "sks"])
def test_a_thumbnail_beside_parquet_files_is_not_trained_on(stored, tmp_path, instance_prompt):
    folder, said = stored("parquet"), []
    (folder / "thumbnail.png").write_bytes(picture_bytes("green"))
    dataset = load_records(
        train_data_dir=folder,
        cache_dir=str(tmp_path / "datasets-cache"),
        instance_prompt=instance_prompt,
        say=said.append,
    )
    assert dataset["captions"][:] == [["a red cat"], ["a blue cat"]]
    assert [read_image_bytes(row["image"]) for row in dataset] == [picture_bytes("red"), picture_bytes("blue")]
    assert f"{folder}: training on its parquet or arrow files, not on the pictures beside them" in said


def test_a_stored_dataset_without_train_split(stored, load):
    assert len(load(stored("parquet", splits=("validation",)))) == 2
    with pytest.raises(InputError, match="no split 'train', only: a, b"):
        load(stored("dictionary", splits=("a", "b")))


def test_a_stored_dataset_without_pictures(load, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "words" / "train.parquet")
    with pytest.raises(InputError, match="no column with pictures. The columns are: text"):
        load(tmp_path / "words")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_stored_dataset(stored, load, kind):
    folder = stored(kind)
    for path in [*folder.rglob("*.arrow"), *folder.rglob("*.parquet")]:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="can't be loaded") as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["no/such", "nothing", "./nowhere", "../up", "~/home", "/root/x", "a/b/c", "http://a.b"]
)
def test_a_dataset_that_is_nowhere(load, name):
    with pytest.raises(InputError) as caught:
        load(name)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


# Identities.


def test_identity_of_pictures_and_of_the_set():
    red, blue = image_id(picture_bytes("red")), image_id(picture_bytes("blue"))
    assert red == image_id(picture_bytes("red")) != blue
    sets = [
        ([red, blue], [["a"], ["b"]]), ([blue, red], [["a"], ["b"]]), ([red, blue], [["b"], ["a"]]),
        ([red, blue], [["a", "b"], ["b"]]), ([red], [["a"]]), ([red, blue], [["a"], ["c"]]),
    ]  # fmt: skip
    assert len({fingerprint(*one) for one in sets}) == len(sets)
    assert fingerprint(*sets[0]) == fingerprint(*sets[0])


# The bundled sets.


@pytest.mark.parametrize(
    ("name", "concepts"),
    [
        ("weapons", {"axe": 24, "spear": 24, "trident": 24, "whip": 24}),
        ("weapons/axe", {"axe": 24}),
        ("weapons_test", {"weapons_test": 24}),
        ("creatures", {"creatures": 40}),
    ],
)
def test_bundled_sets(name, concepts):
    dataset = load_records(train_data_dir=ROOT / "metadata" / name)
    held = dataset["concept"][:]
    assert {concept: held.count(concept) for concept in held} == concepts
    assert len({image_id(read_image_bytes(row["image"])) for row in dataset}) == len(dataset)
    assert all(len(captions) == 1 and len(captions[0]) > 10 for captions in dataset["captions"])


@pytest.mark.long
def test_bundled_sets_are_what_the_script_draws(tmp_path):
    script = ROOT / "scripts" / "draw_datasets.py"
    subprocess.run([sys.executable, script, "--output_dir", tmp_path], check=True)
    drawn, bundled = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path, ROOT / "metadata")
    )
    del bundled[Path("README.md")]
    assert drawn.keys() == bundled.keys()
    assert [path for path in drawn if drawn[path] != bundled[path]] == []


def test_parquet_beside_several_pictures(tmp_path):
    import datasets

    def cell(colour):
        file = io.BytesIO()
        Image.new("RGB", (4, 3), colour).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict({"image": [cell("red")], "text": ["a"]}, features=features).to_parquet(
        folder / "part0.parquet"
    )
    for i in range(2):
        (folder / f"thumbnail{i}.png").write_bytes(cell("green")["bytes"])
    dataset = load_records(train_data_dir=folder, cache_dir=str(tmp_path / "datasets-cache"))
    assert dataset["captions"][:] == [["a"]]

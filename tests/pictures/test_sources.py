"""All sources of pictures become equal records, and errors are reported in one line with their place."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, read_records, refusal_of, write_pictures
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures.records import image_id, read_image_bytes


def picture_bytes(colour):
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return file.getvalue()


def pictures_of(records):
    return [read_image_bytes(row["image"]) for row in records]


def refusal(folder):
    message = refusal_of(read_records, folder)
    assert message.startswith(f"{folder}: ")
    return message


# Folders.


def test_a_folder_for_each_class(tmp_path):
    # The dataset itself may be in a hidden folder; hidden folders in it are taken for backups.
    folder = tmp_path / ".data" / "weapons"
    for kind in ("spear", "axe", ".ipynb_checkpoints", "__MACOSX"):
        write_pictures(folder / kind, count=1, captions=[f"a {kind}"])
    dataset = read_records(folder)
    assert dataset["concept"][:] == ["axe", "spear"]
    assert dataset["captions"][:] == [["a axe"], ["a spear"]]
    assert read_records(dataset_name=str(folder))[:] == dataset[:]


def test_the_folder_one_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(write_pictures(tmp_path / "axes", count=1))
    assert read_records(".")["concept"][:] == ["axes"]


def test_folders_without_a_dataset(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no pictures and no metadata" in refusal(tmp_path)
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "deep" / "down" / "0.png").write_bytes(picture_bytes("red"))
    assert "no captions" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.rar", "archives of this kind can't be read. Unpack it and pass the folder, or pack a .zip."),
        ("a.7Z", "archives of this kind can't be read. Unpack it and pass the folder, or pack a .zip."),
        ("a.tar.zst", "archives of this kind can't be read. Unpack it and pass the folder, or pack a .zip."),
        ("metadata.csv", "it is a file. Pass the folder that contains it: "),
        ("0.png", "it is a file. Pass the folder that contains it: "),
        ("train.parquet", "it is a file. Pass the folder that contains it: "),
    ],
)
def test_files_that_are_passed_as_a_folder(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    assert words in refusal(tmp_path / name)
    with pytest.raises(InputError, match=words):
        read_records(dataset_name=str(tmp_path / name))


@pytest.mark.parametrize("names", [("more.zip",), ("a.txz", "b.zip", "c.tgz", "d.zip"), ("a.rar", "b.7z", "c.zip")])
def test_archives_inside_of_a_folder(tmp_path, said, names):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    ours, others = [n for n in names if n[-3:] not in ("rar", ".7z")], [n for n in names if n[-3:] in ("rar", ".7z")]
    lines = [
        f"{len(ours)} archive{'s' * (len(ours) > 1)} in it will not be read. Pass the archive{'s' * (len(ours) > 1)}: "
    ]
    lines[0] += " ".join(f"{tmp_path}/{name}" for name in ours[:3]) + (" ..." if len(ours) > 3 else "")
    if others:
        lines.append(f"2 archives in it can't be read (unpack, or pack again as .zip); the first: {tmp_path}/a.rar")
    assert all(line in refusal(tmp_path) for line in lines)
    for layout in ("metadata", "instance"):
        said.clear()
        (tmp_path / "0.png").write_bytes(picture_bytes("red"))
        if layout == "metadata":
            (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,x\n")
        assert len(read_records(tmp_path, dataset_layout=layout, instance_prompt="x")) == 1
        assert said[: len(lines)] == [f"{tmp_path}: {line}" for line in lines]


def test_the_folder_of_an_unpacked_archive_is_told(tmp_path, said):
    """Messages about its files name that folder."""
    archive, unpacked = tmp_path / "mine.zip", tmp_path / "unpacked"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("10_sks knight/0.png", picture_bytes("red"))
        file.writestr("10_sks knight/0.txt", "a knight")
    read_records(archive, archive_dir=unpacked)
    (folder,) = unpacked.glob("*/mine")
    assert said == [
        f"{archive}: read from {folder}, where it is unpacked",
        f"{folder}/10_sks knight: 1 picture, each 10 times per epoch",
    ]


def test_max_train_samples_are_always_the_same(pictures):
    """The samples are those that diffusers' script draws with seed 0, for any seed of the run."""
    whole = read_records(pictures)
    some = read_records(pictures, max_train_samples=4)
    assert some[:] == whole.shuffle(seed=0).select(range(4))[:]
    assert read_records(pictures, max_train_samples=99)[:] == whole[:]


# Datasets of the `datasets` library, in a folder and on the hub.


@pytest.fixture
def stored(tmp_path):
    """Writes a dataset with an image column in one of the formats of the datasets library, and returns the folder."""
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
    return lambda folder, **options: read_records(
        dataset_name=str(folder), cache_dir=str(tmp_path / "datasets-cache"), **options
    )


KINDS = ["parquet", "disk", "dictionary"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_dataset(stored, load, kind):
    folder = stored(kind, splits=("test", "train"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    dataset = load(folder)
    assert dataset["captions"][:] == [["a red cat"], ["a blue cat"]]
    assert pictures_of(dataset) == [picture_bytes("red"), picture_bytes("blue")]
    assert dataset["concept"][:] == [kind] * 2
    assert dataset["num_repeats"][:] == [1, 1]
    assert [source.endswith(f"row {i}") for i, source in enumerate(dataset["source"])] == [True, True]
    assert load(folder, caption_column="zh_text")["captions"][:] == [["红猫"], ["蓝猫"]]
    assert load(folder, max_train_samples=1)["captions"][:] == [["a red cat"]]
    # The user's dataset is read-only.
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_columns_of_a_stored_dataset(stored, load):
    folder = stored("disk", image="photo", words=[["a", "b"], ["c", None]])
    assert load(folder)["captions"][:] == [["a", "b"], ["c"]]
    # `image` is the default of diffusers' script, so it may be passed although no column has this name.
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


@pytest.mark.parametrize("kind", ["parquet", "disk"])
@pytest.mark.parametrize("empty", ["", " ", None])
def test_a_row_without_a_caption_is_refused_or_left_out(stored, load, kind, empty):
    folder = stored(kind, pictures=("red", "green", "blue"), text=["a", empty, "c"])
    message = refusal_of(load, folder)
    assert message == (
        f"{folder}: row 1: column 'text' is empty. Fill or remove the row, or pass --skip_bad_images to leave such rows out."
    )
    left_out = []
    dataset = load(folder, leave_out=lambda *row: left_out.append(row))
    assert left_out == [(f"{folder}: row 1", "column 'text' is empty")]
    # The remaining rows keep their pictures and numbers.
    assert dataset["captions"][:] == [["a"], ["c"]]
    assert pictures_of(dataset) == [picture_bytes("red"), picture_bytes("blue")]
    assert dataset["source"][:] == [f"{folder}: row 0", f"{folder}: row 2"]


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_bad_rows_of_a_stored_dataset_are_refused_or_left_out_by_the_command(stored, train, tmp_path, capsys, kind):
    """A missing caption is reported before models are loaded, a bad picture when the pictures are examined."""
    folder = stored(kind, pictures=("red", "green", "blue", None), text=["a", "", "c", "d"])
    options = dict(train_data_dir=folder, cache_dir=tmp_path / "datasets-cache")
    message = refusal_of(train, **options)
    assert message.startswith(f"{folder}: row 1: column 'text' is empty. ")
    train(skip_bad_images=True, max_train_steps=1, **options)
    out = capsys.readouterr().out
    assert f"left out: {folder}: row 1: column 'text' is empty\n" in out
    assert f"left out: {folder}: row 3: there is no picture\n" in out
    assert out.count("left out") == 2
    assert "\n2 pictures, 1 step an epoch" in out


@pytest.mark.parametrize("instance_prompt", [None, "sks"])
@pytest.mark.parametrize("count", [1, 2])
def test_thumbnails_beside_parquet_files_are_not_trained_on(stored, tmp_path, instance_prompt, count, said):
    folder = stored("parquet")
    for i in range(count):
        (folder / f"thumbnail{i}.png").write_bytes(picture_bytes("green"))
    dataset = read_records(folder, cache_dir=str(tmp_path / "datasets-cache"), instance_prompt=instance_prompt)
    assert dataset["captions"][:] == [["a red cat"], ["a blue cat"]]
    assert pictures_of(dataset) == [picture_bytes("red"), picture_bytes("blue")]
    assert f"{folder}: training on its parquet or arrow files, not on the pictures beside them" in said


def test_a_stored_dataset_without_train_split(stored, load):
    assert len(load(stored("parquet", splits=("validation",)))) == 2
    with pytest.raises(InputError, match="no split 'train'. Its splits are: a, b"):
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
    message = refusal_of(load, name)
    assert message.startswith(f"{name}: ")


def test_concepts_from_the_labels_of_a_stored_dataset(load, tmp_path):
    import datasets

    cell = {"bytes": picture_bytes("red"), "path": None}
    columns = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cats", "dogs"]),
    }
    rows = {"image": [cell, cell], "text": ["a", "b"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).save_to_disk(tmp_path / "stored")
    dataset = load(tmp_path / "stored", concept_column="label")
    assert dataset["concept"][:] == ["dogs", "cats"]
    assert dataset["captions"][:] == [["a"], ["b"]]


@pytest.mark.parametrize("how", ["numpy", "torch", "arrow", "pandas", "one column"])
@pytest.mark.parametrize("texts", [["a red cat", "a cat"], [["a red cat", "red"], ["a cat"]]])
def test_a_dataset_that_was_saved_with_a_format(load, tmp_path, how, texts):
    """The format changes the values that the library returns, or hides columns."""
    import datasets

    cells = [{"bytes": picture_bytes(colour), "path": None} for colour in ("red", "blue")]
    text = datasets.Value("string")
    columns = {"image": datasets.Image(), "text": datasets.List(text) if isinstance(texts[0], list) else text}
    columns["label"] = datasets.ClassLabel(names=["cats", "dogs"])
    whole = datasets.Dataset.from_dict({"image": cells, "text": texts, "label": [1, 0]}, datasets.Features(columns))
    options = dict(type="numpy", columns=["image"]) if how == "one column" else dict(type=how)
    whole.with_format(**options).save_to_disk(tmp_path / "stored")
    found = load(tmp_path / "stored", concept_column="label")
    assert found["concept"][:] == ["dogs", "cats"]
    assert found["captions"][:] == [text if isinstance(text, list) else [text] for text in texts]
    assert pictures_of(found) == [picture_bytes("red"), picture_bytes("blue")]


def test_masks_of_a_stored_dataset(load, tmp_path):
    import datasets

    red, blue = ({"bytes": picture_bytes(colour), "path": None} for colour in ("red", "blue"))
    columns = {"photo": datasets.Image(), "where": datasets.Image(), "text": datasets.Value("string")}
    rows = {"photo": [red, blue], "where": [blue, None], "text": ["a", "b"]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).save_to_disk(tmp_path / "stored")
    dataset = load(tmp_path / "stored", image_column="photo", mask_column="where")
    assert read_image_bytes(dataset[0]["mask"]) == picture_bytes("blue")
    assert dataset[1]["mask"] is None
    with pytest.raises(InputError, match="'text' holds no pictures \\(--mask_column\\)"):
        load(tmp_path / "stored", mask_column="text")


def save_columns(folder, *names):
    """Saves a dataset whose columns with pictures have these names, each with another colour."""
    import datasets

    colours = ["red", "green", "blue"]
    cells = {name: [{"bytes": picture_bytes(colours[i]), "path": None}] for i, name in enumerate(names)}
    columns = {name: datasets.Image() for name in names} | {"text": datasets.Value("string")}
    datasets.Dataset.from_dict(cells | {"text": ["a"]}, datasets.Features(columns)).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("names", [("mask", "photo"), ("input_image", "edited_image"), ("depth", "source", "target")])
def test_several_columns_with_pictures_are_not_guessed(load, tmp_path, names):
    folder = save_columns(tmp_path / "stored", *names)
    with pytest.raises(InputError, match=f"--image_column, one of: {', '.join(names)}"):
        load(folder)
    assert pictures_of(load(folder, image_column=names[1])) == [picture_bytes("green")]
    assert pictures_of(load(folder, mask_column=names[0], image_column=names[1])) == [picture_bytes("green")]


def test_columns_with_pictures_that_are_not_read_are_named(load, tmp_path, said):
    folder = save_columns(tmp_path / "stored", "conditioning_image", "image", "depth")
    assert pictures_of(load(folder)) == [picture_bytes("green")]
    assert said == [
        f"{folder}: the pictures are read from column 'image', not from conditioning_image, depth (--image_column)"
    ]
    load(folder, image_column="image")
    load(folder, mask_column="depth", image_column="image")
    assert len(said) == 1


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([{"image": [], "text": []}], "BatchSize"),
        ([{"image": [b"x"], "text": ["a"]}, {"image": [b"x"], "caption": ["b"]}], "cast"),
        ([{"image": [b"x"], "text": ["a"]}, {"image": [b"x"], "text": ["b"], "width": [3]}], "cast"),
    ],
)
def test_why_a_stored_dataset_cannot_be_loaded(load, tmp_path, tables, words):
    """The library's own message says only that an error occurred."""
    import pyarrow
    import pyarrow.parquet

    for number, table in enumerate(tables):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"train-{number}.parquet")
    with pytest.raises(InputError, match="can't be loaded") as caught:
        load(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shards_of_webdataset(load, tmp_path):
    """Writes a folder of tar files, in which pictures and captions have equal names."""
    folder = tmp_path / "shards"
    folder.mkdir()
    colours = ["red", "green", "blue", "white"]
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as file:
            for i in range(2):
                for ending, data in (
                    ("png", picture_bytes(colours[2 * shard + i])),
                    ("txt", f"cat {shard}{i}".encode()),
                ):
                    member = tarfile.TarInfo(f"{shard}{i}.{ending}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    dataset = load(folder)
    assert dataset["captions"][:] == [["cat 00"], ["cat 01"], ["cat 10"], ["cat 11"]]
    assert pictures_of(dataset) == [picture_bytes(colour) for colour in colours]


def column_of_bytes(kind, values):
    """A column as other programs than `datasets` write it: no description says that it holds pictures."""
    import pyarrow

    if kind == "bytes":
        return pyarrow.array(values, pyarrow.binary())
    if kind == "large bytes":
        return pyarrow.array(values, pyarrow.large_binary())
    kinds = (
        (pyarrow.large_binary(), pyarrow.large_string()) if "large" in kind else (pyarrow.binary(), pyarrow.string())
    )
    names = ("bytes", "path") if "path" in kind else ("bytes",)
    cells = [value and {name: value if name == "bytes" else "0.png" for name in names} for value in values]
    return pyarrow.array(cells, pyarrow.struct(list(zip(names, kinds))))


@pytest.mark.parametrize("kind", ["bytes", "large bytes", "bytes, path", "large bytes, path", "struct of bytes"])
@pytest.mark.parametrize("name", ["image", "foto"])
def test_parquet_by_pyarrow(load, tmp_path, kind, name):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "set"
    folder.mkdir()
    pixels = [picture_bytes("red"), picture_bytes("blue"), None]
    columns = {name: column_of_bytes(kind, pixels), "text": ["a", "b", "c"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")
    for options in ({}, {"image_column": name}):
        dataset = load(folder, **options)
        assert dataset["captions"][:] == [["a"], ["b"], ["c"]]
        assert pictures_of(dataset.select([0, 1])) == pixels[:2]


def test_parquet_by_pandas(load, tmp_path):
    pandas = pytest.importorskip("pandas")
    (tmp_path / "set").mkdir()
    red, blue = picture_bytes("red"), picture_bytes("blue")
    rows = {"image": [{"bytes": red, "path": "0.png"}, {"bytes": blue, "path": "1.png"}], "mask": [blue, red]}
    rows |= {"text": ["a", "b"], "zh_text": ["红", "蓝"]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "set" / "0.parquet")
    dataset = load(tmp_path / "set", mask_column="mask")
    assert pictures_of(dataset) == [red, blue]
    assert [read_image_bytes(row["mask"]) for row in dataset] == [blue, red]


def test_parquet_of_bytes_that_name_files_elsewhere(load, tmp_path):
    """A path without bytes is checked as in a dataset that declares its pictures."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(picture_bytes("green"))
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    cells = pyarrow.array([{"bytes": None, "path": str(tmp_path / "secret.png")}], kind)
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "text": ["a"]}), folder / "0.parquet")
    with pytest.raises(InputError, match="names a file outside of the dataset"):
        load(folder)


def test_a_parquet_file_of_names(load, tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "0.png").write_bytes(picture_bytes("red"))
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["0.png"], "text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no column with pictures.*save it as metadata.parquet"):
        load(tmp_path)


def test_the_caption_column_of_several_in_a_stored_dataset(stored, load, said):
    folder = stored("parquet")
    load(folder)
    assert said == [f"{folder}: the captions are read from column 'en_text', not from zh_text (--caption_column)"]
    load(folder, caption_column="zh_text")
    assert len(said) == 1


def test_why_every_row_of_a_stored_dataset_fails(stored, load):
    folder = stored("disk", text=["", " "])
    with pytest.raises(InputError) as caught:
        load(folder, leave_out=lambda *row: None)
    assert str(caught.value) == (
        f"{folder}: it has no usable row. The first of 2 that are left out: row 0: column 'text' is empty."
    )


# Paths with characters that patterns are made of.


@pytest.mark.parametrize("name", ["a[1]", "[x]", "a*b", "a?b", "[!a]", "**"])
@pytest.mark.parametrize("kind", ["parquet", "disk", "arrow", "tar", "csv"])
def test_paths_with_characters_of_patterns(stored, load, tmp_path, name, kind, naming):
    """Beside each are folders that the name would match as a pattern."""
    for other in dict.fromkeys((name, "a1", "aXb", "x", "a*b", "q")):
        place = tmp_path / "in" / other
        if kind == "csv":
            write_pictures(place, count=2, captions=[other])
            continue
        if kind == "tar":
            place.mkdir(parents=True, exist_ok=True)
            with tarfile.open(place / "0.tar", "w") as file:
                for ending, data in (("png", picture_bytes("red")), ("txt", other.encode())):
                    member = tarfile.TarInfo(f"0.{ending}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
            continue
        source = naming("arrow", named()) if kind == "arrow" else stored(kind, text=[other, other])
        place.parent.mkdir(exist_ok=True)
        source.rename(place)
    dataset = load(tmp_path / "in" / name)
    assert {*sum(dataset["captions"], [])} == {"number 0" if kind == "arrow" else name}
    assert len(dataset) == (1 if kind in ("arrow", "tar") else 2)


# A stored dataset may come from anywhere, so files that its cells name are opened only inside the dataset.


@pytest.fixture
def naming(tmp_path):
    """Writes a stored dataset whose cells are bytes or paths, which the library itself would embed, and returns the folder."""
    import datasets
    import pyarrow.parquet

    def store(kind, cells, column="image"):
        inside = [{"bytes": picture_bytes("red"), "path": None}] * len(cells)
        rows = {"image": inside, "mask": inside} | {column: cells}
        columns = {"image": datasets.Image(), "mask": datasets.Image(), "text": datasets.Value("string")}
        rows["text"] = [f"number {i}" for i in range(len(cells))]
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).data.table
        folder = tmp_path / "stored"
        folder.mkdir(exist_ok=True)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, folder / "train.parquet", row_group_size=2)
        else:
            with pyarrow.ipc.new_stream(folder / "train.arrow", table.schema) as file:
                file.write_table(table, max_chunksize=2)
        return folder

    datasets.disable_progress_bars()
    yield store
    datasets.enable_progress_bars()


def named(*paths):
    return [{"bytes": picture_bytes("blue"), "path": "not read.png"}, *({"bytes": None, "path": p} for p in paths)]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["image", "mask"])
def test_a_stored_dataset_reads_no_file_elsewhere(naming, load, tmp_path, kind, column):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture_bytes("green"))
    folder = naming(kind, [*named(), None, *named()] + named(str(secret)), column)
    message = refusal_of(load, folder, mask_column="mask", leave_out=None)
    assert message == (
        f"{folder}: row 4: column '{column}' names a file outside of the dataset ('{secret}'). Fill or remove the row, or "
        "pass --skip_bad_images to leave such rows out."
    )
    left_out = []
    dataset = load(folder, mask_column="mask", leave_out=lambda *row: left_out.append(row))
    assert left_out == [(f"{folder}: row 4", f"column '{column}' names a file outside of the dataset ('{secret}')")]
    assert dataset["captions"][:] == [[f"number {i}"] for i in range(4)]
    assert [cell and read_image_bytes(cell) for cell in dataset[column]] == [
        cell and cell["bytes"] for cell in [*named(), None, *named(), *named()]
    ]


def test_what_the_cells_of_a_stored_dataset_may_name(naming, load, tmp_path, monkeypatch):
    """Only regular files in the dataset's folder or in the library's caches, however the path is written."""
    import datasets
    from huggingface_hub import constants

    folder, work = naming("parquet", named()), tmp_path / "work"
    for place in (folder / "sub", work, tmp_path / "stored too", tmp_path / "hub", tmp_path / "prepared"):
        place.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    inside, hub, prepared, own_cache = (
        tmp_path / name for name in ("stored/sub/0.png", "hub/0.png", "prepared/0.png", "datasets-cache/0.png")
    )
    own_cache.parent.mkdir(exist_ok=True)
    for path in (inside, hub, prepared, own_cache, tmp_path / "secret.png", tmp_path / "stored too" / "0.png"):
        path.write_bytes(picture_bytes("green"))
    links = {"link": inside, "out": tmp_path / "secret.png", ".up": tmp_path, "to hub": hub}
    for name, target in {**links, "round": folder / "round"}.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "fifo")
    monkeypatch.chdir(work)
    good = [inside, "../stored/sub/0.png", folder / "sub" / ".." / "link", hub, prepared, own_cache, folder / "to hub"]
    outside = [
        "/etc/passwd", "/dev/zero", "/proc/self/environ", "../secret.png", "sub/0.png", "~/0.png", "file:///etc/passwd",
        folder / "out", folder / ".up" / "secret.png", folder / ".." / "secret.png", tmp_path / "stored too" / "0.png",
        tmp_path / "not there.png", "two\nlines", "",
    ]  # fmt: skip
    no_file = [folder, folder / "sub", folder / "fifo", folder / "round", f"{folder}/a\0b", folder / ("x" * 300)]
    naming("parquet", named(*map(str, [*good, *outside, *no_file])))
    left_out = []
    dataset = load(folder, leave_out=lambda *row: left_out.append(row))
    first = 1 + len(good)
    expected = [f"column 'image' names a file outside of the dataset ({str(path)!r})" for path in outside]
    expected += [f"column 'image' names something that is not a file ({str(path)!r})" for path in no_file]
    assert left_out == [(f"{folder}: row {i}", reason) for i, reason in enumerate(expected, start=first)]
    assert dataset["captions"][:] == [[f"number {i}"] for i in range(first)]
    assert pictures_of(dataset) == [picture_bytes("blue")] + [picture_bytes("green")] * len(good)
    # A missing file that may be named is reported together with unreadable pictures.
    naming("parquet", named(str(folder / "gone.png")))
    assert len(load(folder)) == 2


# The bundled sets.


@pytest.mark.parametrize(
    ("name", "concepts"),
    [
        ("weapons", {"axe": 44, "spear": 44, "trident": 44, "whip": 44}),
        ("weapons/axe", {"axe": 44}),
        ("weapons_test", {"weapons_test": 24}),
        ("creatures", {"creatures": 40}),
    ],
)
def test_bundled_sets(name, concepts):
    dataset = read_records(ROOT / "metadata" / name)
    held = dataset["concept"][:]
    assert {concept: held.count(concept) for concept in held} == concepts
    assert len({image_id(read_image_bytes(row["image"])) for row in dataset}) == len(dataset)
    assert all(len(captions) == 1 and len(captions[0]) > 10 for captions in dataset["captions"])


@pytest.mark.long
def test_bundled_sets_are_what_the_script_draws(tmp_path):
    subprocess.run([sys.executable, "-m", "scripts.mini_sd.draw", "--output_dir", tmp_path], cwd=ROOT, check=True)
    drawn, bundled = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path, ROOT / "metadata")
    )
    del bundled[Path("README.md")]
    assert drawn.keys() == bundled.keys()
    assert [path for path in drawn if drawn[path] != bundled[path]] == []

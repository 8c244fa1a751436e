"""Folders made for other tools: equal pictures give equal records, however their captions are stored."""

import json
import shutil
import tarfile
import unicodedata
import zipfile

import pytest
from conftest import read_records
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures.layouts import LAYOUTS
from text_to_image_lora.pictures.records import image_id, read_image_bytes


CAPTIONS = {"axe": ["a red axe", "a blue axe, old"], "spear": ["écru spear 绿", 'a "long" spear']}


@pytest.fixture
def load(tmp_path, said):
    def load(*folders, **options):
        return read_records([*folders], archive_dir=tmp_path / "archives", **options)

    return load


def save_picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade, 0, 90)).save(path)


def write(text, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def build(folder, layout):
    """Writes the four pictures of `CAPTIONS` in the layout of a tool."""
    rows = [(kind, i, caption) for kind, group in CAPTIONS.items() for i, caption in enumerate(group)]
    for shade, (kind, i, caption) in enumerate(rows):
        name = f"{kind}_{i}.png"
        if layout in ("csv", "jsonl"):
            save_picture(folder / name, shade)
        elif layout == "nested jsonl":
            save_picture(folder / kind / name, shade)
            with open(folder / kind / "metadata.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"file_name": name, "text": caption}) + "\n")
        elif layout in ("kohya .txt", "kohya .caption"):
            save_picture(folder / f"1_{kind}" / name, shade)
            write(caption + "\n", (folder / f"1_{kind}" / name).with_suffix(layout.split()[1]))
        elif layout == "beside":
            save_picture(folder / name, shade)
            write(caption, (folder / name).with_suffix(".txt"))
        elif layout == "nested beside":
            save_picture(folder / kind / name, shade)
            write(caption, (folder / kind / name).with_suffix(".txt"))
    if layout == "csv":
        quoted = ['"{}"'.format(caption.replace('"', '""')) for _, _, caption in rows]
        lines = [f"{kind}_{i}.png,{text}\n" for (kind, i, _), text in zip(rows, quoted, strict=True)]
        write("file_name,text\n" + "".join(lines), folder / "metadata.csv")
    if layout == "jsonl":
        lines = [json.dumps({"file_name": f"{kind}_{i}.png", "text": text}) + "\n" for kind, i, text in rows]
        write("".join(lines), folder / "metadata.jsonl")
    return folder


BUILT = ["csv", "jsonl", "nested jsonl", "kohya .txt", "kohya .caption", "beside", "nested beside"]


def content_of(dataset):
    return [(image_id(read_image_bytes(row["image"])), row["captions"], row["num_repeats"]) for row in dataset]


@pytest.fixture
def expected(tmp_path, load):
    found = content_of(load(build(tmp_path / "expected", "jsonl")))
    assert [captions for _, captions, _ in found] == [[caption] for group in CAPTIONS.values() for caption in group]
    return found


def pack(folder, ending):
    """Packs the folder into an archive like a file manager, with the folder itself or only with its content."""
    archive = folder.parent / (folder.name + ending)
    if ending == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder))
            file.writestr("__MACOSX/._axe_0.png", b"no picture")
            file.writestr(".DS_Store", b"no picture")
    else:
        with tarfile.open(archive, "w:gz" if ending.endswith("gz") else "w") as file:
            file.add(folder, folder.name)
    shutil.rmtree(folder)
    return archive


@pytest.mark.parametrize("layout", BUILT)
@pytest.mark.parametrize("ending", ["", ".zip", ".tar", ".tar.gz"])
def test_the_same_records_in_every_layout(tmp_path, load, expected, layout, ending):
    folder = build(tmp_path / "set", layout)
    dataset = load(pack(folder, ending) if ending else folder)
    assert content_of(dataset) == expected
    if layout in ("nested jsonl", "kohya .txt", "kohya .caption", "nested beside"):
        assert dataset["concept"][:] == ["axe", "axe", "spear", "spear"]
    else:
        assert set(dataset["concept"]) == {"set"}


def test_several_sources(tmp_path, load, expected):
    folder, archive = build(tmp_path / "one", "kohya .txt"), pack(build(tmp_path / "two", "csv"), ".zip")
    assert content_of(load(folder, archive)) == expected + expected


def test_repeats_of_the_parent_and_of_the_inner_folder(tmp_path, load, said):
    for name, count in (("10_red axe", 2), ("3_spear", 1)):
        for i in range(count):
            save_picture(tmp_path / "set" / name / f"{i}.jpg", i)
            write(f"{name} {i}", tmp_path / "set" / name / f"{i}.txt")
    dataset = load(tmp_path / "set")
    assert dataset["num_repeats"][:] == [10, 10, 3]
    assert dataset["concept"][:] == ["red axe", "red axe", "spear"]
    assert said == [
        f"{tmp_path}/set/10_red axe: 2 pictures, each 10 times per epoch",
        f"{tmp_path}/set/3_spear: 1 picture, each 3 times per epoch",
    ]
    inner = load(tmp_path / "set" / "10_red axe")
    assert inner["num_repeats"][:] == [10, 10]
    assert inner["captions"][:] == dataset["captions"][:2]


def test_kohya_pictures_without_a_caption_file_take_their_folders_name(tmp_path, load, said):
    for name in ("a", "b"):
        save_picture(tmp_path / "2_sks_dog" / f"{name}.png", 0)
    write("a dog on a sofa", tmp_path / "2_sks_dog" / "a.txt")
    assert load(tmp_path)["captions"][:] == [["a dog on a sofa"], ["sks dog"]]
    assert f"{tmp_path}: pictures without a caption file, captioned with their folder's name: 1" in said


@pytest.mark.parametrize(
    ("name", "caption"),
    [("[sks]_[golden retriever]", "sks golden retriever"), ("sks_golden_retriever", "sks golden retriever")],
)
def test_trigger_and_class_from_the_folders_name(tmp_path, load, said, name, caption):
    save_picture(tmp_path / "set" / name / "0.png", 0)
    save_picture(tmp_path / "set" / "wvy_cat" / "0.png", 1)
    dataset = load(tmp_path / "set")
    assert dataset["captions"][:] == [[caption], ["wvy cat"]]
    assert dataset["concept"][:] == ["sks", "wvy"]
    assert said[0] == f"{tmp_path}/set: the caption '{caption}' is used for 1 picture (--caption_template)"
    template = "a painting of {trigger}, a {class}"
    assert load(tmp_path / "set", caption_template=template)["captions"][:] == [
        ["a painting of sks, a golden retriever"],
        ["a painting of wvy, a cat"],
    ]


def test_a_single_folder_below_is_a_trigger_and_a_class(tmp_path, load, said):
    for i in range(2):
        save_picture(tmp_path / "set" / "myAnimeStyleToken_anime_face" / f"{i}.png", i)
    dataset = load(tmp_path / "set")
    assert dataset["captions"][:] == [["myAnimeStyleToken anime face"]] * 2
    assert dataset["concept"][:] == ["myAnimeStyleToken"] * 2
    caption = "the caption 'myAnimeStyleToken anime face' is used for 2 pictures (--caption_template)"
    assert said == [f"{tmp_path}/set: {caption}"]


def test_a_folder_of_pictures_is_not_taken_for_a_trigger(tmp_path, load):
    save_picture(tmp_path / "my_pictures" / "0.png", 0)
    with pytest.raises(
        InputError, match="have no captions.*--instance_prompt.*--dataset_layout trigger_class"
    ) as caught:
        load(tmp_path / "my_pictures")
    assert "\n" not in str(caught.value)
    # This is also so if a folder inside has such a name, or if another folder has none.
    save_picture(tmp_path / "my_pictures" / "sks_dog" / "0.png", 1)
    with pytest.raises(InputError, match="have no captions"):
        load(tmp_path / "my_pictures")
    shutil.rmtree(tmp_path / "my_pictures" / "sks_dog")
    save_picture(tmp_path / "set" / "sks_dog" / "0.png", 0)
    save_picture(tmp_path / "set" / "others" / "0.png", 1)
    with pytest.raises(InputError, match="have no captions.*--dataset_layout trigger_class"):
        load(tmp_path / "set")
    chosen = load(tmp_path / "my_pictures", dataset_layout="trigger_class")
    assert chosen["captions"][:] == [["my pictures"]]
    assert load(tmp_path / "my_pictures", instance_prompt="sks")["captions"][:] == [["sks"]]


def test_a_layout_that_is_asked_for(tmp_path, load, said):
    """Metadata files take precedence over caption files; `--dataset_layout` can reverse this."""
    folder = build(tmp_path / "set", "beside")
    write("file_name,text\naxe_0.png,from the table\n", folder / "metadata.csv")
    assert load(folder)["captions"][:] == [["from the table"]]
    assert "3 pictures have no row in a metadata file and will not be trained on" in said[0]
    assert load(folder, dataset_layout="caption_files")["captions"][0] == ["a red axe"]
    for layout in set(LAYOUTS) - {"metadata", "caption_files", "kohya"}:
        options = {"instance_prompt": "sks"} if layout == "instance" else {}
        if layout == "trigger_class":
            with pytest.raises(InputError, match=r"name the folder \[trigger\]_\[class\]"):
                load(folder, dataset_layout=layout, **options)
        else:
            assert load(folder, dataset_layout=layout, **options)["captions"][:] == [["sks"]] * 4
    with pytest.raises(InputError, match="requires --instance_prompt"):
        load(folder, dataset_layout="instance")


def test_several_lines_are_several_captions(tmp_path, load):
    save_picture(tmp_path / "0.png", 0)
    write("\ufeffa cat\r\n\r\n my cat \n", tmp_path / "0.txt")
    assert load(tmp_path)["captions"][:] == [["a cat", "my cat"]]
    (tmp_path / "0.txt").write_bytes("ein Käter".encode("utf-16"))
    assert load(tmp_path)["captions"][:] == [["ein Käter"]]


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_breaks_separate_captions(tmp_path, load, letter):
    save_picture(tmp_path / "0.png", 0)
    write(f"a cat{letter}on a mat\ra dog", tmp_path / "0.txt")
    assert load(tmp_path)["captions"][:] == [[f"a cat{letter}on a mat", "a dog"]]


@pytest.mark.parametrize("ending", [".txt", ".caption"])
@pytest.mark.parametrize("name", ["v1.5-a", "v1.5/a", "a..b", "a.png"])
def test_names_with_dots_have_their_own_caption_files(tmp_path, load, name, ending):
    for i, stem in enumerate((name, "v1", "a")):
        save_picture(tmp_path / f"{stem}.png", i)
        write(f"of {stem}", tmp_path / f"{stem}{ending}")
    captions = {row["image"]["path"]: row["captions"] for row in load(tmp_path)}
    assert captions == {f"{tmp_path}/{stem}.png": [f"of {stem}"] for stem in (name, "v1", "a")}


def test_caption_files_that_are_missing_or_empty(tmp_path, load):
    for i in range(3):
        save_picture(tmp_path / f"{i}.png", i)
    write("a cat", tmp_path / "0.txt")
    write(" \n", tmp_path / "1.txt")
    with pytest.raises(
        InputError, match=r"1\.png: its caption file 1\.txt is empty\. Write one, or pass --skip_bad_images"
    ):
        load(tmp_path)
    left_out = []
    assert load(tmp_path, leave_out=lambda *row: left_out.append(row))["captions"][:] == [["a cat"]]
    assert left_out == [
        (f"{tmp_path}/1.png", "its caption file 1.txt is empty"),
        (f"{tmp_path}/2.png", "there is no 2.txt beside it"),
    ]
    (tmp_path / "1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"1\.txt: it can't be read .*Save it again as UTF-8"):
        load(tmp_path)


def test_hidden_files_are_no_pictures(tmp_path, load):
    folder = build(tmp_path / "set", "beside")
    for name in (".hidden.png", "._axe_0.png", "__MACOSX/axe_0.png", ".ipynb_checkpoints/axe_0.png", "Thumbs.db"):
        write("no picture", folder / name)
    assert len(load(folder)) == 4


def test_pictures_and_rows_that_do_not_meet(tmp_path, load, said):
    for i in range(3):
        save_picture(tmp_path / f"{i}.png", i)
    write("file_name,text\n0.png,a cat\n0.png,my cat\n", tmp_path / "metadata.csv")
    assert load(tmp_path)["captions"][:] == [["a cat"], ["my cat"]]
    assert said == [
        f"{tmp_path}: 2 pictures have no row in a metadata file and will not be trained on; the first: {tmp_path}/1.png",
        f"{tmp_path}: 1 rows name a picture that another row names too; each row is used",
    ]


@pytest.mark.parametrize(("on_disk", "in_row"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_spelt_the_other_way(tmp_path, load, on_disk, in_row):
    save_picture(tmp_path / unicodedata.normalize(on_disk, "épée.png"), 0)
    write(f"file_name,text\n{unicodedata.normalize(in_row, 'épée.png')},a sword\n", tmp_path / "metadata.csv")
    assert load(tmp_path)["captions"][:] == [["a sword"]]


def test_a_misspelt_name_is_reported_with_the_nearest_name(tmp_path, load):
    save_picture(tmp_path / "axe.PNG", 0)
    write("file_name,text\naxe.png,an axe\n", tmp_path / "metadata.csv")
    with pytest.raises(InputError, match=r"'axe\.png' does not exist \(there is 'axe\.PNG'\)"):
        load(tmp_path)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_with_other_delimiters(tmp_path, load, delimiter):
    save_picture(tmp_path / "0.png", 0)
    write(f"file_name{delimiter}text\n0.png{delimiter}a cat, old\n", tmp_path / "metadata.csv")
    assert load(tmp_path)["captions"][:] == [["a cat, old"]]


def test_a_metadata_file_in_utf_16(tmp_path, load):
    save_picture(tmp_path / "0.png", 0)
    (tmp_path / "metadata.csv").write_bytes("file_name,text\n0.png,ein Käter\n".encode("utf-16"))
    assert load(tmp_path)["captions"][:] == [["ein Käter"]]


def test_a_link_out_of_the_folder(tmp_path, load):
    save_picture(tmp_path / "secret.png", 0)
    folder = build(tmp_path / "set", "beside")
    (folder / "b.png").symlink_to(tmp_path / "secret.png")
    write("mine", folder / "b.txt")
    with pytest.raises(InputError, match=r"b\.png: it is a link out of the dataset folder"):
        load(folder, leave_out=print)


@pytest.mark.parametrize("layout", ["beside", "jsonl"])
def test_a_mask_that_is_a_link_out_of_the_folder(tmp_path, load, layout):
    save_picture(tmp_path / "secret.png", 0)
    folder = build(tmp_path / "set", layout)
    save_picture(folder / "hidden" / "0.mask.png", 0)
    (folder / "axe_0.mask.png").symlink_to(folder / "hidden" / "0.mask.png")
    assert load(folder)[0]["mask"]["path"] == f"{folder}/axe_0.mask.png"
    (folder / "axe_1.mask.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=r"axe_1\.mask\.png: it is a link out of the dataset folder\. Copy the file"):
        load(folder, leave_out=print)


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Train", "Test")])
def test_the_train_part_of_a_folder_with_splits(tmp_path, load, said, train, test):
    build(tmp_path / "set" / train, "csv")
    build(tmp_path / "set" / test, "csv")
    assert len(load(tmp_path / "set")) == 4
    assert said == [f"{tmp_path}/set: training on its subfolder {train}, not on {test}"]


def test_all_that_is_left_out_beside_the_train_part_is_named(tmp_path, load, said):
    for name in ("train", "test", "plane", "car"):
        build(tmp_path / "set" / name, "csv")
    assert len(load(tmp_path / "set")) == 4
    assert said[0] == f"{tmp_path}/set: training on its subfolder train, not on test, car, plane"


@pytest.mark.parametrize("how", ["twice", "by a link", "inside", "above"])
def test_folders_that_share_pictures_are_told(tmp_path, load, said, how):
    folder = tmp_path / "set" / "axes"
    build(folder, "csv")
    (tmp_path / "link").symlink_to(folder)
    other = {"twice": folder, "by a link": tmp_path / "link", "inside": folder.parent, "above": folder}[how]
    folders = (folder.parent, folder) if how == "above" else (folder, other)
    assert len(load(*folders)) == 8
    (line,) = [line for line in said if "trained twice as often" in line]
    where = "is given twice" if how in ("twice", "by a link") else f"lies in {folder.parent}"
    assert line.startswith(f"{tmp_path / 'link' if how == 'by a link' else folder} {where}, ")


def test_column_flags_without_a_table(tmp_path, load):
    folder = build(tmp_path / "set", "beside")
    for options, wrong in ((dict(image_column="photo"), "'photo'"), (dict(caption_column="words"), "'words'")):
        with pytest.raises(InputError, match=f"no metadata file, so no column {wrong}"):
            load(folder, **options)


@pytest.mark.parametrize(("name", "reason"), [("0_dog", "0 repeats"), ("2024_summer", "its name says 2024 repeats")])
def test_a_number_that_is_no_number_of_repeats(tmp_path, load, name, reason):
    save_picture(tmp_path / name / "0.png", 0)
    with pytest.raises(InputError, match=reason):
        load(tmp_path)


def test_concepts_from_a_column(tmp_path, load):
    for i in range(2):
        save_picture(tmp_path / f"{i}.png", i)
    write("file_name,text,kind\n0.png,a cat,cats\n1.png,a dog,dogs\n", tmp_path / "metadata.csv")
    assert load(tmp_path, concept_column="kind")["concept"][:] == ["cats", "dogs"]
    with pytest.raises(InputError, match=r"no column 'knid' \(--concept_column\)"):
        load(tmp_path, concept_column="knid")


def test_a_link_to_a_folder_is_not_passed_over(tmp_path, load):
    build(tmp_path / "elsewhere", "beside")
    build(tmp_path / "set", "beside")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="more: it is a link to a folder"):
        load(tmp_path / "set")


@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.CSV"])
def test_of_a_table_above_folders_like_splits_every_row_counts(tmp_path, load, said, name):
    folder = tmp_path / "set"
    for shade, part in enumerate(("train", "test", "validation")):
        save_picture(folder / part / "0.png", shade)
        write(f"beside, in {part}", folder / part / "0.txt")
    write("file_name,text\n" + "".join(f"{part}/0.png,a {part}\n" for part in ("train", "test")), folder / name)
    assert load(folder)["captions"][:] == [["a train"], ["a test"]]
    assert said == [
        f"{folder}: 1 picture has no row in a metadata file and will not be trained on; the first: "
        f"{folder}/validation/0.png"
    ]
    # Without the table, the folders are splits.
    said.clear()
    (folder / name).unlink()
    assert load(folder)["captions"][:] == [["beside, in train"]]
    assert said == [f"{folder}: training on its subfolder train, not on test, validation"]

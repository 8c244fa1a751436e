"""dataset.html of --dry_run: what it contains, and that captions that are saved from it make an equal dataset."""

import json
import re
import shutil

import datasets
import pytest
from conftest import ROOT, read_records, write_pictures
from PIL import Image

from text_to_image_lora.pictures import caption_tables, settings
from text_to_image_lora.pictures.layouts import ReadOptions
from text_to_image_lora.reports import dataset_page


def content(page):
    """Returns the data in a page."""
    return json.loads(re.search(r'id="content">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])


def tables_of(*folders, captions=None, archives="archives", **flags):
    data = settings.DataSettings(train_data_dir=tuple(map(str, folders)), **flags)
    options = ReadOptions(data, settings.CaptionSettings(**(captions or {})), archive_dir=archives)
    return caption_tables.caption_tables(options)


def save(tables, folder):
    """Saves the tables as the page's notes say."""
    for table in tables:
        if table.replaced is not None:
            (table.folder / table.replaced).unlink()
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table.rows]
        (table.folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def seen(folder, **flags):
    """Returns what a run reads from a folder, whatever the order."""
    records = read_records(folder, **flags)
    columns = ("image", "mask", "captions", "concept", "num_repeats")
    rows = zip(*(records[name][:] for name in columns), strict=True)
    return sorted((i["path"], m and m["path"], c, concept, n) for i, m, c, concept, n in rows)


def with_txt(folder, count=5, **options):
    write_pictures(folder, count=count, **options)
    (folder / "metadata.jsonl").unlink()
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"picture {number}\n" + "its second caption\n" * (number == 3))
    return folder


def table(ending):
    """Returns a maker of a dataset with one metadata file with more columns than captions, and a mask."""

    def make(folder):
        write_pictures(folder, count=3)
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        (folder / "metadata.jsonl").unlink()
        rows = [
            row | {"text": f'a caption, with {n} "quotes"', "score": n + 0.5, "num_repeats": n + 1}
            for n, row in enumerate(rows)
        ]
        Image.new("L", (40, 32), 255).save(folder / "1.mask.png")
        if ending == "jsonl":
            rows[2]["text"] = ["one caption", "another \u2028 caption"]
            (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
        else:
            getattr(datasets.Dataset.from_list(rows), f"to_{ending}")(str(folder / f"metadata.{ending}"))
        return {}

    return make


def caption_files(folder):
    with_txt(folder / "a", seed=1)
    with_txt(folder / "b" / "c", count=3, seed=2)
    Image.new("L", (40, 32), 255).save(folder / "a" / "2.mask.png")
    return {}


def kohyas(folder):
    with_txt(folder / "3_red axe", seed=1)
    with_txt(folder / "10_blue axe", count=2, seed=2)
    (folder / "10_blue axe" / "1.txt").unlink()
    return {}


def trigger_class(folder):
    for seed, name in enumerate(["[sks]_[dog]", "[zwx]_[cat]"]):
        write_pictures(folder / name, count=3, seed=seed)
        (folder / name / "metadata.jsonl").unlink()
    return {}


def one_caption(folder):
    write_pictures(folder / "below", count=3)
    (folder / "below" / "metadata.jsonl").unlink()
    return {"captions": {"instance_prompt": "a photo of sks"}}


def nested_tables(folder):
    for seed, name in enumerate(["axe", "spear"]):
        write_pictures(folder / name, count=3, seed=seed)
    return {}


MAKERS = [
    table("jsonl"),
    table("csv"),
    table("parquet"),
    caption_files,
    kohyas,
    trigger_class,
    one_caption,
    nested_tables,
]
NAMES = ["jsonl", "csv", "parquet", "caption_files", "kohya", "trigger_class", "instance", "nested"]


def flags_of(make, folder):
    """Makes a dataset in a folder, and returns the flags about captions that it needs."""
    folder.mkdir()
    return make(folder).get("captions", {})


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_captions_saved_without_an_edit_make_an_equal_dataset(tmp_path, make):
    folder, flags = tmp_path / "set", flags_of(make, tmp_path / "set")
    before, tables = seen(folder, **flags), tables_of(folder, captions=flags)
    save(tables, folder)
    concepts = {"concept_column": "concept"} if any(each.concepts for each in tables) else {}
    after = seen(folder, **concepts)
    if make in (one_caption,):  # a single concept, which is named by the folder of the table now
        before, after = ([row[:3] + row[4:] for row in rows] for rows in (before, after))
    assert after == before
    assert len(before) > 2


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_captions_are_those_of_the_files(tmp_path, make):
    """Neither the trigger word nor the pictures that a run leaves out get lost, or are saved twice."""
    folder, plain = tmp_path / "set", flags_of(make, tmp_path / "set")
    words = plain | {"trigger_word": "sks", "caption_prefix": "painting: ", "caption_suffix": ", oil"}
    assert tables_of(folder, captions=words, max_train_samples=1) == tables_of(folder, captions=plain)


def test_archives_and_stored_datasets_have_no_tables(tmp_path):
    folder = with_txt(tmp_path / "set")
    shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    tables = tables_of(folder, tmp_path / "packed.zip", archives=tmp_path / "archives")
    assert [each.folder for each in tables] == [folder]
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.glob("*.png"))]
    rows = datasets.Dataset.from_dict({"image": cells, "text": ["a caption"] * 5})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "stored" / "a.parquet")
    assert tables_of(tmp_path / "stored") == []


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3), ("7", 7), (2.0, 2), (None, 1), ("", 1), (0, None), (1.5, None), ("many", None), (True, None), (1001, None)]
)  # fmt: skip
def test_repeats_in_a_table(tmp_path, value, expected):
    folder = write_pictures(tmp_path / "set", count=2)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row | {"num_repeats": value}) for row in rows))
    left_out = []
    if expected is None:
        with pytest.raises(Exception, match=re.escape(f"column 'num_repeats' holds {value!r}")):
            read_records(folder)
        return
    assert read_records(folder, leave_out=lambda *row: left_out.append(row))["num_repeats"][:] == [expected] * 2
    assert left_out == []


# The page.

EVIL = "an axe</script><script>alert(1)</script><!--"


@pytest.fixture
def page_of(train, tmp_path):
    def write(folder, **flags):
        train(train_data_dir=folder, dry_run=True, **flags)
        page = tmp_path / "out" / dataset_page.FILE
        return page.read_text(encoding="utf-8"), content(page)

    return write


def test_the_page_has_all_pictures_with_captions_crops_and_findings(page_of, tmp_path):
    folder = write_pictures(tmp_path / "set", count=7, size=(48, 32), captions=[EVIL, *(f"axe {n}" for n in range(6))])
    shutil.copy(folder / "2.png", folder / "copy.png")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "copy.png", "text": "axe 4"}) + "\n")
        file.write(json.dumps({"file_name": "gone.png", "text": "axe 5"}) + "\n")
    text, data = page_of(folder, resolution=32, skip_bad_images=True, trigger_word="axe", validation_split=0.3)
    assert "alert(1)</script>" not in text
    assert "gone.png" in text
    items = {item["name"]: item for item in data["items"]}
    assert sorted(items) == [*(f"{n}.png" for n in range(7)), "copy.png"]
    assert items["0.png"]["captions"] == [EVIL]
    assert all(
        item["kept"] == [0.667, 1.0] and item["size"] == "48x32" and item["trained"] == "32x32"
        for item in items.values()
    )
    assert all(item["picture"].startswith("data:image/webp;base64,") for item in items.values())
    twice = {
        name
        for name, item in items.items()
        if ["equal", "like copy.png"] in item["found"] or ["equal", "like 2.png"] in item["found"]
    }
    held = {name for name, item in items.items() if item.get("held")}
    assert twice == {"2.png", "copy.png"} - held
    assert 1 <= len(held) <= 4
    assert {kind["key"] for kind in data["kinds"]} == {key for item in items.values() for key, _ in item["found"]}
    [table] = data["tables"]
    assert (table["file"], table["column"], len(table["rows"])) == ("metadata.jsonl", "text", 9)
    assert sorted(item["row"] for item in items.values()) == [*range(8)]


def test_the_captions_of_several_folders_are_saved_apart(page_of):
    _, data = page_of(ROOT / "metadata" / "weapons", max_train_samples=9)
    assert len(data["items"]) == 9
    assert sorted(table["file"] for table in data["tables"]) == [
        f"metadata-{name}.jsonl" for name in ("axe", "spear", "trident", "whip")
    ]
    assert all(table["note"].startswith("Save it as metadata.jsonl in the folder ") for table in data["tables"])
    for item in data["items"]:
        table = data["tables"][item["table"]]
        assert table["rows"][item["row"]] == {"file_name": item["name"], "text": item["captions"][0]}


def test_of_many_pictures_some_are_drawn_and_all_captions_are_there(page_of, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_page, "MOST_SHOWN", 5)
    folder = write_pictures(tmp_path / "set", count=11)
    for number in range(11):
        Image.effect_noise((40, 32), 50 + 10 * number).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "10.png")
    text, data = page_of(folder)
    drawn = [item["name"] for item in data["items"] if item["picture"] is not None]
    assert len(data["items"]) == 11
    assert 3 <= len(drawn) <= 5
    assert {"0.png", "10.png"} <= {*drawn}
    assert "5 of the 11 pictures are shown" in text
    monkeypatch.setattr(dataset_page, "MOST_ROWS", 10)
    text, data = page_of(folder)
    assert data["tables"] == []
    assert "edit them in their files" in text


def test_captions_that_are_too_long_are_marked(page_of, tmp_path):
    folder = write_pictures(tmp_path / "set", count=3, captions=["short", "axe " * 100, "short too"])
    _, data = page_of(folder)
    assert [[key for key, _ in item["found"] if key == "tokens"] for item in data["items"]] == [[], ["tokens"], []]


def test_a_page_without_tables_can_only_be_read(page_of, tmp_path):
    folder = with_txt(tmp_path / "set")
    text, data = page_of(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))
    assert "can't be edited here" in text
    assert len(data["items"]) == 5
    assert all("row" not in item for item in data["items"])


def test_the_report_of_the_run_links_to_it(train):
    out = train(dry_run=True)
    assert (out / "dataset.html").is_file()
    train()
    assert '<a href="dataset.html">' in (out / "report.html").read_text()

"""Planted faults are found, and nothing else is: on the bundled drawings, and on pictures made for one measure."""

import json

import numpy as np
import pytest
from conftest import ROOT, make_picture_set
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from text_to_image_lora.pictures import findings, inspection
from text_to_image_lora.pictures.alike import alike_pictures, equal_pictures
from text_to_image_lora.pictures.looks import find_bars, look_at, measure_detail


WEAPONS = ROOT / "metadata" / "weapons"
SIDE = 128  # of the drawings, in pixels


def drawings(first, count):
    """Returns bundled drawings, as (picture, caption)."""
    rows = [
        (table.parent / row["file_name"], row["text"])
        for table in sorted(WEAPONS.glob("*/metadata.jsonl"))
        for row in map(json.loads, table.read_text().splitlines())
    ]
    return [(Image.open(path).convert("RGB"), text) for path, text in rows[first : first + count]]


def save(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, _) in enumerate(rows):
        image.save(folder / f"{number:03d}.png")
    lines = [json.dumps({"file_name": f"{n:03d}.png", "text": text}) for n, (_, text) in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def find(folder, **options):
    pictures = make_picture_set(folder, resolution=SIDE, **options)
    return findings.find_all(pictures), pictures


def blurred(image, part=80):
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / part))


def enlarged(image, times=3):
    small = image.resize((image.width // times, image.height // times), Image.Resampling.LANCZOS)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def with_bars(image, part=0.08, colour="black", upright=False):
    image, (width, height) = image.copy(), image.size
    draw = ImageDraw.Draw(image)
    if upright:
        draw.rectangle((0, 0, int(width * part) - 1, height), fill=colour)
        draw.rectangle((width - int(width * part), 0, width, height), fill=colour)
    else:
        draw.rectangle((0, 0, width, int(height * part) - 1), fill=colour)
        draw.rectangle((0, height - int(height * part), width, height), fill=colour)
    return image


def marked(image, text="(c) Studio"):
    over = Image.new("RGBA", image.size)
    place = (image.width * 0.5, image.height * 0.85)
    ImageDraw.Draw(over).text(place, text, (255, 255, 255, 170), ImageFont.load_default(image.height / 11))
    return Image.alpha_composite(image.convert("RGBA"), over).convert("RGB")


@pytest.mark.parametrize("first", [0, 40, 80])
def test_nothing_is_found_on_the_bundled_drawings(tmp_path, first):
    found, _ = find(save(tmp_path / "set", drawings(first, 96)))
    assert [row for row in found if row.kind != "repeated"] == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_faults_are_found_and_nothing_else(tmp_path, seed):
    """Two blurred ones, three with bars, two with a mark, four doubles among 96 drawings."""
    rows = drawings(80, 96)
    places = np.random.default_rng(seed).permutation(range(0, 96, 2))[:11].tolist()
    pictures = [image for image, _ in rows]
    planted = {("soft", places[0]): blurred(pictures[places[0]]), ("soft", places[1]): enlarged(pictures[places[1]])}
    bars = (dict(part=0.06), dict(part=0.1, colour="white"), dict(part=0.14, colour="navy", upright=True))
    planted |= {("bars", i): with_bars(pictures[i], **how) for i, how in zip(places[2:5], bars, strict=True)}
    planted |= {("mark", i): marked(pictures[i]) for i in places[5:7]}
    doubles = (
        Image.Image.copy,
        lambda image: image.resize((200, 200)),
        lambda image: image.filter(ImageFilter.GaussianBlur(0.3)),
        lambda image: Image.eval(image, lambda value: int(value * 0.97)),
    )
    others = {i: change(pictures[i + 1]) for i, change in zip(places[7:], doubles, strict=True)}
    for i, image in ({i: image for (_, i), image in planted.items()} | others).items():
        rows[i] = image, rows[i][1]
    found, whole = find(save(tmp_path / "set", rows))
    assert {(row.kind, row.index) for row in found if row.kind != "repeated"} == planted.keys()
    twice = [*equal_pictures(whole.facts), *alike_pictures(whole.facts)]
    assert sorted(map(tuple, twice)) == sorted((i, i + 1) for i in places[7:])


def shapes(side):
    """Returns a greyscale picture of overlapping ellipses with sharp edges."""
    rng, image = np.random.default_rng(side), Image.new("L", (side, side), 128)
    for _ in range(60):
        left, top, *size = rng.integers(0, side, 4) // (1, 1, 3, 3)
        ImageDraw.Draw(image).ellipse((left, top, left + size[0] + 4, top + size[1] + 4), int(rng.integers(0, 256)))
    return image


@pytest.mark.parametrize("side", [64, 128, 512])
@pytest.mark.parametrize(("change", "least", "most"), [(enlarged, 0.12, 0.5), (lambda i: enlarged(i, 4), 0.12, 0.5), (lambda i: blurred(i, 40), 0.12, 0.5)])  # fmt: skip
def test_how_much_detail_a_picture_has(side, change, least, most):
    """A background that is out of focus does not count."""
    sharp = shapes(side)
    partly = Image.new("L", (side, side), 128)
    partly.paste(sharp.crop((0, 0, side // 2, side // 2)), (side // 4, side // 4))
    for image in (sharp, partly):
        assert measure_detail(image, (side, side)) > 0.5
        assert least <= measure_detail(change(image), (side, side)) <= most


@pytest.mark.parametrize(
    ("size", "trained", "expected"),
    [((512, 512), (128, 128), 1.0), ((128, 96), (512, 384), 1 / 3), ((300, 100), (64, 64), 1.0)],
)
def test_detail_is_that_of_the_training_size(size, trained, expected):
    assert measure_detail(shapes(max(size)).crop((0, 0, *size)), trained) == expected


@pytest.mark.parametrize("colour", ["red", "white", "#010101"])
def test_a_picture_of_one_colour_has_neither_bars_nor_too_little_detail(colour):
    image = Image.new("RGB", (90, 60), colour)
    look = look_at(image, (64, 64))
    assert (look.detail, look.bars) == (1.0, (0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("part", "colour", "upright", "expected"),
    [
        (0.1, "black", False, (0, 0.1, 0, 0.1)),
        (0.25, "#ffffff", True, (0.25, 0, 0.25, 0)),
        (0.02, "black", False, (0, 0, 0, 0)),
    ],
)
def test_the_width_of_bars(part, colour, upright, expected):
    rng = np.random.default_rng(5)
    image = Image.fromarray(rng.integers(60, 200, (200, 200, 3), dtype=np.uint8))
    assert find_bars(np.asarray(with_bars(image, part, colour, upright), np.int16)) == pytest.approx(
        expected, abs=0.01
    )


def test_a_plain_background_is_no_bar():
    image = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(image).rectangle((60, 60, 140, 140), fill="black")
    assert not any(find_bars(np.asarray(image, np.int16)))


@pytest.mark.parametrize(("brightness", "is_dark"), [(0.05, True), (0.2, True), (0.6, False), (1, False)])
def test_pictures_with_hardly_any_light(tmp_path, brightness, is_dark):
    rng = np.random.default_rng(6)
    noise = rng.integers(0, 256, (SIDE, SIDE, 3)) * brightness
    found, _ = find(save(tmp_path / "set", [(Image.fromarray(noise.astype(np.uint8)), "noise")]))
    assert [row.kind for row in found if row.kind == "dark"] == ["dark"] * is_dark


def test_what_is_unlike_the_others(tmp_path):
    rows = drawings(0, 30)
    rows[7] = Image.new("RGB", (40, 128), "#ffff00"), "a strip"
    rows[20] = Image.effect_noise((128, 128), 90).convert("RGB"), "noise without colour"
    found, pictures = find(save(tmp_path / "set", rows))
    assert ("aspect", 7) in {(row.kind, row.index) for row in found}
    assert [row.index for row in found if row.kind == "aspect"] == [7]
    assert {row.index for row in found if row.kind == "colours"} <= {7, 20}
    assert ("cut", 7) in {(row.kind, row.index) for row in found}  # for the square
    strip = pictures.select([7])
    strip.sizes = [(64, 192)]
    assert "cut" not in {row.kind for row in findings.find_in_pictures(strip)}


# Captions.


def captions_of(texts, tmp_path):
    pictures = make_picture_set(
        save(tmp_path / "set", [(Image.effect_noise((16, 16), 60).convert("RGB"), "x")] * len(texts))
    )
    pictures.captions = [text if isinstance(text, list) else [text] for text in texts]
    pictures.facts = [fact._replace(image_id=str(i)) for i, fact in enumerate(pictures.facts)]
    return [(row.kind, row.index) for row in findings.find_in_captions(pictures)]


PLAIN = [f"sks dog {place}" for place in ["on a sofa", "by the sea", "in snow", "at night", "asleep", "with a ball", "seen from above", "in a car", "on grass", "near a tree", "in a bath", "at a door", "under a table", "running"]]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({3: "a dog at night"}, [("word", 3)]),
        ({3: ["sks dog at night", "a dog"]}, [("word", 3)]),
        ({1: "sks dog on grass", 2: "SKS dog  on grass"}, [("repeated", 1), ("repeated", 2), ("repeated", 8)]),
        ({5: "sks dog 一只狗在沙发上玩球"}, [("letters", 5)]),
        ({5: "sks dog: écru, naïve, Ærø"}, []),
        ({4: "IMG_2031.jpg"}, [("word", 4), ("name", 4)]),
        ({4: "DSC00031"}, [("word", 4), ("name", 4)]),
        ({4: "d41d8cd98f00b204e980"}, [("word", 4), ("name", 4)]),
        ({4: "004"}, [("word", 4), ("name", 4)]),
        ({4: "sks dog number 4"}, []),
    ],
)
def test_captions(tmp_path, changes, expected):
    texts = [changes.get(i, text) for i, text in enumerate(PLAIN)]
    assert captions_of(texts, tmp_path) == expected


def test_captions_that_are_meant_to_be_equal_or_in_other_letters(tmp_path):
    assert captions_of(["a photo of sks dog"] * 14, tmp_path) == []
    assert captions_of([f"一只狗 {letter}" for letter in "甲乙丙丁戊己庚辛壬癸子丑"], tmp_path / "b") == []


def test_the_dry_run_tells_them(train, tmp_path, capsys):
    rows = drawings(0, 16)
    rows[3] = with_bars(rows[3][0]), rows[3][1]
    rows[5] = rows[5][0], "IMG_0005"
    train(train_data_dir=save(tmp_path / "set", rows), dry_run=True, resolution=64)
    said = capsys.readouterr().out
    assert f"bars or a frame at the edges: 1 picture. {findings.KINDS['bars'].remedy}" in said
    assert "'003.png': top 8%, bottom 8%" in said
    stored = json.loads((tmp_path / "out" / "dataset.json").read_text())["findings"]
    assert stored.keys() >= {"bars", "name"}
    assert stored["name"]["pictures"][0]["measure"] == "'IMG_0005'"
    assert [row["source"].endswith("'003.png'") for row in stored["bars"]["pictures"]] == [True]


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(7, 3, [0, 3, 6]), (6, 6, [*range(6)]), (9, 4, [0, 3, 6]), (0, 5, [])]
)
def test_of_a_large_set_an_even_part_is_measured(tmp_path, monkeypatch, count, most, expected):
    assert findings.evenly_chosen(range(count), most) == expected
    monkeypatch.setattr(findings, "MOST_MEASURED", most)
    if count > most:
        pictures = make_picture_set(save(tmp_path / "set", drawings(0, count)), resolution=SIDE)
        assert inspection.format_findings({}, pictures)[1].endswith(
            f"({len(expected)} of {count} pictures were measured)"
        )

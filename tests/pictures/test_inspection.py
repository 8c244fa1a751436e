"""--dry_run and --preview_data report what a dataset contains, its problems, and what the model will see."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_picture_set, run_command, write_pictures
from PIL import Image
from safetensors.torch import save_file

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures.inspection import CAPTION_WIDTH, LISTED, describe, format_report, preview_sheet
from text_to_image_lora.reports import dry_run


@pytest.fixture
def motley(tmp_path):
    """Six pictures: one twice, one twice in different sizes and formats, one broken, one with too long a caption."""
    folder = write_pictures(tmp_path / "motley", count=6)
    shutil.copy(folder / "0.png", folder / "copy.png")
    Image.open(folder / "1.png").resize((80, 64)).convert("RGB").save(folder / "again.jpg", quality=85)
    (folder / "broken.png").write_bytes((folder / "2.png").read_bytes()[:60])
    rows = [{"file_name": name, "text": "a green axe"} for name in ("copy.png", "again.jpg", "broken.png")]
    rows += [{"file_name": "gone.png", "text": "a green axe"}, {"file_name": "3.png", "text": "axe " * 100}]
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_dry_run_tells_what_is_wrong_and_leaves_no_model(train, motley, capsys, tmp_path):
    with pytest.raises(InputError, match=r"gone\.png' does not exist \(2 bad pictures or rows in total\)"):
        train(train_data_dir=motley, dry_run=True)
    report = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert report["pictures"] == 9
    assert [row["reason"] for row in report["left_out"]][0] == "'gone.png' does not exist"
    assert "it can't be decoded" in report["left_out"][1]["reason"]
    assert len(report["equal"]) == 2  # 0.png and its copy; 3.png, which has two rows
    assert [["0.png" in a, "copy.png" in b] for a, b in report["equal"][:1]] == [[True, True]]
    assert [["1.png" in a, "again.jpg" in b] for a, b in report["alike"]] == [[True, True]]
    assert len(report["tokens"]["cut"]) == 1
    assert report["tokens"]["most"] > 100
    assert report["samples_an_epoch"] == 9
    assert report["steps_an_epoch"] == 5
    out = capsys.readouterr().out
    assert "left out because they can't be used: 2\n" in out
    assert "groups of pictures that look alike: 1\n" in out
    assert "captions truncated at the limit: 1\n" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset.html", "dataset.json"]
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_of_a_good_dataset(train, capsys, tmp_path):
    train(dry_run=True, random_flip=True, aspect_ratio_buckets=True)
    out = capsys.readouterr().out
    assert "6 pictures, 6 captions (6 different)" in out
    assert "\ntraining: 2 steps (0.67 epochs)" in out
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["left_out"] == []


def test_a_dry_run_counts_the_pictures_at_each_resolution(train, capsys, tmp_path):
    """Pictures are named once: two sizes of one are no copies of each other, and have their captions once."""
    folder = write_pictures(tmp_path / "sizes", count=3, size=(60, 50))
    for name, size in (("1", (40, 45)), ("2", (20, 30))):
        picture = Image.open(folder / f"{name}.png")
        picture.resize(size).save(folder / f"{name}.png")
    train(train_data_dir=folder, dry_run=True, resolution=[48, 32, 40])
    report = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (report["pictures"], report["captions"], report["different_captions"]) == (3, 3, 3)
    assert (report["samples_an_epoch"], report["steps_an_epoch"]) == (6, 4)
    assert {size: row["pictures"] for size, row in report["sizes"].items()} == {"32x32": 3, "40x40": 2, "48x48": 1}
    assert report["concepts"] == {"sizes": {"pictures": 3, "samples_an_epoch": 6}}
    assert (report["equal"], report["alike"]) == ([], [])
    assert [line.rpartition(": ")[2] for line in report["enlarged"]] == ["20x30"]
    assert {side: [line.rpartition(": ")[2] for line in lines] for side, lines in report["too_small"].items()} == {
        "40": ["20x30"], "48": ["40x45", "20x30"],
    }  # fmt: skip
    soft = report["findings"]["soft"]["pictures"]
    assert len(soft) == len({row["source"] for row in soft})
    out = capsys.readouterr().out
    assert "pictures smaller than their training size: 1\n" in out
    assert "pictures too small for --resolution 48, which are not trained at it: 2\n" in out
    assert "tokens per caption: " in out
    train(train_data_dir=folder, dry_run=True, resolution=48)
    assert "too_small" not in json.loads((tmp_path / "out" / "dataset.json").read_text())


def test_a_resolution_for_which_every_picture_is_too_small_is_refused(train, tmp_path):
    """Also if class pictures, which the base model draws, would be large enough."""
    folder = write_pictures(tmp_path / "small", count=3, size=(60, 39))
    options = dict(train_data_dir=folder, num_class_images=2, class_prompt="an axe")
    with pytest.raises(InputError, match="^--resolution 40: none of the 3 pictures is large enough for it, so that "):
        train(resolution=[32, 40], dry_run=True, **options)
    train(resolution=[32, 24], dry_run=True, **options)


@pytest.mark.parametrize("resolution", [32, [24, 32]])
def test_the_estimate_of_the_cache_is_what_it_takes(train, tmp_path, resolution):
    options = dict(random_flip=True, center_crop=True, resolution=resolution)
    train(dry_run=True, **options)
    expected = json.loads((tmp_path / "out" / "dataset.json").read_text())["cache_bytes"]
    train(**options)
    taken = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert expected <= taken < 1.02 * expected


def test_a_dry_run_by_the_command(arguments, tmp_path):
    """The exit code is 0 and stderr is empty; the UNet is not loaded."""
    base = tmp_path / "base"
    words = list(map(str, arguments()))
    place = words.index("--pretrained_model_name_or_path") + 1
    shutil.copytree(words[place], base)
    save_file({"none of its weights": torch.zeros(1)}, base / "unet" / "diffusion_pytorch_model.safetensors")
    words[place] = str(base)
    done = run_command([*words, "--dry_run"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "6 pictures, 6 captions" in done.stdout
    assert "loading" not in done.stdout
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    done = run_command([*words, "--dry_run"])
    assert done.returncode == 2
    assert "it is damaged or incomplete" in done.stderr


def test_the_preview_shows_the_variations_that_are_trained_on(train, pictures, tmp_path):
    sheet_file = tmp_path / "sheet.png"
    train(dry_run=True, preview_data=sheet_file, random_flip=True, random_hue=0.1, cache_variations=3)
    with Image.open(sheet_file) as image:
        sheet = image.convert("RGB")
    # The tiles end at the margins, 34 pixels from the edges.
    left, top = sheet.width - 34 - 2 * 200 + 8, sheet.height - 34 - 6 * 200 + 8
    expected = make_picture_set(pictures, random_flip=True, random_hue=0.1)
    rows = []
    for index in range(6):
        tile = Image.fromarray(expected.pixels(index, 1)).resize((192, 192), Image.Resampling.LANCZOS)
        rows += [
            row
            for row in range(6)
            if (
                np.asarray(sheet.crop((left, top + 200 * row, left + 192, top + 192 + 200 * row))) == np.asarray(tile)
            ).all()
        ]
    assert sorted(rows) == list(range(6))


def test_the_report_is_shown_before_the_memory_is_estimated(train, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(dry_run, "_memory", lambda *_: (seen.append(capsys.readouterr().out), (None, []))[1])
    train(dry_run=True)
    (before,) = seen
    assert "6 pictures, 6 captions" in before
    assert "\ntraining: 2 steps" in before
    assert before + "\n" not in capsys.readouterr().out


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_preview_makes_its_folder(train, tmp_path, capsys, dry_run):
    sheet_file = tmp_path / "to" / "be" / "made" / "sheet.jpg"
    train(dry_run=dry_run, preview_data=sheet_file)
    assert f"what the model will see: {sheet_file}\n" in capsys.readouterr().out
    with Image.open(sheet_file) as sheet:
        assert sheet.format == "JPEG"
        assert sheet.height > 6 * 192
        assert sheet.width > 4 * 192


def test_a_preview_that_is_a_folder_is_refused(train, tmp_path):
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(InputError, match="--preview_data"):
        train(preview_data=tmp_path / "sheet.png")


def test_a_dry_run_refuses_the_captions_that_training_refuses(train, tmp_path):
    folder = write_pictures(tmp_path / "book", count=2, captions=["a cat", "axe " * 751])
    with pytest.raises(InputError, match="11 chunks"):
        train(train_data_dir=folder, long_prompts=True, dry_run=True)


def test_the_report_on_a_set(pictures, tmp_path):
    """Counts what a set contains, also without a tokenizer; the terminal shows the first few of each finding."""
    sizes = [(64, 64)] + [(32, 32)] * 5
    both = make_picture_set(pictures, sizes=sizes, captions=[["a cat", "my cat"]] * 2 + [["a dog"]] * 4)
    left_out = [(f"{i}.png", "the file is empty") for i in range(LISTED + 2)]
    sampler = SimpleNamespace(samples=np.array([0, 0, 1, 2, 3, 4, 5]), steps_per_epoch=4)
    report = describe(
        both, left_out, sampler, num_validated=3, token_counts=None, token_limit=None, cache_bytes=3 * 2**20
    )
    assert report["tokens"] is None
    assert (report["pictures"], report["validated"], report["captions"], report["different_captions"]) == (6, 3, 8, 3)
    assert report["sizes"] == {
        "32x32": {"pictures": 5, "samples_an_epoch": 5},
        "64x64": {"pictures": 1, "samples_an_epoch": 2},
    }
    assert report["concepts"] == {"pictures": {"pictures": 6, "samples_an_epoch": 7}}
    assert [line.rpartition(": ")[2] for line in report["enlarged"]] == ["40x32"]
    lines = format_report(report)
    assert lines[0] == "6 pictures, 8 captions (3 different); 3 more for validation"
    assert lines[1] == "7 samples and 4 steps per epoch; the cache takes about 3.0 MiB"
    assert f"left out because they can't be used: {LISTED + 2}" in lines
    assert "  ... and 2 more; the JSON file lists all" in lines
    assert not any("tokens" in line for line in lines)


def test_the_preview_shows_each_variation_whole_and_the_caption_beside_it(pictures):
    """Wide and tall pictures keep their shape, and a caption without spaces stays within its width."""
    sizes = [(64, 32), (32, 64)] * 3
    captions = [["x" * 200]] + [["an axe"]] * 5
    found = make_picture_set(pictures, sizes=sizes, captions=captions)
    plain, sheet = (preview_sheet(each, [0, 1], 2) for each in (make_picture_set(pictures, sizes=sizes), found))
    assert plain.height == sheet.height
    white = np.all(np.asarray(sheet) == 255, axis=-1)
    left = sheet.width - (2 * 200 - 8) - 34  # of the first tile; 34 is the margin
    assert white[: sheet.height // 2, left : left + 192].all(axis=1).sum() > 90  # above and below a wide picture
    assert white[sheet.height // 2 :, left : left + 192].all(axis=0).sum() > 90  # beside a tall one
    assert CAPTION_WIDTH >= left - 2 * 34 > CAPTION_WIDTH - 40

"""The real mask.py with tiny CLIPSeg models: what it writes, what it keeps, that training uses it, and that a kill loses nothing."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import mask_models
import numpy as np
import pytest
import torch
from conftest import ROOT, make_picture_set, quick_python, read_metrics, read_records
from loopback_hub import serving, taken_for_the_hub
from mask_models import FOUND, NOT_FOUND, SIDE
from PIL import Image
from test_caption import WithSizes

from scripts import mask
from scripts.annotating import batches
from scripts.masking import segmenter
from scripts.masking.find import check_model
from scripts.masking.shaping import WORKING_SIDE, Shaping, grown
from scripts.masking.sheet import HIDDEN
from text_to_image_lora.errors import InputError, Stopped
from text_to_image_lora.pictures.inside import read_bytes
from text_to_image_lora.pictures.masks import open_mask
from text_to_image_lora.training import interruption


OWN = "__masks"
HARD = dict(expand=0, feather=0)  # exactly what is found


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return mask_models.make_clipseg(tmp_path_factory.mktemp("masking") / "clipseg")


def place_of(i):
    """Where picture i of `write_squares` has its red square, as a box of quarters of its sides."""
    return (i % 3, (2 * i + 1) % 4)


def write_squares(folder, count=5, size=(128, 128)):
    """Writes white pictures with a red quarter of the sides at a place of its own, and a blue one below or above it."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size[0] // 4, size[1] // 4
    for i in range(count):
        image = Image.new("RGB", size, "white")
        left, top = place_of(i)
        image.paste("blue", (left * width, (top + 2) % 4 * height, (left + 1) * width, ((top + 2) % 4 + 1) * height))
        image.paste("red", (left * width, top * height, (left + 1) * width, (top + 1) * height))
        image.save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def pictures(tmp_path):
    return write_squares(tmp_path / "pictures")


def words_of(folder, model, prompt="red", **flags):
    words = [str(folder), "--model", str(model), "--device", "cpu", "--num_cpu_threads", "1"]
    words += ["--prompt", *([prompt] if isinstance(prompt, str) else prompt)]
    for name, value in flags.items():
        given = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, given)]
    return words


@pytest.fixture
def run(model):
    """Returns a function that runs the command's `main` here, by default with the model that knows red and blue."""

    def run(folder, *, model=model, **flags):
        try:
            mask.main(words_of(folder, model, **flags))
        finally:
            interruption.stop_listening()  # signal handlers belong to the process

    return run


def masks_of(folder):
    found = [path for path in sorted(folder.rglob("*.mask.png")) if OWN not in path.parts]
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in found}


def bytes_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and OWN not in path.parts}


def square(i, size=(128, 128), value=255):
    """Returns the mask of the red square of picture i."""
    expected = np.zeros(size[::-1], dtype=np.uint8)
    width, height = size[0] // 4, size[1] // 4
    left, top = place_of(i)
    expected[top * height : (top + 1) * height, left * width : (left + 1) * width] = value
    return expected


# The model.


def segmenter_of(folder, **prompts):
    return segmenter.Segmenter(check_model(str(folder), folder, os.listdir(folder)), prompts, "cpu", torch.float32)


def test_it_finds_what_transformers_finds(tmp_path, pictures):
    """The documented call of a refined model with random weights; batches change nothing, and each prompt counts."""
    from transformers import CLIPSegForImageSegmentation

    folder = mask_models.make_random(tmp_path / "random")
    ours = segmenter_of(folder, a=["red", "a blue cat"], b=["house"])
    images = [Image.open(pictures / f"{i:02d}.png").resize((90, 50)) for i in range(3)]
    found = ours.probabilities(images)
    theirs = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    for image, own in zip(images, found, strict=True):
        inputs = ours.processor(
            text=["red", "a blue cat", "house"], images=[image] * 3, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            expected = theirs(**inputs).logits.sigmoid().numpy()
        assert own["a"].shape == (2, SIDE, SIDE)
        assert own["a"].dtype == np.float32
        assert np.abs(np.concatenate([own["a"], own["b"]]) - expected).max() < 1e-5
        assert np.abs(np.diff(expected, axis=0)).max() > 0.01  # the prompt matters
        (alone,) = ours.probabilities([image])
        assert np.abs(alone["a"] - own["a"]).max() < 1e-5
    assert np.abs(found[0]["a"] - found[1]["a"]).max() > 0.01  # the picture matters


def test_half_precision_is_for_the_model(run, pictures, monkeypatch):
    seen, ask = set(), segmenter.Segmenter._ask
    monkeypatch.setattr(
        segmenter.Segmenter, "_ask", lambda self, pixels, embedding: seen.update((pixels.dtype, embedding.dtype)) or ask(self, pixels, embedding)
    )  # fmt: skip
    run(pictures, mixed_precision="bf16", **HARD)
    assert seen == {torch.bfloat16}
    assert all((found == square(i)).all() for i, found in enumerate(masks_of(pictures).values()))


def test_a_prompt_that_the_model_can_not_read_completely_is_refused(run, pictures):
    before = bytes_of(pictures)
    with pytest.raises(
        InputError, match=r"--exclude 'red red .*it has 22 tokens, and the model reads 16. Shorten it."
    ):
        run(pictures, exclude=["blue", "red " * 20])
    assert bytes_of(pictures) == before


# From probabilities to masks.


def one_square(box, size=SIDE, value=FOUND):
    found = np.full((1, size, size), 0.01, dtype=np.float32)
    found[0, box[1] : box[3], box[0] : box[2]] = value
    return found


NONE = np.zeros((0, SIDE, SIDE), dtype=np.float32)


def test_expand_and_feather_are_percent_of_the_shorter_side():
    """The middle of the soft edge is the edge of what was found and grown, on a picture of another shape than the model's."""
    found = one_square((16, 16, 48, 48))
    size = (400, 200)
    hard = np.asarray(Shaping(0.3, 0, 0, False).shape(found, NONE, size).mask).astype(int)
    assert {*np.unique(hard)} == {0, 255}
    (rows,), (columns,) = (np.nonzero(hard.any(axis=axis)) for axis in (1, 0))
    assert abs(rows[0] - 50) <= 2
    assert abs(rows[-1] - 149) <= 2
    assert abs(columns[0] - 100) <= 4
    assert abs(columns[-1] - 299) <= 4
    wide = np.asarray(Shaping(0.3, 5, 0, False).shape(found, NONE, size).mask).astype(int)
    (more_rows,), (more_columns,) = (np.nonzero(wide.any(axis=axis)) for axis in (1, 0))
    assert (rows[0] - more_rows[0], more_rows[-1] - rows[-1]) == (10, 10)
    assert (columns[0] - more_columns[0], more_columns[-1] - columns[-1]) == (10, 10)
    soft = np.asarray(Shaping(0.3, 5, 10, False).shape(found, NONE, size).mask).astype(int)
    profile = soft[100, :200]
    edge = more_columns[0]
    assert (np.diff(profile) >= 0).all()
    assert abs(profile[edge - 1] + profile[edge] - 255) <= 4
    assert (profile[: edge - 14] == 0).all()
    assert (profile[edge + 14 :] == 255).all()
    assert 3 < profile[edge - 9] < 40 < 215 < profile[edge + 9] < 252
    assert soft[100, 200] == 255
    assert (soft.max(), soft.min()) == (255, 0)


def test_what_was_found_counts_fully_by_default():
    """The growth makes room for the soft edge."""
    args = mask.build_parser().parse(["FOLDER", "--prompt", "a"])
    shaping = Shaping(args.threshold, args.expand, args.feather, args.invert)
    found = one_square((16, 16, 48, 48))
    hard = np.asarray(shaping._replace(expand=0, feather=0).shape(found, NONE, (640, 480)).mask)
    soft = np.asarray(shaping.shape(found, NONE, (640, 480)).mask)
    assert soft[hard == 255].min() >= 250
    assert soft.mean() > hard.mean()


@pytest.mark.parametrize("size", [(3, 300), (300, 2), (1, 1), (2500, 1700), (1025, 1023)])
def test_a_mask_has_the_size_of_its_picture(size):
    shaped = Shaping(0.3, 2, 2, False).shape(one_square((0, 0, 32, 64)), NONE, size)
    assert (shaped.mask.mode, shaped.mask.size) == ("L", size)
    if min(size) > WORKING_SIDE:
        values = np.asarray(shaped.mask)
        assert (values[:, : size[0] // 2] >= 250).all()
        assert (values[:, size[0] * 6 // 10 :] == 0).all()


def test_thresholds_prompts_and_exclusions_are_combined():
    """Of several prompts, any counts; what is excluded is cut out of what was grown, and does not grow itself."""
    left, right = one_square((0, 0, 32, 64), value=0.5), one_square((32, 0, 64, 64), value=0.29)
    both = np.concatenate([left, right])
    size = (SIDE, SIDE)

    def shape(wanted, excluded=NONE, threshold=0.3, expand=0.0, invert=False):
        made = Shaping(threshold, expand, 0, invert).shape(wanted, excluded, size).mask
        return None if made is None else np.asarray(made)[0]

    assert (shape(both) == [255] * 32 + [0] * 32).all()
    assert (shape(both, threshold=0.2) == 255).all()
    assert (shape(both, threshold=0.2, excluded=one_square((8, 0, 16, 64))) == [255] * 8 + [0] * 8 + [255] * 48).all()
    cut = shape(both, excluded=one_square((32, 0, 40, 64)), expand=20.0)  # 12.8 pixels, to 45
    assert (cut == [255] * 32 + [0] * 8 + [255] * 5 + [0] * 19).all()
    assert (shape(both, invert=True) == [0] * 32 + [255] * 32).all()


def test_nothing_found_or_nothing_left_makes_no_mask():
    size, found = (SIDE, SIDE), one_square((0, 0, 32, 64), value=0.4321)
    nothing = Shaping(0.5, 2, 2, False).shape(found, NONE, size)
    assert nothing == (None, "nothing was found (probability 0.43 at most, --threshold 0.5)")
    assert Shaping(0.5, 2, 2, True).shape(found, NONE, size) == nothing  # inverted, it would be white everywhere
    everything = np.ones((1, SIDE, SIDE), dtype=np.float32)
    assert "the whole picture was found" in Shaping(0.5, 2, 2, True).shape(everything, NONE, size).reason
    assert "all that was found is excluded" in Shaping(0.4, 0, 2, False).shape(found, found, size).reason


def test_what_is_found_grows_in_every_direction():
    found = np.zeros((9, 12), dtype=bool)
    found[4, 5] = found[0, 11] = True
    expected = np.zeros((9, 12), dtype=bool)
    expected[2:7, 3:8] = expected[:3, 9:] = True
    assert (grown(found, 2) == expected).all()
    assert (grown(found, 0) == found).all()


# What is written.


def test_masks_are_beside_their_pictures(run, pictures, capsys):
    write_squares(pictures / "sub", 2)
    run(pictures, **HARD)
    found = masks_of(pictures)
    assert [*found] == [*(f"{i:02d}.mask.png" for i in range(5)), "sub/00.mask.png", "sub/01.mask.png"]
    for name, values in found.items():
        assert (values == square(int(name[-11:-9]))).all()
    said = capsys.readouterr().out
    assert "wrote 7 masks beside the pictures; a training run reads them without a flag\n" in said
    assert [path.name for path in (pictures / OWN).iterdir()] == ["masks.png"]


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ({}, ("red",)),
        ({"prompt": ["blue"]}, ("blue",)),
        ({"prompt": ["red", "blue"]}, ("red", "blue")),
        ({"prompt": ["blue", "red"], "exclude": ["cat", "red"]}, ("blue",)),
        ({"invert": True}, ("blue", "white")),
    ],
)
def test_prompts_say_what_counts(run, pictures, flags, counts):
    run(pictures, **HARD, **flags)
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    for i in range(5):
        pixels, found = (np.asarray(Image.open(pictures / f"{i:02d}{end}")) for end in (".png", ".mask.png"))
        for name, colour in colours.items():
            assert {*found[(pixels == colour).all(axis=2)].tolist()} == {255 if name in counts else 0}


@pytest.mark.parametrize("orientation", [3, 6, 8, 5])
def test_a_picture_is_masked_as_training_sees_it(run, tmp_path, orientation):
    """Upright by its EXIF data; a mask says nothing of the orientation."""
    folder = write_squares(tmp_path / "turned", 2, size=(128, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"), exif=exif, quality=95, subsampling=0)
        path.unlink()
    (folder / "metadata.jsonl").write_text("".join(f'{{"file_name": "0{i}.jpg", "text": "a"}}\n' for i in range(2)))
    run(folder, **HARD)
    records = read_records(folder)
    pictures = make_picture_set(records, sizes=[(64, 128) if orientation > 4 else (128, 64)] * 2, center_crop=True)
    for i in range(2):
        assert Image.open(folder / f"0{i}.mask.png").getexif() == {}
        pixels, weights = pictures.pixels(i, 0).astype(int), pictures.mask(i, 0, 4)
        is_red = (pixels[..., 0] - pixels[..., 1] > 128).reshape(len(pixels) // 4, 4, -1, 4).mean(axis=(1, 3))
        assert 0.05 < is_red.mean() < 0.08
        assert np.abs(weights - is_red).max() < 0.3
        assert np.abs(weights - is_red).mean() < 0.01


def test_transparent_pictures_and_other_formats_are_masked(run, tmp_path):
    folder = write_squares(tmp_path / "formats", 4)
    with Image.open(folder / "00.png") as image:
        image.save(folder / "webp.webp", lossless=True)
        image.putalpha(Image.new("L", image.size, 200))
        image.save(folder / "00.png")
        image.convert("RGB").quantize(8).save(folder / "palette.gif")
    run(folder, **HARD)
    assert len(masks_of(folder)) == 6
    assert all((masks_of(folder)[f"{name}.mask.png"] == square(0)).all() for name in ("00", "webp", "palette"))


def test_a_trained_run_uses_the_masks(run, train, tmp_path):
    """Without a flag; what it learns differs from a run without masks, and from one with other masks."""
    folder = write_squares(tmp_path / "trained", 4)
    (folder / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "0{i}.png", "text": "a {i}"}}\n' for i in range(4))
    )

    def losses(name):
        out = train(train_data_dir=folder, center_crop=True, output_dir=tmp_path / name, dry_run=False)
        return [row["train_loss"] for row in read_metrics(out)]

    plain = losses("plain")
    run(folder, **HARD)
    masked = losses("masked")
    run(folder, prompt="blue", overwrite=True, **HARD)
    others = losses("others")
    for a, b in ((plain, masked), (plain, others), (masked, others)):
        assert a != pytest.approx(b, rel=1e-4)
    pictures = make_picture_set(read_records(folder), center_crop=True, resolution=128)
    assert pictures.has_mask == [True] * 4
    for i in range(4):
        blue = square(i)[4::8, 4::8] / 255
        assert (pictures.mask(i, 0, 8) == np.roll(blue, 8, axis=0)).all()


# What is kept.


def test_masks_of_a_person_stay_byte_for_byte(run, pictures, capsys):
    own = Image.new("L", (128, 128), 255)
    own.save(pictures / "00.mask.png", compress_level=0)
    own.save(pictures / "01-masklabel.png")
    before = bytes_of(pictures)
    run(pictures, **HARD)
    after = bytes_of(pictures)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {"02.mask.png", "03.mask.png", "04.mask.png"}
    said = capsys.readouterr().out
    assert "wrote 3 masks" in said
    assert "kept the masks of 2 pictures" in said
    run(pictures, model=ROOT / "no" / "model")  # which is not looked for
    assert "all 5 pictures" in capsys.readouterr().out
    assert bytes_of(pictures) == after


def test_a_mask_that_a_person_makes_during_the_run_stays(run, pictures, monkeypatch):
    open_picture = batches.open_picture

    def write_and_open(path):
        (pictures / "04.mask.png").write_bytes(b"mine")
        return open_picture(path)

    monkeypatch.setattr(batches, "open_picture", write_and_open)
    run(pictures)
    assert (pictures / "04.mask.png").read_bytes() == b"mine"
    assert len([*pictures.glob("*.mask.png")]) == 5


def test_overwrite_keeps_the_old_masks(run, pictures, capsys):
    old = {"00.mask.png": 10, "01-masklabel.png": 20, "sub/00.mask.png": 30}
    write_squares(pictures / "sub", 1)
    for name, value in old.items():
        Image.new("L", (128, 128), value).save(pictures / name)
    bytes_before = {name: (pictures / name).read_bytes() for name in old}
    run(pictures, overwrite=True, **HARD)
    (kept,) = (pictures / OWN).glob("before-*")
    assert {path.relative_to(kept).as_posix(): path.read_bytes() for path in kept.rglob("*.png")} == bytes_before
    assert str(kept) in capsys.readouterr().out
    # The file that a training run reads is replaced, whatever its name.
    assert not (pictures / "01.mask.png").exists()
    for i, name in ((0, "00.mask.png"), (1, "01-masklabel.png"), (0, "sub/00.mask.png"), (2, "02.mask.png")):
        assert (np.asarray(Image.open(pictures / name)) == square(i)).all()
    run(pictures, overwrite=True, prompt="blue")
    assert len([*(pictures / OWN).glob("before-*")]) == 2


def test_masks_that_a_table_names_stay(run, pictures, capsys):
    """They are no pictures to mask, and a training run would not read a mask beside their pictures."""
    Image.new("L", (128, 128), 255).save(pictures / "other.png")
    rows = [{"file_name": f"{i:02d}.png", "text": "a", "mask": "other.png" if i in (1, 3) else None} for i in range(5)]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(pictures, overwrite=True)
    assert [*masks_of(pictures)] == ["00.mask.png", "02.mask.png", "04.mask.png"]
    assert "kept the masks of 2 pictures" in capsys.readouterr().out
    records = read_records(pictures, mask_column="mask")
    named = [os.path.basename(row["path"]) for row in records["mask"]]
    assert named == ["00.mask.png", "other.png", "02.mask.png", "other.png", "04.mask.png"]


def test_what_has_no_mask_is_named_and_passed_over(run, pictures, capsys):
    (pictures / "01.png").write_bytes(b"no picture")
    Image.new("RGB", (50, 40), "green").save(pictures / "02.png")
    Image.new("RGB", (50, 40), "green").save(pictures / "03.png")
    own = Image.new("L", (50, 40), 255)
    own.save(pictures / "03.mask.png")
    run(pictures, batch_size=2, overwrite=True)
    said = capsys.readouterr()
    everything = said.out + said.err
    assert f"passed over: {pictures / '01.png'}: it can't be decoded" in everything
    reason = "nothing was found (probability 0.00 at most, --threshold 0.3)"
    assert f"passed over: {pictures / '02.png'}: {reason}\n" in everything
    assert f"passed over: {pictures / '03.png'}: {reason}; its old mask stays\n" in everything
    assert said.out.endswith("made no mask for 3 pictures, named above; without one, all of a picture is trained\n")
    assert [*masks_of(pictures)] == ["00.mask.png", "03.mask.png", "04.mask.png"]
    assert (masks_of(pictures)["03.mask.png"] == 255).all()
    records = read_records(pictures, leave_out=lambda *_: None, instance_prompt="a")
    assert [row is not None for row in records["mask"]] == [True, False, False, True, True]


def test_a_word_that_the_pictures_do_not_show_makes_no_mask_at_all(run, pictures, capsys):
    before = bytes_of(pictures)
    run(pictures, prompt="house")
    said = capsys.readouterr()
    assert (said.out + said.err).count(
        f"nothing was found (probability {math.floor(100 * NOT_FOUND) / 100} at most"
    ) == 5
    assert "wrote 0 masks" in said.out
    assert bytes_of(pictures) == before
    assert [path.name for path in (pictures / OWN).iterdir()] == ["masks.png"]
    run(pictures, prompt="house", threshold=0.05)  # which is less than that
    assert all((values == 255).all() for values in masks_of(pictures).values())


def test_the_sheet_shows_what_does_not_count(run, tmp_path):
    folder = write_squares(tmp_path / "many", 22)
    Image.new("RGB", (64, 64), "white").save(folder / "white.png")
    run(folder, **HARD)
    assert sorted(path.name for path in (folder / OWN).iterdir()) == ["masks-1.png", "masks-2.png"]
    with Image.open(folder / OWN / "masks-1.png") as image:
        first = image.convert("RGB")
    seen = {first.getpixel((x, 170)) for x in range(first.width // 2, first.width)}
    hidden = tuple(round(0.25 * 255 + 0.75 * value) for value in HIDDEN)  # white under it
    assert any(max(abs(a - b) for a, b in zip(pixel, hidden, strict=True)) <= 2 for pixel in seen)
    assert len(read_records(folder, instance_prompt="a")) == 23  # no sheet is taken for a picture
    run(folder, overwrite=True, sheet=tmp_path / "sheets" / "s.jpg")
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["s-1.jpg", "s-2.jpg"]


# Kills and signals.


def start(words, program=None):
    """Starts the real command without the seconds of its imports."""
    return subprocess.Popen(
        [quick_python().python, program or "scripts/mask.py", *map(str, words)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def count_masks(folder):
    return len([*folder.glob("*.mask.png")])


def test_killed_and_run_again_equals_undisturbed(model, run, tmp_path):
    undisturbed, folder = (write_squares(tmp_path / name, 24, size=(1200, 1000)) for name in ("undisturbed", "killed"))
    for place in (undisturbed, folder):
        Image.new("L", (1200, 1000), 255).save(place / "03.mask.png")
    run(undisturbed, batch_size=1)
    process = start(words_of(folder, model, batch_size=1))
    wait_for(lambda: count_masks(folder) >= 4, process)
    process.kill()
    process.communicate()
    assert 4 <= count_masks(folder) < 24
    for path in folder.glob("*.mask.png"):  # no file is broken
        assert open_mask(read_bytes(path), (1200, 1000)).size == (1200, 1000)
    again = start(words_of(folder, model, batch_size=1))
    said, _ = again.communicate(timeout=100)
    assert again.returncode == 0, said
    assert "resuming: " in said
    assert "wrote 23 masks" in said
    assert "kept the masks of 1 picture," in said
    ours, theirs = masks_of(folder), masks_of(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    names = sorted(path.name for path in (undisturbed / OWN).iterdir())
    assert sorted(path.name for path in (folder / OWN).iterdir()) == names == ["masks-1.png", "masks-2.png"]
    for name in names:  # the sheet has the masks from before the kill, but not the person's
        assert Image.open(folder / OWN / name).tobytes() == Image.open(undisturbed / OWN / name).tobytes()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("moment", ["before the batch is written", "after it is written", "with half a line"])
def test_an_overwriting_run_continues_after_its_last_batch(run, tmp_path, monkeypatch, moment):
    """Stopped at the worst moments; what a person made is in the copy, and what was edited after the stop stays."""
    write, calls = mask.write_masks, []

    def stop_at_the_third(dataset, masks, **how):
        calls.append(masks)
        if len(calls) == 3 and moment != "after it is written":
            raise Stopped("test", 143, "here")
        write(dataset, masks, **how)
        if len(calls) == 3:
            raise Stopped("test", 143, "here")

    flags = dict(batch_size=1, overwrite=True, **HARD)
    folders = [write_squares(tmp_path / name) for name in ("undisturbed", "stopped")]
    for folder in folders:
        Image.new("L", (128, 128), 99).save(folder / "00.mask.png")
    run(folders[0], **flags)
    monkeypatch.setattr(mask, "write_masks", stop_at_the_third)
    with pytest.raises(Stopped):
        run(folders[1], **flags)
    monkeypatch.undo()
    if moment == "with half a line":
        journal = folders[1] / OWN / "unfinished.jsonl"
        journal.write_bytes(journal.read_bytes()[:-9])
    Image.new("L", (128, 128), 7).save(folders[1] / "00.mask.png")
    run(folders[1], **flags)
    expected = masks_of(folders[0]) | {"00.mask.png": np.full((128, 128), 7)}
    found = masks_of(folders[1])
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)
    (kept,) = (folders[1] / OWN).glob("before-*")
    assert (np.asarray(Image.open(kept / "00.mask.png")) == 99).all()


def test_a_run_with_other_flags_does_not_continue(run, pictures, monkeypatch, capsys):
    def stop(*_, **__):
        raise Stopped("test", 143, "here")

    monkeypatch.setattr(mask, "write_masks", stop)
    with pytest.raises(Stopped):
        run(pictures, batch_size=1)
    monkeypatch.undo()
    run(pictures, prompt="blue", **HARD)
    assert "resuming" not in capsys.readouterr().out
    assert all(
        (values == np.roll(square(i), 64, axis=0)).all() for i, values in enumerate(masks_of(pictures).values())
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_command_with_its_exit_code(model, tmp_path, number, code):
    folder = write_squares(tmp_path / "many", 40, size=(1200, 1000))
    words = words_of(folder, model, batch_size=1)
    program = f"import os, runpy, sys; print(os.getpid(), flush=True); sys.argv = {['mask.py', *words]!r}\n"
    program += f"runpy.run_path({str(ROOT / 'scripts' / 'mask.py')!r}, run_name='__main__')\n"
    (tmp_path / "program.py").write_text(program)
    process = start([], tmp_path / "program.py")
    pid = int(process.stdout.readline())
    wait_for(lambda: count_masks(folder) >= 2, process)
    os.kill(pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert re.search(r"stopped after \d+ of 40 pictures. Run the same command again to resume.", said), said
    assert 2 <= count_masks(folder) < 40


# Refusals.


def test_a_wrong_command_is_one_line_with_exit_code_2(tmp_path):
    words = [quick_python().python, "scripts/mask.py", tmp_path / "none", "--prompt", "red"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("there is no such folder. Pass the folder that contains the pictures.\n")
    done = subprocess.run([*words, "--treshold", "1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mask.py: there is no flag --treshold. Did you mean --threshold?\n"


@pytest.mark.parametrize(
    "words", [[], ["--prompt", " "], ["--prompt", "a", "--threshold", "0"], ["--prompt", "a", "--feather", "51"]]
)
def test_flags_out_of_bounds_are_refused(words, capsys):
    with pytest.raises((InputError, SystemExit)):
        mask.build_parser().parse(["FOLDER", *words])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "no/such/model"}, "no/such/model: there is no such folder. Pass a folder or the hub id"),
        ({"model": "owner/name"}, "owner/name: it is not in the hub's cache, and HF_HUB_OFFLINE forbids downloads"),
        ({"model": str(ROOT / "docs")}, "it has no config.json, so it is not a model of transformers"),
        (
            {"model": str(ROOT / "models" / "mini-sd" / "text_encoder")},
            "masks are made by models of the type 'clipseg'",
        ),
        ({"revision": "main"}, "--revision main: a folder has no revisions"),
        ({"device": "cuda:77"}, "--device cuda:77 can't be used here"),
        ({"sheet": "FOLDER/sheet.png"}, "a trainer would take the sheet for a training picture"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_written(run, pictures, flags, message):
    flags = {name: str(value).replace("FOLDER", str(pictures)) for name, value in flags.items()}
    before = sorted(pictures.rglob("*"))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run(pictures, **flags)
    assert "\n" not in str(caught.value)
    assert sorted(pictures.rglob("*")) == before


def test_two_pictures_that_would_share_a_mask_are_refused(run, pictures):
    Image.new("RGB", (8, 8)).save(pictures / "00.jpg")
    before = bytes_of(pictures)
    with pytest.raises(
        InputError, match=r"00.png: it would share 00.mask.png with 00.jpg. Rename one of the two pictures"
    ):
        run(pictures)
    assert bytes_of(pictures) == before


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.film_mul.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BROKEN = {
    "pickled": (only_pickled, "it has no weights in safetensors format, only in formats that could run code"),
    "other weights": (without_a_tensor, "its weights do not fit the class CLIPSegForImageSegmentation"),
    "damaged": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "it can't be loaded"),
    "no vocabulary": (lambda folder: (folder / "vocab.json").unlink(), "it can't be loaded"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("["), "config.json: it can't be read"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_models_that_can_not_be_used_are_refused(run, model, pictures, tmp_path, fault):
    breaks, message = BROKEN[fault]
    shutil.copytree(model, tmp_path / "model")
    breaks(tmp_path / "model")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run(pictures, model=tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert masks_of(pictures) == {}


# The hub.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(WithSizes, root=tmp_path / "hub") as server, taken_for_the_hub(server):
        yield server


def test_licence_and_size_are_said_before_a_download_and_only_then(run, model, hub, pictures, tmp_path, capsys):
    place = tmp_path / "hub" / "owner" / "clipseg"
    shutil.copytree(model, place)
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "notes.txt"):
        (place / name).write_bytes(b"0" * 2**20)
    run(pictures, model="owner/clipseg")
    size = 1 + sum(path.stat().st_size for path in model.iterdir()) / 2**20
    assert f"owner/clipseg: licence bsd-3-clause, {size:.1f} MiB to download\n" in capsys.readouterr().out
    cached = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink()}
    assert cached == {path.name for path in model.iterdir()} | {"notes.txt"}  # neither code nor pickled weights
    asked = len(hub.seen)
    run(pictures, model="owner/clipseg", overwrite=True)
    assert " to download" not in capsys.readouterr().out
    assert len(hub.seen) == asked


def test_a_model_of_another_kind_is_not_downloaded(run, model, hub, pictures, tmp_path):
    shutil.copytree(model, tmp_path / "hub" / "owner" / "clip")
    config = tmp_path / "hub" / "owner" / "clip" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "clip"}))
    with pytest.raises(InputError, match="owner/clip: its model_type is 'clip'"):
        run(pictures, model="owner/clip")
    assert not any("resolve" in path and path.endswith(".safetensors") for path in hub.seen)


def test_help_is_quick():
    code = "import sys; sys.argv[1:] = []\nimport scripts.mask as m\nm.build_parser().format_help()\n"
    code += "print(*[name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

"""Class pictures that the base model draws: what they are, when they are drawn, and runs with them."""

import json
import os
import shutil

import pytest
import torch
from conftest import TORCHRUN, read_lora, read_metrics, refusal_of, run_command, train_script, write_pictures
from infer_fixtures import draw
from PIL import Image
from quick_start import signal_before
from safetensors.torch import load_file, save_file

from text_to_image_lora.errors import InputError, TrainingError
from text_to_image_lora.models.loading import find_base_model
from text_to_image_lora.models.weights_files import MOST_SAMPLES, SAMPLE, files_identity
from text_to_image_lora.pictures.captions import ConceptRemover, prompts_without_concept
from text_to_image_lora.training import class_images


COMMON = dict(
    num_class_images=6, class_prompt="a red axe", class_inference_steps=2, class_guidance_scale=3.0, sample_batch_size=4,
    num_validation_images=0, center_crop=True,
)  # fmt: skip


def files_in(cache):
    """Returns {path in the cache: content} of the class pictures and their captions."""
    folder = cache / "class_pictures"
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder): path.read_bytes() for path in files}


def pixels(folder):
    return {path.name: Image.open(path).convert("RGB").tobytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture
def no_drawing(monkeypatch):
    monkeypatch.setattr(class_images, "open_studio", lambda *_: pytest.fail("the base model is loaded to draw"))


@pytest.mark.parametrize(
    ("base", "options", "flags"),
    [
        ("tiny_sd", dict(clip_skip=1), ["--clip_skip", 1]),
        ("tiny_sd", dict(mixed_precision="bf16"), ["--mixed_precision", "bf16"]),
        ("tiny_sd2", dict(), []),  # v-prediction
        ("tiny_xl", dict(class_guidance_scale=7.5), ["--guidance_scale", 7.5]),
    ],
)
def test_they_are_what_infer_draws(train, tmp_path, request, library_settings, base, options, flags):
    """Picture i has the seed i; infer.py draws them in batches of four too."""
    model = request.getfixturevalue(base)
    train(pretrained_model_name_or_path=model, max_train_steps=1, **COMMON | options)
    size = ["--height", 32, "--width", 32]
    draw(model, tmp_path / "drawn", "--num_images", 8, *size, "--guidance_scale", 3, *flags, prompt=["a red axe"])
    expected = [*pixels(tmp_path / "drawn").values()]
    found = pixels(tmp_path / "cache" / "class_pictures")
    assert [*found] == [f"{i:05d}.png" for i in range(6)]
    assert [*found.values()] == expected[:6]
    assert len(set(expected)) == 8
    (table,) = (tmp_path / "cache").glob("class_pictures/*/metadata.jsonl")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert rows == [{"file_name": name, "text": "a red axe"} for name in found]


def test_they_are_class_pictures_and_used_again(train, tmp_path, capsys, monkeypatch):
    first = train(**COMMON, prior_loss_weight=0.5)
    said = capsys.readouterr().out
    assert "class pictures: 6 of the base model, from 1 prompt, in " in said
    assert "0 are in the cache already, and 6 are drawn before training" in said
    assert "12 pictures, 6 steps an epoch" in said
    before, about = files_in(tmp_path / "cache"), json.loads((first / "about.json").read_text())
    assert about["dataset"]["concepts"]["class pictures"] == {"pictures": 6, "samples_an_epoch": 6}
    assert about["settings"]["num_class_images"] == 6
    monkeypatch.setattr(class_images, "open_studio", lambda *_: pytest.fail("the base model is loaded to draw"))
    again = train(**COMMON, prior_loss_weight=0.5, output_dir=tmp_path / "again", seed=5)
    assert "all of them are in the cache already" in capsys.readouterr().out
    assert files_in(tmp_path / "cache") == before
    by_hand = train(
        class_data_dir=next((tmp_path / "cache" / "class_pictures").iterdir()), num_validation_images=0, center_crop=True,
        prior_loss_weight=0.5, output_dir=tmp_path / "by hand", seed=5,
    )  # fmt: skip
    assert all(torch.equal(read_lora(by_hand)[name], value) for name, value in read_lora(again).items())


def test_more_of_them_leave_the_first_ones_as_they_are(train, tmp_path):
    """In batches of four, the sixth picture is the second of a batch, whatever their number."""
    train(**COMMON, max_train_steps=1)
    few = files_in(tmp_path / "cache")
    train(**COMMON | dict(num_class_images=9), max_train_steps=1, output_dir=tmp_path / "more")
    more = files_in(tmp_path / "cache")
    assert len(more) == 10
    assert all(more[name] == data for name, data in few.items() if name.suffix == ".png")
    train(
        **COMMON | dict(num_class_images=9),
        max_train_steps=1,
        output_dir=tmp_path / "new",
        latent_cache_dir=tmp_path / "other",
    )
    assert files_in(tmp_path / "other") == more


@pytest.fixture(scope="module")
def drawn(train_in, tmp_path_factory):
    """The folder of a run with class pictures, which the tests share."""
    folder = tmp_path_factory.mktemp("drawn")
    train_in(folder, **COMMON, max_train_steps=1)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        dict(class_prompt="a blue axe"), dict(resolution=64), dict(class_inference_steps=3), dict(class_guidance_scale=2.0),
        dict(clip_skip=1), dict(mixed_precision="bf16"), dict(pretrained_model_name_or_path="other"),
        dict(class_prompt=None, trigger_word="sks"), dict(long_prompts=True),
    ],
)  # fmt: skip
def test_what_they_depend_on(train, tiny_sd, drawn, tmp_path, capsys, no_drawing, changes):
    if "pretrained_model_name_or_path" in changes:
        changes = dict(pretrained_model_name_or_path=shutil.copytree(tiny_sd, tmp_path / "other"))
        weights = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    options = COMMON | dict(latent_cache_dir=drawn / "cache", dry_run=True)
    train(**options)
    assert "all of them are in the cache already" in capsys.readouterr().out
    train(**options | changes)
    assert "0 are in the cache already, and 6 are drawn before training" in capsys.readouterr().out


def test_what_they_do_not_depend_on(train, tiny_sd, drawn, tmp_path, capsys, no_drawing):
    """Settings of training, and the place of the base model."""
    moved = shutil.copytree(tiny_sd, tmp_path / "moved")
    train(
        **COMMON | dict(sample_batch_size=1), latent_cache_dir=drawn / "cache", pretrained_model_name_or_path=moved, rank=8,
        seed=9, prior_loss_weight=2.0,
    )  # fmt: skip
    assert "all of them are in the cache already" in capsys.readouterr().out


def test_files_that_are_missing_or_damaged_are_drawn_again(train, drawn, tmp_path, capsys):
    before = files_in(drawn / "cache")
    cache = shutil.copytree(drawn / "cache", tmp_path / "cache")
    (folder,) = (cache / "class_pictures").iterdir()
    (folder / "00001.png").unlink()
    (folder / "00005.png").write_bytes((folder / "00005.png").read_bytes()[:-40])
    (folder / "metadata.jsonl").unlink()
    train(**COMMON, max_train_steps=1)
    assert "4 are in the cache already, and 2 are drawn before training" in capsys.readouterr().out
    assert files_in(cache) == before


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", 143)])
def test_a_run_that_ends_while_drawing_continues(start, arguments, tmp_path, name, code):
    words = arguments(**COMMON | dict(sample_batch_size=2), max_train_steps=2)
    ended, said = start(words, tmp_path / "logs", signal_before("training.class_images._save", 4, name)).wait()
    assert ended == code, said
    if name == "SIGTERM":
        assert "SIGTERM: stopped while it drew class pictures; those that are drawn are kept. Run the same" in said
    assert 3 <= len(files_in(tmp_path / "cache")) <= 4
    assert not [*(tmp_path / "out").glob("[!.]*")]  # a killed run leaves the file of its lock
    ended, said = start(words, tmp_path / "logs").wait()
    assert ended == 0, said
    straight = arguments(
        **COMMON | dict(sample_batch_size=2), max_train_steps=2, output_dir=tmp_path / "straight",
        latent_cache_dir=tmp_path / "new",
    )  # fmt: skip
    ended, said = start(straight, tmp_path / "logs").wait()
    assert ended == 0, said
    assert files_in(tmp_path / "cache") == files_in(tmp_path / "new")
    resumed, straight = read_lora(tmp_path / "out"), read_lora(tmp_path / "straight")
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())


def test_two_processes_draw_what_one_draws(arguments, train, drawn, tmp_path):
    options = COMMON | dict(train_batch_size=1, sample_batch_size=4, num_class_images=6, max_train_steps=2)
    done = run_command(arguments(**options), TORCHRUN, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "cache") == files_in(drawn / "cache")
    one = train(**options | dict(train_batch_size=2), output_dir=tmp_path / "one")
    losses = [[row["train_loss"] for row in read_metrics(folder)] for folder in (one, tmp_path / "out")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_run_equals_a_straight_one(train, tmp_path, capsys):
    """Also where the class pictures are drawn again, and with other rounding it is still the same run."""
    options = COMMON | dict(checkpointing_steps=2)
    straight = read_lora(train(**options, max_train_steps=4, output_dir=tmp_path / "straight"))
    train(**options, max_train_steps=2)
    shutil.rmtree(tmp_path / "cache")
    resumed = read_lora(train(**options, max_train_steps=4))
    assert "resuming from" in capsys.readouterr().out
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    train(**options, max_train_steps=6, mixed_precision="bf16")
    said = capsys.readouterr().out
    assert "0 are in the cache already, and 6 are drawn before training" in said
    assert "resuming from" in said
    with pytest.raises(InputError, match="dataset"):
        train(**options | dict(class_prompt="a blue axe"), max_train_steps=6)


def test_only_those_are_drawn_that_the_folder_lacks(train, tmp_path, capsys):
    dogs = write_pictures(tmp_path / "dogs", count=3, seed=5, captions=["a dog"])
    before = sorted(path.name for path in dogs.iterdir())
    train(**COMMON | dict(num_class_images=5), class_data_dir=dogs)
    said = capsys.readouterr().out
    assert f"class pictures: 3 in {dogs}; --num_class_images 5 adds 2" in said
    assert "11 pictures, 6 steps an epoch" in said
    assert len(files_in(tmp_path / "cache")) == 3
    assert sorted(path.name for path in dogs.iterdir()) == before
    train(**COMMON | dict(num_class_images=3), class_data_dir=dogs, output_dir=tmp_path / "enough", dry_run=True)
    assert f"class pictures: 3 in {dogs}; --num_class_images 3 adds 0" in capsys.readouterr().out


def test_prompts_are_the_captions_without_the_concept(said):
    captions = ["sks, a red axe", "a spear", "sks, a red axe", "a blue axe, sks", "sks"]
    prompts = prompts_without_concept(captions, ConceptRemover(("sks",)))
    assert sorted(prompts) == ["a blue axe", "a red axe"]
    assert prompts == prompts_without_concept(captions[::-1], ConceptRemover(("sks",)))
    assert said[0] == (
        "class pictures: 1 of 4 different captions contain no phrase of the concept, so no class picture is drawn from them"
    )
    assert said[1].startswith("class pictures: 2 prompts from the captions without the concept, such as 'a ")
    with_prompt = ConceptRemover(("sks",), prompt="photo of {caption}")
    assert "photo of a spear" in prompts_without_concept(captions, with_prompt)


def test_a_run_with_prompts_from_captions(train, tmp_path, capsys):
    captions = [f"sks, a {colour} axe" for colour in ("red", "blue", "green")]
    folder = write_pictures(tmp_path / "captioned", count=3, captions=captions)
    options = COMMON | dict(class_prompt=None, train_data_dir=folder, concept_phrases=["sks"], num_class_images=7)
    train(**options, preservation="output")
    (table,) = (tmp_path / "cache").glob("class_pictures/*/metadata.jsonl")
    texts = [json.loads(line)["text"] for line in table.read_text().splitlines()]
    assert sorted(texts[:3]) == ["a blue axe", "a green axe", "a red axe"]
    assert texts == [texts[i % 3] for i in range(7)]
    assert "preservation: 'sks, a red axe' is also trained as 'a red axe'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(class_prompt=None), "--num_class_images: it is not known what in the captions names the concept; the first is 'a red axe"),
        (dict(class_prompt=None, concept_phrases=["sks"]), "no caption contains 'sks'; the first is 'a red axe number 0'. Describe the class by --class_prompt TEXT, or"),
        (dict(class_prompt=" "), "--class_prompt is empty"),
        (dict(num_class_images=0), "--class_prompt describes class pictures: add --num_class_images, such as 100, or --class_data_dir."),
        (dict(concept_phrases=["red"]), "--concept_phrases is only used for --preservation, for --num_class_images without --class_prompt"),
        (dict(class_data_dir="nowhere"), "nowhere: it contains no class pictures. Leave --class_data_dir out, and all 6 of --num_class_images"),
        (dict(num_class_images=-1), "--num_class_images -1: it must be from 0 to 100000"),
        (dict(class_inference_steps=999), "--class_inference_steps 999: it must be from 1 to 998"),
        (dict(sample_batch_size=0), "--sample_batch_size 0: it must be from 1 to 1024"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_before_anything_is_loaded(train, no_drawing, tmp_path, changes, reason):
    assert reason in refusal_of(train, **COMMON | changes)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


def test_captions_that_are_nothing_but_the_concept_are_refused(train, no_drawing, tmp_path):
    folder = write_pictures(tmp_path / "bare", count=2, captions=["sks"])
    said = refusal_of(train, train_data_dir=folder, **COMMON | dict(class_prompt=None, concept_phrases=["sks"]))
    assert "--num_class_images: no caption contains more than 'sks'; the first is 'sks'. Describe the class by" in said


def test_the_command_refuses_with_exit_code_2(arguments):
    done = run_command(arguments(num_class_images=8))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "train_text_to_image_lora.py: --num_class_images: it is not known what" in done.stderr


def test_a_bad_picture_is_reported_before_they_are_drawn(train, pictures, no_drawing):
    (pictures / "2.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"2\.png"):
        train(**COMMON)


def test_a_dry_run_counts_them_and_draws_none(train, tmp_path, capsys, no_drawing):
    train(**COMMON, dry_run=True, preview_data=tmp_path / "sheet.png")
    said = capsys.readouterr().out
    assert "12 pictures, 12 captions" in said
    assert "look alike" not in said
    assert "6 of the base model, from 1 prompt, in " in said
    assert "0 are in the cache already, and 6 are drawn before training" in said
    assert "while drawing class pictures" in said
    assert not (tmp_path / "cache").exists()
    with Image.open(tmp_path / "sheet.png") as sheet:
        own = sheet.height
    report = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert report["memory_bytes"]["class_pictures"] > 0
    assert report["concepts"]["class pictures"]["pictures"] == 6
    assert own < 7 * 220


def test_the_preview_shows_them_once_they_are_drawn(train, drawn, tmp_path, capsys, no_drawing):
    options = COMMON | dict(latent_cache_dir=drawn / "cache", dry_run=True)
    train(**options, preview_data=tmp_path / "sheet.png")
    said = capsys.readouterr().out
    assert "all of them are in the cache already" in said
    assert "while drawing class pictures" not in said
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 9 * 190  # of ten pictures


def test_a_base_model_that_is_replaced_while_it_is_loaded_draws_nothing(train, tiny_sd, tmp_path, monkeypatch):
    """The folder of the pictures is named after the files that were there before."""
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    open_studio = class_images.open_studio

    def replace_and_open(*values):
        weights = {name: 1.1 * value for name, value in load_file(file).items()}
        save_file(weights, tmp_path / "new.safetensors", {"format": "pt"})
        os.replace(tmp_path / "new.safetensors", file)
        return open_studio(*values)

    monkeypatch.setattr(class_images, "open_studio", replace_and_open)
    with pytest.raises(TrainingError, match="/model: the files were changed while they were loaded. Run the same"):
        train(pretrained_model_name_or_path=model, **COMMON)
    assert not list((tmp_path / "cache" / "class_pictures").rglob("*.png"))


def test_too_little_memory_names_the_flag(train, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(class_images, "draw_batch", out_of_memory)
    with pytest.raises(
        TrainingError, match="drawing 4 class pictures at once. Pass --sample_batch_size 1; the pictures"
    ):
        train(**COMMON)


def test_the_identity_of_a_base_model_sees_every_part(tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "model")
    base = find_base_model(str(tmp_path / "model"))  # once, because it would refuse weights that are changed below

    def identity():
        return files_identity(base)

    before = identity()
    assert before == files_identity(find_base_model(str(tiny_sd)))
    (tmp_path / "model" / "README.md").write_text("a note")
    assert identity() == before
    for name in (
        "scheduler/scheduler_config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        path = tmp_path / "model" / name
        data = path.read_bytes()
        path.write_bytes(data + b" ")
        assert identity() != before, name
        path.write_bytes(data)
    assert identity() == before
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    large = bytearray(4 * SAMPLE * MOST_SAMPLES)
    path.write_bytes(large)
    before = identity()
    large[-4 * SAMPLE :] = b"1" * 4 * SAMPLE  # a change of four kilobytes in a file of 16 MiB
    path.write_bytes(large)
    assert identity() != before


def test_flags_have_their_defaults():
    words = [
        "--pretrained_model_name_or_path",
        "x",
        "--train_data_dir",
        "y",
        "--num_class_images",
        "100",
        "--class_prompt",
        "a",
    ]
    own = train_script.parse_settings(words).class_pictures
    assert (own.class_inference_steps, own.class_guidance_scale, own.sample_batch_size) == (30, 7.5, 4)

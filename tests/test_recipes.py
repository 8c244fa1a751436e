"""Each recipe, shortened and on bundled pictures in the layout of the recipe's page, trains and saves a LoRA."""

import csv
import json
import shutil
import sys

import pytest
import yaml
from conftest import ROOT, TORCHRUN, read_lora, read_metrics, run_command
from test_mission import pokemon


METADATA = ROOT / "metadata"
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
# Flags for this machine; all others are those of the recipe. The fixture `train` uses a tiny base model at 32 pixels.
SHORTENED = dict(train_batch_size=None, learning_rate=None, seed=None, max_train_steps=2, validation_steps=2)
SHORTENED |= dict(mixed_precision="no", checkpointing_steps=2, num_validation_images=1, train_data_dir=None)
OF_THE_FIXTURE = {"pretrained_model_name_or_path", "resolution", "output_dir", "train_data_dir", "validation_data_dir"}


def weapons(kind, count):
    """Returns paths and captions of some of the bundled weapons of a kind."""
    rows = [json.loads(line) for line in (METADATA / "weapons" / kind / "metadata.jsonl").read_text().splitlines()]
    return [(METADATA / "weapons" / kind / row["file_name"], row["text"]) for row in rows[:count]]


def creatures(count):
    """Returns paths and captions of some of the bundled creatures."""
    with open(METADATA / "creatures" / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:count]
    return [(METADATA / "creatures" / row["file_name"], row["text"]) for row in rows]


def lay_out(folder, pictures, captions="none"):
    """Copies pictures into a folder, with caption files ("files"), with a metadata.jsonl ("table"), or without captions."""
    folder.mkdir(parents=True)
    for path, caption in pictures:
        shutil.copy(path, folder / path.name)
        if captions == "files":
            (folder / path.with_suffix(".txt").name).write_text(caption + "\n")
    if captions == "table":
        rows = [json.dumps({"file_name": path.name, "text": caption}) for path, caption in pictures]
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def check_what_is_left(out, name, changes):
    """Checks that the run had the settings of its recipe, trained to its end, and saved a LoRA."""
    wanted, had = yaml.safe_load(RECIPES[name].read_text()), yaml.safe_load((out / "run.yaml").read_text())
    if "validation_prompt" in wanted:  # in run.yaml, this flag can have several values
        wanted["validation_prompts"] = [wanted.pop("validation_prompt")]
    changed = {flag for flag, value in changes.items() if value is not None} | OF_THE_FIXTURE
    kept = {flag: value for flag, value in wanted.items() if flag not in changed}
    assert {flag: had.get(flag) for flag in kept} == kept
    assert read_metrics(out)[-1]["step"] == had["max_train_steps"] == 2
    tensors = read_lora(out)
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_B" in key)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.fixture
def shortened(train, capsys, monkeypatch):
    """Returns `shortened(name, **flags)`, which runs a shortened recipe and returns its output folder and its output."""
    monkeypatch.chdir(ROOT)

    def run(name, **changes):
        changes = SHORTENED | changes
        out = train(config=RECIPES[name], **changes)
        check_what_is_left(out, name, changes)
        return out, capsys.readouterr().out

    return run


def test_every_recipe_is_run_here():
    text = (ROOT / "tests" / "test_recipes.py").read_text()
    assert [name for name in RECIPES if f'"{name}"' not in text] == []


def test_the_demo(shortened):
    out, said = shortened("demo")
    assert "176 pictures, 44 steps an epoch" in said
    assert len(list((out / "validation" / "step-000002").glob("prompt-*.png"))) == 2


def test_a_painters_style_from_kohyas_folders(shortened, tmp_path):
    lay_out(tmp_path / "paintings" / "3_vgstyle painting", creatures(10)[:8], "files")
    lay_out(tmp_path / "paintings" / "1_vgstyle sketch", creatures(10)[8:])
    out, said = shortened("van_gogh", train_data_dir=tmp_path / "paintings")
    assert "3_vgstyle painting: 8 pictures, each 3 times per epoch" in said
    assert "pictures without a caption file, captioned with their folder's name: 2" in said
    assert "only 1 validation picture" in said
    assert "30 of 30 LoRA modules read back correctly from the diffusers file and from the kohya file" in said
    # Each checkpoint contains a LoRA that can be compared, as the page says.
    assert read_lora(out / "checkpoint-2").keys() == read_lora(out).keys()


def test_things_in_class_folders(shortened, tmp_path):
    for kind, count in {"axe": 4, "spear": 2, "trident": 1, "whip": 2}.items():
        lay_out(tmp_path / "weapons" / kind, weapons(kind, count), "table")
    held_out = lay_out(tmp_path / "held out", weapons("axe", 8)[6:], "table")
    _, said = shortened("weapons", train_data_dir=tmp_path / "weapons", validation_data_dir=held_out)
    assert "concept axe: 4 pictures, 4 samples per epoch" in said
    assert "concept trident: 1 picture, 4 samples per epoch" in said
    assert "only 2 validation pictures" in said


def test_the_bundled_weapons_as_the_recipe_stands(shortened):
    _, said = shortened("weapons")
    assert "176 pictures, 44 steps an epoch" in said
    assert "Validation: " in said


def test_a_dataset_of_the_hub(shortened, tmp_path):
    """The downloaded parquet files, with one column of captions in each of two languages."""
    pokemon(tmp_path / "pokemon", lay_out(tmp_path / "creatures", creatures(6), "table"))
    _, said = shortened("pokemon", dataset_name=tmp_path / "pokemon")
    assert "6 pictures, 2 steps an epoch" in said


def test_a_face_from_small_pictures_with_tags(shortened, tmp_path):
    faces = [(path, "1girl, green hair, smile, looking at viewer") for path, _ in creatures(6)]
    out, said = shortened("anime_face", train_data_dir=lay_out(tmp_path / "faces", faces, "files"))
    assert "6 pictures, 2 steps an epoch" in said
    assert (out / "out.safetensors").exists()


def test_several_styles(shortened, tmp_path):
    for style, pictures in {"inkwash": creatures(8), "woodcut": weapons("axe", 4)}.items():
        lay_out(tmp_path / "styles" / style, [(path, f"{style} style, {text}") for path, text in pictures], "files")
    _, said = shortened("several_styles", train_data_dir=tmp_path / "styles", validation_prompt="inkwash style, a cat")
    assert "concept inkwash: 7 pictures, 7 samples per epoch" in said
    assert "concept woodcut: 4 pictures, 7 samples per epoch" in said
    assert "Validation: " in said


def test_one_thing_with_class_pictures(shortened, tmp_path):
    """Photos without captions, and class pictures, with equal numbers of samples."""
    own, others = lay_out(tmp_path / "mine", creatures(3)), lay_out(tmp_path / "others", creatures(10)[3:])
    _, said = shortened(
        "dreambooth", train_data_dir=own, instance_prompt="a photo of sks dog", class_data_dir=others,
        class_prompt="a photo of a dog", validation_prompt="a photo of sks dog on a beach",
    )  # fmt: skip
    assert "10 pictures, 7 steps an epoch" in said


@pytest.mark.parametrize(
    "name", ["few_pictures", "colab_t4", "gpu_04gb", "gpu_06gb", "gpu_08gb", "gpu_12gb", "gpu_24gb"]
)
def test_pictures_of_ones_own(shortened, tmp_path, name):
    shortened(name, train_data_dir=lay_out(tmp_path / "mine", creatures(5), "table"))


@pytest.mark.parametrize("name", ["gpu_xl_08gb", "gpu_xl_12gb", "gpu_xl_16gb", "gpu_xl_24gb", "sd2_768", "sd2_512"])
def test_other_families(shortened, request, tmp_path, name):
    base = request.getfixturevalue("tiny_xl" if "_xl_" in name else "tiny_sd2")
    pictures = lay_out(tmp_path / "mine", creatures(5), "table")
    shortened(name, pretrained_model_name_or_path=base, train_data_dir=pictures, resolution=32)


@pytest.mark.long
def test_many_gpus(arguments, tmp_path):
    """Two processes on a CPU equal one process with twice the gradient accumulation, as the page says."""
    changes = SHORTENED | dict(
        train_data_dir=lay_out(tmp_path / "many", [*weapons("axe", 40), *creatures(40)], "table")
    )
    changes |= dict(seed=0, validation_prompt="a red axe")
    losses = []
    for launcher, accumulation in ((TORCHRUN, 1), ((sys.executable,), 2)):
        out = tmp_path / f"accumulation {accumulation}"
        words = arguments(
            config=RECIPES["many_gpus"], **changes, gradient_accumulation_steps=accumulation, output_dir=out
        )
        done = run_command(words, launcher=launcher, env={"ACCELERATE_USE_CPU": "true"})
        assert done.returncode == 0, done.stderr
        assert "effective batch 8 on" in done.stdout
        check_what_is_left(out, "many_gpus", changes)
        losses.append([row["train_loss"] for row in read_metrics(out) if "train_loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

"""`scripts/evaluate.py`: the complete command, a second call, its held-out loss, and invalid input."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, read_header, write_pictures
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts import evaluate
from text_to_image_lora.errors import TrainingError


def run_here(words):
    """Runs the command's `main` in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        evaluate.main(evaluate.build_parser().parse_args([*map(str, words)]))
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()


@pytest.fixture
def words(model, lora, clip_model, dino_model, tmp_path):
    """Returns the flags of a tiny evaluation of two LoRAs; the second one has strength 0, which equals the base model."""
    shutil.copytree(lora, tmp_path / "runs" / "epoch-0002")
    captions = ["a red axe in sks style", "a blue fish in sks style", "a green house in sks style"]
    held_out = write_pictures(tmp_path / "held-out", 4, captions=captions, seed=1)
    trained = write_pictures(tmp_path / "trained", 5, captions=captions, seed=2)
    flags = {
        "pretrained_model_name_or_path": [model], "lora": [lora, f"{tmp_path / 'runs' / 'epoch-0002'}:0"],
        "validation_data_dir": [held_out], "train_data_dir": [trained], "trigger_word": ["in sks style"],
        "other_prompts": ["a cup", "a red spear"], "num_prompts": [2], "num_inference_steps": [2],
        "clip_model": [clip_model], "dino_model": [dino_model], "num_cpu_threads": [1], "batch_size": [9],
        "device": ["cpu"], "output_dir": [tmp_path / "out"],
    }  # fmt: skip

    def build(**changes):
        chosen = {name: value for name, value in (flags | changes).items() if value is not None}
        return [word for name, values in chosen.items() for word in (f"--{name}", *values)]

    return build


@pytest.mark.usefixtures("library_settings")
def test_an_evaluation_whole_and_again(words, tmp_path, capsys):
    run_here(words())
    said, out = capsys.readouterr().out, tmp_path / "out"
    assert "2 LoRAs and the base model: 6 prompts x 3 seeds each, 4 held-out pictures" in said
    assert "2/3 axe: drew 18 pictures (0 were already there)" in said
    found = json.loads((out / "evaluation.json").read_text())
    scores = found["scores"]
    assert list(scores) == ["base", "axe", "epoch-0002", "held-out pictures"]
    names = {"CLIP-T", "CLIP-I", "DINOv2", "diversity", "set distance", "nearest", "memorised", "held-out loss"}
    assert {*scores["base"]} == names
    assert {*scores["axe"]} == names | {"drift"}
    assert scores["axe"]["drift"]["mean"] > 1e-5
    assert scores["axe"]["held-out loss"]["mean"] != pytest.approx(1, abs=1e-3)
    # At strength 0, all scores of a LoRA are those of the base model.
    assert scores["epoch-0002"].pop("drift")["mean"] == pytest.approx(0, abs=1e-9)
    for name, value in scores["epoch-0002"].items():
        assert value["mean"] == pytest.approx(scores["base"][name]["mean"], abs=1e-6), name
    assert {*found["bleed"]["axe"]} == {"held-out", "other prompts"}
    markdown = (out / "evaluation.md").read_text()
    assert found["recommendation"]["words"] in markdown
    assert found["recommendation"]["words"] in said
    for name in ("likeness-drift.png", "pictures.png", "nearest.png"):
        assert f"]({name})" in markdown
        with Image.open(out / name) as sheet:
            assert min(sheet.size) > 300
    pictures = {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")}
    assert len(pictures) == 3 * 18

    cut = out / "pictures" / "axe" / "000-seed0.png"
    (before, again) = cut.read_bytes(), out / "pictures" / "axe" / "001-seed2.png"
    cut.write_bytes(before[:500])
    again.unlink()
    run_here(words())
    said = capsys.readouterr().out
    assert "2/3 axe: drew 2 pictures (16 were already there)" in said
    assert "3/3 epoch-0002: drew 0 pictures (18 were already there)" in said
    changed = {path for path in pictures if path.stat().st_mtime_ns != pictures[path]}
    assert changed == {cut, again}
    assert json.loads((out / "evaluation.json").read_text())["recommendation"] == found["recommendation"]

    # Other settings, so all pictures are drawn again.
    run_here(words(lora=[words()[3]], guidance_scale=[3], train_data_dir=None))
    assert "2/2 axe: drew 18 pictures (0 were already there)" in capsys.readouterr().out
    assert "nearest" not in json.loads((out / "evaluation.json").read_text())["scores"]["axe"]


@pytest.mark.usefixtures("library_settings")
def test_a_base_model_that_changed_at_its_path_draws_again(words, model, lora, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    given = words(pretrained_model_name_or_path=[base], lora=[lora], train_data_dir=None, num_prompts=[1])
    run_here(given)
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # of the last weight
    path.write_bytes(data)
    capsys.readouterr()
    run_here(given)
    assert "2/2 axe: drew 12 pictures (0 were already there)" in capsys.readouterr().out


@pytest.mark.usefixtures("library_settings")
@pytest.mark.usefixtures("library_settings")
def test_a_lora_that_is_replaced_during_an_evaluation_is_drawn_again(words, lora, tmp_path, monkeypatch, capsys):
    """A run that still trains replaces its LoRA while others are drawn: the pictures are of the weights that were loaded."""
    own = shutil.copytree(lora, tmp_path / "trains")
    (file,) = own.glob("*.safetensors")
    draw_all = evaluate.draw_all

    def replace_and_draw(*values):
        weights = {name: 3 * value for name, value in load_file(file).items()}
        header = read_header(file)
        monkeypatch.setattr(evaluate, "draw_all", draw_all)
        save_file(weights, tmp_path / "new.safetensors", header)
        os.replace(tmp_path / "new.safetensors", file)
        return draw_all(*values)

    monkeypatch.setattr(evaluate, "draw_all", replace_and_draw)
    run_here(words(lora=[own]))
    before = json.loads((tmp_path / "out" / "evaluation.json").read_text())["scores"]["trains"]
    capsys.readouterr()
    run_here(words(lora=[own]))
    said = capsys.readouterr().out
    assert "base: drew 0 pictures (18 were already there)" in said
    assert "trains: drew 18 pictures (0 were already there)" in said
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["scores"]["trains"] != before


@pytest.mark.usefixtures("library_settings")
@pytest.mark.parametrize("what", ["LoRA", "base model"])
def test_files_that_are_replaced_while_they_are_loaded_are_refused(words, model, lora, tmp_path, monkeypatch, what):
    own = shutil.copytree(lora, tmp_path / "trains")
    base = shutil.copytree(model, tmp_path / "base")
    (file,) = own.glob("*.safetensors") if what == "LoRA" else (base / "unet").glob("*.safetensors")
    open_studio = evaluate.open_studio

    def open_and_replace(*values):
        studio = open_studio(*values)
        weights = {name: 3 * value for name, value in load_file(file).items()}
        save_file(weights, tmp_path / "new.safetensors", read_header(file))
        os.replace(tmp_path / "new.safetensors", file)
        return studio

    monkeypatch.setattr(evaluate, "open_studio", open_and_replace)
    changed = file if what == "LoRA" else base
    message = (
        f"^{re.escape(str(changed))}: the files were changed while they were loaded. Run the same command again.$"
    )
    with pytest.raises(TrainingError, match=message):
        run_here(words(lora=[own], pretrained_model_name_or_path=[base]))
    assert not list((tmp_path / "out").rglob("*.png"))


def test_what_a_killed_evaluation_left_is_deleted(words, tmp_path, capsys):
    half = tmp_path / "out" / "pictures" / "axe" / ".000-seed0.png.0123abcd.tmp"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    run_here(words())
    assert not half.exists()


def test_the_held_out_loss_is_the_training_scripts(train, tiny_sd, pictures, tmp_path, clip_model, dino_model):
    """Uses the run, seed and pictures of a training run with --validation_split."""
    split = dict(validation_split=0.4, num_validation_images=0)
    out = train(**split, learning_rate=3e-2, center_crop=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = [row["validation/relative_loss"] for row in rows if "validation/relative_loss" in row][-1]
    run_here([
        "--pretrained_model_name_or_path", tiny_sd, "--lora", out, "--train_data_dir", pictures, "--validation_split",
        0.4, "--num_prompts", 1, "--num_inference_steps", 1, "--clip_model", clip_model, "--dino_model", dino_model,
        "--num_cpu_threads", 1, "--other_prompts", "a cup", "--output_dir", tmp_path / "evaluation", "--device", "cpu",
    ])  # fmt: skip
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["scores"]["out"]["held-out loss"]
    assert abs(wanted - 1) > 2e-3  # ten times the tolerance below
    assert found["mean"] == pytest.approx(wanted, abs=2e-4)


def command(words):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "evaluate.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": ["nowhere/*.safetensors"]}, "--lora nowhere/*.safetensors: no file or folder matches this pattern"),
        ({"lora": ["nowhere/run"]}, "--lora nowhere/run is not a local file or folder"),
        ({"validation_data_dir": None}, "Pass either --validation_data_dir or --validation_split"),
        ({"validation_data_dir": ["nowhere"]}, "nowhere: there is no such folder"),
        ({"validation_data_dir": None, "train_data_dir": None, "validation_split": [0.2]}, "add --train_data_dir"),
        ({"clip_model": ["nowhere/folder/deep"]}, "--clip_model"),
        ({"num_images": [2]}, "--num_images 2: it must be 3 or more"),
        ({"trigger_word": [" "]}, "--trigger_word is empty"),
        ({"judge": ["mini-sd"]}, "'a cup' names nothing that the judges of models/mini-sd know"),
        ({"other_prompts": ["a cup --seed 3"]}, "only infer.py accepts options after a prompt"),
        ({"other_prompts": [""]}, "--other_prompts is empty: write what to draw, or leave the flag out."),
        ({"other_prompts": ["a cup", " \n"]}, "--other_prompts is empty"),
        ({"other_prompts": ["\u2028"]}, "--other_prompts is empty"),
        ({"resolution": [33]}, "--resolution 33: this model needs a multiple of"),
        ({"scheduler": ["dppm"]}, "Did you mean ddpm?"),
        ({"nmu_prompts": [2]}, "Did you mean --num_prompts?"),
        ({"guidance_scale": ["nan"]}, "nan: it must be a number from -1000 to 1000"),
    ],
)
def test_bad_input_is_one_line(words, changes, said, capsys):
    """Calls the command's `main`, which prints the message and exits with code 2 (see the next test)."""
    with pytest.raises(evaluate.InputError) as refused:
        run_here(words(**changes))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not str(refused.value).endswith("..")
    assert not capsys.readouterr().err


def test_bad_input_ends_with_code_2(words, dino_model):
    code, lines = command(words(clip_model=[dino_model]))
    assert code == 2
    assert lines == [f"evaluate.py: {dino_model}: this is a dinov2 model, but --clip_model requires a clip model."]


def test_one_lora_given_twice(words, lora):
    with pytest.raises(evaluate.InputError, match="names a LoRA twice"):
        run_here(words(lora=[lora, f"{lora}:0.5"]))


def test_one_held_out_picture_is_too_few(words, tmp_path):
    with pytest.raises(evaluate.InputError, match="There is 1 held-out picture"):
        run_here(words(validation_data_dir=[write_pictures(tmp_path / "one", 1, seed=3)]))


def test_help_needs_no_torch():
    code = "import sys; from scripts import evaluate; evaluate.build_parser().format_help()\n"
    code += "print(*[name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_checkpoints_lie_in_their_runs(tmp_path):
    from scripts.evaluation.report import find_runs

    class Given:
        def __init__(self, given):
            self.given = given

    loras = {
        "base": None, "1": Given("run/epoch-0001"), "2": Given("run/best"), "3": Given("run"), "4": Given("other"),
    }  # fmt: skip
    assert {label: str(run) for label, run in find_runs(loras).items()} == {
        "1": "run", "2": "run", "3": "run", "4": "other",
    }  # fmt: skip

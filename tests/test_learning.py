"""Whether training learns: the command of the demo on the embedded base model."""

import json
import re
import shlex
import shutil

import pytest
from conftest import ROOT, read_metrics, relative_loss, run_command, train_script

from scripts.mini_sd import judges, measure
from scripts.mini_sd.pipeline import draw_with, load_pipeline


BASE, WEAPONS = ROOT / "models" / "mini-sd", ROOT / "metadata" / "weapons"
WEAPONS_TEST = ROOT / "metadata" / "weapons_test"


def demo_flags():
    """Returns the flags of the training command in the Makefile, so that the test uses what users run."""
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    command = next(line for line in lines if "train_text_to_image_lora.py" in line)
    return shlex.split(command.split("train_text_to_image_lora.py", 1)[1].replace("--output_dir $(RUN)", ""))


def test_the_demos_flags_are_known(monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = train_script.parse_settings([*demo_flags(), "--output_dir", "x"])
    assert settings.batches.max_train_steps == 1000


@pytest.fixture(scope="module")
def demo_lora(tmp_path_factory):
    """Runs the demo's training command without sample pictures."""
    folder = tmp_path_factory.mktemp("demo")
    words = [*demo_flags(), "--num_validation_images", 0, "--report_to", "none"]
    words += ["--output_dir", folder / "out", "--latent_cache_dir", folder / "cache"]
    done = run_command(words, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert re.search(r"176 pictures, \d+ steps an epoch, [\d,]+ steps", done.stdout)
    return folder / "out"


@pytest.mark.long
def test_the_demo_learns(demo_lora):
    """The held-out loss falls, blossoms appear that the base model never draws, and the prompt's colours stay.

    The limits are below the results of `scripts/mini_sd/measure.py` over three seeds (see the model card).
    """
    scenes, judge = measure.weapon_test_scenes(), judges.train_judge(judges.JUDGE, 0)
    prompts, found = [measure.blossom_caption(scene) for scene in scenes], {}
    for name, lora in (("base", None), ("lora", demo_lora)):
        pipeline = load_pipeline(BASE, lora)
        images = draw_with(pipeline, prompts, seed=0, guidance_scale=4.0, num_inference_steps=30)
        found[name] = judges.shares(judge, images, scenes)
    assert relative_loss(demo_lora) < 0.75
    assert found["base"]["blossoms"] < 0.05, found
    assert found["lora"]["blossoms"] > 0.6, found
    assert min(found["lora"][what] for what in ("object_colour", "background_colour", "kind")) > 0.8, found


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Returns eight held-out pictures: enough to measure a run, in a third of the time."""
    folder = tmp_path_factory.mktemp("eight")
    rows = (WEAPONS_TEST / "metadata.jsonl").read_text().splitlines()[::3]
    for row in map(json.loads, rows):
        shutil.copy(WEAPONS_TEST / row["file_name"], folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.long
def test_a_run_that_overfits_is_stopped_and_its_best_is_kept(train_on_weapons, eight, tmp_path, capsys):
    """Four pictures and too strong a LoRA; the losses are also measured by other code and with other noise."""
    (tmp_path / "four").mkdir()
    with open(tmp_path / "four" / "metadata.jsonl", "w") as file:
        for kind in sorted(path for path in WEAPONS.iterdir() if path.is_dir()):
            row = json.loads((kind / "metadata.jsonl").read_text().splitlines()[0])
            shutil.copy(kind / row["file_name"], tmp_path / "four" / f"{kind.name}.png")
            file.write(json.dumps(row | {"file_name": f"{kind.name}.png"}) + "\n")
    out = train_on_weapons(
        tmp_path / "out", train_data_dir=tmp_path / "four", validation_data_dir=eight, rank=64, learning_rate=2e-3,
        max_train_steps=150, validation_steps=15, early_stopping_patience=2,
    )  # fmt: skip
    assert read_metrics(out)[-1]["step"] < 150
    assert re.search(
        r"Validation: best at step \d+, \d+\.\d ± \d+\.\d% below the base model's loss[^;]*; overfitting since step \d+: use",
        capsys.readouterr().out,
    )
    best, last = relative_loss(out / "best"), relative_loss(out)
    assert best < 1
    assert best < 0.97 * last


@pytest.mark.long
def test_a_run_that_still_improves_is_not_stopped(train_on_weapons, eight, tmp_path, capsys):
    out = train_on_weapons(
        tmp_path / "out", validation_data_dir=eight, rank=16, learning_rate=1e-3, max_train_steps=30,
        validation_steps=10, early_stopping_patience=1,
    )  # fmt: skip
    assert read_metrics(out)[-1]["step"] == 30
    assert "Validation: best at step 30" in capsys.readouterr().out

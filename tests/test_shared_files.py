"""What is meant to be shared, such as a LoRA file, its card and its pictures, does not tell where it was made."""

import re
import shutil

import pytest
from conftest import train_here, words_of_run, write_pictures
from PIL import Image

import infer
from text_to_image_lora.models.dialects import WEIGHTS_NAME
from text_to_image_lora.reports.report_page import write_comparison


pytestmark = pytest.mark.usefixtures("library_settings")
TELLING = "the folder of Jane"


@pytest.fixture(scope="module")
def run(tiny_sd, tmp_path_factory):
    """Returns the output folder of a run whose inputs and outputs are all in a folder with a telling name."""
    folder = tmp_path_factory.mktemp("run") / TELLING
    shutil.copytree(tiny_sd, folder / "base")
    write_pictures(folder / "pictures")
    shutil.copy(next((folder / "pictures").glob("*.png")), folder / "pictures" / "copy.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train_here(
            words_of_run(
                folder / "base", folder / "pictures", folder, output_dir=folder / "run", max_train_steps=2,
                checkpointing_steps=1, validation_prompts=["an axe", "an axe --s 2"], num_validation_images=1,
                validation_split=0.2, validation_inference_steps=1, output_kohya_format=True,
                latent_cache_dir=folder / "cache",
            )
        )  # fmt: skip


def telling(path):
    """Returns where a file contains the telling name, as it is or escaped, each with what stands around it."""
    data = path.read_bytes().decode(errors="replace")
    return [data[max(found.start() - 60, 0) : found.end() + 20] for found in re.finditer("of.{1,6}Jane", data)]


def test_nothing_that_is_shared_names_a_folder_of_this_machine(run, tmp_path):
    shared = [
        *run.rglob("*.safetensors"), *run.glob("validation/*/*.png"), run / "README.md", run / "report.html"
    ]  # fmt: skip
    assert len(shared) >= 3 + 2 * 3 + 2
    write_comparison([run, run], run / "comparison.html", "two runs")
    assert {path.name: telling(path) for path in [*shared, run / "comparison.html"]} == {
        path.name: [] for path in [*shared, run / "comparison.html"]
    }
    assert telling(run / "run.yaml")  # the private record of the run, from which --config trains again
    assert "--pretrained_model_name_or_path &#39;base&#39;" in (run / "report.html").read_text(encoding="utf-8")


def test_an_uploaded_checkpoint_names_no_folder_of_this_machine(run):
    files = [path for path in run.glob("checkpoint-*/**/*") if path.is_file()]
    assert files
    assert {path.name: telling(path) for path in files} == {path.name: [] for path in files}


def test_a_sample_picture_draws_itself_again_in_its_folder(run, tmp_path, capsys):
    """The base model's path is in run.yaml, and the LoRA is in a folder above the picture."""
    picture = run / "validation" / "step-000002" / "prompt-00-0.png"
    assert Image.open(picture).text["lora"] == "./run"
    assert Image.open(picture).text["pretrained_model_name_or_path"] == "./base"
    infer.main(["--from_png", str(picture), "--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]


def test_a_sample_picture_elsewhere_says_what_is_missing(run, tmp_path, capsys):
    picture = shutil.copy(run / "validation" / "step-000002" / "prompt-00-0.png", tmp_path)
    for given, missing in (([], "pretrained_model_name_or_path ./base"), (["--lora", str(run)], "pretrained"),
                           (["--pretrained_model_name_or_path", str(run.parent / "base")], "lora ./run")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            infer.main(["--from_png", str(picture), "--output_dir", str(tmp_path / "out"), *given])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert line.startswith(f"infer.py: error: --{missing}")
        assert "records its name, but not in which folder it is" in line
    both = ["--pretrained_model_name_or_path", str(run.parent / "base"), "--lora", str(run)]
    infer.main(["--from_png", str(picture), "--output_dir", str(tmp_path / "out"), *both])


def test_pictures_of_infer_name_folders_from_the_current_or_home_folder(run, tmp_path, monkeypatch):
    """So that they draw themselves again, and do not tell the name of an account."""
    for here, home in ((run.parent, tmp_path), (tmp_path, run.parent)):
        monkeypatch.chdir(here)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("USERPROFILE", str(home))
        out = tmp_path / ("here" if home == tmp_path else "home")
        infer.main(
            ["--pretrained_model_name_or_path", str(run.parent / "base"), "--lora", str(run / WEIGHTS_NAME),
             "--prompt", "an axe", "--num_inference_steps", "1", "--grid", "lora_scale=0,1", "--output_dir", str(out)]
        )  # fmt: skip
        assert {path.name: telling(path) for path in out.iterdir()} == {path.name: [] for path in out.iterdir()}
        again = next(out.glob("*-lora_scale1.png"))
        infer.main(["--from_png", str(again), "--output_dir", str(out / "again")])
        assert Image.open(out / "again" / again.name).tobytes() == Image.open(again).tobytes()

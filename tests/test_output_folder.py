"""Whatever the output folder is called and holds: a run writes all of its files into it, and replaces only those of runs."""

import json

import pytest
from conftest import read_lora, refusal_of

from text_to_image_lora.training import inputs


@pytest.mark.parametrize("name", ["mine.safetensors", "Mine.SAFETENSORS", "a.b.safetensors"])
def test_a_folder_that_is_called_like_a_file(train, tmp_path, name):
    """The run has trained when it writes the LoRA, which must not fail then."""
    folder = train(output_dir=tmp_path / name, output_kohya_format=True)
    assert read_lora(folder)
    assert (folder / f"{name}.safetensors").is_file()


@pytest.mark.parametrize("name", ["README.md", "report.html", "metrics.jsonl", "pytorch_lora_weights.safetensors"])
def test_files_that_no_run_has_written_are_kept(train, tmp_path, name):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / name).write_text("mine")
    message = refusal_of(train, output_dir=folder)
    assert name in message
    assert "Move it" in message
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "mine"}


def test_the_lora_file_of_another_program_is_kept(train, tmp_path):
    folder = tmp_path / "knights"
    folder.mkdir()
    (folder / "knights.safetensors").write_text("mine")
    assert "knights.safetensors" in refusal_of(train, output_dir=folder, output_kohya_format=True)
    train(output_dir=folder)  # it does not write this file
    assert (folder / "knights.safetensors").read_text() == "mine"


def test_a_dry_run_keeps_a_dataset_json_that_it_has_not_written(tmp_path, arguments):
    folder = tmp_path / "pictures"
    words = arguments(output_dir=folder, dry_run=True)
    for text in ("mine", "[]", json.dumps({"name": "mine"})):
        (folder / "dataset.json").write_text(text)
        message = refusal_of(inputs.check_rest, *settings_and_base(words))
        assert "dataset.json" in message
        assert (folder / "dataset.json").read_text() == text


def settings_and_base(words):
    import train_text_to_image_lora as script

    settings = script.parse_settings(words)
    return settings, inputs.find_base(settings)


def test_the_files_of_a_run_are_replaced(train, tmp_path):
    """Also those of dry runs, which come first."""
    folder = tmp_path / "out"
    for _ in range(2):
        train(output_dir=folder, dry_run=True)
    train(output_dir=folder)
    train(output_dir=folder, max_train_steps=3)
    assert (folder / "README.md").read_text().startswith("---")
    assert "3" in (folder / "metrics.jsonl").read_text().splitlines()[-1]

"""A token is in no message, no file and no tracker, however it was given."""

import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, quick_python

import train_text_to_image_lora as script
from text_to_image_lora import redaction
from text_to_image_lora.command_line import recorded_values
from text_to_image_lora.errors import InputError
from text_to_image_lora.files import write_whole


FIRST, SECOND = "hf_aaaaaaaaaaaaaaaaaaaa", ["my-first-pass", "phrase"][0]  # one has the shape of a token


def run(script, *words):
    """Runs a command that has to be refused, and returns everything that it printed."""
    done = subprocess.run(
        [quick_python().python, script, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch):
    monkeypatch.setattr(redaction, "SECRETS", set())


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", FIRST, "--hub_token", SECOND],
        [f"--hub_token={SECOND}", f"--hub_token={FIRST}"],
        ["--hub_token", SECOND, FIRST],
        ["--rankk", "4", "--hub_token", SECOND],
        ["--hub_token", SECOND, "--output_dir", SECOND],
        ["--hub_token", SECOND, "--train_data_dir", f"https://me:{SECOND}@huggingface.co/datasets/me/axes"],
        ["--train_data_dir", f"https://me:{FIRST}@example.com/axes?token={FIRST}"],
        ["--pretrained_model_name_or_path", f"https://{FIRST}@huggingface.co/me/model"],
        ["--rank", FIRST],
    ],
)
@pytest.mark.parametrize("script", ["train_text_to_image_lora.py", "infer.py"])
def test_no_refusal_tells_a_token(words, script):
    said = run(script, *words)
    assert FIRST not in said
    if script == "train_text_to_image_lora.py":  # the other one has no flag for a token
        assert SECOND not in said


@pytest.mark.parametrize("value", [[SECOND, FIRST], {"a": FIRST}, FIRST])
def test_no_refusal_tells_a_token_of_a_recipe(tmp_path, value):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"hub_token": value, "rank": 0}))
    said = run("train_text_to_image_lora.py", "--config", tmp_path / "recipe.yaml")
    assert "recipe.yaml" in said
    assert FIRST not in said
    assert SECOND not in said


def test_neither_records_nor_the_command_hold_a_token(monkeypatch):
    words = ["--pretrained_model_name_or_path", str(ROOT / "models/mini-sd"), "--train_data_dir", str(ROOT / "metadata/creatures"),
             "--hub_token", FIRST, "--hub_token", SECOND, "--trigger_word", SECOND, "--validation_prompts", "an axe", f"a {FIRST}",
             "--num_validation_images", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_text_to_image_lora.py", *words])
    settings = script.parse_settings()
    assert settings.sharing.hub_token == SECOND
    assert not [word for word in sys.argv if FIRST in word or SECOND in word]
    recorded = recorded_values(settings)
    assert "hub_token" not in recorded
    assert recorded["trigger_word"] == "***"
    assert recorded["validation_prompts"] == ["an axe", "a ***"]


def test_a_token_of_the_environment_is_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", SECOND)
    script.build_parser().take_words([])
    write_whole(tmp_path / "a.txt", f"key {SECOND}")
    assert (tmp_path / "a.txt").read_text() == "key ***"
    assert str(InputError(f"no {SECOND}.")) == "no ***."


@pytest.mark.parametrize(
    "text",
    ["the hf_hub", "me@example.com", "https://example.com/a@b", "a:b@c", "photo?token", "https://huggingface.co/a/b?x=1&tokens=3",
     "revision 0123456789abcdef0123456789abcdef01234567", ""],
)  # fmt: skip
def test_what_is_no_secret_is_shown(text):
    redaction.hide(["", "abc"])  # too short to be masked inside of other words
    assert redaction.redact(text) == text

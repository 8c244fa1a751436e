"""The settings of a sweep: words and values of the command line, and the bundled files."""

from pathlib import Path

import pytest
from conftest import ROOT

from scripts import sweep
from scripts.sweeping.settings import SweepError, parse_values, settle, to_words


def test_true_and_false_switch_and_are_names():
    flags = {"random_flip": True, "allow_tf32": "false", "init_lora_weights": True, "rank": 4, "report_to": None}
    assert to_words(flags) == [
        "--random_flip", "--no-allow_tf32", "--init_lora_weights", "true", "--rank", "4"
    ]  # fmt: skip


def test_what_a_file_fixes_can_be_varied(tmp_path):
    """Uses the bundled files; a flag that the command line both fixes and varies is refused."""
    for name in ("weapons", "creatures"):
        args = sweep.parse_args([
            str(ROOT / f"scripts/sweeps/{name}.yaml"), "--sweep_dir", str(tmp_path), "--sweep", "learning_rate=1e-3,5e-3"
        ])  # fmt: skip
        settings = settle(args)
        assert settings["sweep"] == {"learning_rate": [1e-3, 5e-3]}
        assert "learning_rate" not in settings["flags"]
        assert settings["flags"]["train_batch_size"] == "4"


def test_words_are_words_and_numbers_numbers():
    """Unlike in YAML, `no` and `off` are not false; the type of the flag decides what a value is."""
    assert parse_values("mixed_precision", "no,bf16") == ["no", "bf16"]
    assert parse_values("compile", "off,blocks") == ["off", "blocks"]
    assert parse_values("learning_rate", "4,-1,1e-4,.5,2.") == [4, -1, 1e-4, 0.5, 2.0]
    assert parse_values("center_crop", "true,false,null") == [True, False, None]
    assert parse_values("snr_gamma", "null,5") == [None, 5]
    assert parse_values("train_batch_size", "auto,4") == ["auto", 4]
    assert parse_values("train_data_dir", "../a,../b") == ["../a", "../b"]
    assert parse_values("trigger_word", "007,1.10,1e3,true") == ["007", "1.10", "1e3", "true"]
    assert parse_values("learning_rate", "1e-4..1e-2") == {"min": 1e-4, "max": 1e-2, "log": True}
    assert parse_values("instance_prompt", "1..2") == ["1..2"]


def test_a_file_keeps_the_spelling_of_text(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "sweep_dir: ~/2024_01_15\nnum_trials: 7\nseed: 3\nprune: yes\nsampler: tpe\n"
        "sweep:\n  trigger_word: [007, 12:30, no]\n  rank: [4, 16]\n  snr_gamma: [null, 5.0]\n  random_flip: [true, no]\n"
        "  learning_rate: {min: 1e-5, max: 1.0e-3, log: true}\n"
        "flags:\n  caption_prefix: 0x1F\n  center_crop: yes\n  validation_split: 0.1\n  mixed_precision: no\n"
        "  validation_prompts: [1_000, off]\n"
    )
    settings = settle(sweep.parse_args([str(path)]))
    assert settings["sweep_dir"] == Path.home() / "2024_01_15"
    assert (settings["num_trials"], settings["seed"], settings["prune"]) == (7, 3, True)
    assert settings["sweep"] == {
        "trigger_word": ["007", "12:30", "no"], "rank": [4, 16], "snr_gamma": [None, 5.0], "random_flip": [True, False],
        "learning_rate": {"min": 1e-5, "max": 1e-3, "log": True},
    }  # fmt: skip
    assert to_words(settings["flags"]) == [
        "--caption_prefix", "0x1F", "--center_crop", "--validation_split", "0.1", "--mixed_precision", "no",
        "--validation_prompts", "1_000", "off",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("varied", "fixed", "wrong"),
    [
        ("train_data_dir=a,b", ["validation_split=0.1"], "train_data_dir"),
        ("dataset_name=a,b", ["validation_split=0.1"], "dataset_name"),
        ("validation_split=0.1,0.2", ["train_data_dir=a"], "validation_split"),
        ("validation_data_dir=a,b", ["train_data_dir=a"], "validation_data_dir"),
        ("train_data_dir=a,b", ["validation_data_dir=c"], None),
        ("caption_dropout=0,0.1", ["train_data_dir=a", "validation_split=0.1"], None),
    ],
)
def test_trials_that_hold_out_different_pictures_are_refused(tmp_path, varied, fixed, wrong):
    """Their losses could not be compared."""
    args = sweep.parse_args(["--sweep_dir", str(tmp_path), "--sweep", varied, "--flags", *fixed])
    if wrong is None:
        settle(args)
        return
    with pytest.raises(SweepError, match=f"{wrong}: trials that are validated on different pictures can't be ranked"):
        settle(args)

"""The settings of a sweep: words and values of the command line, and the bundled files."""

from pathlib import Path

import pytest
from conftest import ROOT

from scripts import sweep
from scripts.sweeping.settings import SweepError, parse_values, settle, to_words
from scripts.sweeping.study import suggest


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


START = "sweep_dir: out\nflags: {train_data_dir: a, validation_split: 0.1}\n"
REFUSED = {
    "a number between": ("sampler: random\nsweep: {rank: {min: 4, max: 4.5}}", "--rank 4.5: it must be a whole number"),
    "a list in a list": ("sweep: {rank: [[4], [5]]}", r"rank: \['4'\] is no value of this flag"),
    "a mapping": ("sweep: {rank: [{a: 1}]}", "rank: {'a': '1'} is no value of this flag"),
    "null": ("sweep: {rank: [null]}", "rank: null is no value of this flag. Write its default, "),
    "null in a list": ("sweep: {validation_prompts: [[a, null]]}", "holds more than plain values"),
    "a flag in a list": ("sweep: {validation_prompts: [[a, --rank, '8']]}", "holds a text that begins with --"),
    "a word": ("sweep: {rank: [four]}", "--rank four: it must be a whole number"),
    "below the bounds": ("sweep: {learning_rate: [-1, 1e-4]}", "--learning_rate -1: it must be"),
    "no choice": ("sweep: {mixed_precision: [fp17]}", "--mixed_precision"),
    "no switch": ("sweep: {random_flip: [maybe]}", "random_flip is a switch: write true or false, not maybe"),
    "a range of words": ("sampler: tpe\nsweep: {trigger_word: {min: 1, max: 2}}", "only numbers have a range"),
    "a range with a step": ("sampler: tpe\nsweep: {rank: {min: 1, max: 9, step: 2}}", "step is not known"),
    "a log of words": ("sampler: tpe\nsweep: {rank: {min: 1, max: 9, log: maybe}}", "a range is min..max"),
    "infinite": ("sampler: random\nsweep: {learning_rate: {min: 1e-4, max: 1e400}}", "two finite numbers"),
    "infinite as whole": ("sampler: random\nsweep: {rank: {min: 1, max: 1" + "0" * 400 + "}}", "two finite numbers"),
    "beyond the flag": ("sampler: tpe\nsweep: {lora_dropout: {min: 0, max: 7}}", "--lora_dropout 7: it must be"),
    "prune": ("prune: maybe\nsweep: {rank: [4]}", "prune maybe: write true or false"),
    "no launcher": ("launcher: /nonexistent\nsweep: {rank: [4]}", "there is no command /nonexistent"),
    "an open quote": ("launcher: \"x 'y\"\nsweep: {rank: [4]}", "it can't be divided into words"),
    "a list as launcher": ("launcher: [a]\nsweep: {rank: [4]}", "it must be a command"),
    "a blank launcher": ("launcher: ' '\nsweep: {rank: [4]}", "it must be a command"),
    "a list as folder": ("sweep_dir: [a]\nsweep: {rank: [4]}", "it must be the path of a folder"),
    "a mapping as folder": ("sweep_dir: {a: 1}\nsweep: {rank: [4]}", "it must be the path of a folder"),
    "a blank folder": ("sweep_dir: ' '\nsweep: {rank: [4]}", "it must be the path of a folder"),
    "a fixed mapping": ("flags: {validation_split: {a: 1}}\nsweep: {rank: [4]}", "validation_split: {'a': '1'} is no value"),
    "a fixed word": ("flags: {validation_split: x}\nsweep: {rank: [4]}", "--validation_split x: it must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_training_accepts_is_refused_before_a_trial_starts(case, tmp_path):
    text, message = REFUSED[case]
    keys = {line.partition(":")[0] for line in text.splitlines()}
    start = [line for line in START.splitlines() if line.partition(":")[0] not in keys]
    path = tmp_path / "sweep.yaml"
    path.write_text("\n".join([*start, text]))
    with pytest.raises(SweepError, match=message):
        settle(sweep.parse_args([str(path)]))


def test_lists_are_values_of_flags_that_take_several(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(START + "sweep:\n  validation_prompts: [[a, b], c]\n  snr_gamma: [null, 5]\n")
    found = settle(sweep.parse_args([str(path)]))["sweep"]
    assert found == {"validation_prompts": [["a", "b"], "c"], "snr_gamma": [None, 5]}


def test_a_sweep_compares_resolutions_and_several_at_once(tmp_path):
    """On the command line, each value is a resolution to compare."""
    path = tmp_path / "sweep.yaml"
    path.write_text(START + "sweep:\n  resolution: [64, [64, 96], 96]\n")
    found = settle(sweep.parse_args([str(path)]))
    words = [to_words({"resolution": value}) for value in found["sweep"]["resolution"]]
    assert words == [["--resolution", "64"], ["--resolution", "64", "96"], ["--resolution", "96"]]
    assert settle(sweep.parse_args([str(path), "--sweep", "resolution=64,96"]))["sweep"] == {"resolution": [64, 96]}
    path.write_text(START + "sweep:\n  resolution: [[64, 64]]\n")
    with pytest.raises(SweepError, match="--resolution 64 64: it must be different numbers"):
        settle(sweep.parse_args([str(path)]))


@pytest.mark.parametrize("low", ["0", "0.0", "1e-3"])
def test_a_range_of_numbers_holds_those_between_whole_ones(tmp_path, low):
    optuna = pytest.importorskip("optuna")
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"{START}sampler: random\nsweep: {{random_contrast: {{min: {low}, max: 1}}, rank: {{min: 2, max: 9}}}}\n"
    )
    found = settle(sweep.parse_args([str(path)]))["sweep"]
    params = suggest(optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask(), found)
    assert 0 < params["random_contrast"] < 1
    assert isinstance(params["rank"], int)

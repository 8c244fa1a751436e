"""What a sweep is to do: words and values of the command line, and the project's own files."""

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
    """With the project's own files; what the command line both fixes and varies is still refused."""
    for name in ("weapons", "creatures"):
        args = sweep.parse_args([
            str(ROOT / f"scripts/sweeps/{name}.yaml"), "--sweep_dir", str(tmp_path), "--sweep", "learning_rate=1e-3,5e-3"
        ])  # fmt: skip
        settings = settle(args)
        assert settings["sweep"] == {"learning_rate": [1e-3, 5e-3]}
        assert "learning_rate" not in settings["flags"]
        assert settings["flags"]["train_batch_size"] == 4


def test_words_are_words_and_numbers_numbers():
    """Not as YAML has it, to which `no` and `off` are false."""
    assert parse_values("no,bf16") == ["no", "bf16"]
    assert parse_values("off,blocks") == ["off", "blocks"]
    assert parse_values("4,-1,1e-4,.5,2.") == [4, -1, 1e-4, 0.5, 2.0]
    assert parse_values("true,false,null") == [True, False, None]
    assert parse_values("../a,../b") == ["../a", "../b"]
    assert parse_values("1e-4..1e-2") == {"min": 1e-4, "max": 1e-2, "log": True}


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

"""The settings of a sweep: words and values of the command line, and the bundled files."""

from conftest import ROOT

from scripts import sweep
from scripts.sweeping.settings import parse_values, settle, to_words


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
        assert settings["flags"]["train_batch_size"] == 4


def test_words_are_words_and_numbers_numbers():
    """Unlike in YAML, `no` and `off` are not false."""
    assert parse_values("no,bf16") == ["no", "bf16"]
    assert parse_values("off,blocks") == ["off", "blocks"]
    assert parse_values("4,-1,1e-4,.5,2.") == [4, -1, 1e-4, 0.5, 2.0]
    assert parse_values("true,false,null") == [True, False, None]
    assert parse_values("../a,../b") == ["../a", "../b"]
    assert parse_values("1e-4..1e-2") == {"min": 1e-4, "max": 1e-2, "log": True}

"""Tests how benchmark.py times steps: medians and ratios of turns, and the real command."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts.benchmarks import steps
from scripts.benchmarks.runs import Result


def turn_of(**seconds):
    """Returns a turn with runs of 2 and 12 steps, in which each runner takes these seconds per step and 5 s to start."""

    def result(count, step):
        figures = {"median": step, "start": 4 + step, "step_seconds": [step]}
        return Result(5 + count * step, 1.0 + count / 100, 2.0 + step, figures)

    return {name.replace("_", " "): {n: result(n, step) for n in (2, 12)} for name, step in seconds.items()}


def test_medians_and_ratios_of_turns():
    """One turn in which the machine was busy changes neither a median nor a ratio."""
    turns = [
        turn_of(ours=2.0, bare_UNet=1.0, baseline=3.0),
        turn_of(ours=20.0, bare_UNet=10.0, baseline=3.0),
        turn_of(ours=2.2, bare_UNet=1.0, baseline=3.3),
    ]
    counted = {name: {"operators": {"mm": 3, "add": 4}, "flops": 6e12} for name in turns[0]}
    results = steps.results_of(turns, counted, [9e12, 1e13, 3e13], short=2, long=12)
    assert json.loads(json.dumps(results))["runners"].keys() == turns[0].keys()
    assert results["matrix_rate"] == 1e13
    ours = results["runners"]["ours"]
    assert (ours["step_seconds"], ours["operators"], ours["flops"]) == (2.2, 7, 6e12)
    assert ours["step_seconds_by_commands"] == pytest.approx(2.2)
    assert ours["start_seconds"] == pytest.approx(6.2)
    assert ours["mfu"] == pytest.approx(6 / 2.2 / 10)
    assert (ours["memory_gib"], ours["peak_memory_gib"]) == (pytest.approx(1.12), 22)
    assert [(r["steps"], r["figures"]["median"]) for r in ours["runs"]][:3] == [(2, 2.0), (12, 2.0), (2, 20.0)]
    assert results["ratios"]["ours / bare UNet"] == {"median": 2.0, "turns": [2.0, 2.0, 2.2]}
    assert results["ratios"]["baseline / ours"]["median"] == pytest.approx(1.5)
    table = steps.table_of(results, "bf16")
    assert "| ours | 2.2 | 2.2 | 6.2 | 6 | 27.3% | 7 | 1.12 | 22.00 |" in table
    assert table.splitlines()[-3:] == [
        "Matrix rate (bf16): 10 TFLOP/s",
        "ours / bare UNet: 2.00 (turns: 2.00, 2.00, 2.20)",
        "baseline / ours: 1.50 (turns: 1.50, 0.15, 1.50)",
    ]


@pytest.mark.long
def test_steps_are_timed_beside_the_bare_unet_and_a_baseline(tiny_sd, tmp_path):
    words = [
        "--model", tiny_sd, "--resolution", 32, "--train_batch_size", 2, "--rank", 2, "--repeats", 1, "--bare_unet",
    ]  # fmt: skip
    words += ["--short", 2, "--long", 4, "--json", tmp_path / "times.json", "--work_dir", tmp_path]
    words += ["--baseline", "train_text_to_image_lora.py"]
    words += ["--baseline_flags", "--report_to", "none", "--latent_cache_dir", tmp_path / "cache"]
    command = [sys.executable, "scripts/benchmark.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "times.json").read_text())
    assert results["arguments"]["train_batch_size"] == 2
    assert results["machine"]["threads"] == 1
    assert steps.table_of(results, "float32") in done.stdout
    ours, bare, baseline = (results["runners"][name] for name in ("ours", "bare UNet", "baseline"))
    assert ours["operators_by_kind"] == baseline["operators_by_kind"]
    assert bare["operators"] < ours["operators"]
    assert [len(r["figures"]["step_seconds"]) for r in ours["runs"]] == [1, 3]

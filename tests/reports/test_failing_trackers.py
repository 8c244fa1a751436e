"""A tracker dies in the middle of a run: training continues, says so once, and everything is on disk."""

import contextlib
import os
import subprocess
import sys
import time

import psutil
from conftest import ROOT, read_lora, read_metrics


@contextlib.contextmanager
def started(words, log):
    """Starts the command, and kills it at the end of the test."""
    # W&B must start its own process, and not use the one that another test has started.
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train_text_to_image_lora.py", *words], stdout=file, stderr=subprocess.STDOUT,
            env=own | {"ACCELERATE_USE_CPU": "true", "WANDB_MODE": "offline"},
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_wandbs_process_is_killed(arguments, tmp_path):
    """W&B logs through a separate process."""
    steps, log, metrics = 40, tmp_path / "log", tmp_path / "out" / "metrics.jsonl"
    words = arguments(report_to="wandb", max_train_steps=steps, validation_prompt="a red axe")
    with started(words, log) as process:
        deadline, children = time.monotonic() + 120, []
        while not (metrics.exists() and metrics.read_text().count("train_loss") >= 2):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = [child for child in psutil.Process(process.pid).children(recursive=True) if "wandb" in child.name()]
        assert children, "W&B has no process of its own any more: this test kills nothing"
        for child in children:
            child.kill()
        assert process.wait(180) == 0, log.read_text()
    said = log.read_text()
    assert said.count("the run continues without it, and all metrics are in metrics.jsonl") == 1, said
    assert "Traceback" not in said
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == list(range(1, steps + 1))
    assert (tmp_path / "out" / "validation" / f"step-{steps:06d}" / "sheet.png").is_file()
    assert len(read_lora(tmp_path / "out")) == 60

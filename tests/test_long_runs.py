"""The resources of a long run do not grow."""

import statistics
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, read_metrics


STEPS = 5000


@pytest.mark.long
def test_thousands_of_steps_grow_nothing(arguments, tmp_path):
    """Memory, open files, threads and the time per step stay constant, with checkpoints and loader workers."""
    words = arguments(
        max_train_steps=STEPS, train_batch_size=1, rank=1, checkpointing_steps=1000, checkpoints_total_limit=1,
        learning_rate=1e-4, dataloader_num_workers=1, random_flip=True,
    )  # fmt: skip
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train_text_to_image_lora.py", *words], stdout=log, stderr=subprocess.STDOUT
        )
    watched, metrics, looks = psutil.Process(process.pid), tmp_path / "out" / "metrics.jsonl", []
    while process.poll() is None:
        size = metrics.stat().st_size if metrics.exists() else 0
        if size and (not looks or size > looks[-1][0] * 1.01):
            try:
                cpu = sum(watched.cpu_times()[:2])
                looks.append((size, watched.memory_info().rss, watched.num_fds(), watched.num_threads(), cpu))
            except psutil.NoSuchProcess:
                break
        time.sleep(0.2)
    assert process.wait() == 0, (tmp_path / "log").read_text()
    rows = read_metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # After a fifth of the run, everything is allocated; at the end, the LoRA file is written.
    total = metrics.stat().st_size
    steady = [look for look in looks if total / 5 < look[0] < 0.98 * total]
    assert len(steady) > 20
    third = len(steady) // 3
    # The minimum of open files and threads, because a file that is being written, or a batch in transfer, is one more.
    for what, usual, tolerance in ((1, statistics.median, 2.5 * 2**20), (2, min, 0), (3, min, 0)):
        first, last = (usual(look[what] for look in part) for part in (steady[:third], steady[-third:]))
        assert last <= first + tolerance, (what, first, last)
    # CPU time, which depends least on other programs, per byte of metrics.jsonl, whose lines have equal lengths.
    first, last = (
        (part[-1][4] - part[0][4]) / (part[-1][0] - part[0][0]) for part in (steady[:third], steady[-third:])
    )
    assert last < 1.5 * first, (first, last)

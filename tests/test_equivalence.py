"""The same run, cut differently: batch, accumulation, processes."""

import pytest
import torch
from conftest import TORCHRUN, read_lora, read_metrics, run_command, write_pictures


def assert_same_run(first, second):
    """Equal to rounding: losses and gradient norms of each step, and the weights at the end."""
    for a, b in zip(read_metrics(first), read_metrics(second), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    a, b = read_lora(first), read_lora(second)
    assert a.keys() == b.keys()
    difference = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm()
    assert difference < 1e-3 * torch.cat([a[k].flatten() for k in a]).norm()


# 6 pictures in effective batches of 4: every second step is a short one.
COMMON = dict(max_train_steps=4, learning_rate=1e-3, snr_gamma=5.0, noise_offset=0.1, random_flip=True)


@pytest.fixture
def whole(train, tmp_path):
    return train(train_batch_size=4, output_dir=tmp_path / "whole", **COMMON)


def test_batch_equals_accumulation(train, whole, tmp_path):
    parts = train(train_batch_size=1, gradient_accumulation_steps=4, output_dir=tmp_path / "parts", **COMMON)
    assert_same_run(whole, parts)


def test_a_short_batch_is_not_counted_twice(train, whole, tmp_path):
    other = train(train_batch_size=3, output_dir=tmp_path / "other", **COMMON)
    with pytest.raises(AssertionError):
        assert_same_run(whole, other)


def test_two_processes_equal_one_with_twice_the_batch(arguments, whole, tmp_path):
    words = arguments(train_batch_size=2, output_dir=tmp_path / "two", **COMMON)
    done = run_command(words, TORCHRUN, env={"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, tmp_path / "two")


def test_two_processes_share_buckets_balance_and_preview(train, arguments, tmp_path, capsys):
    """Five samples an epoch of each shape: steps of 4 and of 1, where the second process has none of its own."""
    write_pictures(tmp_path / "set" / "axe", count=5, size=(90, 40))
    write_pictures(tmp_path / "set" / "spear", count=2, size=(40, 90), seed=1)
    options = dict(
        train_data_dir=tmp_path / "set", aspect_ratio_buckets=True, balance="concept", max_train_steps=6,
        learning_rate=1e-3,
    )  # fmt: skip
    sheets = [tmp_path / name / "sheet.png" for name in ("one", "two")]
    whole = train(train_batch_size=4, output_dir=tmp_path / "whole", preview_data=sheets[0], **options)
    alone = capsys.readouterr().out
    words = arguments(train_batch_size=2, output_dir=tmp_path / "shared", preview_data=sheets[1], **options)
    done = run_command(words, TORCHRUN, env={"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, tmp_path / "shared")
    assert sheets[1].read_bytes() == sheets[0].read_bytes()
    assert list(sheets[1].parent.iterdir()) == [sheets[1]]
    for line in (
        "bucket        pictures  samples an epoch",
        "48x16                5                 5",
        "16x48                2                 5",
        "concept axe: 5 pictures, 5 samples an epoch",
        "concept spear: 2 pictures, 5 samples an epoch",
        "what the model will see: ",
        "7 pictures, 4 steps an epoch, 6 steps; effective batch 4 on ",
    ):
        assert alone.count(line) == done.stdout.count(line) == 1

"""One run gives equal results with other batch sizes, gradient accumulation, and numbers of processes."""

import contextlib
import io
from types import SimpleNamespace

import pytest
from conftest import (
    TORCHRUN,
    assert_same_weights,
    make_transparent,
    read_lora,
    read_metrics,
    run_command,
    words_of_run,
    write_pictures,
)
from PIL import Image


def assert_same_run(first, second):
    """Checks that the losses and gradient norms of all steps and the final weights are equal up to rounding."""
    for a, b in zip(read_metrics(first), read_metrics(second), strict=True):
        assert a["lr"] == b["lr"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert_same_weights(first, second)


# Three of the pictures have transparent parts. An epoch has five steps of an effective batch of 4: ten samples of one shape (4, 4, 2), five of another (4, 1).
COMMON = dict(
    aspect_ratio_buckets=True, balance="concept", max_train_steps=6, learning_rate=1e-3, lr_scheduler="linear",
    lr_warmup_steps=2, snr_gamma=5.0, noise_offset=0.1, random_flip=True, alpha_mask=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    write_pictures(folder / "pictures" / "axe", count=5, size=(90, 40))
    write_pictures(folder / "pictures" / "spear", count=2, size=(40, 90), seed=1)
    write_pictures(folder / "pictures" / "whip", count=1, size=(90, 40), seed=2)
    make_transparent(folder / "pictures" / "axe", (1, 4))
    make_transparent(folder / "pictures" / "spear", (0,), first=0)
    return folder


@pytest.fixture(scope="module")
def one(folder, train_in):
    """A run in one process, and its output."""
    options = dict(output_dir=folder / "whole", preview_data=folder / "one" / "sheet.png")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        out = train_in(folder, train_batch_size=4, **options, **COMMON)
    return SimpleNamespace(folder=out, said=said.getvalue())


@pytest.fixture(scope="module")
def whole(one):
    return one.folder


@pytest.fixture(scope="module")
def two(folder, tiny_sd, one):
    """The run on two processes with half the batch size; in one step, the second process has no sample."""
    options = dict(output_dir=folder / "two", preview_data=folder / "other" / "sheet.png", train_batch_size=2)
    words = words_of_run(tiny_sd, folder / "pictures", folder, **options, **COMMON)
    done = run_command(words, TORCHRUN, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder / "two", said=done.stdout)


def test_batch_equals_accumulation(folder, train_in, whole):
    parts = dict(train_batch_size=1, gradient_accumulation_steps=4, output_dir=folder / "parts")
    assert_same_run(whole, train_in(folder, **parts, **COMMON))


def test_a_short_batch_is_not_counted_twice(folder, train_in, whole):
    other = train_in(folder, train_batch_size=3, output_dir=folder / "other cut", **COMMON)
    with pytest.raises(AssertionError):
        assert_same_run(whole, other)


def test_the_transparent_parts_matter(folder, train_in, whole):
    """Shows that the runs of this file train on opaque parts alone."""
    plain = train_in(folder, train_batch_size=4, output_dir=folder / "plain", **COMMON | dict(alpha_mask=False))
    with pytest.raises(AssertionError):
        assert_same_run(whole, plain)


def test_two_processes_equal_one_with_twice_the_batch(whole, two):
    """The learning rates too: a schedule prepared by Accelerate would make one step per process."""
    assert_same_run(whole, two.folder)
    assert [row["lr"] / 1e-3 for row in read_metrics(whole)] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])


def test_two_processes_share_buckets_balance_and_preview(folder, one, two):
    sheets = [folder / name / "sheet.png" for name in ("one", "other")]
    assert sheets[1].read_bytes() == sheets[0].read_bytes()
    assert list(sheets[1].parent.iterdir()) == [sheets[1]]
    for line in (
        "bucket        pictures  samples per epoch",
        "48x16                6                 10",
        "16x48                2                  5",
        "concept axe: 5 pictures, 5 samples per epoch",
        "concept spear: 2 pictures, 5 samples per epoch",
        "concept whip: 1 picture, 5 samples per epoch",
        "what the model will see: ",
        "8 pictures, 5 steps an epoch, 6 steps (1.2 epochs); effective batch 4 on ",
    ):
        assert one.said.count(line) == two.said.count(line) == 1


# Two resolutions: at 40, steps of (4, 1) and of 2 samples; at 32, where the whip is too small for 40, of (4, 2) and of 2.
SEVERAL = COMMON | dict(
    resolution=[40, 32], balance=None, max_train_steps=7, train_data_dir="several", random_flip=False, center_crop=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Returns a folder with pictures of unequal sizes, of which two have masks, and the flags for them."""
    folder = tmp_path_factory.mktemp("several")
    write_pictures(folder / "several" / "axe", count=5, size=(90, 40))
    write_pictures(folder / "several" / "spear", count=2, size=(40, 90), seed=1)
    write_pictures(folder / "several" / "whip", count=1, size=(60, 20), seed=2)
    for name in ("axe/1", "spear/0"):
        with Image.open(folder / "several" / f"{name}.png") as picture:
            mask = Image.new("L", picture.size)
        mask.paste(255, (0, 0, 30, 30))
        mask.save(folder / "several" / f"{name}.mask.png")
    return SimpleNamespace(folder=folder, flags=SEVERAL | {"train_data_dir": folder / "several"})


@pytest.fixture(scope="module")
def one_of_several(several, train_in):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        out = train_in(several.folder, train_batch_size=4, output_dir=several.folder / "whole", **several.flags)
    return SimpleNamespace(folder=out, said=said.getvalue())


def test_several_resolutions_are_trained_by_turns(one_of_several):
    for line in (
        "1 of 8 pictures are too small for --resolution 40 and are not trained at it",
        "48x16                6                  6",
        "56x24                5                  5",
        "16x48                2                  2",
        "24x56                2                  2",
        "8 pictures (15 with their sizes), 6 steps an epoch, 7 steps (1.17 epochs); effective batch 4 on ",
    ):
        assert one_of_several.said.count(line) == 1, one_of_several.said


def test_batch_equals_accumulation_at_several_resolutions(several, train_in, one_of_several):
    options = several.flags | dict(train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_run(one_of_several.folder, train_in(several.folder, output_dir=several.folder / "parts", **options))


def test_cached_equals_live_at_several_resolutions(several, train_in, one_of_several):
    options = several.flags | dict(train_batch_size=4, cache_variations=0)
    assert_same_run(one_of_several.folder, train_in(several.folder, output_dir=several.folder / "live", **options))


def test_the_order_of_the_resolutions_changes_nothing(several, train_in, one_of_several):
    options = several.flags | dict(train_batch_size=4, resolution=[32, 40])
    again = train_in(several.folder, output_dir=several.folder / "sorted", **options)
    assert read_lora(again).keys() == read_lora(one_of_several.folder).keys()
    assert all(value.equal(read_lora(again)[name]) for name, value in read_lora(one_of_several.folder).items())


def test_a_single_resolution_of_these_pictures_is_another_run(several, train_in, one_of_several):
    """Shows that the comparisons above see whether both resolutions are trained."""
    options = several.flags | dict(train_batch_size=4, resolution=32)
    with pytest.raises((AssertionError, ValueError)):
        assert_same_run(
            one_of_several.folder, train_in(several.folder, output_dir=several.folder / "single", **options)
        )


@pytest.mark.long
def test_two_processes_equal_one_at_several_resolutions(several, tiny_sd, one_of_several):
    out = several.folder / "two"
    options = several.flags | dict(train_batch_size=2, output_dir=out)
    words = words_of_run(tiny_sd, several.folder / "several", several.folder, **options)
    done = run_command(words, TORCHRUN, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert_same_run(one_of_several.folder, out)
    for line in one_of_several.said.splitlines():
        if "resolution" in line or line.rpartition("x")[0].isdecimal():
            assert line in done.stdout


WHOLE = dict(train_text_encoder=True, validation_split=0.3, validation_steps=2, use_ema=True)


@pytest.fixture(scope="module")
def one_of_all(folder, train_in):
    return train_in(folder, train_batch_size=4, output_dir=folder / "one of all", **COMMON, **WHOLE)


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_equals_one(folder, tiny_sd, one_of_all, processes):
    """Includes the text encoder, buckets, the moving average, and validation losses."""
    out = folder / f"{processes} of all"
    words = words_of_run(
        tiny_sd, folder / "pictures", folder, output_dir=out, train_batch_size=4 // processes, **COMMON, **WHOLE
    )
    launcher = [*TORCHRUN[:-1], str(processes)]
    done = run_command(words, launcher, env={"ACCELERATE_USE_CPU": "true"}, timeout=600)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        [[row for row in read_metrics(run) if ("validation/loss" in row) == validated] for validated in (True, False)]
        for run in (one_of_all, out)
    )
    assert len(ours[0]) == 4
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)  # the gap is about 0
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert_same_weights(one_of_all, out)
    assert_same_weights(one_of_all / "best", out / "best")

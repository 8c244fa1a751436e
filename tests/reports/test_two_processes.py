"""Two processes report what one process reports: validation losses, sample pictures, one W&B run, one summary."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TORCHRUN, read_metrics, run_command, words_of_run, write_pictures
from PIL import Image


PROMPTS = ["a green whip", "a red axe", "a blue spear on a white background"]


@pytest.fixture(scope="module")
def runs(tiny_sd, train_in, tmp_path_factory):
    """A run of one process, and a run of two processes with half the batch size each, logged to W&B."""
    folder = tmp_path_factory.mktemp("processes")
    flags = dict(
        validation_data_dir=write_pictures(folder / "others", count=3, seed=9), validation_steps=1, learning_rate=1e-3,
        validation_prompt=PROMPTS[0], validation_prompts=PROMPTS[1:], num_validation_images=2,
    )  # fmt: skip
    one = train_in(folder, output_dir=folder / "one", train_batch_size=4, **flags)
    two = dict(output_dir=folder / "two", train_batch_size=2, report_to="wandb")
    words = words_of_run(tiny_sd, folder / "pictures", folder, **flags | two)
    done = run_command(words, TORCHRUN, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(one=one, two=folder / "two", done=done)


def test_they_report_the_same_losses(runs):
    one, two = ([row for row in read_metrics(out) if "validation/loss" in row] for out in (runs.one, runs.two))
    assert [row["step"] for row in one] == [0, 1, 2]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert runs.done.stdout.count("Validation: ") == 1


def test_they_draw_the_same_pictures(runs):
    names = [f"step-{step:06d}/prompt-{p:02d}-{k}.png" for step in range(3) for p in range(3) for k in range(2)]
    for out in (runs.one, runs.two):
        made = [
            path.relative_to(out / "validation").as_posix() for path in (out / "validation").glob("*/prompt-*.png")
        ]
        assert sorted(made) == names
    for name in names:
        one, two = (np.asarray(Image.open(out / "validation" / name), dtype=int) for out in (runs.one, runs.two))
        assert abs(one - two).max() <= (0 if name.startswith("step-000000") else 1)


def test_trackers_see_one_run(runs):
    assert len(list((runs.two / "wandb").glob("offline-run-*"))) == 1
    assert runs.done.stdout.count("wandb sync") == 1

"""The random draws of a sample depend only on the seed and the sample's position in the run."""

import os
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, batch_sampler, make_picture_set, train_script, write_pictures
from PIL import Image

from text_to_image_lora.models.loading import find_base_model
from text_to_image_lora.training.batches import Sample
from text_to_image_lora.training.data import Draws, TrainingSet, derive_seed


def test_seeds_of_neighbours_and_of_prefixes_differ():
    """(seed, step, position) seeds the draws of a sample, and (seed, step, micro-step, rank) seeds dropout."""
    numbers = [(a, b, c) for a in range(6) for b in range(6) for c in range(6)]
    numbers += [(a, b, c, d) for a, b, c in numbers for d in range(3)] + [(a, b) for a in range(6) for b in range(6)]
    assert len({derive_seed(*group) for group in numbers}) == len(numbers)
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)


@pytest.fixture
def make_set(tiny_sd, tmp_path):
    """Creates a `TrainingSet` without a cache, of 6 pictures with captions."""

    def make(folder=None, draws=None, seed=0, num_train_timesteps=1000, **augmentation):
        pictures = make_picture_set(
            folder or write_pictures(tmp_path / "set"), **augmentation or {"random_flip": True}
        )
        return TrainingSet(pictures, find_base_model(str(tiny_sd)), draws or Draws(seed, num_train_timesteps))

    return make


DRAWS = ("timesteps", "noise", "channel_noise", "posterior_noise")


def test_a_sample_depends_on_seed_step_and_position_alone(make_set):
    training_set = make_set()
    first = training_set[Sample(2, 5, 3, 0.25)]
    torch.manual_seed(99)
    np.random.seed(99)
    again = make_set()[Sample(2, 5, 3, 0.25)]
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) if torch.is_tensor(first[k]) else first[k] == again[k] for k in first)
    assert first["weights"] == 0.25
    assert first["noise"].shape == first["posterior_noise"].shape == (4, 8, 8)
    assert first["channel_noise"].shape == (4, 1, 1)
    assert first["pixels"].shape == (32, 32, 3)
    # Draws depend on the position in the run, not on the picture, and are different at each position.
    other = training_set[Sample(4, 5, 3, 1.0)]
    assert all(torch.equal(first[name], other[name]) for name in DRAWS)
    places = [
        make_set(seed=1)[Sample(2, 5, 3, 1.0)],
        training_set[Sample(2, 6, 3, 1.0)],
        training_set[Sample(2, 5, 4, 1.0)],
    ]
    for name in DRAWS:
        assert not any(torch.equal(first[name], place[name]) for place in places)


def test_no_two_samples_of_a_step_share_their_noise(make_set):
    """Fault 2: upstream uses one seed on all ranks, which therefore draw equal noise and timesteps."""
    training_set = make_set()
    samplers = [
        batch_sampler([*range(6)] * 2, batch_size=2, accumulation=2, rank=rank, world_size=3, seed=0)
        for rank in range(3)
    ]
    samples = [training_set[sample] for sampler in samplers for batch in sampler.micro_batches(0) for sample in batch]
    assert len(samples) == 12
    for name in ("noise", "channel_noise", "posterior_noise"):
        drawn = torch.stack([sample[name].flatten() for sample in samples])
        assert (torch.cdist(drawn, drawn) + torch.eye(12) > 0.1).all()
    assert all(not torch.equal(sample["noise"], sample["posterior_noise"]) for sample in samples)
    assert len({int(sample["timesteps"]) for sample in samples}) > 6


def test_draws_have_the_right_distribution(make_set):
    training_set = make_set(num_train_timesteps=10)
    samples = [training_set[Sample(0, step, position, 1.0)] for step in range(20) for position in range(20)]
    counts = Counter(int(sample["timesteps"]) for sample in samples)
    assert counts.keys() == set(range(10))
    assert max(counts.values()) < 2 * min(counts.values())
    for name in ("noise", "posterior_noise"):
        drawn = torch.stack([sample[name] for sample in samples])
        assert abs(drawn.mean()) < 0.02
        assert abs(drawn.std() - 1) < 0.02


@pytest.fixture
def draw_timesteps(make_set):
    """Draws 300 timesteps with flags of the training script."""

    def draw(*words):
        settings = train_script.parse_settings(
            ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y", *words]
        )
        training_set = make_set(draws=Draws(0, 1000, timesteps=settings.timesteps))
        return np.array([training_set[Sample(0, step, p, 1.0)]["timesteps"] for step in range(150) for p in range(2)])

    return draw


def test_timestep_range(draw_timesteps):
    assert set(draw_timesteps("--timestep_range", "200", "210")) == set(range(200, 210))


@pytest.mark.parametrize(("mean", "std"), [(-1.0, 1), (1.0, 0.5)])
def test_logit_normal_timesteps(draw_timesteps, mean, std):
    """Their log odds are normal, with the sign of diffusers: a negative mean prefers noisier timesteps."""
    words = ("--timestep_sampling", "logit_normal", "--logit_mean", str(mean), "--logit_std", str(std))
    share = (draw_timesteps(*words) + 0.5) / 1000
    logits = np.log(share / (1 - share))
    assert np.mean(logits) == pytest.approx(-mean, abs=0.2)
    assert np.std(logits) == pytest.approx(std, rel=0.2)


def test_mode_timesteps(draw_timesteps):
    timesteps = draw_timesteps("--timestep_sampling", "mode")
    assert 0 <= timesteps.min() < timesteps.max() < 1000
    assert np.mean(np.abs(timesteps - 500) < 250) > 0.6  # uniform: half of them


def test_one_of_several_captions_is_drawn_each_step(make_set, tmp_path):
    folder = write_pictures(tmp_path / "several", captions=[["a cat", "my cat", "the cat"], ["a dog"]])
    training_set = make_set(folder)
    drawn = Counter(training_set[Sample(0, step, 0, 1.0)]["captions"] for step in range(90))
    assert drawn.keys() == {"a cat", "my cat", "the cat"}
    assert min(drawn.values()) > 15
    assert {training_set[Sample(1, step, 0, 1.0)]["captions"] for step in range(20)} == {"a dog"}
    # The number of captions does not change the other draws.
    plain = make_set(write_pictures(tmp_path / "plain"))[Sample(0, 7, 0, 1.0)]
    assert all(torch.equal(training_set[Sample(0, 7, 0, 1.0)][name], plain[name]) for name in DRAWS)


def test_caption_and_variation_are_independent(make_set, tmp_path):
    """All four combinations of two captions and two orientations occur, about equally often."""
    folder = write_pictures(tmp_path / "two", count=1, captions=[["a cat", "my cat"]])
    training_set = make_set(folder, center_crop=True, random_flip=True)
    samples = [training_set[Sample(0, step, 0, 1.0)] for step in range(80)]
    drawn = Counter((sample["captions"], sample["pixels"].numpy().tobytes()) for sample in samples)
    assert len(drawn) == 4
    assert min(drawn.values()) > 10


def test_which_variation_is_drawn_depends_on_the_seed(make_set):
    """The set of variations does not."""
    sets = [make_set(draws=Draws(seed, 1000), center_crop=True, random_flip=True) for seed in (0, 1)]
    first, second = (
        [training_set[Sample(0, step, 0, 1.0)]["pixels"].numpy().tobytes() for step in range(20)]
        for training_set in sets
    )
    assert first != second
    assert len(set(first)) == 2
    assert set(first) == set(second)


def test_crops_and_flips_are_drawn_anew_each_step(make_set):
    training_set = make_set()
    assert len({training_set[Sample(0, step, 0, 1.0)]["pixels"].numpy().tobytes() for step in range(30)}) > 8
    still = make_set(center_crop=True)
    assert len({still[Sample(0, step, 0, 1.0)]["pixels"].numpy().tobytes() for step in range(10)}) == 1


def test_pictures_keep_their_captions(make_set, tmp_path):
    """Fault 12: each picture keeps its caption through shuffling, batches and accumulation."""
    folder = write_pictures(tmp_path / "set", count=20, captions=[f"number {i}" for i in range(20)])
    for i in range(20):
        Image.new("RGB", (40, 32), (10 * i, 0, 0)).save(folder / f"{i}.png")
    seen = Counter()
    for rank in range(2):
        sampler = batch_sampler(range(20), batch_size=3, accumulation=2, rank=rank, world_size=2, seed=0, num_steps=4)
        loader = torch.utils.data.DataLoader(
            make_set(folder), batch_sampler=sampler, collate_fn=torch.utils.data.default_collate
        )
        for batch in loader:
            assert len(batch["captions"]) == len(batch["pixels"]) == len(batch["noise"]) <= 3
            for caption, pixels, weight in zip(batch["captions"], batch["pixels"], batch["weights"]):
                assert caption == f"number {int(pixels[0, 0, 0]) // 10}"
                seen[caption] += bool(weight)
    assert seen == {f"number {i}": 2 for i in range(20)}


HELD = """
import sys
import time
import torch
from text_to_image_lora.training import data

class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return {"number": torch.tensor(float(index))}

loader = data.make_loader(Numbers(), [[0], [1], [2], [3]], 2, torch.device("cpu"))
sys.batches = iter(loader)  # kept alive, as by the traceback of an exception
next(sys.batches)
sys.exit(130)
"""


def test_workers_end_with_a_process_that_still_has_their_loader():
    """Workers ignore SIGTERM, which is for the main process; so multiprocessing must not wait for them after sending it."""
    done = subprocess.run([sys.executable, "-c", HELD], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


WORKERS = """
import os, sys, torch
sys.path.insert(0, {root!r})
from text_to_image_lora.training.data import make_loader

class Large(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, sample):
        print(os.getpid(), flush=True)
        {work}
        return {{"pixels": torch.zeros(2**20)}}

batches = iter(make_loader(Large(), [[i] for i in range(1000)], 2, torch.device("cpu")))
{then}
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize(
    ("work", "then"),
    [("pass", "next(batches)"), ("pass", "pass"), ("import time; time.sleep(1000)", "pass")],
    ids=["in the loop", "before the first batch", "while a picture is read"],
)
def test_workers_end_with_a_main_process_that_is_killed(work, then):
    code = WORKERS.format(root=str(ROOT), work=work, then=then)
    workers = set()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        while len(workers) < 2:
            workers.add(int(process.stdout.readline()))
        process.kill()
    deadline = time.monotonic() + 3  # PyTorch's own check takes 5 seconds at least
    while any(os.path.exists(f"/proc/{worker}/exe") for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)

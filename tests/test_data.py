"""The order of samples and their draws: the same run, however it is cut into batches, ranks and sessions."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from text_to_image_lora.data import EffectiveBatchSampler, Sample, TrainingSet, collate, samples_of_epoch, seed_of
from text_to_image_lora.pictures import examine
from text_to_image_lora.records import load_records
from text_to_image_lora.transforms import Augmentation


# The sampler.

WORLD_SIZES = (1, 2, 3, 8)
repeats = st.lists(st.integers(1, 4), min_size=1, max_size=40)
batch_sizes, accumulations, seeds = st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1)


def micro_batches_of(step, num_repeats, world_size, **options):
    """[micro-batch][rank] -> samples."""
    samplers = [
        EffectiveBatchSampler(samples_of_epoch(num_repeats), rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    by_rank = [list(sampler.micro_batches(step)) for sampler in samplers]
    assert len({len(batches) for batches in by_rank}) == 1  # ranks that do unequal work wait for each other for ever
    assert len(by_rank[0]) == samplers[0].num_micro_batches(step)
    return list(zip(*by_rank))


@given(num_repeats=repeats, batch_size=batch_sizes, accumulation=accumulations, seed=seeds)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_epoch_holds_every_sample_num_repeats_times(world_size, num_repeats, batch_size, accumulation, seed):
    options = dict(batch_size=batch_size, accumulation=accumulation, seed=seed)
    sampler = EffectiveBatchSampler(samples_of_epoch(num_repeats), rank=0, world_size=world_size, **options)
    for epoch in (0, 3):
        seen = Counter()
        for step in range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch):
            positions, weights = [], []
            micro_batches = micro_batches_of(step, num_repeats, world_size, **options)
            assert 1 <= len(micro_batches) <= accumulation
            for ranks in micro_batches:
                assert len({len(batch) for batch in ranks}) == 1
                assert 1 <= len(ranks[0]) <= batch_size
                samples = [sample for batch in ranks for sample in batch]
                seen.update(sample.index for sample in samples if sample.weight)
                positions += [sample.position for sample in samples if sample.weight]
                weights += [sample.weight for sample in samples]
                assert {sample.step for sample in samples} == {step}
                assert all(0 <= sample.index < len(num_repeats) for sample in samples)
                # A filler is only where samples don't go round: less than one for each rank.
                assert sum(not sample.weight for sample in samples) < world_size
            assert sorted(positions) == list(range(sampler.num_samples(step)))
            assert sum(weights) == pytest.approx(world_size)
            assert len({weight for weight in weights if weight}) == 1
        assert seen == Counter(dict(enumerate(num_repeats)))


CUTS = [(b, w, 24 // b // w) for b in (1, 2, 3, 4, 6, 8, 12, 24) for w in WORLD_SIZES if 24 % (b * w) == 0]


@given(num_repeats=repeats, cut=st.sampled_from(CUTS), other=st.sampled_from(CUTS), seed=seeds)
@settings(max_examples=200, deadline=None)
def test_the_samples_of_a_step_do_not_depend_on_the_cut(num_repeats, cut, other, seed):
    steps = EffectiveBatchSampler(
        samples_of_epoch(num_repeats), batch_size=24, accumulation=1, rank=0, world_size=1, seed=seed
    )
    for step in range(2 * steps.steps_per_epoch):
        first, second = (
            {
                (sample.step, sample.position): sample.index
                for ranks in micro_batches_of(
                    step, num_repeats, world_size, batch_size=batch_size, accumulation=accumulation, seed=seed
                )
                for batch in ranks
                for sample in batch
                if sample.weight
            }
            for batch_size, world_size, accumulation in (cut, other)
        )
        assert first == second


@given(num_repeats=repeats, cut=st.sampled_from(CUTS), num_steps=st.integers(1, 12), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_resumed_run_goes_on_with_the_next_sample(num_repeats, cut, num_steps, data):
    batch_size, world_size, accumulation = cut
    rank, first_step = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(0, num_steps))
    options = dict(
        batch_size=batch_size, accumulation=accumulation, rank=rank, world_size=world_size, seed=1, num_steps=num_steps
    )
    whole = list(EffectiveBatchSampler(samples_of_epoch(num_repeats), **options))
    rest = list(EffectiveBatchSampler(samples_of_epoch(num_repeats), first_step=first_step, **options))
    assert rest == [batch for batch in whole if batch[0].step >= first_step]
    assert {batch[0].step for batch in whole} == set(range(num_steps))


def test_epochs_and_seeds_are_shuffled_differently():
    def order(seed, epoch):
        sampler = EffectiveBatchSampler(range(30), batch_size=30, accumulation=1, rank=0, world_size=1, seed=seed)
        return tuple(sample.index for batch in sampler.micro_batches(epoch) for sample in batch)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(30)) not in orders


def test_seeds_of_neighbours_and_of_prefixes_differ():
    """(seed, step, position) seeds a sample's draws and (seed, step, micro-step, rank) the dropout beside them."""
    numbers = [(a, b, c) for a in range(6) for b in range(6) for c in range(6)]
    numbers += [(a, b, c, d) for a, b, c in numbers for d in range(3)] + [(a, b) for a in range(6) for b in range(6)]
    assert len({seed_of(*group) for group in numbers}) == len(numbers)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3)


# A sample.


@pytest.fixture
def make_set(tmp_path):
    """A `TrainingSet` that encodes live, of 6 pictures with captions."""

    def make(folder=None, seed=0, num_train_timesteps=1000, **changes):
        folder = folder or write_pictures(tmp_path / "set")
        dataset = load_records(train_data_dir=folder)
        images = [found for _, found in sorted(examine(dataset, range(len(dataset)), tmp_path / "memo")[0].items())]
        options = dict(interpolation="lanczos", augmentation=Augmentation(random_flip=True)) | changes
        return TrainingSet(
            dataset, images, [(32, 32)] * len(images), dataset["captions"][:], latents=(None, None), prompts=(None, None),
            latent_shapes=[(4, 8, 8)] * len(images), seed=seed,
            num_train_timesteps=num_train_timesteps, **options,
        )  # fmt: skip

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
    # The draws go with the place in the run, not with the picture; and every place has its own.
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
    """Fault 2: upstream seeds all ranks alike, so they draw the same noise and timesteps."""
    training_set = make_set()
    batches = micro_batches_of(0, [2] * 6, 3, batch_size=2, accumulation=2, seed=0)
    samples = [training_set[sample] for ranks in batches for batch in ranks for sample in batch]
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


def test_one_of_several_captions_is_drawn_each_step(make_set, tmp_path):
    folder = write_pictures(tmp_path / "several", captions=[["a cat", "my cat", "the cat"], ["a dog"]])
    training_set = make_set(folder)
    drawn = Counter(training_set[Sample(0, step, 0, 1.0)]["captions"] for step in range(90))
    assert drawn.keys() == {"a cat", "my cat", "the cat"}
    assert min(drawn.values()) > 15
    assert {training_set[Sample(1, step, 0, 1.0)]["captions"] for step in range(20)} == {"a dog"}
    # Another caption is no other draw: the rest of the sample stays.
    plain = make_set(write_pictures(tmp_path / "plain"))[Sample(0, 7, 0, 1.0)]
    assert all(torch.equal(training_set[Sample(0, 7, 0, 1.0)][name], plain[name]) for name in DRAWS)


def test_crops_and_flips_are_drawn_anew_each_step(make_set):
    training_set = make_set()
    assert len({training_set[Sample(0, step, 0, 1.0)]["pixels"].numpy().tobytes() for step in range(30)}) > 8
    still = make_set(augmentation=Augmentation(center_crop=True))
    assert len({still[Sample(0, step, 0, 1.0)]["pixels"].numpy().tobytes() for step in range(10)}) == 1


def test_pictures_keep_their_captions(make_set, tmp_path):
    """Fault 12: through shuffling, batches and accumulation, each picture comes with its own caption."""
    folder = write_pictures(tmp_path / "set", count=20, captions=[f"number {i}" for i in range(20)])
    for i in range(20):
        Image.new("RGB", (40, 32), (10 * i, 0, 0)).save(folder / f"{i}.png")
    seen = Counter()
    for rank in range(2):
        sampler = EffectiveBatchSampler(
            range(20), batch_size=3, accumulation=2, rank=rank, world_size=2, seed=0, num_steps=4
        )
        loader = torch.utils.data.DataLoader(make_set(folder), batch_sampler=sampler, collate_fn=collate)
        for batch in loader:
            assert len(batch["captions"]) == len(batch["pixels"]) == len(batch["noise"]) <= 3
            for caption, pixels, weight in zip(batch["captions"], batch["pixels"], batch["weights"]):
                assert caption == f"number {int(pixels[0, 0, 0]) // 10}"
                seen[caption] += bool(weight)
    assert seen == {f"number {i}": 2 for i in range(20)}

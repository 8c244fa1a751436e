"""The order of samples does not depend on how a run is divided into batches, ranks and sessions."""

from collections import Counter

import numpy as np
import pytest
from conftest import batch_sampler, make_picture_set, read_records, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st

from text_to_image_lora.pictures.records import with_class_pictures
from text_to_image_lora.training.batches import Division, add_class_samples, make_batch_sampler, repeat_pictures


WORLD_SIZES = (1, 2, 3, 8)
repeats = st.lists(st.integers(1, 4), min_size=1, max_size=40)
batch_sizes, accumulations, seeds = st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1)


def make_micro_batches(step, num_repeats, world_size, **options):
    """Returns samples by [micro-batch][rank]."""
    samplers = [
        batch_sampler(repeat_pictures(num_repeats), rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    by_rank = [list(sampler.micro_batches(step)) for sampler in samplers]
    assert len({len(batches) for batches in by_rank}) == 1  # otherwise ranks would wait for each other for ever
    assert len(by_rank[0]) == samplers[0].num_micro_batches(step)
    return list(zip(*by_rank))


@given(num_repeats=repeats, batch_size=batch_sizes, accumulation=accumulations, seed=seeds)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_epoch_holds_every_sample_num_repeats_times(world_size, num_repeats, batch_size, accumulation, seed):
    options = dict(batch_size=batch_size, accumulation=accumulation, seed=seed)
    sampler = batch_sampler(repeat_pictures(num_repeats), rank=0, world_size=world_size, **options)
    for epoch in (0, 3):
        seen = Counter()
        for step in range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch):
            positions, weights = [], []
            micro_batches = make_micro_batches(step, num_repeats, world_size, **options)
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
                # Fillers only complete the last micro-batch: there are fewer than ranks.
                assert sum(not sample.weight for sample in samples) < world_size
            assert sorted(positions) == list(range(sampler.num_samples(step)))
            assert sum(weights) == pytest.approx(world_size)
            assert len({weight for weight in weights if weight}) == 1
        assert seen == Counter(dict(enumerate(num_repeats)))


CUTS = [(b, w, 24 // b // w) for b in (1, 2, 3, 4, 6, 8, 12, 24) for w in WORLD_SIZES if 24 % (b * w) == 0]


@given(num_repeats=repeats, cut=st.sampled_from(CUTS), other=st.sampled_from(CUTS), seed=seeds)
@settings(max_examples=200, deadline=None)
def test_the_samples_of_a_step_do_not_depend_on_the_cut(num_repeats, cut, other, seed):
    steps = batch_sampler(repeat_pictures(num_repeats), batch_size=24, accumulation=1, rank=0, world_size=1, seed=seed)
    for step in range(2 * steps.steps_per_epoch):
        first, second = (
            {
                (sample.step, sample.position): sample.index
                for ranks in make_micro_batches(
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
def test_a_resumed_run_continues_with_the_next_sample(num_repeats, cut, num_steps, data):
    batch_size, world_size, accumulation = cut
    rank, first_step = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(0, num_steps))
    options = dict(
        batch_size=batch_size, accumulation=accumulation, rank=rank, world_size=world_size, seed=1, num_steps=num_steps
    )
    whole = list(batch_sampler(repeat_pictures(num_repeats), **options))
    rest = list(batch_sampler(repeat_pictures(num_repeats), first_step=first_step, **options))
    assert rest == [batch for batch in whole if batch[0].step >= first_step]
    assert {batch[0].step for batch in whole} == set(range(num_steps))


def test_epochs_and_seeds_are_shuffled_differently():
    def order(seed, epoch):
        sampler = batch_sampler(range(30), batch_size=30, accumulation=1, rank=0, world_size=1, seed=seed)
        return tuple(sample.index for batch in sampler.micro_batches(epoch) for sample in batch)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(30)) not in orders


def test_the_sampler_of_a_picture_set(tmp_path):
    """All pictures of a step have one size, and the sampler uses the `Division`."""
    pictures = make_picture_set(write_pictures(tmp_path / "set"), sizes=[(32, 32)] * 4 + [(16, 48)] * 2)
    sampler = make_batch_sampler(pictures, 3, Division(2, accumulation=2, rank=1, world_size=2))
    assert (sampler.effective_batch_size, sampler.rank, sampler.seed) == (8, 1, 3)
    assert sorted(sampler.samples.tolist()) == list(range(6))
    assert sampler.steps_per_epoch == 2
    steps = [set(sampler.samples_of(step).tolist()) for step in range(2)]
    assert sorted(steps, key=len) == [{4, 5}, {0, 1, 2, 3}]


@pytest.mark.parametrize("balanced", [False, True])
def test_an_epoch_has_every_picture_once_for_each_size_and_repeat(tmp_path, balanced):
    """Class pictures too, of which there are as many as of the others; with balance, samples count, not pictures."""
    write_pictures(tmp_path / "kohya" / "3_axe", count=2)
    write_pictures(tmp_path / "kohya" / "1_spear", count=3, seed=1)
    for file in (tmp_path / "kohya").rglob("metadata.jsonl"):
        file.unlink()
    own = read_records(tmp_path / "kohya", instance_prompt="an axe", dataset_layout="kohya")
    records = with_class_pictures(own, read_records(write_pictures(tmp_path / "dogs", count=2, seed=5)))
    pictures = make_picture_set(records)
    assert pictures.records["num_repeats"][:5] == [1, 1, 1, 3, 3]
    pictures = pictures.at_sizes(
        [[(48, 48), (32, 32)], [(32, 32)], [(32, 32)], [(48, 48), (32, 32)], [(32, 32)], *[[(48, 48), (32, 32)]] * 2]
    )
    sampler = make_batch_sampler(pictures, 3, Division(4), balanced=balanced)
    seen = Counter()
    for step in range(sampler.steps_per_epoch):
        indices = sampler.samples_of(step).tolist()
        assert len({pictures.sizes[i] for i in indices}) == 1
        seen.update((pictures.numbers[i], pictures.sizes[i][0]) for i in indices)
    learned = {key: count for key, count in seen.items() if key[0] < 5}
    if balanced:  # three spears in four entries are repeated until they have the nine samples of the axes
        assert sum(count for (number, _), count in learned.items() if number < 3) == 9
    else:
        expected = {(0, 48): 1, (0, 32): 1, (1, 32): 1, (2, 32): 1}
        assert {key: count for key, count in learned.items() if key[0] < 3} == expected
    assert {key: count for key, count in learned.items() if key[0] >= 3} == {(3, 48): 3, (3, 32): 3, (4, 32): 3}
    of_class = {key: count for key, count in seen.items() if key[0] >= 5}
    assert of_class.keys() == {(5, 48), (5, 32), (6, 48), (6, 32)}
    assert sum(of_class.values()) == sum(learned.values()) == (18 if balanced else 13)
    assert max(of_class.values()) - min(of_class.values()) <= 1


# Groups of pictures of one size.


grouped = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=40)


@given(grouped, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_sample_once_and_each_step_of_one_size(world_size, held, batch_size, accumulation, seed):
    num_repeats, groups = zip(*held)
    options = dict(batch_size=batch_size, accumulation=accumulation, world_size=world_size, seed=seed, groups=groups)
    samplers = [batch_sampler(repeat_pictures(num_repeats), rank=rank, **options) for rank in range(world_size)]
    for epoch in (0, 2):
        seen = Counter()
        for step in range(epoch * samplers[0].steps_per_epoch, (epoch + 1) * samplers[0].steps_per_epoch):
            by_rank = [list(sampler.micro_batches(step)) for sampler in samplers]
            assert len({tuple(map(len, batches)) for batches in by_rank}) == 1
            samples = [sample for batches in by_rank for batch in batches for sample in batch]
            assert len({groups[sample.index] for sample in samples}) == 1
            seen.update(sample.index for sample in samples if sample.weight)
            assert sum(sample.weight for sample in samples) == pytest.approx(world_size)
        assert seen == Counter(dict(enumerate(num_repeats)))


def test_steps_of_the_groups_are_mixed():
    sampler = batch_sampler(
        range(80), groups=[0] * 40 + [1] * 40, batch_size=4, accumulation=1, rank=0, world_size=1, seed=0
    )
    orders = [[int(sampler.samples_of(20 * epoch + step)[0] >= 40) for step in range(20)] for epoch in range(3)]
    assert all(sum(order) == 10 for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert all(sum(order[:10]) not in (0, 10) for order in orders)


# Balance.


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 3)), min_size=1, max_size=40), st.integers(0, 2**32 - 1)
)
@settings(max_examples=100, deadline=None)
def test_every_concept_is_drawn_equally_often(held, seed):
    concepts, num_repeats = zip(*held)
    samples = repeat_pictures(num_repeats, concepts, seed=seed)
    by_concept = Counter(concepts[i] for i in samples)
    assert by_concept.keys() == set(concepts)
    most = max(sum(r for c, r in held if c == name) for name in by_concept)
    assert set(by_concept.values()) == {most}
    drawn = Counter(samples.tolist())
    for name in by_concept:
        # Equal up to one sample for each repeat of a picture.
        rates = [(drawn[i] / r, r) for i, (c, r) in enumerate(held) if c == name]
        whole = most // sum(r for c, r in held if c == name)
        assert all(whole <= rate <= whole + 1 for rate, _ in rates)
    assert (samples == repeat_pictures(num_repeats, concepts, seed=seed)).all()


def test_without_balance_each_picture_counts_its_repeats():
    assert repeat_pictures([1, 3, 2]).tolist() == [0, 1, 1, 1, 2, 2]


# Class pictures.


@pytest.mark.parametrize(("learned", "others"), [(3, 10), (10, 3), (4, 4)])
def test_as_many_class_pictures_as_learned_ones(learned, others):
    own = np.repeat(np.arange(learned), 2)
    samples = add_class_samples(own, np.arange(learned, learned + others))
    counts = np.bincount(samples, minlength=learned + others)
    # Every picture is drawn, and both parts have equal numbers of samples.
    assert counts.min() >= 1
    assert counts[:learned].sum() == counts[learned:].sum() == max(2 * learned, others)
    assert np.ptp(counts[learned:]) <= 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loss_weights_do_not_depend_on_the_batch(batch_size):
    """Weights must neither cancel out nor give 0 / 0 in a step with pictures of only one part."""
    for other in (0.25, 0.0):
        weights = [1.0] * 5 + [other] * 5
        sampler = batch_sampler(
            range(10), loss_weights=weights, batch_size=batch_size, accumulation=1, rank=0, world_size=1, seed=0
        )
        mean = sum(weights) / 10
        for step in range(sampler.steps_per_epoch):
            samples = [sample for batch in sampler.micro_batches(step) for sample in batch]
            for sample in samples:
                assert sample.weight == pytest.approx(weights[sample.index] / mean / len(samples))


def test_loss_weights_are_means_over_samples_not_pictures():
    """The weights of an epoch's samples are 1 on average, even if pictures have different numbers of repeats."""
    sampler = batch_sampler(
        repeat_pictures([5, 1, 2]), batch_size=8, accumulation=1, rank=0, world_size=1, seed=0,
        loss_weights=[1.0, 0.25, 0.5],
    )  # fmt: skip
    ((batch,),) = [list(sampler.micro_batches(step)) for step in range(sampler.steps_per_epoch)]
    weights = {sample.index: sample.weight for sample in batch}
    assert sum(sample.weight for sample in batch) == pytest.approx(1)
    assert weights[1] == pytest.approx(weights[0] / 4)
    assert weights[2] == pytest.approx(weights[0] / 2)

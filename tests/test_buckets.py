"""Buckets: sizes of one area for every shape, batches of one size, and nothing lost."""

from collections import Counter

import numpy as np
import pytest
from conftest import read_metrics, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from text_to_image_lora import buckets
from text_to_image_lora.data import EffectiveBatchSampler, samples_of_epoch
from text_to_image_lora.errors import InputError


LIMITS = dict(smallest=256, largest=1024, step=64)


def kohya_buckets(resolution, smallest, largest, step):
    """The rule as sd-scripts documents it: widths by the step, the greatest height that keeps the area."""
    sizes = set()
    width = int((resolution**2) ** 0.5 // step) * step
    sizes.add((width, width))
    for width in range(smallest, largest + 1, step):
        height = min(largest, resolution * resolution // width // step * step)
        if height >= smallest:
            sizes |= {(width, height), (height, width)}
    return sizes


@pytest.mark.parametrize("resolution", [512, 640, 768, 1024])
def test_the_sizes_are_kohyas(resolution):
    limits = dict(smallest=256, largest=2048, step=64)
    made = buckets.make_buckets(resolution, **limits)
    assert set(made) == kohya_buckets(resolution, 256, 2048, 64)
    assert len(set(made)) == len(made)


@given(st.integers(4, 40), st.integers(1, 4), st.sampled_from([8, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_every_bucket_keeps_the_area_and_the_limits(sides, room, step):
    resolution = sides * step
    limits = dict(smallest=max(step, resolution // room), largest=room * resolution, step=step)
    for width, height in buckets.make_buckets(resolution, **limits):
        assert width % step == height % step == 0
        assert limits["smallest"] <= min(width, height)
        assert max(width, height) <= limits["largest"]
        assert width * height <= resolution**2
        assert (min(width, height) + step) * max(width, height) > resolution**2 or max(width, height) > resolution


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(max_examples=200, deadline=None)
def test_a_picture_goes_to_the_nearest_shape(width, height):
    made = buckets.make_buckets(512, **LIMITS)
    chosen = buckets.choose_bucket(width, height, made)
    distance = {size: abs(np.log(size[0] / size[1]) - np.log(width / height)) for size in made}
    assert distance[chosen] == pytest.approx(min(distance.values()), abs=1e-8)
    turned = buckets.choose_bucket(height, width, made)
    assert turned[0] * turned[1] == chosen[0] * chosen[1]


def test_small_pictures_keep_their_size_when_asked():
    pictures = [(300, 200), (2000, 1000), (512, 512), (100, 700), (64, 64)]
    sizes = buckets.sizes_of(pictures, 512, no_upscale=True, smallest=64, largest=1024, step=64)
    assert sizes == [(256, 192), (704, 320), (512, 512), (64, 640), (64, 64)]
    scaled = buckets.sizes_of(pictures, 512, no_upscale=False, smallest=64, largest=1024, step=64)
    assert scaled[2] == scaled[4] == (512, 512)
    assert scaled[0][0] > scaled[0][1] > 256


@pytest.mark.parametrize(
    "limits",
    [dict(smallest=576, largest=1024, step=64), dict(smallest=256, largest=448, step=64), dict(smallest=32, largest=1024, step=64)],
)  # fmt: skip
def test_limits_that_leave_no_bucket(limits):
    with pytest.raises(InputError, match="--bucket_min_size .* --bucket_max_size"):
        buckets.make_buckets(512, **limits)


# The sampler with groups.


pictures = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=40)


@given(pictures, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_sample_once_and_each_step_of_one_size(world_size, held, batch_size, accumulation, seed):
    num_repeats, groups = zip(*held)
    options = dict(batch_size=batch_size, accumulation=accumulation, world_size=world_size, seed=seed, groups=groups)
    samplers = [
        EffectiveBatchSampler(samples_of_epoch(num_repeats), rank=rank, **options) for rank in range(world_size)
    ]
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
    sampler = EffectiveBatchSampler(
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
@settings(max_examples=200, deadline=None)
def test_every_concept_is_drawn_equally_often(held, seed):
    concepts, num_repeats = zip(*held)
    samples = samples_of_epoch(num_repeats, concepts, seed=seed)
    by_concept = Counter(concepts[i] for i in samples)
    assert by_concept.keys() == set(concepts)
    most = max(sum(r for c, r in held if c == name) for name in by_concept)
    assert set(by_concept.values()) == {most}
    drawn = Counter(samples.tolist())
    for name in by_concept:
        # To within one draw for each of a picture's repeats.
        rates = [(drawn[i] / r, r) for i, (c, r) in enumerate(held) if c == name]
        whole = most // sum(r for c, r in held if c == name)
        assert all(whole <= rate <= whole + 1 for rate, _ in rates)
    assert (samples == samples_of_epoch(num_repeats, concepts, seed=seed)).all()


def test_without_balance_each_picture_counts_its_repeats():
    assert samples_of_epoch([1, 3, 2]).tolist() == [0, 1, 1, 1, 2, 2]


# The command.


@pytest.fixture
def shapes(tmp_path):
    """Pictures of three shapes, with tags: 4 wide, 3 tall, 2 square and tiny."""
    folder = write_pictures(tmp_path / "shapes", count=9, captions=["sks, red, old", "sks, blue, new, big"])
    for i, size in enumerate([(90, 40)] * 4 + [(40, 90)] * 3 + [(20, 20)] * 2):
        Image.open(folder / f"{i}.png").resize(size).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("cache_variations", [2, 0])
def test_buckets_train(train, shapes, capsys, cache_variations):
    folder = train(
        train_data_dir=shapes, aspect_ratio_buckets=True, max_train_steps=12, cache_variations=cache_variations,
        caption_dropout=0.3, shuffle_tags=True, keep_tags=1,
    )  # fmt: skip
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    for row in (["48x16", "4", "4"], ["16x48", "3", "3"], ["32x32", "2", "2"]):
        assert row in lines
    assert "2 of 9 pictures are smaller than what they are trained at, and are enlarged" in out
    assert "9 pictures, 5 steps an epoch, 12 steps" in out
    rows = read_metrics(folder)
    assert len(rows) == 12
    assert all(row["train_loss"] > 0 for row in rows)
    assert (folder / "pytorch_lora_weights.safetensors").exists()


def test_buckets_leave_square_pictures_as_they_were(train, tmp_path):
    """One bucket is no bucket: the same weights as without the flag."""
    from conftest import read_lora

    square = write_pictures(tmp_path / "square", size=(40, 40))
    plain = read_lora(train(train_data_dir=square, output_dir=tmp_path / "plain"))
    bucketed = read_lora(train(train_data_dir=square, output_dir=tmp_path / "buckets", aspect_ratio_buckets=True))
    assert all((bucketed[name] == value).all() for name, value in plain.items())

"""Buckets have one area for all aspect ratios, batches have one size, and no picture is lost."""

import numpy as np
import pytest
from conftest import read_lora, read_metrics, refusal_of, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures import buckets
from text_to_image_lora.pictures.buckets import Buckets, Resolutions
from text_to_image_lora.pictures.examine import Picture


def kohya_buckets(resolution, smallest, largest, step):
    """Returns the buckets of sd-scripts' documentation: widths in steps, with the largest height that keeps the area."""
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
    made = Buckets(resolution, smallest=256, largest=2048, step=64).all()
    assert made[0] == (resolution, resolution)
    assert set(made) == kohya_buckets(resolution, 256, 2048, 64)
    assert len(set(made)) == len(made)


@given(st.integers(4, 40), st.integers(1, 4), st.sampled_from([8, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_every_bucket_keeps_the_area_and_the_limits(sides, room, step):
    resolution = sides * step
    limits = Buckets(resolution, smallest=max(step, resolution // room), largest=room * resolution, step=step)
    for width, height in limits.all():
        assert width % step == height % step == 0
        assert limits.smallest <= min(width, height)
        assert max(width, height) <= limits.largest
        assert width * height <= resolution**2
        assert (min(width, height) + step) * max(width, height) > resolution**2 or max(width, height) > resolution


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(max_examples=200, deadline=None)
def test_a_picture_goes_to_the_nearest_shape(width, height):
    made = Buckets(512, smallest=256, largest=1024, step=64).all()
    chosen = buckets.choose_bucket(width, height, made)
    distance = {size: abs(np.log(size[0] / size[1]) - np.log(width / height)) for size in made}
    assert distance[chosen] == pytest.approx(min(distance.values()), abs=1e-8)
    turned = buckets.choose_bucket(height, width, made)
    assert turned[0] * turned[1] == chosen[0] * chosen[1]


def sized(*sides):
    return [Picture(f"{i}", width, height) for i, (width, height) in enumerate(sides)]


def test_small_pictures_keep_their_size_when_asked():
    pictures = sized((300, 200), (2000, 1000), (512, 512), (100, 700), (64, 64))
    limits = Buckets(512, smallest=64, largest=1024, step=64, no_upscale=True)
    assert limits.choose_sizes(pictures) == [(256, 192), (704, 320), (512, 512), (64, 640), (64, 64)]
    scaled = limits._replace(no_upscale=False).choose_sizes(pictures)
    assert scaled[2] == scaled[4] == (512, 512)
    assert scaled[0][0] > scaled[0][1] > 256
    assert buckets.find_enlarged(pictures, limits.choose_sizes(pictures)) == []
    assert buckets.find_enlarged(pictures, scaled) == [0, 3, 4]


@pytest.mark.parametrize("side", [(100, 3000), (3000, 100), (3000, 1), (100, 1100)])
def test_without_upscaling_too_no_side_is_over_the_limit(side):
    limits = Buckets(512, smallest=64, largest=1024, step=64, no_upscale=True)
    assert limits.choose_sizes(sized(side)) == [(64, 1024) if side[1] > side[0] else (1024, 64)]


def test_without_buckets_every_picture_is_trained_at_the_square():
    pictures = sized((300, 200), (2000, 1000), (32, 32), (7, 900))
    assert buckets.square(32).choose_sizes(pictures) == [(32, 32)] * 4
    assert buckets.find_enlarged(pictures, [(32, 32)] * 4) == [3]


def test_a_picture_is_trained_at_each_resolution_that_it_is_large_enough_for():
    """And at the smallest if it is too small for all; what is large enough is not enlarged."""
    pictures = sized((95, 300), (96, 96), (300, 100), (63, 300), (64, 64), (20, 20))
    squares = Resolutions((buckets.square(64), buckets.square(96)))
    assert squares.sizes_of_each(pictures) == [
        [(64, 64)], [(96, 96), (64, 64)], [(96, 96), (64, 64)], [(64, 64)], [(64, 64)], [(64, 64)],
    ]  # fmt: skip
    assert squares.too_small(pictures) == {96: [0, 3, 4, 5]}
    shaped = Resolutions(tuple(buckets.make_buckets(side, 8) for side in (64, 96)))
    assert shaped.sizes_of_each(sized((300, 100), (130, 70), (100, 50), (36, 100))) == [
        [(160, 56), (104, 32)], [(80, 48)], [(88, 40)], [(40, 96)],  # 130x70 would be enlarged to 128x72
    ]  # fmt: skip


def test_a_single_resolution_has_one_size_for_each_picture():
    pictures = sized((300, 200), (2000, 1000), (32, 32), (7, 900))
    for each in (buckets.square(64), buckets.make_buckets(64, 8), buckets.make_buckets(64, 8, no_upscale=True)):
        one = Resolutions((each,))
        assert one.sizes_of_each(pictures) == [[size] for size in each.choose_sizes(pictures)]
        assert one.too_small(pictures) == {}


def test_without_upscaling_a_picture_is_large_enough_for_its_area():
    """A picture between two resolutions is trained at the smaller one, not at its own size as well."""
    pictures = sized((600, 600), (900, 700), (768, 768), (2000, 300), (300, 300), (511, 513))
    both = Resolutions(tuple(buckets.make_buckets(side, 8, no_upscale=True) for side in (512, 768)))
    assert both.sizes_of_each(pictures) == [
        [(512, 512)], [(832, 640), (576, 448)], [(768, 768), (512, 512)], [(1024, 256)], [(256, 256)], [(448, 512)],
    ]  # fmt: skip
    assert both.too_small(pictures) == {768: [0, 3, 4, 5]}


def test_equal_sizes_of_two_resolutions_are_trained_once():
    """Where a limit cuts the sides, the shape of a picture can have one bucket in two resolutions."""
    both = Resolutions(tuple(buckets.make_buckets(side, 64, smallest=256, largest=512) for side in (448, 512)))
    assert both.sizes_of_each(sized((1000, 2000), (1000, 1000))) == [[(256, 512)], [(512, 512), (448, 448)]]
    assert both.too_small(sized((1000, 2000), (1000, 1000), (500, 500))) == {512: [2]}


def test_resolutions_that_are_one_size_are_refused():
    both = Resolutions(tuple(buckets.make_buckets(side, 8, step=64) for side in (64, 72)))
    assert refusal_of(both.check_distinct).startswith("--resolution 64 72: with --bucket_step 64, they are one size.")
    Resolutions(tuple(buckets.make_buckets(side, 8, step=64) for side in (64, 128, 200))).check_distinct()


@pytest.mark.parametrize(
    "limits",
    [dict(smallest=576, largest=1024, step=64), dict(smallest=256, largest=448, step=64), dict(smallest=32, largest=1024, step=64)],
)  # fmt: skip
def test_limits_that_leave_no_bucket(limits):
    with pytest.raises(InputError, match="--bucket_min_size .* --bucket_max_size"):
        Buckets(512, **limits).all()


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        (dict(resolution=512, image_factor=8), (512, 256, 1024, 64)),
        (dict(resolution=64, image_factor=8), (64, 32, 128, 8)),
        (dict(resolution=512, image_factor=8, smallest=200, largest=1000), (512, 256, 960, 64)),
        (dict(resolution=512, image_factor=8, step=32), (512, 256, 1024, 32)),
    ],
)
def test_limits_that_are_not_given(given, settled):
    """The limits are half and twice the resolution, in steps of 64 or what a small resolution allows, rounded inwards."""
    assert buckets.make_buckets(**given) == Buckets(*settled)


def test_limits_that_cannot_be_settled():
    with pytest.raises(InputError, match="--bucket_min_size .* --bucket_max_size"):
        buckets.make_buckets(512, 8, largest=448)
    with pytest.raises(InputError, match="--bucket_step 20: this model needs a multiple of 8, e.g. 16"):
        buckets.make_buckets(512, 8, step=20)


# The command.


@pytest.fixture
def shapes(tmp_path):
    """Writes pictures of three shapes with tags: 4 wide ones, 3 tall ones, and 2 small square ones."""
    folder = write_pictures(tmp_path / "shapes", count=9, captions=["sks, red, old", "sks, blue, new, big"])
    for i, size in enumerate([(90, 40)] * 4 + [(40, 90)] * 3 + [(20, 20)] * 2):
        Image.open(folder / f"{i}.png").resize(size).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("cache_variations", [2, 0])
def test_buckets_train(train, shapes, capsys, cache_variations):
    folder = train(
        train_data_dir=shapes, aspect_ratio_buckets=True, max_train_steps=6, cache_variations=cache_variations,
        caption_dropout=0.3, shuffle_tags=True, keep_tags=1,
    )  # fmt: skip
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    for row in (["48x16", "4", "4"], ["16x48", "3", "3"], ["32x32", "2", "2"]):
        assert row in lines
    assert "2 of 9 pictures are smaller than their training size and are enlarged" in out
    assert "9 pictures, 5 steps an epoch, 6 steps" in out
    rows = read_metrics(folder)
    assert len(rows) == 6
    assert all(row["train_loss"] > 0 for row in rows)
    assert (folder / "pytorch_lora_weights.safetensors").exists()


def test_buckets_leave_square_pictures_as_they_were(train, tmp_path):
    """With a single bucket, the weights equal those of a run without buckets."""
    square = write_pictures(tmp_path / "square", size=(40, 40))
    plain = read_lora(train(train_data_dir=square, output_dir=tmp_path / "plain"))
    bucketed = read_lora(train(train_data_dir=square, output_dir=tmp_path / "buckets", aspect_ratio_buckets=True))
    assert all((bucketed[name] == value).all() for name, value in plain.items())

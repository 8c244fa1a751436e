"""A set of pictures: all information on a picture has the picture's index, and a variation is equal in every use."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_picture_set, read_lora, read_records, write_pictures
from PIL import Image

from text_to_image_lora.pictures import picture_set
from text_to_image_lora.pictures.inspection import preview_sheet
from text_to_image_lora.pictures.masks import open_masked
from text_to_image_lora.pictures.records import read_image_bytes, with_class_pictures
from text_to_image_lora.pictures.settings import AugmentationSettings
from text_to_image_lora.pictures.transforms import apply_variation, draw_variation, open_image


RANDOM = dict(random_flip=True, random_hue=0.1)
SIZES = [(32, 32), (48, 16), (16, 48), (32, 32), (48, 16), (32, 32)]


@pytest.fixture
def some(pictures):
    """Six pictures of three sizes; the second and the last have masks, and every variation differs."""
    half = Image.new("L", (40, 32), 0)
    half.paste(255, (0, 0, 20, 32))
    for index in (1, 5):
        half.save(pictures / f"{index}.mask.png")
    return make_picture_set(pictures, sizes=SIZES, **RANDOM)


def test_it_is_as_long_as_its_columns(some):
    assert len(some) == len(some.records) == len(some.facts) == len(some.sizes) == len(some.captions) == 6


@pytest.mark.parametrize("indices", [[4, 1, 1], np.array([0, 5]), range(3), []])
def test_a_part_has_all_that_is_known_of_its_pictures(some, indices):
    part = some.select(indices)
    assert len(part) == len(indices)
    assert part.view == some.view
    for place, index in enumerate(indices):
        assert part.records[place] == some.records[index]
        assert part.facts[place] == some.facts[index]
        assert part.sizes[place] == some.sizes[index]
        assert part.captions[place] == some.captions[index]
        for k in range(2):
            assert part.variation(place, k) == some.variation(index, k)
            assert (part.pixels(place, k) == some.pixels(index, k)).all()
            assert (part.mask(place, k, 4) == some.mask(index, k, 4)).all()


def test_a_picture_at_several_sizes_has_an_entry_for_each(some):
    """With all that is known of the picture; each is cropped, with its mask, for its own size."""
    part = some.select([5, 1, 2])
    entries = part.at_sizes([[(48, 32), (32, 24)], [(32, 24)], [(40, 40), (24, 24), (16, 16)]])
    assert entries.numbers == [5, 5, 1, 2, 2, 2]
    assert entries.sizes == [(48, 32), (32, 24), (32, 24), (40, 40), (24, 24), (16, 16)]
    for place, index in enumerate([5, 5, 1, 2, 2, 2]):
        width, height = entries.sizes[place]
        assert entries.records[place] == some.records[index]
        assert (entries.facts[place], entries.captions[place]) == (some.facts[index], some.captions[index])
        assert entries.pixels(place, 3).shape == (height, width, 3)
        assert entries.mask(place, 3, 8).shape == (height // 8, width // 8)
        assert (entries.mask(place, 3, 8) == 1).all() == (index == 2)
    assert entries.firsts() == [0, 2, 3]
    once = entries.each_once()
    assert (once.sizes, once.numbers) == ([(48, 32), (32, 24), (40, 40)], [5, 1, 2])
    assert [entries.format_sizes(i) for i in (1, 2, 3)] == ["48x32, 32x24", "32x24", "40x40, 24x24, 16x16"]
    assert entries.select([4, 1, 5]).each_once().sizes == [(24, 24), (32, 24)]


def test_pictures_at_one_size_are_the_set_itself(some):
    assert some.each_once() is some
    others = some.at_sizes([[(24, 24)]] * 6)
    assert others.each_once() is others
    assert (others.sizes, others.numbers, others.records) == ([(24, 24)] * 6, [*range(6)], some.records)


def test_other_captions_or_another_view_leave_the_set_as_it_was(some):
    before, captions = some.pixels(2, 1), some.captions
    others = replace(some, captions=[["a cat"]] * 6, view=some.view._replace(augmentation=AugmentationSettings()))
    assert others.captions == [["a cat"]] * 6
    assert some.captions is captions
    assert (some.pixels(2, 1) == before).all()
    assert not (others.pixels(2, 1) == before).all()


def test_a_variation_is_the_same_in_every_use(some, pictures):
    """A variation depends only on the picture's content and the variation's number, and is shown unchanged."""
    view = some.view
    for index, (fact, size) in enumerate(zip(some.facts, SIZES, strict=True)):
        expected = draw_variation(40, 32, size, view.augmentation, image_id=fact.image_id, index=3)
        assert some.variation(index, 3) == expected
        image = open_image((pictures / f"{index}.png").read_bytes())
        assert (some.pixels(index, 3) == apply_variation(image, expected, size, view.interpolation)).all()
    again = make_picture_set(pictures, sizes=SIZES, **RANDOM)
    for index, k in ((5, 2), (0, 1), (0, 0), (5, 2), (3, 7)):
        assert again.pixels(index, k).shape == (*SIZES[index][::-1], 3)
        assert (again.pixels(index, k) == some.pixels(index, k)).all()
    tile = Image.fromarray(some.pixels(3, 1)).resize((256, 256), Image.Resampling.LANCZOS)
    assert is_inside(np.asarray(tile), np.asarray(preview_sheet(some, [3], 2, tile=256)))


def is_inside(part, whole):
    """Whether a picture is part of another, both as arrays (height, width, 3)."""
    height, width, _ = part.shape
    return any(
        (whole[top : top + height, left : left + width] == part).all()
        for top, left in np.argwhere((whole[: 1 - height, : 1 - width] == part[0, 0]).all(axis=2))
    )


def test_runs_of_other_seeds_share_the_cache(train, tmp_path):
    """The set of crops, flips and tag orders depends only on the pictures; the seed determines which one is drawn."""

    def run(name, seed):
        folder = train(
            train_data_dir=tagged, random_flip=True, shuffle_tags=True, tag_variations=3, seed=seed,
            output_dir=tmp_path / name,
        )  # fmt: skip
        files = (tmp_path / "cache").rglob("*.safetensors")
        return read_lora(folder), {str(path): path.stat().st_ino for path in files}

    tagged = write_pictures(tmp_path / "tagged", count=4, captions=["sks, red, old, big", "sks, blue, new"])
    (first, before), (other, after), (_, unseeded) = run("first", 0), run("other", 1), run("unseeded", None)
    assert len(before) == 2
    assert before == after == unseeded
    assert any((first[name] != other[name]).any() for name in first)


def test_a_picture_is_opened_once_for_its_variations(some, monkeypatch):
    opened = []

    def count(data, mask):
        opened.append(data)
        return open_masked(data, mask)

    monkeypatch.setattr(picture_set, "open_masked", count)
    first = [some.pixels(index, k) for index in (0, 1) for k in range(4)]
    assert opened == [read_image_bytes(some.records[index]["image"]) for index in (0, 1)]
    # Only the last picture is kept in memory, and it is read-only.
    first[-1][:] = 0
    assert some.pixels(1, 3).any()
    assert len(opened) == 2
    some.pixels(0, 0)
    assert len(opened) == 3


def test_what_has_no_mask_counts_everywhere(some):
    mask = some.mask(0, 0, 4)
    assert mask.dtype == np.float16
    assert mask.shape == (8, 8)
    assert (mask == 1).all()
    assert some.mask(4, 0, 8).shape == (2, 6)
    assert not (some.mask(1, 0, 4) == 1).all()


def test_a_mask_goes_with_the_variation_of_its_picture(pictures):
    """If the picture is flipped, its mask is flipped too."""
    half = Image.new("L", (40, 32), 0)
    half.paste(255, (0, 0, 20, 32))
    half.save(pictures / "1.mask.png")
    flipped = make_picture_set(pictures, center_crop=True, random_flip=True)
    left = np.repeat([[1.0] * 4 + [0.0] * 4], 8, axis=0)
    assert flipped.mask(1, 0, 4).tolist() == left.tolist()
    assert flipped.mask(1, 1, 4).tolist() == left[:, ::-1].tolist()


def test_masked_and_class_follow_the_part(some, pictures, tmp_path):
    assert some.masked
    assert some.is_class == [False] * 6
    assert [some.select([index]).masked for index in range(6)] == [False, True, False, False, False, True]
    assert not some.select([]).masked
    records = with_class_pictures(
        read_records(pictures), read_records(write_pictures(tmp_path / "dogs", count=2, seed=5))
    )
    both = make_picture_set(records)
    assert both.is_class == [False] * 6 + [True] * 2
    assert both.select([7, 0, 6]).is_class == [True, False, True]
    assert replace(both, captions=[["a"]] * 8).is_class == both.is_class
    assert not both.select([0, 6, 7]).masked


def test_the_fingerprint_is_of_pictures_captions_order_and_samples(some):
    others = [
        some, some.select([0, 1, 2, 3, 4]), some.select([1, 0, 2, 3, 4, 5]), replace(some, captions=[["a"]] * 6),
    ]  # fmt: skip
    found = {other.fingerprint() for other in others} | {some.fingerprint([0, 1]), some.fingerprint([1, 0])}
    assert len(found) == 6
    assert replace(some, view=some.view._replace(interpolation="nearest")).fingerprint() == some.fingerprint()


def test_it_goes_to_another_process_without_the_picture_that_is_open(some):
    expected = some.pixels(4, 1)
    data = pickle.dumps(some)
    there = pickle.loads(data)
    assert "_opened" in vars(some)
    assert "_opened" not in vars(there)
    assert (there.pixels(4, 1) == expected).all()
    assert there.facts == some.facts
    assert there.records[:] == some.records[:]


class PixelsOf(torch.utils.data.Dataset):
    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return {
            "pixels": torch.from_numpy(self.pictures.pixels(index, index % 3)),
            "mask": self.pictures.mask(index, 0, 4),
        }


def test_a_loaders_workers_see_what_this_process_sees(some):
    some.pixels(3, 0)  # one file is open here
    loader = torch.utils.data.DataLoader(
        PixelsOf(some), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    for index, row in enumerate(loader):
        assert (row["pixels"].numpy() == some.pixels(index, index % 3)).all()
        assert (np.asarray(row["mask"]) == some.mask(index, 0, 4)).all()

"""Masks weight the loss, wherever they come from; class pictures are drawn as often as those that are learned."""

import json

import numpy as np
import pytest
import torch
from conftest import read_lora, read_metrics, write_pictures
from PIL import Image

from text_to_image_lora import objective
from text_to_image_lora.caching import mask_of
from text_to_image_lora.data import EffectiveBatchSampler, add_class_samples
from text_to_image_lora.errors import InputError
from text_to_image_lora.records import load_records, read_image_bytes
from text_to_image_lora.transforms import Variation, apply_variation, apply_variation_to_mask, open_mask


def half(size=(40, 32)):
    """White on the left half, black on the right."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_a_masked_loss_is_a_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    mask, weights = torch.rand(3, 1, 8, 8, generator=generator), torch.tensor([0.2, 0.3, 0.5])
    expected = sum(
        w * float((m * (p - t).square()).double().sum() / (4 * m.double().sum()))
        for w, m, p, t in zip(weights.tolist(), mask, pred, target, strict=True)
    )
    assert float(objective.diffusion_loss(pred, target, weights, mask)) == pytest.approx(expected, rel=1e-5)
    ones = torch.ones_like(mask)
    assert torch.equal(
        objective.diffusion_loss(pred, target, weights, ones), objective.diffusion_loss(pred, target, weights)
    )
    # What is hidden has no gradient; a picture that is hidden wholly gives no NaN.
    pred.requires_grad_(True)
    mask[0], mask[1, :, :, 4:] = 0, 0
    objective.diffusion_loss(pred, target, weights, mask).backward()
    assert (pred.grad[0] == 0).all()
    assert (pred.grad[1, :, :, 4:] == 0).all()
    assert (pred.grad[1, :, :, :4] != 0).any()


@pytest.mark.parametrize(
    "variation", [Variation(0, 0, False), Variation(8, 0, True), Variation(3, 2, False, share=0.8), Variation(2, 1, True, turn=30.0)]
)  # fmt: skip
def test_a_mask_is_cut_as_its_picture(variation):
    """A picture that is its own mask stays its own mask."""
    rng = np.random.default_rng(1)
    mask = Image.fromarray(rng.integers(0, 256, (4, 5), dtype=np.uint8)).resize((90, 70), Image.Resampling.BICUBIC)
    pixels = apply_variation(mask.convert("RGB"), variation, (32, 32), "bilinear")[..., 0]
    expected = pixels.reshape(8, 4, 8, 4).mean(axis=(1, 3)) / 255
    cut = apply_variation_to_mask(mask, variation, (32, 32), 4)
    assert cut.dtype == np.float32
    assert np.abs(cut - expected).max() < 1e-6


@pytest.fixture
def masked(tmp_path):
    folder = write_pictures(tmp_path / "masked", count=4)
    half().save(folder / "1.mask.png")
    return folder


def test_a_mask_beside_its_picture(masked):
    said = []
    dataset = load_records(train_data_dir=masked, say=said.append)
    assert [row["mask"] is not None for row in dataset] == [False, True, False, False]
    assert len(dataset) == 4
    assert said == []  # a mask is no picture without a row
    centred = Variation(4, 0, False)
    assert mask_of(dataset[0]["mask"], (40, 32), centred, (32, 32), 4).tolist() == torch.ones(1, 8, 8).tolist()
    mask = mask_of(dataset[1]["mask"], (40, 32), centred, (32, 32), 4)
    assert (mask[..., :4] == 1).all()
    assert (mask[..., 4:] == 0).all()
    # Caption files: the same.
    for i in range(4):
        (masked / f"{i}.txt").write_text("a cat")
    (masked / "metadata.jsonl").unlink()
    assert [row["mask"] is not None for row in load_records(train_data_dir=masked)] == [False, True, False, False]


def test_a_column_of_masks(tmp_path):
    folder = write_pictures(tmp_path / "set", count=2)
    half().save(folder / "left.png")
    rows = [
        {"file_name": "0.png", "text": "a", "where": "left.png"},
        {"file_name": "1.png", "text": "b", "where": None},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_records(train_data_dir=folder, mask_column="where")
    assert read_image_bytes(dataset[0]["mask"]) == (folder / "left.png").read_bytes()
    assert dataset[1]["mask"] is None
    assert dataset["captions"][:] == [["a"], ["b"]]
    with pytest.raises(InputError, match="no column 'were' \\(--mask_column\\)"):
        load_records(train_data_dir=folder, mask_column="were")
    rows[1]["where"] = "../left.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        InputError, match=r"metadata.jsonl:2: its mask '../left.png' does not exist in the dataset folder"
    ):
        load_records(train_data_dir=folder, mask_column="where")


def test_a_stored_dataset_with_masks(tmp_path):
    import datasets

    cells = [{"bytes": (write_pictures(tmp_path / "p") / f"{i}.png").read_bytes(), "path": None} for i in range(2)]
    features = datasets.Features(
        {"photo": datasets.Image(), "where": datasets.Image(), "text": datasets.Value("string")}
    )
    stored = datasets.Dataset.from_dict(
        {"photo": cells, "where": [cells[1], None], "text": ["a", "b"]}, features=features
    )
    stored.save_to_disk(tmp_path / "stored")
    dataset = load_records(dataset_name=str(tmp_path / "stored"), image_column="photo", mask_column="where")
    assert read_image_bytes(dataset[0]["mask"]) == cells[1]["bytes"]
    assert dataset[1]["mask"] is None
    with pytest.raises(InputError, match="'text' holds no pictures \\(--mask_column\\)"):
        load_records(dataset_name=str(tmp_path / "stored"), mask_column="text")


@pytest.mark.parametrize("cache_variations", [4, 0])
def test_masks_change_what_is_learned(train, masked, tmp_path, cache_variations):
    options = dict(train_data_dir=masked, max_train_steps=4, cache_variations=cache_variations)
    with_mask = read_metrics(train(output_dir=tmp_path / "with", **options))
    (masked / "1.mask.png").unlink()
    without = read_metrics(train(output_dir=tmp_path / "without", **options))
    assert (
        with_mask[0]["train_loss"] != without[0]["train_loss"]
        or with_mask[1]["train_loss"] != without[1]["train_loss"]
    )


def test_a_changed_mask_is_another_dataset(train, masked, tmp_path):
    """The cache must not serve latents with the mask of before."""
    first = read_lora(train(train_data_dir=masked, max_train_steps=3, output_dir=tmp_path / "a"))
    half().rotate(180).save(masked / "1.mask.png")
    second = read_lora(train(train_data_dir=masked, max_train_steps=3, output_dir=tmp_path / "b"))
    assert any((second[name] != value).any() for name, value in first.items())


def test_a_broken_mask_is_told(train, masked):
    (masked / "1.mask.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1\.png'?: its mask: it can't be decoded"):
        train(train_data_dir=masked)


def test_an_empty_mask_is_told_or_left_out_with_its_picture(train, masked, capsys):
    (masked / "1.mask.png").write_bytes(b"")
    reason = f"{masked}/metadata.jsonl:2: '1.png': its mask: the file is empty"
    with pytest.raises(InputError) as caught:
        train(train_data_dir=masked)
    assert str(caught.value) == f"{reason}. Fix it, or pass --skip_bad_images to leave it out."
    train(train_data_dir=masked, skip_bad_images=True)
    out = capsys.readouterr().out
    assert f"left out: {reason}\n" in out
    assert "\n3 pictures, " in out


@pytest.mark.parametrize("layout", ["metadata", "caption_files"])
def test_a_mask_that_belongs_to_no_picture_is_told(masked, layout):
    for name in ("11.mask.png", "one.mask.png"):  # slips for 1.mask.png
        half().save(masked / name)
    if layout == "caption_files":
        for i in range(4):
            (masked / f"{i}.txt").write_text("a cat")
        (masked / "metadata.jsonl").unlink()
    said = []
    dataset = load_records(train_data_dir=masked, say=said.append)
    assert [row["mask"] is not None for row in dataset] == [False, True, False, False]
    assert said == [f"{masked}: 2 masks belong to no picture, as their names say; the first: 11.mask.png"]


def erased(mode):
    """The mask of `half` as an editor may save it: white everywhere, and its right half erased."""
    if mode == "P":
        mask = Image.new("P", (40, 32), 0)
        mask.putpalette([255, 255, 255] * 2)
        mask.paste(1, (20, 0, 40, 32))
        return mask, {"transparency": 1}
    mask = Image.new(mode, (40, 32), "white")
    mask.putalpha(half())
    return mask, {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_in_a_mask_does_not_count(tmp_path, mode):
    mask, options = erased(mode)
    mask.save(tmp_path / "mask.png", **options)
    with Image.open(tmp_path / "mask.png") as stored:
        assert stored.mode == mode
    cell = {"bytes": None, "path": str(tmp_path / "mask.png")}
    cut = mask_of(cell, (40, 32), Variation(4, 0, False), (32, 32), 4)
    assert (cut[..., :4] == 1).all()
    assert (cut[..., 4:] == 0).all()


def test_what_is_half_transparent_in_a_mask_counts_half(tmp_path):
    Image.new("LA", (40, 32), (255, 128)).save(tmp_path / "mask.png")
    mask = open_mask((tmp_path / "mask.png").read_bytes(), (40, 32))
    assert mask.getextrema() == (128, 128)


# Class pictures.


@pytest.mark.parametrize(("learned", "others"), [(3, 10), (10, 3), (4, 4)])
def test_as_many_class_pictures_as_learned_ones(learned, others):
    own = np.repeat(np.arange(learned), 2)
    samples = add_class_samples(own, np.arange(learned, learned + others))
    counts = np.bincount(samples, minlength=learned + others)
    # Every picture of both is drawn, and each side equally often.
    assert counts.min() >= 1
    assert counts[:learned].sum() == counts[learned:].sum() == max(2 * learned, others)
    assert np.ptp(counts[learned:]) <= 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loss_weights_count_whatever_the_batch_holds(batch_size):
    """Also where a step has pictures of one side only: the flag mustn't cancel out, nor give 0 / 0."""
    for other in (0.25, 0.0):
        weights = [1.0] * 5 + [other] * 5
        sampler = EffectiveBatchSampler(
            range(10), loss_weights=weights, batch_size=batch_size, accumulation=1, rank=0, world_size=1, seed=0
        )
        mean = sum(weights) / 10
        for step in range(sampler.steps_per_epoch):
            samples = [sample for batch in sampler.micro_batches(step) for sample in batch]
            for sample in samples:
                assert sample.weight == pytest.approx(weights[sample.index] / mean / len(samples))


def test_prior_preservation_trains(train, tmp_path, capsys):
    dogs = write_pictures(tmp_path / "dogs", count=3, seed=5)
    (dogs / "metadata.jsonl").unlink()
    folder = train(class_data_dir=dogs, class_prompt="a dog", prior_loss_weight=0.5, trigger_word="sks")
    assert "9 pictures, 6 steps an epoch" in capsys.readouterr().out
    assert len(read_metrics(folder)) == 2
    with pytest.raises(InputError, match="the pictures have no captions"):
        train(class_data_dir=dogs)
    with pytest.raises(InputError, match="--class_prompt is the caption of --class_data_dir's pictures"):
        train(class_prompt="a dog")


def test_class_pictures_do_not_take_the_trigger(pictures, tmp_path):
    from text_to_image_lora.records import with_class_pictures

    dogs = write_pictures(tmp_path / "dogs", count=3, seed=5, captions=["a dog"])
    dataset = with_class_pictures(
        load_records(train_data_dir=pictures, trigger_word="sks"), load_records(train_data_dir=dogs)
    )
    assert dataset["is_class"][:] == [False] * 6 + [True] * 3
    assert all(group[0].startswith("sks, ") for group in dataset["captions"][:6])
    assert dataset["captions"][6:] == [["a dog"]] * 3


def test_an_empty_mask_is_told_of_a_picture_that_was_seen_without_one(train, pictures, tmp_path, capsys):
    """The list of known pictures goes by content, and an empty mask adds nothing to it."""
    train(output_dir=tmp_path / "before")
    (pictures / "1.mask.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.png': its mask: the file is empty"):
        train()
    train(skip_bad_images=True)
    assert "1.png': its mask: the file is empty" in capsys.readouterr().out

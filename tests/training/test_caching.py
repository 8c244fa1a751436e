"""The cache, with real encoders: cached tensors equal freshly encoded ones, and files are written whole or not at all."""

import copy
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import batch_sampler, make_picture_set, make_transparent, write_pictures
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from text_to_image_lora.errors import InputError, Stopped, TrainingError
from text_to_image_lora.models import latents
from text_to_image_lora.models.families import STABLE_DIFFUSION
from text_to_image_lora.models.latents import LatentEncoder
from text_to_image_lora.models.loading import find_base_model, load_components
from text_to_image_lora.models.prompts import PromptEncoder
from text_to_image_lora.pictures import picture_set
from text_to_image_lora.pictures.examine import Picture
from text_to_image_lora.pictures.picture_set import PictureSet, View
from text_to_image_lora.pictures.settings import AugmentationSettings
from text_to_image_lora.pictures.transforms import apply_variation, draw_variation
from text_to_image_lora.training import caching, interruption
from text_to_image_lora.training.batches import Sample
from text_to_image_lora.training.data import Draws, TrainingSet, make_loader
from text_to_image_lora.training.ending import end
from text_to_image_lora.training.shards import CHECKSUMS, Shard, ShardReader, check_free_disk, fill_shards, is_whole


@pytest.fixture(scope="module")
def base(tiny_sd):
    return find_base_model(str(tiny_sd))


@pytest.fixture(scope="module")
def encoders(base):
    """Returns tokenizer, text encoder and VAE."""
    loaded = load_components(base)
    return loaded.tokenizers[0], loaded.text_encoders[0], loaded.vae


def prompt_encoder(tokenizer, text_encoder, clip_skip=None, dtype=torch.float32):
    return PromptEncoder(STABLE_DIFFUSION, [tokenizer], [text_encoder], clip_skip=clip_skip, num_chunks=1, dtype=dtype)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Makes six pictures fill three shards of each kind."""
    monkeypatch.setattr(caching, "IMAGES_PER_SHARD", 2)
    monkeypatch.setattr(caching, "CAPTIONS_PER_SHARD", 2)


@pytest.fixture
def pictures(tmp_path):
    """Writes six pictures that are 40x32 after resizing."""
    return write_pictures(tmp_path / "pictures", size=(60, 48))


class Built(NamedTuple):
    """A cache and its pictures."""

    pictures: PictureSet
    latents: caching.CachedLatents
    prompts: caching.CachedPrompts

    def content(self):
        """Returns all tensors, by picture and caption."""
        latents = [
            [torch.stack([self.latents.row(i, k)[0][name] for name in ("mean", "std")]) for k in range(len(row))]
            for i, row in enumerate(self.latents.locations)
        ]
        return latents, {caption: self.hidden_states(caption) for caption in self.prompts.places}

    def hidden_states(self, caption):
        return self.prompts.row(caption)["encoder_hidden_states"]


def equal_content(first, second):
    latents, prompts = zip(first.content(), second.content())
    return (
        [len(rows) for rows in latents[0]] == [len(rows) for rows in latents[1]]
        and all(torch.equal(a, b) for row in zip(*latents, strict=True) for a, b in zip(*row, strict=True))
        and prompts[0].keys() == prompts[1].keys()
        and all(torch.equal(prompts[0][caption], prompts[1][caption]) for caption in prompts[0])
    )


@pytest.fixture
def build(base, encoders, tmp_path):
    """Builds the cache of a dataset folder as the training script does, by default with --random_flip."""
    from accelerate import PartialState

    tokenizer, *models_of_base = encoders

    def run(
        folder, where=tmp_path / "cache", text_encoder=models_of_base[0], vae=models_of_base[1], clip_skip=None,
        latent_dtype=torch.float32, prompt_dtype=torch.float32, variations=4, examined=None, **changes,
    ):  # fmt: skip
        pictures = examined or make_picture_set(folder, **dict(random_flip=True) | changes)
        captions = [caption for group in pictures.captions for caption in group]
        encoder = prompt_encoder(tokenizer, text_encoder, clip_skip, prompt_dtype)
        cache = caching.Cache(where, base, LatentEncoder(vae, latent_dtype), encoder)
        return Built(pictures, *cache.build(pictures, variations, captions, PartialState(cpu=True)))

    yield run
    PartialState._reset_state()


def shards_in(folder):
    """Returns {path: (modification time, bytes)} of the cache's files, and checks that there are only tensor files."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert all(path.suffix == ".safetensors" for path in files)
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# Cached equals live.


def training_set(built, base, cached=True):
    cache = dict(latents=built.latents, prompts=built.prompts) if cached else {}
    return TrainingSet(built.pictures, base, Draws(0, 1000), **cache)


@pytest.mark.parametrize("alpha_mask", [False, True])
@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cached_equals_live(build, base, encoders, pictures, dtype, clip_skip, alpha_mask):
    tokenizer, text_encoder, vae = encoders
    if alpha_mask:
        make_transparent(pictures, (1, 4))
    # With --center_crop there are two variations, and both are cached.
    built = build(
        pictures, center_crop=True, random_flip=True, variations=2, latent_dtype=dtype, prompt_dtype=dtype,
        clip_skip=clip_skip, alpha_mask=alpha_mask,
    )  # fmt: skip
    encode_latents, encode_prompts = LatentEncoder(vae, dtype), prompt_encoder(tokenizer, text_encoder, clip_skip)
    cached, live = (training_set(built, base, which) for which in (True, False))
    for index in range(6):
        for step in range(3):
            sample = Sample(index, step, index, 0.5)
            from_cache, now = cached[sample], live[sample]
            mean, std = encode_latents(now.pop("pixels")[None])
            hidden_states = encode_prompts([now.pop("captions")])["encoder_hidden_states"]
            assert now.pop("condition") == {}
            encoded = {
                "mean": mean[0].to(dtype).float(), "std": std[0].to(dtype).float(),
                "encoder_hidden_states": hidden_states[0].to(dtype),
            }  # fmt: skip
            from_cache |= from_cache.pop("condition")
            assert ("mask" in now) == alpha_mask
            for name, value in encoded.items():
                tolerance = 1e-5 if dtype == torch.float32 else 2e-3
                torch.testing.assert_close(from_cache.pop(name), value, rtol=tolerance, atol=tolerance)
            assert from_cache.keys() == now.keys()
            assert all(torch.equal(from_cache[name], now[name]) for name in now)


def test_opaque_parts_are_not_taken_from_the_cache_of_whole_pictures(build, pictures, tmp_path):
    """Also not the other way round; of pictures without transparency, both share what is cached."""
    build(pictures)
    cached = shards_in(tmp_path / "cache")
    build(pictures, alpha_mask=True)
    assert shards_in(tmp_path / "cache") == cached
    make_transparent(pictures, (1, 4))
    whole, opaque, again = (build(pictures, alpha_mask=alpha_mask) for alpha_mask in (False, True, False))
    names = [{*built.latents.row(i, 0)[0]} for built in (whole, opaque, again) for i in range(6)]
    assert ["mask" in each for each in names] == [False] * 6 + [True] * 6 + [False] * 6
    masks = torch.stack([opaque.latents.row(i, 0)[0]["mask"] for i in range(6)])
    assert [(mask == 1).all().item() for mask in masks] == [True, False, True, True, False, True]


def test_cached_equals_live_to_the_bit_in_the_same_batch(build, encoders, pictures):
    tokenizer, text_encoder, vae = encoders
    built = build(pictures)
    files, flipped = [Image.open(pictures / f"{i}.png") for i in range(6)], AugmentationSettings(random_flip=True)
    for first in range(0, 6, 2):
        pixels, rows = [], []
        for i in (first, first + 1):
            name = built.pictures.facts[i].image_id
            for k in range(4):
                location = built.latents.locations[i, k].tolist()
                if location not in rows:
                    rows.append(location)
                    variation = draw_variation(60, 48, (32, 32), flipped, image_id=name, index=k)
                    pixels.append(torch.from_numpy(apply_variation(files[i], variation, (32, 32))))
        stored = [built.latents.reader.row(*row) for row in rows]
        for name, value in zip(("mean", "std"), LatentEncoder(vae, torch.float32)(torch.stack(pixels))):
            assert torch.equal(torch.stack([row[name] for row in stored]), value)
        captions = [caption for group in built.pictures.captions[first : first + 2] for caption in group]
        stored = torch.stack([built.hidden_states(caption) for caption in captions])
        now = prompt_encoder(tokenizer, text_encoder)(captions)["encoder_hidden_states"]
        assert torch.equal(stored, now)


def test_cached_pictures_keep_their_captions(build, base, tmp_path):
    """Fault 12: latents and prompt embeddings belong to their picture in any order of training."""
    # Pictures 0 and 4 have equal captions, which are stored once.
    built = build(write_pictures(tmp_path / "set", captions=["a cat", "a dog", "an axe", "a whip"]))
    latents, prompts = built.content()
    assert len(prompts) == 4
    sampler = batch_sampler(range(6), batch_size=2, accumulation=2, rank=0, world_size=1, seed=0, num_steps=8)
    pairs, orders = Counter(), set()
    loader = torch.utils.data.DataLoader(
        training_set(built, base), batch_sampler=sampler, collate_fn=torch.utils.data.default_collate
    )
    for batch in loader:
        found = []
        for mean, states in zip(batch["mean"], batch["condition"]["encoder_hidden_states"]):
            (picture,) = (i for i, rows in enumerate(latents) if any(torch.equal(mean, row[0]) for row in rows))
            (caption,) = (caption for caption, value in prompts.items() if torch.equal(states, value))
            assert [caption] == built.pictures.captions[picture]
            pairs[picture] += 1
            found.append(picture)
        orders.add(tuple(found))
    assert pairs == dict.fromkeys(range(6), 4)
    assert len(orders) > 6


def test_workers_read_the_same(build, base, pictures):
    built = build(pictures)
    sampler = batch_sampler(range(6), batch_size=2, accumulation=1, rank=0, world_size=1, seed=0, num_steps=4)
    here, there = (
        [
            batch | batch.pop("condition")
            for batch in torch.utils.data.DataLoader(
                training_set(built, base),
                batch_sampler=sampler,
                collate_fn=torch.utils.data.default_collate,
                num_workers=workers,
            )
        ]
        for workers in (0, 2)
    )
    assert len(here) == len(there) == 4
    assert all(torch.equal(a[name], b[name]) for a, b in zip(here, there) for name in a)


# Variations.


@pytest.mark.parametrize(
    ("center_crop", "random_flip", "square", "wide"), [(1, 0, 1, 1), (1, 1, 2, 2), (0, 0, 1, 4), (0, 1, 2, 4)]
)
def test_equal_variations_are_stored_once(center_crop, random_flip, square, wide):
    augmentation = AugmentationSettings(center_crop=bool(center_crop), random_flip=bool(random_flip))
    facts = [Picture(f"{i:032x}", *size) for i, size in enumerate([(50, 50), (900, 32), (32, 32)])]
    pictures = PictureSet({"mask": [None] * 3}, facts, [(32, 32)] * 3, [[]] * 3, View(augmentation))
    shards, locations = caching.plan_latents(
        pictures, augmentation.variations() or 4, identity="vae", dtype=torch.float32, folder="cache"
    )
    assert [len(shard.entries) for shard in shards] == [square + wide, square]
    for i, rows in enumerate(locations):
        for k, (shard, row) in enumerate(rows):
            stored = shards[shard].entries[row].tolist()
            assert stored[0] == i
            assert pictures.variation(*stored) == pictures.variation(i, k)


# Nothing stale.


def edit_picture(folder):
    pixels = np.array(Image.open(folder / "3.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "3.png")


def edit_caption(folder):
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace("axe number 3", "axe number three"))


def one_weight_changed(model, name):
    changed = copy.deepcopy(model)
    changed.get_parameter(name).data.view(-1)[0] += 1e-2
    return changed


@pytest.mark.parametrize(
    ("change", "latents", "prompts"),
    [
        (lambda folder, text_encoder, vae: {}, 0, 0),
        (lambda folder, text_encoder, vae: edit_picture(folder) or {}, 1, 0),
        (lambda folder, text_encoder, vae: edit_caption(folder) or {}, 0, 1),
        (lambda folder, text_encoder, vae: dict(vae=one_weight_changed(vae, "encoder.conv_in.weight")), 3, 0),
        (lambda folder, text_encoder, vae: dict(text_encoder=one_weight_changed(text_encoder, "text_model.final_layer_norm.bias")), 0, 3),
        (lambda folder, text_encoder, vae: dict(clip_skip=1), 0, 3),
        (lambda folder, text_encoder, vae: dict(sizes=[(64, 64)] * 6), 3, 0),
        (lambda folder, text_encoder, vae: dict(interpolation="nearest"), 3, 0),
        (lambda folder, text_encoder, vae: dict(random_flip=False), 3, 0),
        (lambda folder, text_encoder, vae: dict(variations=9), 3, 0),
        (lambda folder, text_encoder, vae: dict(center_crop=True), 3, 0),
        (lambda folder, text_encoder, vae: dict(latent_dtype=torch.float16), 3, 0),
        (lambda folder, text_encoder, vae: dict(prompt_dtype=torch.bfloat16), 0, 3),
    ],
    ids=[
        "nothing", "picture", "caption", "vae", "text_encoder", "clip_skip", "size", "interpolation",
        "random_flip", "variations", "center_crop", "latent_dtype", "prompt_dtype",
    ],
)  # fmt: skip
def test_what_has_changed_is_encoded_again_and_nothing_else(
    build, encoders, pictures, tmp_path, change, latents, prompts
):
    before = build(pictures)
    shards = shards_in(tmp_path / "cache")
    assert Counter(Path(name).parent.name for name in shards) == {"latents": 3, "prompts": 3}
    options = change(pictures, *encoders[1:])
    after = build(pictures, **options)
    now = shards_in(tmp_path / "cache")
    assert {name: now[name] for name in shards} == shards
    new = Counter(Path(name).parent.name for name in now.keys() - shards.keys())
    assert (new["latents"], new["prompts"]) == (latents, prompts)
    assert equal_content(after, build(pictures, tmp_path / "fresh", **options))
    if latents or prompts:
        assert not equal_content(after, before)


def swap_picture(folder):
    shutil.copy(folder / "1.png", folder / "0.png")


def swap_after_the_first_shard(folder):
    shutil.copy(folder / "1.png", folder / "5.png")


def swap_mask(folder):
    Image.new("L", (60, 48), 0).save(folder / "0.mask.png")


def rewrite_picture(folder):
    with Image.open(folder / "0.png") as image:
        image.save(folder / "0.png", compress_level=1)


@pytest.mark.parametrize("swap", [swap_picture, swap_after_the_first_shard, swap_mask, rewrite_picture])
def test_only_what_was_examined_is_encoded(build, pictures, tmp_path, swap):
    """Otherwise the latents of one picture would stay in the cache under the hash of another."""
    Image.new("L", (60, 48), 255).save(pictures / "0.mask.png")
    undisturbed = build(pictures, where=tmp_path / "undisturbed")
    kept = {path: path.read_bytes() for path in pictures.iterdir()}
    examined = make_picture_set(pictures, random_flip=True)
    swap(pictures)
    with pytest.raises(
        TrainingError, match=r"png': the picture or its mask was changed .* Run the same command again\.$"
    ):
        build(pictures, examined=examined)
    for path, data in kept.items():
        path.write_bytes(data)
    assert equal_content(build(pictures), undisturbed)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pictures_that_are_not_cached_are_those_that_were_examined(base, pictures, num_workers, capsys):
    """A worker's error is one line too."""
    examined = make_picture_set(pictures)
    swap_picture(pictures)
    training_set = TrainingSet(examined, base, Draws(0, 1000))
    loader = make_loader(training_set, [[Sample(0, 0, 0, 1.0)]], num_workers, torch.device("cpu"))
    with pytest.raises(TrainingError) as caught:
        next(iter(loader))
    with pytest.raises(SystemExit) as ended:
        end(caught.value, "train.py", lambda: "")
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.py: {pictures}/")
    assert line.endswith("was changed after the run had examined it. Run the same command again.")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
@pytest.mark.parametrize("kind", ["latents", "prompts"])
def test_a_cut_shard_is_made_again(build, pictures, tmp_path, kind, keep):
    build(pictures)
    before = shards_in(tmp_path / "cache")
    cut = sorted((tmp_path / "cache" / kind).iterdir())[1]
    cut.write_bytes(cut.read_bytes()[:keep])
    build(pictures)
    after = shards_in(tmp_path / "cache")
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert [name for name in after if after[name][0] != before[name][0]] == [str(cut.relative_to(tmp_path / "cache"))]


# Filling.


@pytest.fixture
def fill(encoders, pictures, tmp_path):
    """Fills the latent shards of a dataset as some rank; calls `before(pixels)` before encoding."""
    pictures = make_picture_set(pictures, random_flip=True)

    def run(name, before=lambda pixels: None, rank=0, world_size=1):
        class Encoder(LatentEncoder):
            def __call__(self, pixels):
                before(pixels)
                return super().__call__(pixels)

        folder, encoder = tmp_path / name, Encoder(encoders[2], torch.float32)
        shards, _ = caching.plan_latents(pictures, 2, identity="vae", dtype=torch.float32, folder=folder)
        encode = partial(caching.encode_latent_entries, pictures=pictures, encoder=encoder, family=STABLE_DIFFUSION)
        fill_shards(shards, encode, rank=rank, world_size=world_size, title="", show_progress=False)
        return {name: data for name, (_, data) in shards_in(folder).items()}

    return run


def test_filling_is_resumed_after_an_interruption(fill, tmp_path):
    whole = fill("whole")
    assert len(whole) == 3
    calls = []

    def interrupt(pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill("parts", interrupt)
    parts = shards_in(tmp_path / "parts")
    assert len(parts) == 1
    assert {name: whole[name] for name in parts} == {name: data for name, (_, data) in parts.items()}
    assert fill("parts", interrupt) == whole
    assert len(calls) == 4  # the first shard was not encoded again


def test_a_failing_write_leaves_nothing(tmp_path):
    shard = Shard(tmp_path / "latents" / "a.safetensors", [1])
    with pytest.raises((TypeError, AttributeError, ValueError)):
        fill_shards(
            [shard], lambda entries, progress: {"mean": "no tensor"}, rank=0, world_size=1, title="",
            show_progress=False,
        )  # fmt: skip
    assert list(shard.path.parent.iterdir()) == []


def test_reading_rows_leaves_nothing_behind(tmp_path):
    """Slices of safetensors 0.8 leak an object at each read."""
    save_file({"mean": torch.randn(5, 4, 8, 8)}, tmp_path / "a.safetensors")
    reader = ShardReader([Shard(tmp_path / "a.safetensors", [1])])
    whole = [reader.row(0, row)["mean"] for row in range(5)]
    before = sys.getallocatedblocks()
    for row in range(2000):
        assert torch.equal(reader.row(0, row % 5)["mean"], whole[row % 5])
    assert sys.getallocatedblocks() < before + 500


@pytest.mark.parametrize("harm", ["truncated", "emptied", "deleted", "overwritten"])
@pytest.mark.parametrize("opened", [True, False])
def test_a_shard_that_is_harmed_during_a_run(tmp_path, harm, opened):
    """A truncated file that is mapped into memory would end the process by a signal."""
    path = tmp_path / "a.safetensors"
    stored = {"mean": torch.randn(5, 4, 80, 80), "mask": torch.rand(5, 1, 80, 80).bfloat16()}
    save_file(stored, path)
    reader = ShardReader([Shard(path, range(5))])
    if opened:
        assert all(torch.equal(tensor, stored[name][1]) for name, tensor in reader.row(0, 1).items())
    if harm == "deleted":
        path.unlink()
    elif harm == "overwritten":
        path.write_bytes(b"text")
    else:
        os.truncate(path, path.stat().st_size // 3 if harm == "truncated" else 0)
    if opened and harm == "deleted":  # the open file is still there
        assert torch.equal(reader.row(0, 4)["mask"], stored["mask"][4])
    else:
        with pytest.raises(TrainingError, match=r"a\.safetensors: this file of the cache cannot be read any more"):
            reader.row(0, 4)


@pytest.mark.parametrize("harm", ["zeros", "one bit", "rows exchanged"])
def test_a_shard_whose_values_are_damaged_is_encoded_again(fill, tmp_path, harm):
    """A power cut can leave zeros in a file of the right size, because shards are not flushed to the disk."""
    fill("cache")
    path = max((tmp_path / "cache").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    start, values = 8 + int.from_bytes(whole[:8], "little"), bytearray(whole)
    with safe_open(path, "pt") as file:
        row = file.get_tensor(min(file.keys()))[:1].nbytes
    if harm == "zeros":
        values[start:] = bytes(len(whole) - start)
    elif harm == "one bit":
        values[start + 5] ^= 1
    else:
        values[start : start + 2 * row] = values[start + row : start + 2 * row] + values[start : start + row]
    path.write_bytes(values)
    with pytest.raises(TrainingError, match="its data does not fit its checksums"):
        ShardReader([Shard(path, range(2))]).row(0, 0)
    assert not path.exists()
    fill("cache")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", ["no checksums", "no tensor"])
def test_a_shard_without_checksums_is_not_whole(tmp_path, content):
    shard = Shard(tmp_path / "a.safetensors", [1, 2])
    tensors = {} if content == "no tensor" else {"mean": torch.zeros(2, 3)}
    save_file(tensors, shard.path, {} if tensors else {CHECKSUMS: "[]"})
    assert not is_whole(shard)
    fill_shards([shard], lambda *_: {"mean": torch.ones(2, 3)}, rank=0, world_size=1, title="", show_progress=False)
    assert is_whole(shard)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ranks_share_the_work(fill, order):
    """Each rank encodes its own share, whatever the others have done; every shard is encoded once, with equal bytes."""
    made = []
    whole = fill("whole", made.append)
    count, made[:] = len(made), []
    first = fill("parts", made.append, rank=order[0], world_size=2)
    assert 0 < len(first) < len(whole)
    assert fill("parts", made.append, rank=order[1], world_size=2) == whole
    assert len(made) == count


def test_large_pictures_are_encoded_in_parts(fill, monkeypatch):
    """The encoder's batch size depends only on the resolution."""
    whole = fill("whole")
    monkeypatch.setattr(latents, "ENCODE_PIXELS", 3 * 32 * 32)
    parts = fill("parts")
    assert whole.keys() == parts.keys()
    assert sorted(len(data) for data in whole.values()) == sorted(len(data) for data in parts.values())


def test_a_picture_is_decoded_once_for_all_its_variations(fill, monkeypatch):
    opened = []
    inner, vary = picture_set.open_masked, picture_set.apply_variation

    def slowly(*args):  # lets the decoding threads interleave
        time.sleep(0.002)
        return vary(*args)

    monkeypatch.setattr(picture_set, "open_masked", lambda data, mask: opened.append(data) or inner(data, mask))
    monkeypatch.setattr(picture_set, "apply_variation", slowly)
    fill("whole")
    assert len(opened) == len(set(opened)) == 6


def test_others_may_read_the_cache(fill, tmp_path):
    """The files of a cache, which may be shared, have the permissions of other new files."""
    (tmp_path / "ordinary").touch()
    fill("whole")
    modes = {path.stat().st_mode for path in (tmp_path / "whole").rglob("*.safetensors")}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}


def test_a_cache_that_cannot_fit_is_refused_before_it_is_made(tmp_path):
    folder, free = tmp_path / "to" / "be" / "made", shutil.disk_usage(tmp_path).free
    check_free_disk(folder, free // 2)
    with pytest.raises(InputError, match="--latent_cache_dir") as caught:
        check_free_disk(folder, 2 * free)
    assert str(caught.value).startswith(f"{folder}: ")


@pytest.fixture
def disk(monkeypatch):
    """Sets the number of free bytes."""

    def has(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    return has


LATENTS, CAPTION = 4 * 2 * 6 * 4 * 8 * 8, 4 * 77 * 96  # bytes of mean and std of six pictures, and of a caption


def test_each_different_caption_takes_room_once(train, tmp_path, disk):
    options = dict(train_data_dir=write_pictures(tmp_path / "set", captions=["an axe", "a whip"]), center_crop=True)
    disk(free=LATENTS + 2 * CAPTION - 1)
    with pytest.raises(InputError, match=f"{tmp_path}/cache: the cache needs .* --latent_cache_dir"):
        train(**options)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    disk(free=LATENTS + 2 * CAPTION)
    train(**options)
    # Six different captions need more space than two.
    options = dict(center_crop=True, latent_cache_dir=tmp_path / "other", output_dir=tmp_path / "other-out")
    with pytest.raises(InputError, match="the cache needs"):
        train(**options)
    disk(free=LATENTS + 6 * CAPTION)
    train(**options)


def test_a_cache_that_has_filled_its_disk_is_used_again(train, tmp_path, disk):
    disk(free=LATENTS + 6 * CAPTION)
    train(center_crop=True)
    disk(free=0)
    train(center_crop=True, output_dir=tmp_path / "again")
    with pytest.raises(InputError, match=f"{tmp_path}/elsewhere: the cache needs"):
        train(center_crop=True, output_dir=tmp_path / "third", latent_cache_dir=tmp_path / "elsewhere")


@pytest.mark.parametrize("options", [dict(mixed_precision="bf16", center_crop=True), dict(size=(40, 40))], ids=str)
def test_a_whole_cache_on_a_full_disk_serves(train, tmp_path, monkeypatch, options):
    folder = write_pictures(tmp_path / "set", size=options.pop("size", (40, 32)))
    train(train_data_dir=folder, **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    train(train_data_dir=folder, output_dir=tmp_path / "again", **options)


def test_long_prompts_take_more_room(train, tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "set", captions=["axe " * 700])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * (2 * 6 * 256 + 77 * 96)))
    with pytest.raises(InputError, match="the cache needs"):
        train(train_data_dir=folder, long_prompts=True, center_crop=True)


def test_the_estimate_with_long_prompts(train, tmp_path):
    folder = write_pictures(tmp_path / "set", captions=["axe " * 700])
    options = dict(train_data_dir=folder, long_prompts=True, center_crop=True)
    train(dry_run=True, **options)
    expected = json.loads((tmp_path / "out" / "dataset.json").read_text())["cache_bytes"]
    train(**options)
    taken = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert taken < 1.1 * expected


def test_latents_with_masks_and_without_are_not_the_same(tmp_path):
    """If any picture has a mask, the shards of pictures without masks contain masks too."""
    folder, options = write_pictures(tmp_path / "set"), dict(identity="vae", dtype=torch.float32, folder=tmp_path)
    plain, _ = caching.plan_latents(make_picture_set(folder, center_crop=True), 1, **options)
    Image.new("L", (40, 32), 255).save(folder / "5.mask.png")
    masked, _ = caching.plan_latents(make_picture_set(folder, center_crop=True), 1, **options)
    again, _ = caching.plan_latents(make_picture_set(folder, center_crop=True).select(range(5)), 1, **options)
    assert len(plain) == len(masked) == len(again) == 3
    assert {shard.path for shard in plain}.isdisjoint(shard.path for shard in masked)
    assert [shard.path for shard in again[:2]] == [shard.path for shard in plain[:2]]  # equal content has equal names


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_heard_while_variations_are_laid_out(build, pictures, tmp_path, monkeypatch, name):
    """So many variations take minutes, in which nothing is encoded."""
    drawn, variation = [], PictureSet.variation

    def ask_to_stop(pictures, i, k):
        drawn.append((i, k))
        if len(drawn) == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return variation(pictures, i, k)

    monkeypatch.setattr(PictureSet, "variation", ask_to_stop)
    interruption.listen()
    interruption.defer_requests()
    try:
        with pytest.raises(Stopped, match="while encoding pictures and captions"):
            build(pictures, variations=5)
    finally:
        interruption.stop_listening()
    assert not shards_in(tmp_path / "cache")
    assert {i for i, _ in drawn} == {0}  # the pictures after it were not laid out any more

"""The cache on disk: VAE latents and prompt embeddings, computed once and shared by later runs.

A shard's name is a hash of everything that its content depends on (the pictures' bytes, crops and flips, the VAE's
weights, the dtype; the captions and the text encoder's weights). So nothing in the cache can be stale: what has changed
has another name. Shards are consecutive parts of the dataset and are encoded in batches that depend on its order alone;
each is written whole or not at all.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from .errors import InputError
from .records import read_image_bytes
from .transforms import (
    apply_variation,
    apply_variation_to_mask,
    draw_variation,
    open_image,
    open_mask,
)  # fmt: skip


CACHE_VERSION = 2
IMAGES_PER_SHARD = 64
CAPTIONS_PER_SHARD = 256
ENCODE_PIXELS = 4 * 512 * 512
ENCODE_CAPTIONS = 32


class Shard(NamedTuple):
    """A file of the cache, and what its rows hold: captions, or (picture's index, variation's number)."""

    path: Path
    entries: Sequence


def variation_of(index, k, *, images, sizes, augmentation, seed):
    """Variation `k` of a picture, by its index in `images` and `sizes` (as in `plan_latents`)."""
    image = images[index]
    return draw_variation(
        image.width, image.height, sizes[index], augmentation, seed=seed, image_id=image.image_id, index=k
    )


def plan_latents(
    images, sizes, *, cache_variations, interpolation, augmentation, seed, identity, dtype, folder, masked=False
):
    """The shards for `images` (a list of `Picture`s), and where each variation of each picture lies.

    `sizes` holds the (width, height) that each picture is trained at; a shard's pictures have one size. Returns shards
    whose entries are (index, k), and locations[i, k] = (shard, row), both int32. Variations that are alike (a square
    picture has one crop) are stored once.
    """
    shards, locations = [], np.zeros((len(images), cache_variations, 2), dtype=np.int32)
    members = {}
    for i, size in enumerate(sizes):
        members.setdefault(size, []).append(i)
    groups = (
        (size, same[start : start + IMAGES_PER_SHARD])
        for size, same in members.items()
        for start in range(0, len(same), IMAGES_PER_SHARD)
    )
    for size, group in groups:
        entries, described = [], []
        for i in group:
            seen = {}
            for k in range(cache_variations):
                variation = variation_of(i, k, images=images, sizes=sizes, augmentation=augmentation, seed=seed)
                if variation not in seen:
                    seen[variation] = len(entries)
                    entries.append((i, k))
                    described.append([images[i].image_id, *variation])
                locations[i, k] = len(shards), seen[variation]
        key = [CACHE_VERSION, "latents", identity, str(dtype), size, interpolation, described, masked]
        shards.append(Shard(_shard_path(folder, "latents", key), np.array(entries, dtype=np.int32)))
    return shards, locations


def plan_prompts(captions, *, identity, dtype, clip_skip, folder):
    """The shards for a list of captions, and the place {caption: (shard, row)} of each."""
    shards, places = [], {}
    unique = list(dict.fromkeys(captions))
    for start in range(0, len(unique), CAPTIONS_PER_SHARD):
        part = unique[start : start + CAPTIONS_PER_SHARD]
        places.update({caption: (len(shards), row) for row, caption in enumerate(part)})
        key = [CACHE_VERSION, "prompts", identity, str(dtype), clip_skip, part]
        shards.append(Shard(_shard_path(folder, "prompts", key), part))
    return shards, places


def _shard_path(folder, kind, key):
    return Path(folder) / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]}.safetensors"


def is_whole(shard):
    """Whether a shard is there, readable, and has as many rows as it should (a torn or cut file has not)."""
    try:
        with safe_open(shard.path, "pt") as file:
            return all(file.get_slice(name).get_shape()[0] == len(shard.entries) for name in sorted(file.keys()))
    except (OSError, SafetensorError):
        return False


def fill_shards(shards, encode, *, rank, world_size, title, show_progress):
    """Computes the missing shards, each rank its share; `encode(entries, progress)` gives the tensors of a whole one.

    A rank's share doesn't depend on what is missing: that changes while the others work.
    """
    mine = [shard for shard in shards[rank::world_size] if not is_whole(shard)]
    progress = tqdm(total=sum(len(s.entries) for s in mine), desc=title, disable=not show_progress or not mine)
    for shard in mine:
        tensors = encode(shard.entries, progress)
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = shard.path.with_suffix(f".{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_bytes(save(tensors))  # save_file's files are for their owner alone
            os.replace(temporary, shard.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    progress.close()


def encode_latent_entries(
    entries, progress, *, dataset, images, sizes, augmentation, seed, vae_encode, interpolation, dtype, masked=False
):
    """The tensors of a latent shard: posterior "mean" and "std", (entries, C, h, w) in `dtype`.

    Where the dataset is `masked`, "mask" too, (entries, 1, h, w); pictures without one count everywhere.
    """
    size = sizes[entries[0][0]]
    batch_size = max(1, ENCODE_PIXELS // math.prod(size))
    means, stds, masks, opened = [], [], [], (None, None)
    for start in range(0, len(entries), batch_size):
        pixels, shown = [], []
        for index, k in entries[start : start + batch_size].tolist():
            variation = variation_of(index, k, images=images, sizes=sizes, augmentation=augmentation, seed=seed)
            if opened[0] != index:
                record = dataset[index]
                opened = (index, open_image(read_image_bytes(record["image"])))
            pixels.append(apply_variation(opened[1], variation, size, interpolation))
            shown.append((record["mask"], opened[1].size, variation))
        mean, std = vae_encode(torch.from_numpy(np.stack(pixels)))
        if masked:
            masks += [mask_of(*what, size, size[1] // mean.shape[-2]) for what in shown]
        means.append(mean.to(dtype).cpu())
        stds.append(std.to(dtype).cpu())
        progress.update(len(pixels))
    tensors = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
    return tensors | ({"mask": torch.stack(masks).half()} if masked else {})


def mask_of(mask, picture_size, variation, size, factor):
    """The mask (1, h, w) of a record's `mask` cell, as its picture's variation shows it; ones where it has none."""
    if mask is None:
        return torch.ones(1, size[1] // factor, size[0] // factor)
    image = open_mask(read_image_bytes(mask), picture_size)
    # Half, as in the cache, so that live is the same.
    return torch.from_numpy(apply_variation_to_mask(image, variation, size, factor))[None].half().float()


def encode_prompt_entries(entries, progress, *, text_encode, dtype):
    """The tensor of a prompt shard: "hidden_states", (captions, 77, D) in `dtype`."""
    parts = []
    for start in range(0, len(entries), ENCODE_CAPTIONS):
        part = entries[start : start + ENCODE_CAPTIONS]
        parts.append(text_encode(part).to(dtype).cpu())
        progress.update(len(part))
    return {"hidden_states": torch.cat(parts).contiguous()}


def bytes_of(latent_shards, prompt_shards, *, latent_shapes, prompt_shape, latent_dtype, prompt_dtype, masked):
    """How many bytes the tensors of these shards take; shapes are those of one row, for each picture or caption."""
    indices = [index for shard in latent_shards for index, _ in shard.entries.tolist()]
    latents = 2 * latent_dtype.itemsize * sum(math.prod(latent_shapes[index]) for index in indices)
    masks = sum(2 * math.prod(latent_shapes[index][1:]) for index in indices) if masked else 0
    num_prompts = sum(len(shard.entries) for shard in prompt_shards)
    return latents + masks + num_prompts * math.prod(prompt_shape) * prompt_dtype.itemsize


def check_free_disk(folder, needed):
    """Raises `InputError` where so many bytes don't fit on the folder's disk."""
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{folder}: the cache needs {needed / 2**30:.2f} GiB more and {free / 2**30:.2f} GiB are free. Pass another "
            "--latent_cache_dir, fewer --cache_variations, or --cache_variations 0 to encode live."
        )


def build(
    dataset, images, sizes, captions, *, latent_shapes, cache_variations, interpolation, augmentation, seed, vae_encode,
    vae_identity, latent_dtype, prompt_shape, text_encode, text_identity, clip_skip, prompt_dtype, folder, accelerator,
    caption_dropout=0.0, masked=False,
):  # fmt: skip
    """Fills what is missing of the cache, each rank its share, and opens it; `InputError` where the disk is too full.

    `images` and `sizes` are as in `plan_latents`, `captions` holds a list for each picture. With `caption_dropout` the
    empty caption is there too. Where `text_encode` is None, captions are not cached, and prompts are (None, None).
    Returns (latents, locations[i, k]) and (prompts, places[caption]): `ShardReader`s, and where in them each lies.
    """
    latent_shards, locations = plan_latents(
        images, sizes, cache_variations=cache_variations, interpolation=interpolation,
        augmentation=augmentation, seed=seed, identity=vae_identity, dtype=latent_dtype,
        folder=folder, masked=masked,
    )  # fmt: skip
    cached = [caption for group in captions for caption in group] + [""] * (caption_dropout > 0)
    prompt_shards, places = plan_prompts(
        [] if text_encode is None else cached,
        identity=text_identity, dtype=prompt_dtype, clip_skip=clip_skip, folder=folder,
    )  # fmt: skip
    missing = ([shard for shard in shards if not is_whole(shard)] for shards in (latent_shards, prompt_shards))
    needed = bytes_of(
        *missing, latent_shapes=latent_shapes, prompt_shape=prompt_shape, latent_dtype=latent_dtype,
        prompt_dtype=prompt_dtype, masked=masked,
    )  # fmt: skip
    check_free_disk(folder, needed)
    encode_latents = partial(
        encode_latent_entries, dataset=dataset, images=images, sizes=sizes, augmentation=augmentation, seed=seed,
        vae_encode=vae_encode, masked=masked, interpolation=interpolation, dtype=latent_dtype,
    )  # fmt: skip
    encode_prompts = partial(encode_prompt_entries, text_encode=text_encode, dtype=prompt_dtype)
    work = (("encoding pictures", latent_shards, encode_latents), ("encoding captions", prompt_shards, encode_prompts))
    for title, shards, encode in work:
        fill_shards(
            shards, encode, rank=accelerator.process_index, world_size=accelerator.num_processes, title=title,
            show_progress=accelerator.is_local_main_process,
        )  # fmt: skip
        accelerator.wait_for_everyone()
        # Where the ranks share no disk, each makes what others have made; elsewhere nothing is missing any more.
        fill_shards(shards, encode, rank=0, world_size=1, title=title, show_progress=False)
    prompts = (None, None) if text_encode is None else (ShardReader(prompt_shards), places)
    return (ShardReader(latent_shards), locations), prompts


class ShardReader:
    """Rows of shards through memory maps; nothing is read until it is asked for."""

    def __init__(self, shards):
        self.paths = [str(shard.path) for shard in shards]
        self.files = {}

    def __getstate__(self):
        return {"paths": self.paths, "files": {}}  # a loader's worker opens its own

    def _slice(self, shard, name):
        if shard not in self.files:
            self.files[shard] = safe_open(self.paths[shard], "pt")
        return self.files[shard].get_slice(name)

    def row(self, shard, row, name):
        """One row of the tensor `name`."""
        return self._slice(shard, name)[row]

    def shape(self, shard, row, name):
        """The shape of that row; nothing is read but the file's header."""
        return self._slice(shard, name).get_shape()[1:]

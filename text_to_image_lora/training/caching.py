"""The cache on disk: VAE latents and prompts' conditions, computed once and shared by later runs.

A shard's name is a hash of everything that its content depends on (the pictures' bytes, crops and flips, the VAE's
weights, the dtype; the captions and the text encoders' weights). So nothing in the cache can be stale: what has changed
has another name. Shards are consecutive parts of the dataset and are encoded in batches that depend on its order alone;
each is written whole or not at all.
"""

import contextlib
import hashlib
import json
import math
import os
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

from ..errors import InputError
from ..files import in_bytes, written_whole
from ..models.latents import LatentEncoder, encoded_at_once
from ..models.loading import BaseModel
from ..models.prompts import PromptEncoder


CACHE_VERSION = 4
IMAGES_PER_SHARD = 64
CAPTIONS_PER_SHARD = 256
ENCODE_CAPTIONS = 32
CONDITION = "condition."  # before the name of a variation's own condition in its shard


class Shard(NamedTuple):
    """A file of the cache, and what its rows hold: captions, or (picture's index, variation's number)."""

    path: Path
    entries: Sequence


def plan_latents(pictures, variations, *, identity, dtype, folder):
    """The shards for a `PictureSet`, and where each variation of each picture lies.

    A shard's pictures have one size. Returns shards whose entries are (i, k), and locations[i, k] = (shard, row), both
    int32. Variations that are alike (a square picture has one crop) are stored once.
    """
    shards, locations = [], np.zeros((len(pictures), variations, 2), dtype=np.int32)
    members = {}
    for i, size in enumerate(pictures.sizes):
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
            for k in range(variations):
                variation = pictures.variation(i, k)
                if variation not in seen:
                    seen[variation] = len(entries)
                    entries.append((i, k))
                    described.append([pictures.facts[i].image_id, *variation])
                locations[i, k] = len(shards), seen[variation]
        how = [identity, str(dtype), size, pictures.view.interpolation]
        key = [CACHE_VERSION, "latents", *how, described, pictures.masked]
        shards.append(Shard(_shard_path(folder, "latents", key), np.array(entries, dtype=np.int32)))
    return shards, locations


def plan_prompts(captions, *, identity, dtype, folder):
    """The shards for a list of captions, and the place {caption: (shard, row)} of each."""
    shards, places = [], {}
    unique = list(dict.fromkeys(captions))
    for start in range(0, len(unique), CAPTIONS_PER_SHARD):
        part = unique[start : start + CAPTIONS_PER_SHARD]
        places.update({caption: (len(shards), row) for row, caption in enumerate(part)})
        key = [CACHE_VERSION, "prompts", identity, str(dtype), part]
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
        if not is_whole(shard):  # damaged, or not there
            shard.path.unlink(missing_ok=True)
        with written_whole(shard.path, shared=True) as temporary:
            temporary.write_bytes(save(tensors))  # save_file's files are for their owner alone
    progress.close()


def picture_condition_of(pictures, i, k, family):
    """What the family's denoiser is told of variation k of picture i itself, float32 tensors by name."""
    fact = pictures.facts[i]
    numbers = family.picture_condition((fact.width, fact.height), pictures.variation(i, k), pictures.sizes[i])
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in numbers.items()}


def encode_latent_entries(entries, progress, *, pictures, encoder, family):
    """The tensors of a latent shard: posterior "mean" and "std", (entries, C, h, w), and the variations' conditions.

    Where the pictures are masked, "mask" too, (entries, 1, h, w); pictures without one count everywhere.
    """
    batch_size = encoded_at_once(*pictures.sizes[entries[0][0]])
    rows = {"mean": [], "std": []}
    for start in range(0, len(entries), batch_size):
        part = entries[start : start + batch_size].tolist()
        mean, std = encoder(torch.from_numpy(np.stack([pictures.pixels(i, k) for i, k in part])))
        rows["mean"] += mean.to(encoder.dtype).cpu()
        rows["std"] += std.to(encoder.dtype).cpu()
        for i, k in part:
            if pictures.masked:
                mask = torch.from_numpy(pictures.mask(i, k, encoder.factor))[None]
                rows.setdefault("mask", []).append(mask)
            for name, value in picture_condition_of(pictures, i, k, family).items():
                rows.setdefault(CONDITION + name, []).append(value)
        progress.update(len(part))
    return {name: torch.stack(values).contiguous() for name, values in rows.items()}


def encode_prompt_entries(entries, progress, *, encoder):
    """The tensors of a prompt shard: the captions' condition by name, a row a caption."""
    parts = []
    for start in range(0, len(entries), ENCODE_CAPTIONS):
        part = entries[start : start + ENCODE_CAPTIONS]
        parts.append({name: value.cpu() for name, value in encoder(part).items()})
        progress.update(len(part))
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def bytes_of_latents(pictures, shards, latent_shape, dtype):
    """How many bytes the tensors of these shards take."""
    shapes = [latent_shape(pictures.sizes[i]) for shard in shards for i, _ in shard.entries.tolist()]
    masks = sum(2 * math.prod(shape[1:]) for shape in shapes) if pictures.masked else 0
    return 2 * dtype.itemsize * sum(map(math.prod, shapes)) + masks


def bytes_of_prompts(shards, condition_shapes, dtype):
    """How many bytes the tensors of these shards take."""
    row = sum(map(math.prod, condition_shapes.values()))
    return sum(len(shard.entries) for shard in shards) * row * dtype.itemsize


def captions_to_cache(pictures, caption_rules):
    """Every caption that a sample may draw; with caption dropout the empty one is there too."""
    return [caption for group in pictures.captions for caption in group] + [""] * (caption_rules.dropout > 0)


def bytes_of_cache(pictures, base, *, variations, captions, num_chunks, dtype):
    """How many bytes the whole cache of these pictures and captions takes; no model is needed for it."""
    latents, _ = plan_latents(pictures, variations, identity="", dtype=dtype, folder="")
    prompts, _ = plan_prompts(captions, identity="", dtype=dtype, folder="")
    shapes = base.condition_shapes(num_chunks)
    return bytes_of_latents(pictures, latents, base.latent_shape, dtype) + bytes_of_prompts(prompts, shapes, dtype)


def check_free_disk(folder, needed):
    """Raises `InputError` where so many bytes don't fit on the folder's disk."""
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{folder}: the cache needs {in_bytes(needed)} more and {in_bytes(free)} are free. Pass another "
            "--latent_cache_dir, fewer --cache_variations, or --cache_variations 0 to encode live."
        )


def trim(folder, limit_gib, needed):
    """Deletes the shards that were not used for longest, beyond the limit; returns the line that says what is there.

    The paths in `needed` are marked as used now, and stay. None: no limit.
    """
    for path in needed:
        with contextlib.suppress(OSError):
            os.utime(path)
    found = []
    for path in (path for kind in ("latents", "prompts") for path in (Path(folder) / kind).glob("*.safetensors")):
        with contextlib.suppress(OSError):  # another process may delete them too
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total, kept, deleted = sum(size for _, size, _ in found), set(map(str, needed)), 0
    for _, size, path in sorted(found, key=lambda row: row[:2]):
        if limit_gib is None or total <= limit_gib * 2**30 or str(path) in kept:
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            total, deleted = total - size, deleted + 1
    line = f"cache: {in_bytes(total)} in {folder}"
    if deleted:
        line += f" ({deleted} files that were not used for longest are deleted)"
    elif limit_gib is not None and total > limit_gib * 2**30:
        line += f" (over --latent_cache_limit {limit_gib:g}, all of it needed by this run)"
    return line


class Cache(NamedTuple):
    """Where a cache lies, and what fills it."""

    folder: Path
    base: BaseModel
    latent_encoder: LatentEncoder
    prompt_encoder: PromptEncoder | None  # None: captions are not cached

    def build(self, pictures, variations, captions, accelerator):
        """Fills what is missing for a `PictureSet` and these captions, each rank its share, and opens it.

        Returns `CachedLatents` and `CachedPrompts`, which are None where captions are not cached. Raises `InputError`
        where the disk is too full.
        """
        encoder, prompter = self.latent_encoder, self.prompt_encoder
        identity = f"{encoder.identity} {self.base.family.name}"  # families differ in what a variation's condition is
        latent_shards, locations = plan_latents(
            pictures, variations, identity=identity, dtype=encoder.dtype, folder=self.folder
        )
        prompt_shards, places = [], {}
        if prompter is not None:
            prompt_shards, places = plan_prompts(
                captions, identity=prompter.identity, dtype=prompter.dtype, folder=self.folder
            )
        missing = [shard for shard in latent_shards if not is_whole(shard)]
        needed = bytes_of_latents(pictures, missing, encoder.shape, encoder.dtype)
        if prompter is not None:
            missing = [shard for shard in prompt_shards if not is_whole(shard)]
            needed += bytes_of_prompts(missing, self.base.condition_shapes(prompter.num_chunks), prompter.dtype)
        check_free_disk(self.folder, needed)
        family = self.base.family
        encode_latents = partial(encode_latent_entries, pictures=pictures, encoder=encoder, family=family)
        encode_prompts = partial(encode_prompt_entries, encoder=prompter)
        for title, shards, encode in (
            ("encoding pictures", latent_shards, encode_latents),
            ("encoding captions", prompt_shards, encode_prompts),
        ):
            fill_shards(
                shards, encode, rank=accelerator.process_index, world_size=accelerator.num_processes, title=title,
                show_progress=accelerator.is_local_main_process,
            )  # fmt: skip
            accelerator.wait_for_everyone()
            for shard_folder in {shard.path.parent for shard in shards}:
                os.listdir(shard_folder) if shard_folder.exists() else None  # what others wrote on NFS is seen now
            # Where the ranks share no disk, each makes what others have made; elsewhere nothing is missing any more.
            fill_shards(shards, encode, rank=0, world_size=1, title=title, show_progress=False)
        prompts = None if prompter is None else CachedPrompts(ShardReader(prompt_shards), places)
        return CachedLatents(ShardReader(latent_shards), locations), prompts


class ShardReader:
    """Rows of shards through memory maps; nothing is read until it is asked for."""

    def __init__(self, shards):
        self.paths = [str(shard.path) for shard in shards]
        self.files = {}

    def __getstate__(self):
        return {"paths": self.paths, "files": {}}  # a loader's worker opens its own

    def _file(self, shard):
        if shard not in self.files:
            file = safe_open(self.paths[shard], "pt")
            self.files[shard] = {name: file.get_slice(name) for name in sorted(file.keys())}
        return self.files[shard]

    def row(self, shard, row):
        """{name: row of that tensor}."""
        return {name: tensor[row] for name, tensor in self._file(shard).items()}

    def shape(self, shard, name):
        """The shape of a row of the tensor `name`; nothing is read but the file's header."""
        return self._file(shard)[name].get_shape()[1:]


class CachedLatents(NamedTuple):
    """The latents of a `PictureSet`'s variations."""

    reader: ShardReader
    locations: np.ndarray  # [i, k] = (shard, row)

    def row(self, i, which):
        """(tensors, condition) of picture i in the variation that the number `which` falls on, float32.

        The tensors are "mean", "std", (C, h, w), and, where the pictures are masked, "mask", (1, h, w).
        """
        rows = self.locations[i]
        tensors = self.reader.row(*rows[which % len(rows)].tolist())
        own = {name.removeprefix(CONDITION): v.float() for name, v in tensors.items() if name.startswith(CONDITION)}
        return {name: v.float() for name, v in tensors.items() if not name.startswith(CONDITION)}, own

    def shape(self, i):
        """(channels, height, width) of picture i's latent."""
        return self.reader.shape(int(self.locations[i, 0, 0]), "mean")


class CachedPrompts(NamedTuple):
    """The conditions of captions."""

    reader: ShardReader
    places: dict  # caption: (shard, row)

    def row(self, caption):
        """The caption's condition by name."""
        return self.reader.row(*self.places[caption])

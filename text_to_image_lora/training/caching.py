"""The cache on disk: VAE latents and prompts' conditions, computed once and shared by later runs.

A shard's name is a hash of everything that its content depends on (the pictures' bytes, crops and flips, the VAE's
weights, the dtype; the captions and the text encoders' weights). So nothing in the cache can be stale: what has changed
has another name. Shards are consecutive parts of the dataset and are encoded in batches that depend on its order alone;
each is written whole or not at all.
"""

import hashlib
import itertools
import json
import logging
import math
import os
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.base_model import BaseModel
from ..models.latents import LatentEncoder, encoded_at_once
from ..models.prompts import PromptEncoder
from ..pictures.alike import pick_probe
from ..pictures.records import in_threads
from ..pictures.settings import CaptionSettings
from . import interruption, trials
from .conditions import picture_condition_of
from .inputs import as_trained_on
from .shards import Shard, ShardReader, check_free_disk, fill_shards, is_whole, trim


logger = logging.getLogger(__name__)
CACHE_VERSION = 4
IMAGES_PER_SHARD = 64
CAPTIONS_PER_SHARD = 256
ENCODE_CAPTIONS = 32
PICTURES_AHEAD = 8  # decoded while others are encoded
WHERE = "while pictures and captions were encoded; those that are done are kept"
CONDITION = "condition."  # before the name of a variation's own condition in its shard


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


def encode_latent_entries(entries, progress, *, pictures, encoder, family):
    """The tensors of a latent shard: posterior "mean" and "std", (entries, C, h, w), and the variations' conditions.

    Where the pictures are masked, "mask" too, (entries, 1, h, w); pictures without one count everywhere.
    """
    batch_size = encoded_at_once(*pictures.sizes[entries[0][0]])

    def variations_of(row):
        i, numbers = row
        masks = [pictures.mask(i, k, encoder.factor) if pictures.masked else None for k in numbers]
        return list(zip((pictures.pixels(i, k) for k in numbers), masks, strict=True))

    by_picture = [(i, [k for _, k in group]) for i, group in itertools.groupby(entries.tolist(), itemgetter(0))]
    decoded = itertools.chain.from_iterable(in_threads(variations_of, by_picture, ahead=PICTURES_AHEAD))
    rows = {"mean": [], "std": []}
    for start in range(0, len(entries), batch_size):
        interruption.raise_if_asked(WHERE)
        part = entries[start : start + batch_size].tolist()
        pixels, masks = zip(*itertools.islice(decoded, len(part)), strict=True)
        mean, std = encoder(torch.from_numpy(np.stack(pixels)))
        rows["mean"] += mean.to(encoder.dtype).cpu()
        rows["std"] += std.to(encoder.dtype).cpu()
        for (i, k), mask in zip(part, masks, strict=True):
            if mask is not None:
                rows.setdefault("mask", []).append(torch.from_numpy(mask)[None])
            for name, value in picture_condition_of(pictures, i, k, family).items():
                rows.setdefault(CONDITION + name, []).append(value)
        progress.update(len(part))
    return {name: torch.stack(values).contiguous() for name, values in rows.items()}


def encode_prompt_entries(entries, progress, *, encoder):
    """The tensors of a prompt shard: the captions' condition by name, a row a caption."""
    parts = []
    for start in range(0, len(entries), ENCODE_CAPTIONS):
        interruption.raise_if_asked(WHERE)
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


def captions_to_cache(pictures, settings: CaptionSettings):
    """Every caption that a sample may draw; with caption dropout the empty one is there too."""
    return [caption for group in pictures.captions for caption in group] + [""] * (settings.caption_dropout > 0)


def bytes_of_cache(pictures, base, *, variations, captions, num_chunks, dtype):
    """How many bytes the whole cache of these pictures and captions takes; no model is needed for it."""
    latents, _ = plan_latents(pictures, variations, identity="", dtype=dtype, folder="")
    prompts, _ = plan_prompts(captions, identity="", dtype=dtype, folder="")
    shapes = base.condition_shapes(num_chunks)
    return bytes_of_latents(pictures, latents, base.latent_shape, dtype) + bytes_of_prompts(prompts, shapes, dtype)


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
        own = picture_condition_of(
            pictures, 0, 0, self.base.family
        )  # families differ in what a variation's condition is
        identity = " ".join((encoder.identity, *sorted(own)))
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
            interruption.stop_together(WHERE)
            for shard_folder in {shard.path.parent for shard in shards}:
                os.listdir(shard_folder) if shard_folder.exists() else None  # what others wrote on NFS is seen now
            # Where the ranks share no disk, each makes what others have made; elsewhere nothing is missing any more.
            fill_shards(shards, encode, rank=0, world_size=1, title=title, show_progress=False)
            interruption.stop_together(WHERE)
        prompts = None if prompter is None else CachedPrompts(ShardReader(prompt_shards), places)
        return CachedLatents(ShardReader(latent_shards), locations), prompts


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


class CachedSet(NamedTuple):
    """A `PictureSet` and what is cached of it; None where pictures, or captions, are encoded in each step."""

    pictures: Any
    latents: CachedLatents | None
    prompts: CachedPrompts | None


class CachedSets(NamedTuple):
    """The sets of a run."""

    training: CachedSet
    held_out: CachedSet | None  # pictures that are not trained on
    probe: CachedSet | None  # as many that are

    def paths(self):
        """Those of all shards."""
        parts = [part for each in self if each is not None for part in (each.latents, each.prompts)]
        return [path for part in parts if part is not None for path in part.reader.paths]


def fill(settings: Any, run: Any, models: Any, accelerator: Any) -> CachedSets:
    """Encodes what is not in the cache yet; on a GPU the denoiser makes room for it."""
    folder, captions = settings.cache.folder, settings.captions
    prompts = None if settings.lora.train_text_encoder else models.prompt_encoder
    cache = Cache(folder, run.base, models.latent_encoder, prompts)
    pictures = as_trained_on(settings, run.pictures)
    training, validated = CachedSet(pictures, None, None), []
    with trials.base_set_aside(models.denoiser, accelerator.device):
        if run.variations:
            cached = cache.build(pictures, run.variations, captions_to_cache(pictures, captions), accelerator)
            training = CachedSet(pictures, *cached)
        if run.validated is not None:
            probe = pick_probe(run.pictures, len(run.validated), run.seed)
            for part in (run.validated.for_validation(), probe.for_validation()):
                first_captions = [group[0] for group in part.captions]
                validated.append(CachedSet(part, *cache.build(part, 1, first_captions, accelerator)))
    sets = CachedSets(training, *(validated or (None, None)))
    if accelerator.is_main_process and (run.variations or validated):
        logger.info(trim(folder, settings.cache.latent_cache_limit, sets.paths()))
    accelerator.wait_for_everyone()
    return sets

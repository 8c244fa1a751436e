"""The cache on disk: VAE latents and prompt embeddings, computed once and shared by later runs.

The name of a shard is a hash of everything that its content depends on (the pictures' bytes, crops and flips, the VAE's
weights, the dtype; the captions and the text encoders' weights), so the cache is never stale. Shards are consecutive parts
of the dataset, encoded in batches that depend only on its order, and each is written whole or not at all.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import Stopped
from ..models.base_model import BaseModel
from ..models.latents import LatentEncoder, encoded_at_once
from ..models.prompts import PromptEncoder
from ..pictures.alike import pick_probe
from ..pictures.records import in_threads
from ..pictures.settings import CaptionSettings
from . import interruption, trials
from .class_images import drawn_folders
from .conditions import make_picture_condition
from .inputs import concept_of_run, make_concept_remover, with_cached_tag_orders
from .shards import Shard, ShardReader, check_free_disk, fill_shards, is_whole, trim


logger = logging.getLogger(__name__)
CACHE_VERSION = 5
IMAGES_PER_SHARD = 64
CAPTIONS_PER_SHARD = 256
ENCODE_CAPTIONS = 32
PICTURES_AHEAD = 8  # decoded in threads while earlier ones are encoded
WHERE = "while encoding pictures and captions; those that are encoded are kept"
CONDITION = "condition."  # prefix of the picture's conditions in a shard


def plan_latents(
    pictures: Any, variations: int, *, identity: str, dtype: torch.dtype, folder: Path | str
) -> tuple[list[Shard], np.ndarray]:
    """Divides the variations of a `PictureSet` into shards of one size each; equal variations are stored once.

    Returns the shards, whose entries are (picture i, variation k), and the int32 array locations[i, k] = (shard, row).
    """
    shards, locations = [], np.zeros((len(pictures), variations, 2), dtype=np.int32)
    members, content_ids = {}, pictures.content_ids
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
            interruption.raise_if_requested(WHERE)
            seen = {}
            for k in range(variations):
                variation = pictures.variation(i, k)
                if variation not in seen:
                    seen[variation] = len(entries)
                    entries.append((i, k))
                    described.append([content_ids[i], *variation])
                locations[i, k] = len(shards), seen[variation]
        how = [identity, str(dtype), size, pictures.view.interpolation]
        key = [CACHE_VERSION, "latents", *how, described, pictures.masked]
        shards.append(Shard(_shard_path(folder, "latents", key), np.array(entries, dtype=np.int32)))
    return shards, locations


def plan_prompts(
    captions: list[str], *, identity: str, dtype: torch.dtype, folder: Path | str
) -> tuple[list[Shard], dict[str, tuple[int, int]]]:
    """Divides captions into shards, and returns these and {caption: (shard, row)}."""
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


def encode_latent_entries(
    entries: np.ndarray, progress: Any, *, pictures: Any, encoder: LatentEncoder, family: Any
) -> dict[str, torch.Tensor]:
    """Computes the tensors of a latent shard: "mean" and "std" of the posterior (entries, C, h, w), and conditions.

    If any picture of the set has a mask, there is also "mask" (entries, 1, h, w).
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
        interruption.raise_if_requested(WHERE)
        part = entries[start : start + batch_size].tolist()
        pixels, masks = zip(*itertools.islice(decoded, len(part)), strict=True)
        mean, std = encoder(torch.from_numpy(np.stack(pixels)))
        rows["mean"] += mean.to(encoder.dtype).cpu()
        rows["std"] += std.to(encoder.dtype).cpu()
        for (i, k), mask in zip(part, masks, strict=True):
            if mask is not None:
                rows.setdefault("mask", []).append(torch.from_numpy(mask)[None])
            for name, value in make_picture_condition(pictures, i, k, family).items():
                rows.setdefault(CONDITION + name, []).append(value)
        progress.update(len(part))
    return {name: torch.stack(values).contiguous() for name, values in rows.items()}


def encode_prompt_entries(entries: list[str], progress: Any, *, encoder: Any) -> dict[str, torch.Tensor]:
    """Computes the tensors of a prompt shard: conditions by name, with one row per caption."""
    parts = []
    for start in range(0, len(entries), ENCODE_CAPTIONS):
        interruption.raise_if_requested(WHERE)
        part = entries[start : start + ENCODE_CAPTIONS]
        parts.append({name: value.cpu() for name, value in encoder(part).items()})
        progress.update(len(part))
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def count_latent_bytes(pictures: Any, shards: list[Shard], latent_shape: Callable, dtype: torch.dtype) -> int:
    """Returns the size of the tensors of latent shards in bytes."""
    shapes = [latent_shape(pictures.sizes[i]) for shard in shards for i, _ in shard.entries.tolist()]
    masks = sum(2 * math.prod(shape[1:]) for shape in shapes) if pictures.masked else 0
    return 2 * dtype.itemsize * sum(map(math.prod, shapes)) + masks


def count_prompt_bytes(shards: list[Shard], condition_shapes: dict[str, tuple], dtype: torch.dtype) -> int:
    """Returns the size of the tensors of prompt shards in bytes."""
    row = sum(map(math.prod, condition_shapes.values()))
    return sum(len(shard.entries) for shard in shards) * row * dtype.itemsize


def captions_to_cache(
    pictures: Any, settings: CaptionSettings, remove_concept: Callable[[str], str] | None = None
) -> list[str]:
    """Returns every caption that a sample can draw: also the empty caption of caption dropout, and those without the concept."""
    captions = [caption for group in pictures.captions for caption in group]
    dropped = [""] if settings.caption_dropout > 0 else []
    return captions + dropped + ([] if remove_concept is None else [*map(remove_concept, captions)])


def count_cache_bytes(
    pictures: Any, base: BaseModel, *, variations: int, captions: list[str], num_chunks: int, dtype: torch.dtype
) -> int:
    """Returns the size in bytes of the cache of these pictures and captions. Needs no model."""
    latents, _ = plan_latents(pictures, variations, identity="", dtype=dtype, folder="")
    prompts, _ = plan_prompts(captions, identity="", dtype=dtype, folder="")
    shapes = base.condition_shapes(num_chunks)
    return count_latent_bytes(pictures, latents, base.latent_shape, dtype) + count_prompt_bytes(prompts, shapes, dtype)


class Cache(NamedTuple):
    """The folder of a cache and the encoders that fill it."""

    folder: Path
    base: BaseModel
    latent_encoder: LatentEncoder
    prompt_encoder: PromptEncoder | None  # None: captions are not cached

    def build(
        self, pictures: Any, variations: int, captions: list[str], accelerator: Any
    ) -> tuple["CachedLatents", "CachedPrompts | None"]:
        """Encodes what is missing for a `PictureSet` and captions, divided among the ranks, and opens the shards.

        Raises `InputError` if the disk is too full. The second value is None if captions are not cached.
        """
        encoder, prompter = self.latent_encoder, self.prompt_encoder
        condition = make_picture_condition(pictures, 0, 0, self.base.family)  # its names depend on the family
        identity = " ".join((encoder.identity, *sorted(condition)))
        planned: Any = None
        with contextlib.suppress(Stopped):  # the processes stop together
            planned = plan_latents(pictures, variations, identity=identity, dtype=encoder.dtype, folder=self.folder)
        interruption.stop_together(WHERE)
        latent_shards, locations = planned
        prompt_shards, places = [], {}
        if prompter is not None:
            prompt_shards, places = plan_prompts(
                captions, identity=prompter.identity, dtype=prompter.dtype, folder=self.folder
            )
        missing = [shard for shard in latent_shards if not is_whole(shard)]
        needed = count_latent_bytes(pictures, missing, encoder.shape, encoder.dtype)
        if prompter is not None:
            missing = [shard for shard in prompt_shards if not is_whole(shard)]
            needed += count_prompt_bytes(missing, self.base.condition_shapes(prompter.num_chunks), prompter.dtype)
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
                if shard_folder.exists():
                    os.listdir(shard_folder)  # makes files of other machines visible on NFS
            # Ranks that share no disk encode the shards of other ranks too; otherwise nothing is missing any more.
            fill_shards(shards, encode, rank=0, world_size=1, title=title, show_progress=False)
            interruption.stop_together(WHERE)
        prompts = None if prompter is None else CachedPrompts(ShardReader(prompt_shards), places)
        return CachedLatents(ShardReader(latent_shards), locations), prompts


class CachedLatents(NamedTuple):
    """The latents of a `PictureSet`'s variations."""

    reader: ShardReader
    locations: np.ndarray  # [i, k] = (shard, row)

    def select(self, indices: Sequence[int]) -> "CachedLatents":
        """Returns the latents of the pictures at these indices, in this order."""
        return self._replace(locations=self.locations[list(indices)])

    def row(self, i: int, which: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Returns the float32 tensors and conditions of picture i, in the variation `which` modulo their number.

        The tensors are "mean", "std" (C, h, w) and, for pictures with masks, "mask" (1, h, w).
        """
        rows = self.locations[i]
        stored = self.reader.row(*rows[which % len(rows)].tolist())
        condition = {n.removeprefix(CONDITION): v.float() for n, v in stored.items() if n.startswith(CONDITION)}
        return {name: v.float() for name, v in stored.items() if not name.startswith(CONDITION)}, condition

    def shape(self, i: int) -> tuple[int, ...]:
        """Returns (channels, height, width) of the latent of picture i."""
        return self.reader.shape(int(self.locations[i, 0, 0]), "mean")


class CachedPrompts(NamedTuple):
    """The conditions of captions."""

    reader: ShardReader
    places: dict[str, tuple[int, int]]  # {caption: (shard, row)}

    def row(self, caption: str) -> dict[str, torch.Tensor]:
        """Returns the conditions of a caption by name."""
        return self.reader.row(*self.places[caption])


class CachedSet(NamedTuple):
    """A `PictureSet` and its cache; None where pictures or captions are encoded in each step."""

    pictures: Any
    latents: CachedLatents | None
    prompts: CachedPrompts | None


class CachedSets(NamedTuple):
    """The sets of a run."""

    training: CachedSet
    held_out: CachedSet | None  # pictures that are not trained on
    probe: CachedSet | None  # an equal number of pictures that are trained on

    def paths(self) -> list[str]:
        """Returns the paths of all shards."""
        parts = [part for cached in self if cached is not None for part in (cached.latents, cached.prompts)]
        return [path for part in parts if part is not None for path in part.reader.paths]


def fill(settings: Any, run: Any, models: Any, accelerator: Any) -> CachedSets:
    """Encodes what is not in the cache yet; on a GPU, the denoiser is moved to the CPU meanwhile."""
    folder, captions = settings.cache.folder, settings.captions
    prompts = None if settings.lora.train_text_encoder else models.prompt_encoder
    cache = Cache(folder, run.base, models.latent_encoder, prompts)
    pictures = with_cached_tag_orders(settings, run.pictures)
    training, validated = CachedSet(pictures, None, None), []
    with trials.base_moved_to_cpu(models.denoiser, accelerator.device):
        if run.variations:
            all_captions = captions_to_cache(pictures, captions, make_concept_remover(settings, pictures.records))
            training = CachedSet(pictures, *cache.build(pictures, run.variations, all_captions, accelerator))
        if run.validated is not None:
            probe = pick_probe(run.pictures, len(run.validated), run.seed)
            remove_concept = concept_of_run(settings, run.pictures.records)
            for part in (run.validated.for_validation(), probe.for_validation()):
                all_captions = [group[0] for group in part.captions]
                if remove_concept is not None and not validated:
                    all_captions += map(remove_concept, all_captions[:])
                validated.append(CachedSet(part, *cache.build(part, 1, all_captions, accelerator)))
    sets = CachedSets(training, *(validated or (None, None)))
    if accelerator.is_main_process and (run.variations or validated):
        logger.info(trim(folder, settings.cache.latent_cache_limit, [*sets.paths(), *drawn_folders(run.pictures)]))
    accelerator.wait_for_everyone()
    return sets

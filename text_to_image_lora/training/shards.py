"""Shards: files of rows, written whole or not at all, read through memory maps, and deleted when least recently used."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from ..errors import InputError, Stopped
from ..files import format_bytes, written_whole


class Shard(NamedTuple):
    """A file of the cache, and the entry of each row: a caption, or (index of a picture, number of its variation)."""

    path: Path
    entries: Any  # a sequence


def is_whole(shard: Shard) -> bool:
    """Whether a shard exists, is readable and has a row for each entry."""
    try:
        with safe_open(shard.path, "pt") as file:
            return all(file.get_slice(name).get_shape()[0] == len(shard.entries) for name in sorted(file.keys()))
    except (OSError, SafetensorError):
        return False


def fill_shards(
    shards: list[Shard], encode: Callable, *, rank: int, world_size: int, title: str, show_progress: bool
) -> None:
    """Writes this rank's share of the missing shards; `encode(entries, progress)` returns the tensors of a shard.

    The share does not depend on which shards are missing, as this changes while other ranks work. If `encode` raises
    `Stopped`, the rank leaves out the rest; the caller must then stop all ranks together.
    """
    mine = [shard for shard in shards[rank::world_size] if not is_whole(shard)]
    progress = tqdm(total=sum(len(s.entries) for s in mine), desc=title, disable=not show_progress or not mine)
    for shard in mine:
        try:
            tensors = encode(shard.entries, progress)
        except Stopped:
            break
        if not is_whole(shard):  # otherwise another process has written it meanwhile
            shard.path.unlink(missing_ok=True)
        with written_whole(shard.path, shared=True) as temporary:
            temporary.write_bytes(save(tensors))  # files of `save_file` are readable only by their owner
    progress.close()


class ShardReader:
    """Reads rows of shards through memory maps, which are opened at the first access."""

    def __init__(self, shards: list[Shard]):
        self.paths = [str(shard.path) for shard in shards]
        self.files = {}

    def __getstate__(self):
        return {"paths": self.paths, "files": {}}  # each data loading worker opens its own files

    def _file(self, shard):
        if shard not in self.files:
            file = safe_open(self.paths[shard], "pt")
            # Tensors are memory maps, not copies. Slices would leak an object at each read (safetensors 0.8).
            self.files[shard] = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return self.files[shard]

    def row(self, shard: int, row: int) -> dict[str, torch.Tensor]:
        """Returns a row of each tensor by name."""
        return {name: tensor[row] for name, tensor in self._file(shard).items()}

    def shape(self, shard: int, name: str) -> tuple[int, ...]:
        """Returns the shape of a row of the tensor `name`, from the file's header."""
        return self._file(shard)[name].shape[1:]


def check_free_disk(folder: Path | str, needed: int) -> None:
    """Raises `InputError` if the folder's disk has less free space than `needed` bytes."""
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{folder}: the cache needs {format_bytes(needed)} more, but only {format_bytes(free)} are free. Pass another "
            "--latent_cache_dir, fewer --cache_variations, or --cache_variations 0 to encode live."
        )


def trim(folder: Path | str, limit_gib: float | None, needed: list[str]) -> str:
    """Deletes the least recently used shards beyond a limit, and returns a line about the cache to log.

    The paths in `needed` are marked as used now and are never deleted.
    """
    for path in needed:
        with contextlib.suppress(OSError):
            os.utime(path)
    found = []
    for path in (path for kind in ("latents", "prompts") for path in (Path(folder) / kind).glob("*.safetensors")):
        with contextlib.suppress(OSError):  # another process may have deleted the file
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total, deleted = sum(size for _, size, _ in found), 0
    kept = set(map(str, needed))
    for _, size, path in sorted(found, key=lambda row: row[:2]):
        if limit_gib is None or total <= limit_gib * 2**30 or str(path) in kept:
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            total, deleted = total - size, deleted + 1
    line = f"cache: {format_bytes(total)} in {folder}"
    if deleted:
        line += f" (deleted the {deleted} least recently used files)"
    elif limit_gib is not None and total > limit_gib * 2**30:
        line += f" (over --latent_cache_limit {limit_gib:g}, but this run needs all of it)"
    return line

"""Files of rows on disk: computed once, each written whole or not at all, read through memory maps, trimmed when old."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from ..errors import InputError, Stopped
from ..files import format_bytes, written_whole


class Shard(NamedTuple):
    """A file of the cache, and what its rows hold: captions, or (picture's index, variation's number)."""

    path: Path
    entries: Sequence


def is_whole(shard):
    """Whether a shard is there, readable, and has as many rows as it should (a torn or cut file has not)."""
    try:
        with safe_open(shard.path, "pt") as file:
            return all(file.get_slice(name).get_shape()[0] == len(shard.entries) for name in sorted(file.keys()))
    except (OSError, SafetensorError):
        return False


def fill_shards(shards, encode, *, rank, world_size, title, show_progress):
    """Computes the missing shards, each rank its share; `encode(entries, progress)` gives the tensors of a whole one.

    A rank's share doesn't depend on what is missing: that changes while the others work. A rank that `encode` says is
    asked to stop leaves the rest: the others hear of it where they wait for it.
    """
    mine = [shard for shard in shards[rank::world_size] if not is_whole(shard)]
    progress = tqdm(total=sum(len(s.entries) for s in mine), desc=title, disable=not show_progress or not mine)
    for shard in mine:
        try:
            tensors = encode(shard.entries, progress)
        except Stopped:
            break
        if not is_whole(shard):  # damaged, or not there
            shard.path.unlink(missing_ok=True)
        with written_whole(shard.path, shared=True) as temporary:
            temporary.write_bytes(save(tensors))  # save_file's files are for their owner alone
    progress.close()


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
            # Maps of the file, not copies; and not slices of it, whose every read leaves an object behind (safetensors 0.8).
            self.files[shard] = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return self.files[shard]

    def row(self, shard, row):
        """{name: row of that tensor}."""
        return {name: tensor[row] for name, tensor in self._file(shard).items()}

    def shape(self, shard, name):
        """The shape of a row of the tensor `name`; nothing is read but the file's header."""
        return self._file(shard)[name].shape[1:]


def check_free_disk(folder, needed):
    """Raises `InputError` where so many bytes don't fit on the folder's disk."""
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{folder}: the cache needs {format_bytes(needed)} more and {format_bytes(free)} are free. Pass another "
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
    line = f"cache: {format_bytes(total)} in {folder}"
    if deleted:
        line += f" ({deleted} files that were not used for longest are deleted)"
    elif limit_gib is not None and total > limit_gib * 2**30:
        line += f" (over --latent_cache_limit {limit_gib:g}, all of it needed by this run)"
    return line

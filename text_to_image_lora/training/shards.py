"""Shards: files of rows, written whole or not at all, read row by row, and deleted when least recently used."""

import contextlib
import io
import json
import os
import shutil
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from ..errors import InputError, Stopped, TrainingError
from ..files import counted, format_bytes, reason_of, remove_folder, written_whole


CHECKSUMS = "crc32"  # in the metadata of a shard: a list of a number per row


class Shard(NamedTuple):
    """A file of the cache, and the entry of each row: a caption, or (index of a picture, number of its variation)."""

    path: Path
    entries: Any  # a sequence


def is_whole(shard: Shard) -> bool:
    """Whether a shard exists, is readable and has a row for each entry."""
    try:
        with safe_open(shard.path, "pt") as file:
            has_checksums = CHECKSUMS in (file.metadata() or {}) and bool(file.keys())
            return has_checksums and all(
                file.get_slice(name).get_shape()[0] == len(shard.entries) for name in sorted(file.keys())
            )
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
            sums = json.dumps(checksums(tensors, len(shard.entries)))
            temporary.write_bytes(
                save(tensors, {CHECKSUMS: sums})
            )  # files of `save_file` are readable only by their owner
    progress.close()


def checksums(tensors: dict[str, torch.Tensor], count: int) -> list[int]:
    """Returns the CRC-32 of each row of all tensors together, in the order of their names.

    Shards are not flushed to the disk when they are written, so that a power cut can leave zeros in a file of the right size.
    """
    parts = [
        tensors[name].contiguous().flatten().view(torch.uint8).view(count, -1).numpy() for name in sorted(tensors)
    ]
    sums = [0] * count
    for part in parts:
        sums = [zlib.crc32(row, before) for row, before in zip(part, sums, strict=True)]
    return sums


class StoredRows(NamedTuple):
    """Where the rows of one tensor lie in a safetensors file."""

    start: int  # byte
    row_bytes: int
    shape: tuple[int, ...]  # of a row
    dtype: torch.dtype


def find_rows(file: io.FileIO, path: str) -> tuple[dict[str, StoredRows], list[int] | None]:
    """Returns where the rows of each tensor of a safetensors file lie, and their checksums; safetensors checks the file."""
    with safe_open(path, "pt") as checked:
        tensors = {name: checked.get_tensor(name) for name in sorted(checked.keys())}  # memory maps: reads nothing
    size = int.from_bytes(file.read(8), "little")  # the format: size of the header, header, tensors
    header = json.loads(file.read(size))
    sums = header.get("__metadata__", {}).get(CHECKSUMS)
    rows = {
        name: StoredRows(
            start=8 + size + header[name]["data_offsets"][0],
            row_bytes=tensor[:1].nbytes,
            shape=tuple(tensor.shape[1:]),
            dtype=tensor.dtype,
        )
        for name, tensor in tensors.items()
    }
    return rows, sums and json.loads(sums)


class ShardReader:
    """Reads rows of shards; each file is opened at the first access, and stays readable if it is deleted.

    Rows are read, not mapped into memory: an access to a map of a file that another process has truncated would end the
    process by a signal (SIGBUS). Slices of safetensors 0.8 would leak an object at each read.
    """

    def __init__(self, shards: list[Shard]):
        self.paths = [str(shard.path) for shard in shards]
        self.files = {}

    def __getstate__(self):
        return {"paths": self.paths, "files": {}}  # each data loading worker opens its own files

    def _file(self, shard: int) -> tuple[io.FileIO, dict[str, StoredRows], list[int] | None]:
        if shard not in self.files:
            path = self.paths[shard]
            try:
                file = io.FileIO(path)
                weakref.finalize(self, file.close)
                self.files[shard] = file, *find_rows(file, path)
            except (OSError, SafetensorError) as error:
                raise damaged(path, reason_of(error)) from error
        return self.files[shard]

    def row(self, shard: int, row: int) -> dict[str, torch.Tensor]:
        """Returns a row of each tensor by name; raises `TrainingError` if the file has become unreadable."""
        file, tensors, sums = self._file(shard)
        rows, checksum = {}, 0
        for name, stored in tensors.items():
            buffer = bytearray(stored.row_bytes)
            try:
                file.seek(stored.start + row * stored.row_bytes)
                count = file.readinto(buffer)
            except OSError as error:
                raise damaged(self.paths[shard], reason_of(error)) from error
            if count != stored.row_bytes:
                raise damaged(self.paths[shard], "it ends too early")
            checksum = zlib.crc32(buffer, checksum)
            rows[name] = torch.frombuffer(buffer, dtype=stored.dtype).view(stored.shape)
        if sums is not None and sums[row] != checksum:
            Path(self.paths[shard]).unlink(missing_ok=True)  # otherwise the next run would use it too
            raise damaged(self.paths[shard], "its data does not fit its checksums")
        return rows

    def shape(self, shard: int, name: str) -> tuple[int, ...]:
        """Returns the shape of a row of the tensor `name`, from the file's header."""
        return self._file(shard)[1][name].shape


def damaged(path: str, reason: str) -> TrainingError:
    """Makes the error of a shard that was whole when the run began."""
    return TrainingError(
        f"{path}: this file of the cache cannot be read any more ({reason}); it was deleted or changed during the run. "
        "Run the same command again: it encodes the missing pictures and resumes from the last checkpoint."
    )


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
    """Deletes what was least recently used beyond a limit, and returns a line about the cache to log.

    These are shards, and folders of class pictures as a whole. The paths in `needed` are marked as used now and are never
    deleted.
    """
    for path in needed:
        with contextlib.suppress(OSError):
            os.utime(path)
    found = []
    for pattern in ("latents/*.safetensors", "prompts/*.safetensors", "class_pictures/*"):
        for path in Path(folder).glob(pattern):
            with contextlib.suppress(OSError):  # another process may have deleted the file
                parts = [path, *path.glob("*")] if path.is_dir() else [path]
                size = sum(part.stat().st_size for part in parts if part.is_file())
                found.append((path.stat().st_mtime, size, path))
    total, deleted = sum(size for _, size, _ in found), 0
    kept = set(map(str, needed))
    for _, size, path in sorted(found, key=lambda row: row[:2]):
        if limit_gib is None or total <= limit_gib * 2**30 or str(path) in kept:
            continue
        with contextlib.suppress(OSError):
            remove_folder(path) if path.is_dir() else path.unlink()
            total, deleted = total - size, deleted + 1
    line = f"cache: {format_bytes(total)} in {folder}"
    if deleted:
        line += f" (deleted the {counted(deleted, 'least recently used file')})"
    elif limit_gib is not None and total > limit_gib * 2**30:
        line += f" (over --latent_cache_limit {limit_gib:g}, but this run needs all of it)"
    return line

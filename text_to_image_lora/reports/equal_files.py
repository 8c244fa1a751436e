"""Finds LoRA files that hold equal weights, whatever their names and headers."""

import functools
import hashlib
import json
from pathlib import Path


def find_equal(files: dict[str, Path]) -> list[list[str]]:
    """Returns the groups of labels in {label: file} whose files hold equal weights; each group has at least two labels."""
    groups = {}
    for label, path in files.items():
        groups.setdefault(digest_of(path), []).append(label)
    return [labels for labels in groups.values() if len(labels) > 1]


def describe_equal(labels: list[str]) -> str:
    """Says that the LoRAs with these labels are equal."""
    return f"{', '.join(labels[:-1])} and {labels[-1]} are the same LoRA: their files hold equal weights."


def digest_of(path: Path) -> str:
    """Returns a digest of the names, shapes and values of the tensors in a file; of any other file, of its contents."""
    return _digest_of(str(path), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _digest_of(path, modified_at):
    with open(path, "rb") as file:
        if not path.lower().endswith(".safetensors"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        length = int.from_bytes(file.read(8), "little")
        header, digest = json.loads(file.read(length)), hashlib.sha256()
        header.pop("__metadata__", None)
        for name, row in sorted(header.items()):
            first, end = row["data_offsets"]
            file.seek(8 + length + first)
            digest.update(json.dumps([name, row["dtype"], row["shape"]]).encode())
            digest.update(file.read(end - first))
    return digest.hexdigest()

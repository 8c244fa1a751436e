"""The records: a `datasets.Dataset` with one row per picture, made before any picture is opened.

| column | content |
|---|---|
| image, mask | {"bytes", "path"}, not decoded; the mask is None if there is none |
| captions | at least one caption |
| concept | the name of the folder, or the value of a column |
| num_repeats | how often the picture is used per epoch |
| is_class | whether it is a class picture (prior preservation) |
| recipe | a hash of how the picture is drawn, if the run draws it; otherwise None |
| source | file and row, for messages |
"""

import collections
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .inside import read_bytes


def record_features() -> Any:
    """Returns the `datasets.Features` of the records."""
    import datasets

    return datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "mask": datasets.Image(decode=False),
            "captions": datasets.List(datasets.Value("string")),
            "concept": datasets.Value("string"),
            "num_repeats": datasets.Value("int32"),
            "is_class": datasets.Value("bool"),
            "recipe": datasets.Value("string"),
            "source": datasets.Value("string"),
        }
    )


def with_captions(records: Any, captions: list[list[str]]) -> Any:
    """Returns the records with other captions, a list for each picture."""
    others = {name: records[name][:] for name in ("concept", "num_repeats", "is_class", "recipe", "source")}
    return with_columns(records.select_columns(["image", "mask"]), {**others, "captions": captions})


def with_columns(pictures: Any, others: dict[str, list]) -> Any:
    """Adds columns to the image columns of a dataset; unlike `Dataset.map`, this writes nothing into the user's folder."""
    import datasets

    features = record_features()
    for name in pictures.column_names:
        pictures = pictures.cast_column(name, features[name])
    other_features = datasets.Features({name: features[name] for name in others})
    return datasets.concatenate_datasets([pictures, datasets.Dataset.from_dict(others, other_features)], axis=1)


def with_class_pictures(records: Any, class_pictures: Any) -> Any:
    """Appends the records of class pictures, with `is_class` set, for prior preservation."""
    import datasets

    others = {name: class_pictures[name][:] for name in ("captions", "concept", "num_repeats", "recipe", "source")}
    others["is_class"] = [True] * len(class_pictures)
    order = list(records.column_names)
    marked = with_columns(class_pictures.select_columns(["image", "mask"]), others)
    return datasets.concatenate_datasets([records, marked.select_columns(order)])


def read_image_bytes(image: dict[str, Any] | None) -> bytes:
    """Returns the bytes of the file of an `image` cell; raises `OSError` if it cannot be read."""
    if image is not None and image["bytes"] is not None:
        return image["bytes"]
    if image is None or image["path"] is None:
        raise FileNotFoundError("there is no picture")
    return read_bytes(image["path"])


def read_mask_bytes(mask: dict[str, Any] | None) -> bytes | None:
    """Returns the bytes of the file of a `mask` cell, or None without a mask."""
    return None if mask is None else read_image_bytes(mask)


def image_id(data: bytes, mask: bytes | None = None) -> str:
    """Returns a hash of the files of a picture and of its mask, so that an edited picture has a different id."""
    digest = hashlib.sha256(data)
    if mask is not None:
        digest.update(hashlib.sha256(mask).digest())
    return digest.hexdigest()[:32]


def in_threads(function: Callable[[Any], Any], values: Iterable[Any], ahead: int = 1000) -> Iterator[Any]:
    """Maps a function over values in threads and yields the results in order, computing at most `ahead` in advance."""
    waiting = collections.deque()
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for value in values:
            waiting.append(pool.submit(function, value))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def fingerprint(image_ids: Iterable[str], captions: Iterable[list[str]], samples: Sequence = ()) -> str:
    """Returns a hash of a training set: its pictures, their captions, their order and the samples of an epoch."""
    digest = hashlib.sha256(json.dumps(samples).encode())
    for identity, group in zip(image_ids, captions):
        digest.update(json.dumps([identity, group]).encode())
    return digest.hexdigest()[:16]

"""What is known of each picture before it is opened: a `datasets.Dataset`, one row a picture.

| column | what it holds |
|---|---|
| image, mask | {"bytes", "path"}, not decoded; None where a picture has no mask |
| captions | at least one |
| concept | its class folder, or what a column says |
| num_repeats | how often it comes in an epoch |
| is_class | whether it shows the class in general, for prior preservation |
| source | file and row, for messages |
"""

import collections
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor


def record_features():
    import datasets

    return datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "mask": datasets.Image(decode=False),
            "captions": datasets.List(datasets.Value("string")),
            "concept": datasets.Value("string"),
            "num_repeats": datasets.Value("int32"),
            "is_class": datasets.Value("bool"),
            "source": datasets.Value("string"),
        }
    )


def with_captions(records, captions):
    """The records with other captions, a list of them for each picture."""
    others = {name: records[name][:] for name in ("concept", "num_repeats", "is_class", "source")}
    return with_columns(records.select_columns(["image", "mask"]), {**others, "captions": captions})


def with_columns(pictures, others):
    """The pictures' Arrow data beside other columns: nothing is written, as `map` would, into the user's folder."""
    import datasets

    features = record_features()
    for name in pictures.column_names:
        pictures = pictures.cast_column(name, features[name])
    return datasets.concatenate_datasets(
        [
            pictures,
            datasets.Dataset.from_dict(others, features=datasets.Features({k: features[k] for k in others})),
        ],
        axis=1,
    )


def with_class_pictures(records, class_pictures):
    """The records, and after them those of pictures that keep the class as it is (`is_class` is True there)."""
    import datasets

    others = {name: class_pictures[name][:] for name in ("captions", "concept", "num_repeats", "source")}
    others["is_class"] = [True] * len(class_pictures)
    order = list(records.column_names)
    marked = with_columns(class_pictures.select_columns(["image", "mask"]), others)
    return datasets.concatenate_datasets([records, marked.select_columns(order)])


def read_image_bytes(image):
    """The file's bytes of an `image` cell; an `OSError` where there is none."""
    if image is not None and image["bytes"] is not None:
        return image["bytes"]
    if image is None or image["path"] is None:
        raise FileNotFoundError("there is no picture")
    with open(image["path"], "rb") as file:
        return file.read()


def read_mask_bytes(mask):
    """The mask's bytes; None where there is no mask."""
    return None if mask is None else read_image_bytes(mask)


def image_id(data, mask=None):
    """A picture's identity: a hash of its file's bytes and its mask's, so that an edited picture is another one."""
    digest = hashlib.sha256(data)
    if mask is not None:
        digest.update(hashlib.sha256(mask).digest())
    return digest.hexdigest()[:32]


def in_threads(function, values, ahead=1000):
    """The function of each of the values, in their order, some of them ahead of what is asked for."""
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


def fingerprint(image_ids, captions, samples=()):
    """One string for a training set: which pictures, which captions, in which order, and the samples of an epoch."""
    digest = hashlib.sha256(json.dumps(samples).encode())
    for identity, group in zip(image_ids, captions):
        digest.update(json.dumps([identity, group]).encode())
    return digest.hexdigest()[:16]

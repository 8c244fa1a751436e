"""Loads records from every source of pictures: folders in any layout, archives, stored datasets and hub datasets.

This module needs no torch, so that a wrong folder, column or row is reported before anything heavy is imported.
"""

import itertools
import logging
import os
import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import ask_hub, is_hub_id, reason_of
from .archives import ARCHIVE_ENDINGS, is_archive, unpack
from .captions import edit_caption
from .layouts import METADATA_NAMES, PICTURE_ENDINGS, ReadOptions, find_files, find_layout, read_folder
from .records import record_features, with_captions, with_columns
from .tables import choose_caption_column, nonempty_captions


logger = logging.getLogger(__name__)
IMAGE_COLUMNS = ("image", "images", "img", "picture", "jpg", "png", "webp", "pixel_values", "file_name")
ROWS_TOGETHER = 5000  # rows as Python objects take several times the memory of their Arrow table
OTHER_SPLITS = {"test", "validation", "valid", "val", "dev", "eval"}


def log_left_out(source: str, reason: str) -> None:
    """Logs a row that is left out; for `ReadOptions.leave_out`."""
    logger.info(f"left out: {source}: {reason}")


def load_records(reading: ReadOptions) -> Any:
    """Loads the records (see `records.py`) of a hub dataset or of folders and archives, in their own order.

    `train_data_dir` holds folders and archives; `dataset_name` is a folder, an archive or a hub id. Raises `InputError` for
    a folder, column, row or caption that cannot be used.
    """
    data, captions = reading.data, reading.captions
    if data.dataset_name is not None and not os.path.isdir(data.dataset_name) and not is_archive(data.dataset_name):
        parts = [_from_hub(data.dataset_name, reading)]
    else:
        parts = []
        for source in map(Path, data.train_data_dir or [str(data.dataset_name)]):
            folder = unpack(source, reading.archive_dir) if is_archive(source) else source
            parts.append(_from_folder(folder, reading))
    import datasets

    records = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if captions.trigger_word or captions.caption_prefix or captions.caption_suffix:
        edited = [[edit_caption(caption, captions) for caption in group] for group in records["captions"]]
        records = with_captions(records, edited)
    if data.max_train_samples is not None and data.max_train_samples < len(records):
        records = records.shuffle(seed=0, keep_in_memory=True).select(range(data.max_train_samples))
    return records


def _from_folder(folder, reading):
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder. Pass an existing one, or a hub id to --dataset_name.")
    files = find_files(folder)
    on_disk = any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
    parts = {path.relative_to(folder).parts[0] for path in files if path.suffix.lower() in PICTURE_ENDINGS}
    split = next((name for name in sorted(parts) if name.lower() == "train"), None)
    others = sorted(name for name in parts if name.lower() in OTHER_SPLITS)
    at_the_top = {path.name.lower() for path in files if path.parent == folder} & set(METADATA_NAMES)
    if split is not None and others and not at_the_top and not on_disk:
        logger.info(f"{folder}: training on its subfolder {split}, not on {', '.join(others)}")
        folder, files = folder / split, [path for path in files if path.is_relative_to(folder / split)]
    endings, stored_files = {path.suffix.lower() for path in files}, None
    chosen = reading.data.dataset_layout or find_layout(folder, files, reading.captions.instance_prompt)
    if (
        reading.data.dataset_layout is None
        and chosen in (None, "trigger_class", "instance")
        and endings & {".parquet", ".arrow"}
    ):
        if endings & PICTURE_ENDINGS:  # such as the thumbnail of a hub repository
            logger.info(f"{folder}: training on its parquet or arrow files, not on the pictures beside them")
            endings -= PICTURE_ENDINGS
            stored_files = _training_files(folder, files)
            if reading.captions.instance_prompt is not None:
                logger.info(f"{folder}: it has its own captions, so --instance_prompt is not used for it")
        chosen = None
    if chosen is not None:
        rows = read_folder(folder, chosen, files, reading)
        part, tables = list(itertools.islice(rows, ROWS_TOGETHER)), []
        import datasets  # after the first rows: importing it takes longer than to find a wrong column

        while part:
            tables.append(datasets.Dataset.from_list(part, features=record_features()))
            part = list(itertools.islice(rows, ROWS_TOGETHER))
        if not tables:
            raise InputError(f"{folder}: it contains no picture to train on.")
        return datasets.concatenate_datasets(tables)
    if on_disk or (endings & {".parquet", ".arrow", ".tar"} and not endings & PICTURE_ENDINGS):
        return _from_dataset(_load_stored(folder, stored_files, on_disk, reading), folder, reading)
    if endings & PICTURE_ENDINGS:
        raise InputError(
            f"{folder}: the pictures have no captions. Add a metadata.csv with the columns file_name and text, or a .txt "
            "beside each picture, pass --instance_prompt for all pictures, or name their folder [trigger]_[class], such as sks_dog, "
            "and pass --dataset_layout trigger_class (metadata/README.md shows each layout)."
        )
    packed = next((path for path in files if path.name.lower().endswith(ARCHIVE_ENDINGS)), None)
    if packed is not None:
        raise InputError(f"{folder}: it contains no pictures, but an archive. Pass the archive: {packed}")
    raise InputError(f"{folder}: it contains no pictures and no metadata file. metadata/README.md shows each layout.")


def _load_stored(folder, stored_files, on_disk, reading):
    """Loads the training split of a dataset in parquet, arrow or tar files, or saved by `Dataset.save_to_disk`."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if on_disk:
            stored = datasets.load_from_disk(str(folder))
        elif stored_files:  # otherwise the library may load the pictures beside these files
            kind = stored_files[0].suffix[1:].lower()
            stored = datasets.load_dataset(kind, data_files=[*map(str, stored_files)], cache_dir=reading.cache_dir)
        else:
            stored = datasets.load_dataset(str(folder), reading.data.dataset_config_name, cache_dir=reading.cache_dir)
    except Exception as error:  # the library raises many kinds: broken files, unequal columns, no such config
        raise InputError(
            f"{folder}: the dataset can't be loaded ({reason_of(error)}). Save or download it again."
        ) from error
    return _train_split(stored, folder)


def _training_files(folder, files):
    """Returns the parquet files, or else the arrow files, except those that are named after another split."""
    for ending in (".parquet", ".arrow"):
        found = [path for path in files if path.suffix.lower() == ending]
        own = [p for p in found if not OTHER_SPLITS & set(re.split(r"\W|_", p.relative_to(folder).as_posix().lower()))]
        if own or found:
            return own or found
    return []


def _from_hub(name, reading):
    """Loads a hub dataset; its declared columns are checked before pictures are downloaded."""
    if not is_hub_id(name):
        raise InputError(f"{name}: there is no such folder, and it is not a hub id (owner/name) either.")
    import datasets
    import datasets.config
    import httpx
    import huggingface_hub

    datasets.logging.set_verbosity_error()
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            try:
                ask_hub(name, "dataset")
            except (OSError, httpx.TransportError) as error:
                if isinstance(error, huggingface_hub.errors.HfHubHTTPError):
                    raise
                # Without a network, use the cache at once; the client would first retry for half a minute.
                huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        dataset_options = dict(path=name, name=reading.data.dataset_config_name, cache_dir=reading.cache_dir)
        features = datasets.load_dataset_builder(**dataset_options).info.features
        if features is not None:
            _find_columns(features, name, reading.data)
        dataset = _train_split(datasets.load_dataset(**dataset_options), name)
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds: no network, no such repository, gated, no such config
        raise InputError(
            f"{name}: neither a local folder nor a hub dataset that can be loaded ({reason_of(error)}). Check the spelling, "
            "your network and `hf auth login`, or pass a local folder."
        ) from error
    return _from_dataset(dataset, name, reading)


def _train_split(stored, where):
    if not hasattr(stored, "keys"):
        return stored
    if "train" in stored:
        return stored["train"]
    if len(stored) == 1:
        return next(iter(stored.values()))
    raise InputError(f"{where}: it has no split 'train'. Its splits are: {', '.join(stored)}.")


def _find_columns(features, where, asked):
    """Returns the image column and the caption column, by type and common name; checks the mask and concept columns."""
    import datasets

    columns = list(features)
    image_column = asked.image_column
    mask_column = asked.mask_column
    concept_column = asked.concept_column
    if image_column is not None and image_column not in columns:
        if not (image_column == "image" and any(isinstance(f, datasets.Image) for f in features.values())):
            raise InputError(
                f"{where}: there is no column '{image_column}' (--image_column). The columns are: {', '.join(columns)}."
            )
        image_column = None
    if concept_column is not None and concept_column not in columns:
        raise InputError(
            f"{where}: there is no column '{concept_column}' (--concept_column). The columns are: {', '.join(columns)}."
        )
    pictures = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    if mask_column is not None:
        if mask_column not in pictures:
            raise InputError(f"{where}: column '{mask_column}' holds no pictures (--mask_column). Try: {pictures}.")
        pictures.remove(mask_column)
    if image_column is None:
        named = [c for c in IMAGE_COLUMNS if c in pictures] or pictures
        if not named:
            raise InputError(f"{where}: it has no column with pictures. The columns are: {', '.join(columns)}.")
        image_column = named[0]
    elif image_column not in pictures:
        raise InputError(f"{where}: column '{image_column}' holds no pictures (--image_column). Try: {pictures}.")

    def is_text(feature):
        inner = getattr(feature, "feature", None)
        inner = inner if inner is not None else feature[0] if isinstance(feature, list) else feature
        return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")

    textual = [c for c, f in features.items() if is_text(f) and c != concept_column]
    return image_column, choose_caption_column(str(where), columns, textual, asked.caption_column)


def _find_foreign_files(dataset, column, source, cache_dir):
    """Returns {row: reason} of the cells of an image column that name a file outside of the dataset, or no regular file.

    A dataset by somebody else could otherwise make us read any file of this machine. Allowed are the folder of the dataset
    and the download caches of the library.
    """
    import datasets
    import datasets.config
    from huggingface_hub import constants

    caches = [constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, *([cache_dir] if cache_dir else [])]
    allowed = [Path(folder).resolve() for folder in (source, *caches)]

    def reason_against(path):
        try:
            real = Path(path).resolve()
            if not any(real.is_relative_to(folder) for folder in allowed):
                return f"column '{column}' names a file outside of the dataset ({path!r})"
            if real.is_file() or not real.exists():  # missing files are reported with the unreadable pictures
                return None
        except (OSError, ValueError, RuntimeError):  # the path is too long, contains NUL, or its links form a circle
            pass
        return f"column '{column}' names something that is not a file ({path!r})"

    found, row = {}, 0
    cells = dataset.cast_column(column, datasets.Image(decode=False)).select_columns([column])
    for table in cells.with_format("arrow").iter(batch_size=1000):
        for part in table.column(0).chunks:  # without reading the bytes
            for path, has_bytes in zip(part.field("path").to_pylist(), part.field("bytes").is_valid().to_pylist()):
                if path is not None and not has_bytes and (reason := reason_against(path)) is not None:
                    found[row] = reason
                row += 1
    return found


def _from_dataset(dataset, source, reading):
    """Makes records of a dataset with an image feature; the pictures stay in its Arrow files, not decoded."""
    where, asked, leave_out = str(source), reading.data, reading.leave_out
    mask_column, concept_column = asked.mask_column, asked.concept_column
    image_column, caption_column = _find_columns(dataset.features, where, asked)
    captions = [nonempty_captions(value) for value in dataset[caption_column]]
    bad = {index: f"column '{caption_column}' is empty" for index, group in enumerate(captions) if not group}
    for column in filter(None, (image_column, mask_column)):
        bad |= _find_foreign_files(dataset, column, source, reading.cache_dir)
    if bad and leave_out is None:
        first = min(bad)
        raise InputError(
            f"{where}: row {first}: {bad[first]}. Fill or remove the row, or pass --skip_bad_images to leave such rows out."
        )
    for index in sorted(bad):
        leave_out(f"{where}: row {index}", bad[index])
    count = len(captions)
    concepts = [Path(where).name] * count
    if concept_column is not None:
        to_name = getattr(dataset.features[concept_column], "int2str", str)  # the name of a class label
        concepts = [str(v) if v in (None, -1) else to_name(v) for v in dataset[concept_column]]
    others = {
        "captions": captions,
        "concept": concepts,
        "num_repeats": [1] * count,
        "is_class": [False] * count,
        "source": [f"{where}: row {index}" for index in range(count)],
    }
    pictures = dataset.select_columns([c for c in (image_column, mask_column) if c is not None])
    pictures = pictures.rename_columns({image_column: "image"} | ({mask_column: "mask"} if mask_column else {}))
    if mask_column is None:
        others["mask"] = [None] * count
    whole = with_columns(pictures, others)
    return whole.select([index for index in range(count) if index not in bad]) if bad else whole

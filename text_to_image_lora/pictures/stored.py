"""Loads datasets of the `datasets` library: stored in a folder as parquet, arrow or tar files, or on the hub."""

import glob
import logging
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import reason_of
from ..hub import ask_hub, is_hub_id
from .layouts import ReadOptions
from .records import with_columns
from .stored_files import SAVE_PART, check_cards, check_data_files, check_saved, training_files
from .tables import check_rows, choose_caption_column, nonempty_captions, reason_against_caption


logger = logging.getLogger(__name__)
IMAGE_COLUMNS = ("image", "images", "img", "picture", "jpg", "png", "webp", "pixel_values", "file_name")


def from_stored(
    folder: Path, files: list[Path], stored_files: list[Path] | None, on_disk: bool, reading: ReadOptions
) -> Any:
    """Makes records of a dataset that is stored in a folder.

    Args:
        files: All files of the folder.
        stored_files: The files to read; None for all files of the folder.
        on_disk: Whether the dataset was saved by `Dataset.save_to_disk`.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    name, config = str(folder), reading.data.dataset_config_name
    if not on_disk and stored_files is None and glob.has_magic(name):
        # The library would read such a name as a pattern, and find nothing or other files.
        if config is not None:
            raise InputError(
                f"{folder}: for --dataset_config_name, its path may not contain *, ? or [. Rename the folder."
            )
        stored_files = training_files(files, folder)
    try:
        if on_disk:
            check_saved(folder, reading.homes)
            stored = datasets.load_from_disk(name)
        else:
            if stored_files:  # otherwise the library may load the pictures beside these files
                kind = stored_files[0].suffix[1:].lower()
                builder = datasets.load_dataset_builder(
                    "webdataset" if kind == "tar" else kind,
                    data_files=[glob.escape(str(file)) for file in stored_files], cache_dir=reading.cache_dir,
                )  # fmt: skip
            else:
                check_cards(folder, reading.homes)
                builder = datasets.load_dataset_builder(name, config, cache_dir=reading.cache_dir)
            check_data_files(builder.config.data_files, reading.homes)
            builder.download_and_prepare()
            stored = builder.as_dataset()
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds: broken files, unequal columns, no such config
        reason = reason_of(error.__cause__ or error)  # the library's own message says only that something failed
        raise InputError(f"{folder}: the dataset can't be loaded ({reason}). Save or download it again.") from error
    return _from_dataset(_train_split(stored, folder), folder, reading)


def from_hub(name: str, reading: ReadOptions) -> Any:
    """Makes records of a hub dataset; its declared columns are checked before pictures are downloaded."""
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
        dataset_options: dict[str, Any] = dict(
            path=name, name=reading.data.dataset_config_name, cache_dir=reading.cache_dir
        )
        features = datasets.load_dataset_builder(**dataset_options).info.features
        if features is not None:
            _find_columns(_with_image_features(features), name, reading.data)
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
    """Returns the image column and the caption column, by type and common name; checks the mask and concept columns.

    Also returns the other columns with text, and with pictures; the latter are empty if the user has chosen the column.
    """
    import datasets

    columns = list(features)
    listed = ", ".join(columns)
    pictures = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    image_column, mask_column, concept_column = asked.image_column, asked.mask_column, asked.concept_column
    if image_column == "image" and "image" not in columns and pictures:
        image_column = None
    for flag, name in (("image_column", image_column), ("concept_column", concept_column)):
        if name is not None and name not in columns:
            raise InputError(f"{where}: there is no column '{name}' (--{flag}). The columns are: {listed}.")
    if mask_column is not None:
        if mask_column not in pictures:
            raise InputError(f"{where}: column '{mask_column}' holds no pictures (--mask_column). Try: {pictures}.")
        pictures.remove(mask_column)
    if image_column is None:
        if not pictures:
            hint = " If a column names files beside it, save it as metadata.parquet with the column file_name."
            raise InputError(f"{where}: it has no column with pictures. The columns are: {listed}.{hint}")
        if len(pictures) > 1 and not (set(IMAGE_COLUMNS) & set(pictures)):
            listed = ", ".join(pictures)
            raise InputError(f"{where}: which column holds the pictures? Pass --image_column, one of: {listed}.")
        image_column = next((name for name in IMAGE_COLUMNS if name in pictures), pictures[0])
    elif image_column not in pictures:
        raise InputError(f"{where}: column '{image_column}' holds no pictures (--image_column). Try: {pictures}.")

    def is_text(feature):
        inner = getattr(feature, "feature", None)
        inner = inner if inner is not None else feature[0] if isinstance(feature, list) else feature
        return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")

    textual = [c for c, f in features.items() if is_text(f) and c != concept_column]
    caption_column = choose_caption_column(str(where), columns, textual, asked.caption_column)
    others = [name for name in textual if name != caption_column]
    rest = [name for name in pictures if name != image_column] if asked.image_column != image_column else []
    return image_column, caption_column, others, rest


def _with_image_features(features):
    """Returns features in which columns with the bytes of files, as pandas and pyarrow write them, are images.

    Such a column holds bytes, or structures of `bytes` and `path`. Columns that are declared as images go before these.
    """
    import datasets

    if any(isinstance(feature, datasets.Image) for feature in features.values()):
        return features

    def has_bytes(feature):
        inner = feature.get("bytes") if isinstance(feature, dict) else feature
        return isinstance(inner, datasets.Value) and inner.dtype in ("binary", "large_binary")

    images = {name: datasets.Image() for name, feature in features.items() if has_bytes(feature)}
    return datasets.Features(dict(features) | images)


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
    dataset = dataset.with_format(
        None
    )  # it may have been saved with a format that changes its values, or hides columns
    mask_column, concept_column = asked.mask_column, asked.concept_column
    features = _with_image_features(dataset.features)
    image_column, caption_column, others, unread = _find_columns(features, where, asked)
    if unread:
        listed = ", ".join(unread)
        logger.info(f"{where}: the pictures are read from column '{image_column}', not from {listed} (--image_column)")
    if others and asked.caption_column is None:
        logger.info(
            f"{where}: the captions are read from column '{caption_column}', not from {', '.join(others)} (--caption_column)"
        )
    for column in filter(None, (image_column, mask_column)):
        dataset = dataset.cast_column(column, features[column])
    check_rows(where, len(dataset), SAVE_PART)
    cells = dataset[caption_column]
    reasons = (reason_against_caption(value, caption_column) for value in cells)
    bad = {index: reason for index, reason in enumerate(reasons) if reason is not None}
    captions = [[] if index in bad else nonempty_captions(value) for index, value in enumerate(cells)]
    for column in filter(None, (image_column, mask_column)):
        bad |= _find_foreign_files(dataset, column, source, reading.cache_dir)
    if bad and leave_out is None:
        first = min(bad)
        raise InputError(
            f"{where}: row {first}: {bad[first]}. Fill or remove the row, or pass --skip_bad_images to leave such rows out."
        )
    for index in sorted(bad):
        leave_out(f"{where}: row {index}", bad[index])
    if bad and len(bad) == len(captions):
        raise InputError(f"{where}: it has no usable row. The first of {len(bad)} that are left out: row 0: {bad[0]}.")
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
        "recipe": [None] * count,
        "source": [f"{where}: row {index}" for index in range(count)],
    }
    pictures = dataset.select_columns([c for c in (image_column, mask_column) if c is not None])
    pictures = pictures.rename_columns({image_column: "image"} | ({mask_column: "mask"} if mask_column else {}))
    if mask_column is None:
        others["mask"] = [None] * count
    whole = with_columns(pictures, others)
    return whole.select([index for index in range(count) if index not in bad]) if bad else whole

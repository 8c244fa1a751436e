"""Every dataset layout becomes one `datasets.Dataset` with the columns of `FEATURES`, pictures not yet decoded.

Nothing here needs torch: a wrong folder, column or row is told before anything heavy is imported.
"""

import csv
import hashlib
import json
import os
import re
from pathlib import Path

from .errors import InputError


IMAGE_COLUMNS = ("image", "images", "img", "picture", "jpg", "png", "webp", "pixel_values", "file_name")
CAPTION_COLUMNS = (
    "text", "caption", "captions", "texts", "prompt", "en_text", "additional_feature", "blip_caption", "description",
    "title", "txt", "label_text", "sentences",
)  # fmt: skip
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl"}


def load_records(
    *,
    dataset_name=None,
    dataset_config_name=None,
    train_data_dir=None,
    image_column=None,
    caption_column=None,
    cache_dir=None,
    max_train_samples=None,
    seed=0,
    skip_bad_images=False,
):
    """The training set, one row a picture, in the order that the source gives.

    Columns: `image` ({"bytes", "path"}, not decoded), `captions` (at least one), `concept` (the folder that held the
    metadata file), `num_repeats`, `source` (file and row, for messages).
    Raises `InputError` for a folder, column, row or caption that can't be used.
    """
    if dataset_name is not None and not os.path.isdir(dataset_name):
        dataset = _from_hub(dataset_name, dataset_config_name, image_column, caption_column, cache_dir)
    else:
        folder = Path(dataset_name if dataset_name is not None else train_data_dir)
        dataset = _from_folder(folder, dataset_config_name, image_column, caption_column, cache_dir, skip_bad_images)
    if max_train_samples is not None and max_train_samples < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(max_train_samples))
    return dataset


def _features():
    import datasets

    return datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "captions": datasets.List(datasets.Value("string")),
            "concept": datasets.Value("string"),
            "num_repeats": datasets.Value("int32"),
            "source": datasets.Value("string"),
        }
    )


def _from_folder(folder, config_name, image_column, caption_column, cache_dir, skip_bad_images):
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder. Pass an existing one, or a hub id to --dataset_name.")
    files = sorted(
        Path(root) / name
        for root, directories, names in os.walk(folder)
        for name in names
        if name.lower() in METADATA_NAMES and not any(part.startswith((".", "__")) for part in Path(root).parts[1:])
    )
    if files:
        rows = []
        for file in files:
            rows += _read_metadata(file, folder, image_column, caption_column, skip_bad_images)
        if not rows:
            raise InputError(f"{files[0]}: it has no rows. Add one row a picture: file_name and text.")
        import datasets

        return datasets.Dataset.from_list(rows, features=_features())
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        import datasets

        stored = datasets.load_from_disk(str(folder))
        return _from_dataset(_train_split(stored, folder), str(folder), image_column, caption_column)
    endings = {p.suffix.lower() for p in folder.rglob("*") if p.is_file()}
    if endings & {".parquet", ".arrow", ".tar"}:
        import datasets

        datasets.logging.set_verbosity_error()
        stored = datasets.load_dataset(str(folder), config_name, cache_dir=cache_dir)
        return _from_dataset(_train_split(stored, folder), str(folder), image_column, caption_column)
    if endings & PICTURE_ENDINGS:
        raise InputError(
            f"{folder}: the pictures have no captions. Add a metadata.csv or metadata.jsonl with the columns file_name "
            "and text (metadata/README.md shows each format)."
        )
    raise InputError(f"{folder}: it holds no pictures and no metadata file. metadata/README.md shows each format.")


def _read_metadata(file, dataset_folder, image_column, caption_column, skip_bad_images):
    """Rows of one metadata file, with the pictures' paths checked; its folder's name is the concept."""
    table = _read_table(file)
    if not table:
        return []
    columns = list(dict.fromkeys(key for row in table for key in row if key is not None))
    file_column = "file_name" if "file_name" in columns and image_column in (None, "image") else image_column
    if file_column not in columns:
        wanted = f"there is no column '{image_column}'" if image_column else "there is no column 'file_name'"
        raise InputError(f"{file}: {wanted}. The columns are: {', '.join(columns)}.")
    textual = [c for c in columns if c != file_column and all(_is_caption(row.get(c)) for row in table)]
    chosen = _choose_caption_column(str(file), columns, textual, caption_column)
    rows, root = [], file.parent.resolve()
    inside = dataset_folder.resolve()
    first = 2 if file.suffix.lower() == ".csv" else 1
    for number, row in enumerate(table, start=first):
        where, name = f"{file}:{number}", row.get(file_column)
        captions = row.get(chosen)
        captions = [c for c in (captions if isinstance(captions, list) else [captions]) if c is not None]
        reason = None
        if not isinstance(name, str) or not name:
            reason = f"column '{file_column}' is empty"
        elif "://" in name:
            reason = f"'{name}' is a URL, and pictures are read from files only"
        elif not (root / name).resolve().is_relative_to(inside):
            raise InputError(
                f"{where}: '{name}' leaves the dataset folder {dataset_folder}. Move the picture into it."
            )
        elif not (root / name).is_file():
            reason = f"'{name}' does not exist"
        elif not captions:
            reason = f"column '{chosen}' is empty"
        if reason and skip_bad_images:
            print(f"left out: {where}: {reason}")
            continue
        if reason:
            raise InputError(f"{where}: {reason}. Fix the row, or pass --skip_bad_images to leave such rows out.")
        rows.append(
            {
                "image": {"bytes": None, "path": str(root / name)},
                "captions": [str(c) for c in captions],
                "concept": file.parent.name,
                "num_repeats": 1,
                "source": f"{where}: '{name}'",
            }
        )
    return rows


def _read_table(file):
    """A list of dicts from a .csv, .jsonl or .parquet file; a broken one is an `InputError` that names the line."""
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: it can't be read ({error}). Save it again as UTF-8.") from error
    if file.suffix.lower() == ".csv":
        return list(csv.DictReader(text.splitlines(keepends=True), strict=True))
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}:{number}: this line is not JSON ({error.msg}). Fix or remove it.") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: this line is not a JSON object. Write one object a line.")
        rows.append(row)
    return rows


def _is_caption(value):
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def _choose_caption_column(where, columns, textual, asked):
    """The column asked for, else the first of the common names, else the only text column there is."""
    listed = ", ".join(columns)
    if asked is not None:
        if asked not in columns:
            raise InputError(f"{where}: there is no column '{asked}' (--caption_column). The columns are: {listed}.")
        if asked not in textual:
            raise InputError(f"{where}: column '{asked}' holds no text (--caption_column). The columns are: {listed}.")
        return asked
    for name in CAPTION_COLUMNS:
        if name in textual:
            return name
    if len(textual) == 1:
        return textual[0]
    if not textual:
        raise InputError(f"{where}: there are no captions. The columns are: {listed}; add a column 'text'.")
    raise InputError(f"{where}: which column holds the captions? Pass --caption_column, one of: {', '.join(textual)}.")


def _from_hub(name, config_name, image_column, caption_column, cache_dir):
    """A hub dataset; its columns are checked by its declared features, before pictures are downloaded."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{name}: there is no such folder, and it is not a hub id (owner/name) either.")
    import datasets

    datasets.logging.set_verbosity_error()
    try:
        features = datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir).info.features
        if features is not None:
            _columns_of(features, name, image_column, caption_column)
        dataset = _train_split(datasets.load_dataset(name, config_name, cache_dir=cache_dir), name)
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds: no network, no such repository, gated, no such config
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: neither a folder here nor a hub dataset that can be loaded ({reason}). Check the spelling, "
            "your network and `hf auth login`, or pass a local folder."
        ) from error
    return _from_dataset(dataset, name, image_column, caption_column)


def _train_split(stored, where):
    if not hasattr(stored, "keys"):
        return stored
    if "train" in stored:
        return stored["train"]
    if len(stored) == 1:
        return next(iter(stored.values()))
    raise InputError(f"{where}: it has no split 'train', only: {', '.join(stored)}.")


def _columns_of(features, where, image_column, caption_column):
    """Image and caption column by type and common name."""
    import datasets

    columns = list(features)
    if image_column is not None and image_column not in columns:
        if not (image_column == "image" and any(isinstance(f, datasets.Image) for f in features.values())):
            raise InputError(
                f"{where}: there is no column '{image_column}' (--image_column). The columns are: {', '.join(columns)}."
            )
        image_column = None
    pictures = [c for c, f in features.items() if isinstance(f, datasets.Image)]
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

    textual = [c for c, f in features.items() if is_text(f)]
    return image_column, _choose_caption_column(str(where), columns, textual, caption_column)


def _from_dataset(dataset, where, image_column, caption_column):
    """Our columns from a dataset with an image feature; Arrow stays Arrow, no picture is decoded."""
    import datasets

    image_column, caption_column = _columns_of(dataset.features, where, image_column, caption_column)
    dataset = dataset.select_columns([image_column, caption_column]).cast_column(
        image_column, datasets.Image(decode=False)
    )

    def convert(batch, indices):
        captions = [v if isinstance(v, list) else [v] for v in batch[caption_column]]
        captions = [[c for c in group if c is not None] for group in captions]
        for index, group in zip(indices, captions):
            if not group:
                raise InputError(f"{where}: row {index}: column '{caption_column}' is empty. Fill or remove the row.")
        count = len(indices)
        return {
            "image": batch[image_column],
            "captions": captions,
            "concept": [Path(where).name] * count,
            "num_repeats": [1] * count,
            "source": [f"{where}: row {index}" for index in indices],
        }

    datasets.disable_progress_bars()
    try:
        return dataset.map(
            convert, with_indices=True, batched=True, remove_columns=dataset.column_names, features=_features()
        )
    finally:
        datasets.enable_progress_bars()


def read_image_bytes(image):
    """The file's bytes of an `image` cell."""
    if image["bytes"] is not None:
        return image["bytes"]
    with open(image["path"], "rb") as file:
        return file.read()


def image_id(data):
    """A picture's identity: a hash of its file's bytes, so that an edited picture is another one."""
    return hashlib.sha256(data).hexdigest()[:32]


def fingerprint(image_ids, captions):
    """One string for the whole training set: which pictures, which captions, in which order."""
    digest = hashlib.sha256()
    for identity, group in zip(image_ids, captions):
        digest.update(json.dumps([identity, group]).encode())
    return digest.hexdigest()[:16]

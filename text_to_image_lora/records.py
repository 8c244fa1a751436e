"""Every dataset layout becomes one `datasets.Dataset` with the columns of `FEATURES`, pictures not yet decoded.

Nothing here needs torch: a wrong folder, column or row is told before anything heavy is imported.
"""

import csv
import hashlib
import io
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
        dataset = dataset.shuffle(seed=seed, keep_in_memory=True).select(range(max_train_samples))
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
        if name.lower() in METADATA_NAMES
        and not any(part.startswith((".", "__")) for part in Path(root).relative_to(folder).parts)
    )
    if files:
        rows = []
        for file, after in zip(files, [*files[1:], None]):
            if after is not None and after.parent == file.parent:
                raise InputError(
                    f"{file.parent}: it holds both {file.name} and {after.name}, so its pictures would count twice. "
                    "Keep one of them."
                )
            rows += _read_metadata(file, folder, image_column, caption_column, skip_bad_images)
        if not rows:
            raise InputError(f"{files[0]}: it has no row to train on. Add one row a picture: file_name and text.")
        import datasets

        return datasets.Dataset.from_list(rows, features=_features())
    on_disk = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    endings = {p.suffix.lower() for p in folder.rglob("*") if p.is_file()}
    if on_disk or endings & {".parquet", ".arrow", ".tar"}:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        try:
            if on_disk:
                stored = datasets.load_from_disk(str(folder))
            else:
                stored = datasets.load_dataset(str(folder), config_name, cache_dir=cache_dir)
        except Exception as error:  # the library raises many kinds: broken files, unequal columns, no such config
            raise InputError(
                f"{folder}: the dataset can't be loaded ({_first_line(error)}). Save or download it again."
            ) from error
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
    columns = list(dict.fromkeys(key for _, row in table for key in row if key is not None))
    file_column = "file_name" if "file_name" in columns and image_column in (None, "image") else image_column
    if file_column not in columns:
        wanted = f"there is no column '{image_column}'" if image_column else "there is no column 'file_name'"
        raise InputError(f"{file}: {wanted}. The columns are: {', '.join(columns)}.")
    textual = [c for c in columns if c != file_column and all(_is_caption(row.get(c)) for _, row in table)]
    chosen = _choose_caption_column(str(file), columns, textual, caption_column)
    rows, root = [], file.parent.resolve()
    inside = dataset_folder.resolve()
    for number, row in table:
        where, name = f"{file}:{number}", row.get(file_column)
        captions = row.get(chosen)
        captions = [c for c in (captions if isinstance(captions, list) else [captions]) if c is not None]
        reason = None
        try:
            picture = (root / name).resolve() if isinstance(name, str) and name else None
            exists = picture is not None and picture.is_file()
        except (OSError, ValueError):  # too long, or a NUL in it
            picture, exists = root, False
        if picture is None:
            reason = f"column '{file_column}' is empty"
        elif "://" in name:
            reason = f"'{name}' is a URL, and pictures are read from files only"
        elif not picture.is_relative_to(inside):
            raise InputError(
                f"{where}: '{name}' leaves the dataset folder {dataset_folder}. Move the picture into it."
            )
        elif not exists:
            reason = f"{name!r} does not exist"
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
                "concept": root.name,
                "num_repeats": 1,
                "source": f"{where}: '{name}'",
            }
        )
    return rows


def _read_table(file):
    """(line, dict) of each row of a .csv, .jsonl or .parquet file; a broken one is an `InputError` that names the line."""
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return list(enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1))
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: it can't be read ({error}). Save it again as UTF-8.") from error
    rows, number = [], 1
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        quote = "Put a caption with commas, quotes or line breaks into double quotes, and double those inside it."
        try:
            for row in reader:
                number = reader.line_num
                if any(row.get(None, ())):
                    raise InputError(f"{file}:{number}: there are more fields than columns. {quote}")
                rows.append((number, row))
        except csv.Error as error:
            raise InputError(f"{file}:{number + 1}: this row is not CSV ({error}). {quote}") from error
        return rows
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
        except ValueError as error:
            reason = getattr(error, "msg", None) or getattr(error, "reason", error)
            raise InputError(f"{file}:{number}: this line is not JSON ({reason}). Fix or remove it.") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: this line is not a JSON object. Write one object a line.")
        rows.append((number, row))
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
    import httpx
    import huggingface_hub

    datasets.logging.set_verbosity_error()
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            try:
                huggingface_hub.HfApi().dataset_info(name, timeout=3)
            except (OSError, httpx.TransportError) as error:
                if isinstance(error, huggingface_hub.errors.HfHubHTTPError):
                    raise
                # No network: what is in the cache serves, and the client needn't retry for half a minute to find out.
                huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        features = datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir).info.features
        if features is not None:
            _columns_of(features, name, image_column, caption_column)
        dataset = _train_split(datasets.load_dataset(name, config_name, cache_dir=cache_dir), name)
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds: no network, no such repository, gated, no such config
        raise InputError(
            f"{name}: neither a folder here nor a hub dataset that can be loaded ({_first_line(error)}). Check the spelling, "
            "your network and `hf auth login`, or pass a local folder."
        ) from error
    return _from_dataset(dataset, name, image_column, caption_column)


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


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
    """Our columns from a dataset with an image feature; the pictures stay in its Arrow files, not decoded."""
    import datasets

    image_column, caption_column = _columns_of(dataset.features, where, image_column, caption_column)
    captions = []
    for index, value in enumerate(dataset[caption_column][:]):
        captions.append([c for c in (value if isinstance(value, list) else [value]) if c is not None])
        if not captions[-1]:
            raise InputError(f"{where}: row {index}: column '{caption_column}' is empty. Fill or remove the row.")
    pictures = dataset.select_columns(image_column).rename_columns({image_column: "image"})
    count, features = len(captions), _features()
    others = {
        "captions": captions,
        "concept": [Path(where).name] * count,
        "num_repeats": [1] * count,
        "source": [f"{where}: row {index}" for index in range(count)],
    }
    # Side by side, so that nothing is written: `map` would put a copy of all pictures into the user's folder.
    return datasets.concatenate_datasets(
        [
            pictures.cast_column("image", features["image"]),
            datasets.Dataset.from_dict(others, features=datasets.Features({k: features[k] for k in others})),
        ],
        axis=1,
    )


def read_image_bytes(image):
    """The file's bytes of an `image` cell; an `OSError` where there is none."""
    if image is not None and image["bytes"] is not None:
        return image["bytes"]
    if image is None or image["path"] is None:
        raise FileNotFoundError("there is no picture")
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

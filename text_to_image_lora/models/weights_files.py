"""The files with the weights of a diffusers model: their variants, such as fp16, and their dtype."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import reason_of
from .base_model import BaseModel, from_hub
from .dialects import COMPONENTS


# The weights of a part of a diffusers model, of a variant such as fp16, in one file or as shards; two names of these.
WEIGHTS_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<first>[A-Za-z]\w*))?(?:-\d+-of-\d+)?"
    r"(?:\.(?P<second>[A-Za-z]\w*))?\.(?:safetensors|bin)"
)


SAMPLE, MOST_SAMPLES = 1024, 4096  # of a large file: bytes in a sample, and samples


def quick_hash(path: Path) -> str:
    """Returns a hash of a file's size and of its content; of a file of more than 4 MiB, only of samples from everywhere."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb", buffering=0) as file:
        if size <= SAMPLE * MOST_SAMPLES:
            digest.update(file.read())
        else:
            for start in range(0, size, size // MOST_SAMPLES):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def files_identity(base: BaseModel) -> str:
    """Returns a quick hash of the files of a base model, which is not loaded; of a model on the hub, its commit.

    A folder has an equal identity wherever it is.
    """
    parts = [row.name for row in base.family.text_encoders] + [row.tokenizer for row in base.family.text_encoders]
    parts += [base.family.denoiser, "vae", "scheduler"]
    if base.kind == "hub":
        commit = from_hub(base.source, "model_index.json", base.revision, base.cache_dir).parent.name
        return json.dumps([base.source, commit, base.variant])
    folder = base.source if base.kind == "folder" else base.single_file_config
    files = {} if base.kind == "folder" else {"": Path(base.source)}
    for part in ["", *parts] if folder is not None else []:
        endings = ("*.json", "*.txt") if base.kind == "file" else ("*.json", "*.txt", "*.safetensors", "*.bin")
        paths = Path(folder or "", part).glob("*") if part else [Path(folder or "", "model_index.json")]
        files |= {f"{part}/{path.name}": path for path in paths if any(map(path.match, endings)) and path.is_file()}
    hashes = {name: quick_hash(path) for name, path in sorted(files.items())}
    return hashlib.sha256(json.dumps([hashes, base.variant]).encode()).hexdigest()


def check_variant(folder: str | Path, variant: str | None) -> None:
    """Raises `InputError` if the weights of a diffusers folder only exist in other variants than this one.

    A part of the model without files of the variant is loaded from its usual files, as diffusers' pipelines do.
    """
    parts: dict[str, set] = {}
    for path in sorted(path for part in (*COMPONENTS, "vae") for path in Path(folder, part).glob("*")):
        if match := WEIGHTS_FILE.fullmatch(path.name):
            parts.setdefault(path.parent.name, set()).add(match["first"] or match["second"])
    variants = sorted(set().union(*parts.values()) - {None})
    if parts and variant is not None and variant not in variants:
        there = f"Pass --variant {' or '.join(variants)}" if variants else "Omit --variant"
        raise InputError(f"--variant {variant}: {folder} contains no weights of this variant. {there}.")
    for part, own in parts.items():
        if None not in own and variant not in own:
            raise InputError(
                f"{folder}: the weights of {part} are only there as a variant. Pass --variant {min(own)}."
            )


FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def check_dtypes(folder: str | Path, variant: str | None = None) -> None:
    """Raises `InputError` if the weights of a diffusers folder are no floating-point numbers, as in quantized models.

    So it does if a file that will be loaded is damaged; one of another variant may not have been downloaded.
    """
    for part in (*COMPONENTS, "vae"):
        files: dict[Path, Any] = {}
        for path in sorted(Path(folder, part).glob("*.safetensors")):
            match = WEIGHTS_FILE.fullmatch(path.name)
            files[path] = "another" if match is None else match["first"] or match["second"]
        loaded = variant if variant in files.values() else None
        for path, own in files.items():
            check_dtypes_of_file(path, must_be_whole=own == loaded)


def check_dtypes_of_file(path: str | Path, *, must_be_whole: bool = False) -> None:
    """Raises `InputError` if weights of a safetensors file are no floating-point numbers.

    A damaged file is ignored, because loading it reports the error, unless it `must_be_whole`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            names = [name for name in sorted(file.keys()) if name.endswith((".weight", ".bias"))]
            wrong = [(name, dtype) for name in names if (dtype := file.get_slice(name).get_dtype()) not in FLOATS]
    except (OSError, SafetensorError) as error:
        if must_be_whole:
            reason = f"it is damaged or incomplete ({reason_of(error)})"
            raise InputError(f"{path}: {reason}. Download the model again.") from error
        return
    if wrong:
        name, dtype = wrong[0]
        raise InputError(
            f"{path}: {len(wrong)} of its weights are no floating-point numbers (the first: {name}, {dtype}). It may be "
            "quantized: get the model in float16 or float32."
        )


def variant_of(base: BaseModel, part: str) -> str | None:
    """Returns the variant of a part of a model; None if its folder has only its usual files, as diffusers' pipelines do."""
    variant = base.variant
    if variant is None or base.kind != "folder":
        return variant
    names = [path.name for path in Path(base.source, part).glob("*")]
    return variant if any(f".{variant}." in name or f".{variant}-" in name for name in names) else None


def load_part(model_class: Any, base: BaseModel, part: str, **options: Any) -> Any:
    """Loads a part of a model in the variant, or from its usual files if there is no such variant of the part."""
    options |= dict(subfolder=part, revision=base.revision, cache_dir=base.cache_dir)
    variant = variant_of(base, part)
    try:
        return model_class.from_pretrained(base.source, variant=variant, **options)
    except OSError:
        if variant is None or base.kind != "hub":
            raise
        return model_class.from_pretrained(base.source, **options)


def dtype_in_file(base: BaseModel, component: str) -> Any:
    """Returns the dtype of a model's safetensors files, in which they are mapped instead of copied; None if it is mixed."""
    import torch
    from safetensors import safe_open

    folder = Path(base.source, component)
    if base.kind == "hub":  # the part of it that was downloaded before
        folder = from_hub(base.source, f"{component}/config.json", base.revision, base.cache_dir).parent
    variant = f".{name}" if (name := variant_of(base, component)) else ""
    whole, stem = folder / f"diffusion_pytorch_model{variant}.safetensors", "diffusion_pytorch_model"
    files = (
        [whole] if whole.is_file() else [*folder.glob(f"{stem}{variant}-0*"), *folder.glob(f"{stem}-0*{variant}.*")]
    )
    kinds = set()
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                names = file.keys()
                kinds |= {file.get_slice(name).get_dtype() for name in names}
    except Exception:  # noqa: BLE001 - loading the file reports what is wrong with it
        return None
    return (
        {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}.get(*kinds) if len(kinds) == 1 else None
    )

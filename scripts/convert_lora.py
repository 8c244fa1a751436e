#!/usr/bin/env python
"""Converts a Stable Diffusion LoRA between the diffusers, kohya and peft formats, resizes it, or merges several LoRAs.

    python scripts/convert_lora.py sd-model-finetuned-lora axes.safetensors --to kohya
    python scripts/convert_lora.py axes.safetensors smaller.safetensors --rank 4
    python scripts/convert_lora.py axes.safetensors:0.8 both.safetensors --merge spears.safetensors:0.5 --rank 16

The written LoRA is read back and compared. DoRA can be converted. Resizing keeps DoRA's magnitudes unchanged. DoRA cannot be
merged, because its update depends on the base model. A1111 and ComfyUI apply DoRA differently from how it was trained.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

import contextlib
import math
import os

from text_to_image_lora.command_line import Parser, count, user_path
from text_to_image_lora.drawing import as_trained
from text_to_image_lora.drawing.rows import MOST_SCALE
from text_to_image_lora.errors import InputError, TrainingError, explaining_system_errors
from text_to_image_lora.files import counted, written_new
from text_to_image_lora.log import protect_streams
from text_to_image_lora.models.dialects import PICKLES, find_dialect
from text_to_image_lora.models.lora_checks import check_lora


DIALECTS = ("diffusers", "kohya", "peft")
TOLERANCES = {"float32": 1e-6, "float16": 1e-2}  # of the LoRA that is read back, relative to an update's norm
ELSEWHERE = "Name another OUT, or delete it first."
# Header keys that are not copied: they describe pictures and folders, or are no longer true of the written file.
DROPPED_KEYS = (
    "format",
    "lora_adapter_metadata",
    "ss_tag_frequency",
    "ss_datasets",
    "ss_dataset_dirs",
    "ss_reg_dataset_dirs",
)
DROPPED_KEYS += ("ss_bucket_info", "ss_training_comment", "ssmd_cover_images", "modelspec.thumbnail")
# Header keys that a merged LoRA keeps if the LoRAs that record them agree.
MERGED_KEYS = (
    "ss_sd_model_name",
    "ss_base_model_version",
    "ss_v2",
    "ss_clip_skip",
    "pretrained_model_name_or_path",
    "modelspec.architecture",
    "modelspec.prediction_type",
)


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], epilog=" ".join(__doc__.split("\n\n")[-1].split()))
    add = parser.add_argument
    add(
        "lora",
        type=user_path,
        metavar="IN[:STRENGTH]",
        help="LoRA to read: .safetensors file or folder, in any of the formats",
    )
    add("out", type=user_path, metavar="OUT", help="path to write: a .safetensors file, or a folder for --to peft")
    add("--to", choices=DIALECTS, help="format to write (default: the format of IN)")
    add("--rank", type=count(1), help="reduce every module to at most this rank by SVD, and print the loss")
    add(
        "--merge",
        type=user_path,
        nargs="+",
        default=[],
        metavar="LORA[:STRENGTH]",
        help="LoRAs to add to IN, each multiplied by its strength (default: 1); the ranks add up",
    )
    add(
        "--dtype",
        choices=[*TOLERANCES],
        default="float32",
        help="precision of the written weights; float16 halves the file size and rounds the weights",
    )
    return parser.parse_args(argv)


def split_strength(text):
    """Splits `PATH` or `PATH:STRENGTH` into the path and the strength (default: 1)."""
    path, colon, number = text.rpartition(":")
    try:
        strength = float(number) if colon and path else None
    except ValueError:  # the colon is part of the path
        strength = None
    if strength is None or Path(text).exists():
        path, strength = text, 1.0
    if not abs(strength) <= MOST_SCALE:  # neither is NaN
        raise InputError(f"{text}: a strength is a number from {-MOST_SCALE} to {MOST_SCALE}, such as {path}:0.8.")
    if not Path(path).exists():
        raise InputError(f"{path}: there is no such file or folder.")
    return path, strength


def dialect_of(path):
    """Returns the dialect of a LoRA; raises `InputError` if it is not one."""
    if Path(path).suffix.lower() not in PICKLES:
        return check_lora(path)
    from text_to_image_lora.models.lora_file import read_tensors

    try:
        return find_dialect(read_tensors(Path(path))[0])
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def find_source(text):
    """Returns the path of a LoRA and its strength; that of a run that is not finished is its newest one."""
    from text_to_image_lora.drawing.find import newest_of_run
    from text_to_image_lora.models.dialects import find_weight_files

    path, strength = split_strength(text)
    if Path(path).is_dir() and not find_weight_files(path)[0][0].exists():
        path = newest_of_run(Path(path), "IN")
    return path, strength


def settle_out(out, dialect):
    """Returns the path to write; raises `InputError` if it exists already or does not fit the format."""
    path = Path(out)
    if os.path.lexists(path):
        raise InputError(f"{out}: it exists already. {ELSEWHERE}")
    if dialect == "peft" and path.suffix.lower() == ".safetensors":
        raise InputError(f"{out}: peft's format is a folder. Name one, or pass another --to.")
    if dialect != "peft" and path.suffix.lower() != ".safetensors":
        raise InputError(f"{out}: name a .safetensors file, or pass --to peft for a folder.")
    return path


def read(sources):
    """Returns the sum of the LoRAs, each multiplied by its strength, and the header of each."""
    from text_to_image_lora.models.families import STABLE_DIFFUSION_XL
    from text_to_image_lora.models.kohya import find_family, is_not_of_xl
    from text_to_image_lora.models.lora_file import load_lora
    from text_to_image_lora.models.updates import merge

    loaded = [load_lora(path) for path, _ in sources]
    families = {}
    for (path, _), (components, header) in zip(sources, loaded):
        if (family := find_family(components, header)) is not None:
            families.setdefault(family.name, path)
    if STABLE_DIFFUSION_XL.name in families:  # the shapes of self-attention do not tell 1 from 2
        others = [path for (path, _), (components, _) in zip(sources, loaded) if is_not_of_xl(components)]
        if others:
            families["Stable Diffusion 1 or 2"] = others[0]
    if len(families) > 1:
        (one, first), (other, second), *_ = families.items()
        raise InputError(
            f"{second} is a LoRA of {other}, but {first} is of {one}. Only LoRAs of the same family can be merged."
        )
    components = loaded[0][0]
    if [strength for _, strength in sources] != [1]:
        components = merge([(part, strength) for (part, _), (_, strength) in zip(loaded, sources)])
    return components, [header for _, header in loaded]


def resize(components, rank):
    """Returns the components with their ranks reduced to at most `rank`, and prints the loss."""
    from text_to_image_lora.models import updates

    resized, lost = {}, {}
    for name, state_dict in components.items():
        resized[name], errors = updates.resize(state_dict, rank)
        lost |= {f"{name}.{module}": row for module, row in errors.items()}
    whole = math.hypot(*(norm for _, norm in lost.values()))
    shares = {module: error / norm if norm else 0.0 for module, (error, norm) in lost.items()}
    worst = max(shares, key=shares.get)
    overall = math.hypot(*(error for error, _ in lost.values())) / whole if whole else 0.0
    print(f"rank {rank}: {overall:.1%} of the update's norm is lost, at worst {shares[worst]:.1%} ({worst})")
    if any(".lora_magnitude_vector" in key for state_dict in components.values() for key in state_dict):
        print(
            "DoRA: the loss above does not take into account the base weights or the magnitudes, which are unchanged"
        )
    return resized


def merge_headers(sources, headers):
    """Returns the header entries that are true of a sum of LoRAs; raises `InputError` if it can't be drawn as trained."""
    kept = {}
    for key in MERGED_KEYS:
        values = {header[key] for header in headers if key in header}
        if len(values) == 1:
            (kept[key],) = values
    kept |= as_trained.merge_training([(path, header) for (path, _), header in zip(sources, headers)])
    kept["modelspec.merged_from"] = ", ".join(Path(path).stem for path, _ in sources)
    return kept


def make_header(components, kept, out):
    """Returns the header of the written LoRA, with the entries of `kept` that are still true of it."""
    from text_to_image_lora.models import kohya

    kept = {key: value for key, value in kept.items() if key not in DROPPED_KEYS}
    own = kohya.minimal_header(components, kept)
    now = {key: own[key] for key in ("ss_network_dim", "ss_network_alpha")}
    return own | kept | now | {"ss_output_name": out.stem, "modelspec.title": out.stem}


def check_range(components, dtype):
    """Raises `InputError` if weights are infinite after the strengths, or once they are rounded to `dtype`."""
    import torch

    from text_to_image_lora.models.modules import non_finite

    dtype_of = getattr(torch, dtype)
    rounded = ((f"{n}.{key}", value.to(dtype_of)) for n, part in components.items() for key, value in part.items())
    if faults := non_finite(rounded):
        remedy = "Pass smaller strengths" + ("." if dtype == "float32" else ", or --dtype float32.")
        raise InputError(f"in {dtype}, {faults}. {remedy}")


def save(components, header, path, dialect, dtype):
    """Writes the file or folder in the format."""
    from text_to_image_lora.models import kohya, lora_file, peft_folder

    folded = {name: (state_dict, None) for name, state_dict in components.items()}
    if dialect == "kohya":
        kohya.save_kohya(path, folded, header, dtype, names=kohya.guess_family(components, header).kohya)
    elif dialect == "diffusers":
        lora_file.save_lora(path, folded, header, dtype)
    else:
        peft_folder.save_peft(path, components, header, dtype)


def read_back(components, path, dialect, tolerance):
    """Reads the file or folder as other programs do; returns a line on how closely it agrees.

    Raises `TrainingError` if it does not.
    """
    from text_to_image_lora.models import lora_file, receipt, updates

    layers = {name: updates.shapes_of(state_dict) for name, state_dict in components.items()}
    if dialect != "peft":
        folded = {name: (state_dict, None) for name, state_dict in components.items()}
        receipt.check_lora_file(path, folded, layers, by_kohyas_names=dialect == "kohya", tolerance=tolerance)
    again, _ = lora_file.load_lora(path)
    worst = max(
        updates.relative_difference(updates.factors(state_dict, module), updates.factors(again[name], module))
        for name, state_dict in components.items()
        for module in updates.modules_of(state_dict)
    )
    if not worst <= tolerance:
        raise TrainingError(f"{path}: an update that was read back differs by {worst:.1e} of its norm.")
    count = sum(map(len, layers.values()))
    return f"{counted(count, 'module')}, read back " + (f"within {worst:.1e} of each update" if worst else "exactly")


@contextlib.contextmanager
def naming(out, temporary):
    """Replaces the temporary path in the messages of errors by `out`, which is the one that the user knows."""
    try:
        yield
    except (InputError, TrainingError) as error:
        raise type(error)(str(error).replace(str(temporary), str(out))) from error


def write(components, header, out, dialect, dtype):
    """Writes the file or folder, and reads it back before it is at `out`; returns a line on how closely it agrees."""
    import torch

    try:
        with written_new(out) as temporary, naming(out, temporary):
            save(components, header, temporary, dialect, getattr(torch, dtype))
            return read_back(components, temporary, dialect, TOLERANCES[dtype])
    except FileExistsError as error:
        raise InputError(f"{out}: another process has just written it. {ELSEWHERE}") from error
    except OSError as error:
        raise InputError(f"{out}: it can't be written ({error.strerror}). Name another OUT.") from error


def main(args):
    sources = [find_source(text) for text in (args.lora, *args.merge)]
    dialects = [dialect_of(path) for path, _ in sources]
    dialect = args.to or dialects[0].removeprefix("old ")
    out = settle_out(args.out, dialect)
    components, headers = read(sources)
    check_range(components, "float32")
    header = merge_headers(sources, headers) if args.merge else headers[0]
    if args.rank is not None:
        components = resize(components, args.rank)
    check_range(components, args.dtype)
    verified = write(components, make_header(components, header, out), out, dialect, args.dtype)
    print(f"{out} ({dialect} format): {verified}")
    if dialect == "peft" and (settings := as_trained.describe(header)):
        print(
            f"The LoRA was trained with {settings}. peft's format has no place for this: it is in the header of "
            "adapter_model.safetensors, which infer.py reads and other programs ignore."
        )


if __name__ == "__main__":
    try:
        with explaining_system_errors():
            protect_streams()
            main(parse_args())
    except (InputError, TrainingError) as error:
        print(f"convert_lora.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)

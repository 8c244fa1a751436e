"""The text chunks of pictures: their parameters, as A1111 writes them too, and everything that --from_png needs."""

import contextlib
import io
import itertools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..config_file import read_yaml
from ..errors import InputError
from ..files import check_regular, shorten_paths, write_new
from ..models.samplers import SAMPLERS
from ..redaction import redact
from .identities import sha256_of
from .rows import MOST_BATCH, SETTINGS, Drawing
from .settings import FromPictures, Model


logger = logging.getLogger(__name__)
# The flags that name local files and folders.
PATHS = {"pretrained_model_name_or_path", "vae", "single_file_config", "controlnet", "image", "control_image", "lora"}


class Source(NamedTuple):
    """What all pictures of a run are drawn with, as each file records it."""

    flags: dict[str, Any]  # {flag: value or None}
    machine: dict[str, str]  # {what the last bits depend on: name or version}
    identities: dict[str, str] = {}  # of `identities_of`


class Repeat(NamedTuple):
    """Everything that is needed to draw a picture again."""

    flags: dict[str, list[str]]  # {flag: its values on the command line}
    sha256: dict[str, list[str]]  # {flag: hashes of its files}
    machine: dict[str, str]  # of `Source`
    batch: tuple[int, int] | None  # of `Drawn`
    identities: dict[str, str] = {}  # of `Source`; older pictures record none


def source_of(
    model: Model, pictures: FromPictures, *, vae: str | None, dtype: Any, device: str, compiled: bool,
    identities: dict[str, str] | None = None,
) -> Source:  # fmt: skip
    """Returns the `Source` of a run's pictures; `vae` replaces that of the base model, unless it is None.

    `identities` are those of `identities_of`, if they are recorded.
    """
    import torch

    flags = {"pretrained_model_name_or_path": model.pretrained_model_name_or_path, "vae": vae}
    flags |= {name: getattr(model, name) for name in ("revision", "variant", "single_file_config", "controlnet")}
    flags |= {name: getattr(pictures, name) for name in ("image", "control_image", "control")}
    precision = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}[str(dtype).removeprefix("torch.")]
    flags |= {
        "mixed_precision": precision,
        "num_cpu_threads": torch.get_num_threads() if torch.device(device).type == "cpu" else None,
    }
    return Source(flags, machine_of(device, compiled), identities or {})


def machine_of(device: str, compiled: bool) -> dict[str, str]:
    """Returns what the last bits of a picture depend on besides its flags: versions and the device."""
    import diffusers
    import torch

    name = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    return versions | {"device": f"{torch.device(device).type} {name}"} | ({"compiled": "yes"} if compiled else {})


def repeat_of(drawing: Drawing, source: Source, batch: tuple[int, int] | None) -> Repeat:
    """Returns everything that --from_png needs to draw the picture again."""
    own = {field: getattr(drawing, field) for field in SETTINGS if field != "checkpoint"} | {"lora_scale": None}
    own |= {field: None for field, row in SETTINGS.items() if row.needs and not source.flags.get(row.needs)}
    own |= {"clip_skip": drawing.clip_skip}
    flags = {name: [str(value)] for name, value in (source.flags | own).items() if value is not None}
    loras = drawing.scaled_loras()
    files = {"lora": [file for lora in loras if not lora.in_training for file in lora.files]} if loras else {}
    files |= {name: flags[name] for name in ("image", "control_image") if name in flags}
    flags |= {"lora": [f"{lora.given}:{lora.scale}" for lora in loras]} if loras else {}
    sha256 = {name: [sha256_of(path) for path in paths] for name, paths in files.items()}
    flags |= {name: shorten_paths(flags[name]) for name in PATHS & flags.keys()}
    return Repeat(flags, sha256, source.machine, batch, source.identities)


def name_for_others(path: str) -> str:
    """Returns how a picture that is meant to be shared names a local file or folder: from the current folder, or ./NAME."""
    path = str(shorten_paths(os.path.expanduser(path)))
    return f"./{Path(path).name}" if os.path.isabs(path) or path.startswith("~") else path


def locate(flag: str, recorded: str, picture: Path) -> str:
    """Returns where the file or folder is that a picture records as the value of a flag.

    One whose name alone is recorded (./NAME) is looked for in the current folder. A sample picture lies in the folder of its
    run, which is the LoRA, and whose run.yaml knows the base model. Raises `InputError` if nothing is found.
    """
    name, colon, strength = recorded.rpartition(":") if flag == "lora" else (recorded, "", "")
    if os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name):  # a device or a pipe never ends
        raise InputError(f"--{flag} {name}, which {picture} records, is no regular file. Pass --{flag} with the path.")
    if not name.startswith("./") or os.path.exists(name):
        return recorded
    for folder in picture.absolute().parents:
        places = [folder]
        with contextlib.suppress(OSError, InputError, AttributeError):
            check_regular(folder / "run.yaml")
            run = read_yaml(folder / "run.yaml", "--from_png")
            places.append(Path(run.get({"vae": "pretrained_vae_model_name_or_path"}.get(flag, flag)) or ""))
        for place in places:
            if place.name == Path(name).name and place.exists():
                return f"{place}{colon}{strength}"
    reason = f"{picture} records its name, but not in which folder it is"
    raise InputError(f"--{flag} {name} is not found: {reason}. Pass --{flag} with the path.")


def describe(drawing: Drawing, drawn: Any, source: Source) -> dict[str, Any]:
    """Returns the text chunks of a PNG: one for each parameter, all of them in A1111's form, and the `Repeat`.

    `drawn` is the drawing's `Drawn`.
    """
    size, flags = drawn.image.size, source.flags
    loras = drawing.scaled_loras()
    names = ["negative_prompt", "num_inference_steps", "guidance_scale", "clip_skip"]
    chunks = {name: getattr(drawing, name) for name in names}
    chunks |= {name: value for name, value in flags.items() if value is not None}
    chunks |= {name: shorten_paths(str(chunks[name])) for name in PATHS & chunks.keys()}
    if loras:  # one a line
        chunks["lora"] = "\n".join(shorten_paths(lora.given) for lora in loras)
        chunks["lora_scale"] = "\n".join(str(lora.scale) for lora in loras)
    chunks |= {"strength": drawing.strength} if flags["image"] else {}
    chunks |= {"controlnet_scale": drawing.controlnet_scale} if flags["controlnet"] else {}
    chunks |= {"prompt": drawing.prompt, "seed": drawing.seed, "width": size[0], "height": size[1]}
    chunks |= {"scheduler": type(drawn.sampler).__name__, "diffusers_version": source.machine["diffusers"]}
    negative = f"Negative prompt: {drawing.negative_prompt}\n" if drawing.negative_prompt else ""
    settings = _settings_in_a1111(drawing, _sampler_in_a1111(drawn.sampler), size, flags)
    repeat = json.dumps(repeat_of(drawing, source, drawn.batch)._asdict())
    return {"parameters": f"{drawing.prompt}\n{negative}{settings}", **chunks, "repeat": repeat}


def _sampler_in_a1111(sampler):
    found = class_name = type(sampler).__name__
    for row in SAMPLERS.values():
        if row.scheduler == class_name and all(sampler.config.get(key) == v for key, v in row.changes.items()):
            found = row.name_in_a1111
    return found


def _settings_in_a1111(drawing, sampler, size, flags):
    """Returns the last line of A1111's `parameters`."""

    def short(path):
        return re.sub(r"\.(safetensors|ckpt|pt)$", "", Path(path).absolute().name).replace(",", " ")

    vae, loras = flags["vae"], drawing.scaled_loras()
    listed = ", ".join(f"{short(lora.given)}:{lora.scale:g}" for lora in loras)
    settings = (
        f"Steps: {drawing.num_inference_steps}, Sampler: {sampler}, CFG scale: {drawing.guidance_scale:g}, "
        f"Seed: {drawing.seed}, Size: {size[0]}x{size[1]}, Model: {short(flags['pretrained_model_name_or_path'])}"
        + (f", VAE: {short(vae)}" if vae else "")
        + (f", Denoising strength: {drawing.strength:g}" if flags["image"] else "")
        + (f', Lora: "{listed}"' if len(loras) > 1 else f", Lora: {listed}" if loras else "")
        + (f", Clip skip: {drawing.clip_skip + 1}" if drawing.clip_skip else "")
    )
    if flags["controlnet"]:
        module = flags["control"] or "none"
        held = f"Module: {module}, Model: {short(flags['controlnet'])}, Weight: {drawing.controlnet_scale:g}"
        settings += f', ControlNet 0: "{held}"'
    return settings


def read_repeat(path: Path) -> Repeat:
    """Reads the `Repeat` of a PNG; raises `InputError` for a picture without it."""
    from PIL import Image

    check_regular(path, "--from_png")
    try:
        with Image.open(path) as image:
            text = {**image.info}
    except Exception as error:  # Pillow's plugins raise many kinds of exceptions for broken files
        reason = getattr(error, "strerror", None) or "it is not a picture"
        raise InputError(f"--from_png {path} can't be read: {reason}.") from error
    if "command" in text:
        raise InputError(f"--from_png {path} is a sheet of pictures, which was drawn by: {text['command']}")
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        stored = json.loads(text["repeat"])
        json.dumps(stored, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, but not valid text
        flags = {name: [str(word) for word in words] for name, words in stored["flags"].items()}
        size, place = map(int, stored["batch"])
        if size > MOST_BATCH:
            raise InputError(
                f"--from_png {path} records a batch of {size:,} pictures; at most {MOST_BATCH:,} are drawn."
            )
        if 0 <= place < size:
            identities = dict(stored.get("identities", {}))
            return Repeat(flags, dict(stored["sha256"]), dict(stored["machine"]), (size, place), identities)
    raise InputError(f"--from_png {path} does not say how to draw it again: only pictures that infer.py drew do.")


def warn_of_differences(path: Path, stored: Repeat, now: Repeat) -> None:
    """Warns about everything that prevents a picture from being drawn again exactly."""
    other = [
        f"{name} {stored.machine.get(name, 'no')} (here {now.machine.get(name, 'no')})"
        for name in sorted(stored.machine.keys() | now.machine.keys())
        if stored.machine.get(name) != now.machine.get(name)
    ]
    if other:
        logger.warning("%s was drawn with %s: the picture may differ from it", path, ", ".join(other))
    for name, hashes in now.sha256.items():
        if name == "lora" and stored.sha256.get(name) == []:
            logger.warning("%s was drawn during training: the LoRA file may contain the weights of another step", path)
        elif stored.sha256.get(name, []) != hashes:
            what = f"--{name} is not what {path} was drawn with (its SHA-256 differs)"
            logger.warning("%s: the picture will differ from it", what)
    for name, identity in now.identities.items() if stored.identities else ():
        if stored.identities.get(name) != identity:
            what = f"--{name} is not what {path} was drawn with (its files differ)"
            logger.warning("%s: the picture may differ from it", what)


def encode_png(image: Any, chunks: dict[str, Any]) -> bytes:
    """Encodes a picture as a PNG file with text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info, data = PngInfo(), io.BytesIO()
    for key, value in chunks.items():
        info.add_text(key, "" if value is None else redact(str(value)))
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue()


def save_png(image: Any, path: Path, chunks: dict[str, Any]) -> Path:
    """Writes the picture and returns its path; `-1`, `-2`, ... is added to the name if another picture has it."""
    data = encode_png(image, chunks)
    candidates = itertools.chain([path], (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1)))
    return next(file for file in candidates if write_new(file, data) or file.read_bytes() == data)

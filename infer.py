#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "diffusers==0.39.0",
#     "transformers==5.5.4",
#     "accelerate==1.15.0",
#     "peft==0.21.2",
#     "datasets==5.2.0",
#     "huggingface_hub==1.33.0",
#     "safetensors==0.8.0",
#     "wandb==0.31.0",
#     "pillow==13.0.0",
#     "numpy==2.4.6",
#     "PyYAML==6.0.3",
#     "kornia==0.9.0",
#     "tqdm==4.70.1",
#     "prodigyopt==1.1.2",
#     "schedulefree==1.4.1",
#     "jinja2==3.1.6",
#     "bokeh==3.9.2",
#     "optuna==5.0.0",
#     "filelock==4.2.11",
#     "psutil==7.2.2",
#     'bitsandbytes==0.50.2; platform_machine == "x86_64" or platform_machine == "AMD64" or platform_machine == "aarch64" or (sys_platform == "darwin" and platform_machine == "arm64")',
#     'xformers==0.0.35; (sys_platform == "linux" and platform_machine == "x86_64") or sys_platform == "win32"',
# ]
# ///
"""Pictures with LoRA files, or without any: from text, from a picture, held to edges; one by one, or as grids on a sheet.

    python infer.py --pretrained_model_name_or_path models/mini-sd --lora outputs/axe --prompt "a red axe"

A LoRA file of this project is read by stock diffusers alone, which is the proof that the file is right; only a file in
another program's dialect goes through the project's converter.
"""

import argparse
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from text_to_image_lora.drawing.prompts import read_prompts
from text_to_image_lora.drawing.rows import AXES, SETTINGS, nearest, number, sampler_name
from text_to_image_lora.errors import InputError
from text_to_image_lora.models.samplers import NO_ZERO_SNR, SAMPLERS


MODEL_FLAG, WEIGHT_NAME = "--pretrained_model_name_or_path", "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # those that a LoRA can change
# mode: ({family: diffusers class}, {argument of its call: what it takes of a `Drawing`, or of the given pictures})
PIPELINES = {
    "text to image": (
        {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"},
        {"height": "height", "width": "width"},
    ),
    "image to image": (
        {"sd": "StableDiffusionImg2ImgPipeline", "sdxl": "StableDiffusionXLImg2ImgPipeline"},
        {"image": "image", "strength": "strength"},
    ),
    "ControlNet": (
        {"sd": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"},
        {"image": "control_image", "controlnet_conditioning_scale": "controlnet_scale"},
    ),
    "image to image, ControlNet": (
        {"sd": "StableDiffusionControlNetImg2ImgPipeline", "sdxl": "StableDiffusionXLControlNetImg2ImgPipeline"},
        {
            "image": "image",
            "strength": "strength",
            "control_image": "control_image",
            "controlnet_conditioning_scale": "controlnet_scale",
        },
    ),
}
# {width of the prompts that its UNet attends to: family in words}
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
# How a LoRA was trained, where it must be drawn so: (key in its header, value of the string there, in words)
TRAINING = {
    "prediction_type": ("prediction_type", {"epsilon": "epsilon", "v_prediction": "v_prediction"}.get, "{}"),
    "zero_snr": ("rescale_betas_zero_snr", {"True": True}.get, "zero terminal SNR"),
    "long_prompts": ("long_prompts", {"True": True}.get, "long prompts"),
    "num_chunks": (
        "num_chunks",
        lambda text: int(text) if text.isdecimal() and int(text) > 1 else None,
        "{} chunks a prompt",
    ),
    "clip_skip": ("clip_skip", lambda text: int(text) or None if text.isdecimal() else None, "clip skip {}"),
    "vae": ("pretrained_vae_model_name_or_path", lambda text: text if text != "None" else None, "the VAE {}"),
}
BATCH_SIZE = 4  # pictures drawn at once: more gain little speed and cost the memory of small GPUs
STRENGTH = 0.8  # of image to image, unless a flag or a prompt says otherwise
TILED_FROM = 1280 * 1280  # pixels, above which the VAE works in tiles: in one piece it would take 10 GB and more
COLUMNS = 8  # of a sheet, before it goes on in a further band
# Of the entries of ControlNet's config.json those that must equal the UNet's.
CONTROLNET_FITS = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types")
# The flags that a picture's file repeats; all others are the machine's, or say where pictures go.
REPEATED = set(
    """
    pretrained_model_name_or_path single_file_config revision variant vae lora controlnet prompt negative_prompt seed
    num_inference_steps guidance_scale height width scheduler clip_skip image strength control_image control
    controlnet_scale mixed_precision num_cpu_threads
    """.split()  # noqa: SIM905 (one name a word reads better than one a line)
)


# What a run is made of.


class Model(NamedTuple):
    """A base model that was found, and what its files tell before it is loaded; {} and None where they don't."""

    source: str  # folder, hub id or single file
    single_file_config: Path | None
    revision: str | None
    variant: str | None
    family: str
    shapes: dict  # {"unet.conv_in.weight": shape}
    prediction_type: str | None
    zero_snr: bool | None = None
    unet_config: dict = {}  # of its config.json


class Lora(NamedTuple):
    """A LoRA file, and the strength it is drawn with."""

    given: str  # on the command line, less the strength
    path: Path  # a file, or the folder of a LoRA in peft's dialect
    scale: float
    adapter: str  # its name in the pipeline
    shapes: dict  # {key: shape}
    header: dict  # strings
    fixed: bool = False  # the strength came with the path, and --lora_scale is not for it

    @property
    def file(self):
        return self.path / PEFT_NAME if self.path.is_dir() else self.path


class Drawing(NamedTuple):
    """A picture to draw: the name of its file, and all that may differ from one picture to the next."""

    stem: str = ""
    prompt: str = ""
    seed: int = 0
    loras: tuple[Lora, ...] = ()
    checkpoint: Lora | None = None  # one more LoRA, which a grid goes through
    lora_scale: float = 1.0  # of the LoRAs that have no strength of their own
    negative_prompt: str | None = None
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    scheduler: str | None = None
    clip_skip: int = 0
    height: int | None = None  # None: the model's own, or in the shape of the picture that is given
    width: int | None = None
    strength: float | None = None
    controlnet_scale: float = 1.0

    def scaled_loras(self):
        """All LoRAs, each with the strength that it is drawn with."""
        loras = (*self.loras, *([self.checkpoint] if self.checkpoint else ()))
        return tuple(lora if lora.fixed else lora._replace(scale=self.lora_scale) for lora in loras)

    def active_loras(self):
        """The LoRAs that take part: without those of strength 0 the picture is the base's, bit for bit."""
        return tuple(lora for lora in self.scaled_loras() if lora.scale)


class Cell(NamedTuple):
    """A place along an axis of a grid: what the sheet says there, and what its pictures have otherwise."""

    label: str = ""
    changes: dict = {}  # {field of `Drawing`: value}
    options: dict = {}  # the prompt's own, which the changes of all axes overrule
    note: str = ""  # a second line on the sheet; {seed} stands for the picture's
    suffix: str = ""  # of the file's name
    nth: int = 0  # picture i of a prompt has the seed + i


class Grid(NamedTuple):
    """Which pictures a run draws: each of the sheets' cells with each of the bands', the rows' and the columns'."""

    name: str | None  # of the sheets' files; None: no sheets
    sheets: list[Cell]
    bands: list[Cell]
    rows: list[Cell]
    columns: list[Cell]


class Studio(NamedTuple):
    """What draws: the pipeline, and what is alike for all pictures of a run."""

    pipe: Any
    call: dict  # {argument: what it takes}, of PIPELINES
    scheduler: Any  # the model's own
    training: dict  # {setting of TRAINING: value}
    image: Any = None  # the picture to start from, as it was read
    control_image: Any = None
    canny: bool = False  # the control image's edges hold the picture, not the image itself


def fail(message, code=2):
    """One line on stderr, and the exit code: 2 for bad input."""
    print(f"infer.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def note(message):
    print(f"note: {message}", file=sys.stderr)


# The flags.


# fmt: off
def build_parser():
    """The flags, one a line; the errors that argparse finds take one line too."""
    def add(flag, help, default=None, **options):
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, default=default, help=help + shown, **options)

    def switch(flag, help):
        group.add_argument(flag, action="store_true", help=help)

    parser = argparse.ArgumentParser(prog="infer.py", description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=119))
    parser.error = fail
    count, of = number(int, least=1), {field: row.parse for field, row in SETTINGS.items()}
    group = parser.add_argument_group("model")
    add(MODEL_FLAG, "base model: local folder, hub id, .safetensors or .ckpt file", metavar="MODEL")
    add("--single_file_config", "pipeline folder that configures a single-file base model offline", type=Path, metavar="FOLDER")
    add("--revision", "branch, tag or commit of the hub's base model (default: main)")
    add("--variant", "weight files of the base model to take, such as fp16 (default: the plain ones)")
    add("--vae", "VAE in place of the base model's: folder, hub id or single file (default: what the LoRA was trained with)", metavar="MODEL")
    add("--lora", f"LoRA, or several that add up, each as PATH or PATH:STRENGTH: folder with {WEIGHT_NAME}, .safetensors file or hub id (default: none)", nargs="+", action="extend")
    add("--lora_scale", "strength of each LoRA that is given without one: 0 is the base, 1 is as trained", 1.0, type=of["lora_scale"])
    add("--controlnet", "ControlNet that holds the pictures to --control_image: folder or hub id", metavar="MODEL")
    group = parser.add_argument_group("pictures")
    add("--prompt", "what to draw: one prompt, several, or a .txt file with one a line; options may stand behind each: a red axe --seed 3 --width 768 --negative blurry (also --steps, --guidance, --scheduler, --strength, --lora_scale, and kohya's --n --w --h --d --l --s)", nargs="+")
    add("--negative_prompt", "what to keep out of the pictures (default: nothing)")
    add("--num_images", "pictures per prompt", 1, type=count)
    add("--seed", "picture i of each prompt is drawn from seed + i, alike on any device", 0, type=of["seed"])
    add("--num_inference_steps", "denoising steps: more take longer and add detail", 30, type=of["num_inference_steps"])
    add("--guidance_scale", "how strictly the prompt is followed; 1 and less: no guidance", 7.5, type=of["guidance_scale"])
    add("--height", "height of the pictures in pixels, a multiple of 8 (default: the model's own, or in the shape of --image)", type=of["height"])
    add("--width", "width of the pictures in pixels, a multiple of 8 (default: the model's own, or in the shape of --image)", type=of["width"])
    add("--scheduler", "sampler (default: the model's own, dpm++ instead of pndm; ddim for zero terminal SNR)", type=sampler_name, metavar="{" + ",".join(SAMPLERS) + "}")
    add("--clip_skip", "last text-encoder layers to leave out, A1111 counts one more (default: as the LoRA was trained, else 0)", type=number(int, least=0))
    group = parser.add_argument_group("from pictures")
    add("--image", "picture to start from (image to image), of any size and shape", type=Path, metavar="FILE")
    add("--strength", f"how far from --image to go, up to 1: its noise, and the share of the steps; several draw several pictures (default: {STRENGTH})", type=of["strength"], nargs="+")
    add("--control_image", "picture that --controlnet holds to: edges, a pose, depth, as the ControlNet was trained; with --control canny any picture", type=Path, metavar="FILE")
    add("--control", "canny: the edges of --control_image, or of --image, are what --controlnet holds to", choices=["canny"])
    add("--controlnet_scale", "how strictly --controlnet holds", 1.0, type=of["controlnet_scale"])
    add("--from_png", "a picture that infer.py drew: draw it again; other flags change what they say", type=Path, metavar="FILE")
    group = parser.add_argument_group("grids")
    add("--grid", f"a sheet over one to three of {', '.join(row.short for row in SETTINGS.values() if row.label)}: rows, columns, bands, each as NAME=VALUE,VALUE, as in lora_scale=0,0.5,1 guidance=5,7.5,10 or \"checkpoint=run/epoch-*\" (each a LoRA in turn, base is none); prompt, seed and strength alone take the values of their flags", nargs="+", action="extend", metavar="NAME=VALUES")
    switch("--compare_base", "draw with and without the LoRA: base above LoRA in comparison.png")
    group = parser.add_argument_group("machine")
    add("--batch_size", f"pictures drawn at once: more are faster on a GPU and take more memory; with 1 no picture's last bits depend on others (default: {BATCH_SIZE})", type=count)
    add("--mixed_precision", "number format of the models (default: no; on CUDA bf16, or fp16 without it)", choices=["no", "fp16", "bf16"])
    add("--device", "cpu, cuda, cuda:1, mps, or auto for the fastest there is", "auto")
    switch("--compile", "compile the UNet's blocks: a minute or more at the first step, faster steps then; for many pictures")
    switch("--offload", "keep each model on the GPU only while it works: slower, for GPUs that are too small for all")
    add("--num_cpu_threads", "threads for computing on a CPU (default: the physical cores, unless OMP_NUM_THREADS says otherwise)", type=count)
    group = parser.add_argument_group("output")
    add("--output_dir", "where the pictures go; others there are not overwritten", Path("outputs"), type=Path)
    add("--save_merged", "new folder for the base model with the LoRAs merged into it, at their strengths; float32 unless --mixed_precision is given", type=Path, metavar="FOLDER")
    return parser
# fmt: on


def parse_args(argv):
    """The flags; those of --from_png's picture stand in for what was not given. An unknown one names the nearest."""
    parser = build_parser()
    known = list(parser._option_string_actions)
    given = [word.split("=")[0] for word in argv if re.match(r"--\w", word)]
    for flag in given:
        if flag not in known:
            fail(f"unknown flag {flag}. Did you mean {nearest(flag, known)}?")
    args = parser.parse_args(argv)
    if args.from_png:
        stored = read_repeat(args.from_png)["flags"]
        words = [(f"--{name}", value) for name, value in stored.items() if f"--{name}" not in given]
        args = parser.parse_args([f"{flag}={word}" for flag, values in words for word in values] + argv)
    check_flags(args)
    return args


def check_flags(args):
    """Refuses flags that need others, or exclude them."""
    grid = {AXES.get(word.partition("=")[0]) for word in args.grid or ()}
    if args.pretrained_model_name_or_path is None:
        fail(f"{MODEL_FLAG} is missing: the base model to draw with, or --from_png with a picture to draw again.")
    if args.prompt is None and "prompt" not in grid and not args.save_merged:
        fail("--prompt is missing: what to draw.")
    if args.prompt and any(word.startswith("prompt=") for word in args.grid or ()):
        fail("--prompt and prompt= in --grid are both given. Leave one out, or write prompt alone in --grid.")
    with_lora = args.lora is not None or "checkpoint" in grid
    defaults = build_parser().parse_args([])
    for field, row in SETTINGS.items():
        there = with_lora if row.needs == "lora" else row.needs is None or getattr(args, row.needs) is not None
        if not there and (field in grid or getattr(args, field) != getattr(defaults, field)):
            fail(f"--{field} needs --{row.needs}.")
    if args.lora is None and (args.compare_base or args.save_merged):
        fail(f"{'--compare_base' if args.compare_base else '--save_merged'} needs --lora.")
    if args.compare_base and args.grid:
        fail("--compare_base is a grid of its own. Leave it out, and add lora_scale=0,1 to --grid.")
    if (args.control or args.control_image) and args.controlnet is None:
        fail(f"{'--control' if args.control else '--control_image'} needs --controlnet.")
    if args.controlnet and not (args.control_image or (args.control and args.image)):
        fail("--controlnet needs --control_image, or --control canny with --image.")


def check_outputs(output_dir, merged):
    """Refuses an output folder that can't be made or written into, and a merged model's that is not empty."""
    for flag, folder in (("--output_dir", output_dir), ("--save_merged", merged)):
        if folder is None:
            continue
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            fail(f"{flag} {folder}: can't write into {existing}. Name another folder.")
    if merged and merged.exists() and any(merged.iterdir()):
        fail(f"--save_merged {merged} is not empty. Name a new folder.")


# What is there: models, LoRAs, pictures.


def hub_file(flag, repo_id, filename, revision=None, refuse=fail):
    """The local path of a file of a hub repository, downloaded where it is not cached yet."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo_id) or repo_id.endswith((".safetensors", ".ckpt")):
        return refuse(f"{flag} {repo_id} does not exist. Check the path (relative ones start from {Path.cwd()}).")
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(repo_id, filename, revision=revision)
        if not isinstance(cached, str):
            HfApi().model_info(repo_id, revision=revision, timeout=5)  # a download would retry for 23 s
        return Path(hf_hub_download(repo_id, filename, revision=revision, local_files_only=isinstance(cached, str)))
    except Exception as error:  # those of httpx and of the hub share no base class
        reason = str(error).strip()[:200]
        return refuse(f"{flag} {repo_id} is no file or folder here, and the hub does not give it: {reason}")


def read_safetensors(flag, path):
    """({key: shape}, {name: string}) from the header of a safetensors file; a file cut short does not pass."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        fail(f"{flag} {path} is not a whole safetensors file ({error}). Copy or download it again.")


def find_model(source, single_file_config, revision, variant):
    """The `Model` of the flags; refuses what is not there, or of a family that is not in the table."""
    flag, path = MODEL_FLAG, Path(source)
    folder = path
    if path.is_file():
        if path.suffix not in (".safetensors", ".ckpt"):
            fail(f"{flag} {path}: a single file must be .safetensors or .ckpt.")
        if single_file_config is None:
            family, prediction_type, zero_snr = look_into(path)
            return Model(source, None, revision, variant, family or "sd", {}, prediction_type, zero_snr)
        flag, folder = "--single_file_config", single_file_config
    elif not path.is_dir():
        folder = hub_file(flag, source, "model_index.json", revision).parent
        for part in ("scheduler/scheduler_config.json", "unet/config.json"):
            hub_file(flag, source, part, revision, refuse=str)
    try:
        class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError):
        fail(f"{flag} {folder} holds no readable model_index.json. Pass the folder of a whole pipeline.")
    families = {name: family for classes, _ in PIPELINES.values() for family, name in classes.items()}
    if class_name not in families:
        known = " and ".join(PIPELINES["text to image"][0].values())
        fail(f"{flag} {folder} is a {class_name}; this script draws with {known}.")
    prediction_type, zero_snr, unet_config = None, None, {}  # a folder's scheduler starts as its configuration says
    with contextlib.suppress(OSError, ValueError):  # the loader says what is wrong with it
        scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        unet_config = json.loads((folder / "unet" / "config.json").read_text())
    files = [sorted(path.glob(f"{part}/*.safetensors")) for part in COMPONENTS if (path / part).is_dir()]
    shapes = {}
    for file in sum(files, []):
        shapes |= {f"{file.parent.name}.{key}": shape for key, shape in read_safetensors(flag, file)[0].items()}
    shapes = shapes if all(files) else {}
    family = families[class_name]
    if path.is_file():
        inside, own_type, own_snr = look_into(path)
        if inside not in (None, family):
            fail(f"{MODEL_FLAG} {source} is not what {flag} {folder} describes: that is a {class_name}.")
        prediction_type, zero_snr = own_type or prediction_type, own_snr
    return Model(source, single_file_config, revision, variant, family, shapes, prediction_type, zero_snr, unet_config)


def look_into(path):
    """(family, prediction type, zero terminal SNR or not) of a single file by its keys alone; None for what they don't say."""
    keys = read_safetensors(MODEL_FLAG, path)[0] if path.suffix == ".safetensors" else ()
    starts = {"conditioner.": "sdxl", "cond_stage_model.": "sd"}
    family = next((name for start, name in starts.items() if any(key.startswith(start) for key in keys)), None)
    # Keys without a weight, by which a file's maker says how it was trained.
    return family, "v_prediction" if "v_pred" in keys else None, "ztsnr" in keys or None


def find_lora(given, scale, adapter):
    """The `Lora` of PATH or PATH:STRENGTH; refuses what is no LoRA."""
    path, (head, _, tail), fixed = Path(given), given.rpartition(":"), False
    if head and not path.exists():  # a path may hold a colon itself
        with contextlib.suppress(ValueError):
            scale, given, path, fixed = float(tail), head, Path(head), True
    if not math.isfinite(scale):
        fail(f"--lora {given}:{scale}: the strength must be a finite number.")
    if path.is_dir() and (path / WEIGHT_NAME).exists():
        path = path / WEIGHT_NAME
    elif path.is_dir() and not (path / PEFT_NAME).exists():
        found = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:3]) or "no LoRA files"
        fail(f"--lora {given} holds no {WEIGHT_NAME} (there are: {found}). Pass the LoRA file itself.")
    elif not path.exists():
        path = hub_file("--lora", given, WEIGHT_NAME)
    if path.is_file() and path.suffix != ".safetensors":
        fail(f"--lora {path}: only .safetensors files are read, since others can carry code.")
    lora = Lora(given, path, scale, adapter, {}, {}, fixed)
    shapes, header = read_safetensors("--lora", lora.file)
    if not any("lora" in key or "hada" in key or "lokr" in key for key in shapes):
        fail(f"--lora {path} is not a LoRA file: none of its {len(shapes)} keys has 'lora' in its name.")
    return lora._replace(shapes=shapes, header=header)


def find_checkpoints(listed, scale):
    """The LoRAs that a grid's `checkpoint=` lists: paths, patterns, or base for none; {label: LoRA or None}."""

    def in_order(name):  # of the numbers in names
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]

    found = []
    for word in listed:
        matches = [word] if word == "base" or Path(word).exists() or not glob.has_magic(word) else glob.glob(word)
        if not matches:
            fail(f"--grid checkpoint={word}: no file or folder has such a name.")
        found += sorted(matches, key=in_order)
    loras = [None if word == "base" else find_lora(word, scale, f"checkpoint{i}") for i, word in enumerate(found)]
    names = [Path(lora.given.removesuffix(".safetensors")).absolute().parts if lora else ("base",) for lora in loras]
    length = 1  # of the labels, in parts of the paths: as short as tells them apart
    while len({parts[-length:] for parts in names}) < len(set(names)):
        length += 1
    return {"/".join(parts[-length:]): lora for parts, lora in zip(names, loras)}


def vae_channels(source, refuse=fail):
    """The channels of a VAE's latents, None for a single file; refuses what is no VAE."""
    path = Path(source)
    if path.is_file():
        if path.suffix == ".safetensors":
            read_safetensors("--vae", path)
        elif path.suffix not in (".ckpt", ".pt"):
            refuse(f"--vae {source}: a single file must be .safetensors, .ckpt or .pt.")
        return None
    file = path / "config.json" if path.is_dir() else hub_file("--vae", source, "config.json", refuse=refuse)
    try:
        config = file and json.loads(file.read_text())
        if config is None or config["_class_name"] == "AutoencoderKL":
            return config and config["latent_channels"]
    except (OSError, ValueError, KeyError):
        pass
    return refuse(f"--vae {source} holds no config.json of an AutoencoderKL. Pass the folder of the VAE itself.")


def find_controlnet(source):
    """The config.json of a ControlNet; refuses what is none."""
    path = Path(source)
    if path.is_file():
        fail(f"--controlnet {source}: pass a folder in diffusers' layout, or a hub id; a single file can't be read.")
    file = path / "config.json" if path.is_dir() else hub_file("--controlnet", source, "config.json")
    with contextlib.suppress(OSError, ValueError):
        config = json.loads(file.read_text())
        if config.get("_class_name") == "ControlNetModel":
            return config
    return fail(f"--controlnet {source} holds no config.json of a ControlNetModel. Pass the ControlNet's own folder.")


def check_controlnet_fits(source, config, unet_config, vae_scale_factor=None):
    """Refuses a ControlNet whose config.json shows that it was made for another UNet, or for another VAE."""
    for name in CONTROLNET_FITS:
        own, unet = config.get(name), unet_config.get(name)
        if own is not None and unet is not None and json.dumps(own) != json.dumps(unet):
            fail(f"--controlnet {source} does not fit this base model: its {name} is {own}, the UNet's is {unet}.")
    factor = 2 ** (len(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))) - 1)
    if vae_scale_factor not in (None, factor):
        fail(f"--controlnet {source} makes pictures {factor} times smaller, and the VAE {vae_scale_factor} times.")


def read_image(flag, path):
    """The picture in a file as RGB, upright; transparency lies on white, of an animation the first frame is taken."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow's plugins raise what they like on broken files
        reason = getattr(error, "strerror", None) or str(error)
        reason = "it is no picture" if "cannot identify" in reason else reason
        fail(f"{flag} {path} can't be read: {reason}. Pass a PNG, JPEG or WebP file.")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would cut off at 255
        scale = 1 if image.mode in ("I", "F") and image.getextrema()[1] <= 255 else 255 / 65535
        image = image.convert("F").point(lambda value: value * scale + 0).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# How the LoRAs were trained decides how they are drawn.


def training_of(loras, own, decided):
    """How the LoRAs were trained, {setting of TRAINING: value}; refuses those that differ in what no flag decides.

    `own` are the base model's settings as far as they are known. Files without a header of ours have no say.
    """
    keys = {"pretrained_model_name_or_path", *(key for key, *_ in TRAINING.values())}
    ours, trained = [lora for lora in loras if keys & lora.header.keys()], {}
    for name, (key, value_of, _) in TRAINING.items():
        values = [value_of(lora.header.get(key, "")) or own.get(name) for lora in ours] or [own.get(name)]
        if name in ("long_prompts", "num_chunks"):  # the most of them: the others take longer prompts too
            values = [max(filter(None, values), default=None)]
        odd = next((i for i, value in enumerate(values) if value != values[0]), 0)
        if odd and name not in decided:
            was, other = (value or "none" for value in (values[0], values[odd]))
            remedy = f"Pass --{name} to choose" if name in ("clip_skip", "vae") else "Draw them one at a time"
            fail(f"--lora {ours[0].path} was trained with {key} {was}, {ours[odd].path} with {other}. {remedy}.")
        trained[name] = values[0]
    return trained


def settle(loras, model, scheduler, flags):
    """How to draw, {setting of TRAINING: value}: as flags say, or else as the LoRAs were trained; and notes that tell it."""
    own = {"prediction_type": model.prediction_type, "zero_snr": model.zero_snr}
    decided = {k: v for k, v in flags.items() if v is not None}
    trained, obstacles = training_of(loras, own, decided), {}
    if scheduler in NO_ZERO_SNR:
        obstacles["zero_snr"] = f"--scheduler {scheduler} can't. Leave it out, or take ddim."
    if "vae" in decided:
        vae_channels(decided["vae"])
    elif (vae := trained["vae"]) and len(Path(vae).parts) == 1 and not Path(vae).exists():
        obstacles["vae"] = "its header has the last part of the path alone. Pass --vae with the whole."
    elif vae:
        vae_channels(vae, refuse=lambda reason: obstacles.update(vae=reason))
    for name, value in decided.items():
        same = Path(str(value)).name == Path(str(trained[name])).name
        obstacles[name] = "" if same else f"--{name} {value} overrules it."
    subject = "the LoRAs were" if len(loras) > 1 else "the LoRA was"
    notes, taken = [], []
    for name, value in trained.items():
        if value == own.get(name):
            continue
        words = TRAINING[name][2].format(value).replace("v_pred", "v-pred")
        if name not in obstacles:
            taken.append(words)
        elif obstacles[name]:
            notes.append(f"{subject} trained with {words}; the pictures are not drawn so: {obstacles[name]}")
    if taken:
        listed = " and ".join(filter(None, (", ".join(taken[:-1]), taken[-1])))
        notes.append(f"{subject} trained with {listed}; the pictures are drawn so")
    settings = {name: own.get(name) if name in obstacles else value for name, value in trained.items()} | decided
    return settings, notes


def check_fits(shapes, loras, clip_skip, latent_channels):
    """Refuses what the shapes of the base model's weights {"unet.conv_in.weight": shape} show to be wrong."""
    for lora in loras:
        check_lora_fits(lora.path, lora.shapes, shapes)
    pattern = re.compile(r"text_encoder\.(?:text_model\.)?encoder\.layers\.(\d+)\.")
    layers = 1 + max((int(match[1]) for match in map(pattern.match, shapes) if match), default=-1)
    if layers and clip_skip >= layers:
        fail(f"clip skip {clip_skip}: the text encoder has {layers} layers. Pass --clip_skip {layers - 1} at most.")
    channels = shapes.get("unet.conv_in.weight", (None, latent_channels))[1]
    if latent_channels not in (None, channels):
        fail(f"--vae makes latents of {latent_channels} channels, and the UNet takes {channels}. Pass another VAE.")


def family_of(shapes, pattern):
    """The family, in words, of weights {key: shape}, by the width of what those of the pattern take in; else None."""
    widths = (shape[1] for key, shape in shapes.items() if re.search(pattern, key))
    return next(filter(None, map(FAMILIES.get, widths)), None)


def check_lora_fits(path, lora_shapes, model_shapes):
    """Refuses a LoRA with a key that names no layer of the model, or one of another size, or half of a pair."""

    def one_spelling(name):  # kohya has _ for dots and te for text_encoder; transformers 5.6 dropped text_model
        name = re.sub("^lora_te1?_", "text_encoder_", name.replace(".", "_"))
        return re.sub("^lora_te2_", "text_encoder_2_", name).removeprefix("lora_").replace("text_model_", "")

    weights = {one_spelling(key.removesuffix(".weight")): shape for key, shape in model_shapes.items()}
    to_keys = r"attn2[._](processor\.)?to_[kv]"
    lora_family = family_of(lora_shapes, rf"{to_keys}.*(lora_A|lora_down|\.down)\.weight$")
    model_family = family_of(model_shapes, rf"{to_keys}\.weight$")
    if lora_family and model_family and lora_family != model_family:
        fail(
            f"--lora {path} is of {lora_family}, and the base model is of {model_family}. Pass one of the same family."
        )
    partner = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
    partner |= {up: down for down, up in partner.items()}
    # The block names of the original code (kohya's SDXL files) and peft's are looked at when they are translated.
    pattern = re.compile(
        rf"(?!lora_unet_(?:input|middle|output)_block|base_model\.)(.+)\.({'|'.join(partner)})\.weight"
    )
    unmatched = []
    for match in filter(None, map(pattern.fullmatch, lora_shapes)):
        shape, weight = lora_shapes[match[0]], weights.get(one_spelling(match[1]))
        axis = 1 if match[2] in ("lora_A", "lora_down", "lora.down") else 0
        if not weight or shape[axis] != weight[axis] or f"{match[1]}.{partner[match[2]]}.weight" not in lora_shapes:
            unmatched.append(match[0])  # transformers fills the missing half of a pair at random
    if unmatched:
        count = f"{len(unmatched)} of its {len(lora_shapes)} keys match no layer there, such as {unmatched[0]}"
        fail(f"--lora {path} does not fit this base model: {count}. Pass the base that it was trained on.")


# Loading.


class Inert:
    """Stands for a class that a .ckpt names and that drawing does not need; does nothing."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


def inert_globals(path):
    """(stub, name) pairs that let `weights_only` read what Lightning left in a .ckpt; refuses any other code."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError) as error:
        fail(f"{path} is not a whole torch checkpoint ({str(error).splitlines()[0]}). Get the model as .safetensors.")
    harmless = re.compile(r"(pytorch_lightning|lightning)\..+|numpy\.(_?core\.multiarray\.scalar|dtype)")
    if refused := sorted(name for name in names if not harmless.fullmatch(name)):
        fail(f"{path} carries more than weights ({', '.join(refused[:3])}). Get the model as .safetensors.")
    return [(Inert, name) for name in names]


def load_weights(model_class, source, **options):
    """A stock model or pipeline from a folder, a hub id or a single file, of which no code is run."""
    import torch

    try:
        if not Path(source).is_file():
            return model_class.from_pretrained(source, **options)
        # diffusers reads a .ckpt with weights_only=True
        with torch.serialization.safe_globals([] if source.endswith(".safetensors") else inert_globals(source)):
            return model_class.from_single_file(source, **options)
    except Exception as error:  # the loaders raise nearly anything for files that are not in order
        remedy = " Where there is no hub, pass --single_file_config." if Path(source).is_file() else ""
        fail(f"{source} can't be loaded: {type(error).__name__}: {str(error)[:300]}{remedy}")


def load_pipeline(model, vae, dtype, mode, controlnet):
    """The stock pipeline of a `Model` for a mode of PIPELINES, without the safety checker.

    `vae` and `controlnet` are the sources of another VAE and of a ControlNet, or None.
    """
    # The libraries chatter while they are imported.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    logging.getLogger("xformers").setLevel(logging.ERROR)  # "can't load C++/CUDA extensions" beside a CPU torch
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # "No module named 'kernels'", which is optional
    import diffusers
    import transformers

    # The one name that diffusers 0.39 knows; 0.42 knows `dtype` too.
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    for library in (diffusers, transformers):  # again, for a process that had imported them before
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    is_file, options = Path(model.source).is_file(), {"torch_dtype": dtype}
    config = model.single_file_config and str(model.single_file_config)
    if vae is not None:
        vae_config = config if is_file else model.source
        like = {"config": vae_config, "subfolder": "vae"} if vae_config and Path(vae).is_file() else {}
        options["vae"] = load_weights(diffusers.AutoencoderKL, vae, torch_dtype=dtype, **like)
    if controlnet is not None:
        options["controlnet"] = load_weights(diffusers.ControlNetModel, controlnet, torch_dtype=dtype)
    if model.family == "sd":
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options |= {"config": config} if is_file else {"revision": model.revision, "variant": model.variant}
    pipe = load_weights(getattr(diffusers, PIPELINES[mode][0][model.family]), model.source, **options)
    pipe.vae.enable_slicing()  # one picture of a batch at a time: the decoder takes more memory than the UNet
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_scheduler(own, chosen, training):
    """The scheduler that was chosen, with the settings of the base model's own and of the training."""
    import diffusers

    # PNDM, which Stable Diffusion v1.x comes with, overshoots at strong guidance in so few steps.
    default = "ddim" if training["zero_snr"] else "dpm++" if type(own) is diffusers.PNDMScheduler else None
    name, changes, _ = SAMPLERS.get(chosen or default, (type(own).__name__, {}, None))
    if training["prediction_type"] not in (None, own.config.get("prediction_type")):
        changes = changes | {"prediction_type": training["prediction_type"]}
    if training["zero_snr"]:  # sampling must start at the last timestep (Lin et al., 2023, arXiv:2305.08891)
        changes = changes | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    if not (chosen or default or changes):
        return own
    return getattr(diffusers, name).from_config(own.config, **changes)


def choose_device(device, precision):
    """The torch device and the dtype that the flags come to on this machine."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device} can't be used here: {str(error).splitlines()[0]}")
    # A T4 says that it has bf16 and emulates it, slowly.
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = precision or ("bf16" if bf16 else "fp16" if device.startswith("cuda") else "no")
    if precision == "fp16" and device == "cpu":
        fail("--mixed_precision fp16 needs a GPU. Leave it out, or take bf16.")
    return device, {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def set_num_threads(wanted):
    """Computes with so many threads, or as many as OMP_NUM_THREADS says; else one on each physical core of this process."""
    import psutil
    import torch

    said = os.environ.get("OMP_NUM_THREADS", "")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if wanted is None and said.isdecimal() and not (launched and said == "1"):  # launchers set 1 in silence
        wanted = int(said)
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(logical, psutil.cpu_count(logical=False) or logical) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, cores if wanted is None else wanted))


def stock_reads(lora):
    """Whether stock diffusers reads the file rightly by itself, as it does our own; the converter takes the others."""
    leaf = r"(lora_[AB]\.(weight|bias)|lora_magnitude_vector(\.weight)?)"
    return all(re.fullmatch(rf"(unet|text_encoder|text_encoder_2)\..+\.{leaf}", key) for key in lora.shapes)


def translate(lora, model_shapes):
    """The weights of a LoRA in another program's dialect, {key of our own files: tensor}; refuses one that does not fit."""
    from text_to_image_lora.models.lora_file import as_diffusers

    try:
        weights, _ = as_diffusers(lora.path)
    except InputError as error:
        fail(f"--lora {error}")
    if model_shapes:
        check_lora_fits(lora.path, {key: tuple(tensor.shape) for key, tensor in weights.items()}, model_shapes)
    return weights


def load_loras(pipe, loras, translated, clip_skip):
    """Adds the LoRAs to the pipeline, and makes sure that every weight of their files found its place.

    `translated` holds the weights of those in other dialects {adapter: {key: tensor}}.
    """
    models = {name: pipe.components[name] for name in COMPONENTS if pipe.components.get(name)}
    shapes = {f"{name}.{k}": v.shape for name, model in models.items() for k, v in model.state_dict().items()}
    check_fits(shapes, loras, clip_skip, pipe.vae.config.latent_channels)
    warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # of the LoRA before
    for lora in loras:
        weights = translated.get(lora.adapter)
        source = {"weight_name": lora.path.name} if weights is None else {}
        try:
            pipe.load_lora_weights(
                dict(weights) if weights else str(lora.path.parent), adapter_name=lora.adapter, **source
            )
        except Exception as error:  # what peft, diffusers and transformers raise for sizes and names that don't match
            fail(f"--lora {lora.path} does not fit this base model: {type(error).__name__}: {str(error)[:300]}")
        # What the check leaves to diffusers: there, and in transformers, a weight without a place is only warned of.
        in_file = sum(key.endswith(".weight") and "lora_magnitude" not in key for key in weights or lora.shapes)
        pattern = re.compile(rf".+\.lora_[AB]\.{lora.adapter}\.weight")
        placed = sum(bool(pattern.fullmatch(name)) for m in models.values() for name, _ in m.named_parameters())
        if placed != in_file:
            counts = f"{in_file} weights in the file, {placed} in the model"
            fail(f"--lora {lora.path} does not fit this base model: {counts}. Pass the base that it was trained on.")


def set_loras(pipe, loras):
    """Lets these LoRAs alone take part, each at its strength."""
    if loras:
        pipe.set_adapters([lora.adapter for lora in loras], adapter_weights=[lora.scale for lora in loras])
        pipe.enable_lora()
    elif pipe.get_list_adapters():
        pipe.disable_lora()


def place(pipe, device, offload, compiled):
    """Puts the pipeline on its device, or lets its models visit the GPU in turn; compiles the UNet's blocks on request."""
    import torch
    import torch._dynamo

    if offload and torch.device(device).type != "cuda":
        note(f"--offload does nothing on {device}: it is for CUDA GPUs.")
    if offload and torch.device(device).type == "cuda":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    if compiled:
        # Each strength of a LoRA is a graph of its own; beyond the limit torch would go on uncompiled, in silence.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
        warnings.filterwarnings("ignore", r"Dynamo detected a call to a `functools.lru_cache`", UserWarning)
        pipe.unet.compile_repeated_blocks()


def save_merged(studio, job, loras, folder):
    """Writes the pipeline with the LoRAs merged into its weights, whole or not at all."""
    import diffusers

    pipe, active = studio.pipe, [lora for lora in loras if lora.scale]
    set_loras(pipe, active)
    if active:
        pipe.fuse_lora(components=[part for part, adapters in pipe.get_list_adapters().items() if adapters])
    pipe.unload_lora_weights()
    for name in COMPONENTS[1:]:
        if getattr(pipe, name, None) is not None:
            # transformers 5 keeps the renaming of the LoRA's keys, and would write the encoder's own under such names.
            getattr(pipe, name)._weight_conversions = None
    components = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    components["scheduler"] = make_scheduler(studio.scheduler, None, studio.training)
    settings = ("requires_safety_checker", "force_zeros_for_empty_prompt")
    components |= {name: pipe.config[name] for name in settings if name in pipe.config}
    partial = folder.with_name(folder.name + ".partial")
    getattr(diffusers, PIPELINES["text to image"][0][job.model.family])(**components).save_pretrained(partial)
    if folder.exists():
        folder.rmdir()  # it is empty
    partial.rename(folder)
    for name in ("clip_skip", "long_prompts"):
        if studio.training[name]:
            words = TRAINING[name][2].format(studio.training[name])
            note(f"{folder} can't say that it is to be drawn with {words}: ask for it where you draw")


# Which pictures: the axes of grids, the order of the pictures, their sizes.


def slug(text):
    return re.sub(r"[^\w.+-]+", "-", text.lower())[:60].strip("-")


def prompt_cells(prompts):
    """A cell for each `Prompt`; the names of its files start with its number."""
    digits = max(2, len(str(len(prompts) - 1)))
    return [
        Cell(
            prompt.text,
            {"prompt": prompt.text, "stem": f"{i:0{digits}d}-{slug(prompt.text.replace('.', ' ')) or 'picture'}"},
            prompt.options,
        )
        for i, prompt in enumerate(prompts)
    ]


def axis_cells(field, values):
    """A cell for each value of a row of SETTINGS."""
    row, cells = SETTINGS[field], []
    for value in dict.fromkeys(values):
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        named = shown if isinstance(value, str) else f"{row.short}{shown}"
        suffix = "" if field == "seed" else f"-{slug(named)}"  # a seed is in each name anyway
        cells.append(Cell(row.label.format(shown), {field: value}, suffix=suffix))
    return cells


def read_grid(words, by_flags, lora_scale):
    """The axes of --grid {field: its cells}; a name without values has those of `by_flags`."""
    axes = {}
    for name, equals, listed in (word.partition("=") for word in words):
        if name not in AXES:
            known = ", ".join(row.short for row in SETTINGS.values() if row.label)
            fail(f"--grid {name}: there is no such name. Did you mean {nearest(name, AXES)}? There are {known}.")
        field, values = AXES[name], [value.strip() for value in listed.split(",") if value.strip()]
        if field in axes:
            fail(f"--grid has {name} twice. Give all its values at once, as in {name}=A,B.")
        if not equals and by_flags.get(field):
            axes[field] = by_flags[field]
        elif not values:
            fail(f"--grid {name} has no values. Write them behind it, as in {name}=A,B.")
        elif field == "prompt":
            axes[field] = prompt_cells(read_prompts("--grid prompt", values))
        elif field == "checkpoint":
            found = find_checkpoints(values, lora_scale)
            axes[field] = [Cell(label, {field: lora}, suffix=f"-{slug(label)}") for label, lora in found.items()]
        else:
            try:
                axes[field] = axis_cells(field, map(SETTINGS[field].parse, values))
            except argparse.ArgumentTypeError as error:
                fail(f"--grid {name}={error}")
    if len(axes) > 3:
        fail(f"--grid has {len(axes)} names: three are the most, for rows, columns and bands.")
    return axes


def combined(cells):
    """The cell of a picture that lies in all these cells."""
    return Cell(
        ", ".join(cell.label for cell in cells if cell.label),
        functools.reduce(dict.__or__, (cell.changes for cell in cells), {}),
        functools.reduce(dict.__or__, (cell.options for cell in cells), {}),
        ", ".join(cell.note for cell in cells if cell.note),
        "".join(cell.suffix for cell in cells),
        sum(cell.nth for cell in cells),
    )


def arrange(axes, prompts, num_images, strengths, compared):
    """The `Grid` of a run: the first axis is the rows, the second the columns, the third bands below each other.

    What else there are several of has a sheet each. `compared` is the label of the row with LoRAs, for --compare_base.
    """
    rest = [] if "prompt" in axes else [prompt_cells(prompts)]
    if "strength" not in axes and len(strengths) > 1:
        rest.append(axis_cells("strength", strengths))
    if "seed" not in axes:
        rest.append([Cell(note="seed {seed}" * (num_images > 1), nth=i) for i in range(num_images)])
    others, one = [combined(cells) for cells in itertools.product(*rest)], [Cell()]
    if compared:
        rows = [Cell("base", {"loras": ()}, suffix="-base"), Cell(compared[0], note=compared[1])]
        return Grid("comparison", one, one, rows, others)
    if not axes:
        return Grid(None, others, one, one, one)
    rows, columns, bands = ([one] * (len(axes) == 1) + [*axes.values(), one, one])[:3]
    return Grid("grid", others, bands, rows, columns)


def row_label(loras):
    """(text, note) of the row of a comparison that has the LoRAs."""
    scales = " and ".join(f"{lora.scale:g}" for lora in loras)
    return "with LoRA" + "s" * (len(loras) > 1), f"at {scales}" * any(lora.scale != 1 for lora in loras)


def plan(like, grid):
    """The drawings of a grid, sheet by sheet, band by band, row by row; the rest is as in `like`."""
    drawings = []
    for cell in map(combined, itertools.product(grid.sheets, grid.bands, grid.rows, grid.columns)):
        drawing = like._replace(**{**cell.options, **cell.changes})
        seed, steps = drawing.seed + cell.nth, drawing.num_inference_steps
        if drawing.strength is not None and int(steps * drawing.strength) < 1:
            fail(
                f"strength {drawing.strength:g} of {steps} steps is none. Pass {1 / steps:.2g} or more, or more steps."
            )
        drawings.append(drawing._replace(stem=f"{drawing.stem}-seed{seed}{cell.suffix}", seed=seed))
    return drawings


def size_of(drawing, own, shape):
    """(height, width) of a drawing: as wanted, else the model's own; in the `shape` of a picture with the same area."""
    height, width = drawing.height, drawing.width
    if shape is None:
        return height or own[0], width or own[1]

    def whole(side):
        return max(8, round(side / 8) * 8)

    aspect = shape[0] / shape[1]  # width : height
    if height is None:
        height = whole(width / aspect if width else math.sqrt(own[0] * own[1] / aspect))
        width = width or whole(math.sqrt(own[0] * own[1] * aspect))
    return height, width or whole(height * aspect)


# Drawing.


def encode_chunks(pipe, text, num_chunks, clip_skip):
    """What the pipeline reads in place of a prompt {argument: tensor}, its hidden states (1, 77 x num_chunks, D).

    Each chunk has its start and end tokens, as A1111 has it; the embedding of the whole prompt is the first chunk's.
    """
    import torch

    if getattr(pipe, "text_encoder_2", None) is None:
        output, encoder = run_chunks(pipe.tokenizer, pipe.text_encoder, text, num_chunks), pipe.text_encoder
        hidden_states = output[0]
        if clip_skip:
            hidden_states = encoder.text_model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
        return {"prompt_embeds": hidden_states.reshape(1, -1, hidden_states.shape[-1])}
    pairs = (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)
    outputs = [run_chunks(*pair, text, num_chunks) for pair in pairs]
    hidden_states = torch.cat([output.hidden_states[-2 - clip_skip] for output in outputs], dim=-1)
    embeds = {"prompt_embeds": hidden_states.reshape(1, -1, hidden_states.shape[-1])}
    return embeds | {"pooled_prompt_embeds": outputs[1][0][:1]}


def run_chunks(tokenizer, encoder, text, num_chunks):
    """What a text encoder makes of a text in chunks, a row each."""
    import torch

    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    body, rows = tokenizer.model_max_length - 2, []
    for start in range(0, body * num_chunks, body):
        ids = [tokenizer.bos_token_id, *token_ids[start : start + body], tokenizer.eos_token_id]
        rows.append(ids + [tokenizer.pad_token_id] * (body + 2 - len(ids)))
    return encoder(torch.tensor(rows, device=encoder.device), output_hidden_states=True)


class PromptEncoder:
    """Encodes each text once, for each set of LoRAs that the text encoders have a part of.

    Prompts are padded to `least_chunks` as in training, since the UNet attends to the padding too; 0: cut after the first.
    """

    def __init__(self, pipe, least_chunks):
        self.pipe, self.least_chunks, self.encoded = pipe, least_chunks, {}
        # The LoRAs that the text encoders have a part of.
        self.adapters = {name for part, names in pipe.get_list_adapters().items() if part != "unet" for name in names}

    def num_chunks(self, drawing):
        """How many chunks the prompt and the negative one take; 0 where all are cut after the first."""
        if not self.least_chunks:
            return 0
        texts = (drawing.prompt, drawing.negative_prompt or "")
        longest = max(len(self.pipe.tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
        return max(self.least_chunks, math.ceil(longest / (self.pipe.tokenizer.model_max_length - 2)))

    def __call__(self, drawing):
        """What the pipeline reads in place of the prompts {argument: tensor of one picture}."""
        import torch

        embeds = self._encode(drawing.prompt, drawing, drawing.clip_skip)
        if drawing.guidance_scale <= 1:
            return embeds
        if drawing.negative_prompt is None and self.pipe.config.get("force_zeros_for_empty_prompt"):
            negative = {name: torch.zeros_like(tensor) for name, tensor in embeds.items()}
        else:  # as in the pipelines, clip_skip is for the prompt alone
            negative = self._encode(drawing.negative_prompt or "", drawing, 0)
        return embeds | {f"negative_{name}": tensor for name, tensor in negative.items()}

    def _encode(self, text, drawing, clip_skip):
        import torch

        loras = tuple((lora.adapter, lora.scale) for lora in drawing.active_loras() if lora.adapter in self.adapters)
        num_chunks = self.num_chunks(drawing)
        key = (text, clip_skip, num_chunks, loras)
        if key not in self.encoded:
            with torch.no_grad():
                if num_chunks > 1:
                    self.encoded[key] = encode_chunks(self.pipe, text, num_chunks, clip_skip)
                else:
                    output = self.pipe.encode_prompt(
                        prompt=text, device=self.pipe._execution_device, num_images_per_prompt=1,
                        do_classifier_free_guidance=False, clip_skip=clip_skip or None,
                    )  # fmt: skip
                    self.encoded[key] = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), output[::2]))
        return self.encoded[key]


def edges_of(image):
    """The Canny edges (doi:10.1109/TPAMI.1986.4767851) of a picture, white on black."""
    import kornia
    import numpy as np
    import torch
    from PIL import Image

    grey = torch.from_numpy(np.array(image.convert("L"))).float()[None, None] / 255
    _, edges = kornia.filters.canny(grey)
    return Image.fromarray((edges[0, 0].numpy() * 255).astype(np.uint8)).convert("RGB")


def fitted(studio, width, height):
    """The given pictures {what a pipeline takes: picture}, scaled and cropped to the size that is drawn."""
    from PIL import Image, ImageOps

    pictures = {"image": studio.image, "control_image": studio.control_image}
    found = {
        name: picture and ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        for name, picture in pictures.items()
    }
    if studio.canny:
        found["control_image"] = edges_of(found["control_image"] or found["image"])
    return found


def num_steps(scheduler, drawing):
    """How often the UNet is called for a drawing, as diffusers counts."""
    scheduler.set_timesteps(drawing.num_inference_steps)
    share = 1 if drawing.strength is None else drawing.strength
    skipped = drawing.num_inference_steps - int(drawing.num_inference_steps * share)
    return len(scheduler.timesteps) - skipped * scheduler.order


def batches_of(drawings, encoder, batch_size):
    """The drawings' numbers in lists of those that are drawn at once: they differ in nothing but prompts and seeds."""
    groups = {}
    for i, drawing in enumerate(drawings):
        loras = tuple((lora.adapter, lora.scale) for lora in drawing.active_loras())
        own = dict(stem="", prompt="", negative_prompt=None, seed=0, loras=(), checkpoint=None, lora_scale=0)
        groups.setdefault((loras, drawing._replace(**own), encoder.num_chunks(drawing)), []).append(i)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


class Drawn(NamedTuple):
    """A picture that was drawn."""

    index: int  # of its drawing
    image: Any
    scheduler: Any
    batch: tuple[int, int]  # how many were drawn at once, and which of them this was: its rounding depends on it


def draw(studio, drawings, batch_size):
    """Yields a `Drawn` for each drawing; not in order, as those that can go together are drawn at once."""
    import torch
    from tqdm import tqdm

    pipe, training = studio.pipe, studio.training
    encoder = PromptEncoder(pipe, (training["num_chunks"] or 1) if training["long_prompts"] else 0)
    batches = []
    for indices in batches_of(drawings, encoder, batch_size):
        scheduler = make_scheduler(studio.scheduler, drawings[indices[0]].scheduler, training)
        batches.append((indices, scheduler, num_steps(scheduler, drawings[indices[0]])))
    with tqdm(total=sum(steps for *_, steps in batches), unit="step", disable=None) as bar:

        def advance(pipe, step, timestep, tensors):
            bar.update()
            return tensors

        for indices, pipe.scheduler, _ in batches:
            batch = [drawings[i] for i in indices]
            first = batch[0]
            set_loras(pipe, first.active_loras())
            large = first.height * first.width > TILED_FROM
            pipe.vae.enable_tiling() if large else pipe.vae.disable_tiling()
            available = {**first._asdict(), **fitted(studio, first.width, first.height)}
            options = {argument: available[name] for argument, name in studio.call.items()}
            embeds = [encoder(drawing) for drawing in batch]
            options |= {name: torch.cat([each[name] for each in embeds]) for name in embeds[0]}
            options |= {"num_inference_steps": first.num_inference_steps, "guidance_scale": first.guidance_scale}
            # Drawn on the CPU, a seed's noise is the same on any device.
            options["generator"] = [torch.Generator("cpu").manual_seed(drawing.seed) for drawing in batch]
            try:
                images = pipe(callback_on_step_end=advance, **options).images
            except torch.OutOfMemoryError:
                what = f"{len(batch)} pictures of {first.width}x{first.height} at once"
                fail(f"the GPU's memory is too small for {what}. Pass a smaller --batch_size, or --offload.", code=1)
            for place, (i, image) in enumerate(zip(indices, images)):
                yield Drawn(i, image, pipe.scheduler, (len(batch), place))


# What a picture's file says, and drawing it again.


@functools.cache
def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Source(NamedTuple):
    """What all pictures of a run come from, as their files repeat it."""

    flags: dict  # {flag: its value, or None}
    machine: dict  # {what the last bits depend on: its name or version}


def machine_of(device, compiled):
    """What the last bits of a picture depend on, beside its flags."""
    import diffusers
    import torch

    name = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    return versions | {"device": f"{torch.device(device).type} {name}"} | ({"compiled": "yes"} if compiled else {})


def repeat_of(drawing, source, batch):
    """All that draws the picture again, for --from_png."""
    own = {field: getattr(drawing, field) for field in SETTINGS if field != "checkpoint"} | {"lora_scale": None}
    own |= {field: None for field, row in SETTINGS.items() if row.needs and not source.flags.get(row.needs)}
    own |= {"clip_skip": drawing.clip_skip}
    flags = {k: [str(v)] for k, v in (source.flags | own).items() if v is not None}
    loras = drawing.scaled_loras()
    files = {"lora": [lora.file for lora in loras]} if loras else {}
    files |= {name: flags[name] for name in ("image", "control_image") if name in flags}
    flags |= {"lora": [f"{lora.given}:{lora.scale}" for lora in loras]} if loras else {}
    sha256 = {name: [sha256_of(path) for path in paths] for name, paths in files.items()}
    return {"flags": flags, "sha256": sha256, "machine": source.machine, "batch": batch}


def describe(drawing, drawn, source):
    """The text chunks of a PNG: one a parameter, all in the form that A1111 and its readers know, all for --from_png."""

    def short(path):
        return re.sub(r"\.(safetensors|ckpt|pt)$", "", Path(path).absolute().name).replace(",", " ")

    image, scheduler, flags = drawn.image, drawn.scheduler, source.flags
    model, vae, loras = flags[MODEL_FLAG[2:]], flags["vae"], drawing.scaled_loras()
    names = ["negative_prompt", "num_inference_steps", "guidance_scale", "clip_skip"]
    chunks = {name: getattr(drawing, name) for name in names}
    chunks |= {name: value for name, value in flags.items() if value is not None}
    if loras:  # one a line
        chunks["lora"] = "\n".join(lora.given for lora in loras)
        chunks["lora_scale"] = "\n".join(str(lora.scale) for lora in loras)
    chunks |= {"strength": drawing.strength} if flags["image"] else {}
    chunks |= {"controlnet_scale": drawing.controlnet_scale} if flags["controlnet"] else {}
    chunks |= {"prompt": drawing.prompt, "seed": drawing.seed, "width": image.width, "height": image.height}
    chunks |= {"scheduler": type(scheduler).__name__, "diffusers_version": source.machine["diffusers"]}
    sampler = chunks["scheduler"]
    for name, changes, label in SAMPLERS.values():
        if name == chunks["scheduler"] and all(scheduler.config.get(key) == value for key, value in changes.items()):
            sampler = label
    listed = ", ".join(f"{short(lora.given)}:{lora.scale:g}" for lora in loras)
    module = flags["control"] or "none"
    settings = (
        f"Steps: {drawing.num_inference_steps}, Sampler: {sampler}, CFG scale: {drawing.guidance_scale:g}, "
        f"Seed: {drawing.seed}, Size: {image.width}x{image.height}, Model: {short(model)}"
        + (f", VAE: {short(vae)}" if vae else "")
        + (f", Denoising strength: {drawing.strength:g}" if flags["image"] else "")
        + (f', Lora: "{listed}"' if len(loras) > 1 else f", Lora: {listed}" if loras else "")
        + (f", Clip skip: {drawing.clip_skip + 1}" if drawing.clip_skip else "")
    )
    if flags["controlnet"]:
        held = f"Module: {module}, Model: {short(flags['controlnet'])}, Weight: {drawing.controlnet_scale:g}"
        settings += f', ControlNet 0: "{held}"'
    negative = f"Negative prompt: {drawing.negative_prompt}\n" if drawing.negative_prompt else ""
    repeat = json.dumps(repeat_of(drawing, source, drawn.batch))
    return {"parameters": f"{drawing.prompt}\n{negative}{settings}", **chunks, "repeat": repeat}


def read_repeat(path):
    """What `repeat_of` put into a PNG; refuses a picture without it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = {**image.info}
    except Exception as error:  # Pillow's plugins raise what they like on broken files
        fail(f"--from_png {path} can't be read: {getattr(error, 'strerror', None) or 'it is no picture'}.")
    if "command" in text:
        fail(f"--from_png {path} is a sheet of pictures, which was drawn by: {text['command']}")
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        repeat = json.loads(text["repeat"])
        flags = {k: [str(word) for word in words] for k, words in repeat["flags"].items() if k in REPEATED}
        size, place = map(int, repeat["batch"])
        if 0 <= place < size:
            return {
                "flags": flags,
                "batch": (size, place),
                "sha256": dict(repeat["sha256"]),
                "machine": dict(repeat["machine"]),
            }
    return fail(f"--from_png {path} does not say how to draw it again: only pictures that infer.py drew do.")


def tell_differences(path, stored, now):
    """Notes what keeps a picture from being drawn again exactly; both are as `repeat_of` has it."""
    names = stored["machine"].keys() | now["machine"].keys()
    other = [
        f"{name} {stored['machine'].get(name, 'no')} (here {now['machine'].get(name, 'no')})"
        for name in sorted(names)
        if stored["machine"].get(name) != now["machine"].get(name)
    ]
    if other:
        note(f"{path} was drawn with {', '.join(other)}: the picture may differ from it")
    for name, hashes in now["sha256"].items():
        if stored["sha256"].get(name, []) != hashes:
            note(f"--{name} is not what {path} was drawn with (its SHA-256 differs): the picture will differ from it")


def save_png(image, path, chunks):
    """Writes the picture and returns its path: `-1`, `-2`, ... is added where another picture has the name."""
    from PIL.PngImagePlugin import PngInfo

    info, data = PngInfo(), io.BytesIO()
    for key, value in chunks.items():
        info.add_text(key, "" if value is None else str(value))
    image.save(data, "PNG", pnginfo=info)
    candidates = itertools.chain([path], (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1)))
    path = next(file for file in candidates if not file.exists() or file.read_bytes() == data.getvalue())
    path.write_bytes(data.getvalue())
    return path


def font_for(texts, size):
    """Pillow's own font, which has ASCII alone, or one that may have the rest."""
    from PIL import ImageFont

    if not all(text.isascii() for text in texts):
        for name in ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf", "arial.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def label(text, note, font, width):
    """The text in at most four lines of that many pixels, and the note below."""
    chars = max(6, 4 * width // font.size)
    while True:
        lines = textwrap.wrap(text, chars, max_lines=4, placeholder=" ...")
        if chars <= 5 or max(map(font.getlength, lines), default=0) <= width:
            return "\n".join(filter(None, [*lines, note]))
        chars -= 1


def layout(rows, columns, images, title="", given=(), heading=""):
    """One sheet of a grid of pictures, in bands of eight columns; `images` are row by row.

    `rows` and `columns` are labels (text, note); the text is wrapped, the note has a line of its own. Above the grid stand
    its heading, above that pictures that were `given` [(label, picture)], and the title above all.
    """
    from PIL import Image, ImageDraw, ImageOps

    per_band = math.ceil(len(columns) / math.ceil(len(columns) / COLUMNS))
    size, room = images[0].size, 512 if per_band <= 4 else 256
    # Small pictures grow by a whole factor to about 256 pixels, large ones shrink to what the sheet has room for.
    factor = 256 // max(size) if max(size) <= 128 else min(1.0, room / max(size))
    width, height = (round(side * factor) for side in size)
    em = max(17, per_band * width // 80)  # legible where a page shrinks a wide sheet to its own width
    font, large = font_for(sum(columns, ()), em), font_for([*sum(rows, ()), title, heading], em + em // 4)
    margin, gap = 2 * em, em // 2
    sides, tops = ([label(*each, f, width) for each in labels] for labels, f in ((rows, large), (columns, font)))
    gutter = 2 * margin + max(round(large.getlength(line)) for text in sides for line in text.split("\n"))
    # A strip is its heading, the labels of its columns, and its rows: each a label and its pictures.
    strips, heading = [], heading if given else ", ".join(filter(None, [title, heading]))
    if given:
        strips.append(
            (title, [label(text, "", font, width) for text, _ in given], [("", [each for _, each in given])])
        )
    for first in range(0, len(columns), per_band):
        end = min(per_band, len(columns) - first)
        lines = [(side, images[i : i + end]) for side, i in zip(sides, range(first, len(images), len(columns)))]
        strips.append(("" if first else heading, tops[first : first + end], lines))
    sheet_width = gutter + max(per_band, len(given)) * (width + gap) - gap + margin
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heads = []  # of the strips: the heading in lines, and the height of all above the pictures
    for text, labels, _ in strips:
        text = text and label(text, "", large, sheet_width - 2 * margin)
        above = round(draw.textbbox((0, 0), text, large)[3]) + em if text else 0
        heads.append((text, above + max(round(draw.textbbox((0, 0), each, font)[3]) for each in labels) + gap))
    tall = sum(head + len(lines) * (height + gap) - gap + margin for (_, head), (*_, lines) in zip(heads, strips))
    sheet, top = Image.new("RGB", (sheet_width, margin + tall), "white"), margin
    draw = ImageDraw.Draw(sheet)
    for (text, head), (_, labels, lines) in zip(heads, strips):
        draw.text((margin, top), text, "black", large)
        top += head
        for left, each in zip(itertools.count(gutter, width + gap), labels):
            draw.text((left, top - gap), each, "black", font, anchor="ld")
        for side, pictures in lines:
            draw.text((margin, top + height // 2), side, "black", large, anchor="lm")
            for left, picture in zip(itertools.count(gutter, width + gap), pictures):
                sheet.paste(
                    ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, color="white"), (left, top)
                )
            top += height + gap
        top += margin - gap
    return sheet


def stacked(sheets):
    """Sheets below each other."""
    from PIL import Image

    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def sheets_of(grid, drawings, images, given):
    """Yields (name of the file, sheet, its drawings) of a grid, whose pictures lie in the order of the drawings."""
    per_band = len(grid.rows) * len(grid.columns)
    per_sheet = per_band * len(grid.bands)
    for i, cell in enumerate(grid.sheets):
        shown = drawings[i * per_sheet : (i + 1) * per_sheet]

        def labels(cells, step, shown=shown):
            return [(each.label, each.note.format(seed=shown[k * step].seed)) for k, each in enumerate(cells)]

        rows, columns, parts = labels(grid.rows, len(grid.columns)), labels(grid.columns, 1), []
        for k, band in enumerate(grid.bands):
            start = i * per_sheet + k * per_band
            above = ("", ()) if k else (", ".join(filter(None, labels([cell], 0)[0])), given)
            parts.append(layout(rows, columns, images[start : start + per_band], *above, band.label))
        seed = f"seed{shown[0].seed}" if cell.nth else None
        stem = "-".join(filter(None, [grid.name, cell.changes.get("stem"), seed])) + cell.suffix
        yield f"{grid.name if len(grid.sheets) == 1 else stem}.png", stacked(parts), shown


# The run.


class Job(NamedTuple):
    """What a run is to do, as far as it can be known before a model is loaded."""

    model: Model
    loras: tuple[Lora, ...]  # those of --lora, then the checkpoints of a grid
    controlnet: dict | None  # its config.json
    pictures: dict  # {"image" or "control_image": picture}
    grid: Grid
    drawings: list[Drawing]
    training: dict  # {setting of TRAINING: value}


def check_axes(axes, prompts, loras, given):
    """Refuses options behind prompts that need a flag which is not `given`, and strengths that no LoRA would take."""
    loras = [*loras, *(cell.changes["checkpoint"] for cell in axes.get("checkpoint", ()))]
    given = given | {"lora" for lora in loras if lora}
    for cell in axes.get("prompt", prompt_cells(prompts)):
        for field in cell.options:
            if SETTINGS[field].needs and SETTINGS[field].needs not in given:
                fail(f"--{field} behind the prompt {cell.label!r} needs --{SETTINGS[field].needs}.")
    if "lora_scale" in axes and all(lora is None or lora.fixed for lora in loras):
        fail("--grid lora_scale: each LoRA has a strength of its own. Leave the :STRENGTH of one out.")


def grid_of(args, prompts, loras):
    """The `Grid` of the flags."""
    strengths = (args.strength or [STRENGTH]) if args.image else []
    seeds = range(args.seed, args.seed + args.num_images)
    by_flags = {"prompt": prompt_cells(prompts), "seed": axis_cells("seed", seeds)}
    axes = read_grid(args.grid or (), by_flags | {"strength": axis_cells("strength", strengths)}, args.lora_scale)
    check_axes(axes, prompts, loras, {name for name, value in vars(args).items() if value is not None})
    compared = row_label(loras) if args.compare_base else None
    return arrange(axes, prompts, args.num_images, strengths, compared)


def find_job(args):
    """The `Job` of the flags; refuses what can't be drawn, in seconds and without torch."""
    check_outputs(args.output_dir, args.save_merged)
    prompts = read_prompts("--prompt", args.prompt or [])
    model = find_model(args.pretrained_model_name_or_path, args.single_file_config, args.revision, args.variant)
    loras = tuple(find_lora(given, args.lora_scale, f"lora{i}") for i, given in enumerate(args.lora or ()))
    controlnet = find_controlnet(args.controlnet) if args.controlnet else None
    if controlnet:
        check_controlnet_fits(args.controlnet, controlnet, model.unet_config)
    files = {name: getattr(args, name) for name in ("image", "control_image")}
    pictures = {name: read_image(f"--{name}", path) for name, path in files.items() if path}
    grid = grid_of(args, prompts, loras)
    own = ("seed", "lora_scale", "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler")
    like = Drawing(
        **{name: getattr(args, name) for name in (*own, "height", "width", "controlnet_scale")}, loras=loras
    )
    drawings = plan(like._replace(strength=(args.strength or [STRENGTH])[0] if args.image else None), grid)
    loras += tuple(
        {drawing.checkpoint.adapter: drawing.checkpoint for drawing in drawings if drawing.checkpoint}.values()
    )
    awkward = [drawing.scheduler for drawing in drawings if drawing.scheduler in NO_ZERO_SNR]
    flags = {"clip_skip": args.clip_skip, "vae": args.vae}
    training, notes = settle(loras, model, awkward[0] if awkward else args.scheduler, flags)
    clip_skip, vae = training["clip_skip"] or 0, training["vae"]
    if model.shapes:
        check_fits(model.shapes, loras, clip_skip, vae and vae_channels(vae))
    for line in notes:
        note(line)
    drawings = [drawing._replace(clip_skip=clip_skip) for drawing in drawings]
    return Job(model, loras, controlnet, pictures, grid, drawings, training)


def open_studio(args, job, device, dtype):
    """Loads what the job needs: the `Studio` that draws it."""
    translated = {lora.adapter: translate(lora, job.model.shapes) for lora in job.loras if not stock_reads(lora)}
    parts = ["image to image" * (args.image is not None), "ControlNet" * (args.controlnet is not None)]
    mode, clip_skip = ", ".join(filter(None, parts)) or "text to image", job.training["clip_skip"] or 0
    pipe = load_pipeline(job.model, job.training["vae"], dtype, mode, args.controlnet)
    if job.controlnet:
        check_controlnet_fits(args.controlnet, job.controlnet, pipe.unet.config, pipe.vae_scale_factor)
    if clip_skip and job.model.family == "sd" and not hasattr(pipe.text_encoder, "text_model"):
        fail("clip skip: diffusers can't do it with transformers 5.6 or later. Install 5.5.4, or pass --clip_skip 0.")
    load_loras(pipe, job.loras, translated, clip_skip)
    place(pipe, device, args.offload, args.compile)
    call = PIPELINES[mode][1]
    return Studio(pipe, call, pipe.scheduler, job.training, **job.pictures, canny=args.control == "canny")


def source_of(args, vae, dtype, device):
    """The `Source` of the run's pictures."""
    import torch

    names = ("revision", "variant", "single_file_config", "controlnet", "image", "control_image", "control")
    flags = {MODEL_FLAG[2:]: args.pretrained_model_name_or_path, "vae": vae}
    flags |= {name: getattr(args, name) for name in names}
    precision = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}[str(dtype).removeprefix("torch.")]
    flags |= {"mixed_precision": precision, "num_cpu_threads": torch.get_num_threads() if device == "cpu" else None}
    return Source(flags, machine_of(device, args.compile))


def sized(drawings, studio):
    """The drawings with their sizes: the model's own, or the shape of the given picture, unless flags say otherwise."""
    side, picture = studio.pipe.unet.config.sample_size, studio.image or studio.control_image
    own = [s * studio.pipe.vae_scale_factor for s in ((side, side) if isinstance(side, int) else side)]
    sizes = [size_of(drawing, own, picture and picture.size) for drawing in drawings]
    return [drawing._replace(height=h, width=w) for drawing, (h, w) in zip(drawings, sizes)]


def tell_cut_prompts(pipe, drawings):
    """Notes which prompts are longer than CLIP reads."""
    limit = pipe.tokenizer.model_max_length
    for prompt in dict.fromkeys(drawing.prompt for drawing in drawings):
        if (tokens := len(pipe.tokenizer(prompt).input_ids)) > limit:
            note(f"CLIP reads {limit} of the {tokens} tokens, the end is cut: {prompt}")


def as_stored(args, drawings, source):
    """(drawings, number of the one to keep, batch size) that draw the picture of --from_png again.

    What is drawn at once decides the last bits: so copies fill the batch that the picture was drawn in.
    """
    stored = read_repeat(args.from_png)
    now = repeat_of(drawings[0], source, stored["batch"])
    tell_differences(args.from_png, stored, now)
    size, place = stored["batch"]
    alike = all(now["flags"].get(name) == stored["flags"].get(name) for name in (*SETTINGS, "clip_skip"))
    if args.grid or len(drawings) > 1 or not alike or args.batch_size not in (None, size):
        return drawings, range(len(drawings)), args.batch_size or BATCH_SIZE
    return [drawings[0]._replace(stem=args.from_png.stem)] * size, [place], size


def save_drawn(args, studio, drawings, source):
    """Draws and writes the pictures, as they are done; returns {number of the drawing: (path, picture)}."""
    saved, kept, batch_size = {}, range(len(drawings)), args.batch_size or BATCH_SIZE
    if args.from_png:
        drawings, kept, batch_size = as_stored(args, drawings, source)
    for drawn in draw(studio, drawings, batch_size):
        if drawn.index in kept:
            drawing = drawings[drawn.index]
            path = args.output_dir / f"{drawing.stem}.png"
            saved[drawn.index] = save_png(drawn.image, path, describe(drawing, drawn, source)), drawn.image
    names = [saved[i][0].name for i in sorted(saved)]
    print(
        f"{args.output_dir}: " + (f"{len(names)} pictures, {names[0]} to {names[-1]}" if len(names) > 1 else names[0])
    )
    if studio.canny:
        edges = fitted(studio, drawings[0].width, drawings[0].height)["control_image"]
        print(f"{save_png(edges, args.output_dir / 'edges.png', {})}: what the ControlNet held to")
    return saved


def save_sheets(args, argv, grid, drawings, images, given):
    """Writes the sheets of a grid, each with the command that drew it; `given` is what the pictures start from."""
    what = "base above LoRA" if args.compare_base else "the grid"
    for name, sheet, shown in sheets_of(grid, drawings, images, given):
        chunks = {"prompt": " | ".join(dict.fromkeys(drawing.prompt for drawing in shown))}
        chunks |= {MODEL_FLAG[2:]: args.pretrained_model_name_or_path, "command": shlex.join(["infer.py", *argv])}
        print(f"{save_png(sheet, args.output_dir / name, chunks)}: {what}")


def main(argv=None):
    try:
        run([*(sys.argv[1:] if argv is None else argv)])
    except InputError as error:
        fail(error)


def run(argv):
    args = parse_args(argv)
    job = find_job(args)
    device, dtype = choose_device(args.device, args.mixed_precision or ("no" if args.save_merged else None))
    if device == "cpu":
        set_num_threads(args.num_cpu_threads)
    studio = open_studio(args, job, device, dtype)
    if not job.training["long_prompts"]:
        tell_cut_prompts(studio.pipe, job.drawings)
    if job.drawings:
        try:
            args.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--output_dir {args.output_dir} can't be made: {error.strerror}. Name another folder.")
        drawings = sized(job.drawings, studio)
        saved = save_drawn(args, studio, drawings, source_of(args, job.training["vae"], dtype, device))
        if job.grid.name:
            given = fitted(studio, drawings[0].width, drawings[0].height)
            names = {"image": args.image, "control_image": args.control_image or args.image}
            given = [(names[name].name, picture) for name, picture in given.items() if picture]
            images = [saved[i][1] for i in range(len(drawings))]
            save_sheets(args, argv, job.grid, drawings, images, given)
    if args.save_merged:
        save_merged(studio, job, job.loras[: len(args.lora)], args.save_merged)
        print(f"{args.save_merged}: the base model with the LoRA{'s' * (len(args.lora) > 1)} merged into it")


if __name__ == "__main__":
    # Not to be found: diffusers and peft would import it wherever it is installed, which takes a second.
    sys.modules.setdefault("bitsandbytes", None)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None

#!/usr/bin/env python
"""Text to image with a LoRA file, or without one; `--compare_base` draws both and lays them side by side.

    python infer.py --pretrained_model_name_or_path models/mini-sd --lora outputs/axe --prompt "a red axe" --compare_base

Nothing of this project is imported: stock diffusers reading our file is the proof that the file is right.
"""

import argparse
import difflib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import warnings
import zipfile
from pathlib import Path


WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# flag: (diffusers class, what differs from the model's own settings, name in A1111's "parameters")
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}, "DDIM"),
    "ddpm": ("DDPMScheduler", {}, "DDPM"),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
    "euler": ("EulerDiscreteScheduler", {}, "Euler"),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "heun": ("HeunDiscreteScheduler", {}, "Heun"),
    "dpm++": ("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
    "unipc": ("UniPCMultistepScheduler", {}, "UniPC"),
    "lcm": ("LCMScheduler", {}, "LCM"),
}
BATCH_SIZE = 4  # pictures drawn at once: more gain little speed and cost the memory of small GPUs
COLUMNS = 8  # of a comparison sheet, before it goes on in a further band


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"infer.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Errors take one line, and an unknown flag names the nearest known one."""

    def error(self, message):
        fail(message)

    def parse_args(self, argv):
        known = list(self._option_string_actions)
        for flag in (word.split("=")[0] for word in argv if re.match(r"--[a-z]", word)):
            if flag not in known:
                nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0)[0]
                fail(f"unknown flag {flag}. Did you mean {nearest}? --help lists them all.")
        return super().parse_args(argv)


class HelpFormatter(argparse.HelpFormatter):
    """Shows the defaults that the help text does not put into words."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, argparse.SUPPRESS) else f"{action.help} (%(default)s)"


# fmt: off
def parse_args(argv):
    parser = Parser(prog="infer.py", description="Text to image with a LoRA file.", allow_abbrev=False, formatter_class=lambda prog: HelpFormatter(prog, max_help_position=36, width=119))
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="MODEL", help="the base model: a local folder, a hub id, or a .safetensors/.ckpt file")
    add("--single_file_config", type=Path, metavar="FOLDER", help="a pipeline folder with the configuration of such a file, where the hub is out of reach")
    add("--revision", help="branch, tag or commit of the hub model (default: main)")
    add("--variant", help="which weight files to take, such as fp16 (default: the plain ones)")
    add("--lora", help=f"a folder with {WEIGHT_NAME}, a .safetensors file, or a hub id (default: none, the base draws)")
    add("--lora_scale", type=float, default=1.0, help="strength of the LoRA: 0 is the base, 1 is as trained")
    add = parser.add_argument_group("pictures").add_argument
    add("--prompt", nargs="+", required=True, help="what to draw: one or several prompts, or a .txt file with one a line")
    add("--negative_prompt", help="what to keep out of the pictures (default: nothing)")
    add("--num_images", type=int, default=1, help="pictures per prompt")
    add("--seed", type=int, default=0, help="picture i of each prompt is drawn from seed + i, on any device")
    add("--num_inference_steps", type=int, default=30, help="denoising steps: more take longer and add detail")
    add("--guidance_scale", type=float, default=7.5, help="how strictly the prompt is followed; up to 1 turns guidance off")
    add("--height", type=int, help="in pixels, a multiple of 8 (default: what the model was trained at)")
    add("--width", type=int, help="likewise")
    add("--scheduler", choices=SCHEDULERS, help="sampler (default: the model's own)")
    add("--clip_skip", type=int, help="last text-encoder layers to leave out; A1111 counts one more (default: none)")
    add = parser.add_argument_group("machine").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="(default: on CUDA bf16 where the GPU has it, else fp16; elsewhere no)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("outputs"), help="where the pictures go; none there is overwritten")
    add("--compare_base", action="store_true", help="draw without the LoRA too, and lay both out in comparison.png")
    return parser.parse_args(argv)
# fmt: on


def check_args(args):
    """Refuses flags that can't work, before anything is imported, loaded or written."""
    for name in ("num_images", "num_inference_steps", "height", "width"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: it must be 1 or more.")
    for name in ("height", "width"):
        if (getattr(args, name) or 0) % 8:
            value = getattr(args, name)
            fail(f"--{name} {value} is not a multiple of 8. Take {max(value // 8, 1) * 8} or {value // 8 * 8 + 8}.")
    for name in ("lora_scale", "guidance_scale"):
        if not math.isfinite(getattr(args, name)):
            fail(f"--{name} {getattr(args, name)}: it must be a finite number.")
    if args.clip_skip is not None and args.clip_skip < 0:
        fail(f"--clip_skip {args.clip_skip}: it must be 0 or more.")
    if args.lora is None and (args.compare_base or args.lora_scale != 1.0):
        fail(f"{'--compare_base' if args.compare_base else '--lora_scale'} needs --lora.")
    existing = next(folder for folder in (args.output_dir, *args.output_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        fail(f"--output_dir {args.output_dir}: can't write into {existing}. Name another folder.")


def read_prompts(values):
    """The prompts as given; a value that ends in .txt stands for the lines of that file."""
    prompts = []
    for value in values:
        if not value.lower().endswith(".txt"):
            prompts.append(value)
            continue
        try:
            lines = [line.strip() for line in Path(value).read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--prompt {value} can't be read ({getattr(error, 'strerror', None) or 'it is not UTF-8 text'}).")
        if not any(lines):
            fail(f"--prompt {value} is empty. Write one prompt a line.")
        prompts += filter(None, lines)
    return prompts


def hub_file(flag, repo_id, filename, revision=None):
    """The local path of a file of a hub repository, downloaded where it is not cached yet."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo_id) or repo_id.endswith((".safetensors", ".ckpt")):
        fail(f"{flag} {repo_id} does not exist. Check the path (relative ones start from {Path.cwd()}).")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision, local_files_only=True))
    except HFValidationError as error:
        fail(f"{flag} {repo_id}: {error}")
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(repo_id, revision=revision, timeout=5)  # unlike a download, it does not retry for 23 s
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    except EntryNotFoundError:
        fail(f"{flag} {repo_id}: that hub repository has no {filename}.")
    except Exception as error:  # httpx, hub and offline errors share no base class
        reason = str(error).strip().splitlines()[0]
        fail(f"{flag} {repo_id} is neither a folder or file here nor to be had from the hub ({reason})")


def tensor_shapes(flag, path):
    """{key: shape} from the header of a safetensors file; a file cut short does not pass."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        fail(f"{flag} {path} is not a whole safetensors file ({error}). Copy or download it again.")


def find_model(args):
    """The pipeline class by name, and the shapes of the weights of a local folder ({} where they aren't known yet)."""
    flag, path = "--pretrained_model_name_or_path", Path(args.pretrained_model_name_or_path)
    index = path / "model_index.json"
    if path.is_file():
        if path.suffix not in (".safetensors", ".ckpt"):
            fail(f"{flag} {path}: a single file must be .safetensors or .ckpt.")
        if path.suffix == ".ckpt" and not zipfile.is_zipfile(path):
            fail(f"{flag} {path} is not a whole torch checkpoint. Copy or download it again.")
        keys = tensor_shapes(flag, path) if path.suffix == ".safetensors" else ["model.diffusion_model."]
        if not any(key.startswith("model.diffusion_model.") for key in keys):
            fail(f"{flag} {path} is not a whole Stable Diffusion model. Is it a LoRA? Then pass it as --lora.")
        if args.single_file_config is None:
            return PIPELINES[any(key.startswith("conditioner.") for key in keys)], {}
        flag, index = "--single_file_config", args.single_file_config / "model_index.json"
    elif args.single_file_config is not None:
        fail(f"--single_file_config is for a .safetensors or .ckpt file, and {path} is none.")
    elif not path.is_dir():
        index = hub_file(flag, args.pretrained_model_name_or_path, "model_index.json", args.revision)
    try:
        class_name = json.loads(index.read_text())["_class_name"]
    except (OSError, ValueError, KeyError):
        fail(f"{flag} {index.parent} holds no readable model_index.json. Pass the folder of a whole pipeline.")
    if class_name not in PIPELINES:
        fail(f"{flag} {index.parent} is a {class_name}; this script knows {' and '.join(PIPELINES)}.")
    shapes = {
        component: {key: shape for file in files for key, shape in tensor_shapes(flag, file).items()}
        for component in ("unet", "text_encoder", "text_encoder_2")
        if path.is_dir() and (files := sorted((path / component).glob("*.safetensors")))
    }
    return class_name, shapes


def find_lora(lora):
    """The path of the LoRA file and the shapes in it; refuses what is no LoRA."""
    path = Path(lora)
    if path.is_dir():
        others = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:3])
        path = path / WEIGHT_NAME
        if not path.exists():
            fail(f"--lora {lora} holds no {WEIGHT_NAME}. " + (f"Pass the file ({others})." if others else "Train one."))
    elif not path.is_file():
        path = hub_file("--lora", lora, WEIGHT_NAME)
    if path.suffix != ".safetensors":
        fail(f"--lora {path}: only .safetensors files are read, since others can carry code.")
    shapes = tensor_shapes("--lora", path)
    if not any("lora" in key for key in shapes):
        fail(f"--lora {path} is not a LoRA file: none of its {len(shapes)} keys has 'lora' in its name.")
    if not any(key.startswith(("unet.", "text_encoder", "lora_unet_", "lora_te")) for key in shapes):
        fail(f"--lora {path} is not for Stable Diffusion: its keys start like '{next(iter(shapes))}'.")
    return path, shapes


def check_lora_fits(path, lora_shapes, model_shapes):
    """Refuses a LoRA with keys that name no layer of the model, or one of another size."""
    # Block names of the original code (SDXL files of kohya) are left to diffusers, which knows how to convert them.
    pattern = re.compile(
        r"(?:(unet|text_encoder(?:_2)?)\.|lora_(unet|te[12]?)_(?!input_blocks|middle_block|output_blocks))"
        r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)\.weight"
    )
    components = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
    # One spelling for all: kohya has _ for the dots, and transformers 5.6 dropped the level "text_model".
    weights = {
        (component, key.removesuffix(".weight").replace(".", "_").removeprefix("text_model_")): shape
        for component, shapes in model_shapes.items()
        for key, shape in shapes.items()
    }
    # The half of a pair that is missing would be drawn at random by transformers.
    partners = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
    partners |= {up: down for down, up in partners.items()}
    unmatched = []
    for key, shape in lora_shapes.items():
        if match := pattern.fullmatch(key):
            component = match[1] or components.get(match[2], match[2])
            weight = weights.get((component, match[3].replace(".", "_").removeprefix("text_model_")))
            axis = 1 if match[4] in ("lora_A", "lora_down", "lora.down") else 0
            paired = f"{key[: match.start(4)]}{partners[match[4]]}.weight" in lora_shapes
            if not paired or weight is None or len(shape) < 2 or shape[axis] != weight[axis]:
                unmatched.append(key)
    if unmatched:
        counts = f"{len(unmatched)} of its {len(lora_shapes)} keys match no layer of that size, such as {unmatched[0]}"
        fail(f"--lora {path} does not fit this base model: {counts}. Pass the base model that it was trained on.")


def quiet_libraries():
    """No library chatter: called before the libraries are imported, since some of it is printed then."""
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning about forks
    logging.getLogger("xformers").setLevel(logging.ERROR)  # "can't load C++/CUDA extensions" beside a CPU torch
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # "No module named 'kernels'", which is optional
    # NaN pictures: told below, in words
    warnings.filterwarnings("ignore", "invalid value encountered in cast", RuntimeWarning)


class Inert:
    """Stands for a class that a .ckpt names and that drawing does not need; does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def inert_globals(path):
    """(stub, name) pairs that let `weights_only` read what Lightning left in a .ckpt; refuses any other code."""
    import torch

    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    harmless = re.compile(r"(pytorch_lightning|lightning)\..+|numpy\.(_?core\.multiarray\.scalar|dtype)")
    if refused := sorted(name for name in names if not harmless.fullmatch(name)):
        fail(f"{path} carries more than weights ({', '.join(refused[:3])}). Get the model as .safetensors.")
    return [(Inert, name) for name in names]


def load_pipeline(args, class_name, device, dtype):
    """The stock pipeline on its device, without the safety checker, with the scheduler that was asked for."""
    import diffusers
    import torch
    import transformers

    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # the one name that 0.39 knows
    for library in (diffusers, transformers):  # again, for a process that imported them before
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    model, pipeline_class = args.pretrained_model_name_or_path, getattr(diffusers, class_name)
    options = {"torch_dtype": dtype}
    if class_name == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    stubs = inert_globals(model) if model.endswith(".ckpt") else []
    try:
        if Path(model).is_file():
            if args.single_file_config is not None:
                options["config"] = str(args.single_file_config)
            with torch.serialization.safe_globals(stubs):  # diffusers reads a .ckpt with weights_only=True
                pipe = pipeline_class.from_single_file(model, **options)
        else:
            pipe = pipeline_class.from_pretrained(model, revision=args.revision, variant=args.variant, **options)
    except Exception as error:  # the loaders raise nearly anything for a folder or file that is not in order
        remedy = "" if args.single_file_config or Path(model).is_dir() else " With no hub, pass --single_file_config."
        fail(f"{model} can't be loaded: {type(error).__name__}: {str(error).strip().splitlines()[0]}{remedy}")
    if args.scheduler:
        name, changes, _ = SCHEDULERS[args.scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)
    layers = pipe.text_encoder.config.num_hidden_layers
    if (args.clip_skip or 0) >= layers:
        fail(f"--clip_skip {args.clip_skip}: the text encoder has {layers} layers. Take {layers - 1} at most.")
    pipe.vae.enable_slicing()  # one picture of a batch at a time: the decoder takes more memory than the UNet
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_lora(pipe, path, shapes, scale):
    """Adds the LoRA to the pipeline; what diffusers would only warn about is an error here."""
    components = {name: getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    components = {name: module.state_dict() for name, module in components.items() if module is not None}
    check_lora_fits(path, shapes, {name: {k: v.shape for k, v in module.items()} for name, module in components.items()})
    complaints = []
    collector = logging.Handler()
    collector.emit = lambda record: complaints.append(record.getMessage())
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [(library, library.handlers, library.level) for library in libraries]
    for library in libraries:
        library.handlers = [collector]
        library.setLevel(logging.WARNING)
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
    except Exception as error:
        complaints.append(f"{type(error).__name__}: {error}")
    finally:
        for library, library.handlers, level in before:
            library.setLevel(level)
    complaints = [text for text in complaints if not text.startswith("No LoRA keys associated to")]
    if complaints:
        fail(f"--lora {path} can't be used whole: {complaints[0][:300]}")
    pipe.set_adapters("lora", adapter_weights=scale)


def describe(args, pipe, prompt, seed, image, with_lora):
    """The text chunks of a PNG: one per parameter, and all of them in the form that A1111 and its readers know."""
    import diffusers

    sampler = type(pipe.scheduler).__name__
    chunks = {
        "prompt": prompt,
        "negative_prompt": args.negative_prompt or "",
        "seed": seed,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "scheduler": sampler,
        "width": image.width,
        "height": image.height,
        "clip_skip": args.clip_skip or 0,
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "lora": args.lora if with_lora else "",
        "lora_scale": args.lora_scale if with_lora else 0.0,
        "diffusers_version": diffusers.__version__,
    }
    for name, changes, label in SCHEDULERS.values():
        if name == type(pipe.scheduler).__name__ and all(pipe.scheduler.config[k] == v for k, v in changes.items()):
            sampler = label
    model, lora = (
        Path(name or "").absolute().name.removesuffix(".safetensors").removesuffix(".ckpt").replace(",", " ")
        for name in (args.pretrained_model_name_or_path, args.lora)
    )
    settings = {
        "Steps": args.num_inference_steps,
        "Sampler": sampler,
        "CFG scale": args.guidance_scale,
        "Seed": seed,
        "Size": f"{image.width}x{image.height}",
        "Model": model,
        "Lora": f"{lora}:{args.lora_scale:g}" if with_lora else None,
        "Clip skip": args.clip_skip + 1 if args.clip_skip else None,
        "Version": f"diffusers {diffusers.__version__}",
    }
    negative = f"\nNegative prompt: {args.negative_prompt}" if args.negative_prompt else ""
    line = ", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None)
    return {"parameters": f"{prompt}{negative}\n{line}"} | chunks


def save_png(image, path, chunks):
    """Writes the picture and returns its path: `-1`, `-2`, ... is added where another picture has the name."""
    from PIL.PngImagePlugin import PngInfo

    info, data = PngInfo(), io.BytesIO()
    for key, value in chunks.items():
        info.add_text(key, str(value))
    image.save(data, "PNG", pnginfo=info)
    for candidate in itertools.chain([path], (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1))):
        try:
            with open(candidate, "xb") as file:
                file.write(data.getvalue())
            return candidate
        except FileExistsError:
            if candidate.is_file() and candidate.read_bytes() == data.getvalue():
                return candidate  # the same command again: the picture is there


def wrap(text, font, width, max_lines=4):
    """Lines of at most `width` pixels; the last ends in an ellipsis where the text goes on."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = len(lines) > max_lines
    lines = lines[:max_lines]
    for i, line in enumerate(lines):
        ellipsis = "…" if font.getlength(line) > width or (cut and i == max_lines - 1) else ""
        while line and font.getlength(line + ellipsis) > width:
            line = line[:-1].rstrip()
        lines[i] = line + ellipsis
    return lines


def comparison_sheet(columns, scale=1.0):
    """Base above, LoRA below: a column for each (label, note, base picture, LoRA picture), in bands of eight."""
    from PIL import Image, ImageDraw, ImageFont

    per_band = min(len(columns), COLUMNS)
    target = 256 if per_band > 4 else 512
    size = columns[0][2].size
    # Small pictures grow by a whole factor to about 256 pixels, large ones shrink to what the sheet has room for.
    factor = 256 // max(size) if max(size) <= 128 else min(1.0, target / max(size))
    width, height = (round(side * factor) for side in size)
    em = 17 if width <= 320 else 22
    font, bold = ImageFont.load_default(em), ImageFont.load_default(em + 4)
    margin, gap, leading = 2 * em, em // 2, round(em * 1.35)
    rows = [("base", ""), ("with LoRA", "" if scale == 1.0 else f"scale {scale:g}")]
    gutter = round(bold.getlength("with LoRA")) + margin
    labels = [(wrap(label, font, width), note) for label, note, _, _ in columns]

    bands = [range(i, min(i + per_band, len(columns))) for i in range(0, len(columns), per_band)]
    heads = [max(len(labels[i][0]) + bool(labels[i][1]) for i in band) * leading + gap for band in bands]
    band_height = 2 * height + gap
    sheet = Image.new(
        "RGB",
        (
            2 * margin + gutter + per_band * (width + gap) - gap,
            2 * margin + sum(heads) + len(bands) * band_height + (len(bands) - 1) * margin,
        ),
        "white",
    )
    draw, top = ImageDraw.Draw(sheet), margin
    for band, head in zip(bands, heads):
        for row, (name, note) in enumerate(rows):
            middle = top + head + row * (height + gap) + height // 2
            draw.text((margin, middle), name, "black", bold, anchor="lm")
            draw.text((margin, middle + leading), note, "dimgray", font, anchor="lm")
        for place, i in enumerate(band):
            left = margin + gutter + place * (width + gap)
            lines, note = labels[i]
            lines = [(line, "black") for line in lines] + [(note, "dimgray")] * bool(note)
            for line, (text, colour) in enumerate(reversed(lines)):
                draw.text((left, top + head - gap - line * leading), text, colour, font, anchor="ld")
            for row, image in enumerate(columns[i][2:]):
                tile = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
                sheet.paste(tile, (left, top + head + row * (height + gap)))
        top += head + band_height + margin
    return sheet


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    check_args(args)
    prompts = read_prompts(args.prompt)
    class_name, model_shapes = find_model(args)
    lora_path, lora_shapes = find_lora(args.lora) if args.lora else (None, {})
    if model_shapes:
        check_lora_fits(lora_path, lora_shapes, model_shapes)

    quiet_libraries()
    import torch
    from tqdm import tqdm

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device} can't be used here: {str(error).splitlines()[0]}")
    # A T4 only emulates bf16, slowly, so it counts as a GPU without it.
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = args.mixed_precision or ("bf16" if bf16 else "fp16" if device.startswith("cuda") else "no")
    if precision == "fp16" and device == "cpu":
        fail("--mixed_precision fp16 needs a GPU. Leave it out, or take bf16.")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    pipe = load_pipeline(args, class_name, device, dtype)
    if args.lora:
        load_lora(pipe, lora_path, lora_shapes, args.lora_scale)
    for prompt in prompts:
        tokens = len(pipe.tokenizer(prompt, truncation=False).input_ids)
        if tokens > pipe.tokenizer.model_max_length:
            print(f"note: {tokens} tokens, but CLIP reads {pipe.tokenizer.model_max_length}: the end is cut: {prompt}")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output_dir {args.output_dir} can't be made: {error.strerror}. Name another folder.")

    pipe.scheduler.set_timesteps(args.num_inference_steps)
    passes = len(prompts) * math.ceil(args.num_images / BATCH_SIZE) * (1 + args.compare_base)
    bar = tqdm(total=passes * len(pipe.scheduler.timesteps), unit="step", disable=None)

    def advance(pipe, step, timestep, tensors):
        bar.update()
        return tensors

    def draw(prompt, seeds):
        return pipe(
            prompt,
            negative_prompt=args.negative_prompt,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            height=args.height,
            width=args.width,
            clip_skip=args.clip_skip,
            callback_on_step_end=advance,
        ).images

    saved, columns = [], []
    digits = max(2, len(str(len(prompts) - 1)))
    for number, prompt in enumerate(prompts):
        slug = re.sub(r"\W+", "-", prompt.lower())[:60].strip("-_") or "picture"
        seeds = range(args.seed, args.seed + args.num_images)
        for batch in (seeds[i : i + BATCH_SIZE] for i in range(0, len(seeds), BATCH_SIZE)):
            drawn = {}
            for kind in ("base", "lora") if args.compare_base else ("lora",):
                if args.compare_base:
                    pipe.enable_lora() if kind == "lora" else pipe.disable_lora()
                drawn[kind] = draw(prompt, batch)
                for seed, image in zip(batch, drawn[kind]):
                    suffix = "-base" if kind == "base" else ""
                    path = args.output_dir / f"{number:0{digits}d}-{slug}-seed{seed}{suffix}.png"
                    chunks = describe(args, pipe, prompt, seed, image, bool(args.lora) and kind == "lora")
                    saved.append(save_png(image, path, chunks))
                    if not image.getbbox():
                        print(f"note: {saved[-1]} is all black. With fp16, try --mixed_precision no.")
            if args.compare_base:
                notes = [f"seed {seed}" if args.num_images > 1 else "" for seed in batch]
                columns += zip([prompt] * len(batch), notes, drawn["base"], drawn["lora"])
    bar.close()
    print(f"{len(saved)} picture{'s' * (len(saved) > 1)} in {args.output_dir}: {saved[0].name}" + (" ..." * (len(saved) > 1)))
    if args.compare_base:
        sheet = comparison_sheet(columns, args.lora_scale)
        chunks = describe(args, pipe, " | ".join(prompts), args.seed, columns[0][3], True)
        print(f"comparison: {save_png(sheet, args.output_dir / 'comparison.png', chunks)}")


if __name__ == "__main__":
    main()

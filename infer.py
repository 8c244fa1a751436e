#!/usr/bin/env python
"""Text to image with a LoRA file, or without one; `--compare_base` draws both and lays them out in one sheet.

    python infer.py --pretrained_model_name_or_path models/mini-sd --lora outputs/axe --prompt "a red axe"

Nothing of this project is imported: stock diffusers reading our file is the proof that the file is right.
"""

import argparse
import contextlib
import difflib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path


MODEL_FLAG, WEIGHT_NAME = "--pretrained_model_name_or_path", "pytorch_lora_weights.safetensors"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # those that a LoRA can change
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# flag: (diffusers class, what differs from the model's own settings, name in A1111)
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, "DDIM"),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, "DDPM"),
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


# fmt: off
def parse_args(argv):
    """Errors take one line, and an unknown flag names the nearest known one."""
    def add(flag, help, default=None, **options):
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, default=default, help=help + shown, **options)

    parser = argparse.ArgumentParser(prog="infer.py", description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=119))
    parser.error = fail
    group = parser.add_argument_group("model")
    add(MODEL_FLAG, "base model: local folder, hub id, .safetensors or .ckpt file", required=True, metavar="MODEL")
    add("--single_file_config", "pipeline folder that configures such a file offline", type=Path, metavar="FOLDER")
    add("--revision", "branch, tag or commit of the hub model (default: main)")
    add("--variant", "weight files to take, such as fp16 (default: the plain ones)")
    add("--lora", f"folder with {WEIGHT_NAME}, .safetensors file or hub id (default: none)")
    add("--lora_scale", "strength of the LoRA: 0 is the base, 1 is as trained", 1.0, type=float)
    group = parser.add_argument_group("pictures")
    add("--prompt", "what to draw: one prompt, several, or a .txt file with one a line", nargs="+", required=True)
    add("--negative_prompt", "what to keep out of the pictures (default: nothing)")
    add("--num_images", "pictures per prompt", 1, type=int)
    add("--seed", "picture i of each prompt is drawn from seed + i, alike on any device", 0, type=int)
    add("--num_inference_steps", "denoising steps: more take longer and add detail", 30, type=int)
    add("--guidance_scale", "how strictly the prompt is followed; 1 and less: no guidance", 7.5, type=float)
    add("--height", "in pixels, a multiple of 8 (default: the model's own)", type=int)
    add("--width", "in pixels, a multiple of 8 (default: the model's own)", type=int)
    add("--scheduler", "sampler (default: the model's own, dpm++ instead of pndm)", choices=SCHEDULERS)
    add("--clip_skip", "last text-encoder layers to leave out; A1111 counts one more", 0, type=int)
    group = parser.add_argument_group("machine")
    add("--mixed_precision", "(default: no; on CUDA bf16, or fp16 without it)", choices=["no", "fp16", "bf16"])
    add("--device", "cpu, cuda, cuda:1, mps, or auto for the fastest there is", "auto")
    group = parser.add_argument_group("output")
    add("--output_dir", "where the pictures go; others there are not overwritten", Path("outputs"), type=Path)
    group.add_argument("--compare_base", action="store_true", help="draw both: base above LoRA in comparison.png")
    known = list(parser._option_string_actions)
    for flag in (word.split("=")[0] for word in argv if re.match(r"--\w", word)):
        if flag not in known:
            fail(f"unknown flag {flag}. Did you mean {difflib.get_close_matches(flag, known, 1, cutoff=0)[0]}?")
    return parser.parse_args(argv)
# fmt: on


def check_args(args):
    """Refuses flags that can't work, before anything is loaded or written."""
    for name, least in dict(num_images=1, num_inference_steps=1, height=8, width=8, clip_skip=0).items():
        value = getattr(args, name)
        if value is not None and (value < least or (least == 8 and value % 8)):
            fail(f"--{name} {value}: it must be {'a multiple of 8' if least == 8 else f'{least} or more'}.")
    if not math.isfinite(args.lora_scale) or not math.isfinite(args.guidance_scale):
        fail("--lora_scale and --guidance_scale must be finite numbers.")
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
            lines = [line.strip() for line in Path(value).read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--prompt {value} can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}.")
        prompts += lines or fail(f"--prompt {value} is empty. Write one prompt a line.")
    return prompts


def hub_file(flag, repo_id, filename, revision=None):
    """The local path of a file of a hub repository, downloaded where it is not cached yet."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo_id) or repo_id.endswith((".safetensors", ".ckpt")):
        fail(f"{flag} {repo_id} does not exist. Check the path (relative ones start from {Path.cwd()}).")
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(repo_id, filename, revision=revision)
        if not isinstance(cached, str):
            HfApi().model_info(repo_id, revision=revision, timeout=5)  # a download would retry for 23 s
        return Path(hf_hub_download(repo_id, filename, revision=revision, local_files_only=isinstance(cached, str)))
    except Exception as error:  # those of httpx and of the hub share no base class
        fail(f"{flag} {repo_id} is no file or folder here, and the hub does not give it: {str(error).strip()[:200]}")


def tensor_shapes(flag, path):
    """{key: shape} from the header of a safetensors file; a file cut short does not pass."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        fail(f"{flag} {path} is not a whole safetensors file ({error}). Copy or download it again.")


def find_model(args):
    """The pipeline class, and {"unet.conv_in.weight": shape} of a local folder ({} where that takes loading)."""
    flag, path = MODEL_FLAG, Path(args.pretrained_model_name_or_path)
    folder = path
    if path.is_file():
        if path.suffix not in (".safetensors", ".ckpt"):
            fail(f"{flag} {path}: a single file must be .safetensors or .ckpt.")
        if args.single_file_config is None:
            keys = tensor_shapes(flag, path) if path.suffix == ".safetensors" else ()
            return PIPELINES[any(key.startswith("conditioner.") for key in keys)], {}
        flag, folder = "--single_file_config", args.single_file_config
    elif not path.is_dir():
        folder = hub_file(flag, args.pretrained_model_name_or_path, "model_index.json", args.revision).parent
    try:
        class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError):
        fail(f"{flag} {folder} holds no readable model_index.json. Pass the folder of a whole pipeline.")
    if class_name not in PIPELINES:
        fail(f"{flag} {folder} is a {class_name}; this script draws with {' and '.join(PIPELINES)}.")
    files = [sorted(path.glob(f"{part}/*.safetensors")) for part in COMPONENTS if (path / part).is_dir()]
    shapes = {f"{file.parent.name}.{k}": v for file in sum(files, []) for k, v in tensor_shapes(flag, file).items()}
    return class_name, shapes if all(files) else {}


def find_lora(lora):
    """The path of the LoRA file and the shapes in it; refuses what is no LoRA."""
    path = Path(lora)
    if path.is_dir():
        found = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:3]) or "no LoRA files"
        path = path / WEIGHT_NAME
        if not path.exists():
            fail(f"--lora {lora} holds no {WEIGHT_NAME} (there are: {found}). Pass the LoRA file itself.")
    elif not path.is_file():
        path = hub_file("--lora", lora, WEIGHT_NAME)
    if path.suffix != ".safetensors":
        fail(f"--lora {path}: only .safetensors files are read, since others can carry code.")
    shapes = tensor_shapes("--lora", path)
    if not any("lora" in key for key in shapes):
        fail(f"--lora {path} is not a LoRA file: none of its {len(shapes)} keys has 'lora' in its name.")
    if any(key.endswith(".dora_scale") for key in shapes):
        fail(f"--lora {path} is a DoRA in kohya's format, of which diffusers leaves a part out. Convert it first.")
    return path, shapes


def check_lora_fits(path, lora_shapes, model_shapes):
    """Refuses a LoRA with a key that names no layer of the model, or one of another size, or half of a pair."""

    def one_spelling(name):  # kohya has _ for dots and te for text_encoder; transformers 5.6 dropped text_model
        name = re.sub("^lora_te1?_", "text_encoder_", name.replace(".", "_"))
        return re.sub("^lora_te2_", "text_encoder_2_", name).removeprefix("lora_").replace("text_model_", "")

    weights = {one_spelling(key.removesuffix(".weight")): shape for key, shape in model_shapes.items()}
    partner = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
    partner |= {up: down for down, up in partner.items()}
    # The block names of the original code (kohya's SDXL files) are left to diffusers, which converts them.
    pattern = re.compile(rf"(?!lora_unet_(?:input|middle|output)_block)(.+)\.({'|'.join(partner)})\.weight")
    unmatched = []
    for match in filter(None, map(pattern.fullmatch, lora_shapes)):
        shape, weight = lora_shapes[match[0]], weights.get(one_spelling(match[1]))
        axis = 1 if match[2] in ("lora_A", "lora_down", "lora.down") else 0
        if not weight or shape[axis] != weight[axis] or f"{match[1]}.{partner[match[2]]}.weight" not in lora_shapes:
            unmatched.append(match[0])  # transformers fills the missing half of a pair at random
    if unmatched:
        count = f"{len(unmatched)} of its {len(lora_shapes)} keys match no layer there, such as {unmatched[0]}"
        fail(f"--lora {path} does not fit this base model: {count}. Pass the base that it was trained on.")


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


def load_pipeline(args, class_name, device, dtype):
    """The stock pipeline on its device, without the safety checker, with the scheduler that was asked for."""
    import diffusers
    import torch
    import transformers

    # The one name that diffusers 0.39 knows; 0.42 knows `dtype` too.
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    for library in (diffusers, transformers):  # again, for a process that had imported them before
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    model, pipeline_class, options = args.pretrained_model_name_or_path, getattr(diffusers, class_name), {}
    if class_name == "StableDiffusionPipeline":
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        if Path(model).is_file():
            config = args.single_file_config and str(args.single_file_config)
            # diffusers reads a .ckpt with weights_only=True
            with torch.serialization.safe_globals(inert_globals(model) if model.endswith(".ckpt") else []):
                pipe = pipeline_class.from_single_file(model, config=config, torch_dtype=dtype, **options)
        else:
            options |= {"revision": args.revision, "variant": args.variant}
            pipe = pipeline_class.from_pretrained(model, torch_dtype=dtype, **options)
    except Exception as error:  # the loaders raise nearly anything for files that are not in order
        remedy = " Where there is no hub, pass --single_file_config." if Path(model).is_file() else ""
        fail(f"{model} can't be loaded: {type(error).__name__}: {str(error)[:300]}{remedy}")
    # PNDM, which Stable Diffusion v1.x comes with, overshoots at strong guidance in so few steps.
    chosen = args.scheduler or ("dpm++" if type(pipe.scheduler) is diffusers.PNDMScheduler else None)
    if chosen:
        name, changes, _ = SCHEDULERS[chosen]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)
    layers = pipe.text_encoder.config.num_hidden_layers
    if args.clip_skip >= layers:
        fail(f"--clip_skip {args.clip_skip}: the text encoder has {layers} layers. Take {layers - 1} at most.")
    if args.clip_skip and class_name == PIPELINES[0] and not hasattr(pipe.text_encoder, "text_model"):
        fail("--clip_skip: diffusers can't do it with transformers 5.6 or later. Install transformers 5.5.4.")
    pipe.vae.enable_slicing()  # one picture of a batch at a time: the decoder takes more memory than the UNet
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_lora(pipe, path, lora_shapes, scale):
    """Adds the LoRA at its strength, and makes sure that every weight of the file found its place."""
    models = {name: pipe.components[name] for name in COMPONENTS if pipe.components.get(name)}
    model_shapes = {f"{name}.{k}": v.shape for name, model in models.items() for k, v in model.state_dict().items()}
    check_lora_fits(path, lora_shapes, model_shapes)
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
        pipe.set_adapters("lora", adapter_weights=scale)
    except Exception as error:  # what peft, diffusers and transformers raise for sizes and names that don't match
        fail(f"--lora {path} does not fit this base model: {type(error).__name__}: {str(error)[:300]}")
    # What the check leaves to diffusers: there, and in transformers, a weight without a place is only warned of.
    in_file = sum(key.endswith(".weight") and "lora_magnitude" not in key for key in lora_shapes)
    names = [name for model in models.values() for name, _ in model.named_parameters() if name.endswith("weight")]
    placed = sum(".lora_A." in name or ".lora_B." in name for name in names)
    if placed != in_file:
        fail(f"--lora {path} does not fit this base model: {in_file} weights in the file, {placed} in the model.")


def describe(args, pipe, prompt, seed, image, with_lora):
    """The text chunks of a PNG: one a parameter, and all of them in the form that A1111 and its readers know."""
    import diffusers

    config, sampler = pipe.scheduler.config, type(pipe.scheduler).__name__
    names = ["negative_prompt", "num_inference_steps", "guidance_scale", "clip_skip", "pretrained_model_name_or_path"]
    chunks = {name: getattr(args, name) for name in names + ["lora", "lora_scale"] * with_lora}
    chunks |= {"prompt": prompt, "seed": seed, "width": image.width, "height": image.height}
    chunks |= {"scheduler": sampler, "diffusers_version": diffusers.__version__}
    for name, changes, label in SCHEDULERS.values():
        if name == chunks["scheduler"] and all(config.get(key) == value for key, value in changes.items()):
            sampler = label
    model, lora = (
        re.sub(r"\.(safetensors|ckpt)$", "", Path(path).absolute().name).replace(",", " ")
        for path in (args.pretrained_model_name_or_path, args.lora or "")
    )
    settings = (
        f"Steps: {args.num_inference_steps}, Sampler: {sampler}, CFG scale: {args.guidance_scale:g}, Seed: {seed}, "
        f"Size: {image.width}x{image.height}, Model: {model}"
        + f", Lora: {lora}:{args.lora_scale:g}" * with_lora
        + (f", Clip skip: {args.clip_skip + 1}" if args.clip_skip else "")
    )
    negative = f"Negative prompt: {args.negative_prompt}\n" if args.negative_prompt else ""
    return {"parameters": f"{prompt}\n{negative}{settings}"} | chunks


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


def comparison_sheet(columns, scale=1.0):
    """Base above LoRA: one column for each (prompt, note, base picture, LoRA picture), in bands of eight."""
    from PIL import Image, ImageDraw, ImageFont

    def label(prompt, note):
        chars = 4 * width // em
        while True:
            lines = textwrap.wrap(prompt, chars, max_lines=4, placeholder=" ...")
            if chars <= 5 or max(map(font.getlength, lines), default=0) <= width:
                return "\n".join(filter(None, [*lines, note]))
            chars -= 1

    per_band = math.ceil(len(columns) / math.ceil(len(columns) / COLUMNS))
    size, room = columns[0][2].size, 512 if per_band <= 4 else 256
    # Small pictures grow by a whole factor to about 256 pixels, large ones shrink to what the sheet has room for.
    factor = 256 // max(size) if max(size) <= 128 else min(1.0, room / max(size))
    width, height = (round(side * factor) for side in size)
    em = max(17, per_band * width // 80)  # legible where a page shrinks a wide sheet to its own width
    font, large = ImageFont.load_default(em), ImageFont.load_default(em + em // 4)
    if not all(prompt.isascii() for prompt, *_ in columns):  # Pillow's own font has no more than that
        for name in ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf", "arial.ttf"):
            with contextlib.suppress(OSError):
                font = ImageFont.truetype(name, em)
                break
    margin, gap = 2 * em, em // 2
    rows = ("base", "with LoRA" if scale == 1.0 else f"with LoRA\nat {scale:g}")
    gutter = margin + round(large.getlength("with LoRA")) + margin
    labels = [label(prompt, note) for prompt, note, *_ in columns]
    bands = [range(i, min(i + per_band, len(columns))) for i in range(0, len(columns), per_band)]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heads = [max(round(draw.textbbox((0, 0), labels[i], font)[3]) for i in band) + gap for band in bands]
    sheet_size = (
        gutter + per_band * (width + gap) - gap + margin,
        margin + sum(heads) + len(bands) * (2 * height + gap + margin),
    )
    sheet = Image.new("RGB", sheet_size, "white")
    draw, top = ImageDraw.Draw(sheet), margin
    for band, head in zip(bands, heads):
        top += head
        for row, name in enumerate(rows):
            draw.text((margin, top + row * (height + gap) + height // 2), name, "black", large, anchor="lm")
        for left, i in zip(itertools.count(gutter, width + gap), band):
            draw.text((left, top - gap), labels[i], "black", font, anchor="ld")
            for row, image in enumerate(columns[i][2:]):
                tile = image.resize((width, height), Image.Resampling.LANCZOS)
                sheet.paste(tile, (left, top + row * (height + gap)))
        top += 2 * height + gap + margin
    return sheet


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    check_args(args)
    prompts = read_prompts(args.prompt)
    class_name, model_shapes = find_model(args)
    lora_path, lora_shapes = find_lora(args.lora) if args.lora else (None, {})
    if model_shapes:
        check_lora_fits(lora_path, lora_shapes, model_shapes)

    # The libraries chatter while they are imported.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    logging.getLogger("xformers").setLevel(logging.ERROR)  # "can't load C++/CUDA extensions" beside a CPU torch
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # "No module named 'kernels'", which is optional
    import torch
    from tqdm import tqdm

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device} can't be used here: {str(error).splitlines()[0]}")
    # A T4 says that it has bf16 and emulates it, slowly.
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = args.mixed_precision or ("bf16" if bf16 else "fp16" if device.startswith("cuda") else "no")
    if precision == "fp16" and device == "cpu":
        fail("--mixed_precision fp16 needs a GPU. Leave it out, or take bf16.")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    pipe = load_pipeline(args, class_name, device, dtype)
    if args.lora:
        load_lora(pipe, lora_path, lora_shapes, args.lora_scale)
    limit = pipe.tokenizer.model_max_length
    for prompt in prompts:
        if (tokens := len(pipe.tokenizer(prompt).input_ids)) > limit:
            print(f"note: CLIP reads {limit} of the {tokens} tokens, the end is cut: {prompt}", file=sys.stderr)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output_dir {args.output_dir} can't be made: {error.strerror}. Name another folder.")

    pipe.scheduler.set_timesteps(args.num_inference_steps)
    calls = len(prompts) * math.ceil(args.num_images / BATCH_SIZE) * (1 + args.compare_base)
    bar = tqdm(total=calls * len(pipe.scheduler.timesteps), unit="step", disable=None)
    options = {name: getattr(args, name) for name in ("negative_prompt", "num_inference_steps", "guidance_scale")}
    options["clip_skip"] = args.clip_skip or None
    size = pipe.unet.config.sample_size
    for name, side in zip(("height", "width"), (size, size) if isinstance(size, int) else size):
        options[name] = getattr(args, name) or side * pipe.vae_scale_factor  # one alone would be ignored in silence

    def advance(pipe, step, timestep, tensors):
        bar.update()
        return tensors

    saved, columns, digits = [], [], max(2, len(str(len(prompts) - 1)))
    for number, prompt in enumerate(prompts):
        stem = f"{number:0{digits}d}-" + (re.sub(r"\W+", "-", prompt.lower())[:60].strip("-") or "picture")
        seeds = range(args.seed, args.seed + args.num_images)
        for batch in (seeds[i : i + BATCH_SIZE] for i in range(0, len(seeds), BATCH_SIZE)):
            drawn = []
            for with_lora in (False, True) if args.compare_base else (bool(args.lora),):
                if args.compare_base:
                    pipe.enable_lora() if with_lora else pipe.disable_lora()
                # Drawn on the CPU, a seed's noise is the same on any device.
                generators = [torch.Generator("cpu").manual_seed(seed) for seed in batch]
                options |= {"num_images_per_prompt": len(batch), "generator": generators}
                drawn.append(pipe(prompt, callback_on_step_end=advance, **options).images)
                for seed, image in zip(batch, drawn[-1]):
                    ending = "-base" if args.compare_base and not with_lora else ""
                    path = args.output_dir / f"{stem}-seed{seed}{ending}.png"
                    saved.append(save_png(image, path, describe(args, pipe, prompt, seed, image, with_lora)))
            columns += zip([prompt] * len(batch), (f"seed {seed}" * (len(seeds) > 1) for seed in batch), *drawn)
    bar.close()
    if args.compare_base:
        sheet = comparison_sheet(columns, args.lora_scale)
        chunks = describe(args, pipe, " | ".join(prompts), args.seed, columns[0][3], True)
        sheet_path = save_png(sheet, args.output_dir / "comparison.png", chunks)
    pictures = f"{len(saved)} pictures, {saved[0].name} to {saved[-1].name}" if len(saved) > 1 else saved[0].name
    print(f"{args.output_dir}: {pictures}")
    if args.compare_base:
        print(f"{sheet_path}: base above LoRA")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None

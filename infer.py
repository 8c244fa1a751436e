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
#     "optuna==5.0.0",
#     "filelock==4.2.11",
#     "psutil==7.2.2",
#     'bitsandbytes==0.50.2; platform_machine == "x86_64" or platform_machine == "AMD64" or platform_machine == "aarch64" or (sys_platform == "darwin" and platform_machine == "arm64")',
#     'xformers==0.0.35; (sys_platform == "linux" and platform_machine == "x86_64") or sys_platform == "win32"',
# ]
# ///
"""Text to image with LoRA files, or without any; `--compare_base` draws both and lays them out in one sheet.

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
from typing import NamedTuple


MODEL_FLAG, WEIGHT_NAME = "--pretrained_model_name_or_path", "pytorch_lora_weights.safetensors"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # those that a LoRA can change
# (family, mode): diffusers class
PIPELINES = {
    ("sd", "text to image"): "StableDiffusionPipeline",
    ("sdxl", "text to image"): "StableDiffusionXLPipeline",
}
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
NO_ZERO_SNR = ("pndm", "heun")  # samplers that diffusers can't start at zero signal
BATCH_SIZE = 4  # pictures drawn at once: more gain little speed and cost the memory of small GPUs
COLUMNS = 8  # of a sheet, before it goes on in a further band


class Model(NamedTuple):
    """A base model that was found, and what its files tell before it is loaded; {} and None where they don't."""

    source: str  # folder, hub id or single file
    single_file_config: Path | None
    revision: str | None
    variant: str | None
    family: str
    shapes: dict  # {"unet.conv_in.weight": shape}
    prediction_type: str | None


class Lora(NamedTuple):
    """A LoRA file, and the strength it is drawn with."""

    given: str  # on the command line, less the strength
    path: Path
    scale: float
    adapter: str  # its name in the pipeline
    shapes: dict  # {key: shape}
    header: dict  # strings


class Drawing(NamedTuple):
    """A picture to draw: the name of its file, and all that may differ from one picture to the next."""

    stem: str = ""
    prompt: str = ""
    seed: int = 0
    loras: tuple[Lora, ...] = ()
    negative_prompt: str | None = None
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    clip_skip: int = 0
    height: int = 512
    width: int = 512


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"infer.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def note(message):
    print(f"note: {message}", file=sys.stderr)


def number(kind, least=-math.inf, multiple_of=None):
    """An argparse type: a finite number with a lower bound."""
    wish = f"a whole number, a multiple of {multiple_of}" if multiple_of else f"a whole number, {least} or more"

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and value >= least and not (multiple_of and value % multiple_of):
                return value
        raise argparse.ArgumentTypeError(f"{text}: it must be {wish if kind is int else 'a finite number'}.")

    return parse


# fmt: off
def parse_args(argv):
    """Errors take one line, and an unknown flag names the nearest known one."""
    def add(flag, help, default=None, **options):
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, default=default, help=help + shown, **options)

    parser = argparse.ArgumentParser(prog="infer.py", description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=119))
    parser.error = fail
    count, pixels = number(int, least=1), number(int, least=8, multiple_of=8)
    group = parser.add_argument_group("model")
    add(MODEL_FLAG, "base model: local folder, hub id, .safetensors or .ckpt file", required=True, metavar="MODEL")
    add("--single_file_config", "pipeline folder that configures a single-file base model offline", type=Path, metavar="FOLDER")
    add("--revision", "branch, tag or commit of the hub's base model (default: main)")
    add("--variant", "weight files of the base model to take, such as fp16 (default: the plain ones)")
    add("--vae", "VAE in place of the base model's: folder, hub id or single file (default: what the LoRA was trained with)", metavar="MODEL")
    add("--lora", f"LoRA, or several that add up, each as PATH or PATH:STRENGTH: folder with {WEIGHT_NAME}, .safetensors file or hub id (default: none)", nargs="+", action="extend")
    add("--lora_scale", "strength of each LoRA that is given without one: 0 is the base, 1 is as trained", 1.0, type=number(float))
    group = parser.add_argument_group("pictures")
    add("--prompt", "what to draw: one prompt, several, or a .txt file with one a line", nargs="+", required=True)
    add("--negative_prompt", "what to keep out of the pictures (default: nothing)")
    add("--num_images", "pictures per prompt", 1, type=count)
    add("--seed", "picture i of each prompt is drawn from seed + i, alike on any device", 0, type=int)
    add("--num_inference_steps", "denoising steps: more take longer and add detail", 30, type=count)
    add("--guidance_scale", "how strictly the prompt is followed; 1 and less: no guidance", 7.5, type=number(float))
    add("--height", "height of the pictures in pixels, a multiple of 8 (default: the model's own)", type=pixels)
    add("--width", "width of the pictures in pixels, a multiple of 8 (default: the model's own)", type=pixels)
    add("--scheduler", "sampler (default: the model's own, dpm++ instead of pndm; ddim for zero terminal SNR)", choices=SCHEDULERS)
    add("--clip_skip", "last text-encoder layers to leave out, A1111 counts one more (default: as the LoRA was trained, else 0)", type=number(int, least=0))
    group = parser.add_argument_group("machine")
    add("--mixed_precision", "number format of the models (default: no; on CUDA bf16, or fp16 without it)", choices=["no", "fp16", "bf16"])
    add("--device", "cpu, cuda, cuda:1, mps, or auto for the fastest there is", "auto")
    add("--num_cpu_threads", "threads for computing on a CPU (default: the physical cores, unless OMP_NUM_THREADS says otherwise)", type=count)
    group = parser.add_argument_group("output")
    add("--output_dir", "where the pictures go; others there are not overwritten", Path("outputs"), type=Path)
    group.add_argument("--compare_base", action="store_true", help="draw with and without the LoRA: base above LoRA in comparison.png")
    known = list(parser._option_string_actions)
    for flag in (word.split("=")[0] for word in argv if re.match(r"--\w", word)):
        if flag not in known:
            fail(f"unknown flag {flag}. Did you mean {difflib.get_close_matches(flag, known, 1, cutoff=0)[0]}?")
    args = parser.parse_args(argv)
    if args.lora is None and (args.compare_base or args.lora_scale != 1.0):
        fail(f"{'--compare_base' if args.compare_base else '--lora_scale'} needs --lora.")
    return args
# fmt: on


def check_writable(folder):
    """Refuses an output folder that can't be made or written into."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        fail(f"--output_dir {folder}: can't write into {existing}. Name another folder.")


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
            keys = read_safetensors(flag, path)[0] if path.suffix == ".safetensors" else ()
            family = "sdxl" if any(key.startswith("conditioner.") for key in keys) else "sd"
            return Model(source, None, revision, variant, family, {}, None)
        flag, folder = "--single_file_config", single_file_config
    elif not path.is_dir():
        folder = hub_file(flag, source, "model_index.json", revision).parent
        hub_file(flag, source, "scheduler/scheduler_config.json", revision, refuse=str)
    try:
        class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError):
        fail(f"{flag} {folder} holds no readable model_index.json. Pass the folder of a whole pipeline.")
    family = next((family for (family, _), name in PIPELINES.items() if name == class_name), None)
    if family is None:
        fail(f"{flag} {folder} is a {class_name}; this script draws with {' and '.join(PIPELINES.values())}.")
    prediction_type = None
    with contextlib.suppress(OSError, ValueError):  # the loader says what is wrong with it
        scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
    files = [sorted(path.glob(f"{part}/*.safetensors")) for part in COMPONENTS if (path / part).is_dir()]
    shapes = {}
    for file in sum(files, []):
        shapes |= {f"{file.parent.name}.{key}": shape for key, shape in read_safetensors(flag, file)[0].items()}
    return Model(source, single_file_config, revision, variant, family, shapes if all(files) else {}, prediction_type)


def find_lora(given, scale, adapter):
    """The `Lora` of PATH or PATH:STRENGTH; refuses what is no LoRA."""
    path, (head, _, tail) = Path(given), given.rpartition(":")
    if head and not path.exists():  # a path may hold a colon itself
        with contextlib.suppress(ValueError):
            scale, given, path = float(tail), head, Path(head)
    if not math.isfinite(scale):
        fail(f"--lora {given}:{scale}: the strength must be a finite number.")
    if path.is_dir():
        found = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:3]) or "no LoRA files"
        path = path / WEIGHT_NAME
        if not path.exists():
            fail(f"--lora {given} holds no {WEIGHT_NAME} (there are: {found}). Pass the LoRA file itself.")
    elif not path.is_file():
        path = hub_file("--lora", given, WEIGHT_NAME)
    if path.suffix != ".safetensors":
        fail(f"--lora {path}: only .safetensors files are read, since others can carry code.")
    shapes, header = read_safetensors("--lora", path)
    if not any("lora" in key for key in shapes):
        fail(f"--lora {path} is not a LoRA file: none of its {len(shapes)} keys has 'lora' in its name.")
    if any(key.endswith(".dora_scale") for key in shapes):
        fail(f"--lora {path} is a DoRA in kohya's format, of which diffusers leaves a part out. Convert it first.")
    return Lora(given, path, scale, adapter, shapes, header)


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
    own, decided = {"prediction_type": model.prediction_type}, {k: v for k, v in flags.items() if v is not None}
    trained, obstacles = training_of(loras, own, decided), {}
    if scheduler in NO_ZERO_SNR:
        obstacles["zero_snr"] = f"--scheduler {scheduler} can't. Leave it out, or take ddim."
    if model.family != "sd":
        obstacles |= {"long_prompts": "Stable Diffusion XL's prompts are cut.", "num_chunks": ""}
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


def load_pipeline(model, vae, dtype):
    """The stock pipeline of a `Model`, without the safety checker; `vae` is the source of another VAE, or None."""
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
    if model.family == "sd":
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options |= {"config": config} if is_file else {"revision": model.revision, "variant": model.variant}
    pipe = load_weights(getattr(diffusers, PIPELINES[model.family, "text to image"]), model.source, **options)
    pipe.vae.enable_slicing()  # one picture of a batch at a time: the decoder takes more memory than the UNet
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_scheduler(own, chosen, training):
    """The scheduler that was chosen, with the settings of the base model's own and of the training."""
    import diffusers

    # PNDM, which Stable Diffusion v1.x comes with, overshoots at strong guidance in so few steps.
    default = "ddim" if training["zero_snr"] else "dpm++" if type(own) is diffusers.PNDMScheduler else None
    name, changes, _ = SCHEDULERS.get(chosen or default, (type(own).__name__, {}, None))
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


def load_loras(pipe, loras, clip_skip):
    """Adds the LoRAs to the pipeline, and makes sure that every weight of their files found its place."""
    models = {name: pipe.components[name] for name in COMPONENTS if pipe.components.get(name)}
    shapes = {f"{name}.{k}": v.shape for name, model in models.items() for k, v in model.state_dict().items()}
    check_fits(shapes, loras, clip_skip, pipe.vae.config.latent_channels)
    warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # of the LoRA before
    for lora in loras:
        try:
            pipe.load_lora_weights(str(lora.path.parent), weight_name=lora.path.name, adapter_name=lora.adapter)
        except Exception as error:  # what peft, diffusers and transformers raise for sizes and names that don't match
            fail(f"--lora {lora.path} does not fit this base model: {type(error).__name__}: {str(error)[:300]}")
        # What the check leaves to diffusers: there, and in transformers, a weight without a place is only warned of.
        in_file = sum(key.endswith(".weight") and "lora_magnitude" not in key for key in lora.shapes)
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


def encode_chunks(pipe, token_ids, num_chunks, clip_skip):
    """Hidden states (1, 77 x num_chunks, D) of a prompt, each chunk with its start and end tokens, as A1111 has it."""
    import torch

    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    body, rows = tokenizer.model_max_length - 2, []
    for start in range(0, body * num_chunks, body):
        ids = [tokenizer.bos_token_id, *token_ids[start : start + body], tokenizer.eos_token_id]
        rows.append(ids + [tokenizer.pad_token_id] * (body + 2 - len(ids)))
    with torch.no_grad():
        output = encoder(torch.tensor(rows, device=encoder.device), output_hidden_states=True)
        hidden_states = output[0]
        if clip_skip:
            hidden_states = encoder.text_model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
    return hidden_states.reshape(1, -1, hidden_states.shape[-1])


def prompts_for(pipe, drawing, least_chunks):
    """What the pipeline is to read: the prompts, or their embeddings where they take more chunks than it reads.

    They are padded to `least_chunks` as in training, since the UNet attends to the padding too; 0: cut after the first.
    """
    if least_chunks:
        texts = (drawing.prompt, drawing.negative_prompt or "")
        prompt, negative = (pipe.tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        needed = math.ceil(max(len(prompt), len(negative)) / (pipe.tokenizer.model_max_length - 2))
        num_chunks = max(needed, least_chunks)
        if num_chunks > 1:
            return {
                "prompt_embeds": encode_chunks(pipe, prompt, num_chunks, drawing.clip_skip),
                # as in the pipeline, clip_skip is for the prompt alone
                "negative_prompt_embeds": encode_chunks(pipe, negative, num_chunks, 0),
            }
    clip_skip = drawing.clip_skip or None
    return {"prompt": drawing.prompt, "negative_prompt": drawing.negative_prompt, "clip_skip": clip_skip}


def draw(pipe, drawings, least_chunks=0):
    """Yields each drawing with its picture, in order; neighbours that differ in the seed alone are drawn at once.

    `least_chunks` is as in `prompts_for`.
    """
    import torch
    from tqdm import tqdm

    groups = [list(group) for _, group in itertools.groupby(drawings, lambda d: d._replace(stem="", seed=0))]
    batches = [group[i : i + BATCH_SIZE] for group in groups for i in range(0, len(group), BATCH_SIZE)]
    total = 0
    for batch in batches:
        pipe.scheduler.set_timesteps(batch[0].num_inference_steps)
        total += len(pipe.scheduler.timesteps)
    with tqdm(total=total, unit="step", disable=None) as bar:

        def advance(pipe, step, timestep, tensors):
            bar.update()
            return tensors

        for batch in batches:
            first = batch[0]
            set_loras(pipe, first.loras)
            options = {"num_inference_steps": first.num_inference_steps, "guidance_scale": first.guidance_scale}
            options |= {"height": first.height, "width": first.width}
            options |= prompts_for(pipe, first, least_chunks)
            # Drawn on the CPU, a seed's noise is the same on any device.
            options["generator"] = [torch.Generator("cpu").manual_seed(drawing.seed) for drawing in batch]
            images = pipe(num_images_per_prompt=len(batch), callback_on_step_end=advance, **options).images
            yield from zip(batch, images)


def describe(drawing, image, scheduler, *, model, vae):
    """The text chunks of a PNG: one a parameter, and all of them in the form that A1111 and its readers know."""
    import diffusers

    def short(path):
        return re.sub(r"\.(safetensors|ckpt|pt)$", "", Path(path).absolute().name).replace(",", " ")

    names = ["negative_prompt", "num_inference_steps", "guidance_scale", "clip_skip"]
    chunks = {name: getattr(drawing, name) for name in names} | {MODEL_FLAG[2:]: model} | ({"vae": vae} if vae else {})
    if drawing.loras:  # one a line
        chunks["lora"] = "\n".join(lora.given for lora in drawing.loras)
        chunks["lora_scale"] = "\n".join(str(lora.scale) for lora in drawing.loras)
    chunks |= {"prompt": drawing.prompt, "seed": drawing.seed, "width": image.width, "height": image.height}
    chunks |= {"scheduler": type(scheduler).__name__, "diffusers_version": diffusers.__version__}
    sampler = chunks["scheduler"]
    for name, changes, label in SCHEDULERS.values():
        if name == chunks["scheduler"] and all(scheduler.config.get(key) == value for key, value in changes.items()):
            sampler = label
    loras = ", ".join(f"{short(lora.given)}:{lora.scale:g}" for lora in drawing.loras)
    settings = (
        f"Steps: {drawing.num_inference_steps}, Sampler: {sampler}, CFG scale: {drawing.guidance_scale:g}, "
        f"Seed: {drawing.seed}, Size: {image.width}x{image.height}, Model: {short(model)}"
        + (f", VAE: {short(vae)}" if vae else "")
        + (f', Lora: "{loras}"' if len(drawing.loras) > 1 else f", Lora: {loras}" if loras else "")
        + (f", Clip skip: {drawing.clip_skip + 1}" if drawing.clip_skip else "")
    )
    negative = f"Negative prompt: {drawing.negative_prompt}\n" if drawing.negative_prompt else ""
    return {"parameters": f"{drawing.prompt}\n{negative}{settings}"} | chunks


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


def layout(rows, columns, images):
    """One sheet of a grid of pictures, in bands of eight columns; `images` are row by row.

    `rows` and `columns` are labels (text, note); the text is wrapped, the note has a line of its own.
    """
    from PIL import Image, ImageDraw

    per_band = math.ceil(len(columns) / math.ceil(len(columns) / COLUMNS))
    size, room = images[0].size, 512 if per_band <= 4 else 256
    # Small pictures grow by a whole factor to about 256 pixels, large ones shrink to what the sheet has room for.
    factor = 256 // max(size) if max(size) <= 128 else min(1.0, room / max(size))
    width, height = (round(side * factor) for side in size)
    em = max(17, per_band * width // 80)  # legible where a page shrinks a wide sheet to its own width
    font, large = font_for(sum(columns, ()), em), font_for(sum(rows, ()), em + em // 4)
    margin, gap = 2 * em, em // 2
    sides, tops = ([label(*each, f, width) for each in labels] for labels, f in ((rows, large), (columns, font)))
    gutter = 2 * margin + max(round(large.getlength(line)) for text in sides for line in text.split("\n"))
    bands = [range(i, min(i + per_band, len(columns))) for i in range(0, len(columns), per_band)]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heads = [max(round(draw.textbbox((0, 0), tops[i], font)[3]) for i in band) + gap for band in bands]
    sheet_size = (
        gutter + per_band * (width + gap) - gap + margin,
        margin + sum(heads) + len(bands) * (len(rows) * (height + gap) - gap + margin),
    )
    sheet = Image.new("RGB", sheet_size, "white")
    draw, top = ImageDraw.Draw(sheet), margin
    for band, head in zip(bands, heads):
        top += head
        for left, i in zip(itertools.count(gutter, width + gap), band):
            draw.text((left, top - gap), tops[i], "black", font, anchor="ld")
        for row, text in enumerate(sides):
            draw.text((margin, top + height // 2), text, "black", large, anchor="lm")
            for left, i in zip(itertools.count(gutter, width + gap), band):
                tile = images[row * len(columns) + i].resize((width, height), Image.Resampling.LANCZOS)
                sheet.paste(tile, (left, top))
            top += height + gap
        top += margin - gap
    return sheet


def row_label(loras):
    """(text, note) of a row of a sheet."""
    if not loras:
        return "base", ""
    scales = " and ".join(f"{lora.scale:g}" for lora in loras)
    return "with LoRA" + "s" * (len(loras) > 1), f"at {scales}" * any(lora.scale != 1 for lora in loras)


def plan(prompts, seeds, rows, like):
    """The drawings of a grid, row by row: each row's LoRAs with each prompt and each seed, the rest as `like`."""
    digits = max(2, len(str(len(prompts) - 1)))
    drawings = []
    for loras, (i, prompt), seed in itertools.product(rows, enumerate(prompts), seeds):
        slug = re.sub(r"\W+", "-", prompt.lower())[:60].strip("-") or "picture"
        ending = "" if loras or len(rows) == 1 else "-base"
        stem = f"{i:0{digits}d}-{slug}-seed{seed}{ending}"
        drawings.append(like._replace(stem=stem, prompt=prompt, seed=seed, loras=loras))
    return drawings


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    check_writable(args.output_dir)
    prompts = read_prompts(args.prompt)
    model = find_model(args.pretrained_model_name_or_path, args.single_file_config, args.revision, args.variant)
    loras = tuple(find_lora(given, args.lora_scale, f"lora{i}") for i, given in enumerate(args.lora or ()))
    training, notes = settle(loras, model, args.scheduler, {"clip_skip": args.clip_skip, "vae": args.vae})
    clip_skip, vae = training["clip_skip"] or 0, training["vae"]
    if model.shapes:
        check_fits(model.shapes, loras, clip_skip, vae and vae_channels(vae))
    for line in notes:
        note(line)

    device, dtype = choose_device(args.device, args.mixed_precision)
    if device == "cpu":
        set_num_threads(args.num_cpu_threads)
    pipe = load_pipeline(model, vae, dtype).to(device)
    if clip_skip and model.family == "sd" and not hasattr(pipe.text_encoder, "text_model"):
        fail("clip skip: diffusers can't do it with transformers 5.6 or later. Install 5.5.4, or pass --clip_skip 0.")
    pipe.scheduler = make_scheduler(pipe.scheduler, args.scheduler, training)
    load_loras(pipe, loras, clip_skip)
    limit = pipe.tokenizer.model_max_length
    for prompt in () if training["long_prompts"] else prompts:
        if (tokens := len(pipe.tokenizer(prompt).input_ids)) > limit:
            note(f"CLIP reads {limit} of the {tokens} tokens, the end is cut: {prompt}")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output_dir {args.output_dir} can't be made: {error.strerror}. Name another folder.")

    side = pipe.unet.config.sample_size  # one of --height and --width alone would be ignored in silence
    height, width = (s * pipe.vae_scale_factor for s in ((side, side) if isinstance(side, int) else side))
    like = Drawing(
        negative_prompt=args.negative_prompt, num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale, clip_skip=clip_skip, height=args.height or height, width=args.width or width,
    )  # fmt: skip
    seeds, rows = range(args.seed, args.seed + args.num_images), [(), loras] if args.compare_base else [loras]
    drawings = plan(prompts, seeds, rows, like)
    saved, images, source = [], [], dict(model=model.source, vae=vae)
    least_chunks = (training["num_chunks"] or 1) if training["long_prompts"] else 0
    for drawing, image in draw(pipe, drawings, least_chunks):
        chunks = describe(drawing, image, pipe.scheduler, **source)
        saved.append(save_png(image, args.output_dir / f"{drawing.stem}.png", chunks))
        images.append(image)
    pictures = f"{len(saved)} pictures, {saved[0].name} to {saved[-1].name}" if len(saved) > 1 else saved[0].name
    print(f"{args.output_dir}: {pictures}")
    if args.compare_base:
        columns = [(prompt, f"seed {seed}" * (len(seeds) > 1)) for prompt in prompts for seed in seeds]
        sheet = layout([row_label(row) for row in rows], columns, images)
        chunks = describe(
            drawings[-1]._replace(prompt=" | ".join(prompts), seed=args.seed), images[-1], pipe.scheduler, **source
        )
        print(f"{save_png(sheet, args.output_dir / 'comparison.png', chunks)}: base above LoRA")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None

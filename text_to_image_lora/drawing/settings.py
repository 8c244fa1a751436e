"""The flags of `infer.py`: groups of fields with their checks. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..command_line import flag, flag_values, iterate_flags, user_path
from ..errors import InputError
from ..libraries import MOST_CPU_THREADS
from ..models.samplers import SAMPLERS
from .rows import AXES, MOST_BATCH, SETTINGS, number, sampler_name


BATCH_SIZE = 4  # larger batches are only a little faster and may not fit into the memory of small GPUs
STRENGTH = 0.8  # default of image to image
COUNT = number(int, least=1, most=100_000)


# fmt: off
@dataclass(frozen=True)
class Model:
    """The base model, its VAE, LoRAs and ControlNet."""

    title: ClassVar = "model"
    pretrained_model_name_or_path: str | None = flag(None, "base model: local folder, hub id, .safetensors or .ckpt file", user_path, metavar="MODEL")
    single_file_config: Path | None = flag(None, "diffusers folder with the configuration of a base model that is a single file (default: downloaded from the hub)", Path, metavar="FOLDER")
    revision: str | None = flag(None, "branch, tag or commit of the base model on the hub (default: main)")
    variant: str | None = flag(None, "variant of the base model's weight files, such as fp16 (default: the files without a variant)")
    vae: str | None = flag(None, "VAE to use instead of that of the base model: folder, hub id or single file (default: the VAE that the LoRA was trained with)", user_path, metavar="MODEL")
    lora: tuple[str, ...] | None = flag(None, "one or several LoRAs, which are added up, each written as PATH or PATH:STRENGTH; PATH is a .safetensors file, a folder with pytorch_lora_weights.safetensors or in the format of peft, or a hub id (default: none)", user_path, nargs="+", action="extend")
    lora_scale: float = flag(1.0, "strength of each LoRA that is written without one: 0 draws with the base model alone, 1 applies the LoRA as it was trained", SETTINGS["lora_scale"].parse, recorded=False)
    controlnet: str | None = flag(None, "ControlNet that is conditioned on --control_image: folder or hub id", user_path, metavar="MODEL")

    def check(self, settings: Any) -> None:
        if self.pretrained_model_name_or_path is None:
            raise InputError("--pretrained_model_name_or_path is missing. Pass the base model, or --from_png with a picture to draw again.")


@dataclass(frozen=True)
class Pictures:
    """Prompts and sampling settings."""

    title: ClassVar = "pictures"
    prompt: tuple[str, ...] | None = flag(None, "what to draw: one or several prompts, or a .txt file with one prompt per line; options may follow each prompt: a red axe --seed 3 --width 768 --negative blurry (also --steps, --guidance, --scheduler, --strength, --lora_scale, and kohya's --n --w --h --d --l --s)", nargs="+")
    negative_prompt: str | None = flag(None, "negative prompt: what the pictures should not show (default: none)")
    num_images: int = flag(1, "number of pictures per prompt", COUNT, recorded=False)
    seed: int = flag(0, "seed of the first picture of each prompt; the next ones use seed + 1, seed + 2 and so on. The initial noise is the same on every device", SETTINGS["seed"].parse)
    num_inference_steps: int = flag(30, "number of denoising steps: more steps take longer and add detail", SETTINGS["num_inference_steps"].parse)
    guidance_scale: float = flag(7.5, "classifier-free guidance scale: higher values follow the prompt more closely; values of 1 or less disable guidance", SETTINGS["guidance_scale"].parse)
    height: int | None = flag(None, "height of the pictures in pixels, a multiple of 8 (default: the model's; with --image or --control_image, the model's area at the aspect ratio of that picture)", SETTINGS["height"].parse)
    width: int | None = flag(None, "width of the pictures in pixels, a multiple of 8 (default: the model's; with --image or --control_image, the model's area at the aspect ratio of that picture)", SETTINGS["width"].parse)
    scheduler: str | None = flag(None, "sampler (default: the model's, but dpm++ instead of pndm, and ddim for zero terminal SNR)", sampler_name, metavar="{" + ",".join(SAMPLERS) + "}")
    clip_skip: int | None = flag(None, "number of last layers of the text encoder to skip, which is A1111's value minus 1 (default: the number that the LoRA was trained with, otherwise 0)", number(int, least=0))

    def check(self, settings: Any) -> None:
        """Raises `InputError` if prompts are missing, or if a setting needs another flag that is missing."""
        axes = settings.grids.axes
        if self.prompt is None and "prompt" not in axes and not settings.output.save_merged:
            raise InputError("--prompt is missing. Pass what to draw.")
        if self.prompt and any(word.startswith("prompt=") for word in settings.grids.grid or ()):
            raise InputError("--prompt and prompt= in --grid are both given. Omit one of them, or write prompt without values in --grid.")
        given = flag_values(settings)
        defaults = {field.name: field.default for field, _ in iterate_flags(settings)}
        with_lora = given["lora"] is not None or "checkpoint" in axes
        for name, row in SETTINGS.items():
            there = with_lora if row.needs == "lora" else row.needs is None or given[row.needs] is not None
            if not there and (name in axes or given[name] != defaults[name]):
                raise InputError(f"--{name} needs --{row.needs}.")


@dataclass(frozen=True)
class FromPictures:
    """Initial pictures and control images."""

    title: ClassVar = "image to image and ControlNet"
    image: Path | None = flag(None, "initial picture for image to image, of any size and aspect ratio", Path, metavar="FILE")
    strength: tuple[float, ...] | None = flag(None, f"how much --image is changed, from 0 to 1: the amount of noise that is added and the fraction of the steps that are run; with several values, one picture is drawn for each (default: {STRENGTH})", SETTINGS["strength"].parse, nargs="+")
    control_image: Path | None = flag(None, "picture that --controlnet is conditioned on: edges, a pose or a depth map, depending on what the ControlNet was trained with; with --control canny, any picture", Path, metavar="FILE")
    control: str | None = flag(None, "canny: condition --controlnet on the Canny edges of --control_image, or of --image if --control_image is omitted", choices=["canny"])
    controlnet_scale: float = flag(1.0, "factor by which the outputs of --controlnet are multiplied: higher values follow the control image more closely", SETTINGS["controlnet_scale"].parse)
    from_png: Path | None = flag(None, "picture that infer.py wrote, to draw it again with the flags that its file records; flags on the command line override them", Path, recorded=False, metavar="FILE")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of image to image; empty without --image."""
        return () if self.image is None else self.strength or (STRENGTH,)

    def check(self, settings: Any) -> None:
        controlnet = settings.model.controlnet
        if (self.control or self.control_image) and controlnet is None:
            raise InputError(f"{'--control' if self.control else '--control_image'} needs --controlnet.")
        if controlnet and not (self.control_image or (self.control and self.image)):
            raise InputError("--controlnet needs --control_image, or --control canny with --image.")


@dataclass(frozen=True)
class Grids:
    """Sheets of pictures to compare."""

    title: ClassVar = "grids"
    grid: tuple[str, ...] | None = flag(None, f"draw one sheet that varies one to three settings (rows, columns, bands of rows), each written as NAME=VALUE,VALUE, such as lora_scale=0,0.5,1 guidance=5,7.5,10 or \"checkpoint=run/epoch-*\". NAME is one of {', '.join(row.short for row in SETTINGS.values() if row.label)}. For checkpoint, each value is a LoRA, and base means no LoRA; prompt, seed and strength without values use those of their flags", recorded=False, nargs="+", action="extend", metavar="NAME=VALUES")
    compare_base: bool = flag(False, "draw every picture without and with the LoRA, and write comparison.png, which shows the base model's pictures above those of the LoRA", recorded=False, action="store_true")

    @property
    def axes(self) -> set[str | None]:
        """The fields that the grid varies; None stands for an unknown name."""
        return {AXES.get(word.partition("=")[0]) for word in self.grid or ()}

    def check(self, settings: Any) -> None:
        if self.compare_base and settings.model.lora is None:
            raise InputError("--compare_base needs --lora.")
        if self.compare_base and self.grid:
            raise InputError("--compare_base is a grid of its own and excludes --grid. Omit --compare_base, and add lora_scale=0,1 to --grid.")


@dataclass(frozen=True)
class Machine:
    """Device, precision and memory options."""

    title: ClassVar = "machine"
    batch_size: int | None = flag(None, f"number of pictures that are drawn at once: larger batches are faster on a GPU and need more memory; with 1, each picture is bit for bit independent of the other pictures of the run (default: {BATCH_SIZE})", number(int, 1, MOST_BATCH), recorded=False)
    mixed_precision: str | None = flag(None, "precision of the models (default: no; on CUDA bf16, or fp16 if the GPU does not support bf16)", choices=["no", "fp16", "bf16"])
    device: str = flag("auto", "cpu, cuda, cuda:1, mps, or auto for the fastest available device", recorded=False)
    compile: bool = flag(False, "compile the UNet's blocks with torch.compile: the first step takes a minute or more, and later steps are faster; useful for many pictures", recorded=False, action="store_true")
    offload: bool = flag(False, "keep each model on the GPU only while it is used: slower, for GPUs whose memory is too small for all models", recorded=False, action="store_true")
    num_cpu_threads: int | None = flag(None, "number of threads for computing on a CPU (default: OMP_NUM_THREADS, or else the number of physical cores that are not busy)", number(int, least=1, most=MOST_CPU_THREADS))


@dataclass(frozen=True)
class Output:
    """Where the results are written."""

    title: ClassVar = "output"
    output_dir: Path = flag(Path("outputs"), "folder for the pictures; existing files are not overwritten", Path, recorded=False)
    save_merged: Path | None = flag(None, "new folder for the base model with the LoRAs merged into its weights at their strengths; saved as float32 unless --mixed_precision is given", Path, recorded=False, metavar="FOLDER")

    def check(self, settings: Any) -> None:
        if self.save_merged and settings.model.lora is None:
            raise InputError("--save_merged needs --lora.")
# fmt: on

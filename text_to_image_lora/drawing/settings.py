"""The flags of `infer.py`: groups of fields with their checks. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..command_line import flag, flag_values, iterate_flags
from ..errors import InputError
from ..models.samplers import SAMPLERS
from .rows import AXES, SETTINGS, number, sampler_name


BATCH_SIZE = 4  # pictures drawn at once: more gain little speed and cost the memory of small GPUs
STRENGTH = 0.8  # of image to image, unless a flag or a prompt says otherwise
COUNT = number(int, least=1)


# fmt: off
@dataclass(frozen=True)
class Model:
    """The base model, and what is put into it."""

    title: ClassVar = "model"
    pretrained_model_name_or_path: str | None = flag(None, "base model: local folder, hub id, .safetensors or .ckpt file", metavar="MODEL")
    single_file_config: Path | None = flag(None, "pipeline folder that configures a single-file base model offline", Path, metavar="FOLDER")
    revision: str | None = flag(None, "branch, tag or commit of the hub's base model (default: main)")
    variant: str | None = flag(None, "weight files of the base model to take, such as fp16 (default: the plain ones)")
    vae: str | None = flag(None, "VAE in place of the base model's: folder, hub id or single file (default: what the LoRA was trained with)", metavar="MODEL")
    lora: tuple[str, ...] | None = flag(None, "LoRA, or several that add up, each as PATH or PATH:STRENGTH: folder with pytorch_lora_weights.safetensors, .safetensors file or hub id (default: none)", nargs="+", action="extend")
    lora_scale: float = flag(1.0, "strength of each LoRA that is given without one: 0 is the base, 1 is as trained", SETTINGS["lora_scale"].parse, recorded=False)
    controlnet: str | None = flag(None, "ControlNet that holds the pictures to --control_image: folder or hub id", metavar="MODEL")

    def check(self, settings: Any) -> None:
        if self.pretrained_model_name_or_path is None:
            raise InputError("--pretrained_model_name_or_path is missing: the base model to draw with, or --from_png with a picture to draw again.")


@dataclass(frozen=True)
class Pictures:
    """What is drawn, and how."""

    title: ClassVar = "pictures"
    prompt: tuple[str, ...] | None = flag(None, "what to draw: one prompt, several, or a .txt file with one a line; options may stand behind each: a red axe --seed 3 --width 768 --negative blurry (also --steps, --guidance, --scheduler, --strength, --lora_scale, and kohya's --n --w --h --d --l --s)", nargs="+")
    negative_prompt: str | None = flag(None, "what to keep out of the pictures (default: nothing)")
    num_images: int = flag(1, "pictures per prompt", COUNT, recorded=False)
    seed: int = flag(0, "picture i of each prompt is drawn from seed + i, alike on any device", SETTINGS["seed"].parse)
    num_inference_steps: int = flag(30, "denoising steps: more take longer and add detail", SETTINGS["num_inference_steps"].parse)
    guidance_scale: float = flag(7.5, "how strictly the prompt is followed; 1 and less: no guidance", SETTINGS["guidance_scale"].parse)
    height: int | None = flag(None, "height of the pictures in pixels, a multiple of 8 (default: the model's own, or in the shape of --image)", SETTINGS["height"].parse)
    width: int | None = flag(None, "width of the pictures in pixels, a multiple of 8 (default: the model's own, or in the shape of --image)", SETTINGS["width"].parse)
    scheduler: str | None = flag(None, "sampler (default: the model's own, dpm++ instead of pndm; ddim for zero terminal SNR)", sampler_name, metavar="{" + ",".join(SAMPLERS) + "}")
    clip_skip: int | None = flag(None, "last text-encoder layers to leave out, A1111 counts one more (default: as the LoRA was trained, else 0)", number(int, least=0))

    def check(self, settings: Any) -> None:
        """Raises `InputError` for missing prompts, and for settings of pictures that need a flag which is missing."""
        axes = settings.grids.axes
        if self.prompt is None and "prompt" not in axes and not settings.output.save_merged:
            raise InputError("--prompt is missing: what to draw.")
        if self.prompt and any(word.startswith("prompt=") for word in settings.grids.grid or ()):
            raise InputError("--prompt and prompt= in --grid are both given. Leave one out, or write prompt alone in --grid.")
        given = flag_values(settings)
        defaults = {field.name: field.default for field, _ in iterate_flags(settings)}
        with_lora = given["lora"] is not None or "checkpoint" in axes
        for name, row in SETTINGS.items():
            there = with_lora if row.needs == "lora" else row.needs is None or given[row.needs] is not None
            if not there and (name in axes or given[name] != defaults[name]):
                raise InputError(f"--{name} needs --{row.needs}.")


@dataclass(frozen=True)
class FromPictures:
    """The pictures that drawing starts from, or holds to."""

    title: ClassVar = "from pictures"
    image: Path | None = flag(None, "picture to start from (image to image), of any size and shape", Path, metavar="FILE")
    strength: tuple[float, ...] | None = flag(None, f"how far from --image to go, up to 1: its noise, and the share of the steps; several draw several pictures (default: {STRENGTH})", SETTINGS["strength"].parse, nargs="+")
    control_image: Path | None = flag(None, "picture that --controlnet holds to: edges, a pose, depth, as the ControlNet was trained; with --control canny any picture", Path, metavar="FILE")
    control: str | None = flag(None, "canny: the edges of --control_image, or of --image, are what --controlnet holds to", choices=["canny"])
    controlnet_scale: float = flag(1.0, "how strictly --controlnet holds", SETTINGS["controlnet_scale"].parse)
    from_png: Path | None = flag(None, "a picture that infer.py drew: draw it again; other flags change what they say", Path, recorded=False, metavar="FILE")

    @property
    def strengths(self) -> tuple[float, ...]:
        """None at all without a picture to start from."""
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
    grid: tuple[str, ...] | None = flag(None, f"a sheet over one to three of {', '.join(row.short for row in SETTINGS.values() if row.label)}: rows, columns, bands, each as NAME=VALUE,VALUE, as in lora_scale=0,0.5,1 guidance=5,7.5,10 or \"checkpoint=run/epoch-*\" (each a LoRA in turn, base is none); prompt, seed and strength alone take the values of their flags", recorded=False, nargs="+", action="extend", metavar="NAME=VALUES")
    compare_base: bool = flag(False, "draw with and without the LoRA: base above LoRA in comparison.png", recorded=False, action="store_true")

    @property
    def axes(self) -> set[str | None]:
        """The settings that the grid goes over; None for a name that is not known."""
        return {AXES.get(word.partition("=")[0]) for word in self.grid or ()}

    def check(self, settings: Any) -> None:
        if self.compare_base and settings.model.lora is None:
            raise InputError("--compare_base needs --lora.")
        if self.compare_base and self.grid:
            raise InputError("--compare_base is a grid of its own. Leave it out, and add lora_scale=0,1 to --grid.")


@dataclass(frozen=True)
class Machine:
    """What computes."""

    title: ClassVar = "machine"
    batch_size: int | None = flag(None, f"pictures drawn at once: more are faster on a GPU and take more memory; with 1 no picture's last bits depend on others (default: {BATCH_SIZE})", COUNT, recorded=False)
    mixed_precision: str | None = flag(None, "number format of the models (default: no; on CUDA bf16, or fp16 without it)", choices=["no", "fp16", "bf16"])
    device: str = flag("auto", "cpu, cuda, cuda:1, mps, or auto for the fastest there is", recorded=False)
    compile: bool = flag(False, "compile the UNet's blocks: a minute or more at the first step, faster steps then; for many pictures", recorded=False, action="store_true")
    offload: bool = flag(False, "keep each model on the GPU only while it works: slower, for GPUs that are too small for all", recorded=False, action="store_true")
    num_cpu_threads: int | None = flag(None, "threads for computing on a CPU (default: the physical cores, unless OMP_NUM_THREADS says otherwise)", COUNT)


@dataclass(frozen=True)
class Output:
    """Where the results are written."""

    title: ClassVar = "output"
    output_dir: Path = flag(Path("outputs"), "where the pictures go; others there are not overwritten", Path, recorded=False)
    save_merged: Path | None = flag(None, "new folder for the base model with the LoRAs merged into it, at their strengths; float32 unless --mixed_precision is given", Path, recorded=False, metavar="FOLDER")

    def check(self, settings: Any) -> None:
        if self.save_merged and settings.model.lora is None:
            raise InputError("--save_merged needs --lora.")
# fmt: on

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

The file of each picture says how it was drawn, and --from_png draws it again.
"""

import logging
import shlex
import sys
from dataclasses import dataclass

from text_to_image_lora import log
from text_to_image_lora.drawing import settings as groups
from text_to_image_lora.drawing.parser import DrawingParser
from text_to_image_lora.errors import InputError, TrainingError
from text_to_image_lora.libraries import hide_modules, quiet_libraries, set_num_threads


logger = logging.getLogger("text_to_image_lora.infer")


@dataclass(frozen=True)
class Settings:
    """The groups of flags, in the order of --help."""

    model: groups.Model
    pictures: groups.Pictures
    from_pictures: groups.FromPictures
    grids: groups.Grids
    machine: groups.Machine
    output: groups.Output


def build_parser() -> DrawingParser:
    return DrawingParser(Settings, prog="infer.py", description=__doc__.splitlines()[0])


def run(argv: list[str]) -> None:
    """Finds what the flags name, opens the models, draws, and saves."""
    settings = build_parser().settings(argv)
    # Here, so that --help takes no longer than it must; torch comes with `choose_device`.
    from text_to_image_lora.drawing.draw import sized, warn_of_cut_prompts
    from text_to_image_lora.drawing.inputs import find_inputs
    from text_to_image_lora.drawing.merged import save_merged
    from text_to_image_lora.drawing.pipeline import choose_device, open_studio
    from text_to_image_lora.drawing.png import source_of
    from text_to_image_lora.drawing.save import save_pictures, save_sheets

    inputs = find_inputs(settings)
    machine, output = settings.machine, settings.output

    precision = machine.mixed_precision or ("no" if output.save_merged else None)
    device, dtype = choose_device(machine.device, precision)
    if device == "cpu":
        set_num_threads(machine.num_cpu_threads)
    studio = open_studio(inputs.job, machine, device, dtype)

    warn_of_cut_prompts(studio, inputs.drawings)
    if inputs.drawings:
        try:
            output.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"can't be made: {error.strerror}. Name another folder."
            raise InputError(f"--output_dir {output.output_dir} {reason}") from error
        drawings, vae = sized(studio, inputs.drawings), inputs.job.as_trained.vae
        source = source_of(
            settings.model, settings.from_pictures, vae=vae, dtype=dtype, device=device, compiled=machine.compile
        )
        images = save_pictures(settings, studio, drawings, source)
        if inputs.grid.name:
            save_sheets(settings, studio, inputs.grid, drawings, images, shlex.join(["infer.py", *argv]))
    if output.save_merged:
        count = len(settings.model.lora)  # behind these stand the checkpoints of a grid
        save_merged(studio, inputs.job.loras[:count], output.save_merged)
        loras = "LoRAs" if count > 1 else "LoRA"
        logger.info("%s: the base model with the %s merged into it", output.save_merged, loras)


def main(argv: list[str] | None = None) -> None:
    """Runs the command; what is wrong is told in one line on stderr, with an exit code."""
    log.start(warning_format="note: %(message)s")
    quiet_libraries()
    try:
        with hide_modules(
            "bitsandbytes"
        ):  # diffusers and peft would import it wherever it is installed, which takes a second
            run([*(sys.argv[1:] if argv is None else argv)])
    except (InputError, TrainingError) as error:
        print(f"infer.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None

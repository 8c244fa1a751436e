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
"""Generates pictures with Stable Diffusion and LoRA files, from text, from an initial picture or with a ControlNet.

    python infer.py --pretrained_model_name_or_path models/mini-sd --lora outputs/axe --prompt "a red axe"

Pictures are drawn singly or as a grid. Each PNG file records how it was drawn, and --from_png draws it again.
"""

from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from text_to_image_lora import log
from text_to_image_lora.command_line import flag_values
from text_to_image_lora.drawing import settings as groups
from text_to_image_lora.drawing.parser import DrawingParser
from text_to_image_lora.drawing.rows import SETTINGS, Drawing
from text_to_image_lora.errors import InputError, TrainingError, explaining_system_errors
from text_to_image_lora.files import printable, shorten_paths
from text_to_image_lora.libraries import hide_modules, quiet_libraries, set_num_threads
from text_to_image_lora.models.samplers import NO_ZERO_SNR


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


class Inputs(NamedTuple):
    """Everything that is known before a model is loaded: models, LoRAs, pictures, and what to draw."""

    job: Any  # a `pipeline.Job`
    grid: Any  # a `grids.Grid`
    drawings: list[Drawing]


class Session(NamedTuple):
    """The drawings of a run, and which of them are written."""

    drawings: list[Drawing]
    kept: range  # the indices of the drawings that are written
    batch_size: int


def build_parser() -> DrawingParser:
    return DrawingParser(Settings, prog="infer.py", description=str(__doc__).splitlines()[0])


def find_inputs(settings: Settings) -> Inputs:
    """Finds and checks everything that the flags name, without torch; raises `InputError` if it can't be drawn."""
    from text_to_image_lora.drawing import as_trained, find, fits, grids
    from text_to_image_lora.drawing.pipeline import Job
    from text_to_image_lora.drawing.prompts import read_prompts

    model, pictures = settings.model, settings.pictures
    find.check_folders(settings.output)
    prompts = read_prompts("--prompt", pictures.prompt or ())
    base = find.find_base(model)
    loras = find.find_loras(model)
    controlnet = find.find_controlnet(model.controlnet) if model.controlnet else None
    if controlnet:
        fits.check_controlnet_fits(controlnet, base.unet_config)
    given = find.find_pictures(settings.from_pictures)
    grid = grids.make_grid(settings, prompts, loras)

    # The settings of every picture, which options of its prompt and its cell in the grid override.
    values, strengths = flag_values(settings), settings.from_pictures.strengths
    common = Drawing(**{name: values[name] for name in SETTINGS.keys() & values.keys() - {"prompt", "strength"}})
    common = common._replace(loras=loras, strength=strengths[0] if strengths else None)
    drawings = grids.plan(common, grid)

    checkpoints = {drawing.checkpoint.adapter: drawing.checkpoint for drawing in drawings if drawing.checkpoint}
    loras += tuple(checkpoints.values())
    without_zero_snr = [drawing.scheduler for drawing in drawings if drawing.scheduler in NO_ZERO_SNR]
    scheduler = without_zero_snr[0] if without_zero_snr else pictures.scheduler
    trained, notes = as_trained.settle(loras, base, scheduler, clip_skip=pictures.clip_skip, vae=model.vae)
    clip_skip = trained.clip_skip or 0
    if base.shapes:
        fits.check_fits(base.shapes, loras, clip_skip, find.vae_channels(trained.vae) if trained.vae else None)
    for note in notes:
        logger.warning(note)
    drawings = [drawing._replace(clip_skip=clip_skip) for drawing in drawings]
    return Inputs(Job(base, loras, trained, controlnet, given), grid, drawings)


def plan_session(settings: Settings, drawings: list[Drawing], source: Any) -> Session:
    """Plans which drawings are drawn and written, and in which batch size.

    The last bits of a picture depend on the size of its batch and its place in it. To draw the picture of --from_png
    again, a batch of the recorded size is therefore filled with copies of it.
    """
    from text_to_image_lora.drawing import png

    path, wanted = settings.from_pictures.from_png, settings.machine.batch_size
    session = Session(drawings, range(len(drawings)), wanted or groups.BATCH_SIZE)
    if path is None:
        return session
    stored = png.read_repeat(path)
    now = png.repeat_of(drawings[0], source, stored.batch)
    png.warn_of_differences(path, stored, now)
    size, place = stored.batch or (1, 0)
    unchanged = all(now.flags.get(name) == stored.flags.get(name) for name in (*SETTINGS, "clip_skip"))
    if settings.grids.grid or len(drawings) > 1 or not unchanged or wanted not in (None, size):
        return session
    return Session([drawings[0]._replace(stem=path.stem)] * size, range(place, place + 1), size)


def save_pictures(studio: Any, session: Session, source: Any, output_dir: Path) -> list[Any]:
    """Draws the pictures and writes each one when it is finished; returns them in the order of the drawings."""
    from text_to_image_lora.drawing.draw import draw
    from text_to_image_lora.drawing.png import describe, save_png

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"can't be created: {error.strerror}. Name another folder."
        raise InputError(f"--output_dir {output_dir} {reason}") from error
    names, images = {}, {}
    for drawn in draw(studio, session.drawings, session.batch_size):
        if drawn.index in session.kept:
            drawing = session.drawings[drawn.index]
            path = save_png(drawn.image, output_dir / f"{drawing.stem}.png", describe(drawing, drawn, source))
            names[drawn.index], images[drawn.index] = path.name, drawn.image
    first, last = names[session.kept[0]], names[session.kept[-1]]
    written = first if len(names) == 1 else f"{len(names)} pictures, {first} to {last}"
    logger.info("%s: %s", printable(output_dir), written)
    return [images[i] for i in session.kept]


def save_sheets(settings: Settings, studio: Any, inputs: Inputs, images: list[Any], command: str) -> None:
    """Writes the edges for a ControlNet, and the sheets of a grid with the command that drew them."""
    from text_to_image_lora.drawing.draw import fitted
    from text_to_image_lora.drawing.grids import make_sheets
    from text_to_image_lora.drawing.png import save_png

    start, output_dir = settings.from_pictures, settings.output.output_dir
    shown = fitted(studio.given, *images[0].size)
    if studio.given.canny:
        edges = save_png(shown.control_image, output_dir / "edges.png", {})
        logger.info("%s: the edges for the ControlNet", printable(edges))
    if inputs.grid.name is None:
        return
    names = {"image": start.image, "control_image": start.control_image or start.image}
    given = [(path.name, getattr(shown, name)) for name, path in names.items() if path and getattr(shown, name)]
    what = "the base model's pictures above those of the LoRA" if settings.grids.compare_base else "the grid"
    model = shorten_paths(settings.model.pretrained_model_name_or_path)
    for sheet in make_sheets(inputs.grid, inputs.drawings, images, given):
        prompt = " | ".join(dict.fromkeys(drawing.prompt for drawing in sheet.drawings))
        chunks = {"prompt": prompt, "pretrained_model_name_or_path": model, "command": command}
        logger.info("%s: %s", printable(save_png(sheet.image, output_dir / sheet.name, chunks)), what)


def run(argv: list[str]) -> None:
    """Finds the inputs, opens the models, draws the pictures, and saves them."""
    settings = build_parser().settings(argv)
    machine, output = settings.machine, settings.output
    inputs = find_inputs(settings)
    logger.info("loading %s", shorten_paths(printable(inputs.job.base.model.source)))

    from text_to_image_lora.drawing import draw, identities, pipeline, png

    precision = machine.mixed_precision or ("no" if output.save_merged else None)
    device, dtype = pipeline.choose_device(machine.device, precision)
    if device == "cpu":
        set_num_threads(machine.num_cpu_threads)
    job, vae = inputs.job, inputs.job.as_trained.vae
    with identities.loading_unchanged(
        job.base.model, job.loras, vae, job.controlnet and job.controlnet.source
    ) as found:
        studio = pipeline.open_studio(job, machine, device, dtype)

    draw.warn_of_cut_prompts(studio, inputs.drawings)
    if inputs.drawings:
        source = png.source_of(
            settings.model, settings.from_pictures, vae=vae, dtype=dtype, device=device, compiled=machine.compile,
            identities=found,
        )  # fmt: skip
        session = plan_session(settings, draw.sized(studio, inputs.drawings), source)
        images = save_pictures(studio, session, source, output.output_dir)
        save_sheets(settings, studio, inputs, images, shlex.join(["infer.py", *map(printable, shorten_paths(argv))]))
    if output.save_merged:
        count = len(settings.model.lora)  # the checkpoints of a grid follow them
        pipeline.save_merged(studio, inputs.job.loras[:count], output.save_merged)
        loras = "LoRAs" if count > 1 else "LoRA"
        logger.info("%s: the base model with the %s merged into it", printable(output.save_merged), loras)


def main(argv: list[str] | None = None) -> None:
    """Runs the command; reports an error in one line on stderr, with an exit code."""
    log.start(warning_format="note: %(message)s")
    quiet_libraries()
    try:
        # diffusers and peft would import bitsandbytes, which takes a second.
        with explaining_system_errors(), hide_modules("bitsandbytes"):
            run([*(sys.argv[1:] if argv is None else argv)])
    except (InputError, TrainingError) as error:
        print(f"infer.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()

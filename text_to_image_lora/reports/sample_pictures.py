"""Sample pictures: drawn with the models in training, written to the output folder, and logged to the trackers."""

import functools
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..drawing.as_trained import AsTrained
from ..drawing.draw import Drawn, batches_of, draw_batch
from ..drawing.encode import EncodedPrompts
from ..drawing.grids import Cell, Grid, make_sheets, plan, prompt_cells, told_apart
from ..drawing.identities import identities_of
from ..drawing.pipeline import PIPELINES, Studio
from ..drawing.png import describe, name_for_others, save_png, source_of
from ..drawing.rows import Drawing, Lora
from ..drawing.settings import FromPictures, Model
from ..errors import InputError
from ..files import remove_leftovers, written_whole
from ..models.lora import scaled_adapters
from ..models.modules import evaluating, in_its_precision
from ..models.samplers import NO_ZERO_SNR, make_sampler
from ..training import interruption
from ..training.memory import DRAWN_AT_ONCE
from .dashboard import log_pictures
from .progress import work_bar
from .runs import open_sample, read_info, step_of


logger = logging.getLogger(__name__)


def make_painter(settings: Any, run: Any, models: Any, accelerator: Any) -> "Painter":
    """Makes the `Painter` of a run; without prompts, it draws nothing."""
    base, samples, output_dir = settings.base, settings.samples, Path(settings.run.output_dir)
    if not samples.prompts:
        return Painter(output_dir, accelerator)
    grid, device = arrange(samples), accelerator.device
    like = Drawing(
        seed=run.seed, loras=(Lora(name_for_others(str(output_dir)), output_dir, 1.0, "default", {}, {}, in_training=True),),
        negative_prompt=samples.validation_negative_prompt or None,
        num_inference_steps=samples.validation_inference_steps, guidance_scale=samples.validation_guidance_scale,
        clip_skip=base.clip_skip or 0, height=run.resolution, width=run.resolution,
    )  # fmt: skip
    drawings = [
        drawing._replace(stem="prompt-{:02d}-{}".format(*divmod(i, samples.num_validation_images)))
        for i, drawing in enumerate(plan(like, grid))
    ]
    studio = make_studio(run.base, models, device)
    unfit = [drawing.scheduler for drawing in drawings if drawing.scheduler in NO_ZERO_SNR]
    if unfit and studio.as_trained.zero_snr:
        raise InputError(f"--scheduler {unfit[0]} does not support zero terminal SNR. Use --scheduler ddim.")
    encode = functools.partial(
        EncodedPrompts, studio.pipe, models.family, encode=models.prompt_encoder, device=device,
        use_loras=studio.use_loras if models.trains_text_encoder else None,
    )  # fmt: skip
    if not models.trains_text_encoder:
        studio = studio._replace(encoder=encode(drawings))
    config, vae = base.single_file_config, base.pretrained_vae_model_name_or_path
    model = Model(
        name_for_others(base.pretrained_model_name_or_path), config and Path(name_for_others(str(config))),
        base.revision, base.variant,
    )  # fmt: skip
    source = source_of(
        model, FromPictures(), vae=vae and name_for_others(vae), dtype=models.dtype, device=str(device),
        compiled=settings.speed.compile != "off", identities=identities_of(run.base, vae),
    )  # fmt: skip
    return Painter(
        output_dir, accelerator, studio, grid, drawings, source, encode if models.trains_text_encoder else None
    )


def arrange(samples: Any) -> Grid:
    """Makes the grid of `SampleSettings`: a row for each prompt, with a column for each of its pictures.

    Picture k of a prompt has the seed of the run, or of the prompt, plus k.
    """
    seeds_differ = any("seed" in prompt.options for prompt in samples.prompts)
    columns = [Cell(note="" if seeds_differ else "seed {seed}", nth=k) for k in range(samples.num_validation_images)]
    return Grid("sheet", [Cell()], [Cell()], told_apart(prompt_cells(samples.prompts)), columns)


def make_studio(base: Any, models: Any, device: torch.device) -> Studio:
    """Makes the `Studio` of the models in training, still without an encoder of prompts; the pipeline has no text encoders.

    The VAE decodes one latent at a time, to save memory, and in float32, because some VAEs overflow in float16.
    """
    import diffusers

    family, config = models.family, models.diffusion.config
    trained = AsTrained(config.prediction_type, bool(config.rescale_betas_zero_snr))
    without = {name: None for row in family.text_encoders for name in (row.name, row.tokenizer)}
    zeros = {} if family.zeros_option is None else {family.zeros_option: base.zeros_for_empty_prompt}
    pipe = getattr(diffusers, family.pipeline_of())(
        vae=models.vae, scheduler=make_sampler(models.scheduler_config), **{family.denoiser: models.denoiser}, **without,
        **family.pipeline_options, **zeros,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def decode(latents):
        with torch.autocast(device.type, enabled=False):
            scaled = latents.float() / pipe.vae.config.scaling_factor
            decoded = torch.cat([pipe.vae.decode(latent).sample for latent in scaled.split(1)])
            if not decoded.isfinite().all():  # training itself may be sound
                logger.warning(
                    "a sample picture is not finite (NaN), and is black there: lower --validation_guidance_scale, or pass "
                    "another --mixed_precision"
                )
                decoded = decoded.nan_to_num(nan=-1)
            return pipe.image_processor.postprocess(decoded)

    def use_loras(pipe, loras):
        return scaled_adapters(loras[0].scale if loras else 0, *models.adapted.values())

    return Studio(
        pipe, family, PIPELINES[""], models.scheduler_config, trained, None, use_loras=use_loras, decode=decode
    )


class Painter:
    """Draws the sample pictures of a run, writes them to the folder validation, and logs them to the trackers.

    Args:
        drawings: In the order of `grid`; without any, nothing is drawn.
        source: Is recorded in each picture.
        encode: (drawings) -> the encoder for the pictures of a step, if the text encoders are trained; else None, and
            `studio` has an encoder.
    """

    def __init__(
        self, output_dir: Path, accelerator: Any, studio: Any = None, grid: Any = None, drawings: Sequence[Drawing] = (),
        source: Any = None, encode: Callable[[Sequence[Drawing]], Any] | None = None,
    ):  # fmt: skip
        self.folder, self.accelerator = output_dir / "validation", accelerator
        self.studio, self.grid, self.drawings = studio, grid, drawings
        self.source, self.encode = source, encode

    def draw(self, step: int) -> None:
        """Draws and saves the pictures of a step, each process its share of them; step 0 is without the LoRA."""
        if not self.drawings:
            return
        drawings = self.drawings if step else [drawing._replace(loras=()) for drawing in self.drawings]
        drawn = self.generate(drawings)
        if not self.accelerator.is_main_process:
            return
        images = [each.image for each in drawn]
        pictures = {
            drawing.stem: (each.image, describe(drawing, each, self.source))
            for drawing, each in zip(drawings, drawn, strict=True)
        }
        (sheet,) = make_sheets(self.grid, drawings, images, ())
        save_pictures(self.folder / f"step-{step:06d}", pictures, sheet.image)
        base = base_images(self.folder, drawings) if step and self.accelerator.trackers else {}
        prompts = [", ".join(filter(None, [row.label, row.note.format()])) for row in self.grid.rows]
        num_images = len(self.grid.columns)
        tasks = [divmod(i, num_images) for i in range(len(drawings))]
        log_pictures(
            self.accelerator, dict(zip(tasks, images)), {tasks[i]: image for i, image in base.items()}, prompts,
            {task: drawing.seed for task, drawing in zip(tasks, drawings)}, step,
        )  # fmt: skip

    def generate(self, drawings: Sequence[Drawing]) -> list[Drawn]:
        """Draws the pictures, each process its share of the batches; returns all of them on every process.

        Which pictures are drawn together does not depend on the number of processes, and so neither do the pictures.
        """
        from accelerate.utils import gather_object

        process = self.accelerator
        studio = self.studio if self.encode is None else self.studio._replace(encoder=self.encode(drawings))
        batches = batches_of(studio, drawings, DRAWN_AT_ONCE)
        images, vae, denoiser = {}, studio.pipe.vae, getattr(studio.pipe, studio.family.denoiser)
        vae_device = vae.device
        vae.to(process.device)
        mine = batches[process.process_index :: process.num_processes]
        bar = work_bar(process, sum(batch.num_steps for batch in mine), "drawing sample pictures")

        def after_step(pipe):
            bar.update()
            _interrupt_if_asked(pipe)

        with evaluating(denoiser), in_its_precision(denoiser), bar:
            for batch in mine:
                drawn = draw_batch(studio, drawings, batch, after_step)
                images |= {each.index: each.image for each in drawn}
                if interruption.stop_requested():
                    break
        vae.to(vae_device)
        interruption.stop_together("while it drew sample pictures")
        images = {index: image for part in gather_object([images]) for index, image in part.items()}
        drawn = [
            Drawn(i, images[i], batch.sampler, (len(batch.indices), place))
            for batch in batches
            for place, i in enumerate(batch.indices)
        ]
        return sorted(drawn, key=lambda each: each.index)


def _interrupt_if_asked(pipe):
    """Makes the pipeline skip the remaining denoising steps if the run was asked to stop."""
    pipe._interrupt = interruption.stop_requested() is not None


def save_pictures(
    folder: Path, pictures: dict[str, tuple[Image.Image, dict[str, Any]]], sheet: Image.Image | None = None
) -> None:
    """Writes the pictures of a step {file name without ".png": (picture, its text chunks)}, and `sheet`.

    The folders of this and of later steps are replaced and removed: they are from before the run was resumed or restarted.
    """
    with written_whole(folder, folder=True) as temporary:
        for name, (image, chunks) in pictures.items():
            save_png(image, temporary / f"{name}.png", chunks)
        if sheet is not None:
            save_png(sheet, temporary / "sheet.png", {})
    remove_leftovers(folder.parent)
    for other in folder.parent.glob("step-*"):
        if step_of(other) > step_of(folder):
            shutil.rmtree(other)


def base_images(folder: Path, drawings: Sequence[Drawing]) -> dict[int, Image.Image]:
    """Reads the base model's pictures in `folder` that have the prompt and seed of a drawing: {index of the drawing: picture}."""
    found = {}
    for i, drawing in enumerate(drawings):
        path = folder / "step-000000" / f"{drawing.stem}.png"
        info = read_info(path) if path.exists() else None
        if info is None or (info.get("prompt"), info.get("seed")) != (drawing.prompt, str(drawing.seed)):
            continue
        if (image := open_sample(path)) is not None:
            found[i] = image
    return found


def latest_images(output_dir: Path, prompts: Sequence[str]) -> list[tuple[str, Path]]:
    """Returns (prompt, path) of the newest sample pictures in `output_dir` that have one of these prompts."""
    folders = sorted((output_dir / "validation").glob("step-*"), key=step_of)
    paths = sorted(folders[-1].glob("prompt-*.png")) if folders and prompts else []
    found = []
    for path in paths:
        with Image.open(path) as image:
            prompt = str(image.info.get("prompt"))  # Pillow returns a subclass of str, which YAML can't write
        if prompt in prompts:
            found.append((prompt, path))
    return found

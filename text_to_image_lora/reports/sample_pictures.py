"""Sample pictures: drawn with the models in training by the pipeline's own code, written, and laid out in a sheet."""

import contextlib
import itertools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..files import written_whole
from ..models.modules import evaluating, in_its_precision
from ..training import interruption
from ..training.memory import DRAWN_AT_ONCE
from .dashboard import log_pictures
from .runs import step_of


OF_A_CALL = ("num_inference_steps", "guidance_scale", "height", "width")  # what those have in common


class Samples(NamedTuple):
    """Which pictures are drawn while training, and how."""

    prompts: tuple[str, ...] | list[str]
    negative_prompt: str = ""
    num_images: int = 4  # of each prompt
    resolution: int = 512  # side in pixels
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    seed: int = 0  # picture k of each prompt has the seed + k
    own: tuple[dict, ...] | list[dict] = ()  # for each prompt what it has otherwise, see `of`

    def of(self, prompt):
        """What holds for the prompt of this number: the run's settings, or its own."""
        common = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "height": self.resolution,
            "width": self.resolution,
            "seed": self.seed,
            "negative_prompt": self.negative_prompt,
        }
        return common | (self.own[prompt] if self.own else {})

    def seed_of(self, prompt, k):
        """The seed of picture k of the prompt of this number."""
        return self.of(prompt)["seed"] + k


def make_pipeline(base, denoiser, vae, scheduler_config, trained_config):
    """The pipeline of a `BaseModel` around the models in training; prompts come as embeddings.

    No safety checker: it blackens pictures that are only unusual, and what is trained on is the user's own. The sampler
    is the base model's own, but DPM++ 2M (https://arxiv.org/abs/2211.01095) instead of PNDM, which in 30 steps overshoots
    at strong guidance; `infer.py` has the same rule. `trained_config` is that of the schedule in training.
    """
    import diffusers

    family = base.family
    scheduler_class = getattr(diffusers, scheduler_config.get("_class_name", ""), diffusers.PNDMScheduler)
    if scheduler_class is diffusers.PNDMScheduler:
        scheduler_class = diffusers.DPMSolverMultistepScheduler
    changes = {"prediction_type": trained_config.prediction_type}
    if trained_config.rescale_betas_zero_snr:
        # At zero terminal SNR sampling must start at the last timestep (Lin et al., 2023); PNDM can't.
        scheduler_class = diffusers.DDIMScheduler
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    without = {name: None for row in family.text_encoders for name in (row.name, row.tokenizer)}
    zeros = {} if family.zeros_option is None else {family.zeros_option: base.zeros_for_empty_prompt}
    pipeline = getattr(diffusers, family.pipeline)(
        vae=vae, scheduler=scheduler_class.from_config(scheduler_config, **changes),
        **{family.denoiser: denoiser}, **without, **family.pipeline_options, **zeros,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_painter(settings: Any, run: Any, models: Any, accelerator: Any) -> "Painter":
    """The `Painter` of a run; without prompts one that draws nothing."""
    given = settings.samples
    samples = Samples(
        given.texts, given.validation_negative_prompt, given.num_validation_images, run.resolution,
        given.validation_inference_steps, given.validation_guidance_scale, run.seed,
        own=[prompt.options for prompt in given.prompts],
    )  # fmt: skip
    pipeline = None
    if samples.prompts:
        pipeline = make_pipeline(
            run.base, models.denoiser, models.vae, models.scheduler_config, models.diffusion.config
        )
    return Painter(
        pipeline, models.family, samples, models.prompt_encoder, accelerator=accelerator,
        output_dir=Path(settings.run.output_dir), keep_encoder=models.trains_text_encoder,
    )  # fmt: skip


class Painter:
    """Draws a run's sample pictures, writes them below `output_dir`/validation, and sends them to the trackers.

    Without prompts it does nothing. The prompts are encoded once, and the encoder is let go, unless `keep_encoder`: while it is trained itself. The VAE
    decodes on the accelerator's device, and is put back where it was.
    """

    def __init__(self, pipeline, family, samples, prompt_encoder, *, accelerator, output_dir, keep_encoder):
        self.pipeline, self.family, self.samples = pipeline, family, samples
        self.accelerator, self.output_dir = accelerator, output_dir
        self.prompt_encoder = prompt_encoder if keep_encoder else None
        self.conditions = self._encode(prompt_encoder) if samples.prompts and not keep_encoder else None

    def _encode(self, prompt_encoder):
        """The conditions of the prompts and of the negative ones, which as in diffusers' pipelines have no clip_skip."""
        negatives = self._negative_prompts()
        negative = prompt_encoder(negatives, with_clip_skip=False)
        if self.family.zeros_option is not None and self.pipeline.config[self.family.zeros_option]:
            for value in negative.values():
                value[[not text for text in negatives]] = 0
        wanted = prompt_encoder(self.samples.prompts)
        return [{name: value.cpu() for name, value in part.items()} for part in (wanted, negative)]

    def _negative_prompts(self):
        samples = self.samples
        return list(dict.fromkeys(samples.of(i)["negative_prompt"] for i in range(len(samples.prompts))))

    def draw(self, step):
        """Draws and saves the pictures of a step, each process its share of them."""
        if not self.samples.prompts:
            return
        images = self.generate()
        if self.accelerator.is_main_process:
            prompts, seeds = self.samples.prompts, {task: self.samples.seed_of(*task) for task in images}
            save_images(images, prompts, seeds, self.output_dir / "validation" / f"step-{step:06d}")
            base = base_images(self.output_dir, prompts, seeds) if step and self.accelerator.trackers else {}
            log_pictures(self.accelerator, images, base, prompts, seeds, step)

    @torch.no_grad()
    def generate(self):
        """`num_images` pictures a prompt: {(prompt, k): PIL.Image}, on every process.

        Picture k of each prompt has the seed + k, and which ones are drawn together doesn't depend on the number of
        processes: so it stays the same.
        """
        from accelerate.utils import gather_object

        pipeline, samples, device = self.pipeline, self.samples, self.accelerator.device
        wanted, negative = self.conditions or self._encode(self.prompt_encoder)
        settings, negatives = [samples.of(prompt) for prompt in range(len(samples.prompts))], self._negative_prompts()
        tasks = [(prompt, k) for prompt in range(len(samples.prompts)) for k in range(samples.num_images)]
        batches = []
        for _, alike in itertools.groupby(tasks, lambda task: [settings[task[0]][name] for name in OF_A_CALL]):
            alike = list(alike)
            batches += [alike[first : first + DRAWN_AT_ONCE] for first in range(0, len(alike), DRAWN_AT_ONCE)]
        images, was_on = {}, pipeline.vae.device
        pipeline.vae.to(device)
        denoiser = getattr(pipeline, self.family.denoiser)
        with evaluating(denoiser), in_its_precision(denoiser):
            for batch in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
                embeds, prompts = {}, [prompt for prompt, _ in batch]
                without = [negatives.index(settings[prompt]["negative_prompt"]) for prompt in prompts]
                for name, of_call in self.family.pipeline_names.items():
                    embeds[of_call] = wanted[name][prompts].to(device)
                    embeds[f"negative_{of_call}"] = negative[name][without].to(device)
                latents = pipeline(
                    **embeds,
                    generator=[torch.Generator().manual_seed(samples.seed_of(*task)) for task in batch],
                    **{name: settings[batch[0][0]][name] for name in OF_A_CALL},
                    output_type="latent",
                    callback_on_step_end=_leave_out_the_rest_if_asked,
                ).images
                if interruption.stop_requested():
                    break
                # One at a time, which takes less memory; in float32, as some VAEs overflow in float16.
                with torch.autocast(device.type, enabled=False):
                    for task, latent in zip(batch, latents.float().split(1), strict=True):
                        decoded = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
                        images[task] = pipeline.image_processor.postprocess(decoded)[0]
        pipeline.vae.to(was_on)
        interruption.stop_together("while it drew sample pictures")
        return {task: image for part in gather_object([images]) for task, image in part.items()}


def _leave_out_the_rest_if_asked(pipeline, step, timestep, tensors):
    """After a denoising step: where the run is asked to stop, the pipeline passes over the others."""
    pipeline._interrupt = interruption.stop_requested() is not None  # what its property `interrupt` says
    return tensors


def file_name(prompt, k):
    """What picture k of the prompt of this number is called."""
    return f"prompt-{prompt:02d}-{k}.png"


def save_images(images, prompts, seeds, folder):
    """Writes each picture, its prompt and its seed in the file, and a sheet of all with their prompts.

    Earlier pictures of this step and of later ones go: they are of a run that went further before it was resumed or
    started over.
    """
    from PIL.PngImagePlugin import PngInfo

    with written_whole(folder, folder=True) as temporary:
        for (prompt, k), image in images.items():
            info = PngInfo()
            info.add_itxt("prompt", prompts[prompt])
            info.add_text("seed", str(seeds[prompt, k]))
            image.save(temporary / file_name(prompt, k), pnginfo=info)
        label_sheet(images, prompts).save(temporary / "sheet.png")
    for other in folder.parent.glob("step-*"):
        if step_of(other) > step_of(folder):
            shutil.rmtree(other)


def base_images(output_dir, prompts, seeds):
    """{(prompt index, k): PIL.Image} that the base drew before the first step, as far as of these prompts and seeds."""
    found = {}
    for task, seed in seeds.items():
        path = output_dir / "validation" / "step-000000" / file_name(*task)
        with contextlib.suppress(FileNotFoundError), Image.open(path) as image:
            if (image.info.get("prompt"), image.info.get("seed")) == (prompts[task[0]], str(seed)):
                found[task] = image.convert("RGB")
    return found


def latest_images(output_dir, prompts):
    """[(prompt, path)] of the newest validation in `output_dir`, for the prompts that are asked for."""
    folders = sorted((output_dir / "validation").glob("step-*"), key=step_of)
    paths = sorted(folders[-1].glob("prompt-*.png")) if folders and prompts else []
    found = []
    for path in paths:
        with Image.open(path) as image:
            prompt = str(image.info.get("prompt"))  # Pillow gives a subclass of str, which YAML can't write
        if prompt in prompts:
            found.append((prompt, path))
    return found


def label_sheet(images, prompts):
    """The pictures of a validation in a grid, a prompt a row, the prompt below it."""
    from PIL import ImageDraw, ImageFont, ImageOps

    first, num_images = next(iter(images.values())), max(k for _, k in images) + 1
    scale = max(1, round(192 / first.width))
    width, height = first.width * scale, first.height * scale
    font = ImageFont.load_default(size=15)
    gap, label = 8, 28
    sheet = Image.new("RGB", (gap + num_images * (width + gap), gap + len(prompts) * (height + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        top = gap + row * (height + label)
        for k in range(num_images):
            image = ImageOps.pad(images[row, k], (width, height), Image.Resampling.LANCZOS, color="white")
            sheet.paste(image, (gap + k * (width + gap), top))
        text = " ".join(prompt.split())
        while draw.textlength(text, font=font) > sheet.width - 2 * gap and len(text) > 4:
            text = text[:-4].rstrip() + "..."
        draw.text((gap, top + height + 4), text, fill="black", font=font)
    return sheet

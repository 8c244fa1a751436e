"""Sample pictures: drawn with the models in training by the pipeline's own code, written, and laid out in a sheet."""

import shutil
from typing import NamedTuple

import torch
from PIL import Image

from ..models.modules import evaluating, in_its_precision
from .dashboard import log_pictures
from .runs import step_of


AT_ONCE = 4  # pictures denoised together


class Samples(NamedTuple):
    """Which pictures are drawn while training, and how."""

    prompts: tuple[str, ...] | list[str]
    negative_prompt: str = ""
    num_images: int = 4  # of each prompt
    resolution: int = 512  # side in pixels
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    seed: int = 0  # picture k of each prompt has the seed + k

    def seed_of(self, prompt, k):
        """The seed of picture k of the prompt of this number."""
        return self.seed + k


def make_pipeline(family, denoiser, vae, scheduler_config, trained_config):
    """The family's pipeline around the models in training; prompts come as embeddings.

    No safety checker: it blackens pictures that are only unusual, and what is trained on is the user's own. The sampler
    is the base model's own, but DPM++ 2M (https://arxiv.org/abs/2211.01095) instead of PNDM, which in 30 steps overshoots
    at strong guidance; `infer.py` has the same rule. `trained_config` is that of the schedule in training.
    """
    import diffusers

    scheduler_class = getattr(diffusers, scheduler_config.get("_class_name", ""), diffusers.PNDMScheduler)
    if scheduler_class is diffusers.PNDMScheduler:
        scheduler_class = diffusers.DPMSolverMultistepScheduler
    changes = {"prediction_type": trained_config.prediction_type}
    if trained_config.rescale_betas_zero_snr:
        # At zero terminal SNR sampling must start at the last timestep (Lin et al., 2023); PNDM can't.
        scheduler_class = diffusers.DDIMScheduler
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    without = {name: None for row in family.text_encoders for name in (row.name, row.tokenizer)}
    pipeline = getattr(diffusers, family.pipeline)(
        vae=vae, scheduler=scheduler_class.from_config(scheduler_config, **changes),
        **{family.denoiser: denoiser}, **without, **family.pipeline_options,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Painter:
    """Draws a run's sample pictures, writes them below `output_dir`/validation, and sends them to the trackers.

    The prompts are encoded once, and the encoder is let go, unless `keep_encoder`: while it is trained itself. The VAE
    decodes on the accelerator's device, and is put back where it was.
    """

    def __init__(self, pipeline, family, samples, prompt_encoder, *, accelerator, output_dir, keep_encoder):
        self.pipeline, self.family, self.samples = pipeline, family, samples
        self.accelerator, self.output_dir = accelerator, output_dir
        self.prompt_encoder = prompt_encoder if keep_encoder else None
        self.conditions = None if keep_encoder else self._encode(prompt_encoder)

    def _encode(self, prompt_encoder):
        """The conditions of the prompts and of the negative one, which as in diffusers' pipelines has no clip_skip."""
        negative = prompt_encoder([self.samples.negative_prompt], with_clip_skip=False)
        wanted = prompt_encoder(self.samples.prompts)
        return [{name: value.cpu() for name, value in part.items()} for part in (wanted, negative)]

    def draw(self, step):
        """Draws and saves the pictures of a step, each process its share of them."""
        images = self.generate()
        if self.accelerator.is_main_process:
            folder, seeds = self.output_dir / "validation", {task: self.samples.seed_of(*task) for task in images}
            save_images(images, self.samples.prompts, folder / f"step-{step:06d}", seeds)
            base = base_images(self.output_dir, self.samples.prompts) if step and self.accelerator.trackers else {}
            log_pictures(self.accelerator, images, base, self.samples.prompts, seeds, step)

    @torch.no_grad()
    def generate(self):
        """`num_images` pictures a prompt: {(prompt, k): PIL.Image}, on every process.

        Picture k of each prompt has the seed + k, and which ones are drawn together doesn't depend on the number of
        processes: so it stays the same.
        """
        from accelerate.utils import gather_object

        pipeline, samples, device = self.pipeline, self.samples, self.accelerator.device
        wanted, negative = self.conditions or self._encode(self.prompt_encoder)
        tasks = [(prompt, k) for prompt in range(len(samples.prompts)) for k in range(samples.num_images)]
        batches = [tasks[first : first + AT_ONCE] for first in range(0, len(tasks), AT_ONCE)]
        images, was_on = {}, pipeline.vae.device
        pipeline.vae.to(device)
        denoiser = getattr(pipeline, self.family.denoiser)
        with evaluating(denoiser), in_its_precision(denoiser):
            for batch in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
                embeds = {}
                for name, of_call in self.family.pipeline_names.items():
                    embeds[of_call] = wanted[name][[prompt for prompt, _ in batch]].to(device)
                    embeds[f"negative_{of_call}"] = negative[name].expand_as(embeds[of_call]).to(device)
                latents = pipeline(
                    **embeds,
                    generator=[torch.Generator().manual_seed(samples.seed_of(*task)) for task in batch],
                    num_inference_steps=samples.num_inference_steps,
                    guidance_scale=samples.guidance_scale,
                    height=samples.resolution,
                    width=samples.resolution,
                    output_type="latent",
                ).images
                # One at a time, which takes less memory; in float32, as some VAEs overflow in float16.
                with torch.autocast(device.type, enabled=False):
                    for task, latent in zip(batch, latents.float().split(1), strict=True):
                        decoded = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
                        images[task] = pipeline.image_processor.postprocess(decoded)[0]
        pipeline.vae.to(was_on)
        return {task: image for part in gather_object([images]) for task, image in part.items()}


def save_images(images, prompts, folder, seeds=None):
    """Writes each picture, its prompt and its seed in the file, and a sheet of all with their prompts.

    Earlier pictures of this step and of later ones go: they are of a run that went further before it was resumed or
    started over.
    """
    from PIL.PngImagePlugin import PngInfo

    for other in folder.parent.glob("step-*"):
        if step_of(other) >= step_of(folder):
            shutil.rmtree(other)
    folder.mkdir(parents=True)
    for (prompt, k), image in images.items():
        info = PngInfo()
        info.add_itxt("prompt", prompts[prompt])
        if seeds is not None:
            info.add_text("seed", str(seeds[prompt, k]))
        image.save(folder / f"prompt-{prompt:02d}-{k}.png", pnginfo=info)
    label_sheet(images, prompts).save(folder / "sheet.png")


def base_images(output_dir, prompts):
    """{(prompt index, k): PIL.Image} that the base drew before the first step, as far as it was of these prompts."""
    found = {}
    for path in sorted((output_dir / "validation" / "step-000000").glob("prompt-*.png")):
        _, prompt, k = path.stem.split("-")
        with Image.open(path) as image:
            if int(prompt) < len(prompts) and image.text.get("prompt") == prompts[int(prompt)]:
                found[int(prompt), int(k)] = image.convert("RGB")
    return found


def latest_images(output_dir, prompts):
    """[(prompt, path)] of the newest validation in `output_dir`, for the prompts that are asked for."""
    folders = sorted((output_dir / "validation").glob("step-*"), key=step_of)
    paths = sorted(folders[-1].glob("prompt-*.png")) if folders and prompts else []
    found = []
    for path in paths:
        with Image.open(path) as image:
            prompt = str(image.text.get("prompt"))  # Pillow gives a subclass of str, which YAML can't write
        if prompt in prompts:
            found.append((prompt, path))
    return found


def label_sheet(images, prompts):
    """The pictures of a validation in a grid, a prompt a row, the prompt below it."""
    from PIL import ImageDraw, ImageFont

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
            image = images[row, k].resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(image, (gap + k * (width + gap), top))
        text = " ".join(prompt.split())
        while draw.textlength(text, font=font) > sheet.width - 2 * gap and len(text) > 4:
            text = text[:-4].rstrip() + "..."
        draw.text((gap, top + height + 4), text, fill="black", font=font)
    return sheet

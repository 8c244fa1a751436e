"""Validation: the loss on pictures that are not trained on, and pictures made by the pipeline's own code.

Both use the models that are in memory, and leave the training's random numbers alone.
"""

import contextlib
import hashlib
import shutil

import numpy as np
import torch
from PIL import Image

from .models import predict
from .objective import loss_of_samples, target_of
from .records import fingerprint


STRATA = 8  # timesteps at which each picture is validated


def make_pipeline(unet, vae, scheduler_config, *, prediction_type, rescale_betas_zero_snr):
    """A `StableDiffusionPipeline` around the models in training; prompts come as embeddings.

    No safety checker: it blackens pictures that are only unusual, and what is trained on is the user's own. The sampler
    is the base model's own, but DPM++ 2M (https://arxiv.org/abs/2211.01095) instead of PNDM, which in 30 steps overshoots
    at strong guidance; `infer.py` has the same rule.
    """
    import diffusers

    scheduler_class = getattr(diffusers, scheduler_config.get("_class_name", ""), diffusers.PNDMScheduler)
    if scheduler_class is diffusers.PNDMScheduler:
        scheduler_class = diffusers.DPMSolverMultistepScheduler
    changes = {"prediction_type": prediction_type}
    if rescale_betas_zero_snr:
        # At zero terminal SNR sampling must start at the last timestep (Lin et al., 2023); PNDM can't.
        scheduler_class = diffusers.DDIMScheduler
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=None, tokenizer=None,
        scheduler=scheduler_class.from_config(scheduler_config, **changes),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def evaluating(model):
    """Eval mode inside, and the mode it had afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class ValidationSet:
    """Pictures to validate on, from the cache: posterior mean, embedding of the first caption, mask, one row a picture.

    Where prompts are (None, None) there is no embedding: `loss_table` makes it.

    `latents` and `prompts` are what `caching.build` gave for them.
    """

    def __init__(self, images, captions, *, latents, prompts, masked):
        self.images, self.captions, self.masked = images, captions, masked
        (self.latents, self.locations), (self.prompts, self.places) = latents, prompts

    def __len__(self):
        return len(self.images)

    def identity(self):
        """A hash of what the losses depend on, beside the model: pictures, sizes and captions."""
        shapes = [list(self.latents.shape(*self.locations[i, 0].tolist(), "mean")) for i in range(len(self))]
        return fingerprint([image.image_id for image in self.images], [group[:1] for group in self.captions], shapes)

    def __getitem__(self, index):
        at = self.locations[index, 0].tolist()
        row = {
            "mean": self.latents.row(*at, "mean").float(),
        }
        if self.prompts is not None:
            place = self.places[self.captions[index][0]]
            row["encoder_hidden_states"] = self.prompts.row(*place, "hidden_states")
        return row | ({"mask": self.latents.row(*at, "mask").float()} if self.masked else {})


def strata(num_train_timesteps):
    """The midpoints of `STRATA` equal parts of the timesteps."""
    return [(2 * k + 1) * num_train_timesteps // (2 * STRATA) for k in range(STRATA)]


@torch.no_grad()
def loss_table(
    unet, validation_set, *, noise_scheduler, scaling_factor, weight_dtype, seed, accelerator, text_encode=None
):
    """The loss of each picture at each of the `strata`: float64 (pictures, STRATA), the same on every process.

    Each picture is a batch of its own, with noise that depends on (seed, image_id, k) alone: so neither the batch size of
    the training, nor order, nor the number of processes makes a difference.
    """
    from accelerate.utils import gather_object

    device = accelerator.device
    timesteps = torch.tensor(strata(noise_scheduler.config.num_train_timesteps), device=device)
    found = {}
    with evaluating(unet), accelerator.autocast():
        for index in range(accelerator.process_index, len(validation_set), accelerator.num_processes):
            row = validation_set[index]
            if text_encode is not None:
                row["encoder_hidden_states"] = text_encode(validation_set.captions[index][:1])[0]
            row = {name: value.to(device).expand(STRATA, *value.shape) for name, value in row.items()}
            latents, name = row["mean"] * scaling_factor, validation_set.images[index].image_id
            noise = torch.stack([_noise_of(latents.shape[1:], seed, name, k) for k in range(STRATA)]).to(device)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            model_pred = predict(unet, noisy_latents.to(weight_dtype), timesteps, row["encoder_hidden_states"])
            target = target_of(noise_scheduler, latents, noise, timesteps)
            found[index] = loss_of_samples(model_pred, target, row.get("mask")).double().tolist()
    found = {index: losses for part in gather_object([found]) for index, losses in part.items()}
    return np.array([found[index] for index in range(len(validation_set))])


def loss_tables(unet, validation_sets, **how):
    """The `loss_table` of each set."""
    return [loss_table(unet, validation_set, **how) for validation_set in validation_sets]


def _noise_of(shape, seed, image_id, k):
    digest = hashlib.sha256(f"{seed} {image_id} {k}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))


@torch.no_grad()
def generate_images(
    pipeline, prompt_embeds, negative_embeds, *, num_images, seed, resolution, num_inference_steps, guidance_scale,
    accelerator,
):  # fmt: skip
    """`num_images` pictures a prompt, each process its share: {(prompt, k): PIL.Image}, on every process.

    `prompt_embeds` (prompts, 77, D), `negative_embeds` (77, D). Picture k of each prompt has the seed `seed` + k, so it
    stays the same whatever the number of processes.
    """
    from accelerate.utils import gather_object

    tasks = [(prompt, k) for prompt in range(len(prompt_embeds)) for k in range(num_images)]
    device, images = accelerator.device, {}
    was_on = pipeline.vae.device
    pipeline.vae.to(device)
    with evaluating(pipeline.unet), accelerator.autocast():
        for prompt, k in tasks[accelerator.process_index :: accelerator.num_processes]:
            latents = pipeline(
                prompt_embeds=prompt_embeds[prompt : prompt + 1].to(device),
                negative_prompt_embeds=negative_embeds[None].to(device),
                generator=torch.Generator().manual_seed(seed + k),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=resolution,
                width=resolution,
                output_type="latent",
            ).images
            with torch.autocast(device.type, enabled=False):  # some VAEs overflow in float16
                decoded = pipeline.vae.decode(latents.float() / pipeline.vae.config.scaling_factor).sample
            images[prompt, k] = pipeline.image_processor.postprocess(decoded)[0]
    pipeline.vae.to(was_on)
    return {task: image for part in gather_object([images]) for task, image in part.items()}


def step_of(folder):
    """The step of a validation's folder, `step-000100`."""
    return int(folder.name.partition("-")[2])


def save_images(images, prompts, folder):
    """Writes each picture, its prompt in the file, and a sheet of all with their prompts.

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
        image.save(folder / f"prompt-{prompt:02d}-{k}.png", pnginfo=info)
    label_sheet(images, prompts).save(folder / "sheet.png")


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

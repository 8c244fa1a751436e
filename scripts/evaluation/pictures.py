"""Draws the pictures of an evaluation and measures the held-out losses, for `evaluate.py`.

Pictures are drawn as in `infer.py`, and pictures that were already drawn are kept.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from text_to_image_lora.drawing.draw import draw
from text_to_image_lora.drawing.png import describe, repeat_of, save_png
from text_to_image_lora.files import remove_leftovers


OTHERS = "other prompts"
MOST_CHARACTERS = 60  # of a label, in the name of a folder
PROGRESS_SECONDS = 20  # between two messages


class Asked(NamedTuple):
    """A prompt to draw."""

    prompt: str
    group: str  # the concept that the prompt asks for, or `OTHERS`
    triggered: bool  # whether the prompt contains the trigger word
    references: tuple[int, ...] = ()  # indices of the held-out pictures that have this caption


def without_trigger(caption, trigger):
    """Removes the trigger word from a caption, with the commas and spaces around it."""
    rest = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", "", caption, flags=re.IGNORECASE)
    rest = re.sub(r"\s*,(\s*,)*\s*", ", ", re.sub(r"\s+", " ", rest))
    return rest.strip(" ,")


def choose_prompts(captions, concepts, trigger, others, most):
    """Returns the `Asked` of an evaluation.

    They are at most `most` captions of the held-out pictures, evenly spaced, these captions without the trigger word if there
    is one, and the prompts for other things.
    """
    places = {}
    for i, caption in enumerate(captions):
        places.setdefault(caption, []).append(i)
    unique = list(places)
    chosen = [
        unique[i] for i in sorted({*np.linspace(0, len(unique) - 1, min(most, len(unique))).round().astype(int)})
    ]
    asked = [Asked(caption, concepts[places[caption][0]], True, tuple(places[caption])) for caption in chosen]
    plain = {without_trigger(each.prompt, trigger): each.group for each in asked} if trigger else {}
    asked += [Asked(prompt, group, False) for prompt, group in plain.items() if prompt]
    return asked + [Asked(prompt, OTHERS, False) for prompt in dict.fromkeys(others)]


def picture_folder(output_dir, label):
    """Returns the folder for the pictures of a LoRA, which no other label has."""
    name = re.sub(r"[^\w.+-]", "_", label)[:MOST_CHARACTERS]
    if name != label or not name.strip("."):  # another label may become this name; ".." would leave the folder
        name += f"-{hashlib.sha256(label.encode(errors='surrogateescape')).hexdigest()[:8]}"
    return Path(output_dir) / "pictures" / name


def make_drawings(asked, lora, like, num_images):
    """Returns a `Drawing` for each prompt and seed, with the options of `like`; picture k of a prompt has the seed + k."""
    return [
        like._replace(stem=f"{i:03d}-seed{like.seed + k}", prompt=each.prompt, seed=like.seed + k, checkpoint=lora)
        for i, each in enumerate(asked)
        for k in range(num_images)
    ]


def read_drawn(path, drawing, source):
    """Returns the picture at the path, or None if it is damaged or was drawn with other settings or models."""
    try:
        with Image.open(path) as image:
            image.load()
            stored = json.loads(image.info["repeat"])
            picture = image.convert("RGB")
        wanted = repeat_of(drawing, source, None)._asdict()
        return picture if all(stored[part] == wanted[part] for part in ("flags", "sha256", "identities")) else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def draw_all(studio, drawings, folder, source, batch_size, say):
    """Returns the pictures of the drawings, in order, and the number of pictures that were already in the folder.

    New pictures are saved as soon as they are drawn, so that a stopped evaluation can be resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    paths = [folder / f"{drawing.stem}.png" for drawing in drawings]
    images = [read_drawn(path, drawing, source) for path, drawing in zip(paths, drawings, strict=True)]
    missing = [i for i, image in enumerate(images) if image is None]
    reused, reported_at = len(images) - len(missing), time.time()
    for done, drawn in enumerate(draw(studio, [drawings[i] for i in missing], batch_size), 1):
        i = missing[drawn.index]
        paths[i].unlink(missing_ok=True)  # it is damaged or was drawn with other settings
        save_png(drawn.image, paths[i], describe(drawings[i], drawn, source))
        images[i] = drawn.image.convert("RGB")
        if time.time() - reported_at > PROGRESS_SECONDS:
            say(f"drew {done} of {len(missing)} pictures")
            reported_at = time.time()
    return images, reused


def make_loss_meter(studio, base, pictures, *, device, folder, seed):
    """Returns a function that measures the losses (pictures, timesteps) of the studio's models on held-out pictures.

    The losses are those of the training script's validation. `base` is the `BaseModel` of the studio, `pictures` is a
    `PictureSet`, and latents are cached in `folder`.
    """
    import torch
    from accelerate import Accelerator

    from text_to_image_lora.models.latents import LatentEncoder
    from text_to_image_lora.models.prompts import PromptEncoder, choose_num_chunks, count_tokens
    from text_to_image_lora.models.samplers import make_noise_scheduler
    from text_to_image_lora.reports.validation_loss import LossMeter, MeasuredModels, ValidationSet
    from text_to_image_lora.training.caching import Cache
    from text_to_image_lora.training.objective import Diffusion

    pipe, trained, family = studio.pipe, studio.as_trained, base.family
    accelerator = Accelerator(cpu=torch.device(device).type == "cpu", mixed_precision="no")
    dtype = pipe.vae.dtype
    latent_encoder = LatentEncoder(pipe.vae, torch.float32)
    latents, _ = Cache(Path(folder), base, latent_encoder, None).build(pictures, 1, [], accelerator)
    pipe.vae.to(dtype)
    tokenizers = tuple(getattr(pipe, row.tokenizer) for row in family.text_encoders)
    counts = count_tokens(tokenizers[0], pictures.captions)
    num_chunks, _ = choose_num_chunks(
        tokenizers[0], counts, pictures.records["source"], long_prompts=bool(trained.long_prompts)
    )
    prompt_encoder = PromptEncoder(
        family, tokenizers, tuple(getattr(pipe, row.name) for row in family.text_encoders),
        clip_skip=trained.clip_skip or None, num_chunks=max(num_chunks, trained.num_chunks or 1), dtype=dtype,
    )  # fmt: skip
    noise_scheduler = make_noise_scheduler(
        studio.scheduler_config, prediction_type=trained.prediction_type, rescale_betas_zero_snr=bool(trained.zero_snr)
    )
    denoiser = getattr(pipe, family.denoiser)
    models = MeasuredModels(
        family, denoiser, Diffusion(noise_scheduler), latent_encoder.scaling_factor, denoiser.dtype, prompt_encoder
    )
    meter = LossMeter(models, seed=seed, accelerator=accelerator)
    validation_set = ValidationSet(pictures, latents, None)
    return lambda: meter(validation_set)

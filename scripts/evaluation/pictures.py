"""What an evaluation draws, and the losses that it measures beside; `evaluate.py` calls it.

Pictures are drawn as `infer.py` draws them, and those that are there already are taken as they are.
"""

import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from text_to_image_lora.drawing.draw import draw
from text_to_image_lora.drawing.png import describe, repeat_of, save_png


OTHERS = "other prompts"
SAY_EVERY = 20  # seconds


class Asked(NamedTuple):
    """A prompt that is drawn, of what it asks (a concept or `OTHERS`), and whether by its trigger.

    `references` are the numbers of the held-out pictures whose caption it is.
    """

    prompt: str
    group: str
    triggered: bool
    references: tuple[int, ...] = ()


def without_trigger(caption, trigger):
    """The caption less the trigger word, and less the commas and spaces that it leaves."""
    rest = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", "", caption, flags=re.IGNORECASE)
    rest = re.sub(r"\s*,(\s*,)*\s*", ", ", re.sub(r"\s+", " ", rest))
    return rest.strip(" ,")


def choose_prompts(captions, concepts, trigger, others, most):
    """The `Asked` of an evaluation: at most so many captions of the held-out pictures, spread evenly over them, the same
    without the trigger word (where there is one), and the other prompts.
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
    """Where the pictures of a LoRA lie."""
    return Path(output_dir) / "pictures" / re.sub(r"[^\w.+-]", "_", label)


def drawings_of(asked, lora, like, num_images):
    """A `Drawing` for each prompt and seed, prompt by prompt; picture k of each prompt has the seed + k."""
    return [
        like._replace(stem=f"{i:03d}-seed{like.seed + k}", prompt=each.prompt, seed=like.seed + k, checkpoint=lora)
        for i, each in enumerate(asked)
        for k in range(num_images)
    ]


def read_drawn(path, drawing, source):
    """The picture at the path, where it is whole and says that it was drawn so; else None."""
    try:
        with Image.open(path) as image:
            image.load()
            stored = json.loads(image.info["repeat"])
            picture = image.convert("RGB")
        wanted = repeat_of(drawing, source, None)
        return picture if (stored["flags"], stored["sha256"]) == (wanted.flags, wanted.sha256) else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def draw_all(studio, drawings, folder, source, batch_size, say):
    """The pictures of the drawings, in their order, from the folder where they are there, and how many were.

    Those that are drawn are written into the folder as they are done, so that a stopped evaluation goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{drawing.stem}.png" for drawing in drawings]
    images = [read_drawn(path, drawing, source) for path, drawing in zip(paths, drawings, strict=True)]
    missing = [i for i, image in enumerate(images) if image is None]
    reused, told = len(images) - len(missing), time.time()
    for done, drawn in enumerate(draw(studio, [drawings[i] for i in missing], batch_size), 1):
        i = missing[drawn.index]
        paths[i].unlink(missing_ok=True)  # drawn otherwise, or cut off
        save_png(drawn.image, paths[i], describe(drawings[i], drawn, source))
        images[i] = drawn.image.convert("RGB")
        if time.time() - told > SAY_EVERY:
            say(f"{done} of {len(missing)} pictures drawn")
            told = time.time()
    return images, reused


def make_loss_meter(studio, base, pictures, *, device, folder, seed):
    """Measures what the models of the studio lose on held-out pictures: a function without arguments that returns the
    losses (pictures, timesteps), as the training script validates.

    `base` is the package's `BaseModel` of them, `pictures` a `PictureSet`; latents are kept below `folder`.
    """
    import torch
    from accelerate import Accelerator

    from text_to_image_lora.models.latents import LatentEncoder
    from text_to_image_lora.models.loading import make_noise_scheduler
    from text_to_image_lora.models.prompts import PromptEncoder, choose_num_chunks, count_tokens
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

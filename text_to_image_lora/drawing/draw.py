"""Draws pictures: chooses their sizes, divides them into batches, and calls the pipeline."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import NotANumberError, TrainingError
from ..models.samplers import make_sampler
from .find import Given
from .pipeline import Studio
from .rows import Drawing


logger = logging.getLogger(__name__)

TILED_FROM = (
    1280 * 1280
)  # pixels; the VAE decodes larger pictures in tiles, because it would need more than 10 GB otherwise


class Batch(NamedTuple):
    """Pictures that are drawn together, because only their prompts and seeds differ."""

    indices: list[int]  # of the drawings
    sampler: Any
    num_steps: int  # how often the denoiser is called


class Drawn(NamedTuple):
    """A picture that was drawn."""

    index: int  # of its drawing
    image: Any
    sampler: Any
    batch: tuple[int, int]  # the size of its batch and its place in it, on which the rounding depends


def sized(studio: Studio, drawings: Sequence[Drawing]) -> list[Drawing]:
    """Returns the drawings with their sizes set, see `size_of`."""
    side, picture = studio.pipe.unet.config.sample_size, studio.given.image or studio.given.control_image
    own = [s * studio.pipe.vae_scale_factor for s in ((side, side) if isinstance(side, int) else side)]
    sizes = [size_of(drawing, own, picture and picture.size) for drawing in drawings]
    return [
        drawing._replace(height=height, width=width) for drawing, (height, width) in zip(drawings, sizes, strict=True)
    ]


def size_of(drawing: Drawing, own: Sequence[int], shape: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the (height, width) of a drawing in pixels; the values that it does not set are those of the model, `own`.

    With the (width, height) `shape` of a given picture, they are chosen to keep its aspect ratio, at the area of `own`.
    """
    height, width = drawing.height, drawing.width
    if shape is None:
        return height or own[0], width or own[1]

    def whole(side):
        return max(8, round(side / 8) * 8)

    aspect = shape[0] / shape[1]  # width : height
    if height is None:
        height = whole(width / aspect if width else math.sqrt(own[0] * own[1] / aspect))
        width = width or whole(math.sqrt(own[0] * own[1] * aspect))
    return height, width or whole(height * aspect)


def edges_of(image: Any) -> Any:
    """Returns the Canny edges (doi:10.1109/TPAMI.1986.4767851) of a picture, white on black."""
    import kornia
    import numpy as np
    import torch
    from PIL import Image

    grey = torch.from_numpy(np.array(image.convert("L"))).float()[None, None] / 255
    _, edges = kornia.filters.canny(grey)
    return Image.fromarray((edges[0, 0].numpy() * 255).astype(np.uint8)).convert("RGB")


def fitted(given: Given, width: int, height: int) -> Given:
    """Returns the given pictures, scaled and cropped to the size that is drawn, with the Canny edges as control image if asked for."""
    from PIL import Image, ImageOps

    def fit(picture):
        return picture and ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)

    image, control_image = fit(given.image), fit(given.control_image)
    if given.canny:
        control_image = edges_of(control_image or image)
    return Given(image, control_image)


def warn_of_cut_prompts(studio: Studio, drawings: Sequence[Drawing]) -> None:
    """Warns about prompts that the text encoder truncates, because they are not encoded in chunks."""
    if studio.as_trained.long_prompts:
        return
    tokenizer = studio.pipe.tokenizer
    limit = tokenizer.model_max_length
    for prompt in dict.fromkeys(drawing.prompt for drawing in drawings):
        if (tokens := len(tokenizer(prompt).input_ids)) > limit:
            logger.warning("CLIP reads %d of the %d tokens, the end is cut: %s", limit, tokens, prompt)


def batches_of(studio: Studio, drawings: Sequence[Drawing], batch_size: int) -> list[Batch]:
    """Divides the drawings into batches of at most `batch_size` pictures that can be drawn together."""
    groups = {}
    for i, drawing in enumerate(drawings):
        loras = tuple((lora.adapter, lora.scale) for lora in drawing.active_loras())
        # What may differ between the pictures of a batch.
        own = dict(stem="", prompt="", negative_prompt=None, seed=0, loras=(), checkpoint=None, lora_scale=0)
        alike = loras, drawing._replace(**own), studio.encoder.num_chunks(drawing)
        groups.setdefault(alike, []).append(i)
    batches, trained = [], studio.as_trained
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            drawing = drawings[group[first]]
            sampler = make_sampler(
                studio.scheduler_config, drawing.scheduler,
                prediction_type=trained.prediction_type, zero_snr=bool(trained.zero_snr),
            )  # fmt: skip
            batches.append(Batch(group[first : first + batch_size], sampler, _num_steps(sampler, drawing)))
    return batches


def _num_steps(sampler, drawing):
    """Returns how often the denoiser is called for a drawing."""
    sampler.set_timesteps(drawing.num_inference_steps)
    share = 1 if drawing.strength is None else drawing.strength
    skipped = drawing.num_inference_steps - int(drawing.num_inference_steps * share)
    return len(sampler.timesteps) - skipped * sampler.order


@contextlib.contextmanager
def refusing_nan(vae: Any) -> Iterator[None]:
    """Raises `NotANumberError` if the VAE decodes a picture with NaN or infinities, which would be saved as black or white."""

    def check(_, __, pixels):
        if not pixels.isfinite().all():
            raise NotANumberError(
                "the picture is not finite (NaN), because numbers of the models grow too large. Lower the guidance scale or "
                "the strength of the LoRAs, or pass --mixed_precision no."
            )

    handle = vae.decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def draw_batch(
    studio: Studio, drawings: Sequence[Drawing], batch: Batch, on_step: Callable[[Any], Any]
) -> list[Drawn]:
    """Draws the pictures of a batch; calls `on_step(pipeline)` after each step.

    If `on_step` sets the pipeline's `_interrupt`, the remaining steps are skipped and no picture is returned. Raises
    `NotANumberError` if a picture that the pipeline decodes is not finite.
    """
    import torch

    pipe, first = studio.pipe, drawings[batch.indices[0]]
    height, width = first.height or 0, first.width or 0  # `sized` has set both
    pipe.scheduler = batch.sampler
    available = first._asdict() | fitted(studio.given, width, height)._asdict()
    options = {argument: available[name] for argument, name in studio.arguments.items()}
    options |= {"num_inference_steps": first.num_inference_steps, "guidance_scale": first.guidance_scale}
    # Noise that is drawn on the CPU is the same on every device.
    options["generator"] = [torch.Generator("cpu").manual_seed(drawings[i].seed) for i in batch.indices]
    if studio.decode is not None:
        options["output_type"] = "latent"
    elif height * width > TILED_FROM:
        pipe.vae.enable_tiling()
    else:
        pipe.vae.disable_tiling()

    def after_step(pipe, step, timestep, tensors):
        on_step(pipe)
        return tensors

    with studio.use_loras(pipe, first.active_loras()):
        embeds = [studio.encoder(drawings[i]) for i in batch.indices]
        options |= {name: torch.cat([each[name] for each in embeds]) for name in embeds[0]}
        with refusing_nan(pipe.vae) if studio.decode is None else contextlib.nullcontext():
            images = pipe(callback_on_step_end=after_step, **options).images
    if pipe.interrupt:
        return []
    images = images if studio.decode is None else studio.decode(images)
    size = len(batch.indices)
    return [
        Drawn(i, image, batch.sampler, (size, place)) for place, (i, image) in enumerate(zip(batch.indices, images))
    ]


def draw(studio: Studio, drawings: Sequence[Drawing], batch_size: int) -> Iterator[Drawn]:
    """Draws the pictures with a progress bar and yields a `Drawn` for each, batch by batch instead of in their order.

    Raises `TrainingError` if the GPU's memory is too small.
    """
    import torch
    from tqdm import tqdm

    batches = batches_of(studio, drawings, batch_size)
    with tqdm(total=sum(batch.num_steps for batch in batches), unit="step", disable=None) as bar:
        for batch in batches:
            try:
                drawn = draw_batch(studio, drawings, batch, lambda pipe: bar.update())
            except torch.OutOfMemoryError as error:
                first = drawings[batch.indices[0]]
                what = f"{len(batch.indices)} pictures of {first.width}x{first.height} at once"
                raise TrainingError(
                    f"the GPU's memory is too small for {what}. Pass a smaller --batch_size, or --offload."
                ) from error
            yield from drawn

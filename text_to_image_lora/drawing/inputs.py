"""All that the flags of `infer.py` name, found and checked before a model is loaded. Needs no torch."""

import logging
from typing import Any, NamedTuple

from ..command_line import flag_values
from ..models.samplers import NO_ZERO_SNR
from .as_trained import settle
from .find import check_folders, find_base, find_controlnet, find_loras, find_pictures, vae_channels
from .fits import check_controlnet_fits, check_fits
from .grids import Grid, grid_of, plan
from .pipeline import Job
from .prompts import read_prompts
from .rows import SETTINGS, Drawing


logger = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """What is drawn, as far as it is known before a model is loaded."""

    job: Job
    grid: Grid
    drawings: list[Drawing]


def find_inputs(settings: Any) -> Inputs:
    """Finds all that the flags name; raises `InputError` for what can't be drawn, in seconds and without torch."""
    model, pictures = settings.model, settings.pictures
    check_folders(settings.output)
    prompts = read_prompts("--prompt", pictures.prompt or ())
    base = find_base(model)
    loras = find_loras(model)
    controlnet = find_controlnet(model.controlnet) if model.controlnet else None
    if controlnet:
        check_controlnet_fits(controlnet, base.unet_config)
    given = find_pictures(settings.from_pictures)
    grid = grid_of(settings, prompts, loras)

    # What each picture has, unless its prompt or its place in the grid says otherwise.
    values, strengths = flag_values(settings), settings.from_pictures.strengths
    like = Drawing(**{name: values[name] for name in SETTINGS.keys() & values.keys() - {"prompt", "strength"}})
    like = like._replace(loras=loras, strength=strengths[0] if strengths else None)
    drawings = plan(like, grid)

    checkpoints = {drawing.checkpoint.adapter: drawing.checkpoint for drawing in drawings if drawing.checkpoint}
    loras += tuple(checkpoints.values())
    awkward = [drawing.scheduler for drawing in drawings if drawing.scheduler in NO_ZERO_SNR]
    scheduler = awkward[0] if awkward else pictures.scheduler
    as_trained, notes = settle(loras, base, scheduler, clip_skip=pictures.clip_skip, vae=model.vae)
    clip_skip = as_trained.clip_skip or 0
    if base.shapes:
        check_fits(base.shapes, loras, clip_skip, as_trained.vae and vae_channels(as_trained.vae))
    for note in notes:
        logger.warning(note)
    job = Job(base, loras, as_trained, controlnet, given)
    return Inputs(job, grid, [drawing._replace(clip_skip=clip_skip) for drawing in drawings])

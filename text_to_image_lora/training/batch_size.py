"""How many samples a forward pass takes, before anything is encoded."""

import functools
import logging
from typing import Any

from ..errors import InputError, TrainingError
from ..models.lora import trainable_parameters
from . import memory, processes, trials
from .settings import ways_to_save_memory


logger = logging.getLogger(__name__)


def settle(settings: Any, run: Any, models: Any, accelerator: Any) -> trials.Trial:
    """Sets the sampler's batch size, and returns a `Trial` of the run's heaviest batch.

    The size is what the flag says, or for `auto` what the main process finds to fit. On a GPU a step is tried, so that a
    run which doesn't fit ends before anything is encoded, with a `TrainingError`; on a CPU `auto` goes by the estimate.
    """
    batches, device, denoiser = settings.batches, accelerator.device, models.denoiser
    limit = batches.gradient_accumulation_steps if batches.is_auto else batches.batch_size
    index, heaviest = trials.heaviest_batch(run.pictures, run.sampler, limit)
    # A single file says how wide its prompts are only when it is loaded.
    base = run.base._replace(cross_attention_dim=denoiser.config.cross_attention_dim)
    shapes = trials.shapes_of(run.pictures, index, base, run.identity["num_chunks"])
    dtype, autocast = next(denoiser.parameters()).dtype, run.lora.needs_autocast
    trial = trials.Trial(
        base.family, denoiser, trainable_parameters(denoiser), shapes, dtype, device, autocast=autocast
    )
    if batches.is_auto and device.type != "cuda" and base.kind == "file" and base.single_file_config is None:
        raise InputError(
            "--train_batch_size auto needs the base's configuration here: add --single_file_config FOLDER."
        )

    def first_that_fits():
        kept = run.state.batch_size
        sizes = [limit] if not batches.is_auto else trials.even_parts(limit) if kept is None else [kept]
        needs = functools.partial(memory.estimate, base, shapes, memory.plan_of(settings, base, dtype))
        return trials.first_that_fits(trial, device, sizes, heaviest, lambda: needs().further_sample)

    with trials.set_aside(_idle_in_steps(settings, run, models), device):
        found = processes.as_main_says(first_that_fits, accelerator)
    if not found:
        raise TrainingError(
            f"Out of memory: a training step does not fit this device. Try {ways_to_save_memory(settings)}."
        )
    if batches.is_auto:
        run.state.batch_size = found
        logger.info(f"--train_batch_size auto: {found} of a step's {limit} pictures at once")
    run.sampler.batch_size = found
    return trial


def _idle_in_steps(settings, run, models):
    """The models that the steps do without."""
    if not run.variations:
        return []
    encoders = [] if models.trains_text_encoder else [*models.prompt_encoder.text_encoders]
    return encoders + ([] if settings.loss.perceptual_loss == "decoder" else [models.vae])

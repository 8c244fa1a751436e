"""The batch size of the run, settled before anything is encoded."""

import logging
from typing import Any

from ..errors import InputError, TrainingError
from ..models.lora import trainable_parameters
from . import memory, processes, trials
from .settings import ways_to_save_memory


logger = logging.getLogger(__name__)


def settle(settings: Any, run: Any, models: Any, accelerator: Any) -> trials.Trial:
    """Sets the sampler's batch size to the flag's, or for `auto` to what fits, and returns a `Trial` of the heaviest batch.

    On a GPU a training step is tried, so that a run which does not fit raises `TrainingError` before anything is encoded.
    On a CPU `auto` uses the estimate of memory.
    """
    batches, denoiser = settings.batches, models.denoiser
    device = accelerator.device
    limit = batches.gradient_accumulation_steps if batches.is_auto else batches.batch_size
    index, heaviest = trials.heaviest_batch(run.pictures, run.sampler, limit)
    # The width of a single file's prompt embeddings is only known once it is loaded.
    base = run.base._replace(cross_attention_dim=denoiser.config.cross_attention_dim)
    shapes = trials.find_shapes(run.pictures, index, base, run.identity["num_chunks"])
    dtype, autocast = next(denoiser.parameters()).dtype, run.lora.needs_autocast
    trial = trials.Trial(
        base.family, denoiser, trainable_parameters(denoiser), shapes, dtype, device, autocast=autocast,
        most_preserved=settings.preservation.most,
    )  # fmt: skip
    if batches.is_auto and device.type != "cuda" and base.kind == "file" and base.single_file_config is None:
        raise InputError(
            "--train_batch_size auto needs the configuration of the base model here. Add --single_file_config FOLDER."
        )

    def find_size():
        if not batches.is_auto:
            sizes = [limit]
        elif run.state.batch_size is not None:
            sizes = [run.state.batch_size]
        else:
            sizes = trials.candidate_batch_sizes(limit)

        def bytes_per_picture():
            needs = memory.estimate(base, shapes, memory.make_plan(settings, base, dtype))
            return needs.further_sample * (1 + settings.preservation.share)

        return trials.first_that_fits(trial, device, sizes, heaviest, bytes_per_picture)

    with trials.moved_to_cpu(_idle_in_steps(settings, run, models), device):
        size = processes.broadcast_from_main(find_size, accelerator)
    if not size:
        raise TrainingError(
            f"Out of memory: a training step does not fit on this device. Try {ways_to_save_memory(settings)}."
        )
    if batches.is_auto:
        run.state.batch_size = size
        logger.info(f"--train_batch_size auto: {size} of a step's {limit} pictures at once")
    run.sampler.batch_size = size
    return trial


def _idle_in_steps(settings, run, models):
    """The models that training steps do not use."""
    if not run.variations:
        return []
    encoders = [] if models.trains_text_encoder else [*models.prompt_encoder.text_encoders]
    return encoders + ([] if settings.loss.perceptual_loss == "decoder" else [models.vae])

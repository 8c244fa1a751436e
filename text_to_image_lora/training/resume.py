"""A run that is resumed: what its checkpoint holds is put back."""

import functools
import logging
from typing import Any

from ..models import lora
from . import checkpoint, processes


logger = logging.getLogger(__name__)


def load(settings: Any, run: Any, models: Any, learning: Any, accelerator: Any) -> None:
    """Puts back adapters, optimizer, schedule, loss scale and moving average; nothing to do for a run that begins."""
    if run.resume_path is None:
        return
    stored = processes.as_main_says(functools.partial(checkpoint.read_checkpoint, run.resume_path), accelerator)
    adapter = checkpoint.load_checkpoint(stored, learning)
    for name, model in models.adapted.items():
        lora.load_adapter(model, lora.extract_state(adapter, name))
    logger.info(
        checkpoint.where_it_goes_on(stored, learning.lr_scheduler, settings.schedule.lr_scheduler, run.num_steps)
    )

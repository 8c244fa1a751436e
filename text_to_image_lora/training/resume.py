"""Restoring a resumed run from its checkpoint."""

import functools
import logging
from typing import Any

from ..models import lora
from . import checkpoint, processes


logger = logging.getLogger(__name__)


def load(settings: Any, run: Any, models: Any, learning: Any, accelerator: Any) -> None:
    """Restores adapters, optimizer, schedule, loss scale and moving average; does nothing for a new run."""
    if run.resume_path is None:
        return
    read = functools.partial(checkpoint.read_checkpoint, run.resume_path)
    stored = processes.broadcast_from_main(read, accelerator)
    adapter = checkpoint.load_checkpoint(stored, learning)
    for name, model in models.adapted.items():
        with checkpoint.raising_input_errors(run.resume_path):
            lora.load_adapter(model, lora.extract_state(adapter, name))
    schedule_name = settings.schedule.lr_scheduler
    logger.info(checkpoint.describe_resume(stored, learning.lr_scheduler, schedule_name, run.num_steps))

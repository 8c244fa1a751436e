"""Writes the LoRA files and the checkpoints of a run."""

from pathlib import Path
from typing import Any

from ..files import hide_folders
from ..models import lora
from ..training import checkpoint, hub_checkpoints
from .lora_writer import LoraWriter


class Checkpoints:
    """Writes and uploads the checkpoints of a run; its `writer` writes the LoRA files."""

    def __init__(self, settings: Any, run: Any, models: Any, learning: Any, described: dict[str, Any]):
        self.settings, self.run = settings.checkpoints, run
        self.output_dir = Path(settings.run.output_dir)
        self.models, self.learning = models, learning
        self.writer = LoraWriter(
            models.adapted, self.output_dir, hide_folders(described), run.base.family.kohya, run.state.started_at,
            run.sampler.steps_per_epoch, run.pictures.each_once().captions, settings.lora.output_kohya_format,
            settings.lora.kohya_extras, settings.samples.texts,
        )  # fmt: skip
        repository = settings.sharing.repository(settings.run.output_dir)
        uploads = settings.sharing.push_checkpoints_to_hub
        self.uploads = hub_checkpoints.Uploads(repository if uploads else None, settings.sharing.hub_token)

    def save_lora(self, folder: str | Path) -> Any:
        """Writes the current LoRA, see `LoraWriter.write`."""
        return self.writer.write(folder, self.run.state.global_step)

    def due_after(self, step: int) -> bool:
        """Whether a checkpoint is due after an optimizer step."""
        return self.settings.due_after(step)

    def save(self, judge: Any) -> None:
        """Writes a checkpoint with the current LoRA and the best LoRA so far, and starts to upload it."""
        state = self.run.state
        state.validation = judge.state()
        self.uploads.wait()  # the previous checkpoint, which may be deleted now

        def add(folder):
            with self.learning.weights_for_use():
                self.writer.write(folder, state.global_step, verifies=False)
            judge.keep_best(folder)

        states = {name: lora.adapter_state(model)[0] for name, model in self.models.adapted.items()}
        path = checkpoint.write_checkpoint(
            self.output_dir, add, limit=self.settings.checkpoints_total_limit, state=state,
            settings=self.run.identity, adapter=lora.merge_states(states), learning=self.learning,
        )  # fmt: skip
        self.uploads.send(path)

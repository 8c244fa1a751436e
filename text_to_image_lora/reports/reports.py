"""What a run reports and leaves: numbers, validations, sample pictures, LoRA files, checkpoints, the page, trackers."""

import logging
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..command_line import recorded_values
from ..errors import NotANumberError, Stopped
from ..models import lora
from ..training import interruption
from ..training.run import log_beginning
from ..training.settings import ways_to_save_memory
from . import about, dashboard, metrics, model_card, sample_pictures, tracking
from .checkpoints import Checkpoints
from .validation_loss import Judge, LossMeter, ValidationSet


logger = logging.getLogger(__name__)


def start_reports(
    settings: Any, run: Any, models: Any, learning: Any, cached: Any, painter: Any, accelerator: Any
) -> "Reports":
    """Writes what the run is, starts the trackers, and logs what begins."""
    described, metrics_file = about.describe_run(settings, run), None
    output_dir, state = Path(settings.run.output_dir), run.state
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        told = about.write_about_run(settings, run, described, accelerator)
        metrics_file = metrics.MetricsFile(output_dir / "metrics.jsonl", state.global_step, state.due)
        state.tracker_run_id = dashboard.start(
            accelerator, settings.tracking.tracker_project_name, told, output_dir, state.tracker_run_id,
            space_id=settings.tracking.trackio_space_id, first_step=state.global_step,
            given_up=metrics_file.given_up,
        )  # fmt: skip
    num_parameters = sum(parameter.numel() for parameter in learning.parameters)
    log_beginning(settings, run, models, num_parameters, accelerator)
    judge = make_judge(settings, run, models, cached, metrics_file, accelerator)
    checkpoints = Checkpoints(settings, run, models, learning, described)
    return Reports(settings, run, learning, judge, painter, checkpoints, metrics_file, accelerator)


def make_judge(settings: Any, run: Any, models: Any, cached: Any, metrics_file: Any, accelerator: Any) -> Judge:
    """The `Judge` of a run, with what is best so far; without pictures to validate on one that does nothing."""
    sets = [None if part is None else ValidationSet(*part) for part in (cached.held_out, cached.probe)]
    measure = LossMeter(
        models.family, models.denoiser, models.diffusion, scaling_factor=models.scaling_factor, dtype=models.dtype,
        seed=run.seed, accelerator=accelerator,
        prompt_encoder=models.prompt_encoder if models.trains_text_encoder else None,
    )  # fmt: skip
    judge = Judge(
        *sets, measure, accelerator=accelerator, metrics_file=metrics_file, output_dir=settings.run.output_dir,
        patience=settings.validation.early_stopping_patience, kept=run.state.validation,
    )  # fmt: skip
    if run.resume_path is not None and accelerator.is_main_process:
        judge.restore_best(run.resume_path)
    return judge


class Reports:
    """Reports a run while it goes on, and writes what it leaves; alike on all processes but for the files.

    `ending` is the exception that the run ends with, or None for a run that reached its end.
    """

    def __init__(self, settings, run, learning, judge, painter, checkpoints, metrics_file, accelerator):
        self.settings, self.run = settings, run
        self.learning, self.accelerator = learning, accelerator
        self.judge, self.painter = judge, painter
        self.checkpoints, self.metrics_file = checkpoints, metrics_file
        self.output_dir, self.clock = Path(settings.run.output_dir), 0.0
        self.progress = tqdm(
            total=run.num_steps, initial=run.state.global_step, desc="training",
            disable=not accelerator.is_local_main_process,
        )  # fmt: skip
        self.numbers = metrics.StepReports(
            accelerator, metrics_file, self.progress, self.output_dir, ways_to_save_memory(settings)
        )

    def show_base(self, adapted: dict[str, Any]) -> None:
        """Validates and draws the base model, before the first step."""
        step = self.run.state.global_step
        with lora.without_adapters(*adapted.values()):
            self.judge.start()
            if step == 0:
                self.painter.draw(0)
        if step == 0:
            self.judge.validate(0, self.checkpoints.save_lora, is_base=self.settings.lora.lora_weights is None)
        if self.judge.out_of_patience():
            logger.info(f"finished at step {step}; raise --early_stopping_patience to go on")

    def begin(self) -> BaseException | None:
        """Does what was still due when a resumed run was stopped; returns the ending if it is stopped again."""
        ending = interruption.run_until_stopped(self._do_what_is_due, f"after step {self.run.state.global_step}")
        self.numbers.write_page()
        self.clock = time.time()
        return ending

    def goes_on(self) -> bool:
        """Whether there are steps left."""
        return self.run.state.global_step < self.run.num_steps and not self.judge.out_of_patience()

    def step(self, numbers: dict[str, Any], asked_to_stop: Any, num_samples: int) -> BaseException | None:
        """Reports a step that has been made, and does what is due after it; returns the ending of the run, if it ends.

        `numbers` may be on the device: they are read when the next step is under way. `asked_to_stop` says whether one of
        the processes is asked to stop.
        """
        state, now = self.run.state, time.time()
        self.progress.update()
        epoch = state.global_step / self.run.sampler.steps_per_epoch
        values = numbers | {"asked": asked_to_stop, "epoch": epoch}
        self.numbers.put(state.global_step, values, samples=num_samples, seconds=now - self.clock)
        self.clock = now
        state.due, finished = self._due_after(state.global_step), state.global_step == self.run.num_steps
        checkpoint_due = self.checkpoints.due_after(state.global_step)
        pauses = bool(state.due or checkpoint_due)  # which are no part of the training's speed
        if pauses or finished:
            self.numbers.flush()
        where = f"after step {state.global_step}, with a checkpoint"
        ending = self.numbers.trouble(finished) or interruption.run_until_stopped(self._do_what_is_due, where)
        finished = finished or self.judge.out_of_patience()
        if ending is None and not finished and self.numbers.asked:
            ending = interruption.stop_requested_anywhere(where)
        saves = checkpoint_due or (finished and self.settings.checkpoints.checkpointing_steps > 0)
        saves = saves and ending is None and self.numbers.in_a_row < 2
        # The checkpoint comes last, so that what a run resumes after is all there.
        if self.accelerator.is_main_process and (saves or isinstance(ending, Stopped)):
            self.numbers.flush()
            self.checkpoints.save(self.judge)
        if pauses:
            self.numbers.write_page()
            self.clock = time.time()
        return ending

    def _due_after(self, step):
        """What is due after a step: the "loss" of the validation, the "lora" of an epoch, the sample "pictures"."""
        steps_per_epoch, saved = self.run.sampler.steps_per_epoch, self.settings.checkpoints.save_every_n_epochs
        epoch, into_epoch = divmod(step, steps_per_epoch)
        validates = self.settings.validation.due_after(step, steps_per_epoch) or step == self.run.num_steps
        due = ["loss"] if validates else []
        if saved and into_epoch == 0 and epoch % saved == 0:
            due.append("lora")
        return [*due, "pictures"] if validates else due

    def _do_what_is_due(self):
        state, save_lora = self.run.state, self.checkpoints.save_lora
        while state.due:
            with self.learning.weights_for_use():
                if state.due[0] == "loss":
                    self.judge.validate(state.global_step, save_lora)
                elif state.due[0] == "lora" and self.accelerator.is_main_process:
                    epoch = state.global_step // self.run.sampler.steps_per_epoch
                    save_lora(self.output_dir / f"epoch-{epoch:04d}")
                elif state.due[0] == "pictures":
                    self.painter.draw(state.global_step)
            del state.due[0]

    def leave(self, ending: BaseException | None, started: float) -> list[str]:
        """Writes the LoRA and its card, or the last good weights; returns the names of the LoRA files.

        `started` is the time at which the command was started.
        """
        self.progress.close()
        files = []
        if ending is None and (line := self.judge.in_words(self.run.state.global_step)) is not None:
            logger.info(line)
        if self.accelerator.is_main_process and isinstance(ending, NotANumberError):
            with self.learning.weights_for_use():
                self.checkpoints.save_lora(self.output_dir / metrics.LAST_GOOD)
        if self.accelerator.is_main_process and ending is None:
            with self.learning.weights_for_use():
                weights_file, kohya_file, arrives = self.checkpoints.save_lora(self.output_dir)
            card = self._write_card(kohya_file)
            logger.info(arrives)
            logger.info(f"LoRA: {weights_file}  (model card: {card}, {time.time() - started:.0f} s)")
            files = [path.name for path in (weights_file, kohya_file) if path is not None]
        self.numbers.leave(ending)
        # The others leave when all is written.
        self.accelerator.wait_for_everyone()
        return files

    def _write_card(self, kohya_file):
        settings, data = self.settings, self.settings.data
        return model_card.write_model_card(
            self.output_dir, base_model=settings.base.pretrained_model_name_or_path,
            repo_id=settings.sharing.hub_model_id,
            dataset_names=[data.dataset_name] if data.dataset_name else [*data.train_data_dir],
            pictures=sample_pictures.latest_images(self.output_dir, settings.samples.texts),
            hyperparameters=recorded_values(settings), kohya_file=kohya_file and kohya_file.name,
            family=self.run.base.family,
        )  # fmt: skip

    def close(self) -> None:
        """Ends the trackers and waits for the uploads."""
        tracking.finish_trackers(self.accelerator)
        self.checkpoints.uploads.wait()

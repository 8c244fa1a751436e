"""Reports on a run while it trains, and writes its results."""

import logging
import time
from pathlib import Path
from typing import Any

from ..errors import NotANumberError, Stopped
from ..models import lora
from ..training import interruption
from ..training.inputs import concept_of_run
from ..training.processes import broadcast_from_main
from ..training.run import log_beginning
from ..training.settings import ways_to_save_memory
from . import about, caption_check, dashboard, metrics, model_card, sample_pictures, tracking
from .checkpoints import Checkpoints
from .progress import Pauses, StepResolutions, TrainingBar
from .validation_loss import Judge, JudgedSets, LossMeter, MeasuredModels, ValidationSet


logger = logging.getLogger(__name__)


def start_reports(
    settings: Any, run: Any, models: Any, learning: Any, cached: Any, painter: Any, accelerator: Any
) -> "RunReports":
    """Writes the description of the run, starts the trackers, and logs the start of training."""
    described, metrics_file = about.describe_run(settings, run), None
    output_dir, state = Path(settings.run.output_dir), run.state
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        caption_check.discard_later(output_dir, state.global_step)
        description = about.write_about_run(settings, run, described, accelerator)
        metrics_file = metrics.MetricsFile(output_dir / "metrics.jsonl", state.global_step, state.due)
        state.tracker_run_id = dashboard.start(
            accelerator, settings.tracking.tracker_project_name, description, output_dir,
            tracking.LoggedProgress(state.global_step, metrics_file.discarded, state.tracker_run_id),
            settings.tracking.trackio_space_id,
        )  # fmt: skip
    num_parameters = sum(parameter.numel() for parameter in learning.parameters)
    log_beginning(settings, run, models, num_parameters, accelerator)
    measured = MeasuredModels(
        models.family, models.denoiser, models.diffusion, models.scaling_factor, models.dtype,
        models.prompt_encoder if models.trains_text_encoder else None, tuple(models.adapted.values()),
    )  # fmt: skip
    judge = make_judge(settings, run, measured, cached, metrics_file, accelerator)
    captions = None
    if settings.validation.check_captions:
        captions = caption_check.CaptionCheck(
            cached.training, measured, run, accelerator=accelerator, output_dir=output_dir
        )
    checkpoints = Checkpoints(settings, run, models, learning, described)
    return RunReports(settings, run, judge, captions, painter, checkpoints, accelerator)


def make_judge(
    settings: Any, run: Any, measured: MeasuredModels, cached: Any, metrics_file: Any, accelerator: Any
) -> Judge:
    """Makes the `Judge` of a run and restores its state; without validation pictures, the judge does nothing."""
    held_out, probe = (None if part is None else ValidationSet(*part) for part in (cached.held_out, cached.probe))
    remove_concept = concept_of_run(settings, run.pictures.records)
    without_concept = None if held_out is None or remove_concept is None else held_out.with_captions(remove_concept)
    judge = Judge(
        JudgedSets(held_out, probe, without_concept), LossMeter(measured, seed=run.seed, accelerator=accelerator),
        settings.validation, accelerator=accelerator, metrics_file=metrics_file, output_dir=settings.run.output_dir,
    )  # fmt: skip
    judge.restore(run.state.validation)
    if run.resume_path is not None and accelerator.is_main_process:
        judge.restore_best(run.resume_path)
    return judge


class RunReports:
    """Reports on a run while it trains, and writes its results; only the main process writes files.

    `ending` is the exception that the run ends with, or None for a run that has completed all steps.
    """

    def __init__(self, settings, run, judge, captions, painter, checkpoints, accelerator):
        self.settings, self.run = settings, run
        self.accelerator, self.checkpoints = accelerator, checkpoints
        self.learning = checkpoints.learning
        self.judge, self.painter = judge, painter
        self.captions = captions  # a `CaptionCheck`, or None
        self.output_dir, self.clock = Path(settings.run.output_dir), 0.0
        self.progress: Any = None
        self.pauses = self._plan_pauses()
        self.metrics = metrics.StepMetrics(
            accelerator, judge.metrics_file, run.num_steps, self.output_dir, ways_to_save_memory(settings), self.pauses,
            StepResolutions(run.sampler, run.pictures.sizes, settings.sizes.sides(run.base)),
        )  # fmt: skip

    def _plan_pauses(self):
        """Returns the `Pauses` of the whole run."""
        steps = [step for step in range(1, self.run.num_steps + 1) if "loss" in self._due_after(step)]
        if self.judge.held_out is None:
            return Pauses(steps if self.painter.drawings else (), ("set", " of sample pictures"))
        return Pauses(steps, ("validation", " with sample pictures" if self.painter.drawings else ""))

    def show_base(self, adapted: dict[str, Any]) -> None:
        """Validates the base model and draws its sample pictures, before the first step."""
        step = self.run.state.global_step
        with lora.without_adapters(*adapted.values()):
            self.judge.start()
            began = time.monotonic()
            if step == 0:
                self.painter.draw(0)
        if step == 0:
            self.judge.validate(0, self.checkpoints.save_lora, is_base=self.settings.lora.lora_weights is None)
            self.pauses.record(0, time.monotonic() - began)

    def begin(self) -> BaseException | None:
        """Finishes what was due at the step where a resumed run stopped; returns the ending if it is stopped again.

        The bar of the training steps begins here, after the base model was validated.
        """
        if self.captions is not None and self.run.state.global_step >= self.captions.step:
            self._check_captions_late()
        ending = interruption.run_until_stopped(self._do_what_is_due, f"after step {self.run.state.global_step}")
        self.metrics.write_page()
        self.pauses.done = self.run.state.global_step
        if ending is None:
            self.metrics.progress = self.progress = TrainingBar(
                self.pauses, total=self.run.num_steps, initial=self.run.state.global_step, desc="training",
                disable=not self.accelerator.is_local_main_process,
                # Where steps of several resolutions alternate, only the mean speed of all is steady.
                smoothing=0 if len(self.metrics.pace.resolutions.shares) > 1 else 0.3,
            )  # fmt: skip
        self.clock = time.monotonic()
        return ending

    def _check_captions_late(self):
        """Lets a run that is resumed with --check_captions check them, unless it did so before."""
        done, state = broadcast_from_main(self.captions.is_done, self.accelerator), self.run.state
        if not done and "captions" not in state.due:
            state.due.append("captions")

    def has_steps_left(self) -> bool:
        """Returns whether the run needs another step."""
        return self.run.state.global_step < self.run.num_steps and not self.judge.out_of_patience()

    def step(self, numbers: dict[str, Any], asked_to_stop: Any, num_samples: int) -> BaseException | None:
        """Reports a completed step and does what is due after it; returns the ending of the run if it ends here.

        `numbers` and `asked_to_stop`, whether any process was asked to stop, may be tensors: they are read a step later.
        """
        state, now = self.run.state, time.monotonic()
        self.progress.update()
        epoch = state.global_step / self.run.sampler.steps_per_epoch
        values = numbers | {"asked": asked_to_stop, "epoch": epoch}
        self.metrics.put(state.global_step, values, samples=num_samples, seconds=now - self.clock)
        self.clock = now
        state.due, finished = self._due_after(state.global_step), state.global_step == self.run.num_steps
        checkpoint_due = self.checkpoints.due_after(state.global_step)
        validated = "loss" in state.due
        pauses = bool(state.due or checkpoint_due)  # pauses do not count towards the speed of training
        if pauses or finished:
            self.metrics.flush()
        where = f"after step {state.global_step}, with a checkpoint"
        ending = self.metrics.divergence(finished) or interruption.run_until_stopped(self._do_what_is_due, where)
        finished = finished or self.judge.out_of_patience()
        if ending is None and not finished and self.metrics.stop_requested:
            ending = interruption.stop_requested_anywhere(where)
        saves = checkpoint_due or (finished and self.settings.checkpoints.checkpointing_steps > 0)
        saves = saves and ending is None and self.metrics.skipped_in_a_row < 2
        # The checkpoint comes last, so that everything due at its step is complete when the run is resumed.
        if self.accelerator.is_main_process and (saves or isinstance(ending, Stopped)):
            self.metrics.flush()
            self.checkpoints.save(self.judge)
        if pauses:
            self.metrics.write_page()
            self.clock = time.monotonic()
            if validated:
                self.pauses.record(state.global_step, self.clock - now)
            self.progress.leave_out(self.clock - now)
        return ending

    def _due_after(self, step):
        """Lists what is due after a step: "loss" (validation), "lora" (saving an epoch's LoRA), sample "pictures", "captions"."""
        steps_per_epoch = self.run.sampler.steps_per_epoch
        save_every = self.settings.checkpoints.save_every_n_epochs
        epoch, into_epoch = divmod(step, steps_per_epoch)
        validates = self.settings.validation.due_after(step, steps_per_epoch) or step == self.run.num_steps
        due = ["loss"] if validates else []
        if save_every and into_epoch == 0 and epoch % save_every == 0:
            due.append("lora")
        if validates:
            due.append("pictures")
        if self.captions is not None and step == self.captions.step:
            due.append("captions")
        return due

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
                elif state.due[0] == "captions" and self.captions is not None:
                    self.captions.run(state.global_step)
            del state.due[0]

    def leave(self, ending: BaseException | None, started: float) -> list[str]:
        """Writes the LoRA and its model card, or the last finite weights; returns the names of the LoRA files.

        `started` is the time at which the command was started.
        """
        if self.progress is not None:
            self.progress.close()
        files = []
        if ending is None:
            step = self.run.state.global_step
            preserves = self.settings.preservation.preserves
            lines = (
                self.judge.describe_early_stop(step, self.run.num_steps), self.judge.summarize(step),
                self.judge.advise(preserves=preserves),
            )  # fmt: skip
            for line in filter(None, lines):
                logger.info(line)
        if self.accelerator.is_main_process and isinstance(ending, NotANumberError):
            with self.learning.weights_for_use():
                self.checkpoints.save_lora(self.output_dir / metrics.LAST_GOOD)
        if self.accelerator.is_main_process and ending is None:
            with self.learning.weights_for_use():
                weights_file, kohya_file, verified = self.checkpoints.save_lora(self.output_dir)
            card = self._write_card(kohya_file)
            logger.info(verified)
            since = " since the run was resumed" if self.run.resume_path is not None else ""
            logger.info(f"LoRA: {weights_file}  (model card: {card}, {time.monotonic() - started:.0f} s{since})")
            files = [path.name for path in (weights_file, kohya_file) if path is not None]
        self.metrics.leave(ending)
        # The other processes wait until everything is written.
        self.accelerator.wait_for_everyone()
        return files

    def _write_card(self, kohya_file):
        settings, data = self.settings, self.settings.data
        listed = model_card.settings_that_matter(settings) | {"hub_model_id": settings.sharing.hub_model_id}
        names = [data.dataset_name] if data.dataset_name else [*data.train_data_dir]
        sources = model_card.Sources(settings.base.pretrained_model_name_or_path, names, self.run.base.family)
        return model_card.write_model_card(
            self.output_dir, sources, pictures=sample_pictures.latest_images(self.output_dir, settings.samples.texts),
            hyperparameters=listed, kohya_file=kohya_file and kohya_file.name, result=model_card.describe_result(self.run.state.global_step, self.judge.validation),
        )  # fmt: skip

    def close(self) -> None:
        """Ends the trackers and waits for the uploads."""
        tracking.finish_trackers(self.accelerator)
        self.checkpoints.uploads.wait()

"""Measures the loss on held-out pictures relative to the base model, and keeps the best LoRA.

Validation uses the models in memory, and does not change the random numbers of training.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..files import written_whole
from ..models.lora import without_adapters
from ..models.modules import evaluating
from ..pictures.records import fingerprint
from ..training import interruption
from ..training.objective import loss_of_samples
from . import stopping
from .dashboard import log_numbers
from .progress import work_bar
from .settings import ValidationSettings


logger = logging.getLogger(__name__)
STRATA = 8  # number of timesteps at which each picture is validated


class ValidationSet:
    """Validation pictures from the cache, each as its posterior mean, mask, and the condition of its first caption.

    `latents` and `prompts` are what `Cache.build` returned for them; without `prompts`, `LossMeter` encodes the captions.
    """

    def __init__(self, pictures: Any, latents: Any, prompts: Any):
        self.pictures, self.latents, self.prompts = pictures, latents, prompts

    def with_captions(self, change: Callable[[str], str]) -> "ValidationSet":
        """Returns the set with other captions, which must be in the cache if any are."""
        captions = [[change(group[0])] for group in self.pictures.captions]
        return ValidationSet(replace(self.pictures, captions=captions), self.latents, self.prompts)

    def select(self, indices: Sequence[int]) -> "ValidationSet":
        """Returns the set of the pictures at these indices, in this order."""
        return ValidationSet(self.pictures.select(indices), self.latents.select(indices), self.prompts)

    def __len__(self):
        return len(self.pictures)

    def caption(self, index: int) -> str:
        return self.pictures.captions[index][0]

    def identity(self) -> str:
        """Returns a hash of the pictures, sizes and captions, on which the losses depend."""
        shapes = [list(self.latents.shape(index)) for index in range(len(self))]
        return fingerprint(self.pictures.content_ids, [group[:1] for group in self.pictures.captions], shapes)

    def row(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Returns "mean" (C, h, w) and, for a picture with a mask, "mask" (1, h, w), and the conditions of the picture."""
        row, condition = self.latents.row(index, 0)
        del row["std"]
        return row, condition

    def of_caption(self, caption: str) -> dict[str, torch.Tensor]:
        """Returns the conditions of a caption that is in the cache; {} if captions are not cached."""
        return {} if self.prompts is None else self.prompts.row(caption)


def strata(num_train_timesteps: int) -> list[int]:
    """Returns the midpoints of `STRATA` equal parts of the timesteps."""
    return [(2 * k + 1) * num_train_timesteps // (2 * STRATA) for k in range(STRATA)]


class MeasuredModels(NamedTuple):
    """The models whose predictions are measured."""

    family: Any
    denoiser: torch.nn.Module
    diffusion: Any
    scaling_factor: float  # of the VAE
    dtype: torch.dtype  # of the denoiser's inputs
    prompt_encoder: Any = None  # None if captions are cached
    adapted: tuple[torch.nn.Module, ...] = ()  # those with a LoRA

    def predict(self, caption: str, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: dict) -> Any:
        """Returns the prediction for noisy latents (N, C, h, w) of one picture; `condition` has no batch dimension."""
        if self.prompt_encoder is not None:
            condition = condition | {name: value[0] for name, value in self.prompt_encoder([caption]).items()}
        condition = {name: _repeat(value, timesteps) for name, value in condition.items()}
        return self.family.predict(self.denoiser, noisy_latents.to(self.dtype), timesteps, **condition)


class LossMeter:
    """Measures the loss of models: the same numbers for the same weights, on any number of processes."""

    def __init__(self, models: MeasuredModels, *, seed: int, accelerator: Any, timesteps: list[int] | None = None):
        self.models, self.seed, self.accelerator = models, seed, accelerator
        self.timesteps = timesteps or strata(models.diffusion.num_train_timesteps)

    def __call__(self, validation_set: ValidationSet) -> np.ndarray:
        """Returns the losses at each of the timesteps, float64 of shape (pictures, timesteps), on every process."""
        return self._measure(validation_set, "validating", self._loss)

    def drift(self, validation_set: ValidationSet) -> np.ndarray:
        """Returns the mean squared differences from the base model's predictions, in the shape of losses."""
        return self._measure(validation_set, "measuring the drift", self._difference_from_base)

    def with_captions(self, validation_set: ValidationSet, captions: Sequence[Sequence[str]]) -> np.ndarray:
        """Returns the losses of each picture with equally many other captions, of shape (pictures, captions, timesteps)."""

        def losses(sample):
            others = [sample._replace(caption=caption) for caption in captions[sample.index]]
            return [self._loss(other) for other in others]

        return self._measure(validation_set, "checking captions", losses)

    def _predict(self, sample):
        condition = sample.condition | sample.of_caption(sample.caption)
        return self.models.predict(sample.caption, sample.noisy_latents, sample.timesteps, condition)

    def _loss(self, sample):
        target = self.models.diffusion.target(sample.latents, sample.noise, sample.timesteps)
        return loss_of_samples(self._predict(sample), target, sample.mask).cpu().double().tolist()

    def _difference_from_base(self, sample):
        model_pred = self._predict(sample)
        with without_adapters(*self.models.adapted):
            target = self._predict(sample)
        return loss_of_samples(model_pred, target, None).cpu().double().tolist()  # what is outside a mask changes too

    @torch.no_grad()
    def _measure(self, validation_set, title, measure):
        """Each picture is a batch of its own with noise that depends only on (seed, image_id, k), so that the results do not
        depend on the batch size of training, the order of the pictures or the number of processes.
        """
        from accelerate.utils import gather_object

        models, device, found = self.models, self.accelerator.device, {}
        timesteps = torch.tensor(self.timesteps, device=device)
        mine = range(self.accelerator.process_index, len(validation_set), self.accelerator.num_processes)
        bar = work_bar(self.accelerator, len(mine), title)
        with evaluating(models.denoiser), self.accelerator.autocast(), bar:
            for index in mine:
                if interruption.stop_requested():
                    break
                row, condition = validation_set.row(index)
                row = {name: _repeat(value, timesteps) for name, value in row.items()}
                latents = row["mean"] * models.scaling_factor
                image_id = validation_set.pictures.facts[index].image_id
                noise = [_make_noise(latents.shape[1:], self.seed, image_id, k) for k in range(len(timesteps))]
                noise = torch.stack(noise).to(device)
                noisy_latents = models.diffusion.add_noise(latents, noise, timesteps)
                found[index] = measure(
                    Sample(
                        index, validation_set.caption(index), condition, latents, noise, noisy_latents, timesteps,
                        row.get("mask"), validation_set.of_caption,
                    )
                )  # fmt: skip
                bar.update()
        interruption.stop_together("in a validation")
        found = {index: losses for part in gather_object([found]) for index, losses in part.items()}
        return np.array([found[index] for index in range(len(validation_set))])


class Sample(NamedTuple):
    """A picture with its noise at each of the timesteps."""

    index: int
    caption: str
    condition: dict[str, torch.Tensor]  # of the picture
    latents: torch.Tensor  # (timesteps, C, h, w)
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    mask: torch.Tensor | None
    of_caption: Callable[[str], dict[str, torch.Tensor]]  # the conditions of a caption


def _repeat(value, timesteps):
    return value.to(timesteps.device).expand(len(timesteps), *value.shape)


def _make_noise(shape, seed, image_id, k):
    digest = hashlib.sha256(f"{seed} {image_id} {k}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))


class JudgedSets(NamedTuple):
    """The `ValidationSet`s of a run; None without validation pictures."""

    held_out: Any
    probe: Any  # equally many training pictures
    without_concept: Any  # held out, with captions without the concept; None if it is not known


class Judge:
    """Validates a run: logs the losses, keeps the best LoRA in `best/`, and decides when to stop early.

    If `sets.held_out` is None, all methods do nothing.
    """

    def __init__(
        self, sets: "JudgedSets", measure: LossMeter, settings: ValidationSettings, *, accelerator: Any, metrics_file: Any,
        output_dir: str | Path,
    ):  # fmt: skip
        self.held_out, self.probe, self.without_concept = sets
        self.measure = measure
        self.accelerator, self.metrics_file = accelerator, metrics_file
        self.output_dir = Path(output_dir)
        self.patience, self.max_drift = settings.early_stopping_patience, settings.max_drift
        self.validation: Any = None  # a `Validation` after `restore` or `start`
        self.identities = [] if self.held_out is None else [self.held_out.identity(), self.probe.identity()]

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restores what `state` returned, unless the validation pictures have changed since."""
        if self.held_out is None or state is None:
            return
        if state.get("pictures") == self.identities:
            self.validation = stopping.restore(state)
        else:
            logger.info("the validation pictures have changed: the best step is determined anew")

    def start(self) -> None:
        """Measures the base model, unless its losses were restored; the LoRA must be disabled."""
        if self.held_out is None or self.validation is not None:
            return
        base, probe = (self.measure(part).tolist() for part in (self.held_out, self.probe))
        self.validation = stopping.Validation(base=base, base_probe=probe, best=base, pictures=self.identities)

    def validate(self, step: int, save_lora: Callable[[Path], Any], *, is_base: bool = False) -> None:
        """Measures and logs the loss at this step; saves the LoRA to best/ if it is the best so far and not `is_base`."""
        if self.held_out is None:
            return
        table, probe = self.measure(self.held_out), self.measure(self.probe)
        values = stopping.make_metrics(table, probe, self.validation, self.measure.timesteps)
        drift = None
        if self.without_concept is not None:
            differences = np.zeros_like(table) if is_base else self.measure.drift(self.without_concept)
            drift = float(stopping.relative(differences, self.validation.base).mean())
            values["validation/drift"] = drift
        allowed = drift is None or self.max_drift is None or drift <= self.max_drift
        improved = not is_base and stopping.update_best(self.validation, table, step, drift=drift, allowed=allowed)
        values |= stopping.metrics_of_best(self.validation)
        if self.accelerator.is_main_process:
            self.metrics_file.write(step, values)
            if improved:
                with written_whole(self.output_dir / "best", folder=True) as folder:
                    save_lora(folder)
            elif self.validation.best_step is None:  # best/ is of an earlier run
                shutil.rmtree(self.output_dir / "best", ignore_errors=True)
        log_numbers(self.accelerator, values, step)

    def out_of_patience(self) -> bool:
        """Returns whether the run is to stop early."""
        return self.patience is not None and self.validation is not None and self.validation.waited >= self.patience

    def describe_early_stop(self, step: int, num_steps: int) -> str | None:
        """Says why the run stopped before its last step; None if it did not stop early."""
        if self.patience is None or step >= num_steps or not self.out_of_patience():
            return None
        return stopping.describe_early_stop(step, num_steps, self.patience)

    def state(self) -> dict[str, Any] | None:
        """Returns the state for a checkpoint; None without validation pictures."""
        return None if self.validation is None else asdict(self.validation)

    def keep_best(self, folder: str | Path) -> None:
        """Copies best/ into a checkpoint, if there is a best LoRA."""
        if self.validation is not None and self.validation.best_step is not None:
            _copy_best(self.output_dir, folder)

    def restore_best(self, folder: str | Path) -> None:
        """Restores the best/ of a checkpoint, as the one in the output folder may be of a later step."""
        if self.validation is not None:
            shutil.rmtree(self.output_dir / "best", ignore_errors=True)
            _copy_best(folder, self.output_dir)

    def summarize(self, step: int) -> str | None:
        """Summarizes the validations in one sentence, for the end of the run; None without validation pictures."""
        return None if self.validation is None else stopping.summarize(self.validation, step, self.max_drift)

    def advise(self, *, preserves: bool) -> str | None:
        """Returns advice about the drift of the best step, or None."""
        if self.validation is None:
            return None
        return stopping.advise_on_drift(self.validation.best_drift, preserves=preserves)


def _copy_best(source, target):
    if (Path(source) / "best").is_dir():
        with written_whole(Path(target) / "best", folder=True) as folder:
            shutil.copytree(Path(source) / "best", folder, dirs_exist_ok=True)

"""Measures the loss on held-out pictures relative to the base model, and keeps the best LoRA.

Validation uses the models in memory, and does not change the random numbers of training.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..files import written_whole
from ..models.modules import evaluating
from ..pictures.records import fingerprint
from ..training import interruption
from ..training.objective import loss_of_samples
from . import stopping
from .dashboard import log_numbers


logger = logging.getLogger(__name__)
STRATA = 8  # number of timesteps at which each picture is validated


class ValidationSet:
    """Validation pictures from the cache, each as its posterior mean, mask, and the condition of its first caption.

    `latents` and `prompts` are what `Cache.build` returned for them; without `prompts`, `LossMeter` encodes the captions.
    """

    def __init__(self, pictures: Any, latents: Any, prompts: Any):
        self.pictures, self.latents, self.prompts = pictures, latents, prompts

    def __len__(self):
        return len(self.pictures)

    def caption(self, index: int) -> str:
        return self.pictures.captions[index][0]

    def identity(self) -> str:
        """Returns a hash of the pictures, sizes and captions, on which the losses depend."""
        shapes = [list(self.latents.shape(index)) for index in range(len(self))]
        names = [fact.image_id for fact in self.pictures.facts]
        return fingerprint(names, [group[:1] for group in self.pictures.captions], shapes)

    def __getitem__(self, index):
        row, condition = self.latents.row(index, 0)
        del row["std"]
        if self.prompts is not None:
            condition |= self.prompts.row(self.caption(index))
        return row | {"condition": condition}


def strata(num_train_timesteps: int) -> list[int]:
    """Returns the midpoints of `STRATA` equal parts of the timesteps."""
    return [(2 * k + 1) * num_train_timesteps // (2 * STRATA) for k in range(STRATA)]


class MeasuredModels(NamedTuple):
    """The models whose loss is measured."""

    family: Any
    denoiser: torch.nn.Module
    diffusion: Any
    scaling_factor: float  # of the VAE
    dtype: torch.dtype  # of the denoiser's inputs
    prompt_encoder: Any = None  # None if captions are cached


class LossMeter:
    """Measures the loss of models: the same numbers for the same weights, on any number of processes."""

    def __init__(self, models: MeasuredModels, *, seed: int, accelerator: Any):
        self.models, self.seed, self.accelerator = models, seed, accelerator
        self.timesteps = strata(models.diffusion.num_train_timesteps)

    @torch.no_grad()
    def __call__(self, validation_set: ValidationSet) -> np.ndarray:
        """Returns the losses at each of the `strata`, float64 of shape (pictures, STRATA), on every process.

        Each picture is a batch of its own with noise that depends only on (seed, image_id, k), so that the losses do not
        depend on the batch size of training, the order of the pictures or the number of processes.
        """
        from accelerate.utils import gather_object

        models, device, found = self.models, self.accelerator.device, {}
        timesteps = torch.tensor(self.timesteps, device=device)

        def repeat(value):
            return value.to(device).expand(STRATA, *value.shape)

        with evaluating(models.denoiser), self.accelerator.autocast():
            for index in range(self.accelerator.process_index, len(validation_set), self.accelerator.num_processes):
                if interruption.stop_requested():
                    break
                row = validation_set[index]
                condition = row.pop("condition")
                if models.prompt_encoder is not None:
                    encoded = models.prompt_encoder([validation_set.caption(index)])
                    condition |= {name: value[0] for name, value in encoded.items()}
                condition = {name: repeat(value) for name, value in condition.items()}
                row = {name: repeat(value) for name, value in row.items()}
                latents = row["mean"] * models.scaling_factor
                image_id = validation_set.pictures.facts[index].image_id
                noise = [_make_noise(latents.shape[1:], self.seed, image_id, k) for k in range(STRATA)]
                noise = torch.stack(noise).to(device)
                noisy_latents = models.diffusion.add_noise(latents, noise, timesteps).to(models.dtype)
                model_pred = models.family.predict(models.denoiser, noisy_latents, timesteps, **condition)
                target = models.diffusion.target(latents, noise, timesteps)
                found[index] = loss_of_samples(model_pred, target, row.get("mask")).cpu().double().tolist()
        interruption.stop_together("in a validation")
        found = {index: losses for part in gather_object([found]) for index, losses in part.items()}
        return np.array([found[index] for index in range(len(validation_set))])


def _make_noise(shape, seed, image_id, k):
    digest = hashlib.sha256(f"{seed} {image_id} {k}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))


class Judge:
    """Validates a run: logs the losses, keeps the best LoRA in `best/`, and decides when to stop early.

    `held_out` and `probe`, equally many training pictures, are `ValidationSet`s. If they are None, all methods do nothing.
    """

    def __init__(
        self, held_out: Any, probe: Any, measure: LossMeter, *, accelerator: Any, metrics_file: Any,
        output_dir: str | Path, patience: int | None,
    ):  # fmt: skip
        self.held_out, self.probe = held_out, probe
        self.measure = measure
        self.accelerator, self.metrics_file = accelerator, metrics_file
        self.output_dir = Path(output_dir)
        self.patience = patience
        self.validation: Any = None  # a `Validation` after `restore` or `start`
        self.identities = [] if held_out is None else [held_out.identity(), probe.identity()]

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restores what `state` returned, unless the validation pictures have changed since."""
        if self.held_out is None or state is None:
            return
        if state.get("pictures") == self.identities:
            self.validation = stopping.Validation(**state)
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
        improved = not is_base and stopping.update_best(self.validation, table, step)
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
        return None if self.validation is None else stopping.summarize(self.validation, step)


def _copy_best(source, target):
    if (Path(source) / "best").is_dir():
        with written_whole(Path(target) / "best", folder=True) as folder:
            shutil.copytree(Path(source) / "best", folder, dirs_exist_ok=True)

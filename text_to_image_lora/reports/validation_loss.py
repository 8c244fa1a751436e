"""The loss on pictures that are not trained on, relative to the base model's; the best LoRA is kept.

The models in memory are used, and the training's random numbers are left alone.
"""

import hashlib
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

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
STRATA = 8  # timesteps at which each picture is validated


class ValidationSet:
    """Pictures to validate on, from the cache: posterior mean, condition of the first caption, mask, one row a picture.

    `latents` and `prompts` are what `Cache.build` gave for them. Where prompts are None, only the picture's own condition
    is there: `loss_table` makes the caption's.
    """

    def __init__(self, pictures, latents, prompts):
        self.pictures, self.latents, self.prompts = pictures, latents, prompts

    def __len__(self):
        return len(self.pictures)

    def caption(self, index):
        return self.pictures.captions[index][0]

    def identity(self):
        """A hash of what the losses depend on, beside the model: pictures, sizes and captions."""
        shapes = [list(self.latents.shape(index)) for index in range(len(self))]
        names = [fact.image_id for fact in self.pictures.facts]
        return fingerprint(names, [group[:1] for group in self.pictures.captions], shapes)

    def __getitem__(self, index):
        row, condition = self.latents.row(index, 0)
        del row["std"]
        if self.prompts is not None:
            condition |= self.prompts.row(self.caption(index))
        return row | {"condition": condition}


def strata(num_train_timesteps):
    """The midpoints of `STRATA` equal parts of the timesteps."""
    return [(2 * k + 1) * num_train_timesteps // (2 * STRATA) for k in range(STRATA)]


class LossMeter:
    """Measures the loss of the models in training: the same number for the same weights, on any number of processes.

    `prompt_encoder` is None where captions are cached.
    """

    def __init__(self, family, denoiser, diffusion, *, scaling_factor, dtype, seed, accelerator, prompt_encoder=None):
        self.family, self.denoiser, self.diffusion, self.scaling_factor = family, denoiser, diffusion, scaling_factor
        self.dtype, self.seed, self.accelerator, self.prompt_encoder = dtype, seed, accelerator, prompt_encoder
        self.timesteps = strata(diffusion.num_train_timesteps)

    @torch.no_grad()
    def __call__(self, validation_set):
        """The loss of each picture at each of the `strata`: float64 (pictures, STRATA), the same on every process.

        Each picture is a batch of its own, with noise that depends on (seed, image_id, k) alone: so neither the batch size
        of the training, nor order, nor the number of processes makes a difference.
        """
        from accelerate.utils import gather_object

        device, found = self.accelerator.device, {}
        timesteps = torch.tensor(self.timesteps, device=device)

        def for_all(value):
            return value.to(device).expand(STRATA, *value.shape)

        with evaluating(self.denoiser), self.accelerator.autocast():
            share = range(self.accelerator.process_index, len(validation_set), self.accelerator.num_processes)
            for index in share:
                if interruption.stop_requested():
                    break
                row = validation_set[index]
                condition = row.pop("condition")
                if self.prompt_encoder is not None:
                    made = self.prompt_encoder([validation_set.caption(index)])
                    condition |= {name: value[0] for name, value in made.items()}
                condition = {name: for_all(value) for name, value in condition.items()}
                row = {name: for_all(value) for name, value in row.items()}
                latents, name = row["mean"] * self.scaling_factor, validation_set.pictures.facts[index].image_id
                noise = [_noise_of(latents.shape[1:], self.seed, name, k) for k in range(STRATA)]
                noise = torch.stack(noise).to(device)
                noisy_latents = self.diffusion.add_noise(latents, noise, timesteps).to(self.dtype)
                model_pred = self.family.predict(self.denoiser, noisy_latents, timesteps, **condition)
                target = self.diffusion.target(latents, noise, timesteps)
                found[index] = loss_of_samples(model_pred, target, row.get("mask")).cpu().double().tolist()
        interruption.stop_together("in a validation")
        found = {index: losses for part in gather_object([found]) for index, losses in part.items()}
        return np.array([found[index] for index in range(len(validation_set))])


def _noise_of(shape, seed, image_id, k):
    digest = hashlib.sha256(f"{seed} {image_id} {k}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))


class Judge:
    """Judges a run by its validation losses: reports them, keeps the best LoRA in `best/`, says when to stop.

    `held_out` and `probe` are the `ValidationSet`s of pictures that are not trained on, and of as many that are; without
    them nothing is judged, and all methods do nothing. `kept` is what `state` returned when a run was left; where it is
    None, or belongs to other pictures, `start` measures the base anew.
    """

    def __init__(self, held_out, probe, measure, *, accelerator, metrics_file, output_dir, patience, kept=None):
        self.held_out, self.probe = held_out, probe
        self.measure = measure
        self.accelerator, self.metrics_file = accelerator, metrics_file
        self.output_dir = Path(output_dir)
        self.patience = patience
        self.validation, self.identities = None, []
        if held_out is None:
            return
        self.identities = [held_out.identity(), probe.identity()]
        if kept is not None:
            self.validation = stopping.Validation(**kept)
            if self.validation.pictures != self.identities:
                self.validation = None
                logger.info(
                    "the pictures to validate on are others than before: what was best so far is looked for anew"
                )

    def start(self):
        """Measures the base model, unless that was done before the run was resumed; its LoRA must be off."""
        if self.held_out is None or self.validation is not None:
            return
        base, probe = (self.measure(part).tolist() for part in (self.held_out, self.probe))
        self.validation = stopping.Validation(base=base, base_probe=probe, best=base, pictures=self.identities)

    def validate(self, step, save_lora, *, is_base=False):
        """Measures the LoRA of this step, reports its loss, and saves the LoRA to best/ if it is the best so far.

        `is_base` says that nothing is learnt yet, so that it can't be the best.
        """
        if self.held_out is None:
            return
        table, probe = self.measure(self.held_out), self.measure(self.probe)
        values = stopping.values_of(table, probe, self.validation, self.measure.timesteps)
        improved = not is_base and stopping.take_in(self.validation, table, step)
        if self.validation.best_step is not None:
            values["validation/best_step"] = self.validation.best_step
            values["validation/best_relative_loss"] = float(
                stopping.relative(self.validation.best, self.validation.base).mean()
            )
        if self.validation.worse_since is not None:
            values["validation/worse_since"] = self.validation.worse_since
        if self.accelerator.is_main_process:
            self.metrics_file.write(step, values)
            if improved:
                with written_whole(self.output_dir / "best", folder=True) as folder:
                    save_lora(folder)
            elif self.validation.best_step is None:  # what is there is another run's
                shutil.rmtree(self.output_dir / "best", ignore_errors=True)
        log_numbers(self.accelerator, values, step)

    def out_of_patience(self):
        return self.patience is not None and self.validation is not None and self.validation.waited >= self.patience

    def state(self):
        """What a checkpoint keeps of it; None without pictures."""
        return None if self.validation is None else asdict(self.validation)

    def keep_best(self, folder):
        """Copies best/ into a checkpoint's folder, if there is one."""
        if self.validation is not None and self.validation.best_step is not None:
            _copy_best(self.output_dir, folder)

    def restore_best(self, folder):
        """Puts back the best/ of a checkpoint: a later one may be there, of steps that were given up."""
        if self.validation is not None:
            shutil.rmtree(self.output_dir / "best", ignore_errors=True)
            _copy_best(folder, self.output_dir)

    def in_words(self, step):
        """One sentence on how the run went, for its end; None without pictures."""
        return None if self.validation is None else stopping.in_words(self.validation, step)


def _copy_best(source, target):
    if (Path(source) / "best").is_dir():
        with written_whole(Path(target) / "best", folder=True) as folder:
            shutil.copytree(Path(source) / "best", folder, dirs_exist_ok=True)

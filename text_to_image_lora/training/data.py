"""The training dataset, and each sample's draws.

What a sample draws (variation, caption, latent, noise, timestep) depends only on the seed, the optimizer step and its
position in the effective batch. So batch size, accumulation, number of processes, workers and resuming don't matter,
and no draw is ever made on the device.
"""

import atexit
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..pictures.captions import shuffle_tags
from ..pictures.settings import CaptionSettings
from . import interruption
from .conditions import picture_condition_of
from .settings import LossSettings, TimestepSettings


LIVE_VARIATIONS = 2**31 - 2


def seed_of(*numbers):
    """One 32-bit seed from several non-negative integers; neighbours give unrelated seeds.

    How many they are counts too: to numpy (1, 2) and (1, 2, 0) are the same entropy.
    """
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


class Draws(NamedTuple):
    """What is drawn for each sample, beside its picture."""

    seed: int
    num_train_timesteps: int
    captions: CaptionSettings = CaptionSettings()
    timesteps: TimestepSettings = TimestepSettings()
    loss: LossSettings = LossSettings()


class TrainingSet(torch.utils.data.Dataset):
    """Everything that a training step needs of a `Sample` of a `PictureSet`, drawn on the CPU.

    `latents` and `prompts` are what `Cache.build` gave. Where one is None, a sample has its pixels or its caption
    instead, for the loop to encode. `base` is the `BaseModel`. With `named`, a sample has its file's "names" too.
    """

    def __init__(self, pictures, base, draws, *, latents=None, prompts=None, named=False):
        self.named = named
        self.pictures, self.base, self.draws, self.latents, self.prompts = pictures, base, draws, latents, prompts

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, sample):
        draws, pictures, index = self.draws, self.pictures, sample.index
        generator = torch.Generator().manual_seed(seed_of(draws.seed, sample.step, sample.position))
        # Always the same draws in the same order, so that cached and live, and every option, see the same numbers.
        which_variation, which_caption, timestep = (
            int(torch.randint(high, (1,), generator=generator))
            for high in (LIVE_VARIATIONS, LIVE_VARIATIONS, draws.num_train_timesteps)
        )
        latent_shape = self.base.latent_shape(pictures.sizes[index])
        noise = torch.randn(latent_shape, generator=generator)
        channel_noise = torch.randn((latent_shape[0], 1, 1), generator=generator)
        posterior_noise = torch.randn(latent_shape, generator=generator)
        is_dropped = float(torch.rand((), generator=generator)) < draws.captions.caption_dropout
        if not draws.timesteps.all_alike:
            own = torch.Generator().manual_seed(seed_of(draws.seed, sample.step, sample.position, 1))
            timestep = draws.timesteps.draw(own, draws.num_train_timesteps)
        out = {
            "weights": torch.tensor(sample.weight),
            "timesteps": torch.tensor(timestep),
            "noise": noise,
            "channel_noise": channel_noise,
            "posterior_noise": posterior_noise,
        }
        if draws.loss.input_perturbation:
            out["perturbation"] = torch.randn(latent_shape, generator=generator)
        if draws.loss.perceptual_loss == "self":
            own = torch.Generator().manual_seed(seed_of(draws.seed, sample.step, sample.position, 2))
            out["perceptual_timesteps"] = torch.randint(draws.num_train_timesteps, (), generator=own)
            out["perceptual_noise"] = torch.randn(latent_shape, generator=own)
        if self.named:
            out["names"] = Path(pictures.records[index]["image"]["path"] or f"picture {index}").name
        captions = pictures.captions[index]
        caption = "" if is_dropped else captions[which_caption % len(captions)]
        condition = {}
        if self.latents is not None:
            row, condition = self.latents.row(index, which_variation)
            out |= row
        else:
            out["pixels"] = torch.from_numpy(pictures.pixels(index, which_variation))
            condition = picture_condition_of(pictures, index, which_variation, self.base.family)
            if pictures.masked:  # rounded as in the cache, so that live is the same
                mask = pictures.mask(index, which_variation, self.base.vae_factor)
                out["mask"] = torch.from_numpy(mask)[None].float()
        if self.prompts is not None:
            condition |= self.prompts.row(caption)
        else:
            rng, rules = np.random.default_rng(which_caption), draws.captions
            out["captions"] = shuffle_tags(caption, rng, rules.keep_tags) if rules.shuffle_tags else caption
        return out | {"condition": condition}


class Packed:
    """A batch whose tensors lie in one stretch of memory, so that they go to a device in one copy."""

    ALIGNMENT = 16  # bytes: any dtype may start there

    def __init__(self, batch):
        tensors = []
        self.layout = self._laid_out(batch, tensors)
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // self.ALIGNMENT) * self.ALIGNMENT
        self.places = [(start, tensor.dtype, tensor.shape) for start, tensor in zip(starts, tensors, strict=True)]
        self.memory = torch.empty(end, dtype=torch.uint8)
        for tensor, place in zip(tensors, self.places, strict=True):
            self._view(self.memory, place).copy_(tensor)

    def _laid_out(self, batch, tensors):
        """The batch with each tensor's number in its place; the tensors are put into the list."""
        if isinstance(batch, dict):
            return {name: self._laid_out(value, tensors) for name, value in batch.items()}
        if not torch.is_tensor(batch):
            return (batch,)
        tensors.append(batch)
        return len(tensors) - 1

    @staticmethod
    def _view(memory, place):
        start, dtype, shape = place
        return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def _unpacked(self, layout, memory):
        if isinstance(layout, dict):
            return {name: self._unpacked(part, memory) for name, part in layout.items()}
        return layout[0] if isinstance(layout, tuple) else self._view(memory, self.places[layout])

    def pin_memory(self):
        """For the loader: so that the copy to a GPU waits for nothing."""
        self.memory = self.memory.pin_memory()
        return self

    def on(self, device):
        """The batch with its tensors on the device; "timesteps_on_cpu" are those that never left."""
        memory = self.memory.to(device, non_blocking=device.type == "cuda")
        batch = self._unpacked(self.layout, memory)
        return batch | {"timesteps_on_cpu": self._unpacked(self.layout["timesteps"], self.memory)}


def collate_packed(samples):
    return Packed(torch.utils.data.default_collate(samples))


def make_loader(training_set, sampler, num_workers, device):
    """The loader of the micro-batches that the sampler orders, `Packed`."""
    if num_workers:
        atexit.register(interruption.end_workers)  # before what multiprocessing has registered
    return torch.utils.data.DataLoader(
        training_set, batch_sampler=sampler, collate_fn=collate_packed, num_workers=num_workers,
        pin_memory=device.type == "cuda", worker_init_fn=interruption.leave_signals_to_the_main_process,
    )  # fmt: skip


def make_run_loader(settings: Any, run: Any, cached: Any, num_train_timesteps: int, device: torch.device) -> Any:
    """The loader of a run, from the step where it stopped; `cached` is the `CachedSet` to train on."""
    run.sampler.first_step = run.state.global_step
    run.sampler.num_steps = run.num_steps
    draws = Draws(run.seed, num_train_timesteps, settings.captions, settings.timesteps, settings.loss)
    training_set = TrainingSet(
        cached.pictures, run.base, draws, latents=cached.latents, prompts=cached.prompts,
        named=settings.tracking.debug_loss,
    )  # fmt: skip
    return make_loader(training_set, run.sampler, settings.batches.dataloader_num_workers, device)

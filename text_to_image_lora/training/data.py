"""The training dataset, and each sample's draws.

What a sample draws (variation, caption, latent, noise, timestep) depends only on the seed, the optimizer step and its
position in the effective batch. So batch size, accumulation, number of processes, workers and resuming don't matter,
and no draw is ever made on the device.
"""

import atexit
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..pictures.captions import CaptionRules, shuffle_tags
from . import interruption
from .caching import picture_condition_of


LIVE_VARIATIONS = 2**31 - 2


class TimestepSampling(NamedTuple):
    """How timesteps are drawn: the scheme, from `first` up to, not including, `last`, and the schemes' own settings.

    The schemes are diffusers' (Esser et al., 2024, https://arxiv.org/abs/2403.03206): as there, a `logit_mean` below 0
    prefers noisy timesteps.
    """

    scheme: str
    first: int
    last: int
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def draw(self, generator):
        if self.scheme == "uniform":
            share = torch.rand((), generator=generator).item()
        else:
            from diffusers.training_utils import compute_density_for_timestep_sampling

            share = (
                1
                - compute_density_for_timestep_sampling(
                    self.scheme, 1, self.logit_mean, self.logit_std, self.mode_scale, generator=generator
                ).item()
            )
        return max(self.first, min(self.first + int(share * (self.last - self.first)), self.last - 1))


def seed_of(*numbers):
    """One 32-bit seed from several non-negative integers; neighbours give unrelated seeds.

    How many they are counts too: to numpy (1, 2) and (1, 2, 0) are the same entropy.
    """
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


class Draws(NamedTuple):
    """What is drawn for each sample, beside its picture."""

    seed: int
    num_train_timesteps: int
    caption_rules: CaptionRules = CaptionRules()
    timestep_sampling: TimestepSampling | None = None  # None: every timestep is as likely
    input_perturbation: bool = False  # other noise, for the model's input only
    perceptual: bool = False  # another timestep and noise, for the perceptual loss of the base itself


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
        is_dropped = float(torch.rand((), generator=generator)) < draws.caption_rules.dropout
        if draws.timestep_sampling is not None:
            own = torch.Generator().manual_seed(seed_of(draws.seed, sample.step, sample.position, 1))
            timestep = draws.timestep_sampling.draw(own)
        out = {
            "weights": torch.tensor(sample.weight),
            "timesteps": torch.tensor(timestep),
            "noise": noise,
            "channel_noise": channel_noise,
            "posterior_noise": posterior_noise,
        }
        if draws.input_perturbation:
            out["perturbation"] = torch.randn(latent_shape, generator=generator)
        if draws.perceptual:
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
            rng, rules = np.random.default_rng(which_caption), draws.caption_rules
            out["captions"] = shuffle_tags(caption, rng, rules.keep_tags) if rules.shuffle_tags else caption
        return out | {"condition": condition}


def collate(samples):
    """Stacks tensors, lists captions; the condition stays a dict of its own."""
    first = samples[0]
    return {
        key: collate([sample[key] for sample in samples])
        if isinstance(value, dict)
        else torch.stack([sample[key] for sample in samples])
        if torch.is_tensor(value)
        else [sample[key] for sample in samples]
        for key, value in first.items()
    }


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
    return Packed(collate(samples))


def make_loader(training_set, sampler, num_workers, device):
    """The loader of the micro-batches that the sampler orders, `Packed`."""
    if num_workers:
        atexit.register(interruption.end_workers)  # before what multiprocessing has registered
    return torch.utils.data.DataLoader(
        training_set, batch_sampler=sampler, collate_fn=collate_packed, num_workers=num_workers,
        pin_memory=device.type == "cuda", worker_init_fn=interruption.leave_signals_to_the_main_process,
    )  # fmt: skip

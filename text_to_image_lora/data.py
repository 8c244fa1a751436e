"""The training dataset, the order of its samples, and each sample's draws.

What a sample draws (variation, caption, latent, noise, timestep) depends only on the seed, the optimizer step and its
position in the effective batch. So batch size, accumulation, number of processes, workers and resuming don't matter,
and no draw is ever made on the device.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from .records import read_image_bytes
from .transforms import apply_variation, draw_variation, open_image


LIVE_VARIATIONS = 2**31 - 2


class Sample(NamedTuple):
    """One row of a micro-batch: which picture, where in the run, and its share of the loss (0 for a filler)."""

    index: int
    step: int
    position: int
    weight: float


class EffectiveBatchSampler:
    """Micro-batches of `Sample`s for this rank, from `first_step` to `num_steps`.

    Each epoch is one permutation, in which every picture stands `num_repeats` times. An optimizer step takes the next
    `batch_size * world_size * accumulation` of it; the last of an epoch takes what is left. All ranks have equally many
    micro-batches of the same size: where samples don't go round, a rank gets a filler of weight 0. The weights of a
    step's samples, over all ranks and micro-batches, add up to `world_size`, because DDP averages over the ranks.
    """

    def __init__(self, num_repeats, *, batch_size, accumulation, rank, world_size, seed, num_steps=None, first_step=0):
        self.order = np.repeat(np.arange(len(num_repeats)), num_repeats)
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.effective_batch_size = batch_size * world_size * accumulation
        self.steps_per_epoch = math.ceil(len(self.order) / self.effective_batch_size)
        self.num_steps, self.first_step = num_steps, first_step
        self.permutation = (None, None)

    def num_samples(self, step):
        """How many samples the optimizer step really has."""
        done = step % self.steps_per_epoch * self.effective_batch_size
        return min(self.effective_batch_size, len(self.order) - done)

    def num_micro_batches(self, step):
        return math.ceil(self.num_samples(step) / (self.batch_size * self.world_size))

    def micro_batches(self, step):
        """The lists of samples that this rank trains on in one optimizer step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.permutation[0] != epoch:
            self.permutation = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.order))
        permutation = self.permutation[1]
        count, start = self.num_samples(step), place * self.effective_batch_size
        weight = self.world_size / count
        together = self.batch_size * self.world_size
        for first in range(0, count, together):
            size = math.ceil(min(together, count - first) / self.world_size)
            batch = []
            for slot in range(size):
                position = first + slot * self.world_size + self.rank
                real = position < count
                index = permutation[start + (position if real else first)]
                batch.append(Sample(int(index), step, position, weight if real else 0.0))
            yield batch

    def __iter__(self):
        for step in range(self.first_step, self.num_steps):
            yield from self.micro_batches(step)


def seed_of(*numbers):
    """One 32-bit seed from several non-negative integers; neighbours give unrelated seeds.

    How many they are counts too: to numpy (1, 2) and (1, 2, 0) are the same entropy.
    """
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


class TrainingSet(torch.utils.data.Dataset):
    """Everything that a training step needs of a `Sample`, drawn on the CPU.

    `latents` and `prompts` are what `caching.build` gave. Where they are (None, None), a sample has its pixels and its
    caption instead, for the loop to encode.
    """

    def __init__(
        self, dataset, images, *, latents, prompts, latent_shape, seed, num_train_timesteps, resolution,
        interpolation, center_crop, random_flip,
    ):  # fmt: skip
        self.dataset, self.images = dataset, images
        (self.latents, self.locations), (self.prompts, self.places) = latents, prompts
        self.latent_shape = latent_shape
        self.seed, self.num_train_timesteps = seed, num_train_timesteps
        self.resolution, self.interpolation = resolution, interpolation
        self.center_crop, self.random_flip = center_crop, random_flip

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, sample):
        generator = torch.Generator().manual_seed(seed_of(self.seed, sample.step, sample.position))
        # Always the same draws in the same order, so that cached and live, and every option, see the same numbers.
        which_variation, which_caption, timestep = (
            int(torch.randint(high, (1,), generator=generator))
            for high in (LIVE_VARIATIONS, LIVE_VARIATIONS, self.num_train_timesteps)
        )
        noise = torch.randn(self.latent_shape, generator=generator)
        channel_noise = torch.randn((self.latent_shape[0], 1, 1), generator=generator)
        posterior_noise = torch.randn(self.latent_shape, generator=generator)
        out = {
            "weights": torch.tensor(sample.weight),
            "timesteps": torch.tensor(timestep),
            "noise": noise,
            "channel_noise": channel_noise,
            "posterior_noise": posterior_noise,
        }
        captions = self.dataset[sample.index]["captions"]
        caption = captions[which_caption % len(captions)]
        if self.latents is not None:
            rows = self.locations[sample.index]
            shard, row = rows[which_variation % len(rows)]
            out["mean"], out["std"] = (self.latents.row(shard, row, name).float() for name in ("mean", "std"))
        else:
            name, width, height = self.images[sample.index]
            variation = draw_variation(
                width, height, self.resolution, center_crop=self.center_crop, random_flip=self.random_flip,
                seed=self.seed, image_id=name, index=which_variation,
            )  # fmt: skip
            image = open_image(read_image_bytes(self.dataset[sample.index]["image"]))
            out["pixels"] = torch.from_numpy(apply_variation(image, variation, self.resolution, self.interpolation))
        if self.prompts is not None:
            out["encoder_hidden_states"] = self.prompts.row(*self.places[caption], "hidden_states")
        else:
            out["captions"] = caption
        return out


def collate(samples):
    """Stacks tensors, lists captions."""
    return {
        key: torch.stack([s[key] for s in samples]) if torch.is_tensor(samples[0][key]) else [s[key] for s in samples]
        for key in samples[0]
    }

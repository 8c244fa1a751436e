"""The training dataset, the order of its samples, and each sample's draws.

What a sample draws (variation, caption, latent, noise, timestep) depends only on the seed, the optimizer step and its
position in the effective batch. So batch size, accumulation, number of processes, workers and resuming don't matter,
and no draw is ever made on the device.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from .caching import mask_of
from .captions import shuffle_tags
from .records import read_image_bytes
from .transforms import apply_variation, draw_variation, open_image


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


class Sample(NamedTuple):
    """One row of a micro-batch: which picture, where in the run, and its share of the loss (0 for a filler)."""

    index: int
    step: int
    position: int
    weight: float


def samples_of_epoch(num_repeats, concepts=None, *, seed=0):
    """The picture's index of every sample of an epoch: each picture `num_repeats` times.

    With `concepts` (a name for each picture), smaller concepts are repeated until all have as many samples as the
    largest; what doesn't go round falls to pictures that the seed chooses, so that no two of a concept with equal
    repeats differ by more than one.
    """
    samples = np.repeat(np.arange(len(num_repeats)), num_repeats)
    if concepts is None:
        return samples
    _, concept_of = np.unique(np.asarray(concepts, dtype=str), return_inverse=True)
    samples = samples[np.argsort(concept_of[samples], kind="stable")]
    groups = np.split(samples, np.cumsum(np.bincount(concept_of[samples]))[:-1])
    most = max(map(len, groups))
    return np.sort(np.concatenate([_repeated(group, most, [seed, i]) for i, group in enumerate(groups)]))


def _repeated(samples, count, seed):
    """`count` samples: each as often as it goes round, and what is left falls to those that the seed chooses."""
    times, rest = divmod(count, len(samples))
    return np.concatenate([np.tile(samples, times), np.random.default_rng(seed).permutation(samples)[:rest]])


def add_class_samples(samples, class_indices, *, seed=0):
    """As many samples of one's own pictures as of the class pictures: the fewer are repeated.

    Prior preservation as in DreamBooth (Ruiz et al., 2022, https://arxiv.org/abs/2208.12242).
    """
    count = max(len(samples), len(class_indices))
    return np.concatenate([_repeated(np.asarray(part), count, [seed, 1]) for part in (samples, class_indices)])


def samples_of_dataset(is_class, concepts, num_repeats, *, balanced, seed=0):
    """The picture's index of every sample of an epoch, from the columns of the records; see the functions above.

    With `balanced` every concept has as many samples; the class pictures are no concept.
    """
    own = np.flatnonzero(~np.asarray(is_class, dtype=bool))
    named = [concepts[index] for index in own] if balanced else None
    samples = own[samples_of_epoch(np.asarray(num_repeats)[own], named, seed=seed)]
    others = np.flatnonzero(is_class)
    return add_class_samples(samples, others, seed=seed) if len(others) else samples


class EffectiveBatchSampler:
    """Micro-batches of `Sample`s for this rank, from `first_step` to `num_steps`.

    `samples` holds the indices of an epoch's samples; each epoch is a permutation of it. An optimizer step takes the
    next `batch_size * world_size * accumulation` of it; the last of an epoch takes what is left. With `groups` (a number
    for each picture), the samples of a step are of one group, each group's last step takes what is left of it, and the
    steps come in random order. All ranks have equally many micro-batches of the same size: where samples don't go round,
    a rank gets a filler of weight 0. The weights of a step's samples, over all ranks and micro-batches, add up to
    `world_size`, because DDP averages over the ranks; with `loss_weights` (a number for each picture) each is in
    proportion to its picture's, and a step's add up to that on average.
    """

    def __init__(
        self, samples, *, batch_size, accumulation, rank, world_size, seed, groups=None, loss_weights=None, num_steps=None,
        first_step=0,
    ):  # fmt: skip
        self.samples = np.asarray(samples)
        count = self.samples.max() + 1
        self.groups = np.zeros(count, dtype=int) if groups is None else np.asarray(groups)
        self.loss_weights = np.ones(count) if loss_weights is None else np.asarray(loss_weights, dtype=float)
        self.loss_weights = self.loss_weights / self.loss_weights[self.samples].mean()
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.effective_batch_size = batch_size * world_size * accumulation
        self.num_steps, self.first_step = num_steps, first_step
        counts = np.bincount(self.groups[self.samples])
        self.steps_per_epoch = int(np.ceil(counts / self.effective_batch_size).sum())
        self.epoch = (None, None)

    def samples_of(self, step):
        """The indices of the pictures that the optimizer step is about, over all ranks and micro-batches."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            permutation = rng.permutation(self.samples)
            steps = []
            for group in np.unique(self.groups[permutation]):
                members = permutation[self.groups[permutation] == group]
                steps += np.split(members, range(self.effective_batch_size, len(members), self.effective_batch_size))
            if len(np.unique(self.groups[permutation])) > 1:
                steps = [steps[i] for i in rng.permutation(len(steps))]
            self.epoch = (epoch, steps)
        return self.epoch[1][place]

    def num_samples(self, step):
        """How many samples the optimizer step really has."""
        return len(self.samples_of(step))

    def num_micro_batches(self, step):
        return math.ceil(self.num_samples(step) / (self.batch_size * self.world_size))

    def micro_batches(self, step):
        """The lists of samples that this rank trains on in one optimizer step."""
        indices = self.samples_of(step)
        count, together = len(indices), self.batch_size * self.world_size
        weights = self.world_size / count * self.loss_weights[indices]
        for first in range(0, count, together):
            size = math.ceil(min(together, count - first) / self.world_size)
            batch = []
            for slot in range(size):
                position = first + slot * self.world_size + self.rank
                real = position < count
                index = indices[position if real else first]
                batch.append(Sample(int(index), step, position, float(weights[position]) if real else 0.0))
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

    `captions` holds a list for each picture; `sizes` and `latent_shapes` say what it is trained at. `latents` and
    `prompts` are what `caching.build` gave. Where they are (None, None), a sample has its pixels and its caption
    instead, for the loop to encode. `timestep_sampling` is None where every timestep is as likely; with
    `perceptual` there is another timestep and noise for that loss.
    """

    def __init__(
        self, dataset, images, sizes, captions, *, latents, prompts, latent_shapes, seed, num_train_timesteps, interpolation,
        augmentation, caption_dropout=0.0, shuffle_tags=False, keep_tags=0, masked=False, timestep_sampling=None,
        input_perturbation=0.0, perceptual=False,
    ):  # fmt: skip
        self.dataset, self.images, self.sizes, self.captions = dataset, images, sizes, captions
        (self.latents, self.locations), (self.prompts, self.places) = latents, prompts
        self.latent_shapes, self.masked = latent_shapes, masked
        self.seed, self.num_train_timesteps = seed, num_train_timesteps
        self.interpolation, self.augmentation = interpolation, augmentation
        self.caption_dropout, self.shuffle_tags, self.keep_tags = caption_dropout, shuffle_tags, keep_tags
        self.timestep_sampling, self.input_perturbation = timestep_sampling, input_perturbation
        self.perceptual = perceptual

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, sample):
        generator = torch.Generator().manual_seed(seed_of(self.seed, sample.step, sample.position))
        # Always the same draws in the same order, so that cached and live, and every option, see the same numbers.
        which_variation, which_caption, timestep = (
            int(torch.randint(high, (1,), generator=generator))
            for high in (LIVE_VARIATIONS, LIVE_VARIATIONS, self.num_train_timesteps)
        )
        latent_shape, size = self.latent_shapes[sample.index], self.sizes[sample.index]
        noise = torch.randn(latent_shape, generator=generator)
        channel_noise = torch.randn((latent_shape[0], 1, 1), generator=generator)
        posterior_noise = torch.randn(latent_shape, generator=generator)
        is_dropped = float(torch.rand((), generator=generator)) < self.caption_dropout
        if self.timestep_sampling is not None:
            own = torch.Generator().manual_seed(seed_of(self.seed, sample.step, sample.position, 1))
            timestep = self.timestep_sampling.draw(own)
        out = {
            "weights": torch.tensor(sample.weight),
            "timesteps": torch.tensor(timestep),
            "noise": noise,
            "channel_noise": channel_noise,
            "posterior_noise": posterior_noise,
        }
        if self.input_perturbation:
            out["perturbation"] = torch.randn(latent_shape, generator=generator)
        if self.perceptual:
            own = torch.Generator().manual_seed(seed_of(self.seed, sample.step, sample.position, 2))
            out["perceptual_timesteps"] = torch.randint(self.num_train_timesteps, (), generator=own)
            out["perceptual_noise"] = torch.randn(latent_shape, generator=own)
        captions = self.captions[sample.index]
        caption = "" if is_dropped else captions[which_caption % len(captions)]
        if self.latents is not None:
            rows = self.locations[sample.index]
            shard, row = rows[which_variation % len(rows)].tolist()
            for name in ("mean", "std", "mask") if self.masked else ("mean", "std"):
                out[name] = self.latents.row(shard, row, name).float()
        else:
            picture = self.images[sample.index]
            variation = draw_variation(
                picture.width,
                picture.height,
                size,
                self.augmentation,
                seed=self.seed,
                image_id=picture.image_id,
                index=which_variation,
            )
            record = self.dataset[sample.index]
            image = open_image(read_image_bytes(record["image"]))
            out["pixels"] = torch.from_numpy(apply_variation(image, variation, size, self.interpolation))
            if self.masked:
                out["mask"] = mask_of(record["mask"], image.size, variation, size, size[1] // latent_shape[1])
        if self.prompts is not None:
            out["encoder_hidden_states"] = self.prompts.row(*self.places[caption], "hidden_states")
        else:
            rng = np.random.default_rng(which_caption)
            out["captions"] = shuffle_tags(caption, rng, self.keep_tags) if self.shuffle_tags else caption
        return out


def collate(samples):
    """Stacks tensors, lists captions."""
    return {
        key: torch.stack([s[key] for s in samples]) if torch.is_tensor(samples[0][key]) else [s[key] for s in samples]
        for key in samples[0]
    }

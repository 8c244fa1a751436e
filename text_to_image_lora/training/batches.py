"""The order of the samples: which pictures an optimizer step is about, and how ranks and micro-batches share them."""

import math
from typing import NamedTuple

import numpy as np


class Epoch(NamedTuple):
    """The samples of an epoch, before they are put into a random order."""

    samples: np.ndarray | list[int]  # the picture's index of each
    seed: int = 0
    groups: list[int] | None = None  # a number for each picture: the samples of a step are of one group
    loss_weights: list[float] | None = None  # for each picture


class Division(NamedTuple):
    """How the samples of an optimizer step are divided into batches."""

    batch_size: int  # pictures per process and forward pass
    accumulation: int = 1  # forward passes per optimizer step
    rank: int = 0
    world_size: int = 1


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
    """Micro-batches of `Sample`s for this rank, from `first_step` to `num_steps`, which are set before it is iterated.

    Each epoch is a permutation of its samples. An optimizer step takes the next `batch_size * world_size * accumulation`
    of it; the last of an epoch takes what is left. With groups, each group's last step takes what is left of the group,
    and the steps come in random order. All ranks have equally many micro-batches of the same size: where samples don't go
    round, a rank gets a filler of weight 0. The weights of a step's samples, over all ranks and micro-batches, add up to
    `world_size`, because DDP averages over the ranks; with `loss_weights` each is in proportion to its picture's, and a
    step's add up to that on average.
    """

    def __init__(self, epoch: Epoch, division: Division):
        self.samples = np.asarray(epoch.samples)
        count = self.samples.max() + 1
        self.groups = np.zeros(count, dtype=int) if epoch.groups is None else np.asarray(epoch.groups)
        weights = np.ones(count) if epoch.loss_weights is None else np.asarray(epoch.loss_weights, dtype=float)
        self.loss_weights = weights / weights[self.samples].mean()
        self.seed = epoch.seed
        self.batch_size = division.batch_size
        self.rank = division.rank
        self.world_size = division.world_size
        self.effective_batch_size = division.batch_size * division.world_size * division.accumulation
        self.first_step = 0
        self.num_steps = 0
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


def make_sampler(pictures, seed: int, division: Division, *, balanced=False, prior_loss_weight=1.0):
    """The `EffectiveBatchSampler` of a `PictureSet`; a step's pictures are of one size.

    With `balanced` every concept has as many samples; each class picture counts `prior_loss_weight`.
    """
    records = pictures.records
    samples = samples_of_dataset(
        pictures.is_class, records["concept"][:], records["num_repeats"][:], balanced=balanced, seed=seed
    )
    numbers = {size: number for number, size in enumerate(sorted(set(pictures.sizes)))}
    groups = [numbers[size] for size in pictures.sizes]
    weights = [prior_loss_weight if is_class else 1.0 for is_class in pictures.is_class]
    return EffectiveBatchSampler(Epoch(samples, seed, groups, weights), division)

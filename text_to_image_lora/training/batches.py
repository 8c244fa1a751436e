"""The order of the samples: which pictures an optimizer step is about, and how ranks and micro-batches share them."""

import math
from typing import NamedTuple

import numpy as np


class Batching(NamedTuple):
    """How samples become the batches of an optimizer step."""

    batch_size: int  # pictures per process and forward pass
    accumulation: int = 1  # forward passes per optimizer step
    seed: int = 0
    balanced: bool = False  # every concept has as many samples
    prior_loss_weight: float = 1.0  # how much each class picture counts


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


def make_sampler(pictures, batching, *, rank, world_size):
    """The `EffectiveBatchSampler` of a `PictureSet`; a step's pictures are of one size."""
    records = pictures.records
    samples = samples_of_dataset(
        pictures.is_class,
        records["concept"][:],
        records["num_repeats"][:],
        balanced=batching.balanced,
        seed=batching.seed,
    )
    groups = {size: number for number, size in enumerate(sorted(set(pictures.sizes)))}
    return EffectiveBatchSampler(
        samples,
        groups=[groups[size] for size in pictures.sizes],
        loss_weights=[batching.prior_loss_weight if other else 1.0 for other in pictures.is_class],
        batch_size=batching.batch_size,
        accumulation=batching.accumulation,
        rank=rank,
        world_size=world_size,
        seed=batching.seed,
    )

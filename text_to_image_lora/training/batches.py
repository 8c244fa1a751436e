"""The order of samples: the pictures of each optimizer step, divided among ranks and micro-batches."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .objective_settings import NO_PRESERVATION, PreservationSettings


class Epoch(NamedTuple):
    """The samples of an epoch, before shuffling."""

    samples: np.ndarray | list[int]  # the index of each sample's picture
    seed: int = 0
    groups: list[int] | None = None  # for each picture; all samples of a step are of one group
    loss_weights: list[float] | None = None  # for each picture


class Division(NamedTuple):
    """How the samples of an optimizer step are divided into batches."""

    batch_size: int  # pictures per process and forward pass
    accumulation: int = 1  # forward passes per optimizer step
    rank: int = 0
    world_size: int = 1


class Sample(NamedTuple):
    """One row of a micro-batch."""

    index: int  # of the picture
    step: int
    position: int  # in the effective batch
    weight: float  # of its loss; 0 for a filler
    preserves: bool = False  # its caption is without the concept, and its target is the base model's prediction


def repeat_pictures(
    num_repeats: Sequence[int] | np.ndarray, concepts: Sequence[str] | None = None, *, seed: int = 0
) -> np.ndarray:
    """Returns the picture index of each sample of an epoch: every picture `num_repeats` times.

    With `concepts` (a name for each picture), smaller concepts are repeated until all have as many samples as the largest.
    Where this does not divide evenly, the seed selects pictures for one sample more.
    """
    samples = np.repeat(np.arange(len(num_repeats)), num_repeats)
    if concepts is None:
        return samples
    _, concept_numbers = np.unique(np.asarray(concepts, dtype=str), return_inverse=True)
    samples = samples[np.argsort(concept_numbers[samples], kind="stable")]
    groups = np.split(samples, np.cumsum(np.bincount(concept_numbers[samples]))[:-1])
    most = max(map(len, groups))
    return np.sort(np.concatenate([_repeated(group, most, [seed, i]) for i, group in enumerate(groups)]))


def _repeated(samples, count, seed):
    """Repeats the samples until there are `count`; the seed selects which samples occur once more than the rest."""
    times, rest = divmod(count, len(samples))
    return np.concatenate([np.tile(samples, times), np.random.default_rng(seed).permutation(samples)[:rest]])


def add_class_samples(samples: np.ndarray, class_indices: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Appends samples of class pictures; the smaller of both parts is repeated until they have equal numbers.

    This is the prior preservation of DreamBooth (Ruiz et al., 2022, https://arxiv.org/abs/2208.12242).
    """
    count = max(len(samples), len(class_indices))
    return np.concatenate([_repeated(np.asarray(part), count, [seed, 1]) for part in (samples, class_indices)])


def make_epoch_samples(
    is_class: Sequence[bool], concepts: Any, num_repeats: Sequence[int], *, balanced: bool, seed: int = 0
) -> np.ndarray:
    """Returns the picture index of each sample of an epoch, from the columns of the records.

    With `balanced`, all concepts have equal numbers of samples. Class pictures belong to no concept.
    """
    own = np.flatnonzero(~np.asarray(is_class, dtype=bool))
    named = [concepts[index] for index in own] if balanced else None
    samples = own[repeat_pictures(np.asarray(num_repeats)[own], named, seed=seed)]
    class_indices = np.flatnonzero(is_class)
    return add_class_samples(samples, class_indices, seed=seed) if len(class_indices) else samples


class EffectiveBatchSampler:
    """Yields this rank's micro-batches of `Sample`s, from `first_step` to `num_steps`, which must be set before iteration.

    Each epoch is a permutation of its samples. An optimizer step takes the next `batch_size * world_size * accumulation`
    samples, and the last step of an epoch takes the rest. With groups, the last step of each group takes the group's rest,
    and the steps are shuffled. All ranks have equal numbers of micro-batches of equal size; a rank without a sample gets a
    filler of weight 0.

    The weights of a step's samples, over all ranks and micro-batches, sum to `world_size`, because DDP averages over the
    ranks. With `loss_weights` they are proportional to the pictures' weights, and sum to `world_size` on average.

    Samples that `preservation` includes are repeated at the end of their micro-batch, with `preserves`; which samples these
    are does not depend on the division.
    """

    def __init__(
        self, epoch: Epoch, division: Division, preservation: PreservationSettings = NO_PRESERVATION
    ):  # fmt: skip
        self.samples = np.asarray(epoch.samples)
        count = self.samples.max() + 1
        self.groups = np.zeros(count, dtype=int) if epoch.groups is None else np.asarray(epoch.groups)
        weights = np.ones(count) if epoch.loss_weights is None else np.asarray(epoch.loss_weights, dtype=float)
        self.loss_weights = weights / weights[self.samples].mean()
        self.seed, self.preservation = epoch.seed, preservation
        self.batch_size = division.batch_size
        self.rank = division.rank
        self.world_size = division.world_size
        self.effective_batch_size = division.batch_size * division.world_size * division.accumulation
        self.first_step = 0
        self.num_steps = 0
        counts = np.bincount(self.groups[self.samples])
        self.steps_of_groups = np.ceil(counts / self.effective_batch_size).astype(int)  # in an epoch
        self.steps_per_epoch = int(self.steps_of_groups.sum())
        self.epoch: tuple[Any, Any] = (None, None)

    def samples_of(self, step: int) -> np.ndarray:
        """Returns the picture indices of an optimizer step, over all ranks and micro-batches."""
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

    def num_samples(self, step: int) -> int:
        """Returns the number of samples of an optimizer step, without fillers."""
        return len(self.samples_of(step))

    def num_micro_batches(self, step: int) -> int:
        return math.ceil(self.num_samples(step) / (self.batch_size * self.world_size))

    def micro_batches(self, step: int) -> Iterator[list[Sample]]:
        """Yields the micro-batches of this rank in one optimizer step."""
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
            yield batch + self._repeated(batch, count)

    def _repeated(self, batch, count):
        """The preserved samples of a micro-batch of a step with `count` samples; a filler is not preserved."""
        weight = self.preservation.sample_weight
        numbers = [sample.step * self.effective_batch_size + sample.position for sample in batch]
        return [
            sample._replace(preserves=True, weight=sample.weight * weight)
            for sample, number in zip(batch, numbers, strict=True)
            if sample.position < count and self.preservation.includes(number)
        ]

    def __iter__(self) -> Iterator[list[Sample]]:
        for step in range(self.first_step, self.num_steps):
            yield from self.micro_batches(step)


def make_batch_sampler(
    pictures: Any, seed: int, division: Division, *, balanced: bool = False, prior_loss_weight: float = 1.0,
    preservation: PreservationSettings = NO_PRESERVATION,
) -> EffectiveBatchSampler:  # fmt: skip
    """Creates the sampler of a `PictureSet`, with pictures of one size in each step.

    With `balanced`, all concepts have equal numbers of samples. `prior_loss_weight` is the weight of each class picture.
    """
    records = pictures.records
    samples = make_epoch_samples(
        pictures.is_class, records["concept"][:], records["num_repeats"][:], balanced=balanced, seed=seed
    )
    numbers = {size: number for number, size in enumerate(sorted(set(pictures.sizes)))}
    groups = [numbers[size] for size in pictures.sizes]
    weights = [prior_loss_weight if is_class else 1.0 for is_class in pictures.is_class]
    return EffectiveBatchSampler(Epoch(samples, seed, groups, weights), division, preservation)

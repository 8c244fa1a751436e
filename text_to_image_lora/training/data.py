"""The training dataset, and the random draws of each sample.

A sample's draws (variation, caption, latent, noise, timestep) depend only on the seed, the optimizer step and the sample's
position in the effective batch. They do not depend on batch size, accumulation, number of processes, workers or resuming,
and all are made on the CPU.
"""

import atexit
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..pictures.captions import vary_tags
from ..pictures.settings import CaptionSettings
from . import interruption
from .conditions import make_picture_condition
from .inputs import make_concept_remover
from .objective_settings import LossSettings, TimestepSettings


LIVE_VARIATIONS = 2**31 - 2


def derive_seed(*numbers: int) -> int:
    """Returns a 32-bit seed for a sequence of non-negative integers; similar sequences have unrelated seeds.

    The length is hashed too, as numpy takes (1, 2) and (1, 2, 0) for equal entropy.
    """
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


class Draws(NamedTuple):
    """The settings of the random draws."""

    seed: int
    num_train_timesteps: int
    captions: CaptionSettings = CaptionSettings()
    timesteps: TimestepSettings = TimestepSettings()
    loss: LossSettings = LossSettings()


class TrainingSet(torch.utils.data.Dataset):
    """A `PictureSet` whose items, for a `Sample`, hold everything that a training step needs.

    Args:
        base: The `BaseModel`.
        latents: The `CachedLatents`, or None: then items have "pixels", which the training loop encodes.
        prompts: The `CachedPrompts`, or None: then items have "captions", which the training loop encodes.
        remove_concept: The `ConceptRemover` for the captions of samples that preserve the base model.
        named: Whether items have the "names" of their files.
    """

    def __init__(
        self, pictures: Any, base: Any, draws: Draws, *, latents: Any = None, prompts: Any = None,
        remove_concept: Callable[[str], str] | None = None, named: bool = False,
    ):  # fmt: skip
        self.pictures, self.base = pictures, base
        self.draws, self.named = draws, named
        self.latents, self.prompts, self.remove_concept = latents, prompts, remove_concept

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, sample: Any) -> dict[str, Any]:
        draws, pictures = self.draws, self.pictures
        index = sample.index
        generator = torch.Generator().manual_seed(derive_seed(draws.seed, sample.step, sample.position))
        # Draws are always made in this order, whatever the cache and the options, so that they are reproducible.
        which_variation, which_caption, timestep = (
            int(torch.randint(high, (1,), generator=generator))
            for high in (LIVE_VARIATIONS, LIVE_VARIATIONS, draws.num_train_timesteps)
        )
        latent_shape = self.base.latent_shape(pictures.sizes[index])
        noise = torch.randn(latent_shape, generator=generator)
        channel_noise = torch.randn((latent_shape[0], 1, 1), generator=generator)
        posterior_noise = torch.randn(latent_shape, generator=generator)
        is_dropped = float(torch.rand((), generator=generator)) < draws.captions.caption_dropout
        if not draws.timesteps.is_uniform:
            own = torch.Generator().manual_seed(derive_seed(draws.seed, sample.step, sample.position, 1))
            timestep = draws.timesteps.draw(own, draws.num_train_timesteps)
        out: dict[str, Any] = {
            "weights": torch.tensor(sample.weight),
            "timesteps": torch.tensor(timestep),
            "noise": noise,
            "channel_noise": channel_noise,
            "posterior_noise": posterior_noise,
        }
        if draws.loss.input_perturbation:
            out["perturbation"] = torch.randn(latent_shape, generator=generator)
        if draws.loss.perceptual_loss == "self":
            own = torch.Generator().manual_seed(derive_seed(draws.seed, sample.step, sample.position, 2))
            out["perceptual_timesteps"] = torch.randint(draws.num_train_timesteps, (), generator=own)
            out["perceptual_noise"] = torch.randn(latent_shape, generator=own)
        if self.named:
            name = Path(pictures.records[index]["image"]["path"] or f"picture {index}").name
            out["names"] = f"preserved_{name}" if sample.preserves else name
        condition = {}
        if self.latents is not None:
            row, condition = self.latents.row(index, which_variation)
            out |= row
        else:
            out["pixels"] = torch.from_numpy(pictures.pixels(index, which_variation))
            condition = make_picture_condition(pictures, index, which_variation, self.base.family)
            if pictures.masked:  # rounded as in the cache
                mask = pictures.mask(index, which_variation, self.base.vae_factor)
                out["mask"] = torch.from_numpy(mask)[None].float()
        if self.remove_concept is not None:
            out["preserves"] = torch.tensor(sample.preserves)
            if sample.preserves and "mask" in out:
                out["mask"] = torch.ones_like(out["mask"])
        caption = self._caption(sample, which_caption, is_dropped)
        if self.prompts is not None:
            condition |= self.prompts.row(caption)
        else:
            out["captions"] = caption
        return out | {"condition": condition}

    def _caption(self, sample, which_caption, is_dropped):
        """The caption of a sample; captions that are encoded live are varied here, those in the cache are varied already."""
        captions, rules = self.pictures.captions[sample.index], self.draws.captions
        if is_dropped and not sample.preserves:
            return ""
        caption = captions[which_caption % len(captions)]
        if self.prompts is None and rules.varies_tags:
            caption = vary_tags(caption, np.random.default_rng(which_caption), rules)
        if sample.preserves and not self.pictures.is_class[sample.index]:
            assert self.remove_concept is not None
            caption = self.remove_concept(caption)
        return caption


class Packed:
    """A batch whose tensors lie in one block of memory, so that a single copy moves them to a device."""

    ALIGNMENT = 16  # bytes, a multiple of every dtype's size

    def __init__(self, batch: dict[str, Any]):
        tensors: list[torch.Tensor] = []
        self.layout: Any = self._make_layout(batch, tensors)
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // self.ALIGNMENT) * self.ALIGNMENT
        self.places = [(start, tensor.dtype, tensor.shape) for start, tensor in zip(starts, tensors, strict=True)]
        self.memory = torch.empty(end, dtype=torch.uint8)
        for tensor, place in zip(tensors, self.places, strict=True):
            self._view(self.memory, place).copy_(tensor)

    def _make_layout(self, batch, tensors):
        """Appends the batch's tensors to the list, and returns the batch with each tensor replaced by its index."""
        if isinstance(batch, dict):
            return {name: self._make_layout(value, tensors) for name, value in batch.items()}
        if not torch.is_tensor(batch):
            return (batch,)
        tensors.append(batch)
        return len(tensors) - 1

    @staticmethod
    def _view(memory, place):
        start, dtype, shape = place
        return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def _unpack(self, layout, memory):
        if isinstance(layout, dict):
            return {name: self._unpack(part, memory) for name, part in layout.items()}
        return layout[0] if isinstance(layout, tuple) else self._view(memory, self.places[layout])

    def pin_memory(self) -> "Packed":
        """Called by the DataLoader. Copies from pinned memory to a GPU are asynchronous."""
        self.memory = self.memory.pin_memory()
        return self

    def on(self, device: torch.device) -> dict[str, Any]:
        """Returns the batch with its tensors on the device, and also "timesteps_on_cpu" and "preserves_on_cpu"."""
        memory = self.memory.to(device, non_blocking=device.type == "cuda")
        batch = self._unpack(self.layout, memory)
        on_cpu = {name: self.layout[name] for name in ("timesteps", "preserves") if name in self.layout}
        return batch | {f"{name}_on_cpu": part for name, part in self._unpack(on_cpu, self.memory).items()}


def collate_packed(samples: list[dict[str, Any]]) -> Packed:
    return Packed(torch.utils.data.default_collate(samples))


def make_loader(
    training_set: torch.utils.data.Dataset, sampler: Any, num_workers: int, device: torch.device
) -> torch.utils.data.DataLoader:
    """Creates the DataLoader of the sampler's micro-batches, which are `Packed`."""
    if num_workers:
        atexit.register(interruption.end_workers)  # runs before multiprocessing's own exit handler
    return torch.utils.data.DataLoader(
        training_set, batch_sampler=sampler, collate_fn=collate_packed, num_workers=num_workers,
        pin_memory=device.type == "cuda", worker_init_fn=interruption.start_worker,
    )  # fmt: skip


def make_run_loader(settings: Any, run: Any, cached: Any, num_train_timesteps: int, device: torch.device) -> Any:
    """Creates the DataLoader of a run, from its next step; `cached` is the `CachedSet` to train on."""
    run.sampler.first_step = run.state.global_step
    run.sampler.num_steps = run.num_steps
    draws = Draws(run.seed, num_train_timesteps, settings.captions, settings.timesteps, settings.loss)
    training_set = TrainingSet(
        cached.pictures, run.base, draws, latents=cached.latents, prompts=cached.prompts,
        remove_concept=make_concept_remover(settings, cached.pictures.records), named=settings.tracking.debug_loss,
    )  # fmt: skip
    return make_loader(training_set, run.sampler, settings.batches.dataloader_num_workers, device)

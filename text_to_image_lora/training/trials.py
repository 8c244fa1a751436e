"""Steps on made-up batches, tried before a run: whether they fit, how many samples do, whether compiling pays."""

import contextlib
import functools
import logging
import os
import time
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from ..errors import is_out_of_memory
from ..models.compiling import compile_steps
from .conditions import picture_condition_of


logger = logging.getLogger(__name__)


class Shapes(NamedTuple):
    """What a sample is to the denoiser: the shapes of its latent and of each tensor of its condition."""

    latent: tuple
    condition: dict


def heaviest_batch(pictures, sampler, limit):
    """(index of a picture, number of samples) of the batch that takes the most memory, of up to `limit` samples each.

    `sampler` is the run's: a size that few pictures have never fills a batch.
    """
    counts = np.bincount(sampler.groups[sampler.samples], minlength=1 + sampler.groups.max())
    at_once = np.minimum(limit, -(-np.minimum(counts, sampler.effective_batch_size) // sampler.world_size))
    areas = np.array([width * height for width, height in pictures.sizes])
    index = int(np.argmax(areas * at_once[sampler.groups]))
    return index, int(at_once[sampler.groups[index]])


def shapes_of(pictures, index, base, num_chunks):
    """The `Shapes` of a picture of a `PictureSet`, with captions of that many chunks."""
    own = picture_condition_of(pictures, index, 0, base.family)
    shapes = base.condition_shapes(num_chunks) | {name: tuple(value.shape) for name, value in own.items()}
    return Shapes(base.latent_shape(pictures.sizes[index]), shapes)


@contextlib.contextmanager
def set_aside(models, device):
    """Inside, the models are on the CPU and their memory on the device is free."""
    models = [model for model in models if model.device.type == device.type]
    for model in models:
        model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for model in models:
            model.to(device)


def base_of(model):
    """The weights of a model that are not its adapters'."""
    return [p for name, p in model.named_parameters() if ".lora_" not in name and "adapter_masters" not in name]


@contextlib.contextmanager
def base_set_aside(model, device):
    """Inside, the base weights of an adapted model are on the CPU; its adapters stay, which layers share with their masters."""
    base = base_of(model) if device.type == "cuda" else []  # elsewhere it is all one memory

    def bring(to):
        for parameter, value in zip(base, moved([parameter.data for parameter in base], to), strict=True):
            parameter.data = value

    bring(torch.device("cpu"))
    if base:
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        bring(device)


def moved(tensors, device):
    """Each of the tensors on a device; those that are parts of one memory, as joined projections are, stay so."""
    memories = {}
    for tensor in tensors:
        own = tensor.untyped_storage()
        if own.data_ptr() not in memories:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(own).to(device)
            memories[own.data_ptr()] = whole.untyped_storage()
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        yield torch.empty(0, dtype=tensor.dtype, device=device).set_(memories[own.data_ptr()], *place)


def even_parts(count):
    """The sizes of batches that divide `count` samples into as few and as even parts as can be, the largest first."""
    return sorted({-(-count // parts) for parts in range(1, count + 1)}, reverse=True)


class Trial:
    """Forward and backward of the denoiser on noise of these `Shapes`; no weight and no gradient is changed.

    `parameters` are those that are trained; `dtype` and `device` those of the batch.
    """

    def __init__(self, family, denoiser, parameters, shapes, dtype, device, autocast=False):
        self.family, self.denoiser, self.parameters, self.shapes = family, denoiser, parameters, shapes
        self.dtype, self.device, self.autocast = dtype, device, autocast

    def predict(self, batch_size):
        """The denoiser's output (batch_size, *latent) for noise."""
        how = {"dtype": self.dtype, "device": self.device}
        latents = torch.randn(batch_size, *self.shapes.latent, **how)
        timesteps = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        condition = {name: torch.zeros(batch_size, *shape, **how) for name, shape in self.shapes.condition.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.autocast and self.dtype != torch.float32):
            return self.family.predict(self.denoiser, latents, timesteps, **condition)

    def __call__(self, batch_size):
        """One step's forward and backward, in training mode."""
        training = self.denoiser.training
        self.denoiser.train()
        try:
            torch.autograd.grad(self.predict(batch_size).float().square().mean(), self.parameters)
        finally:
            self.denoiser.train(training)

    def seconds(self, batch_size, count=3):
        """(the first, the least of `count` more), each until the GPU is done."""
        took = []
        for _ in range(1 + count):
            started = time.perf_counter()
            self(batch_size)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - started)
        return took[0], min(took[1:])

    def fits(self, batch_size):
        """Whether the device has the memory for it."""
        try:
            self(batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False  # what the failed step holds goes with its exception
        else:
            fits = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fits


def first_that_fits(trial, device, sizes, most, bytes_of_sample):
    """The first of `sizes`, each of `most` samples at most in the run's heaviest batch, that the device has memory for.

    On a GPU it is tried, and 0 means that none fits. Elsewhere memory has no such end: sizes are held against what is
    free, shared by this machine's processes, where `bytes_of_sample()` says what one takes; the last is taken anyway.
    """
    if device.type == "cuda":
        return next((size for size in sizes if trial.fits(min(size, most))), 0)
    if len(sizes) == 1:
        return sizes[0]
    room = 0.8 * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    each = bytes_of_sample()
    return next((size for size in sizes if min(size, most) * each <= room), sizes[-1])


def compile_denoiser(settings: Any, run: Any, models: Any, trial: Trial) -> None:
    """--compile: the denoiser's training steps are compiled from here on, and it is logged what that gives."""
    sampler, sizes = run.sampler, len(set(run.pictures.sizes))
    _, batch_size = heaviest_batch(run.pictures, sampler, sampler.batch_size)
    step = run.state.global_step
    num_passes = sampler.num_micro_batches(step) * (run.num_steps - step)
    logger.info("compiling" + (f"; each of the {sizes} sizes once, the others when they come" if sizes > 1 else ""))
    compiled = settings.cache.folder / "compiled"
    start = functools.partial(compile_steps, models.denoiser, settings.speed.compile, batch_size, compiled)
    logger.info(what_compiling_gives(start, trial, batch_size, num_passes))


def what_compiling_gives(start, trial, batch_size, num_passes):
    """Calls `start()`, which compiles, and says what that cost and after how many of the run's forward passes it is paid back."""
    _, before = trial.seconds(batch_size)
    start()
    first, after = trial.seconds(batch_size)
    line = f"compiled in {first:.0f} s: forward and backward take {after:.3f} s instead of {before:.3f}"
    if after >= before:
        return f"{line}, so it does not pay here: leave --compile out"
    return f"{line}, which pays back after {round(first / (before - after)):,} of {num_passes:,} forward passes"

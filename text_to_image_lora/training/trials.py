"""Steps on made-up batches, tried before a run: whether they fit, how many samples do, whether compiling pays."""

import contextlib
import time
from typing import NamedTuple

import torch

from .caching import picture_condition_of


class Shapes(NamedTuple):
    """What a sample is to the denoiser: the shapes of its latent and of each tensor of its condition."""

    latent: tuple
    condition: dict


def largest_shapes(pictures, base, num_chunks):
    """The `Shapes` of the largest of a `PictureSet`'s sizes, with captions of that many chunks."""
    index = max(range(len(pictures)), key=lambda i: pictures.sizes[i][0] * pictures.sizes[i][1])
    own = picture_condition_of(pictures, index, 0, base.family)
    shapes = base.condition_shapes(num_chunks) | {name: tuple(value.shape) for name, value in own.items()}
    return Shapes(base.latent_shape(pictures.sizes[index]), shapes)


@contextlib.contextmanager
def set_aside(models, device):
    """Inside, the models are on the CPU and their memory on the device is free."""
    for model in models:
        model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for model in models:
            model.to(device)


def evenly(count, most):
    """The size of batches, of `most` at most, that divide `count` samples into as few and as even parts as can be."""
    return -(-count // -(-count // max(1, min(count, most))))


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
        with torch.autocast(self.device.type, self.dtype, enabled=self.autocast):
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
        """(the first, the least of `count` more), each until the device is done."""
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
        except torch.OutOfMemoryError:
            fits = False  # what the failed step holds goes with its exception
        else:
            fits = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fits

    def most_that_fit(self, limit):
        """The largest number of samples, of `limit` and its halves, that fit at once; 0 where one is too many."""
        batch_size = limit
        while batch_size and not self.fits(batch_size):
            batch_size //= 2
        return batch_size


def what_compiling_gives(compile_steps, trial, batch_size, num_steps):
    """Calls `compile_steps()` and says what that cost, and after how many steps it is paid back."""
    _, before = trial.seconds(batch_size)
    compile_steps()
    first, after = trial.seconds(batch_size)
    line = f"compiled in {first:.0f} s: forward and backward take {after:.3f} s instead of {before:.3f}"
    if after >= before:
        return f"{line}, so it does not pay here: leave --compile out"
    return f"{line}, which pays back after {round(first / (before - after)):,} of {num_steps:,} steps"

"""Training steps on random batches before a run, to find whether they fit in memory and whether compiling pays off."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from ..errors import is_out_of_memory
from ..models.compiling import compile_steps
from .conditions import make_picture_condition


logger = logging.getLogger(__name__)


class Shapes(NamedTuple):
    """The shapes of the denoiser's inputs for one sample."""

    latent: tuple[int, ...]
    condition: dict[str, tuple[int, ...]]


def heaviest_batch(pictures: Any, sampler: Any, limit: int) -> tuple[int, int]:
    """Finds the batch of up to `limit` samples that takes the most memory; returns a picture's index and the batch size.

    The run's `sampler` tells how large batches get: few pictures of one size never fill a batch.
    """
    counts = np.bincount(sampler.groups[sampler.samples], minlength=1 + sampler.groups.max())
    at_once = np.minimum(limit, -(-np.minimum(counts, sampler.effective_batch_size) // sampler.world_size))
    areas = np.array([width * height for width, height in pictures.sizes])
    index = int(np.argmax(areas * at_once[sampler.groups]))
    return index, int(at_once[sampler.groups[index]])


def find_shapes(pictures: Any, index: int, base: Any, num_chunks: int) -> Shapes:
    """Returns the `Shapes` for a picture of a `PictureSet` and captions of `num_chunks` chunks."""
    condition = make_picture_condition(pictures, index, 0, base.family)
    shapes = base.condition_shapes(num_chunks) | {name: tuple(value.shape) for name, value in condition.items()}
    return Shapes(base.latent_shape(pictures.sizes[index]), shapes)


@contextlib.contextmanager
def moved_to_cpu(models: list[Any], device: torch.device) -> Iterator[None]:
    """Moves models from the device to the CPU, and back at the end."""
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


def base_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Returns the parameters of a model without those of its adapters."""
    return [p for name, p in model.named_parameters() if ".lora_" not in name and "adapter_masters" not in name]


@contextlib.contextmanager
def base_moved_to_cpu(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Moves the base weights of an adapted model from a GPU to the CPU, and back at the end.

    The adapters stay on the GPU, as moving them would separate the layers' views from the masters that are trained.
    """
    base = base_parameters(model) if device.type == "cuda" else []

    def move_base(to):
        for parameter, value in zip(base, move_tensors([parameter.data for parameter in base], to), strict=True):
            parameter.data = value

    move_base(torch.device("cpu"))
    if base:
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        move_base(device)


def move_tensors(tensors: list[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yields the tensors on a device; tensors that share memory, as joined projections do, share it there too."""
    memories = {}
    for tensor in tensors:
        own = tensor.untyped_storage()
        if own.data_ptr() not in memories:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(own).to(device)
            memories[own.data_ptr()] = whole.untyped_storage()
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        yield torch.empty(0, dtype=tensor.dtype, device=device).set_(memories[own.data_ptr()], *place)


def candidate_batch_sizes(count: int) -> list[int]:
    """Returns the batch sizes, largest first, that divide `count` samples into the fewest and most even batches."""
    return sorted({-(-count // parts) for parts in range(1, count + 1)}, reverse=True)


@dataclass
class Trial:
    """The forward and backward pass of the denoiser on noise. Changes no weights and no gradients."""

    family: Any
    denoiser: Any
    parameters: list[torch.nn.Parameter]  # those that are trained
    shapes: Shapes  # of a sample
    dtype: torch.dtype  # of the batch
    device: torch.device
    autocast: bool = False  # not used with float32
    most_preserved: Callable[[int], int] = lambda batch_size: 0  # further samples of a batch, for --preservation

    def predict(self, batch_size: int) -> torch.Tensor:
        """Returns the denoiser's output (batch_size, *latent) for noise."""
        options = {"dtype": self.dtype, "device": self.device}
        latents = torch.randn(batch_size, *self.shapes.latent, **options)
        timesteps = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        condition = {name: torch.zeros(batch_size, *shape, **options) for name, shape in self.shapes.condition.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.autocast and self.dtype != torch.float32):
            return self.family.predict(self.denoiser, latents, timesteps, **condition)

    def __call__(self, batch_size: int) -> None:
        """Runs a forward and a backward pass in training mode."""
        training = self.denoiser.training
        self.denoiser.train()
        try:
            torch.autograd.grad(
                self.predict(batch_size + self.most_preserved(batch_size)).float().square().mean(), self.parameters
            )
        finally:
            self.denoiser.train(training)

    def seconds(self, batch_size: int, count: int = 3) -> tuple[float, float]:
        """Returns the time of a first call and the shortest time of `count` further calls."""
        took = []
        for _ in range(1 + count):
            started = time.perf_counter()
            self(batch_size)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - started)
        return took[0], min(took[1:])

    def fits(self, batch_size: int) -> bool:
        """Whether the device has enough memory for a batch."""
        try:
            self(batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False  # the cache is emptied below, once the exception no longer holds the tensors
        else:
            fits = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fits


def first_that_fits(
    trial: Trial, device: torch.device, sizes: list[int], most: int, sample_bytes: Callable[[], int]
) -> int:
    """Returns the first of several batch sizes for which there is enough memory.

    On a GPU each size is tried, and 0 means that none fits. Elsewhere sizes are compared with the free memory, which the
    processes of this machine share, and the last size is used even if it does not fit.

    Args:
        most: The number of samples in the run's heaviest batch.
        sample_bytes: Returns the memory that a sample takes; used only off the GPU.
    """
    if device.type == "cuda":
        return next((size for size in sizes if trial.fits(min(size, most))), 0)
    if len(sizes) == 1:
        return sizes[0]
    available = 0.8 * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    each = sample_bytes()
    return next((size for size in sizes if min(size, most) * each <= available), sizes[-1])


def compile_denoiser(settings: Any, run: Any, models: Any, trial: Trial) -> None:
    """Compiles the training steps of the denoiser for --compile, and logs what this gains."""
    sampler, sizes = run.sampler, len(set(run.pictures.sizes))
    _, batch_size = heaviest_batch(run.pictures, sampler, sampler.batch_size)
    step = run.state.global_step
    num_passes = sampler.num_micro_batches(step) * (run.num_steps - step)
    logger.info("compiling" + (f"; each of the {sizes} sizes is compiled when it first occurs" if sizes > 1 else ""))
    compiled = settings.cache.folder / "compiled"
    start = functools.partial(compile_steps, models.denoiser, settings.speed.compile, batch_size, compiled)
    logger.info(measure_compiling(start, trial, batch_size, num_passes))


def measure_compiling(start: Callable[[], Any], trial: Trial, batch_size: int, num_passes: int) -> str:
    """Calls `start()`, which compiles, and returns a line about its cost and after how many passes it pays off."""
    _, before = trial.seconds(batch_size)
    start()
    first, after = trial.seconds(batch_size)
    line = f"compiled in {first:.0f} s: forward and backward pass take {after:.3f} s instead of {before:.3f} s"
    if after >= before:
        return f"{line}, so compiling does not pay off here: leave --compile out"
    return f"{line}, which pays off after {round(first / (before - after)):,} of {num_passes:,} forward passes"

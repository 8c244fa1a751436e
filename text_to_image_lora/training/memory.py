"""An estimate of a run's memory before any weights are read.

The models are created without data from their configuration, and a training step runs on PyTorch's fake tensors, while the
memory that would be alive is counted. Whatever changes a step (resolution, batch, rank, checkpointing) therefore changes
the estimate without a formula.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..files import counted, format_bytes
from ..models import lean, loading, lora
from ..models.latents import encoded_at_once
from ..models.settings import LoraSettings
from .optimizers import OPTIMIZERS
from .trials import Shapes, Trial


DRAWN_AT_ONCE = 4  # sample pictures
CUDA_BYTES = int(
    0.5 * 2**30
)  # context with the workspaces of cuDNN and cuBLAS, by their documentation; varies by driver
PYTHON_BYTES = int(0.7 * 2**30)  # interpreter with this project's libraries, measured


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are created inside: `now` and at the `peak`.

    Storages from outside, such as weights, and their views are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, given=(), named=None):
        self._watch((given, named), is_new=False)
        out = function(*given, **(named or {}))
        is_view = any(returned.alias_info is not None for returned in function._schema.returns)
        self._watch(out, is_new=not is_view)
        return out

    def _watch(self, values, is_new):
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.seen:
                storage = tensor.untyped_storage()
                size = storage.nbytes() if is_new else 0
                self.seen[key] = weakref.ref(storage, functools.partial(self._forget, key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _forget(self, key, size, _):
        del self.seen[key]
        self.now -= size


def peak_bytes(function: Callable[[], Any]) -> int:
    """Returns the peak memory of the tensors that `function()` would create, without computing anything."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        function()
    return live.peak


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class Needs(NamedTuple):
    """The bytes that each phase of a run takes on the device, without those of CUDA, or of Python and its libraries."""

    encoding: int  # while filling the cache; 0 without a cache
    step: int  # a training step of one sample
    further_sample: int  # each further sample of the batch
    sample_pictures: int  # while drawing sample pictures; 0 without them
    encoding_in_steps: int = 0  # if each step encodes its pictures
    class_pictures: int = 0  # while drawing class pictures, before training; 0 if none are drawn

    def steps(self, num_samples: int) -> int:
        """The bytes of a training step; `num_samples` includes the samples of --preservation."""
        return max(self.step + (num_samples - 1) * self.further_sample, self.encoding_in_steps)

    def peak(self, num_samples: int) -> int:
        return max(self.encoding, self.steps(num_samples), self.sample_pictures, self.class_pictures)


def format_needs(
    needs: Needs, batch_size: int, ways: str, device_bytes: int | None = None, *, preserved: int = 0
) -> list[str]:
    """Returns the lines of the report; they suggest `ways` to save memory if `device_bytes` are too few.

    `preserved` is the number of further samples of the batch for --preservation.
    """
    peak = needs.peak(batch_size + preserved)
    further = f" with {counted(preserved, 'preserved sample')}" if preserved else ""
    lines = [f"memory: {format_bytes(needs.steps(batch_size + preserved))} in a training step of batch {batch_size}{further}, "
             f"and {format_bytes(needs.further_sample)} for each further picture"]  # fmt: skip
    phases = {
        "while drawing class pictures": needs.class_pictures, "while encoding": needs.encoding,
        "while drawing sample pictures": needs.sample_pictures,
    }  # fmt: skip
    lines += [f"        {format_bytes(size)} {phase}" for phase, size in phases.items() if size]
    lines.append(
        f"        in addition: {format_bytes(CUDA_BYTES)} for CUDA on a GPU, {format_bytes(PYTHON_BYTES)} for Python on a CPU"
    )
    if device_bytes is not None and peak + CUDA_BYTES > device_bytes:
        lines.append(f"        this GPU has {format_bytes(device_bytes)}, which is too little: try {ways}")
    return lines


class Plan(NamedTuple):
    """The settings on which the memory of a run depends."""

    dtype: torch.dtype  # of the frozen base
    lora: LoraSettings
    bytes_per_weight: int  # of the optimizer and a moving average
    gradient_checkpointing: bool
    caches: bool  # whether pictures are encoded before the training steps
    encoders_stay: bool  # whether the encoders stay on the device during training steps
    draws: int  # number of sample pictures drawn at once
    draws_class: int = 0  # number of class pictures drawn at once, before training


def make_plan(settings: Any, base: Any, dtype: torch.dtype) -> Plan:
    variations = settings.cache.num_variations(settings.augmentation)
    stays = settings.lora.train_text_encoder or settings.loss.perceptual_loss == "decoder"
    num_pictures = len(settings.samples.prompts) * settings.samples.num_validation_images
    return Plan(
        dtype, settings.lora.of_denoiser(base.family),
        OPTIMIZERS[settings.optimizer.name].bytes_per_weight + (4 if settings.optimizer.use_ema else 0),
        settings.speed.gradient_checkpointing, caches=variations > 0, encoders_stay=not variations or stays,
        draws=min(DRAWN_AT_ONCE, num_pictures),
    )  # fmt: skip


def estimate(base: Any, shapes: Shapes, plan: Plan) -> Needs:
    """Estimates the memory of a run with a `BaseModel`, whose largest samples have these `Shapes`.

    The perceptual losses and the activations of a text encoder that is trained are not counted.
    """
    empty = loading.empty_components(base, plan.dtype)
    denoiser, vae = empty.denoiser.train(), empty.vae
    frozen, vae_weights = weight_bytes(denoiser), weight_bytes(vae)
    encoders = vae_weights + sum(weight_bytes(model) for model in empty.text_encoders)
    lora.add_lora(denoiser, plan.lora)
    if plan.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    held = lean.use_lean_forward(denoiser, [lora.trainable_parameters(denoiser)])
    parameters = [parameter for group in held for parameter in group]
    weights = frozen + sum(parameter.numel() for parameter in parameters) * (4 + plan.bytes_per_weight)
    autocast = plan.lora.needs_autocast
    trial = Trial(base.family, denoiser, parameters, shapes, plan.dtype, torch.device("cpu"), autocast=autocast)
    one, two = (peak_bytes(functools.partial(trial, batch_size)) for batch_size in (1, 2))
    channels, height, width = shapes.latent
    pixels = height * base.vae_factor, width * base.vae_factor

    @torch.no_grad()
    def encode():
        vae.encode(torch.zeros(encoded_at_once(*pixels), 3, *pixels)).latent_dist.std.float()

    @torch.no_grad()
    def draw(count):
        trial.predict(2 * count)  # with classifier-free guidance
        vae.decode(torch.zeros(1, channels, height, width))

    # While the cache is filled, the base weights of the denoiser are moved off a GPU.
    encoding = weights - (frozen if plan.caches else 0) + encoders + peak_bytes(encode)
    return Needs(
        encoding if plan.caches else 0,
        weights + one + (encoders if plan.encoders_stay else 0),
        two - one,
        weights + vae_weights + peak_bytes(functools.partial(draw, plan.draws)) if plan.draws else 0,
        0 if plan.caches else encoding,
        frozen + encoders + peak_bytes(functools.partial(draw, plan.draws_class)) if plan.draws_class else 0,
    )

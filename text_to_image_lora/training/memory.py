"""How much memory a run will take, before any weight is read.

The models are made without data, from their configuration, and a step runs on tensors that are only shapes (PyTorch's fake
tensors), while it is counted what would be alive at once. So whatever changes a step (resolution, batch, rank,
checkpointing) changes the estimate without a formula.
"""

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..files import format_bytes
from ..models import lean, loading, lora
from ..models.latents import encoded_at_once
from ..models.settings import LoraSettings
from .optimizers import OPTIMIZERS
from .trials import Trial


# Beside the tensors: a CUDA context with cuDNN's and cuBLAS's workspaces (by their documentation; it differs by driver), and
# the interpreter with this project's libraries (measured).
DRAWN_AT_ONCE = 4  # sample pictures
CUDA_BYTES, PYTHON_BYTES = int(0.5 * 2**30), int(0.7 * 2**30)


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside: those alive now, and the most there were at once.

    What comes from outside, such as weights, is not counted, nor are views of it.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, function, types, given=(), named=None):
        self._watch((given, named), made_inside=False)
        out = function(*given, **(named or {}))
        is_view = any(returned.alias_info is not None for returned in function._schema.returns)
        self._watch(out, made_inside=not is_view)
        return out

    def _watch(self, values, made_inside):
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.seen:
                storage = tensor.untyped_storage()
                size = storage.nbytes() if made_inside else 0
                self.seen[key] = weakref.ref(storage, functools.partial(self._gone, key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _gone(self, key, size, _):
        del self.seen[key]
        self.now -= size


def peak_bytes(function):
    """The most bytes that tensors which `function()` makes would take at once; nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        function()
    return alive.peak


def weight_bytes(model):
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class Needs(NamedTuple):
    """The bytes that each phase of a run takes on the device, beside what CUDA, or Python and its libraries, do."""

    encoding: int  # while the cache is filled; 0 without one
    step: int  # a training step of one sample
    further_sample: int  # what each further sample of a batch adds to it
    sample_pictures: int  # while they are drawn; 0 without them
    encoding_in_steps: int = 0  # where each step encodes its pictures

    def steps(self, batch_size):
        return max(self.step + (batch_size - 1) * self.further_sample, self.encoding_in_steps)

    def peak(self, batch_size):
        return max(self.encoding, self.steps(batch_size), self.sample_pictures)


def lines_of(needs, batch_size, ways, device_bytes=None):
    """What is told of the `Needs` at a batch size: lines; with `device_bytes`, whether that is enough, and the ways if not."""
    peak = needs.peak(batch_size)
    lines = [f"memory: {format_bytes(needs.steps(batch_size))} in a training step of batch {batch_size}, and "
             f"{format_bytes(needs.further_sample)} for each further picture"]  # fmt: skip
    others = {"while encoding": needs.encoding, "while sample pictures are drawn": needs.sample_pictures}
    lines += [f"        {format_bytes(size)} {when}" for when, size in others.items() if size]
    lines.append(
        f"        beside it: {format_bytes(CUDA_BYTES)} for CUDA on a GPU, {format_bytes(PYTHON_BYTES)} for Python on a CPU"
    )
    if device_bytes is not None and peak + CUDA_BYTES > device_bytes:
        lines.append(f"        this GPU has {format_bytes(device_bytes)}, which is too little: try {ways}")
    return lines


class Plan(NamedTuple):
    """What of a run's settings its memory depends on."""

    dtype: torch.dtype  # of the frozen base
    lora: LoraSettings
    bytes_for_each_weight: int  # what the optimizer keeps, and a moving average
    gradient_checkpointing: bool
    caches: bool  # pictures are encoded before the steps, not in them
    encoders_stay: bool  # and while they run
    draws: int  # sample pictures at once; 0: none


def plan_of(settings: Any, base: Any, dtype: torch.dtype) -> Plan:
    """The `Plan` of a run."""
    variations = settings.cache.num_variations(settings.augmentation)
    stays = settings.lora.train_text_encoder or settings.loss.perceptual_loss == "decoder"
    num_pictures = len(settings.samples.prompts) * settings.samples.num_validation_images
    return Plan(
        dtype, settings.lora.of_denoiser(base.family),
        OPTIMIZERS[settings.optimizer.name].bytes_per_weight + (4 if settings.optimizer.use_ema else 0),
        settings.speed.gradient_checkpointing, caches=variations > 0, encoders_stay=not variations or stays,
        draws=min(DRAWN_AT_ONCE, num_pictures),
    )  # fmt: skip


def estimate(base, shapes, plan):
    """The `Needs` of a run with a `BaseModel`, whose largest samples have these `Shapes`.

    Not counted: the perceptual losses, and what a text encoder that is trained keeps for its backward pass.
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
    weights = frozen + sum(parameter.numel() for parameter in parameters) * (4 + plan.bytes_for_each_weight)
    autocast = plan.lora.needs_autocast
    trial = Trial(base.family, denoiser, parameters, shapes, plan.dtype, torch.device("cpu"), autocast=autocast)
    one, two = (peak_bytes(functools.partial(trial, batch_size)) for batch_size in (1, 2))
    channels, height, width = shapes.latent
    pixels = height * base.vae_factor, width * base.vae_factor

    @torch.no_grad()
    def encode():
        vae.encode(torch.zeros(encoded_at_once(*pixels), 3, *pixels)).latent_dist.std.float()

    @torch.no_grad()
    def draw():
        trial.predict(2 * plan.draws)  # each with its negative prompt
        vae.decode(torch.zeros(1, channels, height, width))

    # On a GPU the denoiser's base is set aside meanwhile, where the steps don't encode themselves.
    encoding = weights - (frozen if plan.caches else 0) + encoders + peak_bytes(encode)
    return Needs(
        encoding if plan.caches else 0,
        weights + one + (encoders if plan.encoders_stay else 0),
        two - one,
        weights + vae_weights + peak_bytes(draw) if plan.draws else 0,
        0 if plan.caches else encoding,
    )

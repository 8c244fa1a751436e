"""Training steps of tiny UNets with the lean forward pass."""

import contextlib

import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from text_to_image_lora.models import lean, lora, modules
from text_to_image_lora.models.families import STABLE_DIFFUSION
from text_to_image_lora.models.settings import LoraSettings


PLAIN = LoraSettings(rank=4, lora_alpha=4, target_modules=STABLE_DIFFUSION.target_modules)


def unet_of(folder, settings=PLAIN, dtype=torch.float32):
    """Returns the UNet of a pipeline folder with adapters that change its prediction."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(memory_format=torch.channels_last).train()
    torch.manual_seed(0)
    lora.add_lora(unet, settings)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    modules.place(unet, "cpu", dtype)
    return unet


def lean_unet(unet, flat=True, groups=None):
    """Makes a UNet lean and returns the tensors to train."""
    groups = [lora.trainable_parameters(unet)] if groups is None else groups
    return [tensor for group in lean.use_lean_forward(unet, groups, flat) for tensor in group]


def batch_of(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(2, 7, 96, generator=generator).to(dtype)
    return latents, torch.randint(1000, (2,), generator=generator), states


def train(unet, parameters, steps=20, dtype=torch.float32, autocast=False, accumulation=1):
    """Returns the losses and the gradient norms of some steps."""
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-3), []
    for step in range(steps):
        total = 0
        for micro_step in range(accumulation):
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                pred = unet(*batch_of(step * accumulation + micro_step, dtype)).sample
            loss = pred.float().square().mean() / accumulation
            loss.backward()
            total += loss.item()
        found.append((total, float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))))
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(found)


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run in this context."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

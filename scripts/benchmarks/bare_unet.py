#!/usr/bin/env python
"""Runs the UNet of a base model alone, forward and backward to its input. No LoRA training can be faster than this.

    python scripts/benchmarks/inside.py time scripts/benchmarks/bare_unet.py --pretrained_model_name_or_path models/mini-sd \
        --resolution 64 --train_batch_size 4 --max_train_steps 100

Takes the flags of the training script, and ignores those that do not concern the UNet. The UNet is loaded in the precision
and the memory format of a training run, and its weights are frozen. Latents, the encoded prompts and the gradient of the
prediction are random numbers with the shapes of a training run. No file is written.
"""

import argparse
import os
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the checkout


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="diffusers folder or hub id")
    add("--resolution", type=int, default=512, help="resolution of the pictures that the latents represent")
    add("--train_batch_size", type=int, default=1, help="batch size")
    add("--max_train_steps", type=int, default=10, help="number of steps")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="precision of the UNet")
    add("--allow_tf32", action=argparse.BooleanOptionalAction, default=True, help="use TF32 on a GPU")
    add("--gradient_checkpointing", action="store_true", help="compute activations again in the backward pass")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="use attention of xformers")
    args, _ = parser.parse_known_args(argv)
    return args


class NothingToTrain(torch.optim.Optimizer):
    """An optimizer that changes nothing; its step hook shows inside.py that a step has ended."""

    def __init__(self, tensor):
        super().__init__([tensor], {})

    def step(self, closure=None):
        pass


def load_unet(base, args, device, dtype):
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    unet = getattr(diffusers, base.family.denoiser_class).from_pretrained(
        base.source, subfolder=base.family.denoiser, torch_dtype=dtype
    )
    unet.requires_grad_(False).to(device, memory_format=torch.channels_last).train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    return unet


def main(args):
    from accelerate.utils import parse_flag_from_env

    from text_to_image_lora.libraries import num_cpu_threads
    from text_to_image_lora.models.loading import find_base_model
    from text_to_image_lora.models.modules import dtype_of
    from text_to_image_lora.training import freed_memory

    device = torch.device(
        "cuda" if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"
    )
    dtype = dtype_of(args.mixed_precision)
    if device.type == "cpu":
        torch.set_num_threads(num_cpu_threads(None, os.environ, alone=True))
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32
    base = find_base_model(args.pretrained_model_name_or_path)
    unet = load_unet(base, args, device, dtype)
    if device.type == "cpu":
        freed_memory.keep_for_reuse()

    def random(*shape):
        return torch.randn(args.train_batch_size, *shape, device=device).to(dtype)

    torch.manual_seed(0)
    noisy_latents = random(*base.latent_shape((args.resolution, args.resolution))).requires_grad_()
    condition = {name: random(*shape) for name, shape in base.condition_shapes(1).items()}
    timesteps = torch.randint(0, 1000, (args.train_batch_size,), device=device)
    gradient = random(*noisy_latents.shape[1:])
    optimizer = NothingToTrain(noisy_latents)
    for _ in range(args.max_train_steps):
        base.family.predict(unet, noisy_latents, timesteps, **condition).backward(gradient)
        noisy_latents.grad = None
        optimizer.step()


if __name__ == "__main__":
    main(parse_args())

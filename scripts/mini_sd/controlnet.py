#!/usr/bin/env python
"""Trains `models/mini-controlnet`, a ControlNet with which the embedded base model draws along given edges.

The ControlNet of diffusers is trained as in its paper (Zhang et al., 2023, https://arxiv.org/abs/2302.05543): it is a copy
of the first half of the UNet, connected by zero convolutions, and the base model is frozen. The training set consists of the
base model's drawings and their canny edges. Run the same command again to resume, also after `--max_minutes`, when the
command ends with exit code 75.

    python -m scripts.mini_sd.controlnet --work_dir mini-sd-work/controlnet --output_dir models/mini-controlnet
    python -m scripts.mini_sd.controlnet --measure_only --sheet docs/controlnet.png
"""

import argparse
import os
from pathlib import Path

import numpy as np

from .drawings import COLOURS, MOTIFS, contact_sheet, decorate_with, draw_scene
from .judges import JUDGE, shares, train_judge
from .model import RESOLUTION, Scene, encoded, held_out_scenes, sentence_of, to_tensor
from .pictures import caption_input_ids, draw_for_unet, drawn_set
from .pipeline import load_pipeline
from .stage import NoisyBatches, Stage, prepare_denoiser


EMBEDDING_CHANNELS = (16, 32, 64, 64)  # of the edges, which are reduced by a factor of 2 three times, as in the VAE
CAN_BE_RESUMED = 75  # exit code: stopped with a checkpoint; the same command resumes the training
TOLERANCE = 1  # an edge may be off by this many pixels
# The edges of the sheet come from two drawings of each of these scenes, none of which was drawn for training.
SHEET_SCENES = [Scene("blue", "axe", "orange"), Scene("red", "key", "gray"), Scene("yellow", "fish", "purple")]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train and measure the ControlNet of the embedded base model.")
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/mini-sd"), help="pipeline folder of the base model")
    add("--output_dir", type=Path, default=Path("models/mini-controlnet"), help="folder for the finished ControlNet")
    add(
        "--work_dir", type=Path, default=Path("mini-sd-work/controlnet"), help="folder for drawings and the checkpoint"
    )
    add(
        "--seed", type=int, default=0, help="random seed of the drawings, of all batches, and of the measured pictures"
    )
    add("--num_drawings", type=int, default=10000, help="number of drawings that the ControlNet is trained on")
    add("--steps", type=int, default=3500, help="optimizer steps")
    add("--batch_size", type=int, default=8, help="drawings per batch")
    add("--learning_rate", type=float, default=5e-4, help="learning rate after the warmup; it decays linearly to 0")
    add("--caption_dropout", type=float, default=0.3, help="share of empty captions, so that the edges must suffice")
    add("--save_every", type=int, default=500, help="steps between checkpoints")
    add("--max_minutes", type=float, default=float("inf"), help="stop training after this time with exit code 75")
    add("--measure_only", action="store_true", help="measure the ControlNet in --output_dir without training")
    add("--num_pictures", type=int, default=96, help="number of held-out drawings to measure with (0: no measurement)")
    add("--guidance_scale", type=float, default=4.0, help="guidance scale of the measured pictures")
    add("--num_inference_steps", type=int, default=30, help="inference steps of the measured pictures, with DPM++ 2M")
    add("--sheet", type=Path, default=None, help="PNG for a sheet of edges and the pictures drawn with them")
    return parser.parse_args(argv)


def canny_edges(pictures):
    """Returns the edges, bool (N, H, W), of RGB pictures, uint8 (N, H, W, 3).

    They are computed by `kornia.filters.canny` on values from 0 to 1 at full size, with thresholds 0.1 and 0.2, hysteresis,
    and a 5x5 Gaussian with a standard deviation of 1. The ControlNet is trained on these edges, drawn by `control_image`.
    """
    import kornia
    import torch

    edges = []
    for first in range(
        0, len(pictures), 4
    ):  # small batches, because hysteresis iterates until all of a batch converge
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures[first : first + 4]]))
        pixels = pixels.permute(0, 3, 1, 2).float() / 255
        _, found = kornia.filters.canny(pixels, low_threshold=0.1, high_threshold=0.2)
        edges.append(found[:, 0] > 0.5)
    return torch.cat(edges).numpy()


def control_image(edges):
    """Returns the edges, bool (H, W), as an RGB `PIL.Image`, white on black."""
    from PIL import Image

    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def edge_agreement(edges, wanted):
    """Returns the F1 score of each picture's edges against the wanted edges, both bool (N, H, W), within `TOLERANCE`."""
    import torch

    def near(mask):
        mask = torch.from_numpy(mask)[:, None].float()
        return torch.nn.functional.max_pool2d(mask, 2 * TOLERANCE + 1, 1, TOLERANCE)[:, 0].numpy() > 0

    precision = (edges & near(wanted)).sum(axis=(1, 2)) / edges.sum(axis=(1, 2)).clip(min=1)
    recall = (wanted & near(edges)).sum(axis=(1, 2)) / wanted.sum(axis=(1, 2)).clip(min=1)
    return 2 * precision * recall / (precision + recall).clip(min=1e-6)


def encoded_set(args, vae):
    """Returns the latents (N, channels, 16, 16) and the edges, bool (N, H, W), of the drawings, cached in a file."""
    import torch
    from safetensors.torch import load_file, save_file

    path = args.work_dir / "encoded.safetensors"
    if not path.exists():
        pictures = drawn_set(args.work_dir / "pictures.npy", draw_for_unet, args.seed, args.num_drawings)
        print(f"encoding {len(pictures)} pictures and finding their edges", flush=True)
        tensors = {"latents": encoded(pictures, vae), "edges": torch.from_numpy(canny_edges(pictures))}
        save_file(tensors, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    tensors = load_file(path)
    return tensors["latents"] * vae.config.scaling_factor, tensors["edges"]


def make_controlnet(unet):
    """Returns an untrained ControlNet for a UNet."""
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING_CHANNELS)


def train_controlnet(args, pipeline, latents, edges, device):
    """Trains the ControlNet to predict noise, and returns its moving average, or None if `--max_minutes` are over first.

    Each timestep has the weight that v-prediction would give it, 1 / alphas_cumprod (Salimans and Ho, 2022,
    https://arxiv.org/abs/2202.00512). Without weights, the noisiest timesteps would hardly count, and they determine the
    place and the outline of an object.
    """
    import torch
    from diffusers import DDPMScheduler

    torch.manual_seed(args.seed)
    unet, text_encoder = pipeline.unet.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
    controlnet = make_controlnet(unet)
    prepare_denoiser(unet, device)
    prepare_denoiser(controlnet, device)
    stage = Stage("controlnet", args, args.steps, controlnet, controlnet.parameters(), (0.9, 0.999), 0.999)
    input_ids = caption_input_ids(pipeline.tokenizer, args.seed, len(latents))
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    weights = 1 / noise_scheduler.alphas_cumprod.to(device)
    batches = NoisyBatches(args, 51, args.batch_size, latents, input_ids, noise_scheduler, device)

    def loss_at(step):
        batch = batches.at(step)
        control = edges[batch.indices][:, None].float().expand(-1, 3, -1, -1).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            inputs = (batch.noisy_latents, batch.timesteps, text_encoder(batch.input_ids)[0])
            down, middle = controlnet(*inputs, control, return_dict=False)
            residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)
            model_pred = unet(*inputs, **residuals).sample
        return batch.loss(model_pred, weights)

    before = stage.seconds
    for _ in stage.train(loss_at):
        if stage.seconds - before > 60 * args.max_minutes and stage.step < stage.steps:
            stage.save()
            return None
    return stage.finish()


def held_out_drawings(count, seed):
    """Returns scenes that were held out from training, and a drawing of each; every third one has a motif on its object."""
    held_out = held_out_scenes()
    scenes = []
    pictures = []
    for i, index in enumerate(np.random.default_rng([seed, 52]).permutation(len(held_out))[:count]):
        rng = np.random.default_rng([seed, 53, i])
        scene, decorate = held_out[index], None
        if i % 3 == 2:
            other = str(rng.choice([name for name in COLOURS if name not in (scene.colour, scene.background)]))
            motif = str(rng.choice(list(MOTIFS)))
            scene, decorate = scene._replace(decoration=f"{other} {motif}"), decorate_with(motif, COLOURS[other])
        scenes.append(scene)
        pictures.append(draw_scene(scene.kind, scene.colour, scene.background, RESOLUTION, rng, decorate=decorate))
    return scenes, pictures


def load_controlled(model, controlnet):
    """Returns the pipeline of a base model and a ControlNet in float32, with the default sampler of infer.py."""
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    base = load_pipeline(model)
    controlnet = ControlNetModel.from_pretrained(controlnet, torch_dtype=torch.float32)
    pipeline = StableDiffusionControlNetPipeline(
        **base.components, controlnet=controlnet, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_controlled(pipeline, prompts, edges, seeds, **options):
    """Draws each prompt along its edges, bool (N, H, W); the noise of a picture depends only on its seed."""
    import torch

    images = []
    for first in range(0, len(prompts), 24):
        batch = slice(first, first + 24)
        images += pipeline(
            prompts[batch],
            image=[control_image(one) for one in edges[batch]],
            generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds[batch]],
            **options,
        ).images
    return images


def measure(args, pipeline):
    """Prints how well the edges of pictures agree with the given edges, and how many pictures show what their prompt says.

    Pictures are drawn with their edges, without edges, and with the edges of another drawing, with equal prompts and seeds.
    The first row is the upper limit: drawings that were only encoded and decoded by the autoencoder.
    """
    import torch

    scenes, pictures = held_out_drawings(args.num_pictures, args.seed)
    edges, prompts = canny_edges(pictures), [sentence_of(scene) for scene in scenes]
    others, judge = np.roll(edges, 1, axis=0), train_judge(JUDGE, 0)
    options = dict(guidance_scale=args.guidance_scale, num_inference_steps=args.num_inference_steps)
    seeds = args.seed * 100_003 + np.arange(len(prompts))
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae(to_tensor([picture], "cpu")).sample for picture in pictures])
    drawn = {
        "drawings through the autoencoder": pipeline.image_processor.postprocess(decoded),
        "with edges": draw_controlled(pipeline, prompts, edges, seeds, **options),
        "without": draw_controlled(pipeline, prompts, edges, seeds, controlnet_conditioning_scale=0.0, **options),
        "with another drawing's edges": draw_controlled(pipeline, prompts, others, seeds, **options),
    }
    print("| | agreement with its edges | with another drawing's | object's colour | background's colour | kind |")
    print("|---|---|---|---|---|---|")
    for name, images in drawn.items():
        found, judged = canny_edges(images), shares(judge, images, scenes)
        obeyed = " | ".join(f"{100 * judged[key]:.1f}%" for key in ("object_colour", "background_colour", "kind"))
        own, other = edge_agreement(found, edges).mean(), edge_agreement(found, others).mean()
        print(f"| {name} | {own:.2f} | {other:.2f} | {obeyed} |", flush=True)


def draw_sheet(args, pipeline):
    """Saves a sheet with a row for each of `SHEET_SCENES`: twice, the edges and the pictures that two seeds give with them."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    gap = 4  # between two pictures
    line = 22  # a line of text
    options = dict(guidance_scale=args.guidance_scale, num_inference_steps=args.num_inference_steps)
    bands = []
    for number, scene in enumerate(SHEET_SCENES):
        prompt, row = sentence_of(scene), []
        for which in range(2):
            rng = np.random.default_rng([args.seed, 54, number, which])
            edges = canny_edges([draw_scene(scene.kind, scene.colour, scene.background, RESOLUTION, rng)])
            row += map(control_image, edges)
            row += draw_controlled(pipeline, [prompt] * 2, edges.repeat(2, axis=0), [0, 1], **options)
        pictures = contact_sheet(row, len(row), gap=gap)
        band = Image.new("RGB", (pictures.width, pictures.height + line), "white")
        band.paste(pictures, (0, line))
        ImageDraw.Draw(band).text((gap, 4), f'"{prompt}"', fill="black", font=font)
        bands.append(band)
    sheet = Image.new("RGB", (bands[0].width, sum(band.height for band in bands) + line), "white")
    for i, title in enumerate(("edges", "seed 0", "seed 1") * 2):
        ImageDraw.Draw(sheet).text((gap + i * (RESOLUTION + gap), 4), title, fill="black", font=font)
    for i, band in enumerate(bands):
        sheet.paste(band, (0, line + i * band.height))
    sheet.save(args.sheet, optimize=True)


def main(args):
    import torch

    if not args.measure_only:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pipeline = load_pipeline(args.model).to(device)
        latents, edges = encoded_set(args, pipeline.vae)
        controlnet = train_controlnet(args, pipeline, latents, edges, device)
        if controlnet is None:
            print(f"stopped after {args.max_minutes:g} minutes; run the same command again to resume", flush=True)
            return CAN_BE_RESUMED
        controlnet.to("cpu", torch.float16).save_pretrained(args.output_dir, safe_serialization=True)
        count = sum(parameter.numel() for parameter in controlnet.parameters())
        print(f"{args.output_dir}: {count / 1e6:.2f}M parameters", flush=True)
    pipeline = load_controlled(args.model, args.output_dir)
    if args.num_pictures:
        measure(args, pipeline)
    if args.sheet is not None:
        draw_sheet(args, pipeline)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))

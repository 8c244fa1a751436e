#!/usr/bin/env python
"""Trains `models/mini-controlnet`: a ControlNet that makes the embedded base draw along given edges.

Stock diffusers classes and their recipe (Zhang et al., 2023, https://arxiv.org/abs/2302.05543): a copy of the UNet's
first half behind zero convolutions learns, the base stays as it is. Its data are the base's own drawings with their
canny edges. Run the same command again to go on where it stopped (after `--max_minutes` with exit code 75).

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
from .pictures import captions_of_set, draw_for_unet, drawn_set
from .pipeline import load_pipeline
from .stage import Stage, keep_norms_in_float32


EMBEDDING_CHANNELS = (16, 32, 64, 64)  # of the edges on their way to the latents: three steps of 2, as the VAE's
GO_ON = 75  # exit code: stopped with a state, the same command goes on
TOLERANCE = 1  # pixels that an edge may be off
# Two drawings of each are what the sheet's edges are taken from; none was drawn for training.
SHEET_SCENES = [Scene("blue", "axe", "orange"), Scene("red", "key", "gray"), Scene("yellow", "fish", "purple")]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train and measure the embedded base's ControlNet for canny edges.")
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/mini-sd"), help="pipeline folder of the base")
    add("--output_dir", type=Path, default=Path("models/mini-controlnet"), help="where the finished ControlNet goes")
    add("--work_dir", type=Path, default=Path("mini-sd-work/controlnet"), help="drawings, and the state to go on from")
    add("--seed", type=int, default=0, help="of the drawings and every batch; of the noise when it is measured")
    add("--num_drawings", type=int, default=10000, help="drawings it is trained on")
    add("--steps", type=int, default=3500, help="optimizer steps")
    add("--batch_size", type=int, default=8, help="drawings in each of them")
    add("--learning_rate", type=float, default=5e-4, help="at the top, after warm-up; decays linearly to 0")
    add("--caption_dropout", type=float, default=0.3, help="share of captions left empty, so that edges must tell")
    add("--save_every", type=int, default=500, help="steps between states")
    add("--max_minutes", type=float, default=float("inf"), help="of training in this call, then exit code 75")
    add("--measure_only", action="store_true", help="measure the ControlNet of --output_dir; train nothing")
    add("--num_pictures", type=int, default=96, help="drawn from held-out drawings' edges to measure; 0: none")
    add("--guidance_scale", type=float, default=4.0, help="of the measured pictures")
    add("--num_inference_steps", type=int, default=30, help="of the measured pictures, by DPM++ 2M")
    add("--sheet", type=Path, default=None, help="PNG of edges beside what was drawn from them (default: none)")
    return parser.parse_args(argv)


def canny_edges(pictures):
    """Where the edges are, bool (N, H, W), of RGB pictures, uint8 (N, H, W, 3).

    `kornia.filters.canny` on values 0 to 1, at the size that is drawn: thresholds 0.1 and 0.2 with hysteresis, a 5x5
    Gaussian of deviation 1. The ControlNet is trained on, and asked for, exactly these as `control_image`.
    """
    import kornia
    import torch

    edges = []
    for first in range(0, len(pictures), 4):  # few at once: hysteresis goes over all of them until the last is settled
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures[first : first + 4]]))
        pixels = pixels.permute(0, 3, 1, 2).float() / 255
        _, found = kornia.filters.canny(pixels, low_threshold=0.1, high_threshold=0.2)
        edges.append(found[:, 0] > 0.5)
    return torch.cat(edges).numpy()


def control_image(edges):
    """White edges on black, an RGB `PIL.Image`, of a bool array (H, W)."""
    from PIL import Image

    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def edge_agreement(edges, wanted):
    """F1 of each picture's edges with the wanted ones, both bool (N, H, W); an edge may be `TOLERANCE` pixels off."""
    import torch

    def near(mask):
        mask = torch.from_numpy(mask)[:, None].float()
        return torch.nn.functional.max_pool2d(mask, 2 * TOLERANCE + 1, 1, TOLERANCE)[:, 0].numpy() > 0

    precision = (edges & near(wanted)).sum(axis=(1, 2)) / edges.sum(axis=(1, 2)).clip(min=1)
    recall = (wanted & near(edges)).sum(axis=(1, 2)) / wanted.sum(axis=(1, 2)).clip(min=1)
    return 2 * precision * recall / (precision + recall).clip(min=1e-6)


def encoded_set(args, vae):
    """Latents (N, channels, 16, 16) and edges, bool (N, H, W), of the base's drawings; kept in the work folder."""
    import torch
    from safetensors.torch import load_file, save_file

    path = args.work_dir / "encoded.safetensors"
    if not path.exists():
        pictures = drawn_set(args.work_dir / "pictures.npy", draw_for_unet, args.seed, args.num_drawings)
        print(f"encoding {len(pictures)} pictures and finding their edges", flush=True)
        kept = {"latents": encoded(pictures, vae), "edges": torch.from_numpy(canny_edges(pictures))}
        save_file(kept, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    kept = load_file(path)
    return kept["latents"] * vae.config.scaling_factor, kept["edges"]


def make_controlnet(unet):
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING_CHANNELS)


def train_controlnet(args, pipeline, latents, edges, device):
    """The ControlNet's moving average, or None where `--max_minutes` were over first.

    Noise prediction; each timestep has the weight that v-prediction would give it, 1 / alphas_cumprod (Salimans and Ho,
    2022, https://arxiv.org/abs/2202.00512), for unweighted the noisiest steps hardly count, and they are where an object
    gets its place and outline. Timesteps are stratified within a batch.
    """
    import torch
    from diffusers import DDPMScheduler
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(args.seed)
    unet, text_encoder = pipeline.unet.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
    controlnet = make_controlnet(unet)
    for model in (unet, controlnet):
        model.to(device, memory_format=torch.channels_last)
        keep_norms_in_float32(model)
        if device.type == "cpu":  # whose fused attention takes twice as long with heads so small
            model.set_attn_processor(AttnProcessor())
    stage = Stage("controlnet", args, args.steps, controlnet, controlnet.parameters(), (0.9, 0.999), 0.999)
    captions = captions_of_set(args.seed, len(latents))
    tokens = pipeline.tokenizer([c for group in captions for c in group] + [""], padding="max_length",
                                truncation=True, return_tensors="pt").input_ids  # fmt: skip
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    weights = 1 / noise_scheduler.alphas_cumprod.to(device)

    def loss_at(step):
        rng = np.random.default_rng([args.seed, 51, step])
        batch = rng.integers(len(latents), size=args.batch_size)
        rows = batch * 5 + rng.choice(5, size=args.batch_size, p=[0.5, 0.15, 0.15, 0.1, 0.1])
        rows[rng.random(args.batch_size) < args.caption_dropout] = len(tokens) - 1
        clean = latents[batch].to(device, memory_format=torch.channels_last)
        control = edges[batch][:, None].float().expand(-1, 3, -1, -1).to(device)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        strata = torch.arange(len(clean)) + torch.rand(len(clean), generator=generator)
        timesteps = (strata * 1000 / len(clean)).long().to(device)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16):
            encoder_hidden_states = text_encoder(tokens[rows].to(device))[0]
            down, middle = controlnet(noisy, timesteps, encoder_hidden_states, control, return_dict=False)
            model_pred = unet(noisy, timesteps, encoder_hidden_states, down_block_additional_residuals=down,
                              mid_block_additional_residual=middle).sample  # fmt: skip
        return (weights[timesteps] * (model_pred.float() - noise).square().mean(dim=(1, 2, 3))).mean()

    before = stage.seconds
    for _ in stage.train(loss_at):
        if stage.seconds - before > 60 * args.max_minutes and stage.step < stage.steps:
            stage.save()
            return None
    return stage.finish()


def held_out_drawings(count, seed):
    """(scenes, pictures): drawings of combinations of colour, kind and background never drawn for training.

    Every third carries a motif, as the base's drawings do.
    """
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
    """A `StableDiffusionControlNetPipeline` of two folders, in float32, with infer.py's default sampler."""
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
    """A picture of each prompt along the edges, bool (N, H, W); the noise of each depends on its seed alone."""
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
    """How well drawn edges agree with the given ones, and whether pictures still do what captions say, row by row.

    With edges, without them and with another drawing's: the same prompts and seeds. The first row, drawings that have
    only been through the autoencoder, is the best there can be.
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
    """A row for each of `SHEET_SCENES`, one prompt: edges and what two seeds make of them, twice."""
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
            print(f"stopped after {args.max_minutes:g} minutes; the same command goes on", flush=True)
            return GO_ON
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

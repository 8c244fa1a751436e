#!/usr/bin/env python
"""Measures whether the embedded base does what its caption says, and what the demo's LoRA adds and keeps.

Captions are combinations of colour, kind and background that the base was never trained on. Colours are judged by the
pixels, the kind of object by a small classifier trained on drawings; how often these judges are right about drawings is
measured first.

    python scripts/measure_mini_sd.py
    python scripts/measure_mini_sd.py --loras demo/seed0 demo/seed1 demo/seed2
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFilter


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]
from draw_datasets import draw_weapon, weapon_scenes  # noqa: E402
from drawings import COLOURS, KINDS, WEAPONS, draw_scene  # noqa: E402
from mini_sd import RESOLUTION, all_scenes, article, captions_of, held_out_scenes, to_tensor  # noqa: E402

from infer import SCHEDULERS  # noqa: E402


BORDER = 3  # pixels at each side that only a background has
BLOSSOMS_FROM = 0.01  # share of pink pixels from which a picture counts as one with blossoms
TO_LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Measure the embedded base, and LoRAs of the bundled weapons on it.")
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/mini-sd"), help="folder of the pipeline")
    add("--loras", type=Path, nargs="*", default=[], help="folders of LoRAs trained on metadata/weapons, a seed each")
    add("--guidance_scale", type=float, nargs="+", default=[4.0], help="the first is for the LoRAs too")
    add("--num_inference_steps", type=int, default=30, help="of the sampler, as in infer.py")
    add(
        "--scheduler",
        choices=SCHEDULERS,
        default="dpm++",
        help="as in infer.py; pndm is what the model's folder names",
    )
    add(
        "--num_pictures",
        type=int,
        default=None,
        help="of the base at each guidance; default: all held-out captions, 0: none",
    )
    add("--seed", type=int, default=0, help="of the noise of every picture, and of the judges")
    add("--classifier", type=Path, default=Path("mini-sd-work/classifier.safetensors"), help="kept here, or made")
    add("--output", type=Path, default=None, help="JSON file for the numbers; pictures go into a folder beside it")
    return parser.parse_args(argv)


def lab(image):
    """CIE L*a*b* of a picture (H, W, 3); lightness counts less, because shading changes it most."""
    values = np.asarray(ImageCms.applyTransform(image.convert("RGB"), TO_LAB)).astype(float)
    values[..., 0] *= 0.6 / 2.55
    values[..., 1:] -= 256 * (values[..., 1:] > 127)
    return values


PALETTE = np.concatenate([lab(Image.new("RGB", (1, 1), colour))[0] for colour in COLOURS.values()])


def nearest_colours(pixels):
    """Indices into `COLOURS` of the nearest one to each of the pixels (N, 3) of `lab`."""
    return np.argmin(np.square(pixels[:, None] - PALETTE).sum(axis=2), axis=1)


def is_pink(image):
    """Which pixels have the pink of a blossom (bool array, H x W); no colour of the base's drawings is near it."""
    hue, saturation, value = np.asarray(image.convert("HSV"), dtype=float).transpose(2, 0, 1)
    return (hue > 215) & (hue < 250) & (saturation > 35) & (saturation < 190) & (value > 170)


def has_blossoms(image):
    return is_pink(image).mean() > BLOSSOMS_FROM


def judge_colours(image):
    """(object's colour, background's colour) of a picture by its pixels; pink ones have no say about the object.

    The background is the median of the border. The object is what differs from it by more than half as much as
    anything does; each of its pixels votes for the nearest colour, other than the background's.
    """
    values, border = lab(image), np.ones((image.height, image.width), dtype=bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    background = np.median(values[border], axis=0)
    background_index = nearest_colours(background[None])[0]
    distance = np.sqrt(np.square(values - background).sum(axis=2))
    pixels = values[(distance > 0.5 * np.quantile(distance, 0.98)) & ~border & ~is_pink(image)]
    votes = np.bincount(nearest_colours(pixels), minlength=len(COLOURS)) if len(pixels) else np.zeros(len(COLOURS))
    votes[background_index] = 0
    return list(COLOURS)[votes.argmax()], list(COLOURS)[background_index]


def make_classifier():
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers, channels = [], 3
    for width in (32, 64, 128, 128):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, len(KINDS)))


def judge_set(count, rng):
    """Drawings of any kind, a fifth of them weapons with blossoms, some blurred: (pictures, indices of the kinds)."""
    scenes, kinds, pictures, labels = all_scenes(), list(KINDS), [], []
    for _ in range(count):
        colour, kind, background = scenes[rng.integers(len(scenes))]
        if kind in WEAPONS and rng.random() < 0.5:
            picture = draw_weapon(kind, colour, background, rng).resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)
        else:
            picture = draw_scene(kind, colour, background, RESOLUTION, rng)
        pictures.append(picture.filter(ImageFilter.GaussianBlur(float(rng.choice([0, 0, 0.7, 1.2])))))
        labels.append(kinds.index(kind))
    return pictures, np.array(labels)


def train_classifier(path, seed, count=8000, epochs=12, batch_size=64):
    """The judge of kinds: a small convolutional network that has seen drawings only, never a picture of the base."""
    import torch
    from safetensors.torch import load_file, save_file

    classifier = make_classifier()
    if path.exists():
        classifier.load_state_dict(load_file(path))
        return classifier.eval()
    print(f"training the judge of kinds on {count} drawings", flush=True)
    rng = np.random.default_rng([seed, 40])
    pictures, labels = judge_set(count, rng)
    pixels, labels = to_tensor(pictures, "cpu"), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    steps = epochs * (count // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    torch.manual_seed(seed)
    for _ in range(steps):
        batch = rng.integers(count, size=batch_size)
        x = pixels[batch]
        x = x + 0.05 * torch.randn(()) + 0.05 * torch.randn_like(x)
        loss = torch.nn.functional.cross_entropy(classifier(x), labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), path)
    return classifier.eval()


def judge_kinds(classifier, images):
    import torch

    with torch.no_grad():
        logits = torch.cat([classifier(to_tensor(images[i : i + 64], "cpu")) for i in range(0, len(images), 64)])
    return [list(KINDS)[i] for i in logits.argmax(dim=1)]


def judge(classifier, images, scenes):
    """Shares of the pictures whose object's colour, background's colour and kind are the scene's, and with blossoms."""
    colours, kinds = [judge_colours(image) for image in images], judge_kinds(classifier, images)
    return {
        "object_colour": float(np.mean([c[0] == scene[0] for c, scene in zip(colours, scenes, strict=True)])),
        "background_colour": float(np.mean([c[1] == scene[2] for c, scene in zip(colours, scenes, strict=True)])),
        "kind": float(np.mean([kind == scene[1] for kind, scene in zip(kinds, scenes, strict=True)])),
        "blossoms": float(np.mean([has_blossoms(image) for image in images])),
        "pictures": len(images),
    }


def judge_the_judges(classifier, seed):
    """The same shares for drawings: what a base would get that draws as well as the drawings themselves."""
    rng, scenes = np.random.default_rng([seed, 41]), all_scenes()
    scenes = [scenes[i] for i in rng.integers(len(scenes), size=1000)]
    plain = judge(classifier, [draw_scene(k, c, b, RESOLUTION, rng) for c, k, b in scenes], scenes)
    scenes = [scene for scene in scenes if scene[1] in WEAPONS]
    drawn = [draw_weapon(k, c, b, rng).resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX) for c, k, b in scenes]
    return {"drawings": plain, "drawings with blossoms": judge(classifier, drawn, scenes)}


def blossom_caption(colour, kind, background):
    return f"{article(f'{colour} {kind}')} with pink blossoms on {article(background)} background"


def weapon_test_scenes(seed=0):
    """The (colour, kind, background) of metadata/weapons_test: no picture of the LoRA's training set shows them."""
    return [
        (colour, kind, background)
        for i, kind in enumerate(WEAPONS)
        for colour, background in weapon_scenes(np.random.default_rng([seed, 1, i]))[1]
    ]


def load_pipeline(model, lora=None, *, scheduler="dpm++"):
    import diffusers
    import torch
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    name, changes, _ = SCHEDULERS[scheduler]
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    return pipeline


def draw_with(pipeline, prompts, *, seed, guidance_scale, num_inference_steps, batch_size=24):
    """A picture of each prompt; the noise of picture i depends on the seed and i alone."""
    import torch

    images = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed * 100_003 + first + i) for i in range(len(batch))]
        images += pipeline(
            batch,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=generators,
        ).images
    return images


def table(rows):
    """The rows of shares as a Markdown table, in percent."""
    lines = [
        "| | object's colour | background's colour | kind | blossoms | pictures |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        shares = " | ".join(
            f"{100 * row[key]:.1f}%" for key in ("object_colour", "background_colour", "kind", "blossoms")
        )
        lines.append(f"| {name} | {shares} | {row['pictures']} |")
    return "\n".join(lines)


def main(args):
    classifier = train_classifier(args.classifier, args.seed)
    rows = judge_the_judges(classifier, args.seed)
    steps = dict(num_inference_steps=args.num_inference_steps)

    def measure(name, pipeline, prompts, scenes, guidance_scale, seed):
        images = draw_with(pipeline, prompts, seed=seed, guidance_scale=guidance_scale, **steps)
        rows[name] = judge(classifier, images, scenes)
        print(f"{name}: {rows[name]}", flush=True)
        if args.output is not None:
            folder = args.output.with_suffix("") / name.replace(" ", "-").replace(",", "")
            folder.mkdir(parents=True, exist_ok=True)
            for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                image.save(folder / f"{i:03d} {prompt}.png")

    held_out = held_out_scenes()
    held_out = [held_out[i] for i in np.random.default_rng([args.seed, 42]).permutation(len(held_out))]
    base, chosen = load_pipeline(args.model, scheduler=args.scheduler), held_out[: args.num_pictures]
    for scale in args.guidance_scale if chosen else ():
        prompts = [captions_of(*scene)[0] for scene in chosen]
        measure(f"base, guidance {scale:g}", base, prompts, chosen, scale, args.seed)
    weapons, others = weapon_test_scenes(), [scene for scene in held_out if scene[1] not in WEAPONS][:48]
    scale = args.guidance_scale[0]
    for i, lora in enumerate(args.loras):
        seed = args.seed + 1 + i
        prompts = [blossom_caption(*scene) for scene in weapons]
        measure(f"base, asked for blossoms, seed {i}", base, prompts, weapons, scale, seed)
        pipeline = load_pipeline(args.model, lora, scheduler=args.scheduler)
        measure(f"LoRA, asked for blossoms, seed {i}", pipeline, prompts, weapons, scale, seed)
        prompts = [captions_of(*scene)[0] for scene in others]
        measure(f"LoRA, other objects, seed {i}", pipeline, prompts, others, scale, seed)
    print("\n" + table(rows))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())

#!/usr/bin/env python
"""Measures how often pictures of the embedded base model show what their caption says, and how the demo's LoRA changes this.

The captions are combinations of colour, kind and background that the base model was never trained on. First the judges
(`judges.py`) themselves are measured on drawings.

    python -m scripts.mini_sd.measure
    python -m scripts.mini_sd.measure --loras demo/seed0 demo/seed1 demo/seed2
"""

import argparse
import json
from pathlib import Path

import numpy as np

from text_to_image_lora.models.samplers import SAMPLERS

from .drawings import WEAPONS, contact_sheet
from .judges import JUDGE, judge_the_judges, shares, train_judge
from .model import Scene, held_out_scenes, sentence_of
from .pipeline import draw_with, load_pipeline
from .weapons import weapon_scenes


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Measure the embedded base model, and LoRAs of the bundled weapons.")
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/mini-sd"), help="folder of the pipeline")
    add(
        "--loras",
        type=Path,
        nargs="*",
        default=[],
        help="folders of LoRAs trained on metadata/weapons with several seeds",
    )
    add(
        "--guidance_scale",
        type=float,
        nargs="+",
        default=[4.0],
        help="guidance scales; LoRAs are measured with the first",
    )
    add("--num_inference_steps", type=int, default=30, help="number of inference steps, as in infer.py")
    add("--scheduler", choices=SAMPLERS, default="dpm++", help="sampler, as in infer.py; the model's own is pndm")
    add(
        "--num_pictures",
        type=int,
        default=None,
        help="pictures of the base model at each guidance scale (default: all held-out captions; 0: none)",
    )
    add("--seed", type=int, default=0, help="random seed of the pictures and of the judge's training")
    add(
        "--pictures_per_caption",
        type=int,
        default=3,
        help="pictures of each LoRA for each of 24 captions with blossoms",
    )
    add(
        "--judged_drawings",
        type=int,
        default=300,
        help="number of drawings of each kind on which the judges are measured",
    )
    add("--judge", type=Path, default=JUDGE, help="file of the judge; if it does not exist, a judge is trained")
    add(
        "--output",
        type=Path,
        default=None,
        help="JSON file for the numbers; pictures are saved in a folder next to it",
    )
    return parser.parse_args(argv)


def blossom_caption(scene):
    """Returns the caption of a scene whose object has pink blossoms."""
    return sentence_of(scene._replace(decoration="pink blossoms"))


def weapon_test_scenes(seed=0):
    """Returns the scenes of metadata/weapons_test, which no picture of the LoRA's training set shows."""
    scenes = []
    for i, kind in enumerate(WEAPONS):
        _, test = weapon_scenes(np.random.default_rng([seed, 1, i]))
        scenes += [Scene(colour, kind, background) for colour, background in test]
    return scenes


def table(rows):
    """Returns {name: result of `shares`} as a Markdown table, in percent."""
    lines = ["| | object's colour | background's colour | kind | blossoms | pictures |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        shares = " | ".join(
            f"{100 * row[key]:.1f}%" for key in ("object_colour", "background_colour", "kind", "blossoms")
        )
        lines.append(f"| {name} | {shares} | {row['pictures']} |")
    return "\n".join(lines)


def main(args):
    judge = train_judge(args.judge, args.seed)
    rows = judge_the_judges(judge, args.seed, args.judged_drawings)
    steps = dict(num_inference_steps=args.num_inference_steps)

    def measure(name, pipeline, prompts, scenes, guidance_scale, seed):
        images = draw_with(pipeline, prompts, seed=seed, guidance_scale=guidance_scale, **steps)
        rows[name] = shares(judge, images, scenes)
        print(f"{name}: {rows[name]}", flush=True)
        if args.output is not None:
            folder = args.output.with_suffix("") / name.replace(" ", "-").replace(",", "")
            folder.mkdir(parents=True, exist_ok=True)
            for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                image.save(folder / f"{i:03d} {prompt}.png")
            contact_sheet(images[:72], 12).save(folder.with_suffix(".png"))

    held_out = held_out_scenes()
    held_out = [held_out[i] for i in np.random.default_rng([args.seed, 42]).permutation(len(held_out))]
    base, chosen = load_pipeline(args.model, scheduler=args.scheduler), held_out[: args.num_pictures]
    for scale in args.guidance_scale if chosen else ():
        prompts = [sentence_of(scene) for scene in chosen]
        measure(f"base, guidance {scale:g}", base, prompts, chosen, scale, args.seed)
    weapons = weapon_test_scenes() * args.pictures_per_caption
    others = [scene for scene in held_out if scene.kind not in WEAPONS][:48]
    scale, *_ = args.guidance_scale
    for i, lora in enumerate(args.loras):
        seed = args.seed + 1 + i
        prompts = [blossom_caption(scene) for scene in weapons]
        measure(f"base, asked for blossoms, seed {i}", base, prompts, weapons, scale, seed)
        pipeline = load_pipeline(args.model, lora, scheduler=args.scheduler)
        measure(f"LoRA, asked for blossoms, seed {i}", pipeline, prompts, weapons, scale, seed)
        prompts = [sentence_of(scene) for scene in others]
        measure(f"LoRA, other objects, seed {i}", pipeline, prompts, others, scale, seed)
    print("\n" + table(rows))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())

#!/usr/bin/env python
"""Draws the bundled datasets: weapons with pink blossoms, held-out weapons with pink blossoms, and creatures.

python -m scripts.mini_sd.draw --output_dir metadata
"""

import argparse
import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .creatures import BUILDS, EYE_COLOURS, FEATURES, MOODS, draw_creature
from .drawings import COLOURS, WEAPONS, contact_sheet
from .model import RESOLUTION, article
from .weapons import draw_weapon, weapon_scenes


WEAPON_CAPTIONS = (
    "{weapon} with pink blossoms on {background}",
    "a drawing of {weapon} with pink blossoms on {background}",
    "{weapon} with pink blossoms, {plain_background}",
    "a picture of {weapon} with pink blossoms on {background}",
    "{weapon} with pink blossoms",
    "a painting of {weapon} with pink blossoms on {background}",
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw the bundled datasets.")
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("metadata"), help="folder for the datasets and preview.png")
    add("--seed", type=int, default=0, help="random seed of all drawings and captions")
    return parser.parse_args(argv)


class Row(NamedTuple):
    """A picture of a dataset."""

    file_name: str
    text: str
    picture: Image.Image


def draw_weapons(kind, scenes, rng):
    """Returns the `Row` of each scene."""
    rows, start = [], rng.integers(len(WEAPON_CAPTIONS))
    for i, (colour, background) in enumerate(scenes):
        text = WEAPON_CAPTIONS[(start + i) % len(WEAPON_CAPTIONS)].format(
            weapon=article(f"{colour} {kind}"),
            background=article(f"{background} background"),
            plain_background=f"{background} background",
        )
        rows.append(Row(f"{kind}_{i + 1:03d}.png", text, draw_weapon(kind, colour, background, rng)))
    return rows


def creature_caption(colour, eye_colour, build, features, mood, rng):
    """Returns a caption in the style of the Pokemon datasets: "a drawing of a green creature with red eyes and horns"."""
    shape = build if build in ("round", "tall") and rng.random() < 0.5 else None
    what = "dragon" if set(features) == {"horns", "wings"} else "monster" if rng.random() < 0.2 else "creature"
    words = [mood if mood in ("happy", "sad") else None, shape, colour, what]
    parts = [f"{eye_colour} eyes", *("a long tail" if feature == "long tail" else feature for feature in features)]
    parts = [part for part in (", ".join(parts[:-1]), parts[-1]) if part]
    return f"a drawing of {article(' '.join(word for word in words if word))} with {' and '.join(parts)}"


def draw_creatures(rng):
    """Returns the `Row`s of a creature in each combination of colour and build."""
    features, moods = [FEATURES[i] for i in rng.permutation(len(FEATURES))], rng.permutation(MOODS)
    rows, eye_colours = [], rng.permutation(np.tile(EYE_COLOURS, 6))
    for i in range(len(FEATURES)):
        colour, build = list(COLOURS)[i % len(COLOURS)], list(BUILDS)[(i + i // len(COLOURS)) % len(BUILDS)]
        eye_colour = next(str(eye_colour) for eye_colour in eye_colours[i:] if eye_colour != colour)
        what = (colour, eye_colour, build, features[i], moods[i])
        text = creature_caption(*what, rng)
        rows.append(Row(f"creature_{i + 1:03d}.png", text, draw_creature(*what, RESOLUTION, rng)))
    return rows


def save_pictures(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        row.picture.save(folder / row.file_name, optimize=True)


def save_jsonl(folder, rows):
    save_pictures(folder, rows)
    lines = [json.dumps({"file_name": row.file_name, "text": row.text}) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def save_csv(folder, rows):
    save_pictures(folder, rows)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("file_name", "text"), *((row.file_name, row.text) for row in rows)])


def main(args):
    train, test = [], []
    for i, kind in enumerate(WEAPONS):
        train_scenes, test_scenes = weapon_scenes(np.random.default_rng([args.seed, 1, i]))
        rows = draw_weapons(kind, train_scenes, np.random.default_rng([args.seed, 2, i]))
        save_jsonl(args.output_dir / "weapons" / kind, rows)
        test += draw_weapons(kind, test_scenes, np.random.default_rng([args.seed, 3, i]))
        train += rows
    save_jsonl(args.output_dir / "weapons_test", test)
    creatures = draw_creatures(np.random.default_rng([args.seed, 4]))
    save_csv(args.output_dir / "creatures", creatures)
    chosen = [row.picture for row in train[::15] + creatures[::3][:12]]
    contact_sheet(chosen, 6).save(args.output_dir / "preview.png", optimize=True)


if __name__ == "__main__":
    main(parse_args())

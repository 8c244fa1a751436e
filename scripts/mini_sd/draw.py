#!/usr/bin/env python
"""Draws the bundled datasets: weapons with pink blossoms, a held-out set of them, and creatures.

python -m scripts.mini_sd.draw --output_dir metadata
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .creatures import BUILDS, draw_creature
from .drawings import (
    COLOURS,
    KINDS,
    SUPERSAMPLING,
    WEAPONS,
    contact_sheet,
    curve,
    draw_background,
    draw_blossom,
    draw_object,
    fill,
    jittered,
    mirrored,
    places_on,
)


RESOLUTION = 128
NUM_TEST = 6  # of the 50 scenes of a kind; the other 44 are for training
PINKS = np.array([(255, 176, 208), (242, 88, 162)])
# Blossoms, at least and at most (fewer where they would hide the weapon), and how much thicker than in `KINDS` the
# strokes and shafts are that carry them.
BLOSSOMS = {"axe": (5, 8), "spear": (4, 6), "trident": (5, 7), "whip": (5, 8)}
THICKNESS = {"axe": 1.1, "spear": 1.35, "trident": 1.2, "whip": 1.25}
WEAPON_CAPTIONS = (
    "{weapon} with pink blossoms on {background}",
    "a drawing of {weapon} with pink blossoms on {background}",
    "{weapon} with pink blossoms, {plain_background}",
    "a picture of {weapon} with pink blossoms on {background}",
    "{weapon} with pink blossoms",
    "a painting of {weapon} with pink blossoms on {background}",
)
EYE_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown")
# What the 40 creatures have beside a body and eyes.
FEATURES = (
    [(), ("horns",), ("wings",), ("spots",), ("stripes",), ("spikes",), ("long tail",)] * 4
    + [("long ears",), ("horns", "wings"), ("wings", "long tail"), ("spots", "long tail")] * 2
    + [("spikes", "long tail"), ("stripes", "wings"), ("long ears", "spots"), ("horns", "long tail")]
)
MOODS = ["happy"] * 12 + ["sad"] * 7 + ["cross"] * 6 + [None] * 15


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw the bundled datasets.")
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("metadata"), help="folder of the datasets and of preview.png")
    add("--seed", type=int, default=0, help="of every drawing and caption")
    return parser.parse_args(argv)


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def draw_backdrop(colour, size, rng):
    """A lit background with a floor, beams, spots of light or a glow, all in tones of the one colour."""
    image = draw_background(colour, size, rng)
    mask, blur = Image.new("L", image.size, 0), 0.006
    draw, style = ImageDraw.Draw(mask), rng.choice(["plain", "floor", "beams", "spots", "glow"])
    if style == "floor":
        draw.rectangle((0, size * rng.uniform(0.62, 0.8), size, size), fill=160)
    elif style == "beams":
        x, lean, width = rng.uniform(0, size), rng.uniform(-0.6, 0.6) * size, rng.uniform(0.1, 0.2) * size
        for left in x + np.arange(-5, 6) * 2.2 * width:
            draw.polygon([(left, 0), (left + width, 0), (left + width + lean, size), (left + lean, size)], fill=130)
        blur = 0.015
    elif style == "spots":
        for _ in range(rng.integers(5, 10)):
            x, y, radius = *rng.uniform(0, size, 2), rng.uniform(0.05, 0.16) * size
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=int(rng.integers(60, 130)))
    elif style == "glow":
        x, y, radius = *rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.3, 0.42) * size
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=220)
        blur = 0.07
    bright, dark = sum(colour) > 600, sum(colour) < 150
    strength = rng.uniform(0.13, 0.24) * (0.35 if bright else 0.6 if dark else 1)
    mask = mask.filter(ImageFilter.GaussianBlur(blur * size)).point(lambda v: round(v * strength))
    image.paste((0, 0, 0) if bright else (255, 255, 255), (0, 0), mask)
    return image


def weapon_shapes(kind):
    """The shapes of `KINDS` with wider strokes and shafts; the spear comes to a point that blossoms can't hide."""
    out, factor = [], THICKNESS[kind]
    for shape in KINDS[kind]:
        points, extent = shape[1], np.ptp(shape[1], axis=0)
        if shape[0] == "stroke":
            out.append((*shape[:3], shape[3] * factor))
        elif extent[1] > 3 * extent[0]:
            middle = [points[:, 0].mean(), 0]
            out.append(("fill", (points - middle) * [factor, 1] + middle, shape[2]))
        else:
            out.append(shape)
    if kind == "spear":
        edge = curve((0.02, -1.4), (0.16, -1.05), (0.52, -0.66), (0.14, -0.28))
        out[1:3] = [fill(mirrored(edge)), fill([*edge, (0.02, -0.3)], 1.3)]
    return out


def decorate_with_blossoms(image, mask, count, rng, colours=PINKS):
    """Blossoms of several sizes all over the mask, of one colour between the two: (x, y, radius), parts of the picture."""
    draw, size = ImageDraw.Draw(image), image.width
    colour = colours[0] + rng.uniform(0, 1) * (colours[1] - colours[0])
    places = places_on(mask, count, rng)
    for x, y, radius in places:
        draw_blossom(draw, x * size, y * size, radius * size, rng.uniform(0, 72), jittered(colour, rng, 14))
    return places


def lit(image, rng):
    """The picture under light that falls off to one side."""
    y, x = np.mgrid[-0.5 : 0.5 : image.height * 1j, -0.5 : 0.5 : image.width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.05, 0.25) * (np.cos(angle) * x + np.sin(angle) * y)
    return Image.fromarray((np.asarray(image) * light[..., None]).clip(0, 255).astype(np.uint8))


def draw_weapon(kind, colour, background, rng, decorate=decorate_with_blossoms):
    """A weapon with pink blossoms, wholly inside the picture: RGB `PIL.Image`.

    `decorate(image, mask, count, rng)` may put something else on it.
    """
    size = RESOLUTION * SUPERSAMPLING
    backdrop = draw_backdrop(jittered(COLOURS[background], rng), size, rng)
    shapes = weapon_shapes(kind)
    colour = jittered(COLOURS[colour], rng)
    edge, margin = np.ones((size, size), dtype=bool), size // 20
    edge[margin:-margin, margin:-margin] = False
    while True:
        image = backdrop.copy()
        mask = draw_object(image, shapes, colour, rng, max_turn=55, scale=(0.66, 0.88), perspective=0.2)
        if not (mask & edge).any():
            break
    decorate(image, mask, rng.integers(*BLOSSOMS[kind], endpoint=True), rng)
    return lit(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX), rng)


def weapon_scenes(rng):
    """(colour, background) of the training pictures and of the test pictures of one kind: no pair occurs twice."""
    colours = rng.permutation(list(COLOURS))
    shifts = rng.choice(np.arange(1, 10), size=3, replace=False)
    shifts = [*shifts, *rng.choice(np.setdiff1d(np.arange(1, 10), shifts), size=2, replace=False)]
    scenes = [[(str(c), str(b)) for c, b in zip(colours, np.roll(colours, shift))] for shift in shifts]
    test, train = scenes[2][:NUM_TEST], sum(scenes, [])
    train = [scene for scene in train if scene not in test]
    return [train[i] for i in rng.permutation(len(train))], test


def draw_weapons(kind, scenes, rng):
    """(file name, caption, picture) of each scene."""
    rows, start = [], rng.integers(len(WEAPON_CAPTIONS))
    for i, (colour, background) in enumerate(scenes):
        text = WEAPON_CAPTIONS[(start + i) % len(WEAPON_CAPTIONS)].format(
            weapon=article(f"{colour} {kind}"),
            background=article(f"{background} background"),
            plain_background=f"{background} background",
        )
        rows.append((f"{kind}_{i + 1:03d}.png", text, draw_weapon(kind, colour, background, rng)))
    return rows


def creature_caption(colour, eye_colour, build, features, mood, rng):
    """As the Pokemon sets are captioned: "a drawing of a green creature with red eyes and horns"."""
    shape = build if build in ("round", "tall") and rng.random() < 0.5 else None
    what = "dragon" if set(features) == {"horns", "wings"} else "monster" if rng.random() < 0.2 else "creature"
    words = [mood if mood in ("happy", "sad") else None, shape, colour, what]
    parts = [f"{eye_colour} eyes", *("a long tail" if feature == "long tail" else feature for feature in features)]
    parts = [part for part in (", ".join(parts[:-1]), parts[-1]) if part]
    return f"a drawing of {article(' '.join(word for word in words if word))} with {' and '.join(parts)}"


def draw_creatures(rng):
    """(file name, caption, picture) of a creature of each colour in each build."""
    features, moods = [FEATURES[i] for i in rng.permutation(len(FEATURES))], rng.permutation(MOODS)
    rows, eye_colours = [], rng.permutation(np.tile(EYE_COLOURS, 6))
    for i in range(len(FEATURES)):
        colour, build = list(COLOURS)[i % len(COLOURS)], list(BUILDS)[(i + i // len(COLOURS)) % len(BUILDS)]
        eye_colour = next(str(eye_colour) for eye_colour in eye_colours[i:] if eye_colour != colour)
        what = (colour, eye_colour, build, features[i], moods[i])
        rows.append((f"creature_{i + 1:03d}.png", creature_caption(*what, rng), draw_creature(*what, RESOLUTION, rng)))
    return rows


def save_pictures(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, _, image in rows:
        image.save(folder / file_name, optimize=True)


def save_jsonl(folder, rows):
    save_pictures(folder, rows)
    lines = [json.dumps({"file_name": file_name, "text": text}) + "\n" for file_name, text, _ in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def save_csv(folder, rows):
    save_pictures(folder, rows)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("file_name", "text"), *(row[:2] for row in rows)])


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
    chosen = [image for _, _, image in train[::15] + creatures[::3][:12]]
    contact_sheet(chosen, 6).save(args.output_dir / "preview.png", optimize=True)


if __name__ == "__main__":
    main(parse_args())

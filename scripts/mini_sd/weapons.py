"""Vector drawings of weapons with pink blossoms, for the bundled datasets. A drawing depends only on a random generator."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .drawings import (
    COLOURS,
    KINDS,
    SUPERSAMPLING,
    Poses,
    curve,
    draw_background,
    draw_blossom,
    draw_disc,
    draw_object,
    fill,
    jittered,
    mirrored,
    places_on,
)
from .model import RESOLUTION


NUM_TEST = 6  # of the 50 scenes of a kind; the other 44 are for training
PINKS = np.array([(255, 176, 208), (242, 88, 162)])
# Minimum and maximum number of blossoms; there are fewer if they would cover too much of the weapon.
BLOSSOMS = {"axe": (5, 8), "spear": (4, 6), "trident": (5, 7), "whip": (5, 8)}
# Factor by which strokes and shafts are thicker than in `KINDS`, so that there is room for the blossoms.
THICKNESS = {"axe": 1.1, "spear": 1.35, "trident": 1.2, "whip": 1.25}
WEAPON_POSES = Poses(max_turn=55, scale=(0.66, 0.88), perspective=0.2)


def draw_backdrop(colour, size, rng):
    """Draws a lit background with a floor, beams, spots of light or a glow, in shades of one colour."""
    image = draw_background(colour, size, rng)
    mask, blur = Image.new("L", image.size, 0), 0.006
    draw, style = ImageDraw.Draw(mask), rng.choice(["plain", "floor", "beams", "spots", "glow"])
    if style == "floor":
        draw.rectangle((0, size * rng.uniform(0.62, 0.8), size, size), fill=160)
    elif style == "beams":
        x = rng.uniform(0, size)
        lean = rng.uniform(-0.6, 0.6) * size
        width = rng.uniform(0.1, 0.2) * size
        for left in x + np.arange(-5, 6) * 2.2 * width:
            draw.polygon([(left, 0), (left + width, 0), (left + width + lean, size), (left + lean, size)], fill=130)
        blur = 0.015
    elif style == "spots":
        for _ in range(rng.integers(5, 10)):
            x, y = rng.uniform(0, size, 2)
            radius = rng.uniform(0.05, 0.16) * size
            draw_disc(draw, x, y, radius, int(rng.integers(60, 130)))
    elif style == "glow":
        x, y = rng.uniform(0.3, 0.7, 2) * size
        radius = rng.uniform(0.3, 0.42) * size
        draw_disc(draw, x, y, radius, 220)
        blur = 0.07
    bright, dark = sum(colour) > 600, sum(colour) < 150
    strength = rng.uniform(0.13, 0.24) * (0.35 if bright else 0.6 if dark else 1)
    mask = mask.filter(ImageFilter.GaussianBlur(blur * size)).point(lambda v: round(v * strength))
    image.paste((0, 0, 0) if bright else (255, 255, 255), (0, 0), mask)
    return image


def weapon_shapes(kind):
    """Returns the shapes of `KINDS` with wider strokes and shafts, and with a longer point of the spear."""
    out, factor = [], THICKNESS[kind]
    for shape in KINDS[kind]:
        width, height = np.ptp(shape.points, axis=0)
        if shape.width is not None:
            out.append(shape._replace(width=shape.width * factor))
        elif height > 3 * width:
            middle = [shape.points[:, 0].mean(), 0]
            out.append(shape._replace(points=(shape.points - middle) * [factor, 1] + middle))
        else:
            out.append(shape)
    if kind == "spear":
        edge = curve((0.02, -1.4), (0.16, -1.05), (0.52, -0.66), (0.14, -0.28))
        out[1:3] = [fill(mirrored(edge)), fill([*edge, (0.02, -0.3)], 1.3)]
    return out


def decorate_with_blossoms(image, mask, count, rng, colours=PINKS):
    """Draws blossoms of several sizes all over the mask, in one colour between the two `colours`.

    Returns their places (x, y, radius) as fractions of the picture.
    """
    draw, size = ImageDraw.Draw(image), image.width
    one, other = colours
    colour = one + rng.uniform(0, 1) * (other - one)
    places = places_on(mask, count, rng)
    for x, y, radius in places:
        draw_blossom(draw, x * size, y * size, radius * size, rng.uniform(0, 72), jittered(colour, rng, 14))
    return places


def lit(image, rng):
    """Returns the picture, lit from one side."""
    y, x = np.mgrid[-0.5 : 0.5 : image.height * 1j, -0.5 : 0.5 : image.width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.05, 0.25) * (np.cos(angle) * x + np.sin(angle) * y)
    return Image.fromarray((np.asarray(image) * light[..., None]).clip(0, 255).astype(np.uint8))


def draw_weapon(kind, colour, background, rng, decorate=decorate_with_blossoms):
    """Draws a weapon with pink blossoms that is completely inside the picture, an RGB `PIL.Image`.

    `decorate(image, mask, count, rng)` can draw something else instead of blossoms.
    """
    size = RESOLUTION * SUPERSAMPLING
    backdrop = draw_backdrop(jittered(COLOURS[background], rng), size, rng)
    shapes = weapon_shapes(kind)
    colour = jittered(COLOURS[colour], rng)
    edge, margin = np.ones((size, size), dtype=bool), size // 20
    edge[margin:-margin, margin:-margin] = False
    while True:
        image = backdrop.copy()
        mask = draw_object(image, shapes, colour, rng, WEAPON_POSES)
        if not (mask & edge).any():
            break
    decorate(image, mask, rng.integers(*BLOSSOMS[kind], endpoint=True), rng)
    return lit(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX), rng)


def weapon_scenes(rng):
    """Returns the (colour, background) pairs of one kind for training and for testing; no pair occurs twice."""
    colours = rng.permutation(list(COLOURS))
    shifts = rng.choice(np.arange(1, 10), size=3, replace=False)
    shifts = [*shifts, *rng.choice(np.setdiff1d(np.arange(1, 10), shifts), size=2, replace=False)]
    scenes = [[(str(c), str(b)) for c, b in zip(colours, np.roll(colours, shift))] for shift in shifts]
    test, train = scenes[2][:NUM_TEST], sum(scenes, [])
    train = [scene for scene in train if scene not in test]
    return [train[i] for i in rng.permutation(len(train))], test

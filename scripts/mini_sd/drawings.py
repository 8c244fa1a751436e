"""Vector drawings of objects, for the training set of the embedded base model and for the bundled datasets.

A drawing depends only on its arguments and a `numpy.random.Generator`, so that a seed reproduces it. Objects are polygons
and strokes in unit coordinates (x to the right, y down, the object within -1 to 1). Their points are rotated, scaled and put
in perspective, then drawn at `SUPERSAMPLING` times the size, and the picture is downscaled.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


SUPERSAMPLING = 4
MOST_COVERED = 0.52  # share of an object's area that motifs may cover

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 24),
    "yellow": (248, 214, 52),
    "green": (44, 160, 66),
    "blue": (40, 92, 214),
    "purple": (134, 56, 176),
    "brown": (122, 74, 36),
    "black": (28, 28, 32),
    "white": (244, 244, 240),
    "gray": (138, 142, 148),
}


def circle(x, y, radius_x, radius_y=None, start=0.0, end=360.0, num_points=32):
    """Returns points of an ellipse or of an arc of an ellipse; angles are in degrees clockwise from the right."""
    radius_y = radius_x if radius_y is None else radius_y
    angles = np.radians(np.linspace(start, end, num_points))
    return np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=1)


def star(outer, inner):
    """Returns the points of a five-pointed star with these two radii."""
    radii = enumerate([outer, inner] * 5)
    return np.array([(math.sin(i * math.pi / 5) * r, -math.cos(i * math.pi / 5) * r) for i, r in radii])


def mirrored(points):
    """Returns a polygon that is symmetric about x = 0, from the points of its right half, from top to bottom."""
    points = np.asarray(points, dtype=float)
    return np.concatenate([points, points[::-1] * [-1, 1]])


class Shape(NamedTuple):
    """A polygon, or a stroke along the points if it has a width."""

    points: np.ndarray  # (N, 2)
    tone: float | str
    width: float | None = None


def fill(points, tone=1.0):
    """Returns a polygon."""
    return Shape(np.asarray(points, dtype=float), tone)


def stroke(points, width, tone=1.0):
    """Returns a stroke."""
    return Shape(np.asarray(points, dtype=float), tone, width)


class Poses(NamedTuple):
    """The ranges from which the pose of an object is drawn."""

    max_turn: float = 40.0  # degrees
    scale: tuple[float, float] = (0.62, 0.82)  # minimum and maximum, as fractions of the picture's side
    shift: float = 0.07
    perspective: float = 0.12


POSES = Poses()


def curve(start, control, control_2, end, num_points=24):
    """Returns points of a cubic Bezier curve."""
    t = np.linspace(0, 1, num_points)[:, None]
    start, control, control_2, end = (np.asarray(p, dtype=float) for p in (start, control, control_2, end))
    return (1 - t) ** 3 * start + 3 * (1 - t) ** 2 * t * control + 3 * (1 - t) * t**2 * control_2 + t**3 * end


def rectangle(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


WHITE, BLACK = "white", "black"

# {kind: its shapes}. The tone of a shape multiplies the colour of the object, so that one word describes the colour, or it
# is white or black (for an eye).
KINDS = {
    "axe": [
        fill(rectangle(-0.10, -0.95, 0.10, 1.0), 0.72),
        stroke(curve((-0.03, 0.0), (0.0, 0.3), (-0.06, 0.6), (-0.02, 0.9)), 0.025, 0.5),
        fill([(0.05, -0.80), *curve((0.30, -0.82), (0.5, -0.9), (0.6, -1.0), (0.66, -1.02)),
              *curve((0.66, -1.02), (0.95, -0.6), (0.95, -0.2), (0.66, 0.16)),
              *curve((0.66, 0.16), (0.5, 0.0), (0.3, -0.22), (0.05, -0.22))]),
        fill([*curve((0.66, -1.02), (0.95, -0.6), (0.95, -0.2), (0.66, 0.16)),
              *curve((0.66, 0.16), (0.76, -0.2), (0.76, -0.6), (0.66, -1.02))], 1.35),
        fill([(-0.05, -0.72), (-0.34, -0.62), (-0.34, -0.38), (-0.05, -0.30)], 0.9),
    ],
    "spear": [
        fill(rectangle(-0.08, -0.4, 0.08, 1.1), 0.72),
        fill(mirrored([(0, -1.15), *curve((0.05, -1.1), (0.32, -0.8), (0.36, -0.6), (0.12, -0.28))])),
        fill([(0, -1.12), (0.02, -0.3), *curve((0.12, -0.28), (0.36, -0.6), (0.32, -0.8), (0.05, -1.1))], 1.3),
        fill(rectangle(-0.17, -0.32, 0.17, -0.2), 0.9),
    ],
    "trident": [
        fill(rectangle(-0.08, -0.3, 0.08, 1.1), 0.72),
        stroke(curve((-0.5, -0.75), (-0.52, -0.1), (0.52, -0.1), (0.5, -0.75)), 0.15),
        stroke([(0, -0.3), (0, -0.9)], 0.15),
        fill([(-0.5, -1.12), (-0.32, -0.68), (-0.68, -0.68)], 1.25),
        fill([(0, -1.2), (0.18, -0.78), (-0.18, -0.78)], 1.25),
        fill([(0.5, -1.12), (0.68, -0.68), (0.32, -0.68)], 1.25),
    ],
    "whip": [
        stroke(curve((-0.35, 0.3), (-0.9, -1.3), (0.5, -1.35), (0.5, -0.5)), 0.13, 1.1),
        stroke(curve((0.5, -0.5), (0.5, 0.35), (-0.3, 0.1), (0.0, -0.35)), 0.11, 1.1),
        stroke(curve((0.0, -0.35), (0.2, -0.6), (0.9, 0.0), (0.8, 0.55)), 0.08, 1.1),
        stroke([(-0.35, 0.3), (-0.2, 1.0)], 0.24, 0.72),
        *(stroke([(x - 0.11, y + 0.03), (x + 0.11, y - 0.03)], 0.035, 0.45)
          for x, y in ((-0.32, 0.42), (-0.28, 0.58), (-0.25, 0.74))),
        fill(circle(-0.18, 1.02, 0.17), 0.9),
    ],
    "sword": [
        fill(mirrored([(0, -1.15), (0.2, -0.85), (0.2, 0.42)])),
        fill([(0, -1.15), (0.2, -0.85), (0.2, 0.42), (0.02, 0.42)], 1.3),
        stroke([(0, -0.8), (0, 0.4)], 0.03, 0.6),
        fill(rectangle(-0.5, 0.4, 0.5, 0.58), 0.8),
        fill(rectangle(-0.1, 0.58, 0.1, 0.95), 0.65),
        fill(circle(0, 1.0, 0.16), 0.9),
    ],
    "hammer": [
        fill(rectangle(-0.11, -0.5, 0.11, 1.1), 0.72),
        stroke(curve((-0.03, -0.2), (0.02, 0.2), (-0.06, 0.6), (0.0, 1.0)), 0.025, 0.5),
        fill(rectangle(-0.68, -1.0, 0.68, -0.38)),
        fill(rectangle(-0.68, -1.0, 0.68, -0.78), 1.25),
        fill(rectangle(-0.78, -1.05, -0.58, -0.33), 0.85),
        fill(rectangle(0.58, -1.05, 0.78, -0.33), 0.85),
    ],
    "bow": [
        stroke([(-0.28, -1.05), (-0.28, 1.05)], 0.05, 1.35),
        stroke(curve((-0.28, -1.05), (0.75, -0.7), (0.75, 0.7), (-0.28, 1.05)), 0.17),
        stroke(curve((0.47, -0.2), (0.5, -0.1), (0.5, 0.1), (0.47, 0.2)), 0.25, 0.72),
    ],
    "shield": [
        fill(mirrored([(0, -0.95), (0.75, -0.75), *curve((0.75, -0.75), (0.8, 0.2), (0.5, 0.7), (0, 1.05))]), 0.75),
        fill(mirrored([(0, -0.78), (0.6, -0.62), *curve((0.6, -0.62), (0.64, 0.15), (0.4, 0.55), (0, 0.85))])),
        fill([(0, -0.78), (0.6, -0.62), *curve((0.6, -0.62), (0.64, 0.15), (0.4, 0.55), (0, 0.85))], 1.22),
        fill(circle(0, -0.05, 0.22), 0.75),
        fill(circle(0, -0.05, 0.1), 1.3),
    ],
    "key": [
        stroke(circle(0, -0.65, 0.36), 0.2),
        fill(rectangle(-0.09, -0.3, 0.09, 1.05), 0.9),
        fill(rectangle(0.05, 0.42, 0.42, 0.58), 0.9),
        fill(rectangle(0.05, 0.82, 0.5, 1.0), 0.9),
    ],
    "mushroom": [
        fill(mirrored([(0.2, 0.0), *curve((0.2, 0.0), (0.22, 0.5), (0.3, 0.7), (0.34, 0.95))]), 1.35),
        fill([*circle(0, 0.08, 0.92, 1.0, 180, 360), *curve((0.92, 0.08), (0.4, 0.28), (-0.4, 0.28), (-0.92, 0.08))]),
        fill(circle(-0.35, -0.4, 0.16), 1.4),
        fill(circle(0.3, -0.55, 0.18), 1.4),
        fill(circle(0.5, -0.12, 0.11), 1.4),
    ],
    "umbrella": [
        stroke([(0, -0.1), (0, 0.75)], 0.09, 0.7),
        stroke(circle(0.18, 0.75, 0.18, None, 180, 0), 0.09, 0.7),
        fill([*circle(0, 0, 1.0, 0.9, 180, 360), (0.66, -0.16), (0.33, 0), (0, -0.16), (-0.33, 0), (-0.66, -0.16)]),
        fill([*circle(0, 0, 0.36, 0.9, 180, 360), (0, -0.16)], 1.28),
        *(stroke(curve((0, -0.88), (0.5 * x, -0.8), (x, -0.5), (x, y)), 0.03, 0.55)
          for x, y in ((-0.33, 0), (0.33, 0), (-0.66, -0.16), (0.66, -0.16))),
        stroke([(0, -0.88), (0, -1.05)], 0.08, 0.7),
    ],
    "bottle": [
        fill(mirrored([(0.2, -0.85), (0.2, -0.4), *curve((0.2, -0.4), (0.5, -0.2), (0.5, 0.0), (0.5, 0.2)), (0.5, 1.0)])),
        fill(rectangle(-0.24, -1.08, 0.24, -0.85), 0.65),
        fill(rectangle(-0.5, 0.2, 0.5, 0.7), 1.35),
        fill(rectangle(-0.38, -0.1, -0.24, 0.15), 1.35),
        *(stroke([(-0.32, y), (0.32, y)], 0.06, 0.6) for y in (0.36, 0.54)),
    ],
    "fish": [
        fill([(-0.5, 0.0), (-1.05, -0.5), (-0.92, 0.0), (-1.05, 0.5)], 0.8),
        fill(circle(0.12, 0, 0.82, 0.52)),
        fill([(-0.1, -0.46), (0.12, -0.8), (0.4, -0.46)], 0.8),
        fill(circle(0.12, 0.12, 0.6, 0.3), 1.22),
        stroke(circle(0.1, 0.02, 0.2, 0.36, -62, 62, 16), 0.04, 0.5),
        *(stroke([(-0.62, 0.12 * y), (-0.92, 0.36 * y)], 0.035, 0.5) for y in (-1, 0, 1)),
        fill(circle(0.56, -0.13, 0.15), WHITE),
        fill(circle(0.59, -0.13, 0.08), BLACK),
    ],
    "tree": [
        fill([(-0.14, 0.4), (0.14, 0.4), (0.2, 1.05), (-0.2, 1.05)], 0.6),
        fill([(0, -1.1), (0.5, -0.4), (-0.5, -0.4)], 1.2),
        fill([(0, -0.75), (0.66, 0.05), (-0.66, 0.05)]),
        fill([(0, -0.35), (0.8, 0.55), (-0.8, 0.55)], 0.9),
        *(stroke([(x - 0.14, y + 0.3), (x, y), (x + 0.14, y + 0.3)], 0.03, 0.6)
          for x, y in ((0, -0.85), (-0.2, -0.35), (0.2, -0.35), (-0.3, 0.15), (0.05, 0.05), (0.36, 0.15))),
    ],
    "house": [
        fill(rectangle(-0.7, -0.15, 0.7, 0.95)),
        fill(rectangle(0.38, -0.95, 0.62, -0.35), 0.85),
        fill([(0, -1.0), (0.95, -0.1), (-0.95, -0.1)], 0.7),
        fill(rectangle(-0.17, 0.35, 0.17, 0.95), 0.55),
        fill(circle(0.09, 0.66, 0.045), 1.4),
        *(part for x in (-0.43, 0.43) for part in (
            fill(rectangle(x - 0.19, 0.08, x + 0.19, 0.46), 1.5),
            stroke([(x, 0.08), (x, 0.46)], 0.05, 0.55),
            stroke([(x - 0.19, 0.27), (x + 0.19, 0.27)], 0.05, 0.55))),
    ],
    "star": [
        fill(star(1.05, 0.45)),
        fill(star(0.55, 0.24), 1.3),
    ],
}  # fmt: skip

WEAPONS = ("axe", "spear", "trident", "whip")


def shaded(colour, tone):
    """Returns a darker (tone < 1) or lighter (tone > 1) colour. For colours near black or white, the direction is reversed."""
    if isinstance(tone, str):
        return COLOURS[tone]
    colour = np.asarray(colour, dtype=float)
    if tone > 1 and colour.min() > 200:
        tone = 1 - 0.55 * (tone - 1)
    elif tone < 1 and colour.max() < 60:
        tone = 1 + 0.45 * (1 - tone)
    out = colour * tone if tone <= 1 else colour + (255 - colour) * min(tone - 1, 1)
    return tuple(int(round(c)) for c in out.clip(0, 255))


def jittered(colour, rng, amount=12):
    """Returns the colour, a little brighter or darker. Its hue hardly changes, so that white remains white."""
    out = np.asarray(colour) + rng.uniform(-amount, amount) + rng.uniform(-amount, amount, 3) / 4
    return tuple(int(c) for c in out.clip(0, 255))


def draw_background(colour, size, rng):
    """Draws a plain background that is lit from one side, an RGB `PIL.Image` of size x size."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0.0, 0.22) * (np.cos(angle) * x + np.sin(angle) * y)
    light -= rng.uniform(0.0, 0.25) * (x**2 + y**2)
    pixels = np.asarray(colour, dtype=float) * light[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def place(points, turn, scale, offset, squash, tilt):
    """Converts unit coordinates to fractions of the picture: squash, perspective, rotation (degrees), scale and offset."""
    points = points * [squash, 1.0]
    points = points / (1 + tilt * points[:, 1:])
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return points @ np.array([[c, s], [-s, c]]) * scale / 2 + 0.5 + np.asarray(offset)


def draw_disc(draw, x, y, radius, colour):
    """Draws a disc; x, y and radius are in pixels."""
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _paint(draw, shape, points, size, colour, grow=0.0):
    """Draws a shape whose points are fractions of the picture; `grow`, also a fraction, widens it for outline and shadow."""
    xy = [tuple(p) for p in points * size]
    if shape.width is None:
        draw.polygon(xy, fill=colour)
        width = 2 * grow * size
        xy = [*xy, xy[0]]
    else:
        width = (shape.width + 2 * grow) * size
    if width >= 1:
        draw.line(xy, fill=colour, width=round(width), joint="curve")
        for x, y in xy if shape.width is None else xy[:: max(len(xy) - 1, 1)]:
            draw_disc(draw, x, y, width / 2, colour)


def draw_object(image, shapes, colour, rng, poses=POSES):
    """Draws shapes with outline and shadow on the image, and returns the mask of the object, bool (H, W)."""
    size = image.width
    scale = rng.uniform(*poses.scale)
    pose = dict(
        turn=rng.uniform(-poses.max_turn, poses.max_turn),
        scale=scale,
        offset=rng.uniform(-poses.shift, poses.shift, 2),
        squash=rng.uniform(0.9, 1.05) * rng.choice([-1, 1]),
        tilt=rng.uniform(-poses.perspective, poses.perspective),
    )
    placed = []
    for shape in shapes:
        if shape.width is not None:
            shape = shape._replace(width=shape.width * scale / 2)
        placed.append((shape, place(shape.points, **pose)))
    outline = shaded(colour, 0.38) if sum(colour) > 150 else shaded(colour, 1.45)
    mask = Image.new("L", image.size, 0)
    for shape, points in placed:
        _paint(ImageDraw.Draw(mask), shape, points, size, 255, grow=0.012)
    shadow = mask.filter(ImageFilter.GaussianBlur(size * 0.02)).point(lambda v: int(v * 0.35))
    light = (round(size * rng.uniform(0.01, 0.035)), round(size * rng.uniform(0.02, 0.04)))
    image.paste((0, 0, 0), light, shadow)
    image.paste(outline, (0, 0), mask)
    draw = ImageDraw.Draw(image)
    for shape, points in placed:
        if shape.width is None and shape.tone not in (WHITE, BLACK):  # a fine line separates it from the shapes below
            _paint(draw, shape, points, size, shaded(colour, 0.6), grow=0.004)
        _paint(draw, shape, points, size, shaded(colour, shape.tone))
    return np.asarray(mask) > 127


def draw_blossom(draw, x, y, radius, turn, colour, centre=(255, 236, 150)):
    """Draws a blossom with five petals; x, y and radius are in pixels."""
    for grow, tone in ((0.09, 0.55), (0.0, 1.0)):
        for petal in range(5):
            angle = math.radians(turn + 72 * petal)
            px, py = x + 0.62 * radius * math.cos(angle), y + 0.62 * radius * math.sin(angle)
            draw_disc(draw, px, py, 0.41 * radius + grow * radius, shaded(colour, tone))
    draw_disc(draw, x, y, 0.28 * radius, centre)


def draw_dot(draw, x, y, radius, turn, colour):
    """Draws a dot with an outline. The turn, which the other motifs have, changes nothing."""
    draw_disc(draw, x, y, radius, shaded(colour, 0.55))
    draw_disc(draw, x, y, 0.86 * radius, colour)


def _draw_outlined(draw, points, x, y, radius, turn, colour):
    for grow, tone in ((1.15, 0.55), (0.95, 1.0)):
        xy = place(points, turn, 2 * radius * grow, (x - 0.5, y - 0.5), 1.0, 0.0)
        draw.polygon([tuple(p) for p in xy], fill=shaded(colour, tone))


STAR = star(1.05, 0.48)
HEART = mirrored([*curve((0, -0.45), (0.25, -1.15), (1.25, -0.85), (0.9, 0.0)), (0, 1.0)])
DIAMOND = np.array([(0, -1.05), (0.7, 0), (0, 1.05), (-0.7, 0)])
# {word: how it is drawn} of the motifs on the base model's objects. They have its ten colours and are never pink, so that a
# LoRA can be trained on pink blossoms.
MOTIFS = {
    "dots": draw_dot,
    "stars": lambda draw, *how: _draw_outlined(draw, STAR, *how),
    "hearts": lambda draw, *how: _draw_outlined(draw, HEART, *how),
    "diamonds": lambda draw, *how: _draw_outlined(draw, DIAMOND, *how),
    "flowers": draw_blossom,
}


def scatter(mask, count, distance, rng):
    """Returns up to `count` random points (x, y in pixels) on the mask, at least `distance` pixels apart."""
    ys, xs = np.nonzero(mask)
    chosen = []
    for index in rng.permutation(len(xs))[:4000]:
        point = np.array([xs[index], ys[index]], dtype=float)
        if all(np.hypot(*(point - other)) >= distance for other in chosen):
            chosen.append(point)
            if len(chosen) == count:
                break
    return chosen


def places_on(mask, count, rng, radius=(0.066, 0.088), fewest=4):
    """Returns places for `count` motifs on the object with this mask: (x, y, radius) as fractions of the picture.

    The places are all over the object, in the middle of its thin parts, and not on its tips. There are fewer places, but at
    least `fewest`, if the motifs would cover more than `MOST_COVERED` of the object.
    """
    grid = 128
    small = Image.fromarray((mask * 255).astype(np.uint8)).resize((grid, grid))
    deep = np.asarray(small.filter(ImageFilter.MinFilter(5))) > 127
    depth = small.filter(ImageFilter.GaussianBlur(1.6))
    ridge = np.asarray(depth) >= np.asarray(depth.filter(ImageFilter.MaxFilter(3)))
    allowed = (np.asarray(small) > 127) & (deep | ridge)
    around = np.asarray(small.filter(ImageFilter.GaussianBlur(6)), dtype=float)
    allowed &= around > np.quantile(around[allowed], 0.18)
    grid_y, grid_x = np.mgrid[0:grid, 0:grid]
    while True:
        for distance in np.arange(34, 17, -2):
            points = scatter(allowed, count, distance, rng)
            if len(points) == count:
                break
        radii = grid * rng.uniform(*radius, len(points))
        hidden = np.any([np.hypot(grid_x - x, grid_y - y) < r for (x, y), r in zip(points, radii)], axis=0)
        if hidden[np.asarray(small) > 127].mean() < MOST_COVERED or count <= fewest:
            return [((x + 0.5) / grid, (y + 0.5) / grid, r / grid) for (x, y), r in zip(points, radii)]
        count -= 1


def decorate_with(motif, colour):
    """Returns a `decorate` function for `draw_scene`, which draws four to eight motifs of this colour on the object."""

    def decorate(image, mask, rng):
        draw, size = ImageDraw.Draw(image), image.width
        for x, y, radius in places_on(mask, int(rng.integers(4, 9)), rng, radius=(0.05, 0.075)):
            MOTIFS[motif](draw, x * size, y * size, radius * size, rng.uniform(-30, 30), jittered(colour, rng))

    return decorate


def draw_scene(kind, colour, background, size, rng, decorate=None):
    """Draws an object on a background, an RGB `PIL.Image` of size x size.

    A colour is a name of `COLOURS`, or red, green and blue. `decorate(image, mask, rng)` draws on the enlarged picture.
    """
    colour, background = (COLOURS[c] if isinstance(c, str) else c for c in (colour, background))
    image = draw_background(jittered(background, rng), size * SUPERSAMPLING, rng)
    mask = draw_object(image, KINDS[kind], jittered(colour, rng), rng)
    if decorate is not None:
        decorate(image, mask, rng)
    return image.resize((size, size), Image.Resampling.BOX)


def decorate_with_confetti(image, mask, rng):
    """Draws dots, blossoms and strokes of any colour anywhere, so that the autoencoder learns to encode them all."""
    draw, size = ImageDraw.Draw(image), image.width
    for _ in range(rng.integers(2, 13)):
        x = rng.uniform(0, size)
        y = rng.uniform(0, size)
        radius = size * rng.uniform(0.03, 0.1)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        what = rng.integers(3)
        if what == 0:
            draw_disc(draw, x, y, radius, colour)
        elif what == 1:
            draw_blossom(draw, x, y, radius, rng.uniform(0, 72), colour)
        else:
            end = (x + rng.normal() * 4 * radius, y + rng.normal() * 4 * radius)
            draw.line(((x, y), end), fill=colour, width=max(round(radius / 2), 2))


def contact_sheet(images, columns, scale=1, gap=4):
    """Arranges pictures of equal size in a grid, each enlarged `scale` times."""
    images = [im.resize((im.width * scale, im.height * scale), Image.Resampling.LANCZOS) for im in images]
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet

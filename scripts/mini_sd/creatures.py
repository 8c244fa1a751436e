"""Vector drawings of small monsters. A drawing depends only on its arguments and a `numpy.random.Generator`.

The parts of a creature are painted from back to front on a transparent layer, in units in which its body is within about
-1 to 1. The layer is then rotated, scaled to fit, and put on a pale background.
"""

import itertools
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .drawings import COLOURS, SUPERSAMPLING, circle, curve, draw_disc, jittered, shaded


EXTENT = 2.2
OUTLINE = 0.045
CREAM = (250, 236, 200)
EYE_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown")
# The features of the 40 creatures of the bundled dataset.
FEATURES = (
    [(), ("horns",), ("wings",), ("spots",), ("stripes",), ("spikes",), ("long tail",)] * 4
    + [("long ears",), ("horns", "wings"), ("wings", "long tail"), ("spots", "long tail")] * 2
    + [("spikes", "long tail"), ("stripes", "wings"), ("long ears", "spots"), ("horns", "long tail")]
)
MOODS = ["happy"] * 12 + ["sad"] * 7 + ["cross"] * 6 + [None] * 15
# Pale backgrounds, each with the colour of the disc behind some creatures.
BACKGROUNDS = (
    ((255, 255, 255), (232, 242, 250)), ((255, 255, 255), (250, 240, 226)), ((250, 246, 236), (240, 230, 212)),
    ((234, 243, 252), (214, 230, 246)), ((238, 249, 236), (216, 238, 214)), ((252, 240, 243), (248, 222, 230)),
    ((243, 239, 252), (228, 220, 246)), ((255, 249, 224), (252, 238, 192)),
)  # fmt: skip
# The positions of the parts of each build, as ellipses (x, y, radius_x, radius_y) and points; `ears` in degrees from the top.
BUILDS = {
    "round": {
        "head": (0, 0, 0.86, 0.8), "torso": None, "belly": (0, 0.52, 0.46, 0.3), "eyes": (0, -0.28, 0.33),
        "feet": [(-0.42, 0.78), (0.42, 0.78)], "arms": [(-0.78, 0.12), (0.78, 0.12)], "limb": 0.17,
        "tail": (-0.62, 0.42), "wings": (0.6, -0.1), "ears": 50,
    },
    "tall": {
        "head": (0, -0.42, 0.6, 0.62), "torso": (0, 0.38, 0.74, 0.72), "belly": (0, 0.52, 0.46, 0.48),
        "eyes": (0, -0.5, 0.25), "feet": [(-0.4, 1.04), (0.4, 1.04)], "arms": [(-0.66, 0.15), (0.66, 0.15)],
        "limb": 0.16, "tail": (-0.5, 0.75), "wings": (0.5, 0.1), "ears": 42, "merged": True,
    },
    "upright": {
        "head": (0, -0.46, 0.7, 0.58), "torso": (0, 0.46, 0.5, 0.58), "belly": (0, 0.56, 0.31, 0.4),
        "eyes": (0, -0.52, 0.3), "feet": [(-0.34, 1.02), (0.34, 1.02)], "arms": [(-0.42, 0.25), (0.42, 0.25)],
        "limb": 0.14, "tail": (-0.3, 0.75), "wings": (0.35, 0.2), "ears": 48,
    },
    "fourfooted": {
        "head": (0.5, -0.38, 0.62, 0.54), "torso": (-0.2, 0.32, 0.78, 0.48), "belly": (-0.1, 0.62, 0.5, 0.2),
        "eyes": (0.55, -0.45, 0.25), "feet": [(-0.66, 0.95), (0.3, 0.98)], "back_feet": [(-0.36, 0.88), (0.05, 0.9)],
        "arms": [], "limb": 0.17, "tail": (-0.85, 0.2), "wings": (-0.3, 0.05), "ears": 46,
    },
}  # fmt: skip


def smooth(points, num_points=10):
    """Returns a closed curve through the points (Catmull-Rom spline)."""
    points = np.asarray(points, dtype=float)
    before, after, after_2 = (np.roll(points, shift, axis=0) for shift in (1, -1, -2))
    t = np.linspace(0, 1, num_points, endpoint=False)[:, None, None]
    out = 2 * points + (after - before) * t + (2 * before - 5 * points + 4 * after - after_2) * t**2
    out = (out + (3 * points - before - 3 * after + after_2) * t**3) / 2
    return out.transpose(1, 0, 2).reshape(-1, 2)


def limb(path, start_width, end_width):
    """Returns a polygon around the path, with round ends."""
    path = np.asarray(path, dtype=float)
    along = np.gradient(path, axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-6)
    across = along[:, ::-1] * [1, -1]
    widths = np.linspace(start_width, end_width, len(path))[:, None] / 2
    angles = np.linspace(0, np.pi, 9)[:, None]
    cap = path[-1] + (across[-1] * np.cos(angles) + along[-1] * np.sin(angles)) * widths[-1]
    back = path[0] + (-across[0] * np.cos(angles) - along[0] * np.sin(angles)) * widths[0]
    return np.concatenate([path + across * widths, cap, (path - across * widths)[::-1], back])


def ring(ellipse, degrees, grow=1.0):
    """Returns the point of an ellipse (x, y, radius_x, radius_y) at a clockwise angle from its top."""
    x, y, radius_x, radius_y = ellipse
    angle = math.radians(degrees)
    return np.array([x + grow * radius_x * math.sin(angle), y - grow * radius_y * math.cos(angle)])


def outline_of(colour):
    """Returns the colour of the outline of a shape."""
    return shaded(colour, 0.36) if sum(colour) < 690 else (112, 112, 128)


def paint(layer, points, colour, decals=(), outline=OUTLINE, volume=1.0, edge=None):
    """Paints a shape with an outline, lit from the upper left; decals (points, colour) are painted on it and clipped to it."""
    unit = layer.width / (2 * EXTENT)
    pixels = (np.asarray(points, dtype=float) + EXTENT) * unit
    pad = math.ceil(2 * outline * unit) + 16
    left, top = np.floor(pixels.min(axis=0)).astype(int) - pad
    right, bottom = np.ceil(pixels.max(axis=0)).astype(int) + pad
    size = (int(right - left), int(bottom - top))

    def local(shape):
        return [tuple(p) for p in (np.asarray(shape, dtype=float) + EXTENT) * unit - [left, top]]

    xy = local(points)
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).polygon(xy, fill=255)
    around = mask.copy()
    width = round(2 * outline * unit)
    if width:
        ImageDraw.Draw(around).line([*xy, *xy[:2]], fill=255, width=width, joint="curve")
    tile = Image.new("RGB", size, edge or outline_of(colour))
    inside = Image.new("RGB", size, colour)
    for shape, decal_colour in decals:
        ImageDraw.Draw(inside).polygon(local(shape), fill=decal_colour)
    depth = volume * 0.16 * float(min(np.ptp(pixels, axis=0)))
    for sign, light in ((-1, (30, 10, 60)), (1, (255, 255, 255))) if volume else ():
        moved = ImageChops.offset(mask, round(sign * depth * 0.55), round(sign * depth))
        rim = ImageChops.subtract(mask, moved.filter(ImageFilter.GaussianBlur(depth * 0.4)))
        inside.paste(light, (0, 0), rim.point(lambda v: round(v * 0.32)))
    tile.paste(inside, (0, 0), mask)
    layer.paste(tile, (int(left), int(top)), around)


def line(layer, points, width, colour):
    """Paints a stroke without an outline."""
    paint(layer, limb(points, width, width), colour, outline=0, volume=0)


def wing(rng):
    """Returns the shapes of a right wing that starts at (0, 0), from back to front, and its bones."""
    grow, lift = rng.uniform(0.95, 1.15), rng.uniform(-0.15, 0.2)
    if rng.random() < 0.6:
        tips = np.array([(1.0, -0.85), (1.08, -0.3), (0.82, 0.08), (0.1, 0.3)]) * grow - [0, lift]
        edge = [curve((0, 0), (0.2, -0.6), (0.6, -0.95), tips[0])]
        for start, end in itertools.pairwise(tips):
            edge.append(curve(start, (start + end) * 0.36, (start + end) * 0.36, end))
        return [np.concatenate(edge)], [curve((0.05, 0), tip * [0.4, 0.7], tip * [0.7, 0.9], tip) for tip in tips[1:3]]
    upper = [(0, 0), (0.3, -0.7), (0.8, -0.95), (1.08, -0.7), (0.9, -0.2), (0.4, 0.05)]
    lower = [(0, 0), (0.5, -0.05), (0.85, 0.2), (0.7, 0.5), (0.3, 0.4)]
    return [smooth(np.array(lobe) * grow - [0, lift]) for lobe in (lower, upper)], []


def paint_wing(layer, shapes, bones, root, side, colour):
    for shape in shapes:
        paint(layer, shape * [side, 1] + root, colour, volume=0.6)
    for bone in bones:
        line(layer, bone * [side, 1] + root, 0.035, shaded(colour, 0.6))


def paint_tail(layer, build, colour, accent, is_long, rng):
    x, y = build["tail"]
    if not is_long:
        paint(layer, limb(curve((x, y), (x - 0.2, y + 0.1), (x - 0.4, y), (x - 0.42, y - 0.2)), 0.3, 0.16), colour)
        return
    bend = rng.uniform(-0.15, 0.15)
    end = np.array([x - 0.72 + bend, y - 1.0 + rng.uniform(-0.2, 0.2)])
    path = curve((x + 0.2, y), (x - 0.75, y + 0.35), (x - 0.95, y - 0.35 + bend), end)
    paint(layer, limb(path, 0.32, 0.14), colour)
    tip = rng.integers(3)
    if tip == 0:
        paint(layer, np.array([(0, -0.3), (0.2, 0.08), (0, 0.02), (-0.2, 0.08)]) + end, accent)
    elif tip == 1:
        paint(layer, circle(*(end - [0, 0.08]), 0.19), accent)
    else:
        paint(layer, smooth(np.array([(0, 0.12), (0.2, -0.1), (0.12, -0.28), (0, -0.46), (-0.13, -0.22),
                                      (-0.18, -0.06)]) + end), accent)  # fmt: skip


def paint_spikes(layer, build, colour, rng):
    head, torso = build["head"], build["torso"]
    size = rng.uniform(0.26, 0.34)
    rows = [(head, np.linspace(-58, 58, 5) if build["arms"] else np.linspace(-80, 10, 4))]
    if torso is not None:
        rows.append((torso, (-62, -35, -8) if not build["arms"] else ()))
    for ellipse, degrees in rows:
        for angle in degrees:
            left, right = ring(ellipse, angle - 11, 0.86), ring(ellipse, angle + 11, 0.86)
            paint(layer, [left, ring(ellipse, angle, 1 + size * 1.3), right], colour)


def paint_horns(layer, build, colour, rng):
    head = build["head"]
    bend, length = rng.uniform(-0.25, 0.35), rng.uniform(0.48, 0.62)
    for side in (-1, 1):
        root = ring(head, side * 24, 0.88)
        path = curve(root, root + [side * 0.1, -0.25], root + [side * (0.3 + bend) * 0.8, -length * 0.8],
                     root + [side * (0.3 - bend), -length])  # fmt: skip
        paint(layer, limb(path, 0.24, 0.02), colour)


def paint_ears(layer, build, colour, inner, style, rng):
    head, droop = build["head"], rng.uniform(-8, 10)
    for side in (-1, 1):
        degrees = side * (build["ears"] + droop)
        root = ring(head, degrees, 0.86)
        out = np.array([math.sin(math.radians(degrees * 0.8)), -math.cos(math.radians(degrees * 0.8))])
        across = np.array([-out[1], out[0]])
        if style == "round":
            shape, small = circle(*(root + out * 0.16), 0.27), circle(*(root + out * 0.18), 0.15)
        else:
            length, width = {"pointed": (0.58, 0.27), "long": (0.98, 0.2)}[style]
            rim = np.array([(-1, -0.1), (-0.95, 0.5), (0, 1), (0.95, 0.5), (1, -0.1)])
            if style == "pointed":
                rim[[1, 3], 0] *= 0.72
            frame = np.stack([across * width, out * length])
            shape, small = smooth(rim @ frame + root), smooth(rim * [0.55, 0.7] @ frame + root + out * 0.06)
        paint(layer, shape, colour)
        paint(layer, small, inner, outline=0)


def paint_limbs(layer, build, colour, rng):
    """Paints the feet, and then the arms, which hang, point or wave."""
    claws = rng.random() < 0.5
    foot = rng.uniform(0.9, 1.15)
    for x, y in build.get("back_feet", ()):
        paint(layer, limb([(x, y - 0.45), (x, y)], 0.34, 0.3), shaded(colour, 0.8))
    for x, y in build["feet"]:
        if not build["arms"]:
            paint(layer, limb([(x, y - 0.5), (x, y)], 0.42, 0.36), colour)
        paint(layer, circle(x + 0.05 * np.sign(x), y, 0.27 * foot, 0.18 * foot), colour)
        for toe in (-1, 0, 1) if claws else ():
            paint(layer, circle(x + toe * 0.15 * foot, y + 0.08, 0.06, 0.08), CREAM, outline=0.02)
    for side, (x, y) in zip((-1, 1), build["arms"]):
        across, down = [(0.3, 0.3), (0.42, 0.05), (0.34, -0.36)][rng.choice(3, p=[0.45, 0.3, 0.25])]
        end = np.array([x + side * across, y + down])
        path = curve((x - side * 0.1, y), (x + side * 0.15, y), end - [side * 0.05, down * 0.4], end)
        paint(layer, limb(path, 2 * build["limb"], 1.6 * build["limb"]), colour)


def paint_eyes(layer, eyes, eye_colour, dark, look, mood, rng):
    x, y, apart = eyes
    radius = 0.21 * rng.uniform(0.95, 1.12) * (apart / 0.3) ** 0.5
    height, gaze = radius * rng.uniform(1.0, 1.3), np.array([look * 0.3, rng.uniform(-0.02, 0.03)])
    for side in (-1, 1):
        centre = np.array([x + look + side * apart, y])
        width = radius * (1 - 0.5 * max(side * look, 0))
        paint(layer, circle(*centre, width, height), (255, 255, 255), outline=0.035, volume=0.3, edge=dark)
        iris = centre + gaze
        for dx, dy, rx, ry, colour in (
            (0, 0, 0.8, 0.8, shaded(eye_colour, 0.66)), (0, 0.06, 0.68, 0.68, eye_colour),
            (0, 0, 0.34, 0.36, (16, 14, 22)), (-0.3, -0.36, 0.28, 0.26, (255, 255, 255)),
            (0.32, 0.36, 0.13, 0.12, (255, 255, 255)),
        ):  # fmt: skip
            shape = circle(*iris + [dx * width, dy * height], rx * width, ry * height)
            paint(layer, shape, colour, outline=0, volume=0)
        if mood in ("sad", "cross"):
            slant = side * (0.1 if mood == "sad" else -0.1)
            brow = centre + [(-0.2, -height - 0.08 - slant), (0.2, -height - 0.08 + slant)]
            line(layer, np.linspace(*brow, 8), 0.07, dark)


def paint_mouth(layer, eyes, dark, look, mood, rng):
    between, eye_level, apart = eyes
    x = between + look * 1.25
    y = eye_level + 0.4 + 0.25 * (apart - 0.25)
    width = rng.uniform(0.16, 0.22)
    style = {"sad": "frown", "happy": "open"}.get(mood, ("smile", "open", "teeth")[rng.integers(3)])
    sag = -0.13 if style == "frown" else 0.13
    left, right = (x - width, y - sag / 3), (x + width, y - sag / 3)
    lip = curve(left, (x - width / 2, y + sag * 2 / 3), (x + width / 2, y + sag * 2 / 3), right)
    if style == "open":
        jaw = curve(right, (x + width * 0.8, y + 0.3), (x - width * 0.8, y + 0.3), left)
        tongue = (circle(x, y + 0.2, width * 0.6, 0.1), (240, 120, 130))
        paint(layer, np.concatenate([(lip + [0, y]) / [1, 2], jaw]), (150, 30, 50), [tongue], 0.03, 0, dark)
        return
    line(layer, lip, 0.05, dark)
    for side in (-1, 1) if style == "teeth" else ():
        tooth = np.array([(-0.055, 0), (0.055, 0), (0, 0.14)]) + [x + side * width * 0.6, y + 0.02]
        paint(layer, tooth, (255, 255, 250), outline=0.02, volume=0, edge=dark)


def pattern(ellipse, features, colour, rng, free=360):
    """Returns spots or stripes on an ellipse of the body as decals; spots are within `free` degrees around its top."""
    x, y, radius_x, radius_y = ellipse
    decals = []
    if "spots" in features:
        for degrees in np.arange(-free / 2, free / 2, 45) + rng.uniform(0, 45):
            radius = rng.uniform(0.11, 0.17)
            decals.append((circle(*ring(ellipse, degrees, rng.uniform(0.76, 0.92)), radius, radius * 0.9), colour))
    if "stripes" in features:
        for side, height in itertools.product((-1, 1), (-0.5, 0.0, 0.5)):
            base = np.array([x + side * radius_x * 1.05, y + height * radius_y])
            tip = base - [side * rng.uniform(0.5, 0.65) * radius_x, -0.04]
            decals.append(([base - [0, 0.14], tip, base + [0, 0.14]], colour))
        top = np.array([x, y - radius_y])
        for dx in (-0.26, 0, 0.26):
            decals.append((top + [(dx - 0.1, -0.2), (dx * 0.8, 0.3 - abs(dx) / 2), (dx + 0.1, -0.2)], colour))
    return decals


def merged_body(head, torso):
    """Returns a single outline around head and torso, for a build without a neck."""
    right = [ring(head, a) for a in (0, 30, 60, 88)] + [ring(torso, a) for a in (62, 95, 130, 160, 180)]
    left = [p * [-1, 1] for p in right[-2:0:-1]]
    return smooth(right + left)


def proportioned(build, rng):
    """Returns the build with a larger or smaller head and face."""
    build, grow = dict(build), rng.uniform(0.92, 1.1)
    x, y, radius_x, radius_y = build["head"]
    if not build.get("merged"):
        build["head"] = (x, y, radius_x * grow, radius_y * grow * rng.uniform(0.95, 1.06))
    between, level, apart = build["eyes"]
    build["eyes"] = (between, level + rng.uniform(-0.03, 0.05), apart * grow)
    return build


def paint_creature(layer, colour, eye_colour, build, features, mood, rng):
    build = proportioned(BUILDS[build], rng)
    body = (66, 66, 76) if colour == "black" else jittered(COLOURS[colour], rng, 10)
    belly = CREAM
    accent = shaded(body, 0.5)
    skin = shaded(body, 1.5)
    if colour == "white":
        accent, skin = (160, 166, 188), (204, 220, 242)
    elif colour == "black":
        accent = (150, 150, 166)
    elif colour == "yellow":
        accent = (178, 112, 26)
    mark = skin if colour in ("brown", "blue", "purple") else accent
    if colour not in ("white", "yellow") and rng.random() < 0.5:
        belly = shaded(body, 1.55)
    dark = (14, 14, 20) if colour == "black" else (70, 66, 84) if colour == "white" else shaded(body, 0.3)
    look = rng.uniform(0.02, 0.14) * (1 if build["arms"] else 0.5)
    head = build["head"]
    torso = build["torso"]
    root = np.array(build["wings"])
    wings = wing(rng) if "wings" in features else ([], [])
    wing_colour = skin if "long tail" in features else (skin, accent)[rng.integers(2)]
    if build["arms"]:
        paint_wing(layer, *wings, root, 1, wing_colour)
        paint_wing(layer, *wings, root * [-1, 1], -1, wing_colour)
    else:
        paint_wing(layer, *wings, root + [0.25, -0.1], -1, shaded(wing_colour, 0.85))
    paint_tail(layer, build, body, accent, "long tail" in features, rng)
    if "spikes" in features:
        paint_spikes(layer, build, accent, rng)
    elif "horns" not in features:
        style = "long" if "long ears" in features else ("pointed", "round")[rng.integers(2)]
        paint_ears(layer, build, body, (250, 200, 205) if colour == "white" else skin, style, rng)
    paint_limbs(layer, build, body, rng)
    eyes = between, level, apart = build["eyes"]
    face = []
    if mood == "happy":
        for side in (-1, 1):
            cheek = circle(between + look + side * (apart + 0.16), level + 0.3, 0.12, 0.08)
            face.append((cheek, (250, 140, 150) if colour not in ("red", "orange") else shaded(body, 1.45)))
    x, y, radius_x, radius_y = build["belly"]
    underside = (circle(x + look, y, radius_x, radius_y), belly)
    if build.get("merged"):
        decals = pattern(torso, features, mark, rng)
        paint(layer, merged_body(head, torso), body, [*decals, underside, *face])
    elif torso is None:
        paint(layer, circle(*head, num_points=64), body, [*pattern(head, features, mark, rng), underside, *face])
    else:
        paint(layer, circle(*torso, num_points=64), body, [*pattern(torso, features, mark, rng), underside])
        if not build["arms"]:
            paint_wing(layer, *wings, root, -1, wing_colour)
        paint(layer, circle(*head, num_points=64), body, [*pattern(head, features, mark, rng, 180), *face])
    if "horns" in features:
        paint_horns(layer, build, CREAM if colour not in ("white", "yellow") else (196, 150, 96), rng)
    paint_eyes(layer, eyes, eye_colour, dark, look, mood, rng)
    paint_mouth(layer, eyes, dark, look, mood, rng)


def draw_creature(colour, eye_colour, build, features, mood, size, rng):
    """Draws a creature on a pale background, an RGB `PIL.Image` of size x size.

    The colours are names of `COLOURS`, and `build` is a key of `BUILDS`. `features` contains any of "horns", "wings", "long
    tail", "long ears", "spots", "stripes" and "spikes". `mood` is "happy", "sad" or "cross", or None for any face.
    """
    big = size * SUPERSAMPLING
    layer = Image.new("RGBA", (2 * big, 2 * big), (0, 0, 0, 0))
    paint_creature(layer, colour, COLOURS[eye_colour], build, features, mood, rng)
    if rng.random() < 0.5:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = layer.rotate(rng.uniform(-7, 7), Image.Resampling.BICUBIC)
    layer = layer.crop(layer.getbbox())
    stretch, room = rng.uniform(0.94, 1.06), rng.uniform(0.8, 0.88) * big
    scale = room / max(layer.width * stretch, layer.height)
    layer = layer.resize((round(layer.width * stretch * scale), round(layer.height * scale)), Image.Resampling.LANCZOS)

    background, disc = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    image = Image.new("RGB", (big, big), disc if colour == "white" else background)
    draw, middle = ImageDraw.Draw(image), big / 2
    if rng.random() < 0.6:
        r = rng.uniform(0.36, 0.44) * big
        draw_disc(draw, middle, middle, r, background if colour == "white" else disc)
    left, top = (big - layer.width) // 2, round((big - layer.height) / 2 - 0.01 * big)
    shadow = Image.new("L", image.size, 0)
    floor, wide = top + layer.height - 0.02 * big, 0.4 * layer.width
    ImageDraw.Draw(shadow).ellipse((middle - wide, floor - 0.035 * big, middle + wide, floor + 0.035 * big), fill=70)
    image.paste((40, 40, 80), (0, 0), shadow.filter(ImageFilter.GaussianBlur(0.012 * big)))
    image.paste(layer, (left, top), layer)
    return image.resize((size, size), Image.Resampling.BOX)

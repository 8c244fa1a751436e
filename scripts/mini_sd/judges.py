"""Judges that recognise what a picture of the embedded base model shows: the colours, the kind of object, and blossoms.

Colours are judged by pixels. Kind and blossoms are judged by a small network, which is trained on drawings alone, some of
them blurred, and never on pictures of a model. Some of these drawings have shapes that must not count as blossoms: pink dots,
smears, stars, hearts and diamonds, and blossoms beside the object.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFilter

from .. import ROOT
from .drawings import COLOURS, KINDS, MOTIFS, WEAPONS, draw_blossom, draw_disc, draw_scene, jittered, places_on
from .model import RESOLUTION, all_scenes, to_tensor
from .weapons import PINKS, decorate_with_blossoms, draw_weapon


JUDGE = ROOT / "models" / "mini-sd-judge" / "judge.safetensors"
BORDER = 6  # pixels at each side that show only background
SURE = 0.0  # a blossom counts if the logit of its centre is larger: the decision boundary of the network
NEAREST, FARTHEST = 9, 16  # radii in pixels of a ring around a blossom's centre in which the object must be visible
LEAST_AROUND = 0.2  # minimum share of the ring's pixels that show the object, without pink ones; shafts are narrow
DIFFERENT = 0.5  # a pixel is not background from this share of the object's distance to the background in `lab` on
GRAYS = ("white", "gray", "black")
CELL = 4  # side in pixels of a cell of the blossom map
TO_LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
# What is drawn on or beside an object, to train and measure the judge of blossoms.
PLANTS = ("blossoms", "dots", "dots with centres", "smears", "beside", "stars", "hearts", "diamonds", "nothing")


def lab(image):
    """Returns a picture in CIE L*a*b* (H, W, 3); the weight of lightness is smaller, because shading changes it most."""
    values = np.asarray(ImageCms.applyTransform(image.convert("RGB"), TO_LAB)).astype(float)
    values[..., 0] *= 0.6 / 2.55
    values[..., 1:] -= 256 * (values[..., 1:] > 127)
    return values


PALETTE = np.concatenate([lab(Image.new("RGB", (1, 1), colour))[0] for colour in COLOURS.values()])


def nearest_colours(pixels):
    """Returns the index of the nearest of `COLOURS` for each of the pixels (N, 3) of `lab`."""
    return np.argmin(np.square(pixels[:, None] - PALETTE).sum(axis=2), axis=1)


def is_pink(image):
    """Returns which pixels are pink like a blossom, bool (H, W); no colour of the base model's drawings is similar."""
    hue, saturation, value = np.asarray(image.convert("HSV"), dtype=float).transpose(2, 0, 1)
    return (hue > 215) & (hue < 250) & (saturation > 35) & (saturation < 190) & (value > 170)


def not_background(image):
    """Returns the colour of the background in `lab`, which pixels differ from it, and which are neither border nor pink.

    The background colour is the median of the border. The threshold of the difference is relative to the largest
    differences of the picture, because the colour of an object may be similar to the background, such as black on gray.
    """
    values, border = lab(image), np.ones((image.height, image.width), dtype=bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    background = np.median(values[border], axis=0)
    distance = np.sqrt(np.square(values - background).sum(axis=2))
    pink = Image.fromarray(is_pink(image)).convert("L").filter(ImageFilter.MaxFilter(5))
    rest = ~border & ~(np.asarray(pink) > 0)
    return background, (distance > DIFFERENT * np.quantile(distance[rest], 0.95)), rest


class Colours(NamedTuple):
    """The names of the colours that a picture shows."""

    object: str
    background: str


def judge_colours(image):
    """Returns the `Colours` of a picture by its pixels, ignoring blossoms.

    Each pixel that differs from the background votes for the nearest colour other than the background's.
    """
    background, differs, rest = not_background(image)
    background_index = nearest_colours(background[None])[0]
    pixels = lab(image)[differs & rest]
    votes = np.bincount(nearest_colours(pixels), minlength=len(COLOURS)) if len(pixels) else np.zeros(len(COLOURS))
    votes[background_index] = 0
    colour, background = list(COLOURS)[votes.argmax()], list(COLOURS)[background_index]
    if colour in GRAYS:  # white and black objects have gray parts, so that the lightness decides
        lightness = pixels[np.isin(nearest_colours(pixels), [list(COLOURS).index(gray) for gray in GRAYS]), 0]
        darkest, brightest = np.quantile(lightness, [0.5, 0.9]) / 0.6
        other = "white" if brightest > 86 else "black" if darkest < 32 else "gray"
        colour = colour if other == background else other
    return Colours(colour, background)


def _smear(draw, x, y, radius, colour, rng):
    """Draws a blot of overlapping discs along a short random walk."""
    heading = rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.integers(3, 8))):
        draw_disc(draw, x, y, radius * rng.uniform(0.45, 0.9), colour)
        heading += rng.normal() * 0.8
        x, y = x + 0.7 * radius * np.cos(heading), y + 0.7 * radius * np.sin(heading)


def plant(what, image, mask, count, rng):
    """Draws one of `PLANTS` in pink on the object or beside it, and returns the places of the blossoms on the object."""
    if what == "blossoms":
        return decorate_with_blossoms(image, mask, count, rng)
    if what == "nothing":
        return []
    draw, size = ImageDraw.Draw(image), image.width
    one, other = PINKS
    pink = one + rng.uniform(0, 1) * (other - one)
    where = mask
    if what == "beside":
        near = Image.fromarray((mask * 255).astype(np.uint8)).resize((RESOLUTION, RESOLUTION))
        where = np.asarray(near.filter(ImageFilter.MaxFilter(27))) < 128
        where[:10] = False
        where[-10:] = False
        where[:, :10] = False
        where[:, -10:] = False
        if where.sum() < 50:
            return []
    for x, y, radius in places_on(where, count, rng):
        colour, turn = jittered(pink, rng, 14), rng.uniform(0, 72)
        x *= size
        y *= size
        radius *= size
        if what == "beside":
            draw_blossom(draw, x, y, radius, turn, colour)
        elif what == "smears":
            _smear(draw, x, y, radius, colour, rng)
        elif what in ("dots", "dots with centres"):
            radius *= rng.uniform(0.7, 1.0)
            MOTIFS["dots"](draw, x, y, radius, turn, colour)
            if what == "dots with centres":
                draw_disc(draw, x, y, 0.3 * radius, (255, 236, 150))
        else:
            MOTIFS[what](draw, x, y, 0.9 * radius, turn, colour)
    return []


def draw_planted(what, scene, rng):
    """Draws a scene with one of `PLANTS`, weapons partly in the style of the bundled datasets.

    Returns the RGB `PIL.Image` and the places (x, y, radius) of the blossoms on the object.
    """
    places = []

    def decorate(image, mask, count, rng):
        places.extend(plant(what, image, mask, count, rng))

    if scene.kind in WEAPONS and rng.random() < 0.7:
        picture = draw_weapon(scene.kind, scene.colour, scene.background, rng, decorate)
    else:
        count = int(rng.integers(4, 9))
        picture = draw_scene(
            scene.kind, scene.colour, scene.background, RESOLUTION, rng,
            decorate=lambda image, mask, rng: decorate(image, mask, count, rng),
        )  # fmt: skip
    return picture, places


def judge_drawing(seed, index):
    """Returns drawing `index` of the judge's training set, the index of its kind, and the places of its blossoms."""
    rng = np.random.default_rng([seed, 40, index])
    scenes = all_scenes()
    scene = scenes[rng.integers(len(scenes))]
    if rng.random() < 0.4:
        scene = scene._replace(kind=str(rng.choice(WEAPONS)))
    what = str(rng.choice(PLANTS, p=[0.4, 0.08, 0.08, 0.08, 0.08, 0.03, 0.03, 0.02, 0.2]))
    picture, places = draw_planted(what, scene, rng)
    picture = picture.filter(ImageFilter.GaussianBlur(float(rng.choice([0, 0, 0.7, 1.2, 1.6]))))
    return picture, list(KINDS).index(scene.kind), places


def make_judge():
    """Returns an untrained judge of kinds and blossoms.

    For pictures (N, 3, 128, 128), the network returns the logits of the kinds (N, 16), and the logits that a cell contains
    the centre of a blossom (N, 32, 32).
    """
    import torch
    from torch import nn

    def block(channels, width, **how):
        return nn.Sequential(nn.Conv2d(channels, width, 3, bias=False, **how), nn.BatchNorm2d(width), nn.ReLU())

    class Judge(nn.Module):
        def __init__(self):
            super().__init__()
            self.near = nn.Sequential(
                block(3, 24, stride=2, padding=1), block(24, 48, stride=2, padding=1), block(48, 48, padding=1)
            )
            self.around = nn.Sequential(block(48, 48, padding=2, dilation=2), block(48, 48, padding=1))
            self.blossom = nn.Conv2d(96, 1, 1)
            self.far = nn.Sequential(
                block(48, 64, stride=2, padding=1), block(64, 96, stride=2, padding=1),
                block(96, 128, stride=2, padding=1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(2048, len(KINDS)),
            )  # fmt: skip

        def forward(self, pixels):
            near = self.near(pixels)
            return self.far(near), self.blossom(torch.cat([near, self.around(near)], dim=1))[:, 0]

    torch.manual_seed(0)
    return Judge().to(memory_format=torch.channels_last)


def blossom_map(places):
    """Returns a float32 array (32, 32) with a 1 in each cell that contains the centre of a blossom."""
    cells = RESOLUTION // CELL
    out = np.zeros((cells, cells), dtype=np.float32)
    for x, y, _ in places:
        out[min(int(y * cells), cells - 1), min(int(x * cells), cells - 1)] = 1
    return out


def train_judge(path, seed, count=6000, epochs=10, batch_size=32):
    """Loads the judge of kinds and blossoms from the file `path`; if it does not exist, trains the judge and saves it there."""
    import multiprocessing

    import torch
    from safetensors.torch import load_file, save_file

    judge = make_judge()
    if path.exists():
        judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return judge.eval()
    print(f"drawing {count} pictures for the judge of kinds and blossoms", flush=True)
    with multiprocessing.get_context("spawn").Pool() as workers:
        drawings = workers.map(partial(judge_drawing, seed), range(count), chunksize=16)
    pictures = torch.from_numpy(np.stack([np.asarray(picture) for picture, _, _ in drawings]))
    kinds = torch.tensor([kind for _, kind, _ in drawings])
    maps = torch.from_numpy(np.stack([blossom_map(places) for _, _, places in drawings]))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    steps, rng = epochs * (count // batch_size), np.random.default_rng([seed, 43])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    torch.manual_seed(seed)
    for step in range(1, steps + 1):
        batch = rng.integers(count, size=batch_size)
        pixels = to_tensor(pictures[batch].numpy(), "cpu")
        pixels = pixels + 0.05 * torch.randn(batch_size, 1, 1, 1) + 0.1 * torch.rand(()) * torch.randn_like(pixels)
        logits, blossoms = judge(pixels)
        loss = torch.nn.functional.cross_entropy(logits, kinds[batch], label_smoothing=0.05)
        weight = 1 + 15 * maps[batch]
        loss = loss + 5 * torch.nn.functional.binary_cross_entropy_with_logits(blossoms, maps[batch], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, path)
    return judge.eval()


def on_object(image, places):
    """Returns the places (x, y in pixels) around which the object is visible; around other blossoms is only background."""
    (_, differs, _), pink = not_background(image), is_pink(image)
    rows, columns = np.mgrid[: image.height, : image.width]
    found = []
    for x, y in places:
        distance = np.hypot(columns - x, rows - y)
        ring = (distance >= NEAREST) & (distance <= FARTHEST) & ~pink
        if ring.sum() > 20 and differs[ring].mean() >= LEAST_AROUND:
            found.append((x, y))
    return found


def judge_pictures(judge, images):
    """Returns the name of the kind, and the number of blossoms on the object, for each of the RGB pictures of 128 x 128."""
    import torch

    kinds, counts = [], []
    with torch.no_grad():
        for first in range(0, len(images), 64):
            part = images[first : first + 64]
            logits, blossoms = judge(to_tensor(part, "cpu"))
            kinds += [list(KINDS)[i] for i in logits.argmax(dim=1)]
            highest = torch.nn.functional.max_pool2d(blossoms[:, None], 5, stride=1, padding=2)[:, 0]
            for image, peaks in zip(part, (blossoms == highest) & (blossoms > SURE), strict=True):
                middles = [(CELL * (x + 0.5), CELL * (y + 0.5)) for y, x in torch.nonzero(peaks).tolist()]
                counts.append(len(on_object(image, middles)))
    return kinds, counts


def shares(judge, images, scenes):
    """Returns the shares of pictures whose colours and kind of object are those of their scene, and of those with blossoms."""
    colours = [judge_colours(image) for image in images]
    kinds, counts = judge_pictures(judge, images)
    right_object = [shown.object == scene.colour for shown, scene in zip(colours, scenes, strict=True)]
    right_background = [shown.background == scene.background for shown, scene in zip(colours, scenes, strict=True)]
    return {
        "object_colour": float(np.mean(right_object)),
        "background_colour": float(np.mean(right_background)),
        "kind": float(np.mean([kind == scene.kind for kind, scene in zip(kinds, scenes, strict=True)])),
        "blossoms": float(np.mean([count > 0 for count in counts])),
        "pictures": len(images),
    }


def judge_the_judges(judge, seed, count):
    """Returns the `shares` of drawings with each of `PLANTS`, sharp and blurred: the scores of a perfect model.

    The share with blossoms should be 1 for blossoms and 0 for everything else.
    """
    rows, everything = {}, all_scenes()
    for number, what in enumerate(PLANTS):
        rng = np.random.default_rng([seed, 41, number])
        scenes = [everything[i] for i in rng.integers(len(everything), size=count)]
        scenes = [each._replace(kind=str(rng.choice(WEAPONS))) if i % 2 else each for i, each in enumerate(scenes)]
        pictures = [picture for picture, _ in (draw_planted(what, scene, rng) for scene in scenes)]
        pictures = [p.filter(ImageFilter.GaussianBlur(0.8 * (i % 3 == 0))) for i, p in enumerate(pictures)]
        rows[f"drawings, {what}"] = shares(judge, pictures, scenes)
    return rows

"""Draws the pictures of an evaluation: a plot of likeness against drift, and sheets of drawn and training pictures."""

import math
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from text_to_image_lora.pictures.fonts import font_for, legible
from text_to_image_lora.pictures.sheets import Label, Row, labelled_sheet, stacked

from .inputs import images_of
from .scores import Estimate


NUM_PROMPTS = 6  # prompts of each kind on the sheet of pictures
NUM_PAIRS = 4  # pictures of each LoRA that are shown beside their nearest training picture
FINER = 3  # the plot is drawn larger by this factor and reduced, because PIL does not smooth lines
WIDTH, HEIGHT = 900, 600  # size of the plot in pixels
LEFT, RIGHT = 90, 40  # margins of the plot
TOP, BOTTOM = 60, 80
INK = "#222222"
GRID = "#e2e2e2"
LINE = "#4477aa"
CHOSEN = "#cc3311"


def ticks(low, high):
    """Returns round numbers that divide a span into four to nine parts."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 9)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def span(values, least=None):
    """Returns the range (low, high) of `Estimate`s with their errors, with a margin; `least` fixes the lower end."""
    low = min(each.mean - each.error for each in values) if least is None else least
    high = max(each.mean + each.error for each in values)
    room = 0.08 * (high - low) or 0.05
    return (low - room if least is None else least), high + room


class Axes:
    """Draws on a plot, and converts values to positions in pixels."""

    def __init__(self, across, up):
        self.image = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.across = across
        self.up = up

    def place(self, x, y):
        (left, right), (low, high) = self.across, self.up
        return (
            LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    def line(self, points, colour, width=1.0):
        self.draw.line([(FINER * x, FINER * y) for x, y in points], colour, round(FINER * width), joint="curve")

    def disc(self, x, y, radius, colour):
        self.draw.ellipse([FINER * v for v in (x - radius, y - radius, x + radius, y + radius)], colour)

    def text(self, x, y, text, size=15, anchor="mm", colour=INK):
        font = font_for(text, FINER * size)
        self.draw.text((FINER * x, FINER * y), legible(text, font), colour, font, anchor=anchor)

    def frame(self, title, across, up):
        """Draws the grid lines with their numbers, the names of the axes, and the title."""
        left, _ = self.across
        low, _ = self.up
        for x in ticks(*self.across):
            at, _ = self.place(x, low)
            self.line([(at, TOP), (at, HEIGHT - BOTTOM)], GRID)
            self.text(at, HEIGHT - BOTTOM + 16, f"{x:.4g}", 13)
        for y in ticks(*self.up):
            _, at = self.place(left, y)
            self.line([(LEFT, at), (WIDTH - RIGHT, at)], GRID)
            self.text(LEFT - 10, at, f"{y:.4g}", 13, "rm")
        self.line([(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], INK, 1.3)
        self.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 28, across)
        self.text(LEFT, 24, title, 17, "lm")
        self.text(LEFT, 46, up, 13, "lm")


class Point(NamedTuple):
    """A LoRA on the plot; the LoRAs of one run are joined by a line."""

    label: str
    run: Any
    drift: Estimate
    likeness: Estimate


def plot(points, base, chosen, likeness):
    """Plots `Point`s; points that are higher and further left are better.

    `base` is the base model's likeness, `likeness` is the name of the score, and the LoRA labelled `chosen` is red.
    """
    axes = Axes(span([each.drift for each in points], 0.0), span([base, *(each.likeness for each in points)]))
    axes.frame(
        "Likeness to the held-out pictures, and drift",
        "drift from the base model, for prompts without the trigger",
        likeness,
    )
    _, level = axes.place(0, base.mean)
    for x in range(LEFT, WIDTH - RIGHT, 12):
        axes.line([(x, level), (min(x + 6, WIDTH - RIGHT), level)], "#888888", 1.3)
    axes.text(WIDTH - RIGHT, level - 10, "base", 13, "rm", "#666666")
    for run in dict.fromkeys(each.run for each in points):
        axes.line(
            [axes.place(each.drift.mean, each.likeness.mean) for each in points if each.run == run], "#b8cbdd", 1.5
        )
    for (x, dx), (y, dy), colour in ((each.drift, each.likeness, colour_of(each, chosen)) for each in points):
        axes.line([axes.place(x - dx, y), axes.place(x + dx, y)], colour, 1.5)
        axes.line([axes.place(x, y - dy), axes.place(x, y + dy)], colour, 1.5)
        axes.disc(*axes.place(x, y), 6, colour)
    label_points(axes, points, chosen)
    return axes.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def colour_of(point, chosen):
    return CHOSEN if point.label == chosen else LINE


def label_points(axes, points, chosen):
    """Writes the label of each `Point` beside it, where it covers no other label."""
    middles = [axes.place(each.drift.mean, each.likeness.mean) for each in points]
    boxes = [(x - 7, y - 7, x + 7, y + 7) for x, y in middles]
    for point, (x, y) in zip(points, middles, strict=True):
        wide = font_for(point.label, 14).getlength(point.label)
        places = [(x + 10, y - 14 * k) for k in (1, -1, 2, -2, 3, -3)] + [
            (x - 10 - wide, y - 14 * k) for k in (1, -1, 2, -2, 3, -3)
        ]
        places = [(left, up) for left, up in places if left > LEFT and left + wide < WIDTH] or places

        def clear(place, wide=wide):
            left, up = place
            return all(left + wide < a or left > c or up + 8 < b or up - 8 > d for a, b, c, d in boxes)

        left, up = next(filter(clear, places), places[0])
        boxes.append((left, up - 8, left + wide, up + 8))
        axes.text(left, up, point.label, 14, "lm", colour_of(point, chosen))


def open_picture(path):
    with Image.open(path) as image:
        return image.convert("RGB")


def spread(numbers):
    """Returns at most `NUM_PROMPTS` of the numbers, evenly spaced."""
    count = min(NUM_PROMPTS, len(numbers))
    return [numbers[round(k * (len(numbers) - 1) / max(count - 1, 1))] for k in range(count)]


def picture_sheet(inputs, folder_of, seed):
    """Returns a sheet of pictures by the base model and each LoRA, for some prompts and one seed.

    The upper part has prompts with the trigger, below the held-out pictures of these captions. The lower part has prompts
    without the trigger and prompts for other things.
    """
    numbers, parts = range(len(inputs.asked)), []
    triggered = [i for i in numbers if inputs.asked[i].triggered]
    for heading, chosen in (
        ("with the trigger", spread(triggered)),
        ("without the trigger", spread([i for i in numbers if i not in triggered])),
    ):
        rows = []
        if heading == "with the trigger":
            references = [inputs.asked[i].references[0] for i in chosen]
            rows.append(Row(Label("held out"), images_of(inputs.held_out, references)))
        for label in inputs.loras:
            images = [open_picture(folder_of(label) / f"{i:03d}-seed{seed}.png") for i in chosen]
            rows.append(Row(Label(label), images))
        columns = [Label(inputs.asked[i].prompt, f"seed {seed}") for i in chosen]
        parts.append(labelled_sheet(rows, columns, title=heading))
    return stacked(parts)


def nearest_sheet(inputs, copied, folder_of, seed):
    """Returns a sheet with the pictures of each LoRA that are nearest to a training picture, which is on their right."""
    rows = []
    for label, found in copied.items():
        pairs, images = found[:NUM_PAIRS], []
        for pair in pairs:
            images.append(open_picture(folder_of(label) / f"{pair.asked:03d}-seed{seed + pair.seed}.png"))
            images += images_of(inputs.trained, [pair.trained])
        note = f"likeness {pairs[0].likeness:.2f} to {pairs[-1].likeness:.2f}"
        rows.append(Row(Label(label, note), images))
    columns = [Label("drawn"), Label("trained on")] * min(NUM_PAIRS, len(pairs))
    return labelled_sheet(rows, columns, title="Nearest to a training picture")

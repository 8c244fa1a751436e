"""The curves of a run, or of several over each other, as plain data that the page's script draws."""

import math

import numpy as np


POINTS = 800  # of a curve at most; where there are more steps, a point is the mean of several
SMOOTHING = 0.95  # of the faint training loss, as on the progress bar
# Of runs: eight, and these once more, lighter.
COLOURS = (
    "#3366aa", "#dd6622", "#228855", "#aa3377", "#887711", "#229999", "#884422", "#666666",
    "#88bbee", "#f0b080", "#77cc99", "#dd88bb", "#ccbb55", "#77d0d0", "#c09070", "#b0b0b0",
)  # fmt: skip
# From the least noisy timestep to the noisiest.
OF_TIMESTEPS = ("#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#440154")
# Title, unit of the axis, and the names in metrics.jsonl.
CHARTS = (
    ("Loss relative to the base model", "base = 1", ("validation/relative_loss", "validation/relative_loss_in_training")),
    ("Training loss", "", ("train_loss",)),
    ("Learning rate", "", ("lr",)),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Speed", "images/s", ("images_per_second",)),
    ("Memory", "GiB at most", ("peak_memory_gib",)),
)  # fmt: skip
FROM_ZERO = ("images_per_second", "peak_memory_gib")  # a change of a percent is none
NAMES = {
    "validation/relative_loss": "pictures held out",
    "validation/relative_loss_in_training": "as many that are trained on",
}
AT_TIMESTEP = "validation/relative_loss_t"
# The other charts tell these already, or they are no curves.
TOLD = {"epoch", "validation/loss", "validation/gap", "validation/best_step", "validation/worse_since",
        "validation/best_relative_loss"}  # fmt: skip


def thinned(curve):
    """The (steps, values) of a `Curve` as lists, at most `POINTS` of them; values to five digits."""
    steps, values = (np.frombuffer(each, each.typecode) for each in curve)
    each = math.ceil(len(steps) / POINTS)
    if each > 1:  # the last of a part's steps, so that the last point is the last step
        first = np.arange(0, len(steps), each)
        last = np.minimum(first + each, len(steps)) - 1
        steps, values = steps[last], np.add.reduceat(values, first) / (last - first + 1)
    return steps.tolist(), [float(f"{value:.5g}") for value in values]


def smoothed(values):
    """The moving average that the progress bar shows."""
    found, average = [], None
    for value in values:
        average = value if average is None else SMOOTHING * average + (1 - SMOOTHING) * value
        found.append(float(f"{average:.5g}"))
    return found


def charts_of(curves):
    """The charts of one run's {name: `Curve`} as `chart` makes them, those that it has no numbers of left out."""
    charts = []
    for title, unit, names in CHARTS:
        lines = []
        for name, colour in zip(names, COLOURS, strict=False):
            lines += lines_of(curves, name, NAMES.get(name, ""), colour)
        charts.append(chart(title, unit, lines, names[0]))
    at_timesteps = sorted(name for name in curves if name.startswith(AT_TIMESTEP))
    lines = []
    for place, name in enumerate(at_timesteps):
        colour = OF_TIMESTEPS[place * len(OF_TIMESTEPS) // len(at_timesteps)]
        lines += lines_of(curves, name, f"t = {int(name.removeprefix(AT_TIMESTEP))}", colour)
    charts.insert(1, chart("Relative loss at each timestep", "999 is all noise", lines, AT_TIMESTEP))
    told = TOLD | {name for _, _, names in CHARTS for name in names} | {*at_timesteps}
    for name in sorted(curves.keys() - told):
        charts.append(chart(name, "", lines_of(curves, name, "", COLOURS[0]), name))
    return [each for each in charts if each["lines"]]


def chart(title, unit, lines, name):
    """What the page's script draws: `base` asks for a line at 1, where the base model is, `zero` for an axis from 0."""
    base = name.startswith("validation/relative_loss")
    return {"title": title, "unit": unit, "lines": lines, "base": base, "zero": name in FROM_ZERO, "legend": True}


def lines_of(curves, name, label, colour):
    """The lines of one number: its curve; of the training loss, which swings, a faint one and its moving average."""
    if name not in curves:
        return []
    steps, values = thinned(curves[name])
    line = {"label": label, "x": steps, "y": values, "colour": colour, "faint": False, "dots": len(steps) <= 60}
    if name != "train_loss" or len(steps) < 20:
        return [line]
    faint = line | {"faint": True, "label": "each step" if not label else ""}
    return [faint, line | {"y": smoothed(values), "label": label or "moving average"}]


def charts_over_each_other(runs):
    """The charts of several runs ({run: {name: `Curve`}}), a colour each."""
    charts = []
    for title, unit, names in CHARTS:
        lines = []
        for place, (run, curves) in enumerate(runs.items()):
            # Of the training loss the moving average alone: the single steps of several runs hide each other.
            lines += lines_of(curves, names[0], run, COLOURS[place % len(COLOURS)])[-1:]
        charts.append(chart(title, unit, lines, names[0]) | {"legend": False})  # the page has one for all
    return [each for each in charts if each["lines"]]

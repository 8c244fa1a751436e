"""Prepares the curves of one or several runs as plain data, which the report page's script draws."""

import math

import numpy as np

from .numbers import Curve


MAX_POINTS = 800  # per curve; with more steps, each point is the mean of several steps
SMOOTHING = 0.95  # decay of the moving average of the training loss, as on the progress bar
# Colours of runs: eight dark ones, then the same hues lighter.
COLOURS = (
    "#3366aa", "#dd6622", "#228855", "#aa3377", "#887711", "#229999", "#884422", "#666666",
    "#88bbee", "#f0b080", "#77cc99", "#dd88bb", "#ccbb55", "#77d0d0", "#c09070", "#b0b0b0",
)  # fmt: skip
# From the least noisy timestep to the noisiest.
TIMESTEP_COLOURS = ("#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#440154")
# Title, unit of the axis, and names of the metrics in metrics.jsonl.
CHARTS = (
    ("Loss relative to the base model", "base = 1", ("validation/relative_loss", "validation/relative_loss_in_training")),
    ("Drift from the base model without the concept", "base = 0", ("validation/drift",)),
    ("Training loss", "", ("train_loss",)),
    ("Learning rate", "", ("lr",)),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Speed", "images/s", ("images_per_second",)),
    ("Memory", "GiB, peak", ("peak_memory_gib",)),
)  # fmt: skip
# Their axis starts at 0, so that a change of one percent does not look large.
FROM_ZERO = ("validation/drift", "images_per_second", "peak_memory_gib")
# The axis of relative losses ends here, so that a run that diverged does not flatten the curves of the others.
HIGHEST_RELATIVE_LOSS = 2
LABELS = {
    "validation/relative_loss": "held-out pictures",
    "validation/relative_loss_in_training": "equally many training pictures",
}
TIMESTEP_PREFIX = "validation/relative_loss_t"
# Metrics that other charts show already, or that are not curves.
WITHOUT_CHART = {"epoch", "validation/loss", "validation/gap", "validation/best_step", "validation/worse_since",
                 "validation/best_relative_loss", "validation/best_standard_error", "validation/sure_step", "validation/best_drift"}  # fmt: skip


def thin_out(curve: Curve) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a `Curve`, averaged to at most `MAX_POINTS` and rounded to five digits."""
    steps, values = (np.frombuffer(values, values.typecode) for values in curve)
    steps_per_point = math.ceil(len(steps) / MAX_POINTS)
    if steps_per_point > 1:  # each mean is drawn at its last step, so that the curve ends at the last step
        first = np.arange(0, len(steps), steps_per_point)
        last = np.minimum(first + steps_per_point, len(steps)) - 1
        steps, values = steps[last], np.add.reduceat(values, first) / (last - first + 1)
    return steps.tolist(), [float(f"{value:.5g}") for value in values]


class MovingAverage:
    """An exponential moving average whose first values are plain means, so that no single first value dominates it.

    `value` is None before the first `add`.
    """

    def __init__(self):
        self.value: float | None = None
        self.count = 0

    def add(self, value: float) -> float:
        """Returns the average after a further value."""
        share = max(1 - SMOOTHING, 1 / (self.count + 1))
        self.value = value if self.value is None else (1 - share) * self.value + share * value
        self.count += 1
        return self.value


def smooth(values: list[float]) -> list[float]:
    """Returns the moving average that the progress bar shows."""
    average = MovingAverage()
    return [float(f"{average.add(value):.5g}") for value in values]


def make_charts(curves: dict[str, Curve]) -> list[dict]:
    """Makes the charts of one run from its {metric: `Curve`}; charts without data are left out."""
    charts = []
    for title, unit, names in CHARTS:
        lines = []
        for name, colour in zip(names, COLOURS, strict=False):
            lines += make_lines(curves, name, LABELS.get(name, ""), colour)
        charts.append(make_chart(title, unit, lines, names[0]))
    at_timesteps = sorted(name for name in curves if name.startswith(TIMESTEP_PREFIX))
    lines = []
    for place, name in enumerate(at_timesteps):
        colour = TIMESTEP_COLOURS[place * len(TIMESTEP_COLOURS) // len(at_timesteps)]
        lines += make_lines(curves, name, f"t = {int(name.removeprefix(TIMESTEP_PREFIX))}", colour)
    charts.insert(1, make_chart("Relative loss at each timestep", "999 is pure noise", lines, TIMESTEP_PREFIX))
    shown = WITHOUT_CHART | {name for _, _, names in CHARTS for name in names} | {*at_timesteps}
    for name in sorted(curves.keys() - shown):
        charts.append(make_chart(name, "", make_lines(curves, name, "", COLOURS[0]), name))
    return [chart for chart in charts if chart["lines"]]


def make_chart(title: str, unit: str, lines: list[dict], name: str) -> dict:
    """Makes the data of a chart: `base` draws a line at 1, the base model's loss; `axis` is as from `find_axis`."""
    base = name.startswith("validation/relative_loss")
    values = [value for line in lines for value in line["y"]]
    axis = find_axis(values, base=base, from_zero=name in FROM_ZERO)
    if base and axis:
        unit += f"; cut off above {HIGHEST_RELATIVE_LOSS}"
    return {"title": title, "unit": unit, "lines": lines, "base": base, "axis": axis, "legend": True}


def find_axis(values: list[float], *, base: bool, from_zero: bool) -> list[float] | None:
    """Returns the ends of a chart's vertical axis, or None where the smallest and the largest value decide them."""
    if not values:
        return None
    lowest, highest = min(values), max(values)
    if base and lowest <= HIGHEST_RELATIVE_LOSS < highest:
        return [min(0.95, 0.95 * lowest), HIGHEST_RELATIVE_LOSS]
    # The default axis of a constant, such as a constant learning rate, would not depend on its value.
    if from_zero or lowest == highest:
        return [min(0.0, 1.15 * highest), 1.15 * max(0.0, highest) or 1.0]
    return None


def make_lines(curves: dict[str, Curve], name: str, label: str, colour: str) -> list[dict]:
    """Makes the lines of one metric: its curve, or for the noisy training loss a faint curve and its moving average."""
    if name not in curves:
        return []
    steps, values = thin_out(curves[name])
    line = {"label": label, "x": steps, "y": values, "colour": colour, "faint": False, "dots": len(steps) <= 60}
    if name != "train_loss" or len(steps) < 20:
        return [line]
    faint = line | {"faint": True, "label": "each step" if not label else ""}
    return [faint, line | {"y": smooth(values), "label": label or "moving average"}]


def make_comparison_charts(runs: dict[str, dict[str, Curve]]) -> list[dict]:
    """Makes the charts that overlay several runs ({run: {metric: `Curve`}}), each in its own colour."""
    charts = []
    for title, unit, names in CHARTS:
        lines = []
        for place, (run, curves) in enumerate(runs.items()):
            # Only the moving average of the training loss, as the raw curves of several runs would hide each other.
            lines += make_lines(curves, names[0], run, COLOURS[place % len(COLOURS)])[-1:]
        charts.append(make_chart(title, unit, lines, names[0]) | {"legend": False})  # one legend serves all charts
    return [chart for chart in charts if chart["lines"]]

"""What a sweep has found, as tables and a sheet of pictures; `sweep.py` calls it."""

import csv
import json
from pathlib import Path

from text_to_image_lora.reports.numbers import LOSS as METRIC
from text_to_image_lora.reports.numbers import read_numbers


DONE = {"complete": 0, "pruned": 1}  # states in the order of the table; others come last
MOST_STRIPS = 24  # trials on the sheet of pictures


def trial_dir(folder, number):
    return Path(folder) / f"trial-{number:04d}"


def validations_of(output_dir):
    """The rows of a trial's metrics with a validation so far, the one before its first step left out."""
    return [row for row in read_numbers(output_dir).validations if row["step"] > 0]


def losses_of(output_dir):
    """{step: loss} of a trial's validations so far."""
    return {row["step"]: row[METRIC] for row in validations_of(output_dir)}


def lora_of(output_dir):
    """Where a trial's LoRA is, in words: the one that the run kept as its best, or else its last."""
    best = Path(output_dir) / "best"
    if not best.is_dir():
        return str(output_dir)
    return f"{best}, of step {validations_of(output_dir)[-1]['validation/best_step']}"


def rank(trials, folder, varied):
    """Rows of Optuna's trials, the best first: number, state, lowest loss, step of it, and the values of the varied flags.

    Trials that failed and were made up for by another are left out.
    """
    rows = []
    for trial in trials:
        losses = losses_of(trial_dir(folder, trial.number))
        lowest = min(losses, key=losses.get) if losses else None
        row = {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            METRIC: trial.value if trial.value is not None else losses.get(lowest),
            "at_step": lowest,
        }
        values = trial.system_attrs.get("fixed_params", {}) | trial.params
        rows.append(row | {key: values.get(key) for key in varied})
    newest = {_key(row, varied): row["trial"] for row in rows}
    rows = [row for row in rows if row["state"] != "fail" or newest[_key(row, varied)] == row["trial"]]
    return sorted(rows, key=lambda row: (DONE.get(row["state"], 2), row[METRIC] if row[METRIC] is not None else 9e9))


def _key(row, names):
    return json.dumps([row[name] for name in names], default=str)  # lists are values too


def mean_and_error(values):
    """Mean and its standard error; None for that of a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, (sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)) ** 0.5


def over_seeds(rows, varied):
    """The rows of trials that differ by their seed alone as one: mean loss and its standard error, the best first.

    `rows` are of `rank`. Where other settings have the seeds of the best, too, `above_best` is the mean of the differences seed by seed. Its error
    is the smaller one: part of what a seed does, it does to all.
    """
    groups, others = {}, [key for key in varied if key != "seed"]
    for row in rows:
        if row["state"] == "complete":
            values, losses = groups.setdefault(_key(row, others), ({key: row[key] for key in others}, {}))
            losses[row["seed"]] = row[METRIC]

    def place(group):  # those that lack seeds come last: they may have had the easy ones
        _, losses = group
        mean, _ = mean_and_error(list(losses.values()))
        return -len(losses), mean

    found, best = [], None
    for values, losses in sorted(groups.values(), key=place):
        mean, error = mean_and_error(list(losses.values()))
        row = {METRIC: mean, "standard_error": error, "above_best": None, "its_error": None, "seeds": len(losses)}
        pairs = [] if best is None else [loss - best[seed] for seed, loss in losses.items() if seed in best]
        if pairs:
            row["above_best"], row["its_error"] = mean_and_error(pairs)
        best = losses if best is None else best
        found.append(row | values)
    return found


def best_of(rows, varied):
    """The row of the trial to take, or None: of the settings that are best over their seeds, the one with the lowest loss."""
    done = [row for row in rows if row["state"] == "complete"]
    if not done or "seed" not in varied:
        return next(iter(done), None)
    best, *_ = over_seeds(rows, varied)
    others = [key for key in varied if key != "seed"]
    return next(row for row in done if _key(row, others) == _key(best, others))


def shown(value):
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(rows):
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(shown, row.values())) + " |" for row in rows])


def picture_sheet(rows, folder, varied):
    """The newest validation pictures of the trials, a row each, the best first; None where there are none."""
    from PIL import Image, ImageDraw, ImageFont

    side = 144  # of a picture, in pixels
    words = 300  # the width of what is said of a trial
    gap = 6
    strips = []
    for row in rows[:MOST_STRIPS]:
        folders = sorted((trial_dir(folder, row["trial"]) / "validation").glob("step-*"))
        paths = sorted(folders[-1].glob("prompt-*.png")) if folders else []
        if paths:
            strips.append((row, paths[:8]))
    if not strips:
        return None
    width = words + max(len(paths) for _, paths in strips) * (side + gap) + gap
    sheet, font = Image.new("RGB", (width, len(strips) * (side + gap) + gap), "white"), ImageFont.load_default(size=14)
    draw = ImageDraw.Draw(sheet)
    for number, (row, paths) in enumerate(strips):
        top = gap + number * (side + gap)
        lines = [f"trial {row['trial']}   {METRIC.partition('/')[2]} {shown(row[METRIC])}"]
        lines += [f"{key} {shown(row[key])}" for key in varied]
        draw.multiline_text((gap, top), "\n".join(lines[:8]), fill="black", font=font, spacing=3)
        for place, path in enumerate(paths):
            with Image.open(path) as image:
                image = image.convert("RGB")
                image.thumbnail((side, side))
                if max(image.size) < side:
                    scale = side / max(image.size)
                    image = image.resize([round(s * scale) for s in image.size], Image.Resampling.LANCZOS)
                sheet.paste(image, (words + place * (side + gap), top))
    return sheet


def write(rows, folder, varied, command_of):
    """results.csv, results.md and pictures.png in the sweep's folder; returns the text of the second.

    `command_of(params)` is the command that trains with these values once more.
    """
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    said = [markdown(rows)]
    if "seed" in varied and rows[0]["state"] == "complete":
        said += ["", "Over the seeds:", "", markdown(over_seeds(rows, varied))]
    best = best_of(rows, varied)
    if best is not None:
        what = (
            "Of the settings that are best over the seeds, the best trial is"
            if "seed" in varied
            else "The best is trial"
        )
        lora = lora_of(trial_dir(folder, best["trial"]))
        said += ["", f"{what} {best['trial']} (its LoRA: {lora}):", "", command_of({key: best[key] for key in varied})]
    (folder / "results.md").write_text("\n".join(said) + "\n", encoding="utf-8")
    sheet = picture_sheet(rows, folder, varied)
    if sheet is not None:
        sheet.save(folder / "pictures.png")
    return "\n".join(said)

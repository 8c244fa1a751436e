"""Writes the results of a sweep as tables and a sheet of pictures, for `sweep.py`."""

import csv
import io
import itertools
import json
from pathlib import Path

from text_to_image_lora.files import write_whole
from text_to_image_lora.pictures.sheets import COLUMNS, Label, Row, labelled_sheet, save_sheet, tell_apart
from text_to_image_lora.reports.numbers import LOSS as METRIC
from text_to_image_lora.reports.numbers import read_numbers
from text_to_image_lora.reports.runs import open_sample, read_pictures


DONE = {"complete": 0, "pruned": 1}  # the order of states in the table; other states come last
MOST_STRIPS = 24  # trials on the sheet of pictures
MOST_SHOWN = 6  # varied flags beside the pictures of a trial
PICTURE_SIDE = 144  # of a picture on the sheet, in pixels
LABEL_WIDTH = 300  # of the name of a trial beside its pictures, in pixels


def trial_dir(folder, number):
    return Path(folder) / f"trial-{number:04d}"


def validations_of(output_dir):
    """Returns the rows of a trial's metrics that have a validation, without the validation before the first step."""
    return [row for row in read_numbers(output_dir).validations if row["step"] > 0]


def losses_of(output_dir):
    """Returns {step: loss} of a trial's validations so far."""
    return {row["step"]: row[METRIC] for row in validations_of(output_dir)}


def describe_lora(output_dir):
    """Describes where the best LoRA of a trial is, or its last LoRA if it has no best one."""
    best = Path(output_dir) / "best"
    if not best.is_dir():
        return str(output_dir)
    return f"{best}, of step {validations_of(output_dir)[-1]['validation/best_step']}"


def rank(trials, folder, varied):
    """Returns a row for each of Optuna's trials, the best first: number, state, lowest loss, its step, and varied flags.

    Failed trials that were repeated are left out.
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
    return json.dumps([row[name] for name in names], default=str)  # JSON, because values can be lists


def mean_and_error(values):
    """Returns the mean and its standard error, which is None for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, (sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)) ** 0.5


def over_seeds(rows, varied):
    """Returns one row for all trials that differ only in their seed: mean loss and its standard error, the best first.

    `rows` are those of `rank`. For settings that share seeds with the best ones, `above_best` is the mean paired difference
    per seed. Its error is smaller, because part of a seed's effect is common to all settings.
    """
    groups, others = {}, [key for key in varied if key != "seed"]
    for row in rows:
        if row["state"] == "complete":
            values, losses = groups.setdefault(_key(row, others), ({key: row[key] for key in others}, {}))
            losses[row["seed"]] = row[METRIC]

    def place(group):  # settings with fewer seeds come last, as those seeds may have been easy
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
    """Returns the row with the lowest loss of the settings that are best over their seeds, or None without complete trials."""
    done = [row for row in rows if row["state"] == "complete"]
    if not done or "seed" not in varied:
        return next(iter(done), None)
    best, *_ = over_seeds(rows, varied)
    others = [key for key in varied if key != "seed"]
    return next(row for row in done if _key(row, others) == _key(best, others))


def format_value(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(rows):
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(format_value, row.values())) + " |" for row in rows])


def picture_sheet(rows, folder, varied):
    """Draws a row of the newest validation pictures of each trial, the best first; None if there are no pictures."""
    from PIL import Image, ImageOps

    strips, columns = [], []
    for row in rows[:MOST_STRIPS]:
        steps = read_pictures(trial_dir(folder, row["trial"]))
        if not steps:
            continue
        samples = [*steps[max(steps)].values()][:COLUMNS]
        pictures = []
        for sample in samples:
            image = open_sample(sample.path) or Image.new("RGB", (1, 1), "white")  # a damaged picture stays empty
            tile = (PICTURE_SIDE, PICTURE_SIDE)
            pictures.append(ImageOps.pad(image, tile, Image.Resampling.LANCZOS, color="white"))
        name = f"{trial_dir('', row['trial'])}   {METRIC.partition('/')[2]} {format_value(row[METRIC])}"
        note = "\n".join(f"{key} {format_value(row[key])}" for key in varied[:MOST_SHOWN])
        strips.append(Row(Label(name, note), pictures, LABEL_WIDTH))
        columns.append(label_samples(samples))
    if not strips:
        return None
    # The trials may have different prompts: only what they have in common stands above a column.
    shared = [
        labels[0] if all(label == labels[0] for label in labels) else Label()
        for labels in itertools.zip_longest(*columns, fillvalue=Label())
    ]
    return labelled_sheet(strips, shared)


def label_samples(samples):
    """Returns a `Label` for each `SavedSample`; samples of one prompt are told apart by their seeds and options."""
    options = [{"seed": f"seed {sample.seed}"} | sample.options for sample in samples]
    notes = tell_apart([sample.prompt for sample in samples], options)
    return [Label(sample.prompt, note) for sample, note in zip(samples, notes, strict=True)]


def write(rows, folder, varied, make_best_command):
    """Writes results.csv, results.md and pictures.png into the sweep's folder; returns the text of results.md.

    `make_best_command(params)` returns the command that trains again with these values of the varied flags.
    """
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "results.csv", table.getvalue())
    lines = [markdown(rows)]
    if "seed" in varied and rows[0]["state"] == "complete":
        lines += ["", "Mean over the seeds:", "", markdown(over_seeds(rows, varied))]
    best = best_of(rows, varied)
    if best is not None:
        sentence = "The best trial is"
        if "seed" in varied:
            sentence = "The best trial of the settings that are best over the seeds is"
        lora = describe_lora(trial_dir(folder, best["trial"]))
        command = make_best_command({key: best[key] for key in varied})
        lines += [
            "",
            f"{sentence} {trial_dir('', best['trial'])} (its LoRA: {lora}). To train with its settings again:",
            "",
            command,
        ]
    write_whole(folder / "results.md", "\n".join(lines) + "\n")
    sheet = picture_sheet(rows, folder, varied)
    if sheet is not None:
        save_sheet(sheet, folder / "pictures.png")
    return "\n".join(lines)

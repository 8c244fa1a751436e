"""Writes the tables, plot, sheets and recommendation of an evaluation into its folder, for `evaluate.py`."""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from text_to_image_lora.files import write_whole
from text_to_image_lora.pictures.sheets import save_sheet
from text_to_image_lora.reports import stopping
from text_to_image_lora.reports.equal_files import describe_equal, find_equal

from . import scores
from .inputs import BASE, images_of
from .judges import describe_misfit
from .pictures import picture_folder
from .plot import Point, nearest_sheet, picture_sheet, plot


HELD_OUT = "held-out pictures"


class Pair(NamedTuple):
    """A drawn picture and its nearest training picture."""

    asked: int  # index of the prompt in `Inputs.asked`
    seed: int  # number of the seed, from 0
    trained: int  # index of the training picture
    likeness: float


class Found(NamedTuple):
    """The results of an evaluation."""

    tables: dict  # {label: {score: table (P, S)}}
    losses: dict  # {label: `Estimate` of the held-out loss, relative to the base model's}
    of_held_out: dict  # {score: `Estimate`} of the held-out pictures themselves
    bleed: dict  # {label: {group of prompts: {concept: `Estimate`}}}
    copied: dict  # {label: `Pair`s}, nearest first
    misfit: str | None  # why the judge does not apply to the held-out pictures, or None


def by_prompt(values, rows, num_images):
    """Reshapes values (P * S, ...) of all prompts to (P, S, ...) and selects the prompts `rows`."""
    values = np.asarray(values)
    return values.reshape(-1, num_images, *values.shape[1:])[rows]


def compute_scores(inputs, drawn, num_images):
    """Computes the `Found` of the pictures that the LoRAs drew."""
    with_trigger = [i for i, each in enumerate(inputs.asked) if each.triggered]
    without = [i for i, each in enumerate(inputs.asked) if not each.triggered]
    groups = [inputs.asked[i].group for i in without]
    held_out = inputs.judge.look(images_of(inputs.held_out), inputs.captions(), {})
    same = inputs.judge.compared_by
    training = None if inputs.trained is None else inputs.judge.embed(images_of(inputs.trained))[same]
    near = None
    if training is not None:
        near, _ = scores.nearest(held_out.embedded[same], training)
    base = drawn[BASE]
    tables = {}
    losses = {}
    bleed = {}
    copied = {}

    def of(label, rows, name=same):
        return by_prompt(drawn[label].seen.embedded[name], rows, num_images)

    def presence(label):
        return {name: by_prompt(own, without, num_images) for name, own in drawn[label].seen.presence.items()}

    for label, (seen, table) in drawn.items():
        own = {inputs.judge.adherence_name: by_prompt(seen.adherence, with_trigger, num_images)}
        for name in inputs.judge.alike_by:
            references = [held_out.embedded[name][list(inputs.asked[i].references)] for i in with_trigger]
            own[name] = scores.likeness(of(label, with_trigger, name), references)
        own["set distance"] = scores.set_distance(of(label, with_trigger), held_out.embedded[same])
        if label != BASE:
            own["drift"] = scores.drift(of(label, without), of(BASE, without))
            bleed[label] = scores.bleed(presence(label), presence(BASE), groups)
        own["diversity"] = scores.diversity(of(label, with_trigger))
        if training is not None:
            own["nearest"], which = scores.nearest(of(label, with_trigger), training)
            own["memorised"] = scores.memorised(own["nearest"], near)
            order = np.dstack(np.unravel_index(np.argsort(-own["nearest"], axis=None), which.shape))[0]
            copied[label] = [
                Pair(with_trigger[p], int(s), int(which[p, s]), float(own["nearest"][p, s])) for p, s in order
            ]
        tables[label] = own
        more, error = stopping.difference(table, base.losses, base.losses)
        losses[label] = scores.Estimate(1 + more, error if label != BASE else 0.0)
    of_held_out = {inputs.judge.adherence_name: scores.mean_and_error(held_out.adherence[:, None])}
    if near is not None:
        of_held_out["nearest"] = scores.mean_and_error(near[:, None])
    return Found(tables, losses, of_held_out, bleed, copied, describe_misfit(inputs.judge, held_out))


def summary(found):
    """Returns {label: {score: `Estimate`}}; the base model is first, the held-out pictures are last."""
    rows = {
        label: {name: scores.mean_and_error(table) for name, table in own.items()}
        | {"held-out loss": found.losses[label]}
        for label, own in found.tables.items()
    }
    return rows | {HELD_OUT: found.of_held_out}


def find_runs(loras):
    """Returns {label: folder of the run} for {label: `Lora` or None}; a checkpoint belongs to the run that contains it."""
    runs = {}
    for label, lora in loras.items():
        if lora is not None:
            path = Path(lora.given)
            runs[label] = path.parent if re.fullmatch(r"(epoch|checkpoint)-\d+|best", path.name) else path
    return runs


def describe_equal_loras(loras):
    """Returns a line for each group of {label: `Lora` or None} with equal weights and strengths."""
    chosen = {label: lora for label, lora in loras.items() if lora is not None}
    return [
        describe_equal(labels)
        for scale in sorted({lora.scale for lora in chosen.values()})
        for labels in find_equal(
            {label: lora.files[0] for label, lora in chosen.items() if lora.scale == scale and len(lora.files) == 1}
        )
    ]


def markdown(head, rows):
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]])


def table_of_scores(rows):
    names = list(dict.fromkeys(name for own in rows.values() for name in own))
    names = [name for name in names if name != "held-out loss"] + ["held-out loss"]
    return markdown(
        ["LoRA", *names],
        [[label, *(scores.format_estimate(own.get(name)) for name in names)] for label, own in rows.items()],
    )


def table_of_bleed(bleed):
    concepts = list(next(iter(next(iter(bleed.values())).values())))
    rows = [
        [label, group, *(scores.format_estimate(own[concept], "+") for concept in concepts)]
        for label, matrix in bleed.items()
        for group, own in matrix.items()
    ]
    return markdown(["LoRA", "prompts, without the trigger", *concepts], rows)


def make_recommendation(found, likeness):
    """Returns the label of the recommended LoRA or None, and a sentence that explains it, by the likeness of this name."""
    if found.misfit is not None:
        return None, f"No LoRA is recommended. {found.misfit}"
    tables = {
        label: {"likeness": own[likeness], "drift": own["drift"], "memorised": own.get("memorised")}
        | {"loss": found.losses[label]}
        for label, own in found.tables.items()
        if label != BASE
    }
    return scores.recommend(tables, found.tables[BASE][likeness])


def write(args, inputs, drawn):
    """Writes evaluation.md, evaluation.json, likeness-drift.png, pictures.png and nearest.png into the output folder.

    Returns the text to print.
    """
    found = compute_scores(inputs, drawn, args.num_images)
    folder = args.output_dir
    *_, likeness = inputs.judge.alike_by
    rows = summary(found)
    chosen, words = make_recommendation(found, likeness)
    judges = ", ".join(inputs.judge.sources.values()) or "the judges of models/mini-sd"
    about = (
        f"{len(inputs.asked)} prompts x {args.num_images} seeds for each LoRA, {len(inputs.held_out)} held-out pictures; "
        f"scored by {judges}. Values are means with their standard errors."
    )
    lines = [
        words,
        *describe_equal_loras(inputs.loras),
        "",
        table_of_scores(rows),
        "",
        "How much more of a concept is drawn than by the base model:",
        "",
    ]
    lines += [table_of_bleed(found.bleed)]
    pages = ["", "![likeness against drift](likeness-drift.png)", "", "![pictures](pictures.png)"]
    points = [
        Point(label, find_runs(inputs.loras)[label], rows[label]["drift"], rows[label][likeness])
        for label in found.bleed
    ]
    save_sheet(plot(points, rows[BASE][likeness], chosen, likeness), folder / "likeness-drift.png")
    folder_of = functools.partial(picture_folder, folder)
    save_sheet(picture_sheet(inputs, folder_of, args.seed), folder / "pictures.png")
    if found.copied:
        save_sheet(nearest_sheet(inputs, found.copied, folder_of, args.seed), folder / "nearest.png")
        pages += ["", "Each picture beside its nearest training picture:", "", "![nearest](nearest.png)"]
    write_whole(folder / "evaluation.md", "\n".join(["# Evaluation", "", *lines, "", about, *pages]) + "\n")
    stored = {
        "recommendation": {"take": chosen, "words": words},
        "scores": to_dicts(rows),
        "bleed": {label: to_dicts(matrix) for label, matrix in found.bleed.items()},
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "prompts": [each._asdict() for each in inputs.asked],
    }
    write_whole(folder / "evaluation.json", json.dumps(stored, indent=2, ensure_ascii=False) + "\n")
    return "\n".join(lines)


def to_dicts(rows):
    """Converts {label: {score: `Estimate`}} to dicts for JSON."""
    return {
        label: {name: {"mean": value.mean, "standard_error": value.error} for name, value in own.items()}
        for label, own in rows.items()
    }

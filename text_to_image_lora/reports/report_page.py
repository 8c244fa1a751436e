"""`report.html`: what a run or several runs came to, on one page that needs no network and no other file."""

import functools
import importlib.util
import json
import logging
import os
import re
import time
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from ..errors import InputError
from ..files import reason_of, write_whole
from .about import FILE as ABOUT
from .about import data_url
from .curves import COLOURS, charts_of, charts_over_each_other
from .numbers import FILE as METRICS
from .runs import answer_of, read_run


logger = logging.getLogger(__name__)
FILE = "report.html"
TEMPLATES = Path(__file__).parent / "page"
SIDE = 384  # pixels of a sample picture's longer side; the PNG is linked
MOST_IN_LABEL, LONGEST_LABEL = 3, 48  # settings that make a run's name, and how long that may be
MOST_PICTURES = 120  # on a page, some 4 MB of photographs
FINDINGS = (
    ("left_out", "left out, or worth knowing"),
    ("enlarged", "smaller than what they are trained at, and enlarged"),
    ("equal", "times the same file"),
    ("alike", "times pictures that look alike"),
)


def update_page(folder, *, of_several=False):
    """Writes the page of the run in a folder, or of the runs in its folders; returns whether that was possible.

    It is not worth a run: where it can't be written, that is said, and the run goes on.
    """
    folder = Path(folder)
    try:
        if of_several:
            write_comparison(runs_in([folder]), folder / FILE, folder.resolve().name)
        else:
            write_page(folder)
    except Exception as error:
        logger.info(f"{folder / FILE} is not up to date: {reason_of(error)}")
        return False
    return True


def write_page(output_dir):
    """Writes the page of the run in a folder, and returns its path."""
    run, path = read_run(output_dir), Path(output_dir) / FILE
    answer = answer_of(run)
    take = None if answer.take is None else _linked(answer.take, path)
    dataset = run.about.get("dataset", {})
    shown = _cards_of([run], path.parent, {run.folder: answer})
    _render(
        path, "run.html", title=run.name, answer=answer, step=run.step, num_steps=run.settings.get("max_train_steps"),
        take=take, files=[_linked(file, path) for file in run.files], charts=charts_of(run.numbers.curves), dataset=dataset,
        findings=list(_findings(dataset)), command=re.split(" (?=--)", run.about.get("command", "")), machine=run.about.get("machine"),
        versions=run.about.get("versions"), settings=run.settings, **shown,
    )  # fmt: skip
    return path


def write_comparison(folders, path, title):
    """Writes a page of several runs over each other, the best first, and returns its path."""
    runs = [read_run(folder) for folder in folders]
    answers = {run.folder: answer_of(run) for run in runs}
    runs.sort(key=lambda run: -(answers[run.folder].gain or 0.0))
    differs = differences([run.flags for run in runs])
    labels = _labels(runs, differs)
    names = {run.folder: label for run, label in zip(runs, labels, strict=True)}
    best = runs[0]
    sentence = "No run has pictures held out to judge by: look at the sample pictures."
    if answers[best.folder].gain is not None:
        sentence = f"{names[best.folder]} did best. {answers[best.folder].sentence}"
    elif answers[best.folder].judged:
        sentence = "No run was better than the base model."
    rows = []
    for place, run in enumerate(runs):
        answer, page = answers[run.folder], run.folder / FILE
        rows.append({
            "name": names[run.folder], "folder": run.name, "answer": answer, "step": run.step, "colour": COLOURS[place % len(COLOURS)],
            "page": _link(page, path) if page.exists() and page != path else None,
            "take": None if answer.take is None else _linked(answer.take, path),
        })  # fmt: skip
    charts = charts_over_each_other({names[run.folder]: run.numbers.curves for run in runs})
    _render(
        path, "comparison.html", title=title, runs=rows, sentence=sentence, charts=charts,
        differences=differs,
        **_cards_of(runs, Path(path).parent, answers, names),
    )  # fmt: skip
    return path


def runs_in(folders):
    """The output folders that are named, and those below one that holds several, such as a sweep's."""
    found = []
    for folder in map(Path, folders):
        of_a_run = any((folder / name).is_file() for name in (METRICS, ABOUT))
        below = [folder] if of_a_run else sorted(folder.glob(f"*/{METRICS}"))
        if not below:
            raise InputError(
                f"{folder}: there is no run in it (no {METRICS}). Name an --output_dir or a sweep's folder."
            )
        found += [path.parent if path.name == METRICS else path for path in below]
    return list({folder.resolve(): folder for folder in found}.values())


def differences(settings: list):
    """[(name, [value of each run])] of the settings that are not the same in all."""
    names, follow = sorted({name for each in settings for name in each}), {"output_dir"}
    rows = [(name, [each.get(name, "") for each in settings]) for name in names if name not in follow]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _labels(runs, differs):
    """What the runs are called: by what makes them differ where that is short, as in a sweep, else by their folders."""
    for telling in ([row for row in differs if row[0] != "seed"], differs):
        if not 0 < len(telling) <= MOST_IN_LABEL:
            continue
        labels = [", ".join(f"{name} {value}" for name, value in zip([name for name, _ in telling], values, strict=True))
                  for values in zip(*(values for _, values in telling), strict=True)]  # fmt: skip
        if len(set(labels)) == len(labels) and max(map(len, labels)) <= LONGEST_LABEL:
            return labels
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*each[-length:])) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _findings(dataset):
    """(title, lines) of what the data sheet has to say of the pictures."""
    for name, words in FINDINGS:
        if name == "left_out":
            count, lines = len(dataset.get("notes", [])), dataset.get("notes", [])
        else:
            found = dataset.get(name, {"count": 0, "first": []})
            count, lines = (
                found["count"],
                [" = ".join(row) if isinstance(row, list) else row for row in found["first"]],
            )
        if count:
            more = [f"... and {count - len(lines)} more"] if count > len(lines) else []
            yield f"{count} {words}", [*lines, *more]


def _link(target, page):
    """The address of a file relative to the page's folder."""
    try:
        return quote(Path(os.path.relpath(target, Path(page).parent)).as_posix())
    except ValueError:  # on another drive of Windows
        return Path(target).resolve().as_uri()


def _linked(file, page):
    first, *others = [
        {"path": str(path.relative_to(path.parents[1 if file.place else 0])), "link": _link(path, page)}
        for path in file.paths
    ]
    return first | {"step": file.step, "others": others}


def _cards_of(runs, folder, answers, names=None):
    """What the template shows of sample pictures: a card for each prompt and seed, with the films of base and LoRAs."""
    keys = list(dict.fromkeys(key for run in runs for pictures in run.pictures.values() for key in pictures))
    if not keys:
        return {"cards": [], "steps": [], "jumps": [], "films_a_card": 0, "said_of_pictures": ""}
    most_cards = max(1, MOST_PICTURES // (3 * len(runs)))
    chosen = keys[:most_cards]
    most_steps = max(3, MOST_PICTURES // (len(chosen) * len(runs)))
    drawn = [set(run.pictures) - {0} for run in runs]
    kept = [steps_shown(sorted(steps), answers[run.folder].best_step, most_steps) for run, steps in zip(runs, drawn)]
    cards = []
    for key in chosen:
        of_base = next((run.pictures[0][key] for run in runs if key in run.pictures.get(0, {})), None)
        films = [] if of_base is None else [_film("base", [(0, of_base)], folder)]
        for run, steps in zip(runs, kept, strict=True):
            frames = [(step, run.pictures[step][key]) for step in steps if key in run.pictures[step]]
            films += [_film((names or {}).get(run.folder, "LoRA"), frames, folder)] if frames else []
        some = next(pictures[key] for run in runs for pictures in run.pictures.values() if key in pictures)
        cards.append({"prompt": some.prompt, "seed": some.seed, "films": films})
    steps = sorted({step for each in kept for step in each}) or [0]
    jumps = [("last", steps[-1])]
    if len(runs) == 1 and answers[runs[0].folder].best_step in steps[:-1]:
        jumps.insert(0, ("best", answers[runs[0].folder].best_step))
    total = sum(len(pictures) for run in runs for step, pictures in run.pictures.items() if step)
    shown = sum(frame["step"] > 0 for card in cards for film in card["films"] for frame in film["frames"])
    said = [f"{shown} of {total} pictures; all of them are in validation/."] if shown < total else []
    if len(runs) > 1 and all(len(card["films"]) <= 2 for card in cards):
        said.append("No two runs drew a prompt with one seed: give them one --seed to compare them at the same noise.")
    return {
        "cards": cards, "steps": steps, "jumps": jumps, "said_of_pictures": " ".join(said),
        "films_a_card": max(len(card["films"]) for card in cards),
    }  # fmt: skip


def steps_shown(steps, best, most):
    """At most so many of the steps: the best, the last, and others evenly between."""
    if len(steps) <= most:
        return steps
    places = {round(place * (len(steps) - 1) / (most - 1)) for place in range(most)}
    chosen = {steps[place] for place in places}
    if best in steps and best not in chosen:
        chosen.remove(min(chosen - {steps[0], steps[-1]}, key=lambda step: abs(step - best)))
        chosen.add(best)
    return sorted(chosen)


def _film(name, frames, folder):
    return {
        "name": name,
        "frames": [
            {"step": step, "link": _link(picture.path, folder / FILE), "preview": preview_of(picture.path)}
            for step, picture in frames
        ],
    }


def preview_of(path):
    """A picture file as a small WebP in a data URL; kept, for the page is written many times in a run."""
    return _preview(str(path), Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=4 * MOST_PICTURES)
def _preview(path, written):
    with Image.open(path) as image:
        return data_url(image, SIDE)


def _render(path, template, *, charts, **values):
    """Fills a template and writes the page, whole or not at all."""
    import jinja2
    from markupsafe import Markup

    # What a template prints is escaped, whoever wrote it: captions, prompts, names of files.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(template).render(
        css=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        js=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        bokeh=Markup(_bokeh()) if charts else "",
        charts=charts,
        charts_json=Markup(json.dumps(charts).replace("<", "\\u003c")),  # "</script>" would end it
        written=time.strftime("%Y-%m-%d %H:%M"),
        **values,
    )
    write_whole(path, page)


@functools.cache
def _bokeh():
    """BokehJS, from the installed package, which itself needs not be imported."""
    found = importlib.util.find_spec("bokeh")
    if found is None:
        raise InputError("Bokeh is not installed. Run: pip install -r requirements.txt")
    folder = Path(found.origin).parent / "server" / "static" / "js"
    parts = [(folder / f"{name}.min.js").read_text(encoding="utf-8") for name in ("bokeh", "bokeh-api")]
    return "\n".join(parts).replace("</script", "<\\/script")

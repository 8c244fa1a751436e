"""Writes `report.html`: the report on one or several runs, as one page that needs neither a network nor other files."""

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from ..errors import InputError
from ..files import reason_of, shorten_paths
from ..pictures.sheets import tell_apart
from .about import FILE as ABOUT
from .about import encode_image
from .curves import COLOURS, make_charts, make_comparison_charts
from .dataset_page import FILE as DATASET_PAGE
from .equal_files import describe_equal, find_equal
from .numbers import FILE as METRICS
from .private_folders import folders_to_hide
from .read_about import CAPTION_CHECK, read_caption_check
from .render import data, render, script
from .runs import Answer, LoraFile, RecordedRun, make_answer, open_sample, read_run


logger = logging.getLogger(__name__)
FILE = "report.html"
PREVIEW_SIDE = 384  # pixels of a sample picture's longer side; the PNG is linked
MAX_LABEL_SETTINGS = 3  # settings in the label of a run
MAX_LABEL_LENGTH = 48
MAX_PICTURES = 120  # on a page, about 4 MB of photographs
# The flags that decide which pictures are held out.
FLAGS_OF_HELD_OUT = (
    "validation_data_dir", "validation_split", "train_data_dir", "dataset_name", "dataset_config_name", "max_train_samples",
)  # fmt: skip
FINDINGS = (
    ("left_out", "Notes, such as pictures left out"),
    ("enlarged", "Pictures enlarged to their training size"),
    ("equal", "Groups of identical files"),
    ("alike", "Groups of pictures that look alike"),
)


def update_page(folder: str | Path, *, of_several: bool = False) -> bool:
    """Writes the page of the run in a folder, or of the runs in its subfolders; returns whether that succeeded.

    An error is logged instead of raised, as the page is not worth losing a run.
    """
    folder = Path(folder)
    try:
        if of_several:
            write_comparison(find_runs([folder]), folder / FILE, folder.resolve().name)
        else:
            write_page(folder)
    except Exception as error:
        logger.info(f"{folder / FILE} could not be updated: {reason_of(error)}")
        return False
    return True


def write_page(output_dir: str | Path) -> Path:
    """Writes the page of the run in a folder, and returns its path."""
    run, path = read_run(output_dir), Path(output_dir) / FILE
    answer = make_answer(run)
    take = None if answer.take is None else _link_lora(answer.take, path)
    dataset = run.about.get("dataset", {})
    steps = [file.step for file in run.files]
    twice = [file for file in run.files if file.step is not None and steps.count(file.step) > 1]
    equal = find_equal({_link_lora(file, path)["path"]: file.paths[0] for file in twice})
    samples = _make_cards([run], path.parent, {run.folder: answer})
    _render(
        path, "run.html", [run], title=run.name, answer=answer, step=run.step, num_steps=run.settings.get("max_train_steps"),
        take=take, files=[_link_lora(file, path) for file in run.files], charts=make_charts(run.numbers.curves), dataset=dataset,
        findings=list(_findings(dataset)), command=re.split(" (?=--)", run.about.get("command", "")), machine=run.about.get("machine"),
        versions=run.about.get("versions"), settings=run.settings, derived=find_derived(run), equal=list(map(describe_equal, equal)), captions=read_caption_check(run.folder / CAPTION_CHECK),
        dry_run=DATASET_PAGE if (run.folder / DATASET_PAGE).is_file() else None, **samples,
    )  # fmt: skip
    return path


def write_comparison(folders: list[Path], path: Path, title: str) -> Path:
    """Writes a page that compares several runs, the best first, and returns its path."""
    runs = [read_run(folder) for folder in folders]
    answers = {run.folder: make_answer(run) for run in runs}
    comparable = have_equal_held_out_pictures([run for run in runs if answers[run.folder].judged])
    if comparable:
        runs.sort(key=lambda run: -(answers[run.folder].gain or 0.0))
    differing = find_differences([run.flags for run in runs])
    labels = _label_runs(runs, differing)
    names = {run.folder: label for run, label in zip(runs, labels, strict=True)}
    sentence = _compare(runs, answers, names, comparable)
    takes = {names[run.folder]: answers[run.folder].take for run in runs}
    equal = find_equal({name: take.paths[0] for name, take in takes.items() if take is not None})
    rows = []
    for place, run in enumerate(runs):
        answer, page = answers[run.folder], run.folder / FILE
        rows.append({
            "name": names[run.folder], "folder": run.name, "answer": answer, "step": run.step, "colour": COLOURS[place % len(COLOURS)],
            "page": _link(page, path) if page.exists() and page != path else None,
            "take": None if answer.take is None else _link_lora(answer.take, path),
        })  # fmt: skip
    charts = make_comparison_charts({names[run.folder]: run.numbers.curves for run in runs})
    _render(
        path, "comparison.html", runs, title=title, rows=rows, sentence=sentence, comparable=comparable, drifts=any(answer.drift is not None for answer in answers.values()), equal=list(map(describe_equal, equal)), charts=charts, differences=differing,
        **_make_cards(runs, Path(path).parent, answers, names),
    )  # fmt: skip
    return path


def _compare(runs, answers, names, comparable):
    """Returns the sentence that a page of several runs begins with; the best run comes first if they are `comparable`."""
    best = answers[runs[0].folder]
    if not any(answer.judged for answer in answers.values()):
        if any(answer.waits for answer in answers.values()):
            return "Not judged yet: no run has validated a step on held-out pictures so far."
        return "No run held out pictures for validation: compare the sample pictures."
    if not comparable:
        return (
            "The runs were validated on different pictures, so their gains do not tell which run is better, and they are "
            "listed in the order in which they were given. Compare the sample pictures, or validate all runs on one "
            "--validation_data_dir."
        )
    if best.gain is None:
        return "No run was better than the base model."
    return f"{names[runs[0].folder]} did best. {best.sentence}"


def have_equal_held_out_pictures(runs: list[RecordedRun]) -> bool:
    """Returns whether all runs were validated on one set of pictures.

    Runs of earlier versions do not record the set. They are compared by the flags that choose it.
    """
    held_out = [run.about.get("dataset", {}).get("held_out") for run in runs]
    if None not in held_out:
        return len({*held_out}) <= 1
    flags = [[run.flags.get(name) for name in FLAGS_OF_HELD_OUT] for run in runs]
    return all(each == flags[0] for each in flags)


def find_derived(run: RecordedRun) -> set[str]:
    """Returns the names of the settings that are not flags of run.yaml, or that have another value there."""
    flags = shorten_paths(run.flags)
    # run.yaml has the prompts with their options.
    names = run.settings.keys() - {"validation_prompts"}
    return {name for name in names if flags.get(name) != run.settings[name]} if flags else set()


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Finds the output folders among these folders and, for a folder that is not a run, among its subfolders."""
    found = []
    for folder in map(Path, folders):
        is_run = any((folder / name).is_file() for name in (METRICS, ABOUT))
        below = [folder] if is_run else sorted(folder.glob(f"*/{METRICS}"))
        if not below:
            raise InputError(
                f"{folder}: there is no run in it (no {METRICS}). Pass an --output_dir or a sweep's folder."
            )
        found += [path.parent if path.name == METRICS else path for path in below]
    return list({folder.resolve(): folder for folder in found}.values())


def find_differences(flags: list[dict]) -> list[tuple[str, list]]:
    """Returns [(name, [value in each run])] of the flags that differ between runs."""
    names = sorted({name for run_flags in flags for name in run_flags} - {"output_dir"})
    rows = [(name, [run_flags.get(name, "") for run_flags in flags]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _label_runs(runs, differing):
    """Labels runs by the flags that differ if that is short, as in a sweep, and otherwise by their folders."""
    for rows in ([row for row in differing if row[0] != "seed"], differing):
        if not 0 < len(rows) <= MAX_LABEL_SETTINGS:
            continue
        labels = [", ".join(f"{name} {values[place]}" for name, values in rows) for place in range(len(runs))]
        if len(set(labels)) == len(labels) and max(map(len, labels)) <= MAX_LABEL_LENGTH:
            return labels
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*each[-length:])) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _findings(dataset):
    """Yields the (title, lines) of each kind of finding about the dataset."""
    for name, title in FINDINGS:
        found = dataset.get(name, {"count": 0, "first": []})
        if name == "left_out":
            found = {"count": len(dataset.get("notes", [])), "first": dataset.get("notes", [])}
        lines = [" = ".join(row) if isinstance(row, list) else row for row in found["first"]]
        num_more = found["count"] - len(lines)
        if num_more > 0:
            lines.append(f"... and {num_more} more")
        if found["count"]:
            yield f"{title}: {found['count']}", lines


def _link(target, page):
    """Returns the URL of a file relative to the page's folder."""
    try:
        return quote(Path(os.path.relpath(target, Path(page).parent)).as_posix())
    except ValueError:  # on another drive of Windows
        return Path(target).resolve().as_uri()


def _link_lora(file: LoraFile, page):
    """Returns the paths and URLs of a LoRA: diffusers' file, and those for other programs as "others"."""
    first, *others = [
        {"path": str(path.relative_to(path.parents[1 if file.place else 0])), "link": _link(path, page)}
        for path in file.paths
    ]
    return first | {"step": file.step, "others": others}


def _make_cards(runs: list[RecordedRun], folder, answers: dict[Path, Answer], names=None):
    """Makes the template's values for sample pictures: a card for each prompt and seed, with a film for each run."""
    keys = list(dict.fromkeys(key for run in runs for pictures in run.pictures.values() for key in pictures))
    if not keys:
        return {"cards": [], "steps": [], "jumps": [], "films_per_card": 0, "remarks": ""}
    keys = keys[: max(1, MAX_PICTURES // (3 * len(runs)))]
    max_steps = max(3, MAX_PICTURES // (len(keys) * len(runs)))
    chosen = [choose_steps(sorted({*run.pictures} - {0}), answers[run.folder].best_step, max_steps) for run in runs]
    cards, samples = [], []
    for key in keys:
        base = next((run.pictures[0][key] for run in runs if key in run.pictures.get(0, {})), None)
        films = [] if base is None else [_make_film("base", [(0, base)], folder)]
        for run, steps in zip(runs, chosen, strict=True):
            frames = [(step, run.pictures[step][key]) for step in steps if key in run.pictures[step]]
            if frames:
                films.append(_make_film((names or {}).get(run.folder, "LoRA"), frames, folder))
        films = [film for film in films if film["frames"]]
        sample = next(pictures[key] for run in runs for pictures in run.pictures.values() if key in pictures)
        samples.append(sample)
        cards.append({"prompt": sample.prompt, "seed": sample.seed, "films": films})
    notes = tell_apart([f"{sample.prompt} {sample.seed}" for sample in samples], [each.options for each in samples])
    cards = [card | {"note": note} for card, note in zip(cards, notes, strict=True)]
    steps = sorted({step for steps in chosen for step in steps}) or [0]
    jumps = [("last", steps[-1])]
    best_step = answers[runs[0].folder].best_step
    if len(runs) == 1 and best_step is not None and best_step in steps[:-1]:
        jumps.insert(0, ("best", best_step))
    total = sum(len(pictures) for run in runs for step, pictures in run.pictures.items() if step)
    shown = sum(frame["step"] > 0 for card in cards for film in card["films"] for frame in film["frames"])
    remarks = [f"Showing {shown} of {total} pictures; all of them are in validation/."] if shown < total else []
    if len(runs) > 1 and all(len(card["films"]) <= 2 for card in cards):
        remarks.append("No two runs drew a prompt with the same seed: pass one --seed to all runs to compare them.")
    return {
        "cards": cards, "steps": steps, "jumps": jumps, "remarks": " ".join(remarks),
        "films_per_card": max(len(card["films"]) for card in cards),
    }  # fmt: skip


def choose_steps(steps: list[int], best: int | None, limit: int) -> list[int]:
    """Chooses at most `limit` of the sorted steps: the first, the best, the last, and evenly spaced ones between."""
    if len(steps) <= limit:
        return steps
    places = {round(place * (len(steps) - 1) / (limit - 1)) for place in range(limit)}
    chosen = {steps[place] for place in places}
    if best in steps and best not in chosen:
        chosen.remove(min(chosen - {steps[0], steps[-1]}, key=lambda step: abs(step - best)))
        chosen.add(best)
    return sorted(chosen)


def _make_film(name, frames, folder):
    return {
        "name": name,
        "frames": [
            {"step": step, "link": _link(picture.path, folder / FILE), "preview": preview}
            for step, picture in frames
            if (preview := make_preview(picture.path)) is not None
        ],
    }


def make_preview(path: Path) -> str | None:
    """Returns a picture file as a small WebP data URL, or None if it is damaged; cached, as a page is written many times."""
    return _make_preview(str(path), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4 * MAX_PICTURES)
def _make_preview(path, modified_at):
    image = open_sample(Path(path))
    return None if image is None else encode_image(image, PREVIEW_SIDE)


def _render(path, template, runs, *, charts, **values):
    """Renders the template of a page about runs."""
    from markupsafe import Markup

    folders = folders_to_hide(runs)
    render(
        path, template, folders=folders, styles=["page.css"], js=script("page.js"), bokeh=Markup(_bokeh()) if charts else "",
        charts=charts, charts_json=data(charts, folders), **values,
    )  # fmt: skip


@functools.cache
def _bokeh():
    """Returns BokehJS from the installed package, without importing the package."""
    found = importlib.util.find_spec("bokeh")
    if found is None or found.origin is None:
        raise InputError("Bokeh is not installed. Run: pip install -r requirements.txt")
    folder = Path(found.origin).parent / "server" / "static" / "js"
    parts = [(folder / f"{name}.min.js").read_text(encoding="utf-8") for name in ("bokeh", "bokeh-api")]
    return "\n".join(parts).replace("</script", "<\\/script")

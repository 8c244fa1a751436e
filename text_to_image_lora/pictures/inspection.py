"""Describes a dataset before training: the report of --dry_run and the sheet of --preview_data."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..files import counted, format_bytes, write_whole
from .alike import alike_pictures, equal_pictures
from .buckets import Resolutions, find_enlarged, format_table
from .findings import KINDS, Finding, group_findings, measured
from .picture_set import PictureSet
from .sheets import Label, Row, labelled_sheet, save_sheet


PREVIEWED = 10  # pictures on the sheet of --preview_data
CAPTION_WIDTH = 460  # of a caption on this sheet, in pixels
CAPTION_LINES = 7  # of a caption on this sheet
LISTED = 5  # examples of each finding on the terminal; the JSON file lists all of them


def describe(
    pictures: PictureSet, left_out: list, sampler: Any, *, num_validated: int, token_counts: list[list[int]] | None,
    token_limit: int | None, cache_bytes: int | None, too_small: dict[int, list[int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Describes a `PictureSet` as plain data for JSON.

    `left_out` holds the unusable pictures and rows as (source, reason). `token_counts` is None without a tokenizer, and
    `token_limit` is None if captions are read completely. `sampler` has `samples` (entries of the set) and
    `steps_per_epoch`. `too_small` is that of `Resolutions`, and its indices and those of `token_counts` are those of
    `pictures.each_once()`.
    """
    samples = Counter(sampler.samples.tolist())

    def count(keys):
        """{key: number of pictures and of samples per epoch}"""
        groups = defaultdict(lambda: {"pictures": set(), "samples_an_epoch": 0})
        for index, key in enumerate(keys):
            groups[key]["pictures"].add(pictures.numbers[index])
            groups[key]["samples_an_epoch"] += samples[index]
        return {key: row | {"pictures": len(row["pictures"])} for key, row in groups.items()}

    by_size = count(f"{width}x{height}" for width, height in pictures.sizes)
    by_concept = count(pictures.records["concept"][:])
    pictures = pictures.each_once()
    sources, captions = pictures.records["source"][:], pictures.captions

    def name(indices):
        return [f"{sources[i]}: {pictures.facts[i].width}x{pictures.facts[i].height}" for i in indices]

    lengths = [(count, i) for i, group in enumerate(token_counts or []) for count in group]
    return {
        "pictures": len(pictures),
        "validated": num_validated,
        "left_out": [{"source": source, "reason": reason} for source, reason in left_out],
        "masked": sum(pictures.has_mask),
        "captions": sum(map(len, captions)),
        "different_captions": len({caption for group in captions for caption in group}),
        "tokens": {
            "mean": round(sum(count for count, _ in lengths) / len(lengths), 1),
            "most": max(lengths)[0],
            "limit": token_limit,
            "cut": [sources[i] for count, i in lengths if token_limit is not None and count > token_limit],
        }
        if lengths
        else None,
        "concepts": dict(sorted(by_concept.items())),
        "sizes": dict(sorted(by_size.items(), key=lambda item: -item[1]["pictures"])),
        "repeats": {str(k): v for k, v in sorted(Counter(pictures.records["num_repeats"]).items())},
        "enlarged": name(find_enlarged(pictures.facts, pictures.sizes)),
        "equal": [[sources[i] for i in group] for group in equal_pictures(pictures.facts)],
        "alike": [[sources[i] for i in group] for group in alike_pictures(pictures.facts)],
        "samples_an_epoch": len(sampler.samples),
        "steps_an_epoch": sampler.steps_per_epoch,
        "cache_bytes": cache_bytes,
    } | ({"too_small": {str(side): name(indices) for side, indices in too_small.items()}} if too_small else {})


def format_report(report: dict[str, Any]) -> list[str]:
    """Formats the result of `describe` for a terminal, with the first few examples of each possible problem."""
    tokens = report["tokens"]
    lines = [
        f"{counted(report['pictures'], 'picture')}, {counted(report['captions'], 'caption')} "
        f"({report['different_captions']} different)"
        + (f"; {report['validated']} more for validation" if report["validated"] else ""),
        f"{counted(report['samples_an_epoch'], 'sample')} and {counted(report['steps_an_epoch'], 'step')} per epoch; the "
        f"cache takes about {format_bytes(report['cache_bytes'])}",
    ]
    if tokens:
        lines.append(
            f"tokens per caption: {tokens['mean']} on average, {tokens['most']} at most; {tokens['limit'] or 'all'} are read"
        )
    if report["masked"]:
        lines.append(f"{report['masked']} of {counted(report['pictures'], 'picture')} with a mask")
    for title, key in (("concept", "concepts"), ("size", "sizes")):
        lines += ["", f"{title:<24}{'pictures':>10}{'samples per epoch':>19}"]
        for name, row in report[key].items():
            lines.append(f"{name:<24}{row['pictures']:>10}{row['samples_an_epoch']:>19}")
    findings = [
        ("left out because they can't be used", [f"{row['source']}: {row['reason']}" for row in report["left_out"]]),
        ("captions truncated at the limit", tokens["cut"] if tokens else []),
        ("pictures smaller than their training size", report["enlarged"]),
        *(
            (f"pictures too small for --resolution {side}, which are not trained at it", named)
            for side, named in report.get("too_small", {}).items()
        ),
        ("groups of equal files", [" = ".join(group) for group in report["equal"]]),
        ("groups of pictures that look alike", [" ~ ".join(group) for group in report["alike"]]),
    ]
    for title, found in findings:
        if found:
            lines += ["", f"{title}: {len(found)}", *(f"  {line}" for line in found[:LISTED])]
            if len(found) > LISTED:
                lines.append(f"  ... and {len(found) - LISTED} more; the JSON file lists all")
    return lines


def describe_findings(found: list[Finding], pictures: PictureSet) -> dict[str, Any]:
    """Describes the result of `findings.find_all` as plain data for JSON: {kind: its title, its remedy and its pictures}."""
    sources = pictures.records["source"][:]
    return {
        key: {
            "title": KINDS[key].title,
            "remedy": KINDS[key].remedy,
            "pictures": [{"source": sources[row.index], "measure": row.measure} for row in rows],
        }
        for key, rows in group_findings(found).items()
    }


def format_findings(described: dict[str, Any], pictures: PictureSet) -> list[str]:
    """Formats the result of `describe_findings` for a terminal, with the first few examples of each kind."""
    num_own, num_measured = pictures.is_class.count(False), len(measured(pictures))
    part = f" ({num_measured} of {num_own} pictures were measured)" if num_measured < num_own else ""
    if not described:
        return ["", f"nothing was found on pictures and captions that may hurt training{part}"]
    lines = ["", f"what may hurt training{part}:"]
    for kind in described.values():
        rows = [f"    {row['source']}: {row['measure']}" for row in kind["pictures"]]
        lines += [f"  {kind['title']}: {counted(len(rows), 'picture')}. {kind['remedy']}", *rows[:LISTED]]
        if len(rows) > LISTED:
            lines.append(f"    ... and {len(rows) - LISTED} more; the JSON file lists all")
    return lines


def format_samples(
    pictures: PictureSet, samples: Any, resolutions: Resolutions, *, bucketed: bool, balanced: bool
) -> list[str]:
    """Formats what is logged before training: the number of pictures that are too small, the sizes and the concepts."""
    once = pictures.each_once()
    lines, small = [], len(find_enlarged(once.facts, once.sizes))
    if small:
        lines.append(f"{small} of {len(once)} pictures are smaller than their training size and are enlarged")
    for side, too_small in resolutions.too_small(once.facts).items():
        if too_small:
            lines.append(
                f"{len(too_small)} of {len(once)} pictures are too small for --resolution {side} and are not trained at it"
            )
    if bucketed or len(resolutions.buckets) > 1:
        lines += format_table(pictures.sizes, samples, "bucket" if bucketed else "size")
    if balanced:
        concepts, own = pictures.records["concept"][:], once.records["concept"][:]
        for concept, count in sorted(Counter(concepts[i] for i in samples).items()):
            lines.append(
                f"concept {concept}: {counted(own.count(concept), 'picture')}, {counted(count, 'sample')} per epoch"
            )
    return lines


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes the result of `describe` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def write_preview(
    path: str, pictures: PictureSet, sampler: Any, num_variations: int | None, remove_concept: Any = None
) -> str:
    """Writes a sheet of what the model will see of the first pictures, and returns a line for the log.

    With a `ConceptRemover`, captions are shown without the concept too.
    """
    firsts = {}  # the first entry of each picture
    for i in (*sampler.samples_of(0).tolist(), *range(len(pictures))):
        firsts.setdefault(pictures.numbers[i], i)
    chosen = [*firsts.values()][:PREVIEWED]
    sheet = preview_sheet(pictures, chosen, min(num_variations or 4, 4), remove_concept=remove_concept)
    save_sheet(sheet, path)
    return f"what the model will see: {path}"


def preview_sheet(
    pictures: PictureSet, indices: list[int], num_variations: int, tile: int = 192, *, remove_concept: Any = None
) -> Image.Image:
    """Draws a row for each picture: some of its variations as they are trained on, and its first caption."""
    rows = []
    for index in indices:
        fact, sizes = pictures.facts[index], pictures.format_sizes(index)
        note = f"{pictures.records[index]['concept']}   {fact.width}x{fact.height} -> {sizes}"
        variations = [Image.fromarray(pictures.pixels(index, k)) for k in range(num_variations)]
        tiles = [ImageOps.pad(each, (tile, tile), Image.Resampling.LANCZOS, color="white") for each in variations]
        text = pictures.captions[index][0]
        if remove_concept is not None and not pictures.is_class[index]:
            text += f"  (without the concept: {remove_concept(text) or 'the empty caption'})"
        rows.append(Row(Label(text, note), tiles, CAPTION_WIDTH, CAPTION_LINES))
    return labelled_sheet(rows)

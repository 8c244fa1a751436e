"""What a dataset holds, told before anything is trained on it: the report of --dry_run and the sheet of --preview_data."""

import json
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import counted, format_bytes, write_whole
from .alike import alike_pictures, equal_pictures
from .buckets import find_enlarged, table


PREVIEWED = 10  # pictures on the sheet of --preview_data
LISTED = 5  # examples of each finding on the terminal; the JSON file has all


def describe(pictures, left_out, samples, *, num_validated, token_counts, token_limit, steps_per_epoch, cache_bytes):
    """The report on a `PictureSet` as plain data.

    `left_out` is what can't be used ([source, reason]), `samples` the indices of the pictures of an epoch; `token_counts`
    holds one number for each caption of each picture, or is None; `token_limit` is None where captions are read whole.
    """
    records, sizes, captions = pictures.records, pictures.sizes, pictures.captions
    sources, concepts = records["source"][:], records["concept"][:]
    per_picture = Counter(samples.tolist())
    by_concept, by_size = defaultdict(lambda: [0, 0]), defaultdict(lambda: [0, 0])
    for index, (concept, size) in enumerate(zip(concepts, sizes, strict=True)):
        for group, key in ((by_concept, concept), (by_size, "x".join(map(str, size)))):
            group[key][0] += 1
            group[key][1] += per_picture[index]
    small = [
        f"{sources[i]}: {pictures.facts[i].width}x{pictures.facts[i].height}"
        for i in find_enlarged(pictures.facts, sizes)
    ]
    lengths = [(count, i) for i, group in enumerate(token_counts or []) for count in group]
    return {
        "pictures": len(pictures),
        "validated": num_validated,
        "left_out": [{"source": source, "reason": reason} for source, reason in left_out],
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
        "concepts": {k: {"pictures": p, "samples_an_epoch": s} for k, (p, s) in sorted(by_concept.items())},
        "sizes": {
            k: {"pictures": p, "samples_an_epoch": s} for k, (p, s) in sorted(by_size.items(), key=lambda x: -x[1][0])
        },
        "repeats": {str(k): v for k, v in sorted(Counter(records["num_repeats"]).items())},
        "enlarged": small,
        "equal": [[sources[i] for i in group] for group in equal_pictures(pictures.facts)],
        "alike": [[sources[i] for i in group] for group in alike_pictures(pictures.facts)],
        "samples_an_epoch": len(samples),
        "steps_an_epoch": steps_per_epoch,
        "cache_bytes": cache_bytes,
    }


def format_report(report):
    """The report for a terminal: what there is, and the first few of what may be wrong."""
    tokens = report["tokens"]
    lines = [
        f"{counted(report['pictures'], 'picture')}, {counted(report['captions'], 'caption')} "
        f"({report['different_captions']} different)"
        + (f"; {report['validated']} more to validate on" if report["validated"] else ""),
        f"{counted(report['samples_an_epoch'], 'sample')} and {counted(report['steps_an_epoch'], 'step')} an epoch; the cache "
        f"takes about "
        f"{format_bytes(report['cache_bytes'])}",
    ]
    if tokens:
        lines.append(
            f"tokens of a caption: {tokens['mean']} on average, {tokens['most']} at most; {tokens['limit'] or 'all'} are read"
        )
    for title, key in (("concept", "concepts"), ("size", "sizes")):
        lines += ["", f"{title:<24}{'pictures':>10}{'samples an epoch':>18}"]
        for name, row in report[key].items():
            lines.append(f"{name:<24}{row['pictures']:>10}{row['samples_an_epoch']:>18}")
    findings = [
        ("left out, as they can't be used", [f"{row['source']}: {row['reason']}" for row in report["left_out"]]),
        ("captions are cut at the limit", tokens["cut"] if tokens else []),
        ("pictures are smaller than what they are trained at", report["enlarged"]),
        ("times the same file", [" = ".join(group) for group in report["equal"]]),
        ("times pictures look alike", [" ~ ".join(group) for group in report["alike"]]),
    ]
    for title, found in findings:
        if found:
            lines += ["", f"{len(found)} {title}:", *(f"  {line}" for line in found[:LISTED])]
            if len(found) > LISTED:
                lines.append(f"  ... and {len(found) - LISTED} more, all in the JSON file")
    return lines


def format_samples(pictures, samples, bucketed, balanced):
    """What is told before training: what is enlarged, and what the buckets and the concepts hold."""
    lines, small = [], len(find_enlarged(pictures.facts, pictures.sizes))
    if small:
        lines.append(
            f"{small} of {len(pictures)} pictures are smaller than what they are trained at, and are enlarged"
        )
    if bucketed:
        lines += table(pictures.sizes, samples)
    if balanced:
        concepts = pictures.records["concept"][:]
        for concept, count in sorted(Counter(concepts[i] for i in samples).items()):
            lines.append(
                f"concept {concept}: {counted(concepts.count(concept), 'picture')}, {counted(count, 'sample')} an epoch"
            )
    return lines


def write_report(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def write_preview(path, pictures, sampler, num_variations):
    """Draws what the model will see of the first pictures; returns the line that says where."""
    chosen = list(dict.fromkeys([*sampler.samples_of(0).tolist(), *range(len(pictures))]))[:PREVIEWED]
    sheet = preview_sheet(pictures, chosen, min(num_variations or 4, 4))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return f"what the model will see: {path}"


def preview_sheet(pictures, indices, num_variations, tile=192):
    """A row for each of the pictures: the variations that are trained on, and its first caption: an RGB `PIL.Image`."""
    font, gap, words = ImageFont.load_default(size=13), 8, 460
    sheet = Image.new("RGB", (num_variations * (tile + gap) + words, len(indices) * (tile + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, index in enumerate(indices):
        fact, (width, height), top = pictures.facts[index], pictures.sizes[index], gap + row * (tile + gap)
        for k in range(num_variations):
            pixels = Image.fromarray(pictures.pixels(index, k))
            scale = tile / max(pixels.size)
            pixels = pixels.resize(
                (round(pixels.width * scale), round(pixels.height * scale)), Image.Resampling.LANCZOS
            )
            sheet.paste(pixels, (gap + k * (tile + gap), top))
        left = gap + num_variations * (tile + gap)
        what = f"{pictures.records[index]['concept']}   {fact.width}x{fact.height} -> {width}x{height}"
        draw.text((left, top), what, fill=(110, 110, 110), font=font)
        for line, text in enumerate(wrapped(pictures.captions[index][0], font, words - 2 * gap)[:9]):
            draw.text((left, top + 20 + 17 * line), text, fill="black", font=font)
    return sheet


def wrapped(text, font, width):
    """The text in lines no wider than `width` pixels; a longer word has its line for itself."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines

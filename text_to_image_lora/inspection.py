"""What a dataset holds, told before anything is trained on it: the report of --dry_run and the sheet of --preview_data."""

import json
from collections import Counter, defaultdict

from PIL import Image, ImageDraw, ImageFont

from .pictures import alike_pictures, equal_pictures
from .records import read_image_bytes
from .transforms import apply_variation, draw_variation, open_image


LISTED = 5  # examples of each finding on the terminal; the JSON file has all


def describe(
    dataset,
    images,
    left_out,
    sizes,
    samples,
    *,
    num_validated,
    token_counts,
    token_limit,
    steps_per_epoch,
    cache_bytes,
):
    """The report as plain data.

    `images` are the `Picture`s of the dataset's rows, `left_out` what can't be used ([source, reason]); `sizes` and
    `samples` as training has them; `token_counts` holds one number for each caption of each row, or is None;
    `token_limit` is None where captions are read whole.
    """
    sources, concepts, captions = dataset["source"][:], dataset["concept"][:], dataset["captions"][:]
    per_picture = Counter(samples.tolist())
    by_concept, by_size = defaultdict(lambda: [0, 0]), defaultdict(lambda: [0, 0])
    for index, (concept, size) in enumerate(zip(concepts, sizes, strict=True)):
        for group, key in ((by_concept, concept), (by_size, "x".join(map(str, size)))):
            group[key][0] += 1
            group[key][1] += per_picture[index]
    small = [
        f"{sources[i]}: {f.width}x{f.height}"
        for i, f in enumerate(images)
        if f.width < sizes[i][0] or f.height < sizes[i][1]
    ]
    lengths = [(count, i) for i, group in enumerate(token_counts or []) for count in group]
    return {
        "pictures": len(dataset),
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
        "repeats": {str(k): v for k, v in sorted(Counter(dataset["num_repeats"]).items())},
        "enlarged": small,
        "equal": [[sources[i] for i in group] for group in equal_pictures(images)],
        "alike": [[sources[i] for i in group] for group in alike_pictures(images)],
        "samples_an_epoch": len(samples),
        "steps_an_epoch": steps_per_epoch,
        "cache_bytes": cache_bytes,
    }


def lines_of(report):
    """The report for a terminal: what there is, and the first few of what may be wrong."""
    tokens = report["tokens"]
    lines = [
        f"{report['pictures']} pictures, {report['captions']} captions ({report['different_captions']} different)"
        + (f"; {report['validated']} more to validate on" if report["validated"] else ""),
        f"{report['samples_an_epoch']} samples and {report['steps_an_epoch']} steps an epoch; the cache takes about "
        f"{report['cache_bytes'] / 2**20:.0f} MiB",
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


def write_report(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def preview_sheet(dataset, images, sizes, indices, *, num_variations, interpolation, augmentation, seed, tile=192):
    """A row for each of the pictures: the variations that are trained on, and its first caption: an RGB `PIL.Image`."""
    font, gap, words = ImageFont.load_default(size=13), 8, 460
    sheet = Image.new("RGB", (num_variations * (tile + gap) + words, len(indices) * (tile + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, index in enumerate(indices):
        picture = images[index]
        top = gap + row * (tile + gap)
        image = open_image(read_image_bytes(dataset[index]["image"]))
        for k in range(num_variations):
            variation = draw_variation(
                picture.width,
                picture.height,
                sizes[index],
                augmentation,
                seed=seed,
                image_id=picture.image_id,
                index=k,
            )
            pixels = Image.fromarray(apply_variation(image, variation, sizes[index], interpolation))
            scale = tile / max(pixels.size)
            pixels = pixels.resize(
                (round(pixels.width * scale), round(pixels.height * scale)), Image.Resampling.LANCZOS
            )
            sheet.paste(pixels, (gap + k * (tile + gap), top))
        left = gap + num_variations * (tile + gap)
        what = f"{dataset[index]['concept']}   {picture.width}x{picture.height} -> {sizes[index][0]}x{sizes[index][1]}"
        draw.text((left, top), what, fill=(110, 110, 110), font=font)
        for line, text in enumerate(wrapped(dataset[index]["captions"][0], font, words - 2 * gap)[:9]):
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

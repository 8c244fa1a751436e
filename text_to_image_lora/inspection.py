"""What a dataset holds, told before anything is trained on it: the report of --dry_run and the sheet of --preview_data."""

import json
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .records import image_id, in_threads, read_image_bytes, read_mask_bytes
from .transforms import ImageError, apply_variation, draw_variation, open_image, open_mask


ALIKE_BITS = 7  # of the 128 bits of a difference hash; other pictures differ by some 30 at least
LISTED = 5  # examples of each finding on the terminal; the JSON file has all


class Finding(NamedTuple):
    """A picture that can be used: its content's identity, sides in pixels, and difference hash."""

    image_id: str
    width: int
    height: int
    hash: int


def difference_hash(image):
    """128 bits: whether each of 8x8 places is brighter than its neighbour to the right, and than the one below.

    The dHash of N. Krawetz (2013), in both directions; it stays nearly the same when a picture is resized or compressed.
    """
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BILINEAR), dtype=int)
    bits = np.concatenate([(grey[:8, :8] > grey[:8, 1:]).ravel(), (grey[:8, :8] > grey[1:, :8]).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes())


def examine(dataset):
    """{index: `Finding`} of the pictures that can be decoded, and {index: reason} of the others."""

    def look(index):
        try:
            row = dataset[index]
            data, mask = read_image_bytes(row["image"]), read_mask_bytes(row["mask"])
            image = open_image(data)
            if mask is not None:
                open_mask(mask, image.size)
            return index, Finding(image_id(data, mask), *image.size, difference_hash(image)), None
        except (ImageError, OSError) as error:
            return index, None, str(error)

    good, bad = {}, {}
    for index, finding, reason in in_threads(look, range(len(dataset))):
        if reason is None:
            good[index] = finding
        else:
            bad[index] = reason
    return good, bad


def equal_pictures(findings):
    """Groups of indices whose files are the same byte for byte."""
    groups = defaultdict(list)
    for index, finding in findings.items():
        groups[finding.image_id].append(index)
    return [group for group in groups.values() if len(group) > 1]


def alike_pictures(findings):
    """Groups of indices of different files whose pictures look alike: hashes that differ by `ALIKE_BITS` at most.

    Hashes that near share one of eight bands of 16 bits, so only those within a band are compared.
    """
    first = {}
    for index, finding in findings.items():
        first.setdefault(finding.image_id, index)
    bands = defaultdict(list)
    for index in first.values():
        for band in range(8):
            bands[band, findings[index].hash >> 16 * band & 0xFFFF].append(index)
    leader = {index: index for index in first.values()}

    def group_of(index):
        while leader[index] != index:
            index = leader[index] = leader[leader[index]]
        return index

    for members in bands.values():
        # Of a crowd each is compared with the first ones only: a band that so many share is a flat part of a picture.
        for place, a in enumerate(members):
            for b in members[max(0, place - 1000) : place] if len(members) < 5000 else members[: min(place, 20)]:
                if group_of(a) != group_of(b) and (findings[a].hash ^ findings[b].hash).bit_count() <= ALIKE_BITS:
                    leader[max(group_of(a), group_of(b))] = min(group_of(a), group_of(b))
    groups = defaultdict(list)
    for index in leader:
        groups[group_of(index)].append(index)
    return [sorted(group) for _, group in sorted(groups.items()) if len(group) > 1]


def describe(dataset, findings, left_out, sizes, samples, *, token_counts, token_limit, steps_per_epoch, cache_bytes):
    """The report as plain data.

    `token_limit` is None where captions are read whole. `findings` are those of the dataset's rows, `left_out` what can't be used ([source, reason]); `sizes` and `samples` as
    training has them; `token_counts` holds one number for each caption of each row, or is None.
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
        for i, f in findings.items()
        if f.width < sizes[i][0] or f.height < sizes[i][1]
    ]
    lengths = [(count, i) for i, group in enumerate(token_counts or []) for count in group]
    return {
        "pictures": len(dataset),
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
        "equal": [[sources[i] for i in group] for group in equal_pictures(findings)],
        "alike": [[sources[i] for i in group] for group in alike_pictures(findings)],
        "samples_an_epoch": len(samples),
        "steps_an_epoch": steps_per_epoch,
        "cache_bytes": cache_bytes,
    }


def lines_of(report):
    """The report for a terminal: what there is, and the first few of what may be wrong."""
    tokens = report["tokens"]
    lines = [
        f"{report['pictures']} pictures, {report['captions']} captions ({report['different_captions']} different)",
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
        name, width, height = images[index]
        top = gap + row * (tile + gap)
        image = open_image(read_image_bytes(dataset[index]["image"]))
        for k in range(num_variations):
            variation = draw_variation(width, height, sizes[index], augmentation, seed=seed, image_id=name, index=k)
            pixels = Image.fromarray(apply_variation(image, variation, sizes[index], interpolation))
            scale = tile / max(pixels.size)
            pixels = pixels.resize(
                (round(pixels.width * scale), round(pixels.height * scale)), Image.Resampling.LANCZOS
            )
            sheet.paste(pixels, (gap + k * (tile + gap), top))
        left = gap + num_variations * (tile + gap)
        what = f"{dataset[index]['concept']}   {width}x{height} -> {sizes[index][0]}x{sizes[index][1]}"
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

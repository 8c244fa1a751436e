"""What may hurt in a dataset: findings on pictures and captions, each with its measure and its remedy.

The thresholds were set on photographs and drawings with planted faults, see `docs/data.md`.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .alike import alike_pictures, equal_pictures
from .looks import Look, look_at, shared_marks
from .picture_set import PictureSet
from .records import in_threads


DARK = 0.3  # the brightest parts of a picture (`Look.light`) below this
MUCH_CUT = 0.35  # part of a picture's area that its crop leaves out
FAR_ASPECT = 1.15  # difference of the logarithms of two aspect ratios: about 1 to 3
FAR_COLOURS = 0.85  # Hellinger distance to the fourth nearest picture; 1: no colour in common
LEAST_COMPARED = 12  # pictures: among fewer, none is unlike the others
MOST_MEASURED = 500  # pictures of a large set, evenly chosen: a photograph takes about 30 ms
COMPARED = 200  # pictures among which marks are looked for: their pairs take seconds
LEAST_MARK, MOST_MARK, MARK_OVER_OTHERS = (
    0.33,
    0.75,
    4.0,
)  # likeness; the factor is for the 95th percentile of all pairs
MOST_WORDS, RARE = 0.85, 0.1  # a word in most captions; the share of captions that lack it
MOST_LACKING = 3  # words that a measure names
# Their absence says nothing about a picture.
FUNCTION_WORDS = {
    "and", "the", "with", "some", "for", "from", "that", "this", "its", "are", "has", "his", "her", "their", "into", "onto",
    "over", "under", "there", "which", "while",
}  # fmt: skip
NAMES_OF_CAMERAS = re.compile(
    r"(img|dsc|dscn|dscf|pxl|mvimg|screenshot|image|photo|untitled|download)?[\s_-]*\d[\d\s_().-]*", re.I
)


class Kind(NamedTuple):
    """A kind of finding."""

    key: str
    title: str
    remedy: str


KINDS = {kind.key: kind for kind in (
    Kind("soft", "blurred, or enlarged from a small picture", "Replace them by sharp ones, or leave them out."),
    Kind("dark", "hardly any light", "Brighten them, or leave them out, unless the LoRA is to draw the dark."),
    Kind("bars", "bars or a frame at the edges", "Crop them: the LoRA learns to draw the bars."),
    Kind("mark", "a mark such as text or a logo at one place of several pictures", "Crop or retouch it: the LoRA learns to draw it."),
    Kind("cut", "the crop leaves out much of the picture", "Pass --aspect_ratio_buckets, or crop them by hand."),
    Kind("aspect", "an aspect ratio unlike the others", "Crop them, if the subject allows it."),
    Kind("colours", "colours unlike the others", "Look whether they belong to the set."),
    Kind("word", "a word that most captions have is missing", "Add it if it is meant to be in all of them, such as a trigger word."),
    Kind("repeated", "one caption for several different pictures", "Describe what differs: it is learned as part of what the caption names."),
    Kind("letters", "letters that are not Latin, unlike in the other captions", "Translate them: the text encoders read English."),
    Kind("name", "a file name as the caption", "Write what the picture shows."),
)}  # fmt: skip


class Finding(NamedTuple):
    """A picture, and what was measured on it."""

    kind: str  # a key of KINDS
    index: int  # of the picture
    measure: str


def find_all(pictures: PictureSet) -> list[Finding]:
    """Returns the findings on a set, in the order of `KINDS` and of the pictures; decodes up to `MOST_MEASURED` pictures."""
    return [*find_in_pictures(pictures), *find_in_captions(pictures)]


def evenly_chosen(values: Sequence[Any], most: int) -> list[Any]:
    """Returns at most `most` of the values, in even distances."""
    return [*values[:: -(-len(values) // most) or 1]] if most else []


def measured(pictures: PictureSet) -> list[int]:
    """Returns the indices of the pictures that are measured: the user's own, or a part of them."""
    return evenly_chosen([i for i in range(len(pictures)) if not pictures.is_class[i]], MOST_MEASURED)


def find_in_pictures(pictures: PictureSet) -> list[Finding]:
    """Returns the findings on the pictures; those of class pictures are left out, because the base model draws them."""
    own = measured(pictures)
    looks = dict(zip(own, in_threads(lambda i: look_at(pictures.image(i), pictures.sizes[i]), own, ahead=32)))
    found = [*_on_single_pictures(pictures, looks), *_unlike_the_others(pictures, looks)]
    own_facts = [pictures.facts[i] for i in own]
    groups = [[own[j] for j in group] for group in (*equal_pictures(own_facts), *alike_pictures(own_facts))]
    marks = find_marks({i: look.fine for i, look in looks.items()}, groups)
    found += [Finding("mark", i, f"like {_name(pictures, marks[i])}") for i in sorted(marks)]
    return sorted(found, key=lambda row: (list(KINDS).index(row.kind), row.index))


def _name(pictures, i):
    return Path(pictures.records[i]["source"].removesuffix("'").rpartition("'")[2] or str(i)).name


def _on_single_pictures(pictures: PictureSet, looks: dict[int, Look]) -> Iterator[Finding]:
    for i, look in looks.items():
        (width, height), fact = pictures.sizes[i], pictures.facts[i]
        if look.detail <= 0.5:
            finest = f"{round(width * look.detail)}x{round(height * look.detail)}"
            yield Finding("soft", i, f"has detail for {finest} of {width}x{height} pixels")
        if look.light < DARK:
            yield Finding("dark", i, f"brightness of its light parts: {look.light:.0%}")
        if any(look.bars):
            sides = zip(("left", "top", "right", "bottom"), look.bars, strict=True)
            yield Finding("bars", i, ", ".join(f"{side} {part:.0%}" for side, part in sides if part))
        kept = min(fact.width / fact.height, width / height) / max(fact.width / fact.height, width / height)
        if 1 - kept > MUCH_CUT:
            yield Finding("cut", i, f"{1 - kept:.0%} of {fact.width}x{fact.height} is cut for {width}x{height}")


def _unlike_the_others(pictures: PictureSet, looks: dict[int, Look]) -> Iterator[Finding]:
    own = list(looks)
    if len(own) < LEAST_COMPARED:
        return
    aspects = np.log([pictures.facts[i].width / pictures.facts[i].height for i in own])
    usual = np.median(aspects)
    for i, aspect in zip(own, aspects, strict=True):
        near = np.mean(np.abs(aspects - aspect) < 0.35)
        if abs(aspect - usual) > FAR_ASPECT and near < RARE:
            fact = pictures.facts[i]
            yield Finding("aspect", i, f"{fact.width}x{fact.height}; the others are about {math.exp(usual):.2f} to 1")
    colours = np.stack([looks[i].colours for i in own])
    distances = np.sqrt(np.maximum(0, 1 - colours @ colours.T))
    fourth = np.partition(distances, 4, axis=1)[:, 4]  # the picture itself is the nearest
    for i, distance in zip(own, fourth, strict=True):
        if distance > max(FAR_COLOURS, 1.8 * np.median(fourth)):
            yield Finding("colours", i, f"distance {distance:.2f}; that of the others is {np.median(fourth):.2f}")


def find_marks(fine: dict[int, np.ndarray], alike_groups: Sequence[Sequence[int]]) -> dict[int, int]:
    """Returns {index: index of the picture with the most similar mark} of {index: `Look.fine`}.

    Pictures of one of the groups are alike as a whole, and not compared. Of many pictures, an evenly chosen part is compared.
    """
    own = evenly_chosen(list(fine), COMPARED)
    if len(own) < LEAST_COMPARED:
        return {}
    alike, places = shared_marks(np.stack([fine[i] for i in own])), {i: place for place, i in enumerate(own)}
    for members in alike_groups:
        rows = [places[i] for i in members if i in places]
        alike[np.ix_(rows, rows)] = 0
    usual = float(np.quantile(alike[np.triu_indices(len(own), 1)], 0.95))
    limit = min(max(LEAST_MARK, MARK_OVER_OTHERS * usual), MOST_MARK)
    return {own[i]: own[int(alike[i].argmax())] for i in range(len(own)) if alike[i].max() > limit}


# Captions.


def find_in_captions(pictures: PictureSet) -> list[Finding]:
    """Returns the findings on the captions of the user's own pictures."""
    own = [i for i in range(len(pictures)) if not pictures.is_class[i]]
    captions = {i: pictures.captions[i] for i in own}
    found = [*_missing_words(captions), *_repeated(captions, pictures), *_other_letters(captions)]
    found += [
        Finding("name", i, repr(text)) for i in own for text in captions[i] if is_file_name(text, pictures.records[i])
    ]
    return sorted(set(found), key=lambda row: (list(KINDS).index(row.kind), row.index))


def words_of(caption: str) -> set[str]:
    """Returns the words of a caption in lower case."""
    return set(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", caption.lower()))


def _missing_words(captions: dict[int, list[str]]) -> Iterator[Finding]:
    if len(captions) < LEAST_COMPARED:
        return
    own = {i: set.intersection(*map(words_of, group)) for i, group in captions.items() if group}
    counts = Counter(word for words in own.values() for word in words)
    most = {word for word, count in counts.items() if MOST_WORDS * len(own) <= count < len(own) and len(word) > 2}
    usual = most - FUNCTION_WORDS
    for i, words in own.items():
        if lacking := sorted(usual - words, key=lambda word: (-counts[word], word)):
            counted = ", ".join(f"'{word}' stands in {counts[word]} of {len(own)}" for word in lacking[:MOST_LACKING])
            more = len(lacking) - MOST_LACKING
            yield Finding("word", i, counted + (f", and {more} more words" if more > 0 else ""))


def _repeated(captions: dict[int, list[str]], pictures: PictureSet) -> Iterator[Finding]:
    """Captions that some different pictures share, unless all do: then one caption is meant for all."""
    places = defaultdict(set)
    for i, group in captions.items():
        for caption in group:
            places[" ".join(caption.lower().split())].add(i)
    for members in places.values():
        different = {pictures.facts[i].image_id for i in members}
        if len(different) > 2 and len(members) < 0.5 * len(captions):
            for i in members:
                yield Finding("repeated", i, f"{len(different)} pictures have {captions[i][0]!r}")


def _other_letters(captions: dict[int, list[str]]) -> Iterator[Finding]:
    foreign = {i: max(map(share_of_other_letters, group), default=0.0) for i, group in captions.items()}
    odd = [i for i, share in foreign.items() if share > 0.3]
    if len(odd) <= 0.5 * len(captions):
        yield from (Finding("letters", i, f"{foreign[i]:.0%} of the letters of {captions[i][0]!r}") for i in odd)


def share_of_other_letters(caption: str) -> float:
    """Returns the share of the letters that are not Latin."""
    letters = [letter for letter in caption if letter.isalpha()]
    return sum("LATIN" not in unicodedata.name(letter, "") for letter in letters) / max(len(letters), 1)


def is_file_name(caption: str, record: dict[str, Any]) -> bool:
    """Whether a caption is the name of its picture, or a name that a camera or a program gave."""
    text = caption.strip()
    name = Path((record["image"] or {}).get("path") or "").name
    numbered = (
        name and bool(re.search(r"[\d_]", Path(name).stem)) and text.lower() in (name.lower(), Path(name).stem.lower())
    )
    ended = bool(re.fullmatch(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic)", text, re.I))
    return (
        numbered or ended or bool(NAMES_OF_CAMERAS.fullmatch(text)) or bool(re.fullmatch(r"[0-9a-f]{12,}", text, re.I))
    )


def group_findings(found: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Returns {key of the kind: findings}, in the order of `KINDS`."""
    groups = {key: [row for row in found if row.kind == key] for key in KINDS}
    return {key: rows for key, rows in groups.items() if rows}

"""Writes `dataset.html` of --dry_run: all pictures with their captions, crops and findings; captions can be edited and saved."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..files import printable, shorten_paths
from ..pictures.alike import alike_pictures, equal_pictures
from ..pictures.buckets import find_enlarged
from ..pictures.caption_tables import CaptionTable
from ..pictures.findings import KINDS, Finding, Kind, evenly_chosen
from ..pictures.picture_set import PictureSet
from ..pictures.records import in_threads
from ..pictures.transforms import ImageError
from .about import encode_image
from .render import data, render, script


FILE = "dataset.html"
MOST_SHOWN = 2000  # pictures, about 10 MB
MOST_ROWS, MOST_BYTES = 50_000, 2**24  # of captions that can be edited, with the other columns of their tables
SIDE, SIDE_FOUND = 200, 384  # pixels of a picture's longer side, and of one with a finding
QUALITY = 70  # of the WebP
OTHER_KINDS = (
    Kind("equal", "equal files", "Keep one of each: a picture that is there twice is learnt twice as much."),
    Kind("alike", "pictures that look alike", "Keep the best of each group, unless they are meant to differ only a little."),
    Kind("enlarged", "smaller than the training size", "Use larger ones: they are enlarged, and the LoRA learns their blur."),
    Kind("tokens", "a caption that is too long", "Shorten it, or pass --long_prompts: the rest of it is not read."),
)  # fmt: skip


class Data(NamedTuple):
    """What the page shows."""

    pictures: PictureSet  # that are trained on
    held_out: PictureSet | None  # of the same folders, for validation
    found: list[Finding]
    too_long: Sequence[int]  # indices of the pictures whose caption is truncated
    left_out: list[tuple[str, str]]  # (source, reason) of unusable pictures
    tables: list[CaptionTable]  # in which the captions can be edited
    remarks: list[str]  # sentences for the top of the page


def write_dataset_page(path: Path, shown: Data, *, title: str) -> None:
    """Writes the page, whole or not at all."""
    groups = _findings(shown)
    own = [i for i in range(len(shown.pictures)) if not shown.pictures.is_class[i]]
    items = _items(shown.pictures, own, groups)
    if shown.held_out is not None:
        items += [item | {"held": True} for item in _items(shown.held_out, range(len(shown.held_out)), {})]
    count, num_rows = len(items), sum(len(table.rows) for table in shown.tables)
    tables, remarks = shown.tables, [*shown.remarks]
    if count > MOST_SHOWN:
        items = _draw_fewer(items)
        remarks.append(
            f"{MOST_SHOWN:,} of the {count:,} pictures are shown, those with a finding first. The captions of all are there."
        )
    if num_rows > MOST_ROWS or len(json.dumps([table.rows for table in tables])) > MOST_BYTES:
        tables = []
        remarks.append("The captions are too many to be edited on a page: edit them in their files.")
    _add_pictures(items, {False: shown.pictures, True: shown.held_out})
    _add_rows(items, tables)
    kinds = [
        kind
        for kind in (*KINDS.values(), *OTHER_KINDS)
        if kind.key in {key for item in items for key, _ in item["found"]}
    ]
    content = {
        "items": items,
        "kinds": [kind._asdict() for kind in kinds],
        "tables": [_describe(table, len(tables)) for table in tables],
    }
    render(
        path, "dataset.html", folders=(), styles=["page.css", "dataset.css"], title=title, remarks=remarks, count=count,
        left_out=[f"{printable(source)}: {reason}" for source, reason in shorten_paths(shown.left_out)],
        content=data(content), js=script("dataset.js"), editable=bool(tables),
    )  # fmt: skip


def _draw_fewer(items):
    """Returns the items with a place of None for those that are too many to be drawn."""
    found = evenly_chosen([place for place, item in enumerate(items) if item["found"]], MOST_SHOWN)
    others = [place for place, item in enumerate(items) if not item["found"]]
    drawn = {*found, *evenly_chosen(others, MOST_SHOWN - len(found))}
    return [item if place in drawn else item | {"place": None} for place, item in enumerate(items)]


def _findings(shown):
    """Returns {index: [(key of the kind, measure)]} of the pictures that are trained on."""
    pictures, groups = shown.pictures, defaultdict(list)
    names = [Path(each).name for each in map(_name, pictures.records["source"][:])]
    for kind, index, measure in shown.found:
        groups[index].append((kind, measure))
    for key, found in (("equal", equal_pictures(pictures.facts)), ("alike", alike_pictures(pictures.facts))):
        for members in found:
            for index in members:
                others = [names[each] for each in members if each != index]
                more = f" and {len(others) - 3} more" if len(others) > 3 else ""
                groups[index].append((key, f"like {', '.join(others[:3])}{more}"))
    for index in find_enlarged(pictures.facts, pictures.sizes):
        (width, height), fact = pictures.sizes[index], pictures.facts[index]
        groups[index].append(("enlarged", f"{fact.width}x{fact.height} is enlarged for {width}x{height}"))
    for index in shown.too_long:
        groups[index].append(("tokens", "not read to its end"))
    return groups


def _name(source):
    """Returns the name of a picture's file from a record's source, which may name the row of a table."""
    return source.removesuffix("'").rpartition(": '")[2] if source.endswith("'") else source


def _items(pictures, indices, groups):
    """Returns what the page knows about each picture, but for the picture itself."""
    sources, concepts, items = pictures.records["source"][:], pictures.records["concept"][:], []
    for index in indices:
        fact, (width, height) = pictures.facts[index], pictures.sizes[index]
        scale = max(width / fact.width, height / fact.height)
        items.append({
            "place": index, "source": sources[index], "name": _name(sources[index]), "concept": concepts[index],
            "size": f"{fact.width}x{fact.height}", "trained": f"{width}x{height}",
            "kept": [round(min(1.0, side / (whole * scale)), 3) for side, whole in ((width, fact.width), (height, fact.height))],
            "found": groups.get(index, []), "captions": pictures.captions[index],
        })  # fmt: skip
    return items


def _add_pictures(items, sets):
    """Replaces "place" by "picture", a data URL, or None for the pictures that are not shown."""

    def draw(item):
        if item["place"] is None:
            return None
        try:
            side = SIDE_FOUND if item["found"] else SIDE
            return encode_image(sets["held" in item].thumbnail(item["place"], side), side, QUALITY)
        except (ImageError, OSError):  # it was removed since it was examined, or is still to be drawn
            return None

    for item, picture in zip(items, in_threads(draw, items, ahead=32), strict=True):
        item.pop("place")
        item["picture"] = picture


def _add_rows(items, tables):
    """Adds the place of each picture's captions, and its captions as the user wrote them; replaces "source"."""
    places = {source: (t, row) for t, table in enumerate(tables) for source, row in table.places.items()}
    seen = set()
    for item in items:
        source = item.pop("source")
        item["name"] = Path(item["name"]).name if source not in places else item["name"]
        if source in places and source not in seen:
            seen.add(source)
            table, row = places[source]
            value = tables[table].rows[row].get(tables[table].column)
            item |= {"table": table, "row": row, "name": tables[table].rows[row].get("file_name", item["name"])}
            item["captions"] = [text for text in (value if isinstance(value, list) else [value]) if text]


def _describe(table, count):
    """Returns a table for the page."""
    folder = table.folder.resolve().name
    where = printable(shorten_paths(str(table.folder)))
    notes = [f"Save it as metadata.jsonl in the folder {where}"]
    if table.replaced not in (None, "metadata.jsonl"):
        notes[0] += f", and remove {table.replaced}"
    notes[0] += "."
    if table.concepts:
        notes.append("Pass --concept_column concept if you use --balance concept.")
    return {
        "folder": folder, "file": "metadata.jsonl" if count == 1 else f"metadata-{folder}.jsonl",
        "column": table.column, "rows": table.rows, "note": " ".join(notes),
    }  # fmt: skip

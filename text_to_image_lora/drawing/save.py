"""Pictures and sheets are drawn and written, each with what drew it in its file."""

import logging
from typing import Any, NamedTuple

from .draw import draw, fitted
from .grids import Grid, sheets_of
from .pipeline import Studio
from .png import Source, describe, read_repeat, repeat_of, save_png, warn_of_differences
from .rows import SETTINGS, Drawing
from .settings import BATCH_SIZE


logger = logging.getLogger(__name__)


class Batches(NamedTuple):
    """What is drawn together."""

    drawings: list[Drawing]
    kept: range  # the numbers of those that are written
    size: int  # pictures drawn at once


def batches_of(settings: Any, drawings: list[Drawing], source: Source) -> Batches:
    """The `Batches` of the drawings.

    What is drawn at once decides the last bits of a picture: so, to draw the picture of --from_png again, copies of it
    fill the batch that it was drawn in.
    """
    path, wanted = settings.from_pictures.from_png, settings.machine.batch_size
    batches = Batches(drawings, range(len(drawings)), wanted or BATCH_SIZE)
    if path is None:
        return batches
    stored = read_repeat(path)
    now = repeat_of(drawings[0], source, stored.batch)
    warn_of_differences(path, stored, now)
    size, place = stored.batch
    alike = all(now.flags.get(name) == stored.flags.get(name) for name in (*SETTINGS, "clip_skip"))
    if settings.grids.grid or len(drawings) > 1 or not alike or wanted not in (None, size):
        return batches
    return Batches([drawings[0]._replace(stem=path.stem)] * size, range(place, place + 1), size)


def save_pictures(settings: Any, studio: Studio, drawings: list[Drawing], source: Source) -> list[Any]:
    """Draws the pictures and writes them as they are done; returns them in the order of the drawings."""
    output_dir, batches = settings.output.output_dir, batches_of(settings, drawings, source)
    paths, images = {}, {}
    for drawn in draw(studio, batches.drawings, batches.size):
        if drawn.index in batches.kept:
            drawing = batches.drawings[drawn.index]
            chunks = describe(drawing, drawn, source)
            paths[drawn.index] = save_png(drawn.image, output_dir / f"{drawing.stem}.png", chunks)
            images[drawn.index] = drawn.image
    names = [paths[i].name for i in batches.kept]
    told = names[0] if len(names) == 1 else f"{len(names)} pictures, {names[0]} to {names[-1]}"
    logger.info("%s: %s", output_dir, told)
    if studio.given.canny:
        edges = fitted(studio.given, drawings[0].width, drawings[0].height).control_image
        logger.info("%s: what the ControlNet held to", save_png(edges, output_dir / "edges.png", {}))
    return [images[i] for i in batches.kept]


def save_sheets(
    settings: Any, studio: Studio, grid: Grid, drawings: list[Drawing], images: list[Any], command: str
) -> None:
    """Writes the sheets of a grid, each with the command that drew it."""
    start, model = settings.from_pictures, settings.model.pretrained_model_name_or_path
    names = {"image": start.image, "control_image": start.control_image or start.image}
    shown = fitted(studio.given, drawings[0].width, drawings[0].height)
    given = [(path.name, getattr(shown, name)) for name, path in names.items() if getattr(shown, name)]
    what = "base above LoRA" if settings.grids.compare_base else "the grid"
    for sheet in sheets_of(grid, drawings, images, given):
        prompt = " | ".join(dict.fromkeys(drawing.prompt for drawing in sheet.drawings))
        chunks = {"prompt": prompt, "pretrained_model_name_or_path": model, "command": command}
        logger.info("%s: %s", save_png(sheet.image, settings.output.output_dir / sheet.name, chunks), what)

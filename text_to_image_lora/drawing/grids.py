"""Plans the pictures of a run and of its grids, and makes the sheets that show them. Needs no torch."""

import argparse
import functools
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..command_line import flag_values, user_path
from ..errors import InputError
from ..pictures.sheets import tell_apart
from .find import find_checkpoints
from .prompts import Prompt, note_of_a1111s_syntax, read_prompts
from .rows import AXES, SETTINGS, Drawing, Lora, check_drawing, nearest, shown_options


logger = logging.getLogger(__name__)


class Cell(NamedTuple):
    """A position along an axis of a grid: its label on the sheet, and the settings of its pictures."""

    label: str = ""
    changes: dict[str, Any] = {}  # {field of `Drawing`: value}
    options: dict[str, Any] = {}  # the options that follow the prompt; the changes of all axes override them
    note: str = ""  # a second line on the sheet; {seed} stands for the picture's seed
    suffix: str = ""  # of the file names
    nth: int = 0  # is added to the seed


class Grid(NamedTuple):
    """The pictures of a run: one for each combination of a sheet, a band, a row and a column."""

    name: str | None  # of the sheets' files; None if no sheets are written
    sheets: list[Cell]
    bands: list[Cell]
    rows: list[Cell]
    columns: list[Cell]


class Sheet(NamedTuple):
    """A sheet of a grid, with the drawings that it shows."""

    name: str  # file name
    image: Any
    drawings: Sequence[Drawing]


def slug(text: str) -> str:
    """Converts text to a part of a file name, of at most 60 bytes, because file names may have at most 255."""
    return re.sub(r"[^\w.+-]+", "-", text.lower()).encode()[:60].decode(errors="ignore").strip("-")


def prompt_cells(prompts: Sequence[Prompt]) -> list[Cell]:
    """Makes a cell for each prompt, whose file names start with the prompt's number."""
    digits, cells = max(2, len(str(len(prompts) - 1))), []
    for i, prompt in enumerate(prompts):
        stem = f"{i:0{digits}d}-{slug(prompt.text.replace('.', ' ')) or 'picture'}"
        cells.append(Cell(prompt.text, {"prompt": prompt.text, "stem": stem}, prompt.options))
    return cells


def told_apart(cells: Sequence[Cell], shown: Iterable[str] = ()) -> list[Cell]:
    """Adds notes to the cells of prompts with equal texts: the options in which they differ.

    `shown` are the fields of a `Drawing` that the sheet shows otherwise or whose options are overridden.
    """
    options = [{field: value for field, value in cell.options.items() if field not in shown} for cell in cells]
    notes = tell_apart([cell.label for cell in cells], [*map(shown_options, options)])
    formats = [note.replace("{", "{{").replace("}", "}}") for note in notes]
    return [cell._replace(note=note) for cell, note in zip(cells, formats, strict=True)]


def axis_cells(field: str, values: Iterable[Any]) -> list[Cell]:
    """Makes a cell for each value of a row of `SETTINGS`."""
    row, cells = SETTINGS[field], []
    for value in dict.fromkeys(values):
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        named = shown if isinstance(value, str) else f"{row.short}{shown}"
        suffix = "" if field == "seed" else f"-{slug(named)}"  # every file name contains the seed
        cells.append(Cell((row.label or "{}").format(shown), {field: value}, suffix=suffix))
    return cells


def read_grid(words: Iterable[str], by_flags: dict[str, list[Cell]], lora_scale: float) -> dict[str, list[Cell]]:
    """Parses --grid and returns {field: its cells}; a name without values uses the cells of `by_flags`."""
    axes = {}
    for name, equals, listed in (word.partition("=") for word in words):
        if name not in AXES:
            known = ", ".join(row.short for row in SETTINGS.values() if row.label)
            hint = f"Did you mean {nearest(name, AXES)}? The settings are {known}."
            raise InputError(f"--grid {name}: there is no such setting. {hint}")
        field, values = AXES[name], [value.strip() for value in listed.split(",") if value.strip()]
        if field in axes:
            raise InputError(f"--grid contains {name} twice. Write all of its values together, as in {name}=A,B.")
        if not equals and by_flags.get(field):
            axes[field] = by_flags[field]
        elif not values:
            raise InputError(f"--grid {name} has no values. Add them, as in {name}=A,B.")
        elif field == "prompt":
            axes[field] = prompt_cells(read_prompts("--grid prompt", values))
        elif field == "checkpoint":
            found = find_checkpoints([*map(user_path, values)], lora_scale)
            axes[field] = [Cell(label, {field: lora}, suffix=f"-{slug(label)}") for label, lora in found.items()]
        else:
            try:
                axes[field] = axis_cells(field, map(SETTINGS[field].parse, values))
            except argparse.ArgumentTypeError as error:
                raise InputError(f"--grid {name}={error}") from error
    if len(axes) > 3:
        raise InputError(f"--grid varies {len(axes)} settings. Use at most three, for rows, columns and bands.")
    return axes


def check_axes(axes: dict[str, list[Cell]], prompts: Sequence[Prompt], loras: Sequence[Lora], given: set[str]) -> None:
    """Raises `InputError` if an option of a prompt needs a flag that is not `given`, or lora_scale has no effect."""
    loras = [*loras, *(cell.changes["checkpoint"] for cell in axes.get("checkpoint", ()))]
    given = given | {"lora" for lora in loras if lora}
    for cell in axes.get("prompt", prompt_cells(prompts)):
        for field in cell.options:
            if SETTINGS[field].needs and SETTINGS[field].needs not in given:
                needed = f"needs --{SETTINGS[field].needs}."
                raise InputError(f"--{field} after the prompt {cell.label!r} {needed}")
    if "lora_scale" in axes and all(lora is None or lora.fixed for lora in loras):
        reason = "each LoRA has a strength of its own. Omit the :STRENGTH of at least one."
        raise InputError(f"--grid lora_scale: {reason}")


def combine(cells: Iterable[Cell]) -> Cell:
    """Combines the cells of several axes into the cell of one picture."""
    cells = [*cells]
    return Cell(
        ", ".join(cell.label for cell in cells if cell.label),
        functools.reduce(dict.__or__, (cell.changes for cell in cells), {}),
        functools.reduce(dict.__or__, (cell.options for cell in cells), {}),
        ", ".join(cell.note for cell in cells if cell.note),
        "".join(cell.suffix for cell in cells),
        sum(cell.nth for cell in cells),
    )


def arrange(
    axes: dict[str, list[Cell]],
    prompts: Sequence[Prompt],
    num_images: int,
    strengths: Sequence[float],
    with_loras: Cell | None = None,
) -> Grid:
    """Arranges a grid: the first axis forms the rows, the second the columns, and the third bands of rows.

    A single axis forms the columns. One sheet is made for each combination of the remaining prompts, strengths and
    seeds. `with_loras` is the row with LoRAs of --compare_base.
    """
    shown = {*axes, *(["seed"] if num_images > 1 and "prompt" not in axes else [])}
    if "prompt" in axes:
        axes = axes | {"prompt": told_apart(axes["prompt"], shown)}
    rest = [] if "prompt" in axes else [told_apart(prompt_cells(prompts), shown)]
    if "strength" not in axes and len(strengths) > 1:
        rest.append(axis_cells("strength", strengths))
    if "seed" not in axes:
        seeds_differ = any("seed" in cell.options for cell in axes.get("prompt", ()))
        notes = [f"seeds plus {i}" * (i > 0) if seeds_differ else "seed {seed}" for i in range(num_images)]
        rest.append([Cell(note=note * (num_images > 1), nth=i) for i, note in enumerate(notes)])
    others = [combine(cells) for cells in itertools.product(*rest)]
    one = [Cell()]
    if with_loras:
        return Grid("comparison", one, one, [Cell("base", {"loras": ()}, suffix="-base"), with_loras], others)
    if not axes:
        return Grid(None, others, one, one, one)
    cells = [*axes.values()]
    columns = cells[1] if len(cells) > 1 else cells[0]
    return Grid("grid", others, cells[2] if len(cells) > 2 else one, cells[0] if len(cells) > 1 else one, columns)


def make_grid(settings: Any, prompts: Sequence[Prompt], loras: Sequence[Lora]) -> Grid:
    """Makes the grid of the flags of `infer.py`; `loras` are the LoRAs of --lora."""
    pictures, strengths = settings.pictures, settings.from_pictures.strengths
    by_flags = {
        "prompt": prompt_cells(prompts),
        "seed": axis_cells("seed", range(pictures.seed, pictures.seed + pictures.num_images)),
        "strength": axis_cells("strength", strengths),
    }
    axes = read_grid(settings.grids.grid or (), by_flags, settings.model.lora_scale)
    check_axes(axes, prompts, loras, {name for name, value in flag_values(settings).items() if value is not None})
    with_loras = make_lora_row(loras) if settings.grids.compare_base else None
    return arrange(axes, prompts, pictures.num_images, strengths, with_loras)


def make_lora_row(loras: Sequence[Lora]) -> Cell:
    """Makes the row of --compare_base that is drawn with the LoRAs."""
    scales = " and ".join(f"{lora.scale:g}" for lora in loras)
    note = f"at {scales}" if any(lora.scale != 1 for lora in loras) else ""
    return Cell("with LoRA" + "s" * (len(loras) > 1), note=note)


def plan(common: Drawing, grid: Grid) -> list[Drawing]:
    """Returns the drawings of a grid, sheet by sheet, band by band, row by row; `common` has their other settings."""
    drawings = []
    for cell in map(combine, itertools.product(grid.sheets, grid.bands, grid.rows, grid.columns)):
        drawing = common._replace(**{**cell.options, **cell.changes})
        seed = drawing.seed + cell.nth
        drawings.append(drawing._replace(stem=f"{drawing.stem}-seed{seed}{cell.suffix}", seed=seed))
        check_drawing(drawings[-1])
    note = note_of_a1111s_syntax(text for each in drawings for text in (each.prompt, each.negative_prompt) if text)
    if note is not None:
        logger.warning(note)
    return drawings


def make_sheets(
    grid: Grid, drawings: Sequence[Drawing], images: Sequence[Any], given: Sequence[tuple[str, Any]]
) -> Iterator[Sheet]:
    """Yields the sheets of a grid.

    Args:
        images: The pictures, in the order of `drawings`.
        given: Names and pictures of the initial picture and the control image, which the sheets show first.
    """
    from ..pictures.sheets import Label, Row, labelled_sheet, stacked

    def labelled(cell, drawing):
        return Label(cell.label, cell.note.format(seed=drawing.seed))

    width = len(grid.columns)
    per_sheet = len(grid.bands) * len(grid.rows) * width
    for i, cell in enumerate(grid.sheets):
        shown = drawings[i * per_sheet : (i + 1) * per_sheet]
        title = ", ".join(filter(None, labelled(cell, shown[0])))
        columns = [labelled(column, shown[k]) for k, column in enumerate(grid.columns)]
        bands, start = [], i * per_sheet
        for band in grid.bands:
            rows = []
            for k, row in enumerate(grid.rows):
                rows.append(Row(labelled(row, shown[k * width]), images[start : start + width]))
                start += width
            above = {} if bands else {"title": title, "given": given}
            bands.append(labelled_sheet(rows, columns, heading=band.label, **above))
        seed = f"seed{shown[0].seed}" if cell.nth else None
        stem = "-".join(filter(None, [grid.name, cell.changes.get("stem"), seed])) + cell.suffix
        yield Sheet(f"{grid.name if len(grid.sheets) == 1 else stem}.png", stacked(bands), shown)

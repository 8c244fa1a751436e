"""Which pictures a run draws: the axes of a grid, the order of its pictures, and the sheets that show them. Needs no torch."""

import argparse
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..command_line import flag_values
from ..errors import InputError
from .find import find_checkpoints
from .prompts import Prompt, read_prompts
from .rows import AXES, SETTINGS, Drawing, Lora, nearest


class Cell(NamedTuple):
    """A place along an axis of a grid: what the sheet says there, and what its pictures have otherwise."""

    label: str = ""
    changes: dict[str, Any] = {}  # {field of `Drawing`: value}
    options: dict[str, Any] = {}  # the prompt's own, which the changes of all axes override
    note: str = ""  # a second line on the sheet; {seed} stands for the picture's
    suffix: str = ""  # of the file's name
    nth: int = 0  # picture i of a prompt has the seed + i


class Grid(NamedTuple):
    """Which pictures a run draws: each of the sheets' cells with each of the bands', the rows' and the columns'."""

    name: str | None  # of the sheets' files; None: no sheets
    sheets: list[Cell]
    bands: list[Cell]
    rows: list[Cell]
    columns: list[Cell]


class Sheet(NamedTuple):
    """A sheet of a grid."""

    name: str  # of its file
    image: Any
    drawings: Sequence[Drawing]  # that it shows


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "-", text.lower())[:60].strip("-")


def prompt_cells(prompts: Sequence[Prompt]) -> list[Cell]:
    """A cell for each prompt; the names of its files start with its number."""
    digits, cells = max(2, len(str(len(prompts) - 1))), []
    for i, prompt in enumerate(prompts):
        stem = f"{i:0{digits}d}-{slug(prompt.text.replace('.', ' ')) or 'picture'}"
        cells.append(Cell(prompt.text, {"prompt": prompt.text, "stem": stem}, prompt.options))
    return cells


def axis_cells(field: str, values: Iterable[Any]) -> list[Cell]:
    """A cell for each value of a row of `SETTINGS`."""
    row, cells = SETTINGS[field], []
    for value in dict.fromkeys(values):
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        named = shown if isinstance(value, str) else f"{row.short}{shown}"
        suffix = "" if field == "seed" else f"-{slug(named)}"  # a seed is in each name anyway
        cells.append(Cell((row.label or "{}").format(shown), {field: value}, suffix=suffix))
    return cells


def read_grid(words: Iterable[str], by_flags: dict[str, list[Cell]], lora_scale: float) -> dict[str, list[Cell]]:
    """The axes of --grid {field: its cells}; a name without values has those of `by_flags`."""
    axes = {}
    for name, equals, listed in (word.partition("=") for word in words):
        if name not in AXES:
            known = ", ".join(row.short for row in SETTINGS.values() if row.label)
            hint = f"Did you mean {nearest(name, AXES)}? There are {known}."
            raise InputError(f"--grid {name}: there is no such name. {hint}")
        field, values = AXES[name], [value.strip() for value in listed.split(",") if value.strip()]
        if field in axes:
            raise InputError(f"--grid has {name} twice. Give all its values at once, as in {name}=A,B.")
        if not equals and by_flags.get(field):
            axes[field] = by_flags[field]
        elif not values:
            raise InputError(f"--grid {name} has no values. Write them behind it, as in {name}=A,B.")
        elif field == "prompt":
            axes[field] = prompt_cells(read_prompts("--grid prompt", values))
        elif field == "checkpoint":
            found = find_checkpoints(values, lora_scale)
            axes[field] = [Cell(label, {field: lora}, suffix=f"-{slug(label)}") for label, lora in found.items()]
        else:
            try:
                axes[field] = axis_cells(field, map(SETTINGS[field].parse, values))
            except argparse.ArgumentTypeError as error:
                raise InputError(f"--grid {name}={error}") from error
    if len(axes) > 3:
        raise InputError(f"--grid has {len(axes)} names: three are the most, for rows, columns and bands.")
    return axes


def check_axes(axes: dict[str, list[Cell]], prompts: Sequence[Prompt], loras: Sequence[Lora], given: set[str]) -> None:
    """Raises `InputError` for options behind prompts that need a flag which is not `given`, and for useless strengths."""
    loras = [*loras, *(cell.changes["checkpoint"] for cell in axes.get("checkpoint", ()))]
    given = given | {"lora" for lora in loras if lora}
    for cell in axes.get("prompt", prompt_cells(prompts)):
        for field in cell.options:
            if SETTINGS[field].needs and SETTINGS[field].needs not in given:
                needed = f"needs --{SETTINGS[field].needs}."
                raise InputError(f"--{field} behind the prompt {cell.label!r} {needed}")
    if "lora_scale" in axes and all(lora is None or lora.fixed for lora in loras):
        reason = "each LoRA has a strength of its own. Leave the :STRENGTH of one out."
        raise InputError(f"--grid lora_scale: {reason}")


def combined(cells: Iterable[Cell]) -> Cell:
    """The cell of a picture that lies in all these cells."""
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
    """The `Grid` of a run: the first axis is the rows, the second the columns, the third bands below each other.

    What else there are several of has a sheet each. `with_loras` is the row with LoRAs for --compare_base.
    """
    rest = [] if "prompt" in axes else [prompt_cells(prompts)]
    if "strength" not in axes and len(strengths) > 1:
        rest.append(axis_cells("strength", strengths))
    if "seed" not in axes:
        rest.append([Cell(note="seed {seed}" * (num_images > 1), nth=i) for i in range(num_images)])
    others = [combined(cells) for cells in itertools.product(*rest)]
    one = [Cell()]
    if with_loras:
        return Grid("comparison", one, one, [Cell("base", {"loras": ()}, suffix="-base"), with_loras], others)
    if not axes:
        return Grid(None, others, one, one, one)
    cells = [*axes.values()]
    columns = cells[1] if len(cells) > 1 else cells[0]
    return Grid("grid", others, cells[2] if len(cells) > 2 else one, cells[0] if len(cells) > 1 else one, columns)


def grid_of(settings: Any, prompts: Sequence[Prompt], loras: Sequence[Lora]) -> Grid:
    """The `Grid` of the flags of `infer.py`; `loras` are those of --lora."""
    pictures, strengths = settings.pictures, settings.from_pictures.strengths
    by_flags = {
        "prompt": prompt_cells(prompts),
        "seed": axis_cells("seed", range(pictures.seed, pictures.seed + pictures.num_images)),
        "strength": axis_cells("strength", strengths),
    }
    axes = read_grid(settings.grids.grid or (), by_flags, settings.model.lora_scale)
    check_axes(axes, prompts, loras, {name for name, value in flag_values(settings).items() if value is not None})
    with_loras = row_of_loras(loras) if settings.grids.compare_base else None
    return arrange(axes, prompts, pictures.num_images, strengths, with_loras)


def row_of_loras(loras: Sequence[Lora]) -> Cell:
    """The row of a comparison that has the LoRAs."""
    scales = " and ".join(f"{lora.scale:g}" for lora in loras)
    note = f"at {scales}" if any(lora.scale != 1 for lora in loras) else ""
    return Cell("with LoRA" + "s" * (len(loras) > 1), note=note)


def plan(like: Drawing, grid: Grid) -> list[Drawing]:
    """The drawings of a grid, sheet by sheet, band by band, row by row; the rest is as in `like`."""
    drawings = []
    for cell in map(combined, itertools.product(grid.sheets, grid.bands, grid.rows, grid.columns)):
        drawing = like._replace(**{**cell.options, **cell.changes})
        seed, steps = drawing.seed + cell.nth, drawing.num_inference_steps
        if drawing.strength is not None and int(steps * drawing.strength) < 1:
            remedy = f"Pass {1 / steps:.2g} or more, or more steps."
            raise InputError(f"strength {drawing.strength:g} of {steps} steps is none. {remedy}")
        drawings.append(drawing._replace(stem=f"{drawing.stem}-seed{seed}{cell.suffix}", seed=seed))
    return drawings


def sheets_of(
    grid: Grid, drawings: Sequence[Drawing], images: Sequence[Any], given: Sequence[tuple[str, Any]]
) -> Iterator[Sheet]:
    """Yields the sheets of a grid, whose pictures `images` lie in the order of the drawings.

    `given` are pictures with their names, which the others start from.
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

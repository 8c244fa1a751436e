"""The pictures of a grid, and their places on its sheets."""

from unittest import mock

import pytest
from PIL import Image

from text_to_image_lora.drawing import grids
from text_to_image_lora.drawing.prompts import Prompt, parse_prompt
from text_to_image_lora.drawing.rows import Drawing
from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures import sheets
from text_to_image_lora.pictures.sheets import Label


def cells(field, *values):
    return grids.axis_cells(field, values)


def test_how_a_grid_lies():
    prompts = [parse_prompt(line, "") for line in ("a dog --seed 7 --guidance 2", "a cat")]
    axes = {"guidance_scale": cells("guidance_scale", 5.0, 7.5), "scheduler": cells("scheduler", "ddim")}
    grid = grids.arrange(axes, prompts, 2, [])
    drawings = grids.plan(Drawing(height=64), grid)
    assert [len(part) for part in grid[1:]] == [4, 1, 2, 1]
    assert [d.stem for d in drawings[:3]] == [
        "00-a-dog-seed7-guidance5-ddim", "00-a-dog-seed7-guidance7.5-ddim", "00-a-dog-seed8-guidance5-ddim"
    ]  # fmt: skip
    assert {(d.scheduler, d.height) for d in drawings} == {("ddim", 64)}
    images = [Image.new("RGB", (64, 64))] * len(drawings)
    sheets = [(name, len(shown)) for name, _, shown in grids.make_sheets(grid, drawings, images, ())]
    names = ["00-a-dog", "00-a-dog-seed8", "01-a-cat", "01-a-cat-seed1"]
    assert sheets == [(f"grid-{name}.png", 2) for name in names]


def test_a_sheet_shows_each_picture_in_its_place():
    """A sheet has bands with rows and columns in order; the input pictures come first."""
    axes = {
        "steps": cells("num_inference_steps", 1, 2),
        "seed": cells("seed", 1, 2, 3),
        "lora": cells("lora_scale", 0.0, 1.0),
    }
    grid = grids.arrange(axes, [Prompt("a dog", {}, "a dog")], 1, [])
    drawings = grids.plan(Drawing(), grid)
    images = [Image.new("RGB", (64, 64), (250, 10 * i, 99)) for i in range(len(drawings))]
    given = [("input.png", Image.new("RGB", (32, 64), (0, 0, 255)))]
    ((name, sheet, _),) = grids.make_sheets(grid, drawings, images, given)
    assert name == "grid.png"
    counts = {colour: number for number, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert all(counts[250, 10 * i, 99] == 256**2 for i in range(12))
    assert 256 * 120 < counts[0, 0, 255] <= 256 * 128  # not stretched
    seen = dict.fromkeys(sheet.getpixel((x, y)) for y in range(0, sheet.height, 8) for x in range(0, sheet.width, 8))
    order = [colour for colour in seen if colour[::2] == (250, 99) or colour == (0, 0, 255)]
    assert order == [(0, 0, 255)] + [(250, 10 * i, 99) for i in range(12)]


def labels_of(sheets):
    """Returns everything that is written beside the pictures of sheets: titles, rows and columns."""
    return [
        [str(call.kwargs.get("title", "")), [row.label for row in call.args[0]], [*call.args[1]]]
        for call in sheets.call_args_list
    ]


def drawn_labels(axes, lines, num_images=1, with_loras=None):
    """Returns `labels_of` the sheets of a grid whose prompts are these lines."""
    prompts = [parse_prompt(line, "") for line in lines]
    if "prompt" in axes:
        axes, prompts = axes | {"prompt": grids.prompt_cells(prompts)}, []
    grid = grids.arrange(axes, prompts, num_images, [], with_loras)
    drawings = grids.plan(Drawing(), grid)
    with mock.patch.object(sheets, "labelled_sheet", return_value=Image.new("RGB", (8, 8))) as drawn:
        assert [*grids.make_sheets(grid, drawings, [Image.new("RGB", (8, 8))] * len(drawings), ())]
    return labels_of(drawn)


EQUAL_TEXTS = {
    "steps": (["an axe --s 4", "an axe --s 8"], ["4 steps", "8 steps"]),
    "guidance": (["an axe", "an axe --l 2"], ["", "guidance 2"]),
    "scheduler and size": (
        ["an axe --scheduler ddim --h 64", "an axe --scheduler ddim --h 32", "an axe --h 32"],
        ["ddim, height 64", "ddim, height 32", "height 32"],
    ),
    "a negative prompt with braces": (["an axe --n {x}", "an axe --n y"], ["without {x}", "without y"]),
    "equal options": (["an axe --s 4", "an axe --s 4"], ["", ""]),
    "other texts": (["an axe --s 4", "a spear --s 8"], ["", ""]),
}


@pytest.mark.parametrize("kind", EQUAL_TEXTS)
def test_prompts_that_differ_in_options_alone_have_labels_of_their_own(kind):
    lines, notes = EQUAL_TEXTS[kind]
    texts = [line.partition(" --")[0] for line in lines]
    expected = [Label(text, note) for text, note in zip(texts, notes, strict=True)]
    ((_, _, columns),) = drawn_labels({"prompt": []}, lines)
    assert columns == expected
    ((_, rows, _),) = drawn_labels({"prompt": [], "lora_scale": cells("lora_scale", 0.0, 1.0)}, lines)
    assert rows == expected
    ((_, _, columns),) = drawn_labels({}, lines, with_loras=grids.Cell("with LoRA"))
    assert columns == expected
    titles = [title for title, _, _ in drawn_labels({"lora_scale": cells("lora_scale", 0.0, 1.0)}, lines)]
    assert titles == [", ".join(filter(None, label)) for label in expected]


def test_a_note_does_not_repeat_what_the_grid_shows_or_overrides():
    lines = ["an axe --s 4 --d 3", "an axe --s 8 --d 5"]
    steps = {"num_inference_steps": cells("num_inference_steps", 1, 2)}
    ((_, rows, _),) = drawn_labels({"prompt": []} | steps, lines)
    assert [row.note for row in rows] == ["seed 3", "seed 5"]  # each has 1 and 2 steps
    labels = drawn_labels({"prompt": []} | steps, lines, num_images=2)
    assert [title for title, _, _ in labels] == ["", "seeds plus 1"]
    ((_, _, columns),) = drawn_labels({}, lines, num_images=2, with_loras=grids.Cell("with LoRA"))
    assert [column.note for column in columns] == [
        "4 steps, seed 3", "4 steps, seed 4", "8 steps, seed 5", "8 steps, seed 6",
    ]  # fmt: skip


LONG = {
    "Chinese": "一把带有粉红色花朵的红色斧头，白色背景，" * 9,
    "rare Chinese": "𠀀𠀁𠀂" * 40,
    "Thai": "ขวานสีแดงกับดอกไม้สีชมพู" * 9,
    "Russian": "красный топор с розовыми цветами " * 9,
    "emoji": "🪓🌸" * 60,
    "English": "a red axe with pink blossoms on a white background " * 9,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_file_names_are_short_enough_in_every_script(text, tmp_path):
    """A file name has at most 255 bytes, and one that is not yet complete has a longer name."""
    axes = {
        "negative_prompt": cells("negative_prompt", text, text[1:]),
        "prompt": grids.prompt_cells([Prompt(text, {}, text)]),
    }
    axes["checkpoint"] = [grids.Cell("x", {"checkpoint": None}, suffix=f"-{grids.slug(text)}")]
    drawings = grids.plan(Drawing(seed=2**64 - 1), grids.arrange(axes, [], 1, []))
    for drawing in drawings:
        name = f"grid-{drawing.stem}-999.png"
        assert len(f".{name}.00000000.tmp".encode()) <= 255
        (tmp_path / name).touch()
    assert grids.slug("a red axe") == "a-red-axe"
    assert grids.slug("красный топор") == "красный-топор"


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        (
            dict(scheduler="lcm", num_inference_steps=51),
            {},
            "51 steps: the sampler lcm does at most 50 steps.",
        ),
        (dict(num_inference_steps=60), {"scheduler": ["ddim", "lcm"]}, "the sampler lcm does at most 50 steps."),
        (dict(scheduler="lcm"), {"num_inference_steps": [4, 51]}, "the sampler lcm does at most 50 steps."),
        (dict(num_inference_steps=999), {}, r"the sampler dpm\+\+ does at most 998 steps."),
        (dict(scheduler="ddim", num_inference_steps=1000), {}, "the sampler ddim does at most 999 steps."),
        (dict(seed=2**64 - 1), {}, "the seed of every picture must be from"),
        (dict(strength=0.01), {}, "strength 0.01 runs none of the 30 steps."),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_model_is_loaded(changes, grid, message):
    axes = {field: cells(field, *values) for field, values in grid.items()}
    with pytest.raises(InputError, match=message):
        grids.plan(Drawing(**changes), grids.arrange(axes, [parse_prompt("a dog", "")], 2, []))


def test_what_samplers_can_do_is_planned():
    for scheduler, steps in (("lcm", 50), ("ddim", 999), ("euler", 1000), (None, 998)):
        drawing = Drawing(scheduler=scheduler, num_inference_steps=steps, seed=2**64 - 2)
        assert len(grids.plan(drawing, grids.arrange({}, [parse_prompt("a dog", "")], 2, []))) == 2

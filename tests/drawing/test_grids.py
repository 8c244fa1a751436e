"""The pictures of a grid, and their places on its sheets."""

from PIL import Image

from text_to_image_lora.drawing import grids
from text_to_image_lora.drawing.prompts import Prompt, parse_prompt
from text_to_image_lora.drawing.rows import Drawing


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

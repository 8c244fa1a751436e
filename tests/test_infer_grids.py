"""`infer.py`: grids and their sheets, prompts with options, and pictures that are drawn again from what their files say."""

import argparse
import io
import json
import re

import numpy as np
import pytest
import sd_parsers
import tqdm
from conftest import train_script, write_pictures
from infer_fixtures import PROMPT, command, difference, draw, flat
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import infer
from text_to_image_lora.drawing.prompts import Prompt, parse_prompt
from text_to_image_lora.drawing.rows import number
from text_to_image_lora.errors import InputError


pytestmark = pytest.mark.usefixtures("library_settings")
AXE = f"00-{PROMPT.replace(' ', '-')}"


def nearly_equal(a, b):
    """Within 2/255 on 99% of the values: what the rounding of another batch size may change."""
    return np.mean(abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)) <= 2) >= 0.99


@pytest.fixture(scope="module")
def grid(model, lora, tmp_path_factory):
    """The pictures of a grid of three axes, drawn one by one: {name: picture}."""
    folder = tmp_path_factory.mktemp("grid")
    axes = ["lora_scale=0,0.5,1", "guidance=1,5", "seed=3,4"]
    return draw(model, folder, "--lora", lora, "--grid", *axes, "--batch_size", 1)


def test_a_cell_is_the_picture_drawn_alone(model, lora, grid, tmp_path):
    assert len(grid) == 3 * 2 * 2 + 1
    for scale, guidance, seed in ((0.5, 1, 4), (1, 5, 3)):
        flags = ["--lora", lora, "--lora_scale", scale, "--guidance_scale", guidance, "--seed", seed]
        (alone,) = draw(model, tmp_path / f"{scale}", *flags, "--batch_size", 1).values()
        assert difference(grid[f"{AXE}-seed{seed}-lora_scale{scale}-guidance{guidance}.png"], alone) == 0
    (base,) = draw(model, tmp_path / "base", "--guidance_scale", 5, "--seed", 4).values()
    assert difference(grid[f"{AXE}-seed4-lora_scale0-guidance5.png"], base) == 0
    assert difference(grid[f"{AXE}-seed4-lora_scale1-guidance5.png"], base) > 3


def test_full_batches_change_rounding_alone(model, lora, grid, tmp_path):
    """Pictures of different prompts and seeds go through the UNet together."""
    axes = ["lora_scale=0,0.5,1", "guidance=1,5", "seed=3,4"]
    together = draw(model, tmp_path / "4", "--lora", lora, "--grid", *axes)
    assert together.keys() == grid.keys()
    assert all(nearly_equal(together[name], grid[name]) for name in grid)


def unet_and_encoder_calls(run):
    """How often the UNet and the text encoder are called."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (UNet2DConditionModel, CLIPTextModel):

            def counting(self, *args, forward=kind.forward, kind=kind, **options):
                calls.append(kind)
                return forward(self, *args, **options)

            patch.setattr(kind, "forward", counting)
        run()
    return calls.count(UNet2DConditionModel), calls.count(CLIPTextModel)


def test_each_text_is_encoded_once_and_batches_are_full(model, lora_weights, write_lora, tmp_path):
    """Two prompts with two seeds each at two strengths; the LoRA has no part of the text encoder."""
    lora = write_lora("unet", {f"unet.{key}": value for key, value in lora_weights["unet"].items()})
    flags = ["--lora", lora, "--num_images", 2, "--scheduler", "ddim"]
    prompts = ("a dog", f"{PROMPT} --negative blurry")

    def run():
        pictures = draw(model, tmp_path / "1", *flags, "--grid", "prompt", "lora_scale=0.5,1", "seed", prompt=prompts)
        assert len(pictures) == 9

    unet, encoder = unet_and_encoder_calls(run)
    assert (unet, encoder) == (2 * 2, 4)  # two batches of two steps; two prompts, "blurry" and ""


def test_a_lora_of_the_text_encoder_reads_prompts_anew(model, lora, tmp_path):
    flags = ["--lora", lora, "--grid", "lora_scale=0,0.5,1", "seed=1,2", "--guidance_scale", 1]
    assert unet_and_encoder_calls(lambda: draw(model, tmp_path, *flags))[1] == 3


def test_a_lora_of_the_text_encoder_alone(model, lora_weights, write_lora, tmp_path):
    lora = write_lora("words", {f"text_encoder.{k}": value for k, value in lora_weights["text_encoder"].items()})
    base, with_lora, _ = draw(model, tmp_path, "--lora", lora, "--grid", "lora_scale=0,1").values()
    assert difference(base, with_lora) > 0


def test_prompts_of_the_grid_itself(model, tmp_path):
    """No --prompt is needed then; a value may be a file."""
    (tmp_path / "more.txt").write_text("a cat, a mouse --seed 4\n")
    axis = ["--grid", f"prompt=a dog, {tmp_path}/more.txt", "--num_inference_steps", 1, "--guidance_scale", 1]
    infer.main(list(map(str, ["--pretrained_model_name_or_path", model, *axis, "--output_dir", tmp_path / "out"])))
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert names == ["00-a-dog-seed0.png", "01-a-cat-a-mouse-seed4.png", "grid.png"]


@pytest.mark.parametrize("scheduler", ["heun", "dpm++", "pndm", "lcm"])
def test_the_bar_counts_every_step(scheduler, model, tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    flags = ["--image", tmp_path / "black.png", "--strength", 0.5, 1, "--num_inference_steps", 5]
    draw(model, tmp_path / "out", *flags, "--scheduler", scheduler, "--guidance_scale", 1)
    assert bars[0].n == bars[0].total > 5


def test_checkpoints_in_turn(model, lora_weights, write_lora, compared, tmp_path):
    """In the order of their numbers, beside another LoRA that stays; base is none."""
    weights = flat(lora_weights)
    folders = [tmp_path / "run" / f"epoch-{n}" for n in (2, 10)]
    for folder, factor in zip(folders, (0.5, 1)):
        folder.mkdir(parents=True)
        weaker = {key: value * (factor if "lora_B" in key else 1) for key, value in weights.items()}
        write_lora(folder.name, weaker).rename(folder / infer.WEIGHT_NAME)
    pictures = draw(model, tmp_path / "1", "--grid", f"checkpoint=base,{tmp_path}/run/epoch-*", "--batch_size", 1)
    assert [*pictures] == [f"{AXE}-seed0-{name}.png" for name in ("base", "epoch-10", "epoch-2")] + ["grid.png"]
    base, with_lora, half = (pictures[f"{AXE}-seed0-{name}.png"] for name in ("base", "epoch-10", "epoch-2"))
    assert (difference(base, compared[0]), difference(with_lora, compared[1])) == (0, 0)
    (again,) = draw(model, tmp_path / "2", "--lora", folders[0], "--lora_scale", 0.7).values()
    beside = draw(
        model, tmp_path / "3", "--lora", folders[0], "--lora_scale", 0.7,
        "--grid", f"checkpoint=base,{folders[1]}:0.3", "lora_scale=0.7",
    )  # fmt: skip
    assert nearly_equal(beside[f"{AXE}-seed0-base-lora_scale0.7.png"], again)
    assert difference(beside[f"{AXE}-seed0-epoch-10-lora_scale0.7.png"], again) > 3
    assert difference(half, again) > 0
    labels = infer.find_checkpoints([f"{tmp_path}/run/epoch-*"], 1.0)
    assert [*labels] == ["epoch-2", "epoch-10"]


def test_labels_of_checkpoints_are_as_short_as_tells_them_apart(write_lora, tmp_path):
    for name in ("a/last", "b/last"):
        (tmp_path / name).mkdir(parents=True)
        write_lora("axe").rename(tmp_path / name / infer.WEIGHT_NAME)
    assert [*infer.find_checkpoints([f"{tmp_path}/*/last"], 1.0)] == ["a/last", "b/last"]


def cells(field, *values):
    return infer.axis_cells(field, values)


def test_how_a_grid_lies():
    prompts = [parse_prompt(line, "") for line in ("a dog --seed 7 --guidance 2", "a cat")]
    axes = {"guidance_scale": cells("guidance_scale", 5.0, 7.5), "scheduler": cells("scheduler", "ddim")}
    grid = infer.arrange(axes, prompts, 2, [], None)
    drawings = infer.plan(infer.Drawing(height=64), grid)
    assert [len(part) for part in grid[1:]] == [4, 1, 2, 1]
    assert [d.stem for d in drawings[:3]] == [
        "00-a-dog-seed7-guidance5-ddim", "00-a-dog-seed7-guidance7.5-ddim", "00-a-dog-seed8-guidance5-ddim"
    ]  # fmt: skip
    assert {(d.scheduler, d.height) for d in drawings} == {("ddim", 64)}
    images = [Image.new("RGB", (64, 64))] * len(drawings)
    sheets = [(name, len(shown)) for name, _, shown in infer.sheets_of(grid, drawings, images, ())]
    names = ["00-a-dog", "00-a-dog-seed8", "01-a-cat", "01-a-cat-seed1"]
    assert sheets == [(f"grid-{name}.png", 2) for name in names]


def test_a_sheet_shows_each_picture_in_its_place():
    """Bands below each other, each with rows and columns in order; what the pictures start from comes first."""
    axes = {
        "steps": cells("num_inference_steps", 1, 2),
        "seed": cells("seed", 1, 2, 3),
        "lora": cells("lora_scale", 0.0, 1.0),
    }
    grid = infer.arrange(axes, [Prompt("a dog", {}, "a dog")], 1, [], None)
    drawings = infer.plan(infer.Drawing(), grid)
    images = [Image.new("RGB", (64, 64), (250, 10 * i, 99)) for i in range(len(drawings))]
    given = [("input.png", Image.new("RGB", (32, 64), (0, 0, 255)))]
    ((name, sheet, _),) = infer.sheets_of(grid, drawings, images, given)
    assert name == "grid.png"
    counts = {colour: number for number, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert all(counts[250, 10 * i, 99] == 256**2 for i in range(12))
    assert 256 * 120 < counts[0, 0, 255] <= 256 * 128  # not stretched
    seen = dict.fromkeys(sheet.getpixel((x, y)) for y in range(0, sheet.height, 8) for x in range(0, sheet.width, 8))
    order = [colour for colour in seen if colour[::2] == (250, 99) or colour == (0, 0, 255)]
    assert order == [(0, 0, 255)] + [(250, 10 * i, 99) for i in range(12)]
    plain = infer.layout([("", "")], [("a", "")], images[:1])
    assert infer.layout([("", "")], [("a", "")], images[:1], "a heading").height > plain.height


BAD_GRIDS = {
    "guidence=5": "--grid guidence: there is no such name. Did you mean guidance?",
    "height=64,128": "--grid height: there is no such name",
    "guidance": "--grid guidance has no values",
    "guidance=,": "--grid guidance has no values",
    "guidance=5 guidance_scale=7": "has guidance_scale twice",
    "guidance=5,high": "--grid guidance=high: it must be a finite number",
    "scheduler=eulr": "--grid scheduler=invalid choice: 'eulr'. Did you mean euler?",
    "steps=0,10": "it must be a whole number, 1 or more",
    "seed=1 steps=2 guidance=3 prompt": "has 4 names: three are the most",
    "strength=0.5": "--strength needs --image",
    "lora_scale=0,1": "--lora_scale needs --lora",
    "controlnet_scale=0,1": "--controlnet_scale needs --controlnet",
    "checkpoint={bad}/epoch-*": "no file or folder has such a name",
    "checkpoint={bad}/cut.safetensors": "not a whole safetensors file",
    "checkpoint=base lora_scale=0,1": "each LoRA has a strength of its own",
    "prompt=a,b": "--prompt and prompt= in --grid are both given",
    "seed=1,2 --compare_base --lora {bad}/v.safetensors": "--compare_base is a grid of its own",
    "lora_scale=0,1 --lora {bad}/v.safetensors:1": "each LoRA has a strength of its own",
}


@pytest.mark.parametrize("words", BAD_GRIDS)
def test_bad_grids(words, model, bad_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "load_pipeline", lambda *args: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit) as stop:
        draw(model, tmp_path / "out", "--grid", *words.format(bad=bad_files).split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert BAD_GRIDS[words] in err
    assert not list(tmp_path.iterdir())


def test_a_bad_grid_of_the_command(model, tmp_path):
    flags = ["--pretrained_model_name_or_path", model, "--prompt", "a dog", "--output_dir", tmp_path / "out"]
    code, out, err, seconds = command(*flags, "--grid", "checkpont=run/epoch-*")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "Did you mean checkpoint?" in err
    assert seconds < 3


# Prompts with options.


def test_a_file_of_prompts(model, tmp_path):
    """Options of infer.py and of kohya; each picture is the one that flags would draw."""
    (tmp_path / "prompts.txt").write_text(
        f"# two of a kind\n\n{PROMPT} --seed 3 --width 32 --negative blurry, dark --steps 3\n"
        "a dog --n blurry, dark --w 32 --h 64 --d 5 --l 3 --s 1 \n#a cat\na cat # 1\n"
    )
    pictures = draw(model, tmp_path / "file", "--num_images", 2, prompt=[tmp_path / "prompts.txt"])
    stems = [
        f"{AXE}-seed3",
        f"{AXE}-seed4",
        "01-a-dog-seed5",
        "01-a-dog-seed6",
        "02-a-cat-1-seed0",
        "02-a-cat-1-seed1",
    ]
    assert [*pictures] == [f"{stem}.png" for stem in stems]
    negative = ["--negative_prompt", "blurry, dark", "--width", 32]
    axe = ["--num_inference_steps", 3, "--seed", 4]
    dog = ["--guidance_scale", 3, "--num_inference_steps", 1, "--seed", 5]
    for stem, prompt, flags in ((f"{AXE}-seed4", PROMPT, axe), ("01-a-dog-seed5", "a dog", dog)):
        (alone,) = draw(model, tmp_path / stem, *negative, *flags, prompt=[prompt]).values()
        assert pictures[f"{stem}.png"].size == alone.size == (32, 64)
        assert nearly_equal(pictures[f"{stem}.png"], alone)


BAD_LINES = {
    "a dog --sede 3": "--prompt: unknown option --sede. Did you mean --seed?",
    "a dog --negative-promt blurry": "Did you mean --negative_prompt?",
    "a dog --seed three": "--seed three: it must be a whole number",
    "a dog --seed": "--seed has no value",
    "--seed 3": "there is no prompt before --seed",
    "a dog --width 100": "a multiple of 8",
    "a dog --strength 0.5": "--strength behind the prompt 'a dog' needs --image",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_options(line, model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        infer.main(
            ["--pretrained_model_name_or_path", model, f"--prompt={line}", "--output_dir", str(tmp_path / "out")]
        )
    assert BAD_LINES[line] in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text(f"a cat\n\n{line}\n")
    if "behind the prompt" not in BAD_LINES[line]:
        with pytest.raises(SystemExit):
            draw(model, tmp_path / "out", prompt=[tmp_path / "prompts.txt"])
        assert f"{tmp_path}/prompts.txt:3: " in capsys.readouterr().err


def test_the_training_script_reads_the_same_lines(train, tiny_sd, tmp_path, capsys):
    """Sample pictures with sizes, seeds and negative prompts of their own are those of infer.py without a LoRA."""
    lines = [f"{PROMPT} --seed 5 --width 48 --negative dark", "a dog --s 3 --l 2", "a cat"]
    (tmp_path / "prompts.txt").write_text("# samples\n" + "\n".join(lines))
    out = train(
        train_data_dir=write_pictures(tmp_path / "pictures"), validation_prompts=[tmp_path / "prompts.txt"],
        num_validation_images=2, max_train_steps=1, seed=1,
    )  # fmt: skip
    pictures = draw(tiny_sd, tmp_path / "drawn", "--num_images", 2, "--seed", 1, prompt=[tmp_path / "prompts.txt"])
    samples = [Image.open(path) for path in sorted((out / "validation" / "step-000000").glob("prompt-*.png"))]
    assert [sample.size for sample in samples] == [(48, 32)] * 2 + [(32, 32)] * 4
    assert [sample.text["prompt"] for sample in samples] == [PROMPT] * 2 + ["a dog"] * 2 + ["a cat"] * 2
    for sample, picture in zip(samples, pictures.values()):
        assert nearly_equal(sample, picture)
    import yaml

    run = yaml.safe_load((out / "run.yaml").read_text())
    assert run["validation_prompts"] == lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [("a dog --sede 3", "prompts.txt:1: unknown option --sede"), ("a dog --scheduler ddim", "is for infer.py alone")],
)
def test_the_training_script_refuses_other_options(line, reason, arguments, tmp_path):
    (tmp_path / "prompts.txt").write_text(line)
    with pytest.raises(InputError, match=reason):
        train_script.parse_settings(arguments(validation_prompts=[tmp_path / "prompts.txt"]))


# Pictures that say how they were drawn.


@pytest.fixture(scope="module")
def repeated(model, lora, tmp_path_factory):
    """Six pictures, drawn in batches of four and of two."""
    folder = tmp_path_factory.mktemp("repeated")
    flags = ["--lora", f"{lora}:0.7", "--grid", "prompt", "seed=3,4", "--scheduler", "euler_a", "--clip_skip", 1]
    draw(model, folder, *flags, "--negative_prompt", "dark, ключ", prompt=("a dog, «red»", f"{PROMPT} --n x", "a cat"))
    return folder


def test_a_picture_draws_itself_again(repeated, tmp_path, capsys):
    """Byte for byte, in a batch of as many as it was drawn with: its name and what it says are equal too."""
    capsys.readouterr()
    for name in ("00-a-dog-red-seed4.png", f"01-{PROMPT.replace(' ', '-')}-seed3.png", "02-a-cat-seed4.png"):
        infer.main(["--from_png", str(repeated / name), "--output_dir", str(tmp_path / "out")])
        assert (tmp_path / "out" / name).read_bytes() == (repeated / name).read_bytes()
    assert capsys.readouterr().err == ""
    sizes = [json.loads(Image.open(path).text["repeat"])["batch"] for path in sorted(repeated.glob("*seed*"))]
    assert sizes == [[4, 0], [4, 1], [4, 2], [4, 3], [2, 0], [2, 1]]


def test_flags_change_what_a_picture_says(model, lora, repeated, tmp_path):
    name = "02-a-cat-seed4.png"
    infer.main(["--from_png", str(repeated / name), "--seed", "9", "--output_dir", str(tmp_path / "1")])
    ((path,),) = [[*(tmp_path / "1").iterdir()]]
    assert path.name == "00-a-cat-seed9.png"
    flags = ["--lora", f"{lora}:0.7", "--scheduler", "euler_a", "--clip_skip", 1, "--seed", 9]
    (alone,) = draw(model, tmp_path / "2", *flags, "--negative_prompt", "dark, ключ", prompt=["a cat"]).values()
    assert difference(Image.open(path), alone) == 0
    infer.main(["--from_png", str(repeated / name), "--grid", "guidance=2,5", "--output_dir", str(tmp_path / "3")])
    assert len([*(tmp_path / "3").iterdir()]) == 3
    infer.main(["--from_png", str(repeated / name), "--grid", "guidance=7.5", "--output_dir", str(tmp_path / "4")])
    assert [path.name for path in sorted((tmp_path / "4").iterdir())] == ["00-a-cat-seed4-guidance7.5.png", "grid.png"]


def with_chunks(picture, path, **chunks):
    info = PngInfo()
    for key, value in {**picture.text, **chunks}.items():
        info.add_text(key, value)
    picture.save(path, pnginfo=info)
    return path


def test_what_keeps_a_picture_from_being_drawn_again(repeated, write_lora, tmp_path, capsys):
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    repeat = json.loads(picture.text["repeat"])
    repeat["machine"] |= {"diffusers": "0.21.0", "device": "cuda NVIDIA T4"}
    repeat["flags"]["lora"] = [str(write_lora("other", **{"author": "another"}))]
    path = with_chunks(picture, tmp_path / "cat.png", repeat=json.dumps(repeat))
    infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "1")])
    lines = capsys.readouterr().err.splitlines()
    now = json.loads(picture.text["repeat"])["machine"]
    assert lines == [
        f"note: {path} was drawn with device cuda NVIDIA T4 (here {now['device']}), diffusers 0.21.0 "
        f"(here {now['diffusers']}): the picture may differ from it",
        f"note: --lora is not what {path} was drawn with (its SHA-256 differs): the picture will differ from it",
    ]


def test_pictures_that_do_not_say_how(model, repeated, tmp_path, capsys):
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    repeat = json.loads(picture.text["repeat"])
    repeat["flags"]["lora"] = [str(tmp_path / "gone.safetensors")]
    plain = PngInfo()
    plain.add_text("parameters", picture.text["parameters"])
    picture.save(tmp_path / "a1111.png", pnginfo=plain)
    (tmp_path / "text.png").write_text("no picture")
    cases = {
        repeated / "grid.png": "is a sheet of pictures, which was drawn by: infer.py --pretrained_model_name_or_path",
        tmp_path / "a1111.png": "only pictures that infer.py drew do",
        tmp_path / "text.png": "can't be read: it is no picture",
        tmp_path / "none.png": "can't be read: No such file or directory",
        with_chunks(picture, tmp_path / "gone.png", repeat=json.dumps(repeat)): "gone.safetensors does not exist",
        with_chunks(picture, tmp_path / "odd.png", repeat='{"flags": 3}'): "only pictures that infer.py drew do",
    }
    for path, reason in cases.items():
        with pytest.raises(SystemExit) as stop:
            infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "out")])
        err = capsys.readouterr().err
        assert (stop.value.code, len(err.splitlines())) == (2, 1)
        assert reason in err


def test_the_number_of_threads_is_repeated(repeated, tmp_path, capsys):
    """They change the last bits, too."""
    import torch

    torch.set_num_threads(2)
    infer.main(["--from_png", str(repeated / "02-a-cat-seed3.png"), "--output_dir", str(tmp_path)])
    assert torch.get_num_threads() == 1
    assert capsys.readouterr().err == ""


def test_a_picture_chooses_no_folder(repeated, tmp_path):
    """What a stranger's picture says is read for what is drawn, not for where it goes."""
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    repeat = json.loads(picture.text["repeat"])
    repeat["flags"] |= {"output_dir": [str(tmp_path / "theirs")], "device": ["cuda"], "save_merged": ["x"]}
    path = with_chunks(picture, tmp_path / "cat.png", repeat=json.dumps(repeat))
    infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "own")])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cat.png", "own"]


def read_parameters(text):
    """A1111's reading of `parameters`, by the patterns of its modules/infotext_utils.py."""
    *lines, last = text.strip().split("\n")
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    if len(pair.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompt, negative, done = [], [], False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            done, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if done else prompt).append(line)
    found = dict(pair.findall(last))
    size = re.fullmatch(r"(\d+)x(\d+)", found["Size"])
    unquoted = {k: json.loads(v) if v[:1] == '"' == v[-1:] else v for k, v in found.items()}
    return unquoted | {
        "Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative), "Size-1": size[1], "Size-2": size[2]
    }  # fmt: skip


def test_a1111_reads_the_parameters(repeated, lora):
    found = read_parameters(Image.open(repeated / "00-a-dog-red-seed3.png").text["parameters"])
    expected = {"Prompt": "a dog, «red»", "Negative prompt": "dark, ключ", "Steps": "2", "Sampler": "Euler a"}
    expected |= {"CFG scale": "7.5", "Seed": "3", "Size-1": "64", "Size-2": "64", "Model": "tiny", "Clip skip": "2"}
    assert found.items() >= {**expected, "Lora": "axe:0.7"}.items()


def test_another_library_reads_the_parameters(repeated):
    """sd-parsers, which knows A1111's text and that of other programs."""
    path = repeated / "00-a-dog-red-seed3.png"
    found = sd_parsers.ParserManager().parse(path)
    assert found.generator == sd_parsers.data.Generators.AUTOMATIC1111
    assert [prompt.value for prompt in found.prompts] == ["a dog, «red»"]
    assert [prompt.value for prompt in found.negative_prompts] == ["dark, ключ"]
    (sampler,) = found.samplers
    assert (sampler.name, sampler.parameters["seed"], sampler.parameters["cfg_scale"]) == ("Euler a", "3", "7.5")
    assert [model.name for model in found.models] == ["tiny"]


# Types of flags.


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "wish"),
    [
        (dict(kind=float, least=0, most=1), ["0", "0.65", "1"], ["-0.1", "1.5", "nan", "x"], "a number from 0 to 1"),
        (dict(kind=int), ["-3", "0"], ["1.5", ""], "a whole number."),
        (dict(kind=int, least=8, multiple_of=8), ["8", "64"], ["0", "12"], "a whole number, a multiple of 8"),
    ],
)
def test_numbers_with_bounds(bounds, good, bad, wish):
    parse = number(**bounds)
    assert [parse(text) for text in good] == [bounds["kind"](text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(wish)):
            parse(text)

"""`infer.py`: grids, and prompts with options."""

import numpy as np
import pytest
from conftest import train_script, write_pictures
from infer_fixtures import PROMPT, difference, draw, flat
from PIL import Image

import infer
from text_to_image_lora.drawing.find import find_checkpoints
from text_to_image_lora.errors import InputError
from text_to_image_lora.models.dialects import WEIGHTS_NAME


pytestmark = pytest.mark.usefixtures("library_settings")
AXE = f"00-{PROMPT.replace(' ', '-')}"


def nearly_equal(a, b):
    """Returns whether 99% of the values differ by at most 2/255, which the rounding of another batch size may cause."""
    return np.mean(abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)) <= 2) >= 0.99


@pytest.fixture(scope="module")
def grid(model, lora, tmp_path_factory):
    """Returns {name: picture} of a grid of three axes, drawn one by one."""
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
    """The UNet gets pictures of several prompts and seeds in one batch."""
    axes = ["lora_scale=0,0.5,1", "guidance=1,5", "seed=3,4"]
    together = draw(model, tmp_path / "4", "--lora", lora, "--grid", *axes)
    assert together.keys() == grid.keys()
    assert all(nearly_equal(together[name], grid[name]) for name in grid)


def test_a_lora_of_the_text_encoder_alone(model, lora_weights, write_lora, tmp_path):
    lora = write_lora("words", {f"text_encoder.{k}": value for k, value in lora_weights["text_encoder"].items()})
    base, with_lora, _ = draw(model, tmp_path, "--lora", lora, "--grid", "lora_scale=0,1").values()
    assert difference(base, with_lora) > 0


def test_prompts_of_the_grid_itself(model, tmp_path):
    """The grid needs no --prompt, and a value can be a file."""
    (tmp_path / "more.txt").write_text("a cat, a mouse --seed 4\n")
    axis = ["--grid", f"prompt=a dog, {tmp_path}/more.txt", "--num_inference_steps", 1, "--guidance_scale", 1]
    infer.main(list(map(str, ["--pretrained_model_name_or_path", model, *axis, "--output_dir", tmp_path / "out"])))
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert names == ["00-a-dog-seed0.png", "01-a-cat-a-mouse-seed4.png", "grid.png"]


def test_checkpoints_in_turn(model, lora_weights, write_lora, compared, tmp_path):
    """Checkpoints are in numeric order, beside another LoRA that stays; `base` means no checkpoint."""
    weights = flat(lora_weights)
    folders = [tmp_path / "run" / f"epoch-{n}" for n in (2, 10)]
    for folder, factor in zip(folders, (0.5, 1)):
        folder.mkdir(parents=True)
        weaker = {key: value * (factor if "lora_B" in key else 1) for key, value in weights.items()}
        write_lora(folder.name, weaker).rename(folder / WEIGHTS_NAME)
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
    labels = find_checkpoints([f"{tmp_path}/run/epoch-*"], 1.0)
    assert [*labels] == ["epoch-2", "epoch-10"]


BAD_GRIDS = {
    "guidence=5": "--grid guidence: there is no such setting. Did you mean guidance?",
    "height=64,128": "--grid height: there is no such setting",
    "guidance": "--grid guidance has no values",
    "guidance=,": "--grid guidance has no values",
    "guidance=5 guidance_scale=7": "contains guidance_scale twice",
    "guidance=5,high": "--grid guidance=high: it must be a number from -1000 to 1000",
    "scheduler=eulr": "--grid scheduler=invalid choice: 'eulr'. Did you mean euler?",
    "steps=0,10": "it must be a whole number from 1 to 1000",
    "seed=1 steps=2 guidance=3 prompt": "varies 4 settings. Use at most three",
    "strength=0.5": "--strength needs --image",
    "lora_scale=0,1": "--lora_scale needs --lora",
    "controlnet_scale=0,1": "--controlnet_scale needs --controlnet",
    "checkpoint={bad}/epoch-*": "no file or folder matches this pattern",
    "checkpoint={bad}/cut.safetensors": "not a complete safetensors file",
    "checkpoint=base lora_scale=0,1": "each LoRA has a strength of its own",
    "prompt=a,b": "--prompt and prompt= in --grid are both given",
    "seed=1,2 --compare_base --lora {bad}/v.safetensors": "--compare_base is a grid of its own",
    "lora_scale=0,1 --lora {bad}/v.safetensors:1": "each LoRA has a strength of its own",
}


@pytest.mark.parametrize("words", BAD_GRIDS)
def test_bad_grids(words, bad_files, refusal):
    assert BAD_GRIDS[words] in refusal("--grid", *words.format(bad=bad_files).split())


# Prompts with options.


def test_a_picture_without_a_prompt(model, tmp_path):
    """It equals the one that guidance leads away from; its file has a name."""
    (empty,) = draw(model, tmp_path / "1", prompt=[""]).values()
    (unguided,) = draw(model, tmp_path / "2", "--guidance_scale", 1, prompt=[" "]).values()
    assert difference(empty, unguided) <= 1
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["00-picture-seed0.png"]


@pytest.mark.parametrize("words", [["--seed 3"], ["a dog", "--width 64"], ["--n blurry --steps 3"]])
def test_options_without_a_prompt(refusal, words):
    flag = words[-1].split()[0]
    assert f"--prompt: there is no prompt before {flag}. Write the prompt first, such as: " in refusal(prompt=words)


def test_a_flag_and_its_value_in_one_word(refusal):
    line = refusal("--compile", "--seed 3")
    assert (
        "unrecognized arguments: --seed 3. Write a flag and its value as two words, and quote only the value." in line
    )


def test_a_file_of_prompts(model, tmp_path):
    """Options of infer.py and of kohya's scripts; each picture equals the one drawn with flags."""
    (tmp_path / "prompts.txt").write_text(
        f"# two of a kind\n\n{PROMPT} --seed 3 --width 32 --negative blurry, dark --steps 3\n"
        "a dog --n blurry, dark --w 32 --h 64 --d 5 --l 3 --s 1 \n#a cat\na cat # 1\n"
    )
    pictures = draw(model, tmp_path / "file", "--num_images", 2, prompt=[tmp_path / "prompts.txt"])
    stems = [
        f"{AXE}-seed3", f"{AXE}-seed4", "01-a-dog-seed5", "01-a-dog-seed6", "02-a-cat-1-seed0", "02-a-cat-1-seed1",
    ]  # fmt: skip
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
    "a dog --strength 0.5": "--strength after the prompt 'a dog' needs --image",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_options(line, refusal, tmp_path):
    assert BAD_LINES[line] in refusal(prompt=[f" {line}"])
    (tmp_path / "prompts.txt").write_text(f"a cat\n\n{line}\n")
    if "after the prompt" not in BAD_LINES[line]:
        assert f"{tmp_path}/prompts.txt:3: " in refusal(prompt=[tmp_path / "prompts.txt"])


def test_the_training_script_reads_the_same_lines(train, tiny_sd, tmp_path, capsys):
    """Sample pictures with sizes, seeds and negative prompts equal those of infer.py without a LoRA."""
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
    [("a dog --sede 3", "prompts.txt:1: unknown option --sede"), ("a dog --strength 0.5", "works only in infer.py")],
)
def test_the_training_script_refuses_other_options(line, reason, arguments, tmp_path):
    (tmp_path / "prompts.txt").write_text(line)
    with pytest.raises(InputError, match=reason):
        train_script.parse_settings(arguments(validation_prompts=[tmp_path / "prompts.txt"]))

"""Every code block of the pages runs as it stands, in a copy of the project. A command gets flags appended that shorten it.

Hub ids of base models and datasets are there as folders: the small base model stands for Stable Diffusion v1.5.
"""

import os
import re
import runpy
import shlex
import subprocess

import caption_models
import mask_models
import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, quick_python, train_script
from snippets import (
    BLOCKS,
    CANNOT_RUN,
    GIVEN,
    PAGES,
    blocks_of,
    cannot_run,
    commands_of,
    copy_project,
    put_in,
    read_data,
    shortened,
)

import infer
from scripts.captioning.find import DEFAULT_MODEL
from scripts.evaluation.judges import CLIP_MODEL, DINO_MODEL
from scripts.masking.find import DEFAULT_MODEL as MASKING_MODEL
from text_to_image_lora.drawing.prompts import read_prompts


SHELL = [block for block in BLOCKS if block.language == "bash"]
STAND_INS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ROOT / "models" / "mini-sd",
    "lllyasviel/control_v11p_sd15_canny": ROOT / "models" / "mini-controlnet",
}

ANNOTATING_MODELS = {
    DEFAULT_MODEL: caption_models.make_blip,
    "florence-community/Florence-2-base": caption_models.make_florence,
    "Qwen/Qwen3-VL-2B-Instruct": caption_models.make_qwen,
    "SmilingWolf/wd-vit-tagger-v3": caption_models.make_tagger,
    MASKING_MODEL: mask_models.make_clipseg,
}


def test_a_block_is_of_a_language_that_is_run_or_read_here():
    assert {block.language for block in BLOCKS} == {"bash", "python", "json", "csv", ""}
    assert len(SHELL) > 30


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}-{block.number}")
def test_a_shell_block_can_be_pasted(block):
    assert not re.search(r"(^|\s)\.\.\.(\s|$)", block.text), "write the command in full"
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def words_of(command):
    return shlex.split(command.replace("\\\n", " "), comments=True)


COMMANDS = [(block.page, command) for block in SHELL for command in commands_of(block)]


@pytest.mark.parametrize("beginning", CANNOT_RUN)
def test_what_cannot_run_here_is_well_formed(beginning, monkeypatch):
    """Flags and combinations are accepted, and what is named is there."""
    monkeypatch.chdir(ROOT)
    commands = [command for _, command in COMMANDS if command.startswith(beginning)]
    assert commands, "no page has such a command: remove the row"
    for command in commands:
        words = words_of(command)
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        elif words[0] == "accelerate":
            launched = launch_command_parser().parse_args(words[2:])
            assert (ROOT / launched.training_script).is_file()
            train_script.parse_settings(launched.training_script_args)
        elif "-r" in words:
            assert (ROOT / words[words.index("-r") + 1]).is_file()


@pytest.mark.parametrize(("page", "command"), [(p, c) for p, c in COMMANDS if "infer.py" in c])
def test_commands_that_draw_are_accepted(page, command):
    infer.build_parser().settings(words_of(command)[2:])


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python scripts/report.py a   # a page", "python scripts/report.py a    # a page"),
        ("source .venv/bin/activate   # on Linux", "source .venv/bin/activate   # on Linux"),
        (
            "python -m scripts.mini_sd.measure --loras a \\\n  b",
            "python -m scripts.mini_sd.measure --loras a \\\n  b --num",
        ),
    ],
)
def test_flags_are_appended_before_the_comment(command, expected):
    assert shortened(command).startswith(expected)


def test_data_and_prompts_are_read(tmp_path):
    """Blocks of data, and those without a language that show a file of prompts."""
    for block in BLOCKS:
        if block.language in ("json", "csv"):
            assert all(row["file_name"] and row["text"] for row in read_data(block)), block
        elif block.language == "" and re.search(r" --(seed|n) ", block.text):
            (tmp_path / "prompts.txt").write_text(block.text)
            assert len(read_prompts("--prompt", [str(tmp_path / "prompts.txt")])) == 3


@pytest.fixture(scope="session")
def annotating_models(tmp_path_factory):
    """Tiny models that write captions and make masks, by the hub ids of the real ones."""
    folder = tmp_path_factory.mktemp("annotating")
    return {name: make(folder / name.partition("/")[2]) for name, make in ANNOTATING_MODELS.items()}


@pytest.fixture
def stand_ins(tmp_path, monkeypatch, clip_model, dino_model, annotating_models):
    """The working directory, in which hub ids are folders."""
    judges = {CLIP_MODEL: clip_model, DINO_MODEL: dino_model}
    for name, target in (STAND_INS | judges | annotating_models).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained_lora(train_on_weapons, tmp_path_factory):
    """The output folder of a run of the small base model."""
    return train_on_weapons(tmp_path_factory.mktemp("trained") / "out", resolution=64, max_train_samples=4, rank=16)


@pytest.mark.parametrize("name", ["README.md", "models/mini-sd/README.md"])
def test_the_python_code_draws(stand_ins, trained_lora, name):
    """In this process, where each warning is an error."""
    (stand_ins / "models").symlink_to(ROOT / "models")
    (stand_ins / "knights").symlink_to(trained_lora)
    for block in blocks_of(ROOT / name):
        if block.language == "python":
            (stand_ins / "snippet.py").write_text(block.text)
            runpy.run_path("snippet.py", run_name="__main__")
            assert (stand_ins / re.search(r'save\("(.*)"\)', block.text)[1]).is_file()


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if {b.language for b in blocks_of(page)} & {"bash", "python"}],
                         ids=lambda page: page.relative_to(ROOT).as_posix())  # fmt: skip
def test_the_blocks_of_a_page_run_in_order(stand_ins, trained_lora, page):
    environment = quick_python().environment | {"ACCELERATE_USE_CPU": "true"}
    name = page.relative_to(ROOT).as_posix()
    folder = copy_project(stand_ins)
    put_in(folder, GIVEN.get(name, ""), trained_lora)
    for block in blocks_of(page):
        if block.language == "python":
            (folder / "snippet.py").write_text(block.text)
            script = "python snippet.py"
        elif block.language == "bash":
            script = "\n".join(shortened(command) for command in commands_of(block) if not cannot_run(command))
        else:
            continue
        if name == "metadata/README.md":  # whose commands are alternatives, of which a reader runs one
            script = f"rm -rf my-lora weapons-lora pokemon-lora\n{script}"
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=folder,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=3600,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        if "--dry_run" not in script:
            for made in re.findall(r"--output_dir (\S+)", script):
                assert any((folder / made).iterdir()), script

"""The code blocks of the pages, and what they are run in: a copy of the project, with stand-ins for what is elsewhere."""

import csv
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT
from PIL import Image
from test_mission import pokemon
from test_recipes import creatures, lay_out, weapons


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "models").glob("*/README.md")),
    *sorted((ROOT / "metadata").glob("*.md")),
]


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    number: int  # among the code blocks of the page
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [Block(page.relative_to(ROOT).as_posix(), n, *parts) for n, parts in enumerate(found)]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block as they stand, each with its continuation lines."""
    lines = re.sub(r"\\\n", "\\\\\0", block.text).splitlines()
    return [line.replace("\0", "\n") for line in lines if line.strip() and not line.startswith("#")]


# What can't run in a test, by how the command begins, and why. `test_what_cannot_run_here_is_well_formed` reads it instead.
CANNOT_RUN = {
    "python -m venv": "it makes the environment that this test runs in",
    ".venv/bin/pip install": "it installs packages from the internet",
    "make demo": "it installs packages from the internet; its two commands are the next block of the README",
    "make test": "it runs these tests",
    "make gpu": "it needs a GPU",
    "hf download": "it needs the hub",
    "accelerate launch --config_file accelerate_config.yaml --multi_gpu": "it needs eight GPUs",
}


def cannot_run(command: str) -> bool:
    return any(command.startswith(beginning) for beginning in CANNOT_RUN)


# What makes a command short. Of flags that are given twice, the last counts.
SHORT_TRAINING = dict(
    resolution=64, max_train_steps=2, train_batch_size=2, max_train_samples=12, checkpointing_steps=1,
    validation_steps=2, num_validation_images=1, validation_inference_steps=2, report_to="none", num_cpu_threads=1,
    latent_cache_dir="cache",
)  # fmt: skip
AS_FLAGS = " ".join(f"--{name} {value}" for name, value in SHORT_TRAINING.items())
SHORT = {
    "train_text_to_image_lora.py": AS_FLAGS,
    "infer.py": "--num_inference_steps 4 --height 64 --width 64 --num_cpu_threads 1",
    "scripts/evaluate.py": "--num_prompts 2 --num_inference_steps 2 --other_prompts 'a red house' --resolution 64",
    "scripts/sweep.py": "--sampler random --num_trials 1",
    "scripts.mini_sd.measure": "--num_inference_steps 2 --pictures_per_caption 1 --judged_drawings 3",
    "scripts.mini_sd.draw": "",
    "scripts/convert_lora.py": "",
    "scripts/report.py": "",
    "scripts/caption.py": "--max_new_tokens 8 --device cpu",
    "scripts/mask.py": "--device cpu",
}


def shortened(command: str) -> str:
    """The command with flags appended that make it short: before a comment behind it, and nowhere else."""
    flags = next((flags for script, flags in SHORT.items() if script in command), None)
    if flags is None:
        return command
    if "--num_class_images" in command:
        flags += " --num_class_images 2 --class_inference_steps 2"
    code, comment = re.fullmatch(r"(.*?)(\s+# .*)?", command, flags=re.DOTALL).groups()
    if "scripts/sweep.py" in command:  # whose flags are a list, which is given again with more at its end
        own = code.partition("--flags ")[2].replace("\\\n", " ")
        varied = set(re.findall(r"\w+(?==)", code.partition("--flags ")[0]))
        more = [f"{name}={value}" for name, value in SHORT_TRAINING.items() if name not in varied]
        flags += f" --flags {own} {' '.join(more)}"
    return f"{code} {flags}{comment or ''}"


def copy_project(folder: Path) -> Path:
    """Copies the project's files that git knows, and links the environment."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        if not name.startswith(("tests/", ".")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    return folder


def put_in(folder: Path, names: str, lora: Path | None) -> None:
    """Puts what the pages call by these names into a folder; `lora` is the output folder of a run."""
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in MADE:
            MADE[name](path)
        elif path.suffix == ".safetensors":
            shutil.copy(lora / "pytorch_lora_weights.safetensors", path)
        else:
            shutil.copytree(lora, path)


def _styles(path):
    for style, pictures in {"inkwash": creatures(8), "woodcut": weapons("axe", 4)}.items():
        lay_out(path / style, [(file, f"{style} style, {text}") for file, text in pictures], "files")


def _pets(path):
    for name in ("[sks]_[dog]", "[sks]_[cat]"):
        lay_out(path / name, creatures(3))


def _tables(path):
    lay_out(path, creatures(4))
    for number, (suffix, file) in enumerate({".png": "001.png", ".jpg": "002.jpg"}.items()):
        with Image.open(sorted(path.glob("*.png"))[number]) as image:
            image.convert("RGB").save(path / file, format={".png": "PNG", ".jpg": "JPEG"}[suffix])
    for file in path.iterdir():
        if file.name not in ("001.png", "002.jpg"):
            file.unlink()


def _zipped(path):
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder) / "5_sks knight", creatures(3), "files")
        shutil.make_archive(str(path.with_suffix("")), "zip", folder)


def _captions(path):
    path.write_text("".join(f"{text}\n" for _, text in weapons("axe", 4)))


MADE = {
    **{name: lambda path: lay_out(path, creatures(20), "table") for name in ("PICTURES", "FOLDER", "class")},
    "mira": lambda path: lay_out(path, [(file, "1girl, smile, school uniform") for file, _ in creatures(8)], "files"),
    **{
        name: lambda path: lay_out(path, creatures(5))
        for name in ("my-dog", "my-puppy", "my-cat", "my-house", "my-drawings", "my-jacket")
    },
    "styles": _styles,
    "van_gogh": lambda path: lay_out(path / "3_vgstyle painting", creatures(12), "files"),
    "four": lambda path: lay_out(path, [weapons(kind, 1)[0] for kind in ("axe", "spear", "trident", "whip")], "table"),
    "other/weapons": lambda path: lay_out(path, weapons("whip", 4), "table"),
    **{
        name: lambda path: Image.new("RGB", (90, 70), (200, 40, 40)).save(path)
        for name in ("photo.jpg", "001.png", "002.jpg")
    },
    "my-pictures": _tables,
    "training_data": lambda path: lay_out(path / "5_sks knight", creatures(3), "files"),
    "training_data.zip": _zipped,
    "my-pets": _pets,
    "captions.txt": _captions,
    "svjack/pokemon-blip-captions-en-zh": lambda path: pokemon(
        path, lay_out(path.parent / "creatures", creatures(6), "table")
    ),
}
# Of each page: what a reader has who comes to it.
GIVEN = {
    "README.md": "PICTURES photo.jpg",
    "docs/captions.md": "my-dog my-puppy my-cat my-house my-drawings",
    "docs/masks.md": "my-dog my-jacket",
    "docs/data.md": "my-dog",
    "docs/evaluation.md": "PICTURES knights knights/best knights/checkpoint-1 four class",
    "docs/findings.md": "other/weapons sweeps/stop/trial-0000/best",
    "docs/sharing.md": "PICTURES big.safetensors a.safetensors b",
    "docs/training.md": "FOLDER",
    "docs/validation.md": "runs/a runs/b sweeps/rank/trial-0000 sweeps/rank/trial-0001",
    "docs/recipes/anime_face.md": "mira",
    "docs/recipes/dreambooth.md": "my-dog",
    "docs/recipes/pokemon.md": "svjack/pokemon-blip-captions-en-zh",
    "docs/recipes/several_styles.md": "styles",
    "docs/recipes/van_gogh.md": "van_gogh",
    "metadata/README.md": "my-pictures 001.png 002.jpg training_data training_data.zip my-pets svjack/pokemon-blip-captions-en-zh",
}


def read_data(block: Block):
    """Reads a block of data as the program that it is for would."""
    if block.language == "json":
        return [json.loads(line) for line in block.text.splitlines()]
    return list(csv.DictReader(block.text.splitlines()))

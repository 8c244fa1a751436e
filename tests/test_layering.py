"""The package's floors: a file imports from those below it only, and only the script knows of flags."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT


PACKAGE = ROOT / "text_to_image_lora"
# CONTRIBUTING.md shows the same table.
FLOORS = [
    {"__init__", "errors"},
    {
        "archives",
        "buckets",
        "captions",
        "tables",
        "transforms",
        "models",
        "objective",
        "lora",
        "optimizers",
        "perceptual",
        "prompts",
        "stopping",
    },
    {"layouts"},
    {"records"},
    {"pictures"},
    {"caching", "checkpoint", "export", "inspection"},
    {"data", "validation", "tracking"},
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
SOURCES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}


def imports_of(tree):
    """The package's modules that a file imports, at its top or in a function."""
    local = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            local |= {(node.module or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module != PACKAGE.name else [f"{node.module}.{a.name}" for a in node.names]
        local |= {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE.name}.")}
    return local


def test_every_file_has_a_floor():
    assert SOURCES.keys() == FLOOR.keys()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    assert {name for name in imports_of(SOURCES[module]) if FLOOR[name] >= FLOOR[module]} == set()


@pytest.mark.parametrize("module", SOURCES)
def test_only_the_script_sees_args(module):
    nodes = list(ast.walk(SOURCES[module]))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.arg for node in nodes if isinstance(node, (ast.arg, ast.keyword))}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not names & {"args", "argparse", "parse_args", "argv"}


def test_nothing_imports_the_scripts():
    scripts = {path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]}
    assert "train_text_to_image_lora" in scripts
    for module, tree in SOURCES.items():
        named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {name.split(".")[0] for name in named} & scripts, module


def test_bad_input_is_found_without_torch():
    """What the script imports before it has looked at the command and the dataset takes no seconds to import."""
    quick = ("records", "layouts", "buckets", "captions", "transforms", "models", "tracking", "errors")
    script = "import sys, " + ", ".join(f"{PACKAGE.name}.{module}" for module in quick)
    heavy = "torch", "diffusers", "transformers", "accelerate", "datasets", "peft"
    script += f"; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_reader_of_imports_sees_them_all():
    source = "import os, text_to_image_lora.data\nfrom . import models\nfrom .export import load_lora\n"
    source += (
        "def f():\n    from text_to_image_lora import caching\n    from text_to_image_lora.lora import add_lora\n"
    )
    assert imports_of(ast.parse(source)) == {"data", "models", "export", "caching", "lora"}

"""The rules of the house: rooms import only rooms below them, commands never each other, and errors are found early."""

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT


PACKAGE = ROOT / "text_to_image_lora"
SCRIPT = ROOT / "train_text_to_image_lora.py"
GROUND = (
    "files",
    "small_files",
    "errors",
    "log",
    "command_line",
    "config_file",
    "hub",
    "libraries",
    "locks",
    "redaction",
    "signals",
)
FLOORS = {
    "": 0,
    "pictures": 1,
    "models": 1,
    "drawing": 2,
    "training": 3,
    "reports": 4,
}  # as in CONTRIBUTING.md


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def modules():
    """Returns {name inside the package: its syntax tree}; the room of `pictures.alike` is `pictures`, that of `files` is ``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = parse(path)
    return found


MODULES = modules()
INITS = {name for name in MODULES if name in FLOORS}


def room_of(module):
    return module if module in INITS else module.rpartition(".")[0]


def imports_of(tree, module=None):
    """Returns (names inside the package, names of other packages) that a file imports, at its top or in a function.

    `module` is the file's name inside the package, from which relative imports start; None for a script.
    """
    local, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = [PACKAGE.name, *(room_of(module).split(".") if room_of(module) else [])]
                package = package[: len(package) - node.level + 1]
                origin = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *parts = name.split(".")
            if top != PACKAGE.name:
                others.add(top)
                continue
            while parts and ".".join(parts) not in MODULES:  # the last name may be that of a function
                parts = parts[:-1]
            local.add(".".join(parts))
    return local, others


GRAPH = {module: imports_of(tree, module)[0] for module, tree in MODULES.items()}


def test_the_reader_of_imports_sees_them_all():
    source = (
        "import os, text_to_image_lora.training.data\nfrom . import loading\nfrom .lora import add_lora\n"
        "from ..files import reason_of\nfrom ..pictures import buckets\n"
        "def f():\n    from text_to_image_lora import errors\n    from text_to_image_lora.reports.metrics import x as y\n"
        "    import numpy.random\n"
    )
    local, others = imports_of(ast.parse(source), "models.prompts")
    assert local == {
        "training.data", "models.loading", "models.lora", "files", "pictures.buckets", "errors", "reports.metrics"
    }  # fmt: skip
    assert others == {"os", "numpy"}
    assert imports_of(ast.parse("from .errors import InputError"), "files")[0] == {"errors"}


def test_every_file_is_in_a_room():
    assert set(GROUND) <= MODULES.keys()
    for module in MODULES.keys() - INITS - set(GROUND):
        assert room_of(module) in FLOORS.keys() - {""}, module
    assert FLOORS.keys() == INITS


@pytest.mark.parametrize("module", MODULES)
def test_a_room_uses_only_the_rooms_below_it(module):
    for used in GRAPH[module]:
        own, other = room_of(module), room_of(used)
        assert own == other or FLOORS[other] < FLOORS[own], f"{module} imports {used}"


def test_no_circle():
    assert len([*graphlib.TopologicalSorter(GRAPH).static_order()]) == len(MODULES)


def test_a_checkpoint_knows_nothing_of_what_a_run_tells():
    reached, waiting = set(), ["training.checkpoint"]
    while waiting:
        module = waiting.pop()
        waiting += GRAPH[module] - reached
        reached |= GRAPH[module]
    assert "files" in reached
    assert {module for module in reached if room_of(module) == "reports"} == set()


def test_nothing_imports_a_command():
    scripts = {path.stem for path in ROOT.glob("*.py")} | {"scripts"}
    assert {"train_text_to_image_lora", "infer"} <= scripts
    for module, tree in MODULES.items():
        assert not imports_of(tree, module)[1] & scripts, module
    for command in (SCRIPT, ROOT / "infer.py"):
        assert not imports_of(parse(command))[1] & scripts, command.name


# Flags.


# Functions that assemble a run, and take all flags of a command. All others take a group of flags or plain values.
ASSEMBLERS = {
    "command_line": "iterate_flags flag_values recorded_values",
    "drawing.grids": "make_grid",
    "locks": "run",
    "training.accelerator": "make_accelerator",
    "training.batch_size": "settle _idle_in_steps",
    "training.caching": "fill",
    "training.class_images": "plan draw_missing",
    "training.data": "make_run_loader",
    "training.inputs": "find_inputs find_base reading_of find_records check_rest check_foreign_files make_picture_sets "
    "with_cached_tag_orders "
    "make_concept_remover concept_of_run check_concept find_concept plan_class_images",
    "training.memory": "make_plan",
    "training.resume": "load",
    "training.run": "make_run _find_resume_point make_run_sampler identity_of_run release_encoders load_models "
    "choose_num_chunks adapt check_kohyas_names log_beginning",
    "training.settings": "ways_to_save_memory",
    "training.trials": "compile_denoiser",
    "reports.about": "describe_run write_about_run",
    "reports.checkpoints": "__init__",
    "reports.dry_run": "report _write_preview _write_page _cache_bytes _memory",
    "reports.model_card": "settings_that_matter upload_run",
    "reports.reports": "start_reports make_judge __init__",
    "reports.sample_pictures": "make_painter",
}


def functions_with(tree, parameter):
    """Returns (name, annotation as text or None) of the functions that have a parameter with this name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                if each.arg == parameter:
                    yield node.name, None if each.annotation is None else ast.unparse(each.annotation)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_called_args(module):
    assert not [*functions_with(MODULES[module], "args")]
    assert "args" not in {node.id for node in ast.walk(MODULES[module]) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("module", MODULES)
def test_only_assemblers_take_all_flags(module):
    found = {
        name
        for name, annotation in functions_with(MODULES[module], "settings")
        if name != "check" and annotation in (None, "Any")
    }
    assert found == set(ASSEMBLERS.get(module, "").split())


def test_the_reader_of_parameters_sees_them_all():
    source = "class A:\n    def f(self, *, settings: Any): pass\ndef g(settings, /): pass\ndef h(x: Any): pass\n"
    assert sorted(functions_with(ast.parse(source), "settings"), key=str) == [("f", "Any"), ("g", None)]


# Quick answers.


def test_bad_input_is_found_without_anything_heavy():
    """The script imports only fast modules before it has examined the command and the dataset."""
    heavy = ("torch", "diffusers", "transformers", "accelerate", "datasets", "peft", "numpy", "PIL")
    code = f"import sys, {SCRIPT.stem}\n"
    code += f"{SCRIPT.stem}.parse_settings(['--pretrained_model_name_or_path=a', '--train_data_dir=b'])\n"
    code += f"print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

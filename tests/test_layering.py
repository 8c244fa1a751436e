"""The rules of the house: rooms that use only what is below them, flags that only the script knows, quick answers."""

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT


PACKAGE = ROOT / "text_to_image_lora"
SCRIPT = ROOT / "train_text_to_image_lora.py"
GROUND = ("files", "errors", "command_line", "libraries")
FLOORS = {"": 0, "pictures": 1, "models": 1, "training": 2, "reports": 3}  # CONTRIBUTING.md draws the same house


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def modules():
    """{name inside the package: its tree}; the room of `pictures.alike` is `pictures`, that of `files` is ``."""
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
    """What a file imports, at its top or in a function: (names inside the package, names of other packages).

    `module` is its own name inside the package, which relative imports start from; None for a script.
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
            while parts and ".".join(parts) not in MODULES:  # the last name may be a function's
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


def test_nothing_imports_the_scripts():
    scripts = {path.stem for path in ROOT.glob("*.py")} | {"scripts"}
    assert {"train_text_to_image_lora", "infer"} <= scripts
    for module, tree in MODULES.items():
        assert not imports_of(tree, module)[1] & scripts, module
    assert imports_of(parse(SCRIPT))[1] & scripts == {"infer"}  # for its reader of prompts
    assert not imports_of(parse(ROOT / "infer.py"))[1] & scripts


def test_infer_reads_our_file_as_a_stranger_does():
    """Other dialects go through the one converter."""
    assert imports_of(parse(ROOT / "infer.py"))[0] == {"errors", "models.lora_file"}


# Flags.


@pytest.mark.parametrize("module", MODULES)
def test_only_the_script_sees_args(module):
    nodes = [*ast.walk(MODULES[module])]
    assert not [node.lineno for node in nodes if isinstance(node, ast.arg) and node.arg == "args"]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.arg for node in nodes if isinstance(node, ast.keyword)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    dress = {"argparse", "argv", "parse_args"} if module == "command_line" else set()
    assert not names & ({"args", "argparse", "argv", "parse_args"} - dress)


def writes_into_args(tree):
    """The lines that change the flags, or what they hold."""

    def holder(node):  # what a chain such as vars(args)["rank"] or args.train_data_dir[0] hangs from
        while True:
            if isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
                node = node.value
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "vars" and node.args:
                node = node.args[0]
            else:
                return getattr(node, "id", None)

    changing = {"append", "clear", "extend", "insert", "pop", "popitem", "remove", "reverse", "setdefault", "sort"}
    changing |= {"update", "__setattr__", "__delattr__", "__setitem__", "__delitem__", "__ior__"}
    lines = []
    for node in ast.walk(tree):
        written = False
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            written = not isinstance(node.ctx, ast.Load) and holder(node) == "args"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            written = node.func.id in ("setattr", "delattr") and holder(node.args[0]) == "args"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            written = node.func.attr in changing and holder(node.func.value) == "args"
        elif isinstance(node, ast.AugAssign):  # args.prompts += [...] is an attribute that is stored
            written = holder(node.target) == "args"
        lines += [node.lineno] if written else []
    return lines


def test_nothing_writes_into_args():
    assert writes_into_args(parse(SCRIPT)) == []


@pytest.mark.parametrize(
    "line",
    [
        "args.rank = 4", "args.rank += 4", "args.rank: int = 4", "a, args.rank = 1, 2", "del args.rank",
        "setattr(args, 'rank', 4)", "vars(args)['rank'] = 4", "vars(args).update(rank=4)", "args.__dict__['rank'] = 4",
        "args.validation_prompts.append('an axe')", "args.train_data_dir[0] = 'x'", "vars(args)['a'] |= {}",
        "for args.rank in (1, 2): pass", "[0 for args.rank in (1, 2)]", "args.__dict__.pop('rank')",
    ],
)  # fmt: skip
def test_the_reader_of_writes_sees_them_all(line):
    assert writes_into_args(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    ["args = parse()", "rank = args.rank", "f(args.rank, **vars(args))", "{k: v for k, v in vars(args).items()}"],
)
def test_reading_is_no_writing(line):
    assert writes_into_args(ast.parse(line)) == []


# Quick answers.


def test_bad_input_is_found_without_anything_heavy():
    """What the script imports before it has looked at command and dataset takes no seconds to import."""
    tree = parse(SCRIPT)
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    (finder,) = (node for node in tree.body if getattr(node, "name", None) == "find_inputs")
    quick = [f"{PACKAGE.name}.{name}" for part in (top, finder) for name in sorted(imports_of(part)[0])]
    assert {f"{PACKAGE.name}.command_line", f"{PACKAGE.name}.models.loading"} <= {*quick}
    heavy = ("torch", "diffusers", "transformers", "accelerate", "datasets", "peft", "numpy", "PIL")
    code = f"import sys, {SCRIPT.stem}, {', '.join(quick)}\n"
    code += f"{SCRIPT.stem}.parse_args(['--pretrained_model_name_or_path=a', '--train_data_dir=b'])\n"
    code += f"print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

"""The scripts without set-up, with the headers that uv reads, and as commands of an installed package."""

import os
import re
import subprocess
import sysconfig
import tomllib
import zipfile

import pytest
from conftest import ROOT, read_lora, words_of_run
from uv_tool import copy_project, requirements, uv_of_the_session  # noqa: F401 (a fixture)


SCRIPTS = ("train_text_to_image_lora.py", "infer.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = set(PROJECT["project"]["scripts"])


def header_of(script):
    """Returns the TOML in a script's first comment (PEP 723)."""
    lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
    assert lines[1] == "# /// script"
    return tomllib.loads("\n".join(line[2:] for line in lines[2 : lines.index("# ///")]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_header_of_a_script_equals_the_requirements(script):
    header = header_of(script)
    assert header["dependencies"] == requirements("requirements.txt")
    assert header["requires-python"] == PROJECT["project"]["requires-python"]


def test_the_package_is_built_from_the_requirements():
    assert PROJECT["project"]["dynamic"] == ["dependencies"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert {f"{name}.py" for name in PROJECT["tool"]["setuptools"]["py-modules"]} == {*SCRIPTS}


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS)
def test_uv_runs_a_script_without_set_up(uv, script):
    done = uv("run", script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script} ")


@pytest.fixture(scope="module")
def wheel(uv, tmp_path_factory):
    """Builds the package from a copy of the project, because building leaves files behind."""
    folder = copy_project(tmp_path_factory.mktemp("wheel"))
    done = uv("build", "--wheel", "--out-dir", folder / "dist", folder)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "dist").glob("*.whl")
    return file


@pytest.mark.long
def test_the_wheel_holds_scripts_and_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    parts = [
        path for path in (ROOT / "text_to_image_lora").rglob("*") if path.suffix in (".py", ".html", ".css", ".js")
    ]
    package = [path.relative_to(ROOT).as_posix() for path in parts]
    assert sorted(files) == sorted([*package, *SCRIPTS])
    extras = [
        f'{name}; extra == "{extra}"'
        for extra, names in PROJECT["project"]["optional-dependencies"].items()
        for name in names
    ]
    assert re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) == [*requirements("requirements.txt"), *extras]


@pytest.fixture(scope="module")
def installed(uv, wheel, tmp_path_factory):
    """Returns the bin folder of an environment with the wheel, which uses the packages of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    for words in (("venv", folder / "env"), ("pip", "install", "--python", folder / "env", "--no-deps", wheel)):
        done = uv(*words)
        assert done.returncode == 0, done.stderr
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "stack.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "env" / "bin"


@pytest.mark.long
def test_the_installed_commands_train_and_draw_from_any_folder(installed, pictures, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(command, *words):
        done = subprocess.run(
            [installed / command, *map(str, words)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    for command in COMMANDS:
        assert run(command, "--help").startswith("usage: ")
    model = ROOT / "models" / "mini-sd"
    run("train-text-to-image-lora", *words_of_run(model, pictures, tmp_path, resolution=128, max_train_steps=1))
    assert read_lora(tmp_path / "out")
    flags = ["--pretrained_model_name_or_path", model, "--lora", tmp_path / "out", "--output_dir", tmp_path / "drawn"]
    run("infer-text-to-image-lora", *flags, "--prompt", "a red axe", "--num_inference_steps", "2")
    assert [*(tmp_path / "drawn").glob("*.png")]


@pytest.mark.long
def test_an_installed_command_answers_bad_input_in_a_line(installed, tmp_path):
    done = subprocess.run(
        [installed / "train-text-to-image-lora", "--rang", "4"], cwd=tmp_path, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "--rank" in done.stderr

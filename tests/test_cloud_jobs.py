"""Machines that start empty: the commands for Hugging Face Jobs and the notebook for Colab are run unchanged."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

import pytest
from conftest import ROOT, read_lora, words_of_run
from loopback_hub import environment, serving
from uv_tool import PINS, copy_project, uv_of_the_session  # noqa: F401 (a fixture)


MODEL = ROOT / "models" / "mini-sd"
TOKEN = "hf_atokenofatest"
SUBMIT, CLONE = re.findall(r"^hf jobs .*?(?=^```)", (ROOT / "cloud" / "hf_jobs.md").read_text(), re.M | re.S)
# Replacements for the cells of the notebook that only Colab can run.
REPLACED = {
    "project": "",
    "output": 'OUTPUT = "my lora"',
    "pictures": 'PICTURES = "my pictures.zip"',
    "settings": f'BASE = "{MODEL}"\nPROMPT = "an axe with \\"pink\\" blossoms"\nSTEPS = 2',
    "download": "assert Path(OUTPUT, 'pytorch_lora_weights.safetensors').exists()",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Makes a git repository of the project in its current state, and returns its folder and commit."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    git = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "as it stands"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    return folder, commit


class Jobs(BaseHTTPRequestHandler):
    """The hub's jobs: accepts one, and keeps its request in `server.seen`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.seen.append((self.command, self.path, body))
        owner = {"id": "0", "name": "me", "type": "user"}
        answer = json.dumps(owner | {"id": "1", "owner": owner, "status": {"stage": "RUNNING"}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_):
        """Prints nothing."""


def submitted(line, repository, folder):
    """Runs a command of the page in an empty folder, and returns the request that arrives at the hub."""
    (folder / "here").mkdir()
    # The client would first copy the folder into a bucket and mount the bucket.
    line = line.replace("./pictures:/pictures", "hf://buckets/me/pictures:/pictures:ro")
    with serving(Jobs) as server:
        env = environment(
            server, folder, HF_TOKEN=TOKEN, HF_NAME="me", REPOSITORY=f"file://{repository[0]}", COMMIT=repository[1]
        )  # fmt: skip
        env = os.environ | env | {"PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", line], cwd=folder / "here", env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (job,) = (json.loads(body) for command, path, body in server.seen if (command, path) == ("POST", "/api/jobs/me"))
    return job


@pytest.mark.long
@pytest.mark.parametrize("line", [SUBMIT, CLONE], ids=["package", "clone"])
def test_a_job_trains_from_an_empty_folder(uv, repository, pictures, tmp_path, line):
    job = submitted(line, repository, tmp_path)
    assert job["timeoutSeconds"] == 4 * 60 * 60
    assert job["secrets"] == {"HF_TOKEN": TOKEN}
    assert TOKEN not in json.dumps({name: value for name, value in job.items() if name != "secrets"})
    assert [(mount["source"], mount["mountPath"]) for mount in job["volumes"]] == [
        ("me/pictures", "/pictures"), ("me/lora", "/runs")
    ]  # fmt: skip
    flags = words_of_run(
        MODEL, None, tmp_path, resolution=128, max_train_steps=1, num_validation_images=0, output_dir=None
    )
    flags += ["--mixed_precision", "no"]
    shell = job["command"][:2] == ["bash", "-c"]
    words = [*job["command"][:-1], f"{job['command'][-1]} {shlex.join(flags)}"] if shell else [*job["command"], *flags]
    words = [word.replace("/runs", str(tmp_path / "kept")).replace("/pictures", str(pictures)) for word in words]
    (tmp_path / "container").mkdir()
    done = subprocess.run(
        words, cwd=tmp_path / "container", env=uv.env, capture_output=True, text=True, timeout=900
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_lora(tmp_path / "kept" / "knights")


@pytest.fixture(scope="module")
def executed(uv, repository, tmp_path_factory):
    """Runs all cells of the notebook with the embedded base model and four pictures in a zip, and returns the notebook."""
    folder = copy_project(tmp_path_factory.mktemp("colab") / "lora")
    (folder / "pictures").mkdir()
    for number in range(1, 5):
        name = f"axe_{number:03d}.png"
        shutil.copy(ROOT / "metadata" / "weapons_test" / name, folder / "pictures")
        (folder / "pictures" / name).with_suffix(".txt").write_text("an axe with pink blossoms")
    shutil.make_archive(str(folder / "my pictures"), "zip", folder / "pictures")
    recipe = folder / "recipes" / "colab_t4.yaml"
    here = {
        "mixed_precision: fp16": "num_validation_images: 1",
        "resolution: 512": "resolution: 128",
    }  # fp16 needs a GPU
    text = recipe.read_text()
    for line, replaced in here.items():
        assert text.count(line) == 1
        text = text.replace(line, replaced)
    recipe.write_text(text)
    notebook = json.loads((ROOT / "cloud" / "colab.ipynb").read_text(encoding="utf-8"))
    for_colab = {cell["id"] for cell in notebook["cells"] if "colab" in cell["metadata"].get("tags", [])}
    assert for_colab <= REPLACED.keys()
    for cell in notebook["cells"]:
        if cell["id"] in REPLACED:
            cell["source"] = REPLACED[cell["id"]]
    (folder / "colab.ipynb").write_text(json.dumps(notebook))
    words = ["--from", PINS["nbclient"], "--with", PINS["ipykernel"], "jupyter-execute", "--inplace"]
    done = uv("tool", "run", *words, "--allow-errors", "colab.ipynb", cwd=folder)
    assert done.returncode == 0, done.stderr
    cells = {cell["id"]: cell for cell in json.loads((folder / "colab.ipynb").read_text())["cells"]}
    said = {name: cell["outputs"] for name, cell in cells.items() if cell["cell_type"] == "code"}
    assert [name for name, outputs in said.items() for each in outputs if each["output_type"] == "error"] == [], said
    return folder, cells


def pictures_in(cell):
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def text_in(cell):
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@pytest.mark.long
def test_the_notebook_trains_and_shows_its_pictures(executed):
    folder, cells = executed
    assert "4 pictures" in text_in(cells["look"])
    assert read_lora(folder / "my lora")
    assert pictures_in(cells["look"]) == pictures_in(cells["compare"]) == 1
    assert pictures_in(cells["samples"]) == 2, text_in(cells["samples"])  # before and after
    assert "step-000000" in text_in(cells["samples"])

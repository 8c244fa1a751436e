"""A sweep runs every combination once, also if it is killed or has several workers, and ranks by the held-out loss."""

import contextlib
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, quick_python, read_metrics, read_terminal, write_pictures
from PIL import Image

from scripts import sweep
from scripts.sweeping import results
from scripts.sweeping.settings import SweepError
from scripts.sweeping.study import make_sampler
from text_to_image_lora.command_line import flag_values
from text_to_image_lora.errors import TrainingError


# For tests of the queue without training.
LAUNCHER = shlex.join([sys.executable, str(ROOT / "tests" / "sweep_launcher.py")])


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", count=8)


def flags_of(model="model", pictures="pictures", **changes):
    flags = dict(
        pretrained_model_name_or_path=model, train_data_dir=pictures, resolution=32, train_batch_size=2,
        max_train_steps=4, validation_split=0.25, validation_steps=2, seed=0, report_to="none",
    )  # fmt: skip
    return [f"{key}={value}" for key, value in (flags | changes).items()]


def command(folder, *words, python=sys.executable):
    return [python, str(ROOT / "scripts" / "sweep.py"), "--sweep_dir", str(folder), *map(str, words)]


def run(folder, *words, python=sys.executable, **environment):
    return subprocess.run(
        command(folder, *words, python=python),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | environment,
    )


@pytest.fixture
def run_here(capsys):
    """Runs the command in this process and returns its output."""

    def run(folder, *words):
        sweep.main(["--sweep_dir", str(folder), *map(str, words)])
        return capsys.readouterr().out

    return run


def rows_of(folder):
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def times_trained(folder):
    """Returns how often the training of each trial was started from its first step."""
    return {
        path.parent.name: path.read_text(errors="replace").count("effective batch")
        - path.read_text(errors="replace").count("resuming from")
        for path in sorted(folder.glob("trial-*/log.txt"))
    }


def wait_for(folder, pattern, process):
    deadline = time.monotonic() + 240
    while not list(folder.glob(pattern)) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.long)], ids=["queue", "trained"])
def test_a_killed_sweep_ends_with_every_trial_done_once(tmp_path, trained):
    """Four trials; the sweep is killed in the third one, together with its training."""
    words, environment = ["--sweep", "rank=2,4", "learning_rate=1e-3,4e-3"], {}
    if not trained:
        words, environment = [*words, "--launcher", LAUNCHER], {"SWEEP_STEP_SECONDS": "0.1"}
    words += ["--flags"] + flags_of(
        ROOT / "models" / "mini-sd", ROOT / "metadata" / "weapons", resolution=128, max_train_steps=6,
        checkpointing_steps=1, checkpoints_total_limit=1, validation_split=0.05,
    )  # fmt: skip
    folder = tmp_path / "sweep"
    with subprocess.Popen(
        command(folder, *words), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    ) as process:  # fmt: skip
        wait_for(folder, "trial-0002/checkpoint-*", process)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (folder / "results.csv").exists()
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    assert "(trial-0000):" not in done.stdout
    assert re.search(r"trial 3 of 4(, about .* left)? \(trial-0002\): rank=4", done.stdout)
    rows = rows_of(folder)
    assert [row["state"] for row in rows] == ["complete"] * 4
    assert {(row["rank"], row["learning_rate"]) for row in rows} == {
        (rank, rate) for rank in "24" for rate in ("0.001", "0.004")
    }
    losses = [float(row["validation/relative_loss"]) for row in rows]
    assert losses == sorted(losses)
    assert losses[0] < 1
    assert times_trained(folder) == {f"trial-{number:04d}": 1 for number in range(4)}
    again = run(folder, *words)
    assert "trial 3:" not in again.stdout
    assert rows_of(folder) == rows


def test_what_a_killed_worker_left_training_is_not_taken_for_finished(tmp_path):
    """Only the sweep is killed, and its last trial trains on."""
    words = ["--sweep", "rank=4", "--launcher", LAUNCHER, "--flags", *flags_of(max_train_steps=60)]
    folder, environment = tmp_path / "sweep", {"SWEEP_STEP_SECONDS": "0.25"}
    with subprocess.Popen(
        command(folder, *words), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    ) as process:  # fmt: skip
        wait_for(folder, "trial-0000/checkpoint-*", process)
        process.kill()
        process.wait()
    try:
        done = run(folder, *words)
        assert done.returncode == 0, done.stderr
        assert (
            "not finished: other processes still train trial-0000. If a worker of the sweep was killed, run the "
            in done.stdout
        )
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    done = run(folder, *words)
    assert "not finished" not in done.stdout
    assert [row["state"] for row in rows_of(folder)] == ["complete"]


def test_what_it_leaves(tiny_sd, pictures, tmp_path):
    """Trains two trials."""
    folder = tmp_path / "sweep"
    words = ["--sweep", "rank=2,4", "--flags"]
    words += flags_of(
        tiny_sd, pictures, random_flip="true", validation_prompt="an axe", num_validation_images=2,
        validation_inference_steps=2,
    )  # fmt: skip
    done = run(folder, *words, python=quick_python().python)
    assert done.returncode == 0, done.stderr
    table = (folder / "results.md").read_text()
    assert table.startswith("| trial | state | validation/relative_loss | at_step | rank |\n|---|---|---|---|---|\n")
    assert table in done.stdout
    best = rows_of(folder)[0]
    line = table.splitlines()[-1]
    assert line.startswith("python train_text_to_image_lora.py --latent_cache_dir ")
    assert f"--rank {best['rank']} --output_dir sweep-best" in line
    assert "--random_flip " in line
    values = [
        json.loads(text).get("validation/relative_loss")
        for text in (folder / f"trial-000{best['trial']}" / "metrics.jsonl").read_text().splitlines()
    ]
    assert float(best["validation/relative_loss"]) == pytest.approx(min(v for v in values[1:] if v is not None))
    assert done.stdout.splitlines()[-1] == f"report of the sweep: {folder / 'report.html'}"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert re.search("rank [24] did best|No run was better than the base model", page)
    assert all(f"trial-000{number}/report.html" in page for number in range(2))
    with Image.open(folder / "pictures.png") as sheet:
        assert sheet.width > 2 * 144
        assert sheet.height > 2 * 144


def test_two_workers_divide_the_trials(tmp_path):
    folder = tmp_path / "sweep"
    words = ["--launcher", LAUNCHER, "--sweep", "rank=1,2,3,4", "--flags", *flags_of()]
    workers = [
        subprocess.Popen(
            command(folder, *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"SWEEP_STEP_SECONDS": "0.3"},
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert times_trained(folder) == {f"trial-{number:04d}": 1 for number in range(4)}
    started = [sum(f"(trial-{number:04d}): rank" in out for out, _ in outputs) for number in range(4)]
    assert started == [1, 1, 1, 1]
    assert {row["state"] for row in rows_of(folder)} == {"complete"}


def test_a_trial_whose_worker_was_killed_alone_is_not_trained_twice_at_once(tmp_path):
    folder, environment = tmp_path / "sweep", os.environ | {"SWEEP_STEP_SECONDS": "0.2"}
    words = ["--launcher", LAUNCHER, "--sweep", "rank=2,4", "--flags", *flags_of(max_train_steps=100000)]
    worker = subprocess.Popen(
        command(folder, *words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    wait_for(folder, "trial-0000/checkpoint-*", worker)
    trainings = psutil.Process(worker.pid).children(recursive=True)
    assert trainings
    worker.kill()
    worker.wait()
    # If the tests run in the background of a shell, SIGINT is ignored, also by the processes that they start.
    listening = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    second = subprocess.Popen(
        command(folder, *words), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment, **listening
    )
    try:
        assert "log.txt" in second.stdout.readline()
        assert "(trial-0001):" in second.stdout.readline()  # trial 0 is not listed, because it still trains
        second.send_signal(signal.SIGINT)
        assert second.wait(timeout=60) == 130
        assert trainings[0].is_running()
        assert not [p for p in psutil.process_iter(["cmdline"]) if f"{folder}/trial-0001" in (p.info["cmdline"] or [])]
    finally:
        second.stdout.close()
        started = psutil.Process(second.pid).children(recursive=True) if second.poll() is None else []
        for process in [*trainings, *started, second]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        second.wait()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 75), ("SIGHUP", 143)])
def test_a_stopped_sweep_leaves_no_training_behind(tmp_path, name, code):
    folder, environment = tmp_path / "sweep", os.environ | {"SWEEP_STEP_SECONDS": "0.2"}
    words = ["--launcher", LAUNCHER, "--sweep", "rank=2,4", "--flags", *flags_of(max_train_steps=100000)]
    number = getattr(signal, name)
    worker = subprocess.Popen(
        command(folder, *words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    trainings = []
    try:
        wait_for(folder, "trial-0000/checkpoint-*", worker)
        trainings = psutil.Process(worker.pid).children(recursive=True)
        assert trainings
        worker.send_signal(number)
        _, err = worker.communicate(timeout=60)
        assert worker.returncode == code
        assert err.endswith("interrupted: run the same command again to resume\n")
        assert not [process for process in trainings if process.is_running()]
    finally:
        for process in [*trainings, worker]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_ranges_from_yaml(tmp_path, sampler, capsys):
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"""
sweep_dir: {tmp_path / "sweep"}
sampler: {sampler}
num_trials: 3
launcher: {LAUNCHER}
sweep:
  learning_rate: {{min: 1.0e-4, max: 1.0e-2, log: true}}
  rank: {{min: 2, max: 6}}
  center_crop: [true, false]
flags:
  pretrained_model_name_or_path: model
  train_data_dir: pictures
  max_train_steps: 2
  validation_split: 0.25
"""
    )
    sweep.main([str(config)])
    rows = rows_of(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["complete"] * 3
    assert len({row["learning_rate"] for row in rows}) == 3
    assert all(1e-4 <= float(row["learning_rate"]) <= 1e-2 and 2 <= int(row["rank"]) <= 6 for row in rows)
    for row in rows:  # the table shows the values that were run
        words = shlex.split((tmp_path / "sweep" / f"trial-000{row['trial']}" / "command.txt").read_text())
        assert {"True": "--center_crop", "False": "--no-center_crop"}[row["center_crop"]] in words
        assert words[words.index("--rank") + 1] == row["rank"]


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.long)], ids=["queue", "trained"])
def test_a_bad_trial_is_pruned(tiny_sd, pictures, tmp_path, trained):
    """Three good trials, and then a bad one, which does not reach its last step."""
    folder, steps = tmp_path / "sweep", 200 if trained else 40
    words, environment = ["--prune", "--sweep", "learning_rate=2e-2,3e-2,4e-2,1e-9"], {}
    if not trained:
        words, environment = [*words, "--launcher", LAUNCHER], {"SWEEP_STEP_SECONDS": "0.05"}
    words += ["--flags", *flags_of(tiny_sd, pictures, max_train_steps=steps, validation_steps=5)]
    done = run(folder, *words, **environment)
    assert done.returncode == 0, done.stderr
    rows = rows_of(folder)
    assert [row["state"] for row in rows] == ["complete"] * 3 + ["pruned"], done.stdout
    assert rows[3]["learning_rate"] == "1e-09"
    assert "trial-0003: stopped at step " in done.stdout
    assert read_metrics(folder / "trial-0003")[-1]["step"] < steps


BAD = {
    "no folder": (["--sweep", "rank=2,4"], None, "Pass --sweep_dir"),
    "nothing varied": ([], "sweep", "No flag is varied: add --sweep"),
    "no held-out pictures": (["--sweep", "rank=2", "--flags", "resolution=32"], "sweep", "add validation_split=0.1"),
    "a grid of a range": (["--sweep", "rank=2..4", "--flags", "validation_split=0.1"], "sweep", "rank is a range"),
    "both": (["--sweep", "rank=2", "--flags", "rank=4", "validation_split=0.1"], "sweep", "rank: it is both varied and"),
    "no value": (["--sweep", "rank"], "sweep", "--sweep rank: write flag=value"),
    "upside down": (
        ["--sweep", "rank=4..2", "--sampler", "tpe", "--flags", "validation_split=0.1"], "sweep", "rank: a range is min..max"
    ),
    "flags left empty": (["{tmp}/empty.yaml"], None, "flags: it must contain one flag per line"),
    "a list": (["{tmp}/list.yaml"], None, "sweep: it must contain one flag per line"),
    "no trials": (
        ["--sampler", "random", "--num_trials", "0", "--sweep", "rank=2", "--flags", "validation_split=0.1"], "sweep",
        "num_trials 0: it must be a whole number, 1 or more",
    ),
    "no config": (["{tmp}/no.yaml"], "sweep", "no.yaml: there is no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_reported(case, tmp_path):
    words, folder, message = BAD[case]
    (tmp_path / "empty.yaml").write_text(f"sweep_dir: {tmp_path}/x\nflags: []\n")
    (tmp_path / "list.yaml").write_text(f"sweep_dir: {tmp_path}/x\nsweep: [rank]\n")
    argv = [word.replace("{tmp}", str(tmp_path)) for word in words]
    with pytest.raises(SweepError, match=message):
        sweep.main(argv + (["--sweep_dir", str(tmp_path / folder)] if folder else []))


def test_a_flag_that_training_refuses_ends_the_sweep(tmp_path):
    done = run(tmp_path / "sweep", "--sweep", "rnak=2,4", "--flags", *flags_of())
    assert done.returncode == 2
    assert "there is no flag --rnak. Did you mean --rank?" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_sweep_in_the_same_folder_is_refused(run_here, tmp_path):
    folder, words = tmp_path / "sweep", ["--launcher", LAUNCHER, "--flags", *flags_of(max_train_steps=1)]
    run_here(folder, "--sweep", "rank=2", *words)
    with pytest.raises(SweepError, match="it contains another sweep"):
        run_here(folder, "--sweep", "rank=4", *words)


def test_the_wandb_sweep_starts_the_training(tmp_path, monkeypatch):
    """The command that W&B's agent would run has valid flags of the training, and an output folder with the run's id."""
    import yaml
    from conftest import train_script
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    settings = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    assert (settings["program"], settings["metric"]["name"]) == ("train_text_to_image_lora.py", results.METRIC)
    values = {"train_batch_size": {"value": 4}, "rank": {"value": 16}, "learning_rate": {"value": 0.0002}}
    assert values.keys() == settings["parameters"].keys()
    parts = create_sweep_command_args({"args": values})
    words = [w for c in create_sweep_command(settings["command"]) for w in (parts["args"] if c == "${args}" else [c])]
    (tmp_path / "accelerate").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc123"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    argv = done.stdout.splitlines()
    assert argv[:4] == ["launch", "--config_file", "accelerate_config.yaml", "train_text_to_image_lora.py"]
    values = flag_values(train_script.parse_settings(argv[4:]))
    expected = {"output_dir": "sweeps/abc123", "train_batch_size": 4, "rank": 16, "learning_rate": 0.0002}
    assert expected.items() <= values.items()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sweep_whose_trials_fail_ends(run_here, tmp_path, sampler):
    folder = tmp_path / "sweep"
    words = ["--sampler", sampler, "--num_trials", "2", "--launcher", "false", "--sweep", "rank=2..4", "--flags"]
    with pytest.raises(
        TrainingError, match=r"no trial succeeded, so there is no best one \(the last, trial-0001, failed: "
    ):
        run_here(folder, *words, *flags_of())
    assert [row["state"] for row in rows_of(folder)] == ["fail", "fail"]


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        ("true", "failed: it wrote no validation loss"),
        ("#!/bin/sh\nexit 1", "failed: exit code 1"),
        ("#!/bin/sh\necho the loss was not a number; exit 3", "failed: the loss was not a number"),
    ],
)
def test_a_sweep_without_any_result_ends_with_code_1(tmp_path, launcher, reason):
    if launcher.startswith("#!"):
        (tmp_path / "launcher").write_text(launcher)
        (tmp_path / "launcher").chmod(0o755)
        launcher = tmp_path / "launcher"
    done = run(tmp_path / "sweep", "--launcher", launcher, "--sweep", "rank=2,4", "--flags", *flags_of())
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("sweep.py: no trial succeeded")
    assert reason in line
    last = done.stdout.splitlines()[-1]
    assert last == "2 of 2 trials failed (trial-0000, trial-0001). Each one's log.txt says why."


def test_a_launcher_that_cannot_be_started_ends_the_sweep(run_here, tmp_path):
    """A script without an interpreter's name is found, but no program."""
    launcher = tmp_path / "launcher"
    launcher.write_text("exit 0\n")
    launcher.chmod(0o755)
    with pytest.raises(SweepError, match="trial-0000: can't be run: .*launcher: Exec format error"):
        run_here(tmp_path / "sweep", "--launcher", launcher, "--sweep", "rank=2,4", "--flags", *flags_of())


def test_a_trial_that_failed_is_tried_again_by_the_same_command(run_here, tmp_path, monkeypatch):
    """The second of three trials fails because of the machine; the next call repeats only this trial."""
    folder, broken = tmp_path / "sweep", tmp_path / "broken"
    monkeypatch.setenv("SWEEP_BROKEN", str(broken))
    broken.touch()
    words = ["--launcher", LAUNCHER, "--sweep", "rank=2,4,8", "--flags", *flags_of()]
    out = run_here(folder, *words)
    assert "failed: the machine is broken" in out
    assert out.count("1 of 3 trials failed (trial-0001). Each one's log.txt says why.") == 1
    assert {row["rank"]: row["state"] for row in rows_of(folder)} == {"2": "complete", "4": "fail", "8": "complete"}
    assert run_here(folder, *words).count("failed: ") == 1  # the trial fails once more
    broken.unlink()
    run_here(folder, *words)
    assert [row["rank"] for row in rows_of(folder) if row["state"] == "complete"].count("4") == 1
    count = len(rows_of(folder))
    run_here(folder, *words)
    assert len(rows_of(folder)) == count == 3  # failed trials that later succeeded are not shown
    assert times_trained(folder) == {
        "trial-0000": 1, "trial-0001": 0, "trial-0002": 1, "trial-0003": 0, "trial-0004": 1
    }  # fmt: skip


def test_settings_that_training_refuses_do_not_stop_the_others(run_here, tmp_path):
    """Schedule-free accepts no cosine schedule; each call says so and ends with a table of the other trials."""
    folder, launcher = tmp_path / "sweep", tmp_path / "launcher"
    refusing = f'#!/bin/sh\ncase "$*" in *schedulefree*) exec {sys.executable} "$@";; esac\nexec {LAUNCHER} "$@"\n'
    launcher.write_text(refusing)
    launcher.chmod(0o755)
    words = ["--launcher", launcher, "--sweep", "optimizer=schedulefree,adamw", "--flags"]
    for _ in range(2):
        out = run_here(folder, *words, *flags_of(lr_scheduler="cosine"))
        assert "can't be run: train_text_to_image_lora.py: --optimizer schedulefree can't be combined" in out
        assert [(row["state"], row["optimizer"]) for row in rows_of(folder)] == [
            ("complete", "adamw"), ("fail", "schedulefree")
        ]  # fmt: skip
    assert times_trained(folder)["trial-0001"] == 1


def test_a_launcher_that_says_2_ends_the_sweep(run_here, tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text("#!/bin/sh\necho 'train: --rank 0: it must be 1 or more.'\n"
                        "echo \"CalledProcessError: Command '...' returned non-zero exit status 2.\"\nexit 1\n")  # fmt: skip
    launcher.chmod(0o755)
    with pytest.raises(SweepError, match="trial-0000: can't be run: "):
        run_here(tmp_path / "sweep", "--launcher", launcher, "--sweep", "rank=2,4", "--flags", *flags_of())


def test_workers_draw_different_trials():
    optuna = pytest.importorskip("optuna")
    settings = {"sampler": "random", "seed": 0}
    drawn = set()
    for number in range(4):
        study = optuna.create_study(sampler=make_sampler(settings, number))
        drawn.add(study.ask().suggest_float("x", 0, 1))
    assert len(drawn) == 4


def test_a_trial_that_stopped_in_time_is_resumed(tmp_path):
    """--max_train_time and signals stop a trial with a checkpoint and exit code 75."""
    words = ["--sweep", "rank=2,4", "--launcher", LAUNCHER, "--flags", *flags_of(max_train_steps=4)]
    done = run(tmp_path / "sweep", *words, SWEEP_STOPS_AT="2")
    assert done.returncode == 75, done.stderr
    assert "trial-0000: stopped at a checkpoint; run the same command again to resume" in done.stderr
    done = run(tmp_path / "sweep", *words)
    assert done.returncode == 0, done.stderr
    assert [(row["trial"], row["state"]) for row in rows_of(tmp_path / "sweep")] == [
        ("1", "complete"),
        ("0", "complete"),
    ]
    assert "resuming from checkpoint-2" in (tmp_path / "sweep" / "trial-0000" / "log.txt").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_a_terminal_shows_the_steps_of_the_trial_that_trains(tmp_path):
    words = ["--launcher", LAUNCHER, "--sweep", "rank=2", "--flags", *flags_of(max_train_steps=10)]
    ours, theirs = os.openpty()
    with subprocess.Popen(
        command(tmp_path / "sweep", *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True,
        env=os.environ | {"SWEEP_STEP_SECONDS": "0.3"},
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = read_terminal(ours)
        said = process.stdout.read()
    assert process.returncode == 0, said
    assert f"log.txt in its folder, such as {tmp_path / 'sweep' / 'trial-0000'}\n" in said
    assert re.search(r"trial-0000: [1-9]\d*step ", shown)
    assert "The best trial is trial-0000 (its LoRA: " in said

"""A run that is asked to stop writes a checkpoint and ends with the documented exit code; the command then resumes it.

Fast tests: the request itself, and the command forked from a process that has its imports. Long tests: launchers.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TORCHRUN, words_of_run, write_pictures
from quick_start import assert_same_end, signal_before

from text_to_image_lora.errors import Stopped
from text_to_image_lora.training import interruption, launcher
from text_to_image_lora.training.checkpoint import find_damage, read_state


# The request.


@pytest.fixture
def listening():
    """Returns `listening(**options)`, which handles signals; pytest's handlers are restored afterwards."""
    yield lambda **options: interruption.listen(**options)
    interruption.stop_listening()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75), ("SIGHUP", 143)])
def test_each_signal_has_its_exit_code(listening, name, code):
    before = signal.getsignal(signal.SIGTERM)
    listening()
    interruption.defer_requests()
    assert interruption.stop_requested() is None
    signal.raise_signal(signal.Signals[name])
    assert interruption.stop_requested().exit_code == code
    signal.raise_signal(signal.SIGTERM)
    assert interruption.stop_requested().exit_code == code  # the first request stands
    interruption.stop_listening()
    assert interruption.stop_requested() is None
    assert signal.getsignal(signal.SIGTERM) is before


def of_scripts():
    commands = sorted(path.name for path in (ROOT / "scripts").glob("*.py") if path.name != "__init__.py")
    return ["train_text_to_image_lora.py", "infer.py", *(f"scripts/{name}" for name in commands)]


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 75), ("SIGHUP", 143)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("script", of_scripts())
def test_a_signal_during_the_imports_has_its_exit_code(script, name, code, tmp_path):
    """The signal arrives with the first import after the handlers, which are set before anything slow is imported."""
    number = signal.Signals[name]
    lines = [
        "import importlib.abc, os, runpy, signal, sys",
        f"signal.signal({number}, {'signal.default_int_handler' if name == 'SIGINT' else 'signal.SIG_DFL'})",
        "class Finder(importlib.abc.MetaPathFinder):",
        "    def find_spec(self, name, *_):",
        "        if name.startswith(('text_to_image_lora.', 'scripts.')) and name != 'text_to_image_lora.signals':",
        f"            os.kill(os.getpid(), {number})",
        "sys.meta_path.insert(0, Finder())",
        f"sys.argv = [{script!r}, '--help']",
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')",
    ]
    program = tmp_path / "program.py"
    program.write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.removeprefix(f"\n{Path(script).name}: stopped by {name}") in ("\n", f"; {RESUME}\n")


RESUME = "run the same command again to resume"


def test_a_process_that_ends_at_once_leaves_nothing_half_written(tmp_path):
    lines = [
        "import pathlib, signal, sys",
        "from text_to_image_lora.files import written_whole",
        "from text_to_image_lora.signals import exit_on_signals",
        "exit_on_signals()",
        f"with written_whole(pathlib.Path({str(tmp_path)!r}, 'merged'), folder=True) as folder:",
        "    (folder / 'unet').mkdir()",
        "    (folder / 'unet' / 'weights').write_text('half')",
        "    signal.raise_signal(signal.SIGTERM)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "\n-c: stopped by SIGTERM\n")
    assert os.listdir(tmp_path) == []


def test_windows_has_a_key_of_its_own(listening, monkeypatch):
    """Ctrl-Break is SIGBREAK on Windows; another signal replaces it in this test."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR2, raising=False)
    listening()
    interruption.defer_requests()
    signal.raise_signal(signal.SIGUSR2)
    assert interruption.stop_requested() == ("Ctrl-Break", 130)


def test_before_there_is_anything_to_keep_a_signal_stops_at_once(listening):
    listening()
    with pytest.raises(Stopped, match="^SIGUSR1: stopped before the first step. Run the same command again") as caught:
        signal.raise_signal(signal.SIGUSR1)
    assert caught.value.exit_code == 75
    assert not isinstance(caught.value, Exception)  # so that libraries do not catch it as an error


def test_after_the_work_a_signal_stops_at_once_again(listening):
    listening()
    interruption.defer_requests()
    interruption.obey_requests("in the upload; the LoRA is written")
    with pytest.raises(Stopped, match="in the upload"):
        signal.raise_signal(signal.SIGTERM)


def test_a_second_ctrl_c_does_not_wait(listening, monkeypatch):
    """But one Ctrl-C may arrive twice: from the terminal, and from a launcher that forwards it."""
    monkeypatch.setattr(interruption, "SAME_CTRL_C_SECONDS", 0.05)
    listening()
    interruption.defer_requests()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_stays_so(listening):
    """For example under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        listening()
        interruption.defer_requests()
        signal.raise_signal(signal.SIGHUP)
        assert interruption.stop_requested() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_time_is_over_when_the_longest_piece_of_work_no_longer_fits_twice(listening, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: now[0]))
    listening(max_seconds=100)
    interruption.defer_requests()
    for elapsed in (2, 12, 14, 50, 79):  # the longest took 36 s
        now[0] = 1000 + elapsed
        found = interruption.stop_requested()
        assert (found is None) == (elapsed < 50), elapsed
    assert found == ("--max_train_time is over", 75)


def test_an_orphan_of_a_launcher_notices(listening, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    listening()
    interruption.defer_requests()
    assert interruption.stop_requested() is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert interruption.stop_requested() == ("the launcher is gone", 143)


def test_a_run_in_the_background_outlives_its_shell(listening, monkeypatch):
    for name in launcher.MARKS:
        monkeypatch.delenv(name, raising=False)
    listening()
    interruption.defer_requests()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert interruption.stop_requested() is None


# The command.


STEPS = 40
OPTIONS = dict(
    max_train_steps=STEPS, checkpointing_steps=10, validation_split=0.34, validation_steps=10, use_ema=True,
    validation_prompts=["a red axe", "a blue axe"], validation_inference_steps=4, aspect_ratio_buckets=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tiny_sd, tmp_path_factory):
    """Returns `words(folder, **flags)`: flags of a run that validates, draws and averages; all runs share a cache."""
    shared = tmp_path_factory.mktemp("shared")
    write_pictures(shared / "pictures", count=8)
    write_pictures(shared / "pictures" / "tall", count=4, size=(32, 44), seed=1)

    def build(folder, **changes):
        flags = dict(latent_cache_dir=shared / "cache") | OPTIONS | changes
        return words_of_run(tiny_sd, shared / "pictures", folder, **flags)

    return build


@pytest.fixture(scope="module")
def undisturbed(start, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = start(words(folder), folder).wait()
    assert code == 0, said
    return folder / "out"


# The places where the run stops: (function that is called there, number of the call).
PLACES = {
    "caching pictures": ("training.caching.encode_latent_entries", 2),
    "caching captions": ("training.caching.encode_prompt_entries", 1),
    "first validation": ("reports.validation_loss._make_noise", 3),
    "first pictures": ("reports.sample_pictures._interrupt_if_asked", 2),
    "step": ("training.interruption.reduce_loss_and_stop", 15),
    "validation": ("reports.validation_loss._make_noise", 180),
    "pictures": ("reports.sample_pictures._interrupt_if_asked", 6),
    "best LoRA": ("reports.stopping.update_best", 1),
    "checkpoint": ("training.checkpoint.save_checkpoint", 1),
}


def sending(place, name):
    """Returns Python code that sends the signal to its own process at that place."""
    return signal_before(*PLACES[place], name)


def newest_checkpoint(out):
    return max(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), default=None)


CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}
WHERE = {
    "caching pictures": "while encoding pictures and captions; those that are encoded are kept",
    "caching captions": "while encoding pictures and captions; those that are encoded are kept",
    "first validation": "in a validation",
    "first pictures": "while it drew sample pictures",
}
FAST = {("step", "SIGTERM"), ("caching pictures", "SIGINT"), ("pictures", "SIGUSR1")}
CASES = [
    pytest.param(place, name, marks=[] if (place, name) in FAST else pytest.mark.long, id=f"{name} in {place}")
    for place in PLACES
    for name in CODES
]


@pytest.mark.parametrize(("place", "name"), CASES)
def test_a_signal_anywhere(start, words, undisturbed, tmp_path, place, name):
    flags = words(tmp_path, latent_cache_dir=tmp_path / "cache")
    code, said = start(flags, tmp_path, before=sending(place, name)).wait()
    assert code == CODES[name], said
    assert "Traceback" not in said
    checkpoint, out = newest_checkpoint(tmp_path / "out"), tmp_path / "out"
    reason = {"SIGINT": "Ctrl-C"}.get(name, name)
    if place in WHERE:
        where = WHERE[place]
        assert checkpoint is None
    else:
        state = read_state(checkpoint)[0]
        where = f"after step {state.global_step}, with a checkpoint"
        assert state.global_step == (15 if place == "step" else 11 if place == "checkpoint" else 10)
        assert find_damage(checkpoint) is None
        assert state.due == {
            "validation": ["loss", "pictures"],
            "pictures": ["pictures"],
            "best LoRA": ["pictures"],
        }.get(place, [])
    assert said.strip().splitlines()[-1] == (
        f"train_text_to_image_lora.py: {reason}: stopped {where}. Run the same command again to resume. (exit code {code})"
    )
    assert not (out / "pytorch_lora_weights.safetensors").exists()
    if place == "caching pictures":  # the pictures of the first size
        assert len(list((tmp_path / "cache" / "latents").glob("*.safetensors"))) == 1
    code, said = start(flags, tmp_path).wait()
    assert code == 0, said
    assert checkpoint is None or f"resuming from {checkpoint} (step " in said
    assert_same_end(undisturbed, out)


@pytest.mark.long
def test_a_second_ctrl_c_damages_nothing(start, words, undisturbed, tmp_path):
    """It arrives while the checkpoint of the first one is being written."""
    slow = "import time\nfrom text_to_image_lora.training import checkpoint\nwrite = checkpoint.write_manifest\n"
    slow += (
        "def write_slowly(folder):\n    print('writing')\n    time.sleep(60)\ncheckpoint.write_manifest = write_slowly"
    )
    run = start(words(tmp_path, checkpointing_steps=0), tmp_path, before=sending("step", "SIGINT") + slow)
    run.until_said("writing")
    time.sleep(interruption.SAME_CTRL_C_SECONDS)
    os.kill(run.pid, signal.SIGINT)
    code, said = run.wait(10)
    assert code == 130
    assert "stopped at once. Saved files are intact" in said
    assert "Traceback" not in said
    assert newest_checkpoint(tmp_path / "out") is None
    assert start(words(tmp_path), tmp_path).wait()[0] == 0
    assert_same_end(undisturbed, tmp_path / "out")


@pytest.mark.long
def test_without_checkpoints_being_asked_to_stop_writes_one(start, words, undisturbed, tmp_path):
    flags = words(tmp_path, checkpointing_steps=0)
    assert start(flags, tmp_path, before=sending("step", "SIGUSR1")).wait()[0] == 75
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-15"
    assert start(flags, tmp_path).wait()[0] == 0
    assert_same_end(undisturbed, tmp_path / "out")


@pytest.mark.long
def test_max_train_time_stops_in_time(start, words, undisturbed, tmp_path):
    """All steps would take twice the time."""
    slow = (
        "import time\nfrom text_to_image_lora.training import interruption\nlook = interruption.reduce_loss_and_stop\n"
    )
    slow += (
        "def wait(*values):\n    time.sleep(0.6)\n    return look(*values)\ninterruption.reduce_loss_and_stop = wait"
    )
    code, said = start(words(tmp_path, max_train_time="12s"), tmp_path, before=slow).wait()
    assert code == 75, said
    assert "--max_train_time is over: stopped after step" in said
    assert 0 < read_state(newest_checkpoint(tmp_path / "out"))[0].global_step < STEPS
    assert start(words(tmp_path), tmp_path).wait()[0] == 0
    assert_same_end(undisturbed, tmp_path / "out")


@pytest.mark.long
def test_signals_to_the_whole_group_leave_the_loaders_workers_alone(start, words, tmp_path):
    """Ctrl-C in a terminal and SLURM's signals reach all processes of the run."""
    live = dict(cache_variations=0, dataloader_num_workers=2, validation_split=None, validation_prompts=None)
    before = "import os\nos.setsid()\n" + sending("step", "SIGINT").replace("os.kill(os.getpid()", "os.killpg(0")
    code, said = start(words(tmp_path, **live), tmp_path, before=before).wait()
    assert code == 130, said
    assert "Traceback" not in said
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-15"


# Launchers, and several processes.


def launched(words, launcher, folder, **environment):
    """Starts the command under a launcher in its own process group; its output is written to folder/said."""
    with open(folder / "said", "ab") as said:
        return subprocess.Popen(
            [*map(str, launcher), "train_text_to_image_lora.py", *map(str, words)],
            cwd=ROOT, stdout=said, stderr=said, start_new_session=True,
            env=os.environ | {"ACCELERATE_USE_CPU": "true"} | environment,
        )  # fmt: skip


def wait_for_step(folder, step, process):
    path, deadline = folder / "out" / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("train_loss") < step:
        assert process.poll() is None, (folder / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_torchrun_hands_the_signal_on(words, tmp_path, name):
    """Both processes stop after an equal number of steps, and a resumed run ends like an undisturbed run."""
    launcher = [*TORCHRUN[:3], "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", *TORCHRUN[3:]]
    flags = words(tmp_path, train_batch_size=1)
    process = launched(flags, launcher, tmp_path)
    wait_for_step(tmp_path, 12, process)
    process.send_signal(signal.Signals[name])
    process.wait(60)
    said = (tmp_path / "said").read_text()
    assert f"train_text_to_image_lora.py: {name}: stopped after step " in said
    assert f"(exit code {CODES[name]})" in said
    step = read_state(newest_checkpoint(tmp_path / "out"))[0].global_step
    assert 12 <= step < STEPS
    assert launched(flags, launcher, tmp_path).wait(120) == 0
    straight = words(tmp_path / "straight", train_batch_size=1)
    (tmp_path / "straight").mkdir()
    assert launched(straight, TORCHRUN, tmp_path / "straight").wait(120) == 0
    assert_same_end(tmp_path / "straight" / "out", tmp_path / "out")


@pytest.mark.long
def test_a_signal_to_one_of_two_processes_stops_both(start, words, tmp_path):
    """As if one of several machines were stopped: no launcher forwards the signal to the others."""
    flags = words(tmp_path, train_batch_size=1)
    runs = start.together(flags, tmp_path, 2, before={1: sending("step", "SIGUSR1")})
    ended = [run.wait() for run in runs]
    assert [code for code, _ in ended] == [75, 75], ended
    assert "SIGUSR1: stopped after step 16, with a checkpoint" in ended[0][1]  # a step later: see reduce_loss_and_stop


@pytest.mark.long
def test_the_orphan_of_accelerate_launch_stops_with_a_checkpoint(words, tmp_path):
    """accelerate launch starts a single process and forwards no signal to it."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    flags = words(tmp_path, max_train_steps=4000, validation_steps=4000, checkpointing_steps=0)
    process = launched(flags, launcher, tmp_path)
    wait_for_step(tmp_path, 5, process)
    process.terminate()
    process.wait(10)
    deadline = time.monotonic() + 60
    while "(exit code 143)" not in (tmp_path / "said").read_text():
        assert time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.05)
    assert "the launcher is gone: stopped after step " in (tmp_path / "said").read_text()
    assert find_damage(newest_checkpoint(tmp_path / "out")) is None


@pytest.mark.long
def test_a_closed_terminal_is_a_request_too(words, tmp_path):
    """After it has closed, writing to the terminal is an error."""
    import pty

    master, slave = pty.openpty()
    flags = words(tmp_path, max_train_steps=4000, validation_steps=4000, checkpointing_steps=0)
    command = [sys.executable, "train_text_to_image_lora.py", *map(str, flags)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    path, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("train_loss") < 5:
        assert time.monotonic() < deadline
        os.read(master, 1 << 16)
    os.close(master)
    assert process.wait(60) == 143
    assert find_damage(newest_checkpoint(tmp_path / "out")) is None

"""What the libraries load and print while they are imported, and how many threads they use."""

import importlib
import os
import subprocess
import sys

import pytest
from conftest import CORES, ROOT, THREADS, refusal_of

from text_to_image_lora.libraries import LAUNCHERS_MARKS, hide_modules, launchers_environment, num_cpu_threads


def test_a_hidden_module_is_found_again(tmp_path, monkeypatch):
    (tmp_path / "rarely_needed.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with hide_modules("rarely_needed", "sys"), pytest.raises(ImportError):
        import rarely_needed
    import rarely_needed

    assert rarely_needed.value == 3
    assert sys.modules["sys"] is sys
    with hide_modules("rarely_needed"):  # modules that are already imported stay visible
        import rarely_needed  # noqa: F401
    del sys.modules["rarely_needed"]


def test_a_run_imports_neither_bitsandbytes_nor_xformers_nor_bokeh(tiny_sd, pictures, tmp_path):
    code = (
        "import sys, train_text_to_image_lora as script; script.main(script.parse_settings(sys.argv[1:]))\n"
        "assert not {'bitsandbytes', 'xformers', 'bokeh'} & sys.modules.keys()"
    )
    flags = {
        "pretrained_model_name_or_path": tiny_sd, "train_data_dir": pictures, "resolution": 32, "max_train_steps": 1,
        "output_dir": tmp_path / "out", "latent_cache_dir": tmp_path / "cache", "report_to": "none",
    }  # fmt: skip
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["--help", "--dry_run"])
def test_what_trains_nothing_imports_nothing_of_the_page(tiny_sd, pictures, tmp_path, flag):
    code = (
        "import contextlib, sys, train_text_to_image_lora as script\n"
        "with contextlib.suppress(SystemExit): script.main(script.parse_settings(sys.argv[1:]))\n"
        "assert not {'bokeh', 'text_to_image_lora.reports.report_page'} & sys.modules.keys()"
    )
    words = [
        "--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", pictures, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "--resolution", "32", flag],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("wanted", "environment", "threads"), THREADS)
def test_how_many_threads(cores, wanted, environment, threads):
    assert num_cpu_threads(wanted, environment) == threads


def test_cores_that_it_may_not_use_are_not_counted(cores, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert num_cpu_threads(None, {}) == 2
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: None)  # as on a machine where the number is unknown
    assert num_cpu_threads(None, {}) == 2
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # macOS and Windows
    assert num_cpu_threads(None, {}) == 2 * CORES


@pytest.mark.parametrize(
    ("load", "used", "processes", "threads"),
    [
        (0.2, 12, 1, 6),  # idle in the last minute
        (6.0, 0, 1, 6),  # a run has just ended
        (2.2, 12, 1, 4),
        (12.0, 2, 1, 4),
        (12.0, 12, 1, 1),
        (2.0, 12, 2, 2),
        (12.0, 12, 4, 1),
    ],
)
def test_cores_that_others_use_are_left_to_them(cores, monkeypatch, caplog, load, used, processes, threads):
    """`used` of the machine's twelve logical cores are busy at this moment."""
    monkeypatch.setattr("psutil.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval, percpu: [100.0] * used + [0.0] * (12 - used))
    caplog.set_level("INFO", "text_to_image_lora")
    environment = {"LOCAL_WORLD_SIZE": str(processes)}
    assert num_cpu_threads(None, environment) == threads
    assert ("--num_cpu_threads 6 uses all of them" in caplog.text) == (threads * processes < 6)
    assert num_cpu_threads(None, environment, alone=True) == 6 // processes
    assert num_cpu_threads(5, environment) == 5
    assert num_cpu_threads(None, {"OMP_NUM_THREADS": "3"}) == 3


def test_only_the_cores_that_it_may_use_count_as_busy(cores, monkeypatch):
    monkeypatch.setattr("psutil.getloadavg", lambda: (12.0, 0.0, 0.0))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval, percpu: [100.0] * 8 + [0.0] * 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {7, 8, 9}, raising=False)
    assert num_cpu_threads(None, {}) == 2


LAUNCHER = """
import os, subprocess, sys
print(subprocess.run([sys.executable, "-c", sys.argv[1]], env=os.environ | {"OMP_NUM_THREADS": "1"} | eval(sys.argv[2]),
                     capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.parametrize(
    ("by_person", "marks", "respected"),
    [
        ("1", {"ACCELERATE_MIXED_PRECISION": "no"}, True),
        ("1", {"LOCAL_WORLD_SIZE": "1"}, True),
        (None, {"ACCELERATE_MIXED_PRECISION": "no"}, False),
        (None, {"LOCAL_WORLD_SIZE": "1"}, False),
        ("4", {"LOCAL_WORLD_SIZE": "1"}, False),
        (None, {}, True),
    ],
)
@pytest.mark.parametrize("through_a_shell", [False, True])
def test_one_thread_is_respected_if_a_person_asked_for_it(by_person, marks, respected, through_a_shell):
    """A launcher sets OMP_NUM_THREADS=1 for its processes; its own environment tells whether a person did."""
    ask = (
        "import os; from text_to_image_lora import libraries\n"
        "libraries.physical_cores, libraries.busy_cores = lambda: 6, lambda: 0.0\n"
        "print(libraries.num_cpu_threads(None, os.environ))"
    )
    if through_a_shell:
        ask = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", *LAUNCHERS_MARKS)
    }
    environment |= {} if by_person is None else {"OMP_NUM_THREADS": by_person}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, ask, repr(marks)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == ("1" if respected else "6"), done.stderr


def test_a_launcher_whose_environment_cannot_be_read_is_not_trusted(monkeypatch):
    import psutil

    def deny(self):
        raise psutil.AccessDenied

    monkeypatch.setattr("psutil.Process.environ", deny)
    assert launchers_environment() == {}


@pytest.mark.parametrize("text", ["1000000", "99999999999999999999", "1025"])
def test_a_number_of_threads_that_would_end_the_process_is_not_used(cores, text):
    assert num_cpu_threads(None, {"OMP_NUM_THREADS": text}) == 2 * CORES


@pytest.mark.parametrize("text", ["1000000", "1000000000000", "1025", "0", "-1"])
@pytest.mark.parametrize("command", ["train_text_to_image_lora", "infer"])
def test_a_flag_for_too_many_threads_is_refused(command, text):
    words = ["--pretrained_model_name_or_path", "x", "--num_cpu_threads", text]
    message = refusal_of(importlib.import_module(command).build_parser().settings, words)
    assert "--num_cpu_threads" in message
    assert f"{text}: it must be " in message
    assert "from 1 to 1024" in message

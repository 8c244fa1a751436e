"""Commands that start quickly are run as Python runs them, and end with the command."""

import subprocess
import time

import psutil
import pytest
from conftest import quick_python


@pytest.mark.parametrize(
    ("code", "returned", "printed"),
    [
        ("import sys; print(sys.argv[1:]); sys.exit(3)", 3, "['--a', 'b c']\n"),
        ("import sys; sys.exit('no')", 1, ""),
        ("import os; print(os.environ['WORD'], os.getcwd())", 0, "axe {folder}\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", -6, ""),
        ("import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'exit(4)']).returncode)", 4, ""),
    ],
)
def test_a_script_is_run_as_python_runs_it(tmp_path, monkeypatch, code, returned, printed):
    monkeypatch.setenv("WORD", "axe")
    (tmp_path / "script.py").write_text(code)
    words = [quick_python().python, "script.py", "--a", "b c"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode % 256, done.stdout) == (returned % 256, printed.format(folder=tmp_path))


def test_a_killed_command_leaves_no_process(tmp_path):
    """Also one that ignores SIGTERM, as a run does until its step ends."""
    (tmp_path / "script.py").write_text(
        "import os, pathlib, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path('pid.tmp').write_text(str(os.getpid()))\nos.rename('pid.tmp', 'pid')\ntime.sleep(600)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([quick_python().python, "script.py"], cwd=tmp_path, timeout=5)
    process = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)

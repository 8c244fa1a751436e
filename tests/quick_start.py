"""Starts the command without the seconds of its imports: in processes forked from one that has imported everything.

    with QuickStart() as start:
        run = start(words, folder)
        os.kill(run.pid, signal.SIGTERM)
        code, said = run.wait()

A separate process forks, because pytest's process may have threads. A forked process runs the script as `python` does.
"""

import atexit
import faulthandler
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_text_to_image_lora.py"


class Run:
    """A running command; its output is written to `log`."""

    def __init__(self, server, pid, log):
        self.server, self.pid, self.log, self.code = server, pid, log, None

    def said(self):
        return self.log.read_text(errors="replace")

    def ended(self):
        """Returns whether the process has ended; `code` is its exit code, or a negative signal number."""
        if self.code is None:
            self.code = self.server.ask({"pid": self.pid})
        return self.code is not None

    def wait(self, seconds=120):
        """Returns (exit code, output); raises an error if the process takes too long."""
        self.until(self.ended, seconds)
        return self.code, self.said()

    def until(self, condition, seconds=120):
        """Waits until a condition is true, whether the process is running or not."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"nothing after {seconds} s: {self.said()}"
            time.sleep(0.005)

    def until_said(self, words, seconds=120):
        self.until(lambda: words in self.said() or self.ended(), seconds)
        assert words in self.said(), self.said()


class QuickStart:
    """Starts the command with given flags, as `Run`s."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def together(self, words, folder, count, before=None):
        """Starts several processes of one run, as a launcher does; `before` is a dict by rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = dict(
            WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        return [
            self(words, folder, (before or {}).get(rank, ""), RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank in range(count)
        ]

    def __call__(self, words, folder, before="", **environment):
        """Starts the command with a new log file in the folder. `before` is Python code that runs first."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"log-{len(list(folder.glob('log-*'))):03d}.txt"
        log.touch()
        environment = {"ACCELERATE_USE_CPU": "true"} | environment
        pid = self.ask({"words": [*map(str, words)], "log": str(log), "before": before, "environment": environment})
        return Run(self, pid, log)


SENDING = """
import importlib, os, signal
owner, calls = importlib.import_module("text_to_image_lora.{module}"), []
function = owner.{function}

def send(*values, **options):
    calls.append(0)
    if len(calls) == {nth}:
        os.kill(os.getpid(), signal.{name})
    return function(*values, **options)

owner.{function} = send
"""


def signal_before(function, nth, name):
    """Returns Python code for a `Run` that sends itself a signal before the nth call of a function of the package."""
    module, _, function = function.rpartition(".")
    return SENDING.format(module=module, function=function, nth=nth, name=name)


MEASURED = ("images_per_second", "peak_memory_gib")


def assert_same_end(first, second):
    """Checks that both LoRAs, the metrics without times, the optimizer and the pictures are equal, bit for bit."""
    from conftest import read_lora, read_metrics

    for part in (".", "best"):
        a, b = read_lora(first / part), read_lora(second / part)
        assert a.keys() == b.keys()
        assert [key for key in a if not a[key].equal(b[key])] == []
    rows = [[{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(f)] for f in (first, second)]
    assert rows[0] == rows[1]
    pictures = [
        sorted(path.relative_to(folder) for path in folder.rglob("validation/*/*.png")) for folder in (first, second)
    ]
    assert pictures[0] == pictures[1]
    for path in pictures[0]:
        assert read_picture(first, path) == read_picture(second, path)


def read_picture(folder, path):
    """Returns the pixels of a picture and its text chunks, in which the output folder is replaced by a word."""
    from PIL import Image

    with Image.open(folder / path) as image:
        return image.tobytes(), {name: str(text).replace(str(folder), "OUT") for name, text in image.info.items()}


def become(words, log, before, environment):
    """Turns the forked process into the command."""
    for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        os.dup2(os.open(os.devnull if stream == 0 else log, flags | (os.O_APPEND if stream else 0)), stream)
    os.environ |= environment
    os.chdir(ROOT)
    sys.argv = [str(SCRIPT), *words]
    sys.stdin = open(0)  # noqa: SIM115 (theirs for as long as the process lives)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1) for stream in (1, 2))  # noqa: SIM115
    faulthandler.dump_traceback_later(100)  # if the process hangs, the log shows where

    def run():
        exec(before, {})
        runpy.run_path(str(SCRIPT), run_name="__main__")

    run_and_leave(run)


def run_and_leave(run):
    """Calls a function, and ends the process with the exit code that Python would give."""
    code = 0
    try:
        run()
    except SystemExit as leaving:
        code = leaving.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    # The libraries' own destructors may wait for threads that a fork leaves behind.
    os._exit(code)


def import_libraries():
    """Imports what takes seconds, and nothing of the project."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    import kornia.enhance  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from diffusers.training_utils import EMAModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    gc.collect()
    gc.freeze()  # a collection of a forked process would look through, and copy, all of this


def serve():
    """Reads one request per line: forks a process, or reports how a process ended."""
    sys.path.insert(0, str(ROOT))
    import_libraries()
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "pid" in question:
            pid, status = os.waitpid(question["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                become(**question)
                return
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()

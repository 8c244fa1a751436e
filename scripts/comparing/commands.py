"""Runs the commands of a checkout and keeps what they print."""

import os
import shlex
import string
import subprocess
import sys

import psutil


TRAIN, INFER = "train_text_to_image_lora.py", "infer.py"
PROGRAMS = {  # {first word of a line: arguments of Python}
    "train": (TRAIN,),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN),
    "infer": (INFER,),
}
TIMEOUT = 1800  # seconds for one command: processes that wait for each other would wait for half an hour each time
ENVIRONMENT = {
    # With several threads, the order of sums and therefore the last bits would change.
    "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip
# Variables with these prefixes would change what a command does or prints, and are not passed on.
NOT_PASSED_ON = ("ACCELERATE_", "COLUMNS", "HF_", "HUGGING_FACE_", "LOCAL_", "PYTHON", "RANK", "WANDB_", "WORLD_SIZE")


class Failed(Exception):
    """A command failed, or a checkout or an item does not exist; the message gives the reason."""


def run(line, checkout, folder, label, values):
    """Runs one line in a checkout, writes its output to `folder/LABEL.stdout` and `LABEL.stderr`, and returns its exit code.

    A line is written as for a shell: environment variables, a key of `PROGRAMS`, and flags. In each of them, $NAME stands
    for an entry of `values`. Raises `Failed` if the command does not end.
    """
    words = [string.Template(word).substitute(values) for word in shlex.split(line)]
    position = next(i for i, word in enumerate(words) if word in PROGRAMS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(NOT_PASSED_ON)} | ENVIRONMENT
    environment |= {"HF_HOME": f"{values['out']}/cache/huggingface"}
    environment |= dict(word.split("=", 1) for word in words[:position])
    stderr_file = folder / f"{label}.stderr"
    with open(folder / f"{label}.stdout", "wb") as stdout, open(stderr_file, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *PROGRAMS[words[position]], *words[position + 1 :]],
            cwd=checkout, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        )  # fmt: skip
        try:
            return process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Failed(f"no end after {TIMEOUT} s (see {stderr_file})") from None
        finally:
            if process.poll() is None:
                for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                    member.kill()

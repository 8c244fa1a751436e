"""Runs the project's commands in a checkout, so that what they say and leave can be compared."""

import os
import shlex
import string
import subprocess
import sys

import psutil


TRAIN, INFER = "train_text_to_image_lora.py", "infer.py"
PROGRAMS = {  # the first word of a line: what Python runs
    "train": (TRAIN,),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN),
    "infer": (INFER,),
}
TIMEOUT = 1800  # seconds for one command: processes that wait for each other would wait for half an hour each time
ENVIRONMENT = {
    # Sums are in one order only with one thread.
    "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip
# Variables that start so would change what a command does or says, and are not passed on.
NOT_PASSED_ON = ("ACCELERATE_", "COLUMNS", "HF_", "HUGGING_FACE_", "LOCAL_", "PYTHON", "RANK", "WANDB_", "WORLD_SIZE")


class Failed(Exception):
    """A checkout's part can't be made, or there is none; the message says why."""


def run(line, checkout, folder, number, values):
    """Runs one line in a checkout and returns its exit code; leaves what it said in `folder/NUMBER.stdout` and `.stderr`.

    A line is written as for a shell: variables of the environment, a name of `PROGRAMS`, and flags, in all of which
    $NAME stands for an entry of `values`. Raises `Failed` if the command does not end.
    """
    words = [string.Template(word).substitute(values) for word in shlex.split(line)]
    position = next(i for i, word in enumerate(words) if word in PROGRAMS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(NOT_PASSED_ON)} | ENVIRONMENT
    environment |= {"HF_HOME": f"{values['out']}/cache/huggingface"}
    environment |= dict(word.split("=", 1) for word in words[:position])
    said = [folder / f"{number}.{name}" for name in ("stdout", "stderr")]
    with open(said[0], "wb") as stdout, open(said[1], "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *PROGRAMS[words[position]], *words[position + 1 :]],
            cwd=checkout, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        )  # fmt: skip
        try:
            return process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Failed(f"no end after {TIMEOUT} s (see {said[1]})") from None
        finally:
            if process.poll() is None:
                for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                    member.kill()

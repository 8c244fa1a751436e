"""How a process ends: one line that says why and what to do, and the exit code that goes with it."""

import os
import sys
import time

from ..errors import InputError, Stopped, TrainingError, is_dead_worker, is_out_of_memory
from ..files import reason_of
from .interruption import end_workers


SECONDS_TO_ANSWER = 5  # that the other processes have to show that they are still there


def end(error, script, ways_to_save_memory):
    """Says what ended the run, in the script's name, and exits; what nobody foresaw is raised again.

    `ways_to_save_memory()` names flags for a run that ran out of it. Needs no torch unless that is loaded.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))

    def say(line):
        if "tqdm" in sys.modules:
            for bar in [*sys.modules["tqdm"].tqdm._instances]:
                bar.close()  # or it would be drawn again, below the last line
        print(f"{script}: {line}", file=sys.stderr, flush=True)

    if isinstance(error, KeyboardInterrupt):
        say("stopped at once. What was saved is whole: run the same command again to go on from the last checkpoint.")
        leave(130, at_once=True)
    if isinstance(error, (InputError, TrainingError)):
        if rank:
            time.sleep(10)  # rank 0 says the same, and the launcher then ends this one; else it is this rank's alone
        say(error)
        leave(error.exit_code)
    if isinstance(error, Stopped):
        if rank == 0:
            say(f"{error} (exit code {error.exit_code})")
        leave(error.exit_code)
    if is_out_of_memory(error):
        say(
            "Out of memory. What was saved is whole; to go on from it, run the command again with "
            f"{ways_to_save_memory()}."
        )
        leave(1)
    if is_dead_worker(error):
        say(
            f"{reason_of(error)} What was saved is whole; if it was for want of memory, go on with fewer "
            "--dataloader_num_workers."
        )
        leave(1, at_once=True)
    if isinstance(error, RuntimeError) and "deterministic" in str(error):
        say(
            f"--deterministic: this GPU can't do it ({reason_of(error)}). Leave the flag out, or what needs that operator."
        )
        leave(1)
    if is_lost_connection(error):
        lost = " and ".join(map(str, lost_processes())) or "another one"
        say(
            f"This is process {os.environ['RANK']}, and it has lost process {lost} ({reason_of(error)}). What was saved is "
            "whole: run the same command again to go on from the last checkpoint."
        )
        leave(1, at_once=True)
    raise error


def leave(exit_code, at_once=False):
    """Ends the process; `at_once` without waiting for anything that still runs in it."""
    torch = sys.modules.get("torch")
    if at_once:
        sys.stdout.flush()
        os._exit(exit_code)
    end_workers()
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads may abort the process when the interpreter ends
    sys.exit(exit_code)


def is_lost_connection(error):
    """Whether an exception says that a collective failed, as another process is not there any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return False
    said = ("gloo", "NCCL", "onnection closed by peer", "onnection reset by peer", "Timed out")
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def lost_processes():
    """The ranks that don't answer: each that is left writes its own into the launcher's store, and reads the others'."""
    from datetime import timedelta

    import torch

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    keys = {other: f"still there/{other}" for other in range(world_size)}
    try:
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=SECONDS_TO_ANSWER),
        )  # fmt: skip
        store.set(keys[rank], "")
        missing, end = keys, time.monotonic() + SECONDS_TO_ANSWER
        while missing and time.monotonic() < end:
            missing = {other: key for other, key in missing.items() if not store.check([key])}
            time.sleep(0.1)
        return [*missing]
    except (RuntimeError, OSError, ValueError):  # the first machine, which has the store, is gone itself
        return [0]

"""How a process ends: with one line that tells the reason and the remedy, and an exit code."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from ..errors import (
    InputError,
    TrainingError,
    describe_lack_of_memory,
    describe_system_error,
    is_dead_worker,
    is_out_of_address_space,
    is_out_of_memory,
    message_of,
    stopped_within,
)
from ..files import reason_of
from .interruption import end_workers


SECONDS_TO_ANSWER = 5  # for the other processes to show that they are still running


def end(error: BaseException, script: str, ways_to_save_memory: Callable[[], str]) -> NoReturn:
    """Prints why the run ended and exits. Raises unexpected errors again. Does not import torch.

    Args:
        script: The name of the script, with which the line begins.
        ways_to_save_memory: Returns the flags to suggest to a run that is out of memory.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))

    def say(line):
        if "tqdm" in sys.modules:
            for bar in [*sys.modules["tqdm"].tqdm._instances]:
                bar.close()  # otherwise the bar would be drawn again below the last line
        print(f"{script}: {line}", file=sys.stderr, flush=True)

    if isinstance(error, KeyboardInterrupt):
        say("stopped at once. Saved files are intact: run the same command again to resume from the last checkpoint.")
        leave(130, at_once=True)
    if isinstance(error, (InputError, TrainingError)):
        if rank:
            time.sleep(10)  # if rank 0 has this error too, it prints the line and the launcher ends this process
        say(message_of(error))
        leave(error.exit_code)
    if (stopped := stopped_within(error)) is not None:
        if rank == 0:
            say(f"{stopped} (exit code {stopped.exit_code})")
        leave(stopped.exit_code)
    if is_out_of_address_space(error):  # the flags below would not help
        say(describe_lack_of_memory(error))
        leave(1)
    if is_out_of_memory(error):
        say(
            "Out of memory. Saved files are intact; to resume from them, run the command again with "
            f"{ways_to_save_memory()}."
        )
        leave(1)
    if is_dead_worker(error):
        say(
            f"{reason_of(error)} Saved files are intact; if the worker ran out of memory, resume with fewer "
            "--dataloader_num_workers."
        )
        leave(1, at_once=True)
    if isinstance(error, RuntimeError) and "deterministic" in str(error):
        say(
            f"--deterministic is not possible on this GPU ({reason_of(error)}). Leave out the flag, or the option that needs "
            "this operator."
        )
        leave(1)
    if is_lost_connection(error):
        lost = " and ".join(map(str, lost_processes())) or "another one"
        say(
            f"Process {os.environ['RANK']} has lost process {lost} ({reason_of(error)}). Saved files are intact: run the "
            "same command again to resume from the last checkpoint."
        )
        leave(1, at_once=True)
    if isinstance(error, OSError):  # such as a file that was deleted during the run
        say(f"{describe_system_error(error)} and run the same command again to resume; saved files are intact.")
        leave(1)
    raise error


def leave(exit_code: int, at_once: bool = False) -> NoReturn:
    """Ends the process; with `at_once`, does not wait for its threads."""
    torch = sys.modules.get("torch")
    if at_once:
        sys.stdout.flush()
        os._exit(exit_code)
    end_workers()
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads may abort the process when the interpreter ends
    sys.exit(exit_code)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception means that a collective failed because another process is gone."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return False
    messages = ("gloo", "NCCL", "onnection closed by peer", "onnection reset by peer", "Timed out")
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in messages)
    )


def lost_processes() -> list[int]:
    """Returns the ranks that don't answer. Each process writes its rank to the launcher's store and reads the others."""
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
    except (RuntimeError, OSError, ValueError):  # the first machine, which has the store, is gone
        return [0]

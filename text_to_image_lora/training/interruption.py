"""Requests to stop a run early: by a signal, at the end of its time, or because its launcher is gone.

Until the run has something worth keeping, a signal stops the process at once. After `defer_requests`, the run checks for
requests between two pieces of work (`stop_requested`), and its processes stop together (`stop_together`). A second Ctrl-C
stops at once. Signals belong to the process, so the listener is a global of this module.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import Stopped
from ..signals import EXIT_CODES
from .launcher import end_with_parent, launchers_pid, lives


TRY_LATER = 75  # EX_TEMPFAIL of sysexits.h, which requeueing scripts look for
SIGNAL_NAMES = {"SIGINT": "Ctrl-C", "SIGBREAK": "Ctrl-Break", "SIGHUP": "the terminal was closed (SIGHUP)"}
BEFORE_TRAINING = "before the first step"
SAME_CTRL_C_SECONDS = 0.5  # one Ctrl-C can arrive twice: from the terminal and from a launcher that forwards it


class Request(NamedTuple):
    """Why a run is to stop, and its exit code."""

    reason: str
    exit_code: int


class Listener:
    """The signals and limits that can stop this process."""

    def __init__(self, ends: float | None = None):
        self.ends = ends  # the time.monotonic() at which the run's time is over
        self.request: Request | None = None
        self.requested_at = 0.0
        self.names: dict[int, str] = {}  # signal names by number
        self.previous_handlers: dict[int, Any] = {}
        self.defers, self.where = False, BEFORE_TRAINING
        self.launcher = launchers_pid()
        self.checked_at, self.longest_work = time.monotonic(), 0.0  # seconds between two checks
        self.terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]

    def on_signal(self, number: int, frame: Any) -> None:
        name, now = self.names[number], time.monotonic()
        if name == "SIGHUP":  # the terminal is gone, and writing to it would raise an error
            for terminal in self.terminals:
                with open(os.devnull, "w") as devnull:
                    os.dup2(devnull.fileno(), terminal)
        if self.request is not None:
            if EXIT_CODES[name] == EXIT_CODES["SIGINT"] and now - self.requested_at > SAME_CTRL_C_SECONDS:
                raise KeyboardInterrupt
            return
        self.request, self.requested_at = Request(SIGNAL_NAMES.get(name, name), EXIT_CODES[name]), now
        if not self.defers:
            raise Stopped(*self.request, self.where)

    def check(self) -> Request | None:
        """Returns the request, or None. Time is over when twice the longest piece of work so far would not fit any more."""
        now = time.monotonic()
        self.longest_work, self.checked_at = max(self.longest_work, now - self.checked_at), now
        if self.request is None and self.launcher is not None and not lives(self.launcher):
            self.request = Request("the launcher is gone", EXIT_CODES["SIGTERM"])
        if self.request is None and self.ends is not None and now + 2 * self.longest_work > self.ends:
            self.request = Request("--max_train_time is over", TRY_LATER)
        return self.request


_listener = Listener()


def listen(max_seconds: float | None = None) -> None:
    """From here on, signals and the end of `max_seconds` are requests to stop."""
    global _listener
    stop_listening()
    _listener = Listener(None if max_seconds is None else time.monotonic() + max_seconds)
    for name in EXIT_CODES:
        number = getattr(signal, name, None)
        # An ignored signal stays ignored, as nohup intends.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            _listener.names[number] = name
            _listener.previous_handlers[number] = signal.signal(number, _listener.on_signal)


def stop_listening() -> None:
    """Restores the signal handlers from before `listen`."""
    global _listener
    for number, handler in _listener.previous_handlers.items():
        signal.signal(number, handler)
    _listener = Listener()


def defer_requests() -> None:
    """From here on, a request waits until the run checks for it."""
    _listener.defers, _listener.checked_at = True, time.monotonic()


def obey_requests(where: str) -> None:
    """From here on, a request raises `Stopped` at once; `where` completes its message "stopped ..."."""
    _listener.defers, _listener.where = False, where
    if _listener.request is not None:
        raise Stopped(*_listener.request, where)


def stop_requested() -> Request | None:
    """Returns the `Request` to this process, or None. Must be called between two pieces of work."""
    return _listener.check()


def raise_if_requested(where: str) -> None:
    """Raises `Stopped` if this process was asked to stop; the caller must then wait for the other processes."""
    if (request := stop_requested()) is not None:
        raise Stopped(*request, where)


def stop_requested_anywhere(where: str) -> Stopped | None:
    """Returns the `Stopped` for all processes if any was asked to stop. Every process must call this."""
    from accelerate.utils import gather_object

    requests: Any = gather_object([stop_requested()])  # one for each process
    request: Request | None = next((request for request in requests if request is not None), None)
    return None if request is None else Stopped(*request, where)


def stop_together(where: str) -> None:
    """Raises `Stopped` on every process if any was asked to stop. Every process must call this."""
    stopped = stop_requested_anywhere(where)
    if stopped is not None:
        raise stopped


def run_until_stopped(work: Callable[[], Any], where: str) -> Stopped | None:
    """Calls `work()` and returns the `Stopped` that it raised, with another `where`, or None."""
    try:
        work()
    except Stopped as stopped:
        return Stopped(stopped.reason, stopped.exit_code, where)
    return None


def reduce_loss_and_stop(accelerator: Any, loss: Any) -> tuple[Any, Any]:
    """Returns the mean of the loss over the processes, and whether any process was asked to stop.

    Both share the one collective that a step has anyway, and stay on the device, as a separate exchange would make every
    step wait for the device. The flag is read with the step's other numbers, one step later.
    """
    import torch

    if accelerator.num_processes == 1:
        return loss, stop_requested() is not None
    stop = torch.full_like(loss, float(stop_requested() is not None))
    mean, stop = accelerator.reduce(torch.stack([loss, stop]), "mean").unbind()
    return mean, stop


def end_workers() -> None:
    """Kills the data loading workers, for exits at which their loader does not do so.

    An exception keeps the loader's iterator alive until Python ends. multiprocessing would then send the workers a signal
    that they ignore, and wait for them.
    """
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # otherwise PyTorch would raise an error about a dead worker
    for worker in workers:
        worker.kill()


def start_worker(worker: int | None = None) -> None:
    """Initializes a data loading worker, which ends with the main process, even if that is killed.

    Signals to the process group are for the main process, which ends its workers. PyTorch's own check for the main process
    waits for the worker to hand over its batch, which nobody takes any more.
    """
    end_with_parent()
    for name in EXIT_CODES:
        with contextlib.suppress(AttributeError, ValueError):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

"""What asks a run to stop before its end: a signal, the end of its time, a launcher that is gone.

Until something is worth keeping, a signal stops the process where it is. From then on (`hold`) the run looks for requests
between two pieces of work (`asked`), and its processes stop together (`stop_together`, `agreed`). A second Ctrl-C never
waits. Signals are the process's, so what listens to them is the module's and no object that is passed around.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from typing import NamedTuple

from ..errors import Stopped
from .launcher import launchers_pid, lives


# By name, as no system has them all: a terminal that is closed and Windows' Ctrl-Break are other words for the same.
EXIT_CODES = {"SIGINT": 130, "SIGBREAK": 130, "SIGTERM": 143, "SIGHUP": 143, "SIGUSR1": 75}
TRY_LATER = 75  # EX_TEMPFAIL of sysexits.h: what requeueing scripts look for
IN_WORDS = {"SIGINT": "Ctrl-C", "SIGBREAK": "Ctrl-Break", "SIGHUP": "the terminal was closed (SIGHUP)"}
AT_ONCE = 0.5  # seconds in which a second Ctrl-C is the first one once more: from the terminal, and from a launcher


class Request(NamedTuple):
    """Why a run is to stop, and the exit code that says so."""

    reason: str
    exit_code: int


class Listener:
    """What a process was asked; `ends` is the time.monotonic() at which its time is over, or None."""

    def __init__(self, ends=None):
        self.ends, self.request, self.requested_at = ends, None, None
        self.names, self.before = {}, {}  # of the signals by number, and who listened to them before
        self.held, self.where = False, "before the first step"
        self.launcher = launchers_pid()
        self.looked_at, self.longest = time.monotonic(), 0.0
        self.terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]

    def on_signal(self, number, frame):
        name, now = self.names[number], time.monotonic()
        if name == "SIGHUP":  # the terminal is no more, and what is written to it would be an error
            for terminal in self.terminals:
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), terminal)
        if self.request is not None:
            if EXIT_CODES[name] == EXIT_CODES["SIGINT"] and now - self.requested_at > AT_ONCE:
                raise KeyboardInterrupt
            return
        self.request, self.requested_at = Request(IN_WORDS.get(name, name), EXIT_CODES[name]), now
        if not self.held:
            raise Stopped(*self.request, self.where)

    def look(self):
        """The `Request`, or None. A run's time is over when the longest piece of work so far would no more fit twice."""
        now = time.monotonic()
        self.longest, self.looked_at = max(self.longest, now - self.looked_at), now
        if self.request is None and self.launcher is not None and not lives(self.launcher):
            self.request = Request("the launcher is gone", EXIT_CODES["SIGTERM"])
        if self.request is None and self.ends is not None and now + 2 * self.longest > self.ends:
            self.request = Request("--max_train_time is over", TRY_LATER)
        return self.request


_listener = Listener()


def listen(max_seconds=None):
    """From here on signals are requests to stop, and so is the end of so many seconds."""
    global _listener
    stop_listening()
    _listener = Listener(None if max_seconds is None else time.monotonic() + max_seconds)
    for name in EXIT_CODES:
        number = getattr(signal, name, None)
        # What is ignored stays so: nohup has its reason.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            _listener.names[number] = name
            _listener.before[number] = signal.signal(number, _listener.on_signal)


def stop_listening():
    """Signals are again what they were before `listen`."""
    global _listener
    for number, handler in _listener.before.items():
        signal.signal(number, handler)
    _listener = Listener()


def hold():
    """From here on a request waits until the run looks for it."""
    _listener.held, _listener.looked_at = True, time.monotonic()


def let_go(where):
    """From here on a request stops the process where it is, which `where` says in words."""
    _listener.held, _listener.where = False, where
    if _listener.request is not None:
        raise Stopped(*_listener.request, where)


def asked():
    """The `Request` of this process, or None; to be looked for between two pieces of work."""
    return _listener.look()


def raise_if_asked(where):
    """Raises `Stopped` where this process is asked to stop; who calls this waits for the others then."""
    if (request := asked()) is not None:
        raise Stopped(*request, where)


def agreed(where):
    """The `Stopped` of all processes where one of them is asked to stop, or None; each must come here."""
    from accelerate.utils import gather_object

    request = next((request for request in gather_object([asked()]) if request is not None), None)
    return None if request is None else Stopped(*request, where)


def stop_together(where):
    """Raises `Stopped` on every process where one of them is asked to stop; each must come here."""
    stopped = agreed(where)
    if stopped is not None:
        raise stopped


def stopped_in(work, where):
    """Calls `work()`; the `Stopped` that it ended with, or None."""
    try:
        work()
    except Stopped as stopped:
        return Stopped(stopped.reason, stopped.exit_code, where)
    return None


def mean_and_asked(accelerator, loss):
    """The mean of a number on the device over the processes, and whether one of them is asked to stop.

    In one collective, which the step has anyway, and on the device: a run of several processes that asked each other in
    every step would wait for the device in every step. The answer is read with the step's other numbers, a step later.
    """
    import torch

    if accelerator.num_processes == 1:
        return loss, asked() is not None
    asks = torch.full_like(loss, float(asked() is not None))
    mean, asks = accelerator.reduce(torch.stack([loss, asks]), "mean").unbind()
    return mean, asks


def end_workers():
    """Ends the processes that load data, where their loader is not there any more to do it.

    An exception keeps the loader's iterator alive until Python ends; multiprocessing would then ask them by a signal that
    they don't heed, and wait for them.
    """
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch would raise that one of them has died
    for worker in workers:
        worker.kill()


def leave_signals_to_the_main_process(worker=None):
    """In a process that loads data: a signal to the whole group is for the one that trains, which ends its workers."""
    for name in EXIT_CODES:
        with contextlib.suppress(AttributeError, ValueError):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

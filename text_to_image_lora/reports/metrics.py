"""The numbers of each step: `metrics.jsonl` always, trackers and progress bar with it."""

import collections
import json
import logging
import math
import statistics
import sys
import time
from pathlib import Path

import psutil

from ..errors import NotANumberError, Stopped
from ..files import explaining_disk_errors, format_bytes, write_whole
from .dashboard import log_numbers, log_results
from .report_page import FILE as PAGE
from .report_page import update_page


logger = logging.getLogger(__name__)
VALIDATED = "validation/loss"  # what a line of a validation has
LAST_GOOD = "last-good"  # the folder with the LoRA of a run that came to no number
# Before the page, some 1.5 MB, is written once more: seconds at least, and times what it took to write it.
PAGE_PAUSE, PAGE_SHARE = 10, 20


def peak_memory_gib(device):
    """The most memory the run has held so far: of the GPU's, or this process's on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if sys.platform == "linux":  # `getrusage` would begin with what the process had that started this one
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, the same numbers that the trackers get."""

    def __init__(self, path, first_step, due=()):
        """Starts anew (0) or goes on.

        Lines after `first_step` go, of a run that went further before it was resumed, and those of this step that are of
        what is still `due`; `given_up` counts them by their step.
        """
        self.path = path = Path(path)
        self.given_up = collections.Counter()
        if not path.exists():
            return
        kept, lines = [], path.read_text().splitlines(keepends=True)
        for line in lines:
            try:
                row = json.loads(line) if line.endswith("\n") else None
            except ValueError:
                row = None
            if row is None:  # cut off, by a kill or a full disk
                continue
            again = row["step"] > first_step or (row["step"] == first_step and "loss" in due and VALIDATED in row)
            if first_step > 0 and not again:
                kept.append(line)
            else:
                self.given_up[row["step"]] += 1
        if kept != lines:
            write_whole(path, "".join(kept))

    def write(self, step, values):
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no infinity
        with explaining_disk_errors(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


class OnTheirWay:
    """Numbers, some of them on the device, that the host reads later without waiting for what the device does since.

    On a GPU they are copied into pinned memory as soon as they are there, and an event tells when that is.
    """

    def __init__(self, values):
        import torch

        self.values, self.event = dict(values), None
        self.names = [name for name, value in values.items() if torch.is_tensor(value)]
        if not self.names:
            return
        self.numbers = torch.stack([values[name].detach().float().reshape(()) for name in self.names])
        if self.numbers.device.type == "cuda":
            on_host = torch.empty(len(self.names), pin_memory=True)
            self.numbers = on_host.copy_(self.numbers, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self):
        """The numbers, as Python's."""
        if self.event is not None:
            self.event.synchronize()
        return self.values | (dict(zip(self.names, self.numbers.tolist())) if self.names else {})


class Pace:
    """What is said of a run's speed: after ten steps what is left, and once when steps become many times slower."""

    FIRST = 10  # steps to measure
    USUAL = 200  # steps whose median tells what is usual
    SLOWER = 4  # times the median: a slow step
    FULL = 95  # percent of a machine's memory
    IN_A_ROW = 5  # slow steps, before it is said

    def __init__(self, device, num_steps, remedy):
        self.device, self.num_steps, self.remedy = device, num_steps, remedy
        self.seconds, self.slow, self.said = collections.deque(maxlen=self.USUAL), 0, False

    def take(self, step, seconds):
        """How long a step took, without what is done between steps."""
        self.seconds.append(seconds)
        if len(self.seconds) == self.FIRST:
            each, left = statistics.median(self.seconds), self.num_steps - step
            memory = format_bytes(peak_memory_gib(self.device) * 2**30)
            rest = f", {in_words(each * left)} for the {left} left" if left else ""
            logger.info(f"{each:.3g} s a step{rest}; at most {memory} of memory so far")
            self.check_spill()
        elif len(self.seconds) > self.FIRST and not self.said:
            usual = statistics.median(self.seconds)
            self.slow = self.slow + 1 if seconds > self.SLOWER * usual else 0
            if self.slow == self.IN_A_ROW:
                self.said = True
                since = f"since step {step - self.slow + 1} a step takes {seconds / usual:.0f} times as long as before"
                if self.device.type == "cpu" and psutil.virtual_memory().percent < self.FULL:
                    logger.info(f"{since}: other programs use this machine, or it was slowed down")
                    return
                logger.info(
                    f"{since}: another program uses the device, or its memory is full. If it stays so, stop with Ctrl-C "
                    f"and go on with {self.remedy}."
                )

    def check_spill(self):
        """Drivers for Windows let a GPU use the machine's memory when its own is full, many times slower."""
        import torch

        if self.device.type == "cuda":
            own, taken = (
                torch.cuda.get_device_properties(self.device).total_memory,
                torch.cuda.memory_reserved(self.device),
            )
            if taken > own:
                self.said = True
                logger.info(
                    f"{format_bytes(taken)} are in use and the GPU has {format_bytes(own)}: the driver lends it the "
                    f"machine's memory, which is many times slower. Stop with Ctrl-C and go on with {self.remedy}."
                )


def in_words(seconds):
    """A time as people say it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class StepReports:
    """The numbers of each step, for metrics file, trackers and progress bar, written while the next step runs.

    `asked` says whether a process is asked to stop, as far as that is known, alike on all of them. A step whose loss or
    gradient is not a number changed nothing (`optimizers.step_if_finite`): such are counted when their numbers arrive.
    """

    IN_A_ROW = 10  # steps that were skipped, before the run ends
    TO_SETTLE = 16  # of fp16's, whose loss scale begins at 2**16 and is halved in each

    def __init__(self, accelerator, metrics_file, progress, output_dir, remedy):
        self.accelerator, self.metrics_file, self.progress = accelerator, metrics_file, progress
        self.output_dir, self.waiting, self.smooth = output_dir, None, None
        self.pace = Pace(accelerator.device, progress.total, remedy)
        self.scaled = getattr(accelerator, "scaler", None) is not None
        self.asked, self.skipped, self.in_a_row, self.page_due = False, [], 0, 0

    def put(self, step, values, *, samples, seconds):
        """Takes numbers and tensors of one number in, and how long the step of so many samples took.

        Those of the step before are written.
        """
        if isinstance(values["asked"], bool):
            self.asked = values["asked"]
        values = OnTheirWay(values | {"images_per_second": samples / seconds})
        self.flush()
        self.pace.take(step, seconds)
        self.waiting = step, values

    def flush(self):
        """Writes what waits."""
        if self.waiting is None:
            return
        (step, values), self.waiting = self.waiting, None
        values = values.read()
        self.asked = bool(values.pop("asked")) or self.asked
        loss = values["train_loss"]
        if math.isfinite(loss) and math.isfinite(values["grad_norm"]):
            self.in_a_row = 0
            self.smooth = loss if self.smooth is None else 0.95 * self.smooth + 0.05 * loss
            self.progress.set_postfix(loss=f"{self.smooth:.4f}", lr=f"{values['lr']:.1e}", refresh=False)
        else:
            self.count_skipped(step, values)
            values["skipped"] = 1
        values["peak_memory_gib"] = peak_memory_gib(self.accelerator.device)
        if self.metrics_file is not None:
            self.metrics_file.write(step, values)
        log_numbers(self.accelerator, values, step)

    def write_page(self):
        """Writes the run's `report.html` anew; where epochs are short, some are left out: training goes before."""
        if self.metrics_file is None or time.monotonic() < self.page_due:
            return
        start = time.monotonic()
        update_page(self.output_dir)
        now = time.monotonic()
        self.page_due = now + max(PAGE_PAUSE, PAGE_SHARE * (now - start))

    def leave(self, ending):
        """At the end: what was skipped, the page once more, and to the trackers what the run came to, unless it goes on."""
        if (line := self.in_words()) is not None:
            logger.info(line)
        if self.metrics_file is not None and update_page(self.output_dir):
            logger.info(f"how it went: {Path(self.output_dir) / PAGE}")
        if not isinstance(ending, Stopped):
            log_results(self.accelerator, self.output_dir)

    def count_skipped(self, step, values):
        self.skipped.append(step)
        self.in_a_row += 1
        settles = self.scaled and math.isfinite(values["train_loss"])
        if len(self.skipped) == 1 and not settles:
            logger.info(
                f"step {step} is skipped: its loss is {values['train_loss']:.3g}, the norm of its gradient "
                f"{values['grad_norm']:.3g}. The weights stay as they were; {self.limit()} such steps in a row end the run"
            )

    def limit(self):
        return self.IN_A_ROW + self.TO_SETTLE * self.scaled

    def trouble(self, finished):
        """A `NotANumberError` where the run can't go on, or where it ends without having come back; else None."""
        if self.in_a_row < (2 if finished else self.limit()):
            return None
        first = self.skipped[-self.in_a_row]
        if first == 1:
            cause = (
                "From the first step on: the weights of the base model or of its VAE are broken, or too large for it"
            )
        else:
            cause = "Likely the --learning_rate is too high, or the weights outgrew what fp16 can hold"
        return NotANumberError(
            f"Loss or gradient of {self.in_a_row} steps in a row is not a number, since step {first}. "
            f"{cause}. Lower --learning_rate, or use --mixed_precision bf16 or no; the weights from before are in "
            f"{Path(self.output_dir) / LAST_GOOD}, and the checkpoints that were saved before are whole."
        )

    def in_words(self):
        """The line that says at the end which steps were skipped, or None."""
        if not self.skipped:
            return None
        shown = ", ".join(map(str, self.skipped[:10])) + (", ..." if len(self.skipped) > 10 else "")
        return f"{len(self.skipped)} steps were skipped, as loss or gradient was not a number: {shown}"

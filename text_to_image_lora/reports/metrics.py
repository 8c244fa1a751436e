"""The numbers of each step: `metrics.jsonl` always, trackers and progress bar with it."""

import json
import math
import statistics
import sys
from pathlib import Path

from ..errors import TrainingError
from ..files import in_bytes, write_whole
from .dashboard import log_numbers
from .report_page import update_page


def peak_memory_gib(device):
    """The most memory the run has held so far: of the GPU's, or this process's on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, the same numbers that the trackers get."""

    def __init__(self, path, first_step):
        """Starts anew (0) or goes on; lines after `first_step`, of a run that went further before it was resumed, go."""
        self.path = path = Path(path)
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and 0 < first_step >= json.loads(line)["step"]]
            if kept != lines:
                write_whole(path, "".join(kept))

    def write(self, step, values):
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no infinity
        with open(self.path, "a") as file:
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
    SLOWER = 4  # times the median: a slow step
    IN_A_ROW = 5  # slow steps, before it is said

    def __init__(self, device, num_steps, say, remedy):
        self.device, self.num_steps, self.say, self.remedy = device, num_steps, say, remedy
        self.seconds, self.slow, self.said = [], 0, False

    def take(self, step, seconds):
        """How long a step took, without what is done between steps."""
        self.seconds.append(seconds)
        if len(self.seconds) == self.FIRST:
            each, left = statistics.median(self.seconds), self.num_steps - step
            memory = in_bytes(peak_memory_gib(self.device) * 2**30)
            rest = f", {in_words(each * left)} for the {left} left" if left else ""
            self.say(f"{each:.3g} s a step{rest}; at most {memory} of memory so far")
            self.check_spill()
        elif len(self.seconds) > self.FIRST and not self.said:
            usual = statistics.median(self.seconds[-200:])
            self.slow = self.slow + 1 if seconds > self.SLOWER * usual else 0
            if self.slow == self.IN_A_ROW:
                self.said = True
                self.say(
                    f"since step {step - self.slow + 1} a step takes {seconds / usual:.0f} times as long as before: another "
                    f"program uses the device, or its memory is full. If it stays so, stop with Ctrl-C and go on with {self.remedy}."
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
                self.say(
                    f"{in_bytes(taken)} are in use and the GPU has {in_bytes(own)}: the driver lends it the "
                    f"machine's memory, which is many times slower. Stop with Ctrl-C and go on with {self.remedy}."
                )


def in_words(seconds):
    """A time as people say it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class StepReports:
    """The numbers of each step, for metrics file, trackers and progress bar, written while the next step runs."""

    def __init__(self, accelerator, metrics_file, progress, output_dir, say, remedy):
        self.accelerator, self.metrics_file, self.progress = accelerator, metrics_file, progress
        self.output_dir, self.waiting, self.smooth = output_dir, None, None
        self.pace = Pace(accelerator.device, progress.total, say, remedy)

    def put(self, step, values, *, samples, seconds):
        """Takes numbers and tensors of one number in, and how long the step of so many samples took.

        Those of the step before are written.
        """
        values = OnTheirWay(values | {"images_per_second": samples / seconds})
        self.flush()
        self.pace.take(step, seconds)
        self.waiting = step, values

    def flush(self):
        """Writes what waits. Raises `TrainingError` where the loss is not a number."""
        if self.waiting is None:
            return
        (step, values), self.waiting = self.waiting, None
        values = values.read()
        loss = values["train_loss"]
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss of step {step} is {loss}. Lower --learning_rate, or use --mixed_precision bf16; what was saved "
                f"before is in {self.output_dir}."
            )
        values["peak_memory_gib"] = peak_memory_gib(self.accelerator.device)
        self.smooth = loss if self.smooth is None else 0.95 * self.smooth + 0.05 * loss
        self.progress.set_postfix(loss=f"{self.smooth:.4f}", lr=f"{values['lr']:.1e}", refresh=False)
        if self.metrics_file is not None:
            self.metrics_file.write(step, values)
        log_numbers(self.accelerator, values, step)

    def write_page(self):
        """Writes the run's `report.html` anew."""
        if self.metrics_file is not None:
            update_page(self.output_dir, self.pace.say)

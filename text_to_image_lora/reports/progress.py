"""Progress bars of a run, and estimates of the time that it still needs."""

import bisect
import collections
import logging
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from tqdm.auto import tqdm

from ..files import counted, format_bytes


logger = logging.getLogger(__name__)
SECONDS_WITHOUT_BAR = 1  # work that takes less time shows no bar


def peak_memory_gib(device: Any) -> float:
    """Returns the peak memory so far: of the GPU, or of this process on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if sys.platform == "linux":  # `getrusage` would include the peak of the parent process
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def work_bar(accelerator: Any, total: int, title: str) -> Any:
    """Returns a progress bar for work between training steps, which disappears when it is closed."""
    return tqdm(
        total=total, desc=title, leave=False, delay=SECONDS_WITHOUT_BAR, disable=not accelerator.is_local_main_process
    )


class Pauses:
    """The pauses of training for validations and sample pictures: after which steps, and how long one takes.

    `name` is what a pause is for, as (noun, words after its plural): ("validation", " with sample pictures").
    """

    def __init__(self, steps: Sequence[int] = (), name: tuple[str, str] = ("validation", "")):
        self.steps, self.name = steps, name
        self.seconds: float | None = None  # of the last pause; None: there was none yet
        self.done = 0  # the step of the last pause

    def record(self, step: int, seconds: float) -> None:
        """Records how long the pause after a step took; step 0 is the base model's."""
        self.seconds, self.done = seconds, step

    def num_left(self, step: int) -> int:
        """Returns the number of pauses from this step on that are still to come."""
        return len(self.steps) - bisect.bisect_right(self.steps, max(step - 1, self.done))

    def seconds_left(self, step: int) -> float:
        """Returns the time of all pauses that are still to come; 0 as long as it is unknown."""
        return self.num_left(step) * (self.seconds or 0)

    def describe(self, step: int) -> str:
        """Continues "12 min for the remaining 90 steps" by the pauses that are still to come."""
        num_left, (noun, words) = self.num_left(step), self.name
        if not num_left:
            return ""
        pauses = f"{counted(num_left, noun)}{words}"
        if self.seconds is None:
            return f", without the time of {pauses}"
        each = f"{self.seconds:.2g} s" if self.seconds < 10 else format_duration(self.seconds)
        return f" and {pauses} ({each} each)" if num_left > 1 else f" and {pauses}"


class TrainingBar(tqdm):
    """The progress bar of the training steps; the remaining time includes pauses, and the speed does not."""

    def __init__(self, pauses: Pauses, **options: Any):
        self.pauses, self.began = pauses, time.monotonic()
        bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{since}<{left}, {rate_fmt}{postfix}]"
        super().__init__(bar_format=bar_format, **options)

    def leave_out(self, seconds: float) -> None:
        """Leaves the time of a pause that has just ended out of the speed."""
        if not self.disable:
            self.start_t += seconds
            self.last_print_t += seconds

    @property
    def format_dict(self) -> Any:
        shown = super().format_dict
        steps, elapsed = shown["n"] - shown["initial"], shown["elapsed"]
        rate = shown["rate"] or (steps / elapsed if steps and elapsed else None)
        left = "?"
        if rate:
            left = self.format_interval((shown["total"] - shown["n"]) / rate + self.pauses.seconds_left(shown["n"]))
        shown.update(left=left, since=self.format_interval(time.monotonic() - self.began))
        return shown


class StepResolutions:
    """The resolution of each step, because steps take longer at a larger one.

    Args:
        sampler: The `EffectiveBatchSampler`; None if all steps are of one resolution.
        sizes: The training size of each of its pictures in pixels.
        sides: The sides of the --resolution squares. The size of a picture is of the one with the nearest area.
    """

    def __init__(self, sampler: Any = None, sizes: Sequence[tuple[int, int]] = (), sides: Sequence[int] = (1,)):
        self.sampler, self.shares = sampler, {sides[0]: 1.0}
        self.sides = [min(sides, key=lambda side: abs(math.log(width * height / side**2))) for width, height in sizes]
        if sampler is not None and len(sides) > 1:
            steps = collections.Counter()
            for group, count in enumerate(sampler.steps_of_groups.tolist()):
                steps[self.sides[sampler.groups.tolist().index(group)]] += count
            self.shares = {side: count / sampler.steps_per_epoch for side, count in sorted(steps.items())}

    def of(self, step: int) -> int:
        """Returns the side of the square of an optimizer step, the first of which is 1."""
        if len(self.shares) == 1:
            return next(iter(self.shares))
        return self.sides[self.sampler.samples_of(step - 1)[0]]

    def mean(self, seconds: Mapping[int, float]) -> float:
        """Returns the mean time of the steps of an epoch, from {side: usual time of a step}.

        Where none is known for a resolution, the nearest one's counts, in proportion to the area.
        """

        def estimate(side):
            near = min(seconds, key=lambda known: abs(math.log(known / side)))
            return seconds[near] * (side / near) ** 2

        return sum(share * estimate(side) for side, share in self.shares.items())


class Pace:
    """Logs the speed of a run: the remaining time after ten steps, and a warning if steps become many times slower."""

    NUM_FIRST_STEPS = 10  # after which the speed is logged
    WINDOW = 200  # steps whose median is the usual time
    SLOW_FACTOR = 4  # a step is slow if it takes this many times the median
    FULL_PERCENT = 95  # use of the machine's memory from which it counts as full
    MAX_SLOW_STEPS = 5  # in a row, before the warning

    def __init__(
        self, device: Any, num_steps: int, remedy: str, pauses: Pauses, resolutions: StepResolutions | None = None
    ):
        self.device, self.num_steps, self.remedy, self.pauses = device, num_steps, remedy, pauses
        self.resolutions = resolutions or StepResolutions()
        self.seconds, self.num_added = {}, 0  # {side of the square: times of its last steps}
        self.num_slow, self.warned = 0, False

    def add(self, step: int, seconds: float) -> None:
        """Adds the time of a training step, without validations, sample pictures and checkpoints."""
        side = self.resolutions.of(step)
        own = self.seconds.setdefault(side, collections.deque(maxlen=self.WINDOW))
        own.append(seconds)
        self.num_added += 1
        if self.num_added == self.NUM_FIRST_STEPS:
            medians = {side: statistics.median(times) for side, times in self.seconds.items()}
            mean, left = self.resolutions.mean(medians), self.num_steps - step
            memory = format_bytes(peak_memory_gib(self.device) * 2**30)
            rest = ""
            if left:
                seconds = mean * left + self.pauses.seconds_left(step)
                rest = f", {format_duration(seconds)} for the remaining {counted(left, 'step')}{self.pauses.describe(step)}"
            logger.info(f"{mean:.3g} s per step{rest}; peak memory so far: {memory}")
            self.check_spill()
        elif len(own) > self.NUM_FIRST_STEPS and not self.warned:
            usual = statistics.median(own)
            self.num_slow = self.num_slow + 1 if seconds > self.SLOW_FACTOR * usual else 0
            if self.num_slow == self.MAX_SLOW_STEPS:
                self.warned = True
                first = step - self.num_slow + 1
                slower = f"since step {first}, a step takes {seconds / usual:.0f} times as long as before"
                if self.device.type == "cpu" and psutil.virtual_memory().percent < self.FULL_PERCENT:
                    logger.info(f"{slower}: other programs are using this machine, or its clock rate was reduced")
                    return
                logger.info(
                    f"{slower}: another program is using the device, or its memory is full. If it stays this slow, stop "
                    f"with Ctrl-C and resume with {self.remedy}."
                )

    def check_spill(self) -> None:
        """Warns if the driver lets the GPU use the machine's much slower memory, as drivers for Windows do."""
        import torch

        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            reserved = torch.cuda.memory_reserved(self.device)
            if reserved > total:
                self.warned = True
                logger.info(
                    f"the run uses {format_bytes(reserved)} of memory, but the GPU has only {format_bytes(total)}: the driver uses "
                    f"system memory for the rest, which is many times slower. Stop with Ctrl-C and resume with {self.remedy}."
                )


def format_duration(seconds: float) -> str:
    """Formats a time as "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

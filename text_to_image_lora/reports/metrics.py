"""Writes the metrics of each training step to `metrics.jsonl`, the trackers and the progress bar."""

import collections
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import NotANumberError, Stopped
from ..files import counted, explaining_disk_errors, write_whole
from .curves import MovingAverage
from .dashboard import log_numbers, log_results
from .numbers import parse_row
from .progress import Pace, Pauses, StepResolutions, peak_memory_gib
from .report_page import FILE as PAGE
from .report_page import update_page


logger = logging.getLogger(__name__)
VALIDATION_LOSS = "validation/loss"  # a key of the rows that a validation writes
LAST_GOOD = "last-good"  # folder of the last finite LoRA of a run that diverged
SHORTEST_STEP = 1e-6  # seconds; the ticks of some clocks are longer than a small step
PAGE_PAUSE = 10  # seconds at least between two updates of the report page
PAGE_SHARE = 20  # updates are at least this many times further apart than one takes


class MetricsFile:
    """`metrics.jsonl`, one JSON object per line, of a run that starts (0) or is resumed after `first_step`.

    Rows that will be written again are discarded: those after `first_step`, and its validation if "loss" is still `due`.
    `discarded` is {step: number of rows}. `smooth_loss` is the moving average of the training loss of the rows that are
    kept.
    """

    def __init__(self, path: str | Path, first_step: int, due: Sequence[str] = ()):
        self.path = path = Path(path)
        self.discarded = collections.Counter()
        self.smooth_loss = MovingAverage()
        if not path.exists():
            return
        kept, lines = [], path.read_text(errors="replace").splitlines(keepends=True)
        for line in lines:
            row = parse_row(line) if line.endswith("\n") else None
            if row is None:  # truncated because the process was killed or the disk was full
                continue
            validates_again = row["step"] == first_step and "loss" in due and VALIDATION_LOSS in row
            if 0 < first_step >= row["step"] and not validates_again:
                kept.append(line)
                if row.get("train_loss") is not None and not row.get("skipped"):
                    self.smooth_loss.add(row["train_loss"])
            else:
                self.discarded[row["step"]] += 1
        if kept != lines:
            write_whole(path, "".join(kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has neither NaN nor infinity
        with explaining_disk_errors(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")


class AsyncNumbers:
    """Numbers and scalar tensors, copied to pinned memory asynchronously, to be read without waiting for later work."""

    def __init__(self, values: dict[str, Any]):
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

    def read(self) -> dict[str, Any]:
        """Returns the values as Python numbers."""
        if self.event is not None:
            self.event.synchronize()
        return self.values | (dict(zip(self.names, self.numbers.tolist())) if self.names else {})


class StepMetrics:
    """Writes the metrics of a training step to metrics file, trackers and progress bar while the next step runs.

    `stop_requested` tells whether any process was asked to stop, and is equal on all processes. Steps without a finite
    loss and gradient leave the weights unchanged (`optimizers.step_if_finite`); they are counted when they are written.
    """

    MAX_SKIPPED = 10  # skipped steps in a row that end the run
    FP16_WARM_UP = 16  # more skipped steps for fp16, whose loss scale starts at 2**16 and is halved at each

    def __init__(
        self, accelerator: Any, metrics_file: MetricsFile | None, num_steps: int, output_dir: Path, remedy: str,
        pauses: Pauses, resolutions: StepResolutions | None = None,
    ):  # fmt: skip
        self.accelerator, self.metrics_file = accelerator, metrics_file
        self.progress: Any = None  # the bar, once the steps begin
        self.num_steps = num_steps
        self.output_dir = output_dir
        self.pace = Pace(accelerator.device, num_steps, remedy, pauses, resolutions)
        self.uses_grad_scaler = getattr(accelerator, "scaler", None) is not None
        self.waiting = None  # the (step, `AsyncNumbers`) to write
        self.smooth_loss = MovingAverage() if metrics_file is None else metrics_file.smooth_loss
        self.skipped, self.skipped_in_a_row = [], 0  # all steps that were skipped, and how many of them just now
        self.stop_requested, self.page_due = False, 0  # `page_due`: when the page may be written again

    def put(self, step: int, values: dict[str, Any], *, samples: int, seconds: float) -> None:
        """Accepts the numbers and scalar tensors of a step of `samples` pictures, and writes those of the previous step."""
        if isinstance(values["asked"], bool):
            self.stop_requested = values["asked"]
        numbers = AsyncNumbers(values | {"images_per_second": samples / max(seconds, SHORTEST_STEP)})
        self.flush()
        self.pace.add(step, seconds)
        self.waiting = step, numbers

    def flush(self) -> None:
        """Writes the metrics of the last step, if that was not done yet."""
        if self.waiting is None:
            return
        (step, numbers), self.waiting = self.waiting, None
        values = numbers.read()
        self.stop_requested = bool(values.pop("asked")) or self.stop_requested
        loss = values["train_loss"]
        if math.isfinite(loss) and math.isfinite(values["grad_norm"]):
            self.skipped_in_a_row = 0
            average = self.smooth_loss.add(loss)
            if self.progress is not None:
                self.progress.set_postfix(loss=f"{average:.4f}", lr=f"{values['lr']:.1e}", refresh=False)
        else:
            self.count_skipped(step, values)
            values["skipped"] = 1
        values["peak_memory_gib"] = peak_memory_gib(self.accelerator.device)
        if self.metrics_file is not None:
            self.metrics_file.write(step, values)
        log_numbers(self.accelerator, values, step)

    def write_page(self) -> None:
        """Updates the run's `report.html`, unless the last update was so recent that it would slow down training."""
        if self.metrics_file is None or time.monotonic() < self.page_due:
            return
        start = time.monotonic()
        update_page(self.output_dir)
        now = time.monotonic()
        self.page_due = now + max(PAGE_PAUSE, PAGE_SHARE * (now - start))

    def leave(self, ending: BaseException | None) -> None:
        """Logs skipped steps, updates the page and, unless the run was stopped to be resumed, logs its result."""
        if (line := self.describe_skipped()) is not None:
            logger.info(line)
        if self.metrics_file is not None and update_page(self.output_dir):
            logger.info(f"report: {Path(self.output_dir) / PAGE}")
        if not isinstance(ending, Stopped):
            log_results(self.accelerator, self.output_dir)

    def count_skipped(self, step: int, values: dict[str, float]) -> None:
        self.skipped.append(step)
        self.skipped_in_a_row += 1
        scale_too_high = self.uses_grad_scaler and math.isfinite(values["train_loss"])
        if len(self.skipped) == 1 and not scale_too_high:
            logger.info(
                f"step {step} is skipped: its loss is {values['train_loss']:.3g} and its gradient norm is "
                f"{values['grad_norm']:.3g}. The weights are unchanged; {self.limit()} skipped steps in a row end the run"
            )

    def limit(self) -> int:
        """Returns how many skipped steps in a row end the run."""
        return self.MAX_SKIPPED + (self.FP16_WARM_UP if self.uses_grad_scaler else 0)

    def divergence(self, finished: bool) -> NotANumberError | None:
        """Returns an error if too many steps in a row were skipped, or at the end of the run at least two or all; else None."""
        if self.skipped_in_a_row < (min(2, self.num_steps) if finished else self.limit()):
            return None
        first = self.skipped[-self.skipped_in_a_row]
        cause = "The --learning_rate is probably too high, or the weights have exceeded the range of fp16"
        if first == 1:
            cause = "The weights of the base model or of its VAE are probably damaged, or too large for this precision"
        return NotANumberError(
            f"The loss or gradient of {counted(self.skipped_in_a_row, 'step')} in a row is not finite, since step {first}. "
            f"{cause}. Lower --learning_rate, or use --mixed_precision bf16 or no; the last finite weights are in "
            f"{Path(self.output_dir) / LAST_GOOD}, and all earlier checkpoints are intact."
        )

    def describe_skipped(self) -> str | None:
        """Lists the skipped steps, for the end of the run; returns None if there are none."""
        if not self.skipped:
            return None
        shown = ", ".join(map(str, self.skipped[:10])) + (", ..." if len(self.skipped) > 10 else "")
        return f"{len(self.skipped)} steps were skipped because their loss or gradient was not finite: {shown}"

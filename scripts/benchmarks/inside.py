#!/usr/bin/env python
"""Runs a training script and measures its steps from inside its process. Used by scripts/benchmark.py.

    python scripts/benchmarks/inside.py time SCRIPT FLAGS...
    python scripts/benchmarks/inside.py count SCRIPT FLAGS...
    python scripts/benchmarks/inside.py rate bf16 tf32

`time` and `count` run a script with its flags and have a hook after each optimizer step. `time` measures the time of each
step and the GPU memory of the steps; `count` counts the operators that the last step dispatched, and their floating-point
operations. `rate` measures how fast the device multiplies large matrices. At the end, each prints the word BENCHMARK and
a JSON object in one line; with several processes, only the first one prints it.
"""

import collections
import itertools
import json
import os
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, baddbmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop


aten = torch.ops.aten
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
# Operators that do nothing on the device, beside views.
NOTHING = {
    "_unsafe_view", "detach", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh",
    "is_same_size", "resize_", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
# The formulas of PyTorch, and formulas for operators that PyTorch does not count.
FORMULAS = flop_registry | {
    aten.addmm_: addmm_flop,
    aten.baddbmm_: baddbmm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


def settled_median(seconds):
    """Returns the median without the first fifth of the steps, in which caches fill and clock rates rise."""
    return statistics.median(seconds[len(seconds) // 5 :])


class Clock:
    """Measures when each step ends: on a CPU with its clock, on a GPU with events in its stream, read after the last step."""

    def __init__(self):
        self.began = time.perf_counter()
        self.ends = []
        self.events = []
        self.peak_before = 0
        self.start = None
        self.watching = None

    def watch_for_the_first_step(self):
        """Measures the time from the start of the process to the first forward pass of a model in training mode."""

        def note(module, _):
            if self.start is None and module.training and torch.is_grad_enabled():
                self.start = time.time() - psutil.Process().create_time()
                self.watching.remove()

        self.watching = register_module_forward_pre_hook(note)

    def end_of_step(self, *_):
        self.ends.append(time.perf_counter())
        if self.start is None:  # the script has no model in training mode
            self.start = time.time() - psutil.Process().create_time()
        if not torch.cuda.is_initialized():
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)
        if len(self.events) == 1:  # the memory of loading and encoding is not part of the memory of the steps
            self.peak_before = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def figures(self):
        """Returns the seconds of each step after the first, their median, and the GPU memory of these steps and its peak."""
        if len(self.ends) < 2:
            sys.exit(
                f"inside.py: The script made {len(self.ends)} optimizer steps. At least 2 are needed to time a step."
            )
        figures = {"first_step_after": self.ends[0] - self.began, "start": self.start}
        seconds = [after - before for before, after in itertools.pairwise(self.ends)]
        if self.events:
            torch.cuda.synchronize()
            seconds = [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(self.events)]
            most = torch.cuda.max_memory_allocated()
            figures |= {"memory_gib": most / 2**30, "peak_memory_gib": max(most, self.peak_before) / 2**30}
        return figures | {"median": settled_median(seconds), "step_seconds": seconds}


def launches(function):
    """Whether an operator does work on the device. Views and the operators of `NOTHING` do not."""
    returns = [returned.alias_info for returned in function._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in returns)
    return not view and function.overloadpacket.__name__ not in NOTHING


class Counter(TorchDispatchMode):
    """Counts the operators of each step, without those of the data loader, which runs on the CPU ahead of the step."""

    def __init__(self):
        super().__init__()
        self.operators = collections.Counter()
        self.flops = 0
        self.loading = False
        self.steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not self.loading:
            packet = function.overloadpacket
            self.operators[packet.__name__] += launches(function)
            if packet in FORMULAS:
                self.flops += FORMULAS[packet](*args, **kwargs, out_val=out)
        return out

    def end_of_step(self, *_):
        self.steps.append({"operators": +self.operators, "flops": self.flops})
        self.operators, self.flops = collections.Counter(), 0

    def figures(self):
        """Returns the operators and the floating-point operations of the last step."""
        if not self.steps:
            sys.exit("inside.py: The script made no optimizer step, so no operators can be counted.")
        return self.steps[-1]

    def leave_out_loading(self):
        """Does not count operators while a data loader loads a batch."""
        loader = torch.utils.data.dataloader._BaseDataLoaderIter

        def load(iterator, inner=loader.__next__):
            self.loading = True
            try:
                return inner(iterator)
            finally:
                self.loading = False

        loader.__next__ = load


def run_script(script, words, after_step):
    """Runs a script as `python SCRIPT WORDS...` does, and calls `after_step` after each optimizer step."""
    register_optimizer_step_post_hook(after_step)
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def matrix_rate(precision, device, side, repeats):
    """Returns the floating-point operations per second of a product of two square matrices, as the median of the repeats.

    "tf32" is float32 with TF32 allowed. The matrices are random, because a product of zeros would be faster: it takes less
    power, so that the clock rate of the GPU rises.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    clock = Clock()
    for _ in range(repeats):
        torch.mm(a, b)
        clock.end_of_step()
    return 2 * side**3 / clock.figures()["median"]


def processor_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device):
    """Returns the names and versions of the device and its software, and the number of threads on a CPU."""
    described = {
        "device": processor_name(),
        "kind": device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cpu":
        return described | {"threads": torch.get_num_threads()}
    described |= {
        "device": torch.cuda.get_device_name(device),
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        described["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    return described


def rates(precisions):
    """Returns a description of the machine, and its matrix rate in each precision."""
    # The root of the checkout is added here and not at import, so that a timed script imports its own package.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from accelerate.utils import parse_flag_from_env

    from text_to_image_lora.libraries import num_cpu_threads

    device = torch.device(
        "cuda" if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"
    )
    size = dict(side=8192, repeats=50)
    if device.type == "cpu":
        torch.set_num_threads(num_cpu_threads(None, os.environ, alone=True))
        size = dict(side=2048, repeats=6)
    return {"machine": machine(device), "rates": {name: matrix_rate(name, device, **size) for name in precisions}}


def main(how, *words):
    if how == "rate":
        figures = rates(words)
    elif how == "time":
        script, *flags = words
        clock = Clock()
        clock.watch_for_the_first_step()
        run_script(script, flags, clock.end_of_step)
        figures = clock.figures()
    else:
        script, *flags = words
        counter = Counter()
        counter.leave_out_loading()
        with counter:
            run_script(script, flags, counter.end_of_step)
        figures = counter.figures()
    if os.environ.get("RANK", "0") == "0":
        print("\nBENCHMARK " + json.dumps(figures), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("time", "count", "rate"):
        sys.exit(__doc__)
    main(*sys.argv[1:])

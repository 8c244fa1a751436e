#!/usr/bin/env python
"""Looks at a training script from inside its process; scripts/benchmark.py runs it.

    python scripts/benchmarks/inside.py time SCRIPT FLAGS...
    python scripts/benchmarks/inside.py count SCRIPT FLAGS...
    python scripts/benchmarks/inside.py rate bf16 tf32

`time` and `count` run a script with its flags and are called at the end of each of its optimizer's steps: `time` notes
when that was, and what memory of the GPU the steps took; `count` what operators the last step dispatched, and their
floating-point operations. `rate` tells the device's name, and how fast it multiplies large matrices. Each prints at the
end one line, BENCHMARK and a JSON object; of several processes, the first alone does.
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
NOTHING = {
    "_unsafe_view", "detach", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh",
    "is_same_size", "resize_", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
# PyTorch's formulas, and those of operators that it passes over.
FORMULAS = flop_registry | {
    aten.addmm_: addmm_flop,
    aten.baddbmm_: baddbmm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


def middle(seconds):
    """The median without the first fifth, in which caches fill and clocks rise."""
    return statistics.median(seconds[len(seconds) // 5 :])


class Clock:
    """When each step ended: by the host's clock or, on a GPU, by events in its stream, which are read after the last."""

    def __init__(self):
        self.began = time.perf_counter()
        self.ends = []
        self.events = []
        self.peak_before = 0
        self.start = None
        self.watching = None

    def watch_for_the_first_step(self):
        """Notes how long after the process began a model in training first ran."""

        def note(module, _):
            if self.start is None and module.training and torch.is_grad_enabled():
                self.start = time.time() - psutil.Process().create_time()
                self.watching.remove()

        self.watching = register_module_forward_pre_hook(note)

    def end_of_step(self, *_):
        self.ends.append(time.perf_counter())
        if self.start is None:  # its model is not in training mode
            self.start = time.time() - psutil.Process().create_time()
        if not torch.cuda.is_initialized():
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)
        if len(self.events) == 1:  # what loading and encoding took is another thing than what steps take
            self.peak_before = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def told(self):
        """Seconds of each step but the first, and their median; memory of the GPU in these steps, and the most at all."""
        if len(self.ends) < 2:
            sys.exit(f"a step can't be timed: the optimizer's was seen {len(self.ends)} times, and 2 are needed")
        told = {"first_step_after": self.ends[0] - self.began, "start": self.start}
        seconds = [after - before for before, after in itertools.pairwise(self.ends)]
        if self.events:
            torch.cuda.synchronize()
            seconds = [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(self.events)]
            most = torch.cuda.max_memory_allocated()
            told |= {"memory_gib": most / 2**30, "peak_memory_gib": max(most, self.peak_before) / 2**30}
        return told | {"median": middle(seconds), "step_seconds": seconds}


def launches(function):
    """Whether an operator does something on the device: views don't."""
    returns = [returned.alias_info for returned in function._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in returns)
    return not view and function.overloadpacket.__name__ not in NOTHING


class Counter(TorchDispatchMode):
    """What each step dispatched, without what the data loader does, which is the CPU's and ahead of the step."""

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

    def told(self):
        if not self.steps:
            sys.exit("a step can't be counted: the optimizer's was not seen")
        return self.steps[-1]

    def leave_out_loading(self):
        loader = torch.utils.data.dataloader._BaseDataLoaderIter

        def load(iterator, inner=loader.__next__):
            self.loading = True
            try:
                return inner(iterator)
            finally:
                self.loading = False

        loader.__next__ = load


def run_script(script, words, watch):
    """Runs a script as `python SCRIPT WORDS...` does, and calls `watch` after each step of its optimizer."""
    register_optimizer_step_post_hook(watch)
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def matrix_rate(precision, device, side, repeats):
    """Floating-point operations a second of a product of two square matrices of random numbers: the median of several.

    tf32 is float32 as the GPU takes it where TF32 is allowed. Of zeros the product would be faster than of real numbers:
    they take less power, and the clock rises.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    clock = Clock()
    for _ in range(repeats):
        torch.mm(a, b)
        clock.end_of_step()
    return 2 * side**3 / clock.told()["median"]


def processor_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device):
    """What was measured on: names, versions, and how many threads compute."""
    told = {
        "device": processor_name(),
        "kind": device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cpu":
        return told | {"threads": torch.get_num_threads()}
    told |= {
        "device": torch.cuda.get_device_name(device),
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    return told


def rates(precisions):
    """The machine, and its matrix rate in each precision; what it can't multiply in is left out."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # here, so that a timed script finds its own package
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
        told = rates(words)
    elif how == "time":
        script, *flags = words
        clock = Clock()
        clock.watch_for_the_first_step()
        run_script(script, flags, clock.end_of_step)
        told = clock.told()
    else:
        script, *flags = words
        counter = Counter()
        counter.leave_out_loading()
        with counter:
            run_script(script, flags, counter.end_of_step)
        told = counter.told()
    if os.environ.get("RANK", "0") == "0":
        print("\nBENCHMARK " + json.dumps(told), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("time", "count", "rate"):
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""Measures everything that needs a GPU, and writes a section for docs/performance.md (`benchmark.py --suite gpu`).

Each row of the table is a command. The rows are measured in the order of their importance, until the time limit. A row that
can't be measured, because of an unknown flag, a missing package or too little memory, states the reason.
"""

import importlib.util
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from .runs import Command, CommandFailed, matrix_rates, other_scripts, prepare, write_json


STEPS = 60  # per row; the first fifth is left out of the median
PICTURES = 64  # size of the dataset: full batches up to this batch size
PLAIN = "bf16"
NO_TIME = "not measured: the time limit was reached"
# (title, one row, another row): the ratio of the times of their steps.
RATIOS = (
    ("ours / bare UNet", PLAIN, "bf16, bare UNet"),
    ("baseline / ours", "bf16, baseline", PLAIN),
    ("xformers / PyTorch's own attention", "bf16, xformers", PLAIN),
)


class Row(NamedTuple):
    """A command to measure; `flags` are those that not all rows have."""

    name: str
    flags: tuple[str, ...] = ()
    precision: str = "bf16"
    batch_size: int = 1  # per process
    runner: str = "ours"  # or "bare UNet" or "baseline"
    processes: int = 1
    needs: str | None = None  # a Python package
    how: str = "time"  # or "count"
    growing: bool = False  # part of the series of increasing batch sizes

    @property
    def command(self):
        return Command(self.runner, self.how, self.precision, self.batch_size, self.processes, self.flags)

    @property
    def rate(self):
        """The name of the matrix rate that its MFU refers to."""
        float32 = "fp32" if "--no-allow_tf32" in self.flags else "tf32"
        return float32 if self.precision == "no" else self.precision


class Outcome(NamedTuple):
    """The result of a row, or the reason why it was not measured."""

    row: Row
    result: Any = None  # a `Result`, or None
    reason: str = ""

    @property
    def images_per_second(self):
        return self.row.batch_size * self.row.processes / self.result.figures["median"]


def rows_for(num_gpus=1, baseline=False):
    """Returns the rows, the most important first."""
    checkpointed, xformers = "--gradient_checkpointing", "--enable_xformers_memory_efficient_attention"
    theirs = [Row("bf16, baseline", runner="baseline"), Row("baseline's operators", runner="baseline", how="count")]
    return [
        Row("operators", how="count"),  # also fills the cache for the next rows
        Row(PLAIN),
        Row("bf16, bare UNet", runner="bare UNet"),
        Row("bare UNet's operators", runner="bare UNet", how="count"),
        *(theirs if baseline else []),
        Row("bf16, gradient checkpointing", (checkpointed,)),
        Row("bf16, --compile blocks", ("--compile", "blocks")),
        Row("bf16, --compile graphs", ("--compile", "graphs")),
        *(Row(f"bf16, batch {size}", batch_size=size, growing=True) for size in (2, 4, 8, 16, 32)),
        *(Row(f"bf16, {count} GPUs", processes=count) for count in (2, 4, 8) if count <= num_gpus),
        Row("fp16", precision="fp16"),
        Row(
            "fp16, gradient checkpointing, 8-bit Adam", (checkpointed, "--use_8bit_adam"), "fp16", needs="bitsandbytes"
        ),
        Row("bf16, --compile full", ("--compile", "full")),
        Row("fp32, --allow_tf32", precision="no"),
        Row("fp32, --no-allow_tf32", ("--no-allow_tf32",), precision="no"),
        Row("bf16, xformers", (xformers,), needs="xformers"),
        Row(f"{PLAIN}, once more", ()),  # shows how much the speed of the machine has changed meanwhile
    ]


def why_not(row):
    """Returns the reason why a row can't be measured on this machine, as far as it is known before it is run, or None."""
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        return f"{row.needs} is not installed"
    if row.runner == "ours":
        from text_to_image_lora.errors import InputError
        from train_text_to_image_lora import build_parser

        try:
            build_parser().parse_args(list(row.flags))
        except InputError as error:
            return "left out: " + re.split(r"\. | \(choose", str(error))[0].rstrip(".")
    return None


def measure_rows(rows, setting, deadline, *, steps=STEPS, show=print):
    """Returns the `Outcome` of each row. Rows that are not finished at `deadline` (of `time.monotonic`) have no result."""
    outcomes = []
    fastest = 0.0
    grows = True
    for row in rows:
        left = deadline - time.monotonic()
        result, reason = None, why_not(row)
        if reason is None and left <= 0:
            reason = NO_TIME
        elif reason is None and row.growing and not grows:
            reason = "not measured: the previous batch size was not faster, or did not fit into memory"
        elif reason is None:
            try:
                result = setting.run(row.command, steps=steps if row.how == "time" else 3, timeout=left)
            except CommandFailed as error:
                reason = "out of memory" if error.out_of_memory else f"failed: {error}"
                if time.monotonic() >= deadline:
                    reason = NO_TIME
        outcomes.append(Outcome(row, result, reason or ""))
        if result is not None and row.how == "time" and (row.growing or row.name == PLAIN):
            images = outcomes[-1].images_per_second
            fastest, grows = max(fastest, images), images > fastest
        elif row.growing:
            grows = False
        show(f"{row.name}: {reason or f'{result.seconds:.0f} s'}", flush=True)
    return outcomes


def table_of(outcomes, rates):
    """Returns the timed rows as a Markdown table.

    MFU is the number of floating-point operations per second, divided by the matrix rate. The operations of a row of ours
    are those of the plain step times the batch size, so that what gradient checkpointing computes twice counts once. For
    the bare UNet and the baseline, their own operations are counted.
    """
    counted = {
        o.row.runner: o.result.figures["flops"] / o.row.batch_size
        for o in outcomes
        if o.row.how == "count" and o.result
    }
    lines = [
        "| run | s/step | images/s | MFU | memory during the steps (GiB) | peak memory (GiB) | first step after (s) |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        row, result = outcome.row, outcome.result
        if row.how != "time":
            continue
        if result is None:
            lines.append(f"| {row.name} | {outcome.reason.replace('|', '/')} | | | | | |")
            continue
        flops, rate, step = counted.get(row.runner), rates.get(row.rate), result.figures["median"]
        mfu = f"{flops * row.batch_size / step / rate:.1%}" if flops and rate else ""
        lines.append(
            f"| {row.name} | {step:.3g} | {outcome.images_per_second:.3g} | {mfu} | {result.memory_gib:.2f} | "
            f"{result.peak_memory_gib:.2f} | {result.figures['first_step_after']:.0f} |"
        )
    return "\n".join(lines)


def findings_of(outcomes):
    """Returns sentences on what the rows show together: ratios, the best batch size, several GPUs, and operators."""
    timed = [o for o in outcomes if o.row.how == "time" and o.result]
    step, sentences = {o.row.name: o.result.figures["median"] for o in timed}, []
    for name, one, other in RATIOS:
        if one in step and other in step:
            sentences.append(f"{name}: {step[one] / step[other]:.2f}.")
    growing = [o for o in timed if o.row.growing or o.row.name == PLAIN]
    if growing:
        best = max(growing, key=lambda o: o.images_per_second)
        sentences.append(f"Best batch size: {best.row.batch_size}, with {best.images_per_second:.3g} images/s.")
    for o in timed:
        if o.row.processes > 1 and PLAIN in step:
            times = o.images_per_second * step[PLAIN]
            sentences.append(f"{o.row.processes} GPUs train {times:.2f} times as many images per second as one.")
    for o in outcomes:
        if o.row.how == "count":
            text = o.reason
            if o.result:
                operators, flops = sum(o.result.figures["operators"].values()), o.result.figures["flops"]
                text = f"{operators:,} operators and {flops / 1e12:.3g} TFLOP per step"
            sentences.append(f"{o.row.runner}: {text}.")
    return sentences


def compare_ranks(setting, deadline, *, steps=STEPS, precision="bf16"):
    """Returns a sentence on how the losses of two processes differ from those of one process with twice the batch size."""
    title = "Two processes compared with one process with twice the batch size"
    losses = []
    try:
        for processes in (1, 2):
            left = deadline - time.monotonic()
            if left <= 0:
                return f"{title}: {NO_TIME}."
            command = Command(precision=precision, batch_size=2 // processes, processes=processes)
            setting.run(command, steps=steps, timeout=left)
            lines = (setting.output_of("ours") / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["train_loss"] for line in lines])
    except CommandFailed as error:
        return f"{title}: failed: {error}."
    largest = max(abs(one - two) / one for one, two in zip(*losses, strict=True))
    return f"{title}, {steps} steps in {precision}: the losses differ by at most {largest:.2g} times their value."


def section_of(command, machine, rates, outcomes, sentences, setting, steps=STEPS):
    """Returns the section for docs/performance.md in Markdown."""
    versions = f"PyTorch {machine['torch']}" + (f", driver {machine['driver']}" if machine.get("driver") else "")
    rate = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in rates.items())
    model = "Stable Diffusion v1.5's geometry, random weights" if setting.model.name == "sd15" else setting.model.name
    return f"""### {machine["device"]}, {versions}

The command was `{command}`: {model}, {setting.resolution}², rank {setting.rank}, batch size 1 unless the row names another
one, {steps} steps per row. Steps are timed with CUDA events; the time is the median without the first fifth of the steps.
Memory is the memory allocated by PyTorch. MFU is the number of floating-point operations per second (of our rows, those of
the plain step), divided by the rate of a large matrix product in the precision of the row, measured in the same command
(TFLOP/s): {rate}.

{table_of(outcomes, rates)}

{chr(10).join(f"- {sentence}" for sentence in sentences)}
"""


def check_for_gpu():
    """Exits with code 2 and a message of one line if PyTorch sees no CUDA GPU."""
    import torch

    if not torch.cuda.is_available():
        print(
            "benchmark.py: --suite gpu needs a CUDA GPU, and PyTorch sees none. Install a CUDA build of PyTorch on a machine "
            "with one, or leave --suite out to time steps on this machine.",
            file=sys.stderr,
        )
        sys.exit(2)


def run_suite(args, work):
    """Measures the rows, prints the section, and writes it and the measured times to the files that `args` name."""
    import torch

    deadline, num_gpus = time.monotonic() + 60 * args.minutes, torch.cuda.device_count()
    machine, rates = matrix_rates(["bf16", "fp16", "tf32", "fp32"])
    others = other_scripts(bare_unet=True, baseline=args.baseline, baseline_flags=args.baseline_flags)
    setting = prepare(args.model, work, resolution=args.resolution, rank=args.rank, batch_size=PICTURES, others=others)
    outcomes = measure_rows(rows_for(num_gpus, args.baseline is not None), setting, deadline)
    sentences = findings_of(outcomes)
    if num_gpus > 1:
        sentences.append(compare_ranks(setting, deadline))
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    section = section_of(command, machine, rates, outcomes, sentences, setting)
    print("\n" + section)
    if args.markdown is not None:
        Path(args.markdown).write_text(section, encoding="utf-8")
    rows = [{**o.row._asdict(), "reason": o.reason, "result": o.result and o.result._asdict()} for o in outcomes]
    write_json(args.json, {"machine": machine, "matrix_rates": rates, "rows": rows, "findings": sentences}, args)

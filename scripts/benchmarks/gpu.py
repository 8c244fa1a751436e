"""All that only a GPU can tell, as one section for docs/performance.md: `python scripts/benchmark.py --suite gpu`.

A row of a table is a command of its own. Rows stand in the order of their importance: when the time is spent, the rest is
left out. What a row can't do here (a flag that isn't there, a package, memory) is said in its place.
"""

import importlib.util
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from .runs import Command, CommandFailed, matrix_rates, others, prepare, write_json


STEPS = 60  # a row's; the first fifth is left out of the median
PICTURES = 64  # whole batches up to this size
PLAIN = "bf16"
# What is said of two rows' steps: in words, the one, the other.
RATIOS = (
    ("ours / bare UNet", PLAIN, "bf16, bare UNet"),
    ("baseline / ours", "bf16, baseline", PLAIN),
    ("xformers / PyTorch's own attention", "bf16, xformers", PLAIN),
)


class Row(NamedTuple):
    """A command to measure, beside the flags that all have."""

    name: str
    flags: tuple[str, ...] = ()
    precision: str = "bf16"
    batch_size: int = 1  # of each process
    runner: str = "ours"  # or bare UNet, or baseline
    processes: int = 1
    needs: str | None = None  # a Python package
    how: str = "time"  # or count
    growing: bool = False  # one of the ever larger batches

    @property
    def command(self):
        return Command(self.runner, self.how, self.precision, self.batch_size, self.processes, self.flags)

    @property
    def rate(self):
        """The matrix rate that its arithmetic is held against."""
        float32 = "fp32" if "--no-allow_tf32" in self.flags else "tf32"
        return float32 if self.precision == "no" else self.precision


class Outcome(NamedTuple):
    """What became of a row: numbers, or in words why there are none."""

    row: Row
    ran: Any = None  # the `Ran`
    words: str = ""

    @property
    def images_per_second(self):
        return self.row.batch_size * self.row.processes / self.ran.told["median"]


def rows_for(num_gpus=1, baseline=False):
    """The rows, the most important first."""
    checkpointed, xformers = "--gradient_checkpointing", "--enable_xformers_memory_efficient_attention"
    theirs = [Row("bf16, baseline", runner="baseline"), Row("baseline's operators", runner="baseline", how="count")]
    return [
        Row("operators", how="count"),  # fills the cache for the next
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
        Row(f"{PLAIN}, once more", ()),  # how far the machine has drifted
    ]


def why_not(row):
    """In words why a row can't be measured here, as far as that can be told before it is tried; else None."""
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


def measure_rows(rows, setting, deadline, *, steps=STEPS, say=print):
    """The `Outcome` of each row; what is not done at `deadline` (of `time.monotonic`) is not measured."""
    outcomes = []
    fastest = 0.0
    grows = True
    for row in rows:
        left = deadline - time.monotonic()
        ran, words = None, why_not(row)
        if words is None and left <= 0:
            words = "not measured: the time was spent"
        elif words is None and row.growing and not grows:
            words = "not measured: the batch before it was no faster, or did not fit"
        elif words is None:
            try:
                ran = setting.run(row.command, steps=steps if row.how == "time" else 3, timeout=left)
            except CommandFailed as error:
                words = "out of memory" if error.out_of_memory else f"failed: {error}"
                if time.monotonic() >= deadline:
                    words = "not measured: the time was spent"
        outcomes.append(Outcome(row, ran, words or ""))
        if ran is not None and row.how == "time" and (row.growing or row.name == PLAIN):
            images = outcomes[-1].images_per_second
            fastest, grows = max(fastest, images), images > fastest
        elif row.growing:
            grows = False
        say(f"{row.name}: {words or f'{ran.seconds:.0f} s'}", flush=True)
    return outcomes


def table_of(outcomes, rates):
    """The Markdown table of the rows that are timed.

    MFU holds a step's arithmetic against the matrix rate: the bare UNet's own, the baseline's own, and for all rows of
    ours that of the plain step, times the batch. What checkpointing computes twice is thereby no work done.
    """
    counted = {
        o.row.runner: o.ran.told["flops"] / o.row.batch_size for o in outcomes if o.row.how == "count" and o.ran
    }
    lines = [
        "| run | s/step | images/s | MFU | memory in the steps (GiB) | peak memory (GiB) | first step after (s) |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        row, ran = outcome.row, outcome.ran
        if row.how != "time":
            continue
        if ran is None:
            lines.append(f"| {row.name} | {outcome.words.replace('|', '/')} | | | | | |")
            continue
        flops, rate = counted.get(row.runner), rates.get(row.rate)
        mfu = f"{flops * row.batch_size / ran.told['median'] / rate:.1%}" if flops and rate else ""
        lines.append(
            f"| {row.name} | {ran.told['median']:.3g} | {outcome.images_per_second:.3g} | {mfu} | {ran.memory_gib:.2f} | "
            f"{ran.peak_memory_gib:.2f} | {ran.told['first_step_after']:.0f} |"
        )
    return "\n".join(lines)


def findings_of(outcomes):
    """What the rows say together: ratios, the best batch, operators, and what further GPUs bring; a sentence each."""
    timed = [o for o in outcomes if o.row.how == "time" and o.ran]
    step, sentences = {o.row.name: o.ran.told["median"] for o in timed}, []
    for name, one, other in RATIOS:
        if one in step and other in step:
            sentences.append(f"{name}: {step[one] / step[other]:.2f}.")
    growing = [o for o in timed if o.row.growing or o.row.name == PLAIN]
    if growing:
        best = max(growing, key=lambda o: o.images_per_second)
        sentences.append(f"Best batch: {best.row.batch_size}, {best.images_per_second:.3g} images/s.")
    for o in timed:
        if o.row.processes > 1 and PLAIN in step:
            times = o.images_per_second * step[PLAIN]
            sentences.append(f"{o.row.processes} GPUs train {times:.2f} times the images of one.")
    for o in outcomes:
        if o.row.how == "count":
            told = o.words or (
                f"{sum(o.ran.told['operators'].values()):,} operators and {o.ran.told['flops'] / 1e12:.3g} TFLOP a step"
            )
            sentences.append(f"{o.row.runner}: {told}.")
    return sentences


def compare_ranks(setting, deadline, *, steps=STEPS, precision="bf16"):
    """A sentence: by how much the losses of two processes differ from those of one with twice the batch."""
    losses = []
    try:
        for processes in (1, 2):
            left = deadline - time.monotonic()
            if left <= 0:
                return "Two processes beside one with twice the batch: not measured: the time was spent."
            command = Command(precision=precision, batch_size=2 // processes, processes=processes)
            setting.run(command, steps=steps, timeout=left)
            lines = (setting.output_of("ours") / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["train_loss"] for line in lines])
    except CommandFailed as error:
        return f"Two processes beside one with twice the batch: failed: {error}."
    furthest = max(abs(one - two) / one for one, two in zip(*losses, strict=True))
    return (
        f"Two processes beside one with twice the batch, {steps} steps in {precision}: the losses differ by at most "
        f"{furthest:.2g} of the loss."
    )


def section_of(command, machine, rates, outcomes, sentences, setting, steps=STEPS):
    """The section, in Markdown."""
    versions = f"PyTorch {machine['torch']}" + (f", driver {machine['driver']}" if machine.get("driver") else "")
    rate = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in rates.items())
    model = "Stable Diffusion v1.5's geometry, random weights" if setting.model.name == "sd15" else setting.model.name
    return f"""### {machine["device"]}, {versions}

`{command}`: {model}, {setting.resolution}², rank {setting.rank}, batch 1 where no other is named, {steps} steps a row.
Steps are timed by events on the GPU, the median without the first fifth; memory is what PyTorch has allocated. MFU holds
the arithmetic of a step (of ours, the plain one's with the LoRA's; of the others, all that they compute) against the rate
of a large matrix product in the row's precision, measured in the same run (TFLOP/s): {rate}.

{table_of(outcomes, rates)}

{chr(10).join(f"- {sentence}" for sentence in sentences)}
"""


def check_for_gpu():
    """Ends with exit code 2 and one line where there is no CUDA GPU."""
    import torch

    if not torch.cuda.is_available():
        print(
            "benchmark.py: --suite gpu needs a CUDA GPU, and PyTorch sees none. Install a CUDA build of PyTorch on a machine "
            "with one, or leave --suite out to time steps on this machine.",
            file=sys.stderr,
        )
        sys.exit(2)


def run_suite(args, work):
    """Measures the rows, prints the section, and writes it and the raw times where `args` want them."""
    import torch

    deadline, num_gpus = time.monotonic() + 60 * args.minutes, torch.cuda.device_count()
    machine, rates = matrix_rates(["bf16", "fp16", "tf32", "fp32"])
    beside = others(bare_unet=True, baseline=args.baseline, baseline_flags=args.baseline_flags)
    setting = prepare(args.model, work, resolution=args.resolution, rank=args.rank, batch_size=PICTURES, beside=beside)
    outcomes = measure_rows(rows_for(num_gpus, args.baseline is not None), setting, deadline)
    sentences = findings_of(outcomes)
    if num_gpus > 1:
        sentences.append(compare_ranks(setting, deadline))
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    section = section_of(command, machine, rates, outcomes, sentences, setting)
    print("\n" + section)
    if args.markdown is not None:
        Path(args.markdown).write_text(section, encoding="utf-8")
    rows = [{**o.row._asdict(), "words": o.words, "ran": o.ran and o.ran._asdict()} for o in outcomes]
    write_json(args.json, {"machine": machine, "matrix_rates": rates, "rows": rows, "findings": sentences}, args)

#!/usr/bin/env python
"""Measures the speed and memory of training: its steps, datasets of many pictures, or everything that needs a GPU.

    python scripts/benchmark.py --resolution 256 --mixed_precision bf16 --bare_unet \
        --baseline PATH/TO/train_text_to_image_lora.py
    python scripts/benchmark.py --count_kernels --mixed_precision bf16 --baseline PATH/TO/train_text_to_image_lora.py
    python scripts/benchmark.py --dataset_sizes 1000 10000 100000
    python scripts/benchmark.py --suite gpu --markdown gpu.md

Steps are measured on the geometry of Stable Diffusion v1.5 with random weights. In each turn, every script makes a short
and a long run. The time per step is measured in two ways: inside the process, between the ends of optimizer steps, and
from outside, as the difference between the two runs divided by the difference of their steps. Both are medians, and a ratio
is the median of the ratios of all turns. The start is the time from the command to the first forward pass of its first step.

Before the first turn, each script runs once untimed. This run fills its cache, and the operators that its last step
dispatches are counted, because at batch size 1 a GPU waits for each operator to be launched. Views, which launch nothing,
and the operators of the data loader are not counted. MFU is the number of floating-point operations of a step, counted in
this run, divided by the time per step and by the rate of a large matrix product in the same precision, which is measured in
each turn.

Datasets consist of small pictures for the embedded base model. For each dataset, the script times a --dry_run, a run of one
step that fills the cache, a run of one step that finds the cache filled, and a run of many steps. Machines are noisy, so look
at the ratios.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

import argparse
import tempfile

from scripts.benchmarks.many_pictures import time_datasets
from scripts.benchmarks.runs import CommandFailed, other_scripts, prepare
from scripts.benchmarks.steps import count_kernels, time_steps
from text_to_image_lora.errors import Stopped
from text_to_image_lora.training import interruption


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--suite",
        choices=["gpu"],
        help="gpu: measure everything that needs a GPU, and print a section for docs/performance.md",
    )
    add(
        "--dataset_sizes",
        type=int,
        nargs="+",
        help="time datasets with these numbers of 64x64 pictures instead of steps",
    )
    add("--count_kernels", action="store_true", help="count the operators of a step instead of timing steps")
    add("--model", type=Path, help="diffusers folder (default: SD1.5's geometry with random weights)")
    add("--bare_unet", action="store_true", help="also time the UNet alone, forward and backward to its input")
    add("--baseline", type=Path, help="another training script that takes the flags of the diffusers example")
    add("--resolution", type=int, default=512, help="resolution of the pictures")
    add("--train_batch_size", type=int, default=1, help="batch size per process")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="precision of the frozen base model")
    add("--rank", type=int, default=16, help="rank of the LoRA; the baseline chooses its target modules itself")
    add("--short", type=int, default=2, help="number of steps of the short run")
    add("--long", type=int, default=8, help="number of steps of the long run")
    add("--repeats", type=int, default=3, help="number of turns; each turn is a short and a long run of every script")
    add(
        "--minutes",
        type=float,
        default=18,
        help="time limit of --suite; rows that are not finished by then are left out",
    )
    add("--json", type=Path, help="write all measurements, including every measured time, to this file")
    add("--markdown", type=Path, help="write the section of --suite to this file")
    add("--work_dir", type=Path, help="folder for the model, pictures and cache (default: deleted at the end)")
    add(
        "--baseline_flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="flags for the baseline only; must be the last flag of the command line",
    )
    return parser.parse_args(argv)


def main(args):
    if args.suite:
        from scripts.benchmarks import gpu

        gpu.check_for_gpu()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work_dir or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        try:
            if args.suite:
                gpu.run_suite(args, work)
            elif args.dataset_sizes:
                time_datasets(args, work)
            elif args.count_kernels:
                count_kernels(args, setting_of(args, work))
            else:
                time_steps(args, setting_of(args, work))
        except CommandFailed as error:
            sys.exit(f"{error.output}\n\nA command failed: {error}")


def setting_of(args, work):
    others = other_scripts(bare_unet=args.bare_unet, baseline=args.baseline, baseline_flags=args.baseline_flags)
    return prepare(
        args.model, work, resolution=args.resolution, rank=args.rank, batch_size=args.train_batch_size, others=others
    )


if __name__ == "__main__":
    args = parse_args()
    interruption.listen()  # a signal now ends the running command, and temporary folders are deleted
    try:
        main(args)
    except (Stopped, KeyboardInterrupt) as stopped:
        print("\nbenchmark.py: interrupted", file=sys.stderr)
        sys.exit(getattr(stopped, "exit_code", 130))

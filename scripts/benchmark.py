#!/usr/bin/env python
"""Times training: steps, beside another script with the same flags; datasets of many pictures; all that a GPU can tell.

    python scripts/benchmark.py --resolution 256 --mixed_precision bf16 --bare_unet \
        --baseline PATH/TO/train_text_to_image_lora.py
    python scripts/benchmark.py --count_kernels --mixed_precision bf16 --baseline PATH/TO/train_text_to_image_lora.py
    python scripts/benchmark.py --dataset_sizes 1000 10000 100000
    python scripts/benchmark.py --suite gpu --markdown gpu.md

Steps are of Stable Diffusion v1.5's geometry (random weights). Each script is run short and long, in turn, and a step is
timed in two ways: from inside, between the ends of the optimizer's steps; and as the difference of the two commands over
the steps between. Both are medians, and a ratio is the median of the turns' ratios. The start is the time from the
command to the first forward pass of its first step. Before, each script is run once untimed: its cache is filled, and what its last step dispatches is
counted, on any device: at batch 1 a GPU waits for each operator to be launched. Views launch nothing and are not
counted, nor is what the data loader does. MFU holds the floating-point operations of a script's own step, counted there
too, against the rate of a large matrix product in the same precision, measured in each turn.

Datasets are small pictures for the embedded base: a --dry_run, a run of one step that encodes them, and another that
finds them in the cache. Machines are noisy: read the ratios.
"""

import argparse
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from scripts.benchmarks.many_pictures import time_datasets
from scripts.benchmarks.runs import CommandFailed, others, prepare
from scripts.benchmarks.steps import count_kernels, time_steps


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--suite",
        choices=["gpu"],
        help="gpu: measure all that only a GPU can tell, as a section for docs/performance.md",
    )
    add("--dataset_sizes", type=int, nargs="+", help="time datasets of so many 64x64 pictures instead of steps")
    add("--count_kernels", action="store_true", help="count the operators of a step instead of timing steps")
    add("--model", type=Path, help="a diffusers folder; SD1.5's geometry with random weights is made when not given")
    add("--bare_unet", action="store_true", help="time the model's UNet alone too: forward, and backward to its input")
    add("--baseline", type=Path, help="another training script that takes the diffusers example's flags")
    add("--resolution", type=int, default=512, help="side of the pictures")
    add("--train_batch_size", type=int, default=1, help="pictures a step")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="precision of the frozen base")
    add("--rank", type=int, default=16, help="of the LoRA; the baseline adapts what it adapts")
    add("--short", type=int, default=2, help="steps of the short run")
    add("--long", type=int, default=8, help="steps of the long run")
    add("--repeats", type=int, default=3, help="turns: how often each is run short and long")
    add("--minutes", type=float, default=18, help="time for --suite; what comes later is left out")
    add("--json", type=Path, help="write what was measured, raw times too, to this file")
    add("--markdown", type=Path, help="write the section of --suite to this file")
    add("--work_dir", type=Path, help="keep model, pictures and cache here; else they are deleted at the end")
    add(
        "--baseline_flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="flags for the baseline alone (last on the line)",
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
    beside = others(bare_unet=args.bare_unet, baseline=args.baseline, baseline_flags=args.baseline_flags)
    return prepare(
        args.model, work, resolution=args.resolution, rank=args.rank, batch_size=args.train_batch_size, beside=beside
    )


if __name__ == "__main__":
    main(parse_args())

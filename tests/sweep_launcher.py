"""Replaces the launcher of a sweep, and immediately writes what the training command would write in minutes.

    python tests/sweep_launcher.py train_text_to_image_lora.py --output_dir ... --max_train_steps ...

It resumes from its checkpoint as the training does. Environment variables contain what tests need:
SWEEP_STEP_SECONDS is the time per step. SWEEP_BROKEN is a file; while it exists, trials of rank 4 fail. SWEEP_STOPS_AT is
the step after which a trial stops, as with --max_train_time.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path


def loss_after(step, rank, learning_rate):
    """Returns a relative loss that decreases faster with a larger learning rate, and further with a higher rank."""
    return 1 - (0.3 + 0.01 * rank) * (1 - math.exp(-1000 * learning_rate * step))


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--validation_steps", type=int, default=1)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args, _ = parser.parse_known_args()
    broken = os.environ.get("SWEEP_BROKEN")
    if broken is not None and args.rank == 4 and Path(broken).exists():
        sys.exit("the machine is broken")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    steps = [int(path.name.partition("-")[2]) for path in args.output_dir.glob("checkpoint-*")]
    print("effective batch 2", flush=True)
    if steps:
        print(f"resuming from checkpoint-{max(steps)}", flush=True)
    for step in range(max(steps, default=0) + 1, args.max_train_steps + 1):
        time.sleep(float(os.environ.get("SWEEP_STEP_SECONDS", "0")))
        row = {"step": step, "train_loss": 0.5}
        if step % args.validation_steps == 0 or step == args.max_train_steps:
            row["validation/relative_loss"] = loss_after(step, args.rank, args.learning_rate)
        with open(args.output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        (args.output_dir / f"checkpoint-{step}").mkdir(exist_ok=True)
        if os.environ.get("SWEEP_STOPS_AT") == str(step):
            sys.exit(75)


main()

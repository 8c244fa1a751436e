"""Times datasets of many pictures: how long it takes to read them, to encode them and to find them in the cache."""

import json
import shutil
import sys
from statistics import median

from .. import ROOT
from .runs import TRAINING_SCRIPT, environment, make_pictures, run, write_json


STEPS = 200  # steps of the run that shows whether a step takes longer in a larger dataset


def time_datasets(args, work):
    """Prints and saves the time and peak memory of each command on each dataset, the time per further picture, and per step."""
    many = ["--train_batch_size", 1, "--max_train_steps", STEPS]
    kinds = {"--dry_run": ["--dry_run"], "first run": [], "second run": [], f"{STEPS} steps": many}
    measured, steps = {}, {}
    for count in args.dataset_sizes:
        pictures, output = work / f"pictures-{count}", work / f"out-{count}"
        print(f"making {count} pictures", flush=True)
        make_pictures(pictures, 64, count, "jpg")
        shutil.rmtree(work / f"cache-{count}", ignore_errors=True)
        for kind, flags in kinds.items():
            shutil.rmtree(output, ignore_errors=True)
            command = [
                sys.executable, TRAINING_SCRIPT, "--pretrained_model_name_or_path",
                args.model or ROOT / "models" / "mini-sd", "--train_data_dir", pictures, "--resolution", 64, "--center_crop",
                "--max_train_steps", 1, "--report_to", "none", "--seed", 0, "--output_dir", output,
                "--latent_cache_dir", work / f"cache-{count}", *flags,
            ]  # fmt: skip
            result = measured[kind, count] = run(command, environment())
            print(f"{count} pictures, {kind}: {result.seconds:.1f} s", flush=True)
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        steps[count] = median([1 / line["images_per_second"] for line in lines][STEPS // 5 :])
    print("\n| command | pictures | s | ms for each further picture | peak memory (GiB) |\n|---|---|---|---|---|")
    for kind in kinds:
        before = None
        for count in args.dataset_sizes:
            result = measured[kind, count]
            each = ""
            if before is not None:
                seconds = result.seconds - measured[kind, before].seconds
                each = f"{1000 * seconds / (count - before):.2f}"
            print(f"| {kind} | {count:,} | {result.seconds:.1f} | {each} | {result.peak_memory_gib:.2f} |")
            before = count
    print("\n| pictures | ms per step of batch 1 |\n|---|---|")
    for count, seconds in steps.items():
        print(f"| {count:,} | {1000 * seconds:.1f} |")
    rows = [{"command": kind, "pictures": count, **result._asdict()} for (kind, count), result in measured.items()]
    write_json(args.json, {"datasets": rows, "step_seconds": steps}, args)

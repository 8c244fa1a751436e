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
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from scripts import ROOT
from scripts.benchmarks.runs import (
    TRAINING_SCRIPT,
    CommandFailed,
    environment,
    make_pictures,
    matrix_rates,
    prepare,
    run,
    write_json,
)


STEPS = 200  # of a run that tells whether a step takes longer among many pictures
RATE_OF = {"no": "tf32", "fp16": "fp16", "bf16": "bf16"}  # the rate that a precision is held against
RATIOS = (("ours", "bare UNet"), ("baseline", "ours"))


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
    return prepare(
        args.model, work, resolution=args.resolution, rank=args.rank, batch_size=args.train_batch_size,
        baseline=args.baseline, baseline_flags=args.baseline_flags, bare_unet=args.bare_unet,
    )  # fmt: skip


def count_kernels(args, setting):
    """The operators that a step dispatches, by kind, and its arithmetic."""
    how = dict(steps=3, batch_size=args.train_batch_size, precision=args.mixed_precision)
    counted = {name: setting.run("count", name, **how).told for name in setting.scripts}
    operators = {name: told["operators"] for name, told in counted.items()}
    kinds = sorted(
        {kind for counts in operators.values() for kind in counts}, key=lambda k: -operators["ours"].get(k, 0)
    )
    print(f"| operator | {' | '.join(counted)} |\n|---|{'---|' * len(counted)}")
    print(f"| all | {' | '.join(f'{sum(counts.values()):,}' for counts in operators.values())} |")
    for kind in kinds[:15]:
        print(f"| `{kind}` | {' | '.join(str(counts.get(kind, 0)) for counts in operators.values())} |")
    print("\nTFLOP a step: " + ", ".join(f"{name} {told['flops'] / 1e12:.3g}" for name, told in counted.items()))
    write_json(args.json, {"counted": counted}, args)


def time_steps(args, setting):
    """Times our script and what stands beside it in turns, and prints and writes what came out."""
    how = dict(batch_size=args.train_batch_size, precision=args.mixed_precision)
    counted, turns, rates = {}, [], []
    for name in setting.scripts:
        counted[name] = setting.run("count", name, steps=args.short, **how).told
        print(f"{name}: {sum(counted[name]['operators'].values()):,} operators a step", flush=True)
    for turn in range(args.repeats):
        machine, rate = matrix_rates([RATE_OF[args.mixed_precision]])
        rates += rate.values()
        turns.append({name: {} for name in setting.scripts})
        for steps in (args.short, args.long):
            # There and back, so that a machine that slows down does no one more harm.
            for name in list(setting.scripts)[:: 1 if turn % 2 == 0 else -1]:
                ran = turns[-1][name][steps] = setting.run("time", name, steps=steps, **how)
                step = f"{ran.told['median']:.3g} s/step, {ran.peak_memory_gib:.2f} GiB"
                print(f"{name}: {steps} steps in {ran.seconds:.1f} s, {step}", flush=True)
    results = results_of(turns, counted, rates, args.short, args.long)
    print("\n" + table_of(results, "float32" if args.mixed_precision == "no" else args.mixed_precision))
    write_json(args.json, {"machine": machine, **results}, args)


def results_of(turns, counted, rates, short, long):
    """Medians, memory, rates and ratios of `turns`: in each, of every runner, the `Ran` by the number of steps."""
    rate, runners = median(rates), {}
    for name, told in counted.items():
        runs = [turn[name] for turn in turns]
        steps = [ran[long].told["median"] for ran in runs]
        runners[name] = {
            "step_seconds": median(steps),
            "step_seconds_by_commands": median((r[long].seconds - r[short].seconds) / (long - short) for r in runs),
            "start_seconds": median(ran.told["start"] for r in runs for ran in r.values()),
            "flops": told["flops"],
            "mfu": told["flops"] / median(steps) / rate,
            "operators": sum(told["operators"].values()),
            "operators_by_kind": told["operators"],
            "memory_gib": median(r[long].memory_gib for r in runs),
            "peak_memory_gib": max(ran.peak_memory_gib for r in runs for ran in r.values()),
            "runs": [{"steps": count, **ran._asdict()} for r in runs for count, ran in r.items()],
        }
    ratios = {}
    for one, other in RATIOS:
        if one in runners and other in runners:
            each = [turn[one][long].told["median"] / turn[other][long].told["median"] for turn in turns]
            ratios[f"{one} / {other}"] = {"median": median(each), "turns": each}
    return {"matrix_rate": rate, "matrix_rates": rates, "runners": runners, "ratios": ratios}


def table_of(results, precision):
    """The Markdown table of `results_of`."""
    lines = [
        "| script | s/step | s/step, by whole commands | start (s) | TFLOP/step | MFU | operators | memory in the steps "
        "(GiB) | peak memory (GiB) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["runners"].items():
        lines.append(
            f"| {name} | {row['step_seconds']:.3g} | {row['step_seconds_by_commands']:.3g} | {row['start_seconds']:.1f} | "
            f"{row['flops'] / 1e12:.3g} | {row['mfu']:.1%} | {row['operators']:,} | {row['memory_gib']:.2f} | "
            f"{row['peak_memory_gib']:.2f} |"
        )
    lines += ["", f"Matrix rate ({precision}): {results['matrix_rate'] / 1e12:.3g} TFLOP/s"]
    for name, ratio in results["ratios"].items():
        each = ", ".join(f"{value:.2f}" for value in ratio["turns"])
        lines.append(f"{name}: {ratio['median']:.2f} (turns: {each})")
    return "\n".join(lines)


def time_datasets(args, work):
    """Seconds and peak memory of each command on each dataset, what each further picture cost, and a step's time."""
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
            ran = measured[kind, count] = run(command, environment())
            print(f"{count} pictures, {kind}: {ran.seconds:.1f} s", flush=True)
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        steps[count] = median([1 / line["images_per_second"] for line in lines][STEPS // 5 :])
    print("\n| command | pictures | s | ms for each further picture | peak memory (GiB) |\n|---|---|---|---|---|")
    for kind in kinds:
        before = None
        for count in args.dataset_sizes:
            ran = measured[kind, count]
            each = "" if before is None else f"{1000 * (ran.seconds - before[1]) / (count - before[0]):.2f}"
            print(f"| {kind} | {count:,} | {ran.seconds:.1f} | {each} | {ran.peak_memory_gib:.2f} |")
            before = count, ran.seconds
    print("\n| pictures | ms a step of batch 1 |\n|---|---|")
    for count, seconds in steps.items():
        print(f"| {count:,} | {1000 * seconds:.1f} |")
    rows = [{"command": kind, "pictures": count, **ran._asdict()} for (kind, count), ran in measured.items()]
    write_json(args.json, {"datasets": rows, "step_seconds": steps}, args)


if __name__ == "__main__":
    main(parse_args())

"""Steps of our script and of those beside it, timed in turns or counted; `benchmark.py` calls it."""

from statistics import median

from .runs import Command, matrix_rates, write_json


RATE_OF = {"no": "tf32", "fp16": "fp16", "bf16": "bf16"}  # the rate that a precision is held against
RATIOS = (("ours", "bare UNet"), ("baseline", "ours"))


def count_kernels(args, setting):
    """The operators that a step dispatches, by kind, and its arithmetic."""
    how = dict(batch_size=args.train_batch_size, precision=args.mixed_precision)
    counted = {name: setting.run(Command(name, "count", **how), steps=3).told for name in setting.scripts}
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
    counted = {}
    turns = []
    rates = []
    for name in setting.scripts:
        counted[name] = setting.run(Command(name, "count", **how), steps=args.short).told
        print(f"{name}: {sum(counted[name]['operators'].values()):,} operators a step", flush=True)
    for turn in range(args.repeats):
        machine, rate = matrix_rates([RATE_OF[args.mixed_precision]])
        rates += rate.values()
        ran_of = {name: {} for name in setting.scripts}
        turns.append(ran_of)
        for steps in (args.short, args.long):
            # There and back, so that a machine that slows down does no one more harm.
            for name in list(setting.scripts)[:: 1 if turn % 2 == 0 else -1]:
                ran = ran_of[name][steps] = setting.run(Command(name, "time", **how), steps=steps)
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

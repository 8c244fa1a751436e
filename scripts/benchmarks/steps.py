"""Times the steps of our script and of the other scripts in turns, or counts the operators of a step."""

from statistics import median

from .runs import Command, matrix_rates, write_json


RATE_OF = {"no": "tf32", "fp16": "fp16", "bf16": "bf16"}  # {precision: the matrix rate that MFU refers to}
RATIOS = (("ours", "bare UNet"), ("baseline", "ours"))


def count_kernels(args, setting):
    """Prints and saves the number of operators that a step dispatches, by kind, and its floating-point operations."""
    how = dict(batch_size=args.train_batch_size, precision=args.mixed_precision)
    counted = {name: setting.run(Command(name, "count", **how), steps=3).figures for name in setting.scripts}
    operators = {name: figures["operators"] for name, figures in counted.items()}
    kinds = sorted(
        {kind for counts in operators.values() for kind in counts}, key=lambda k: -operators["ours"].get(k, 0)
    )
    print(f"| operator | {' | '.join(counted)} |\n|---|{'---|' * len(counted)}")
    print(f"| all | {' | '.join(f'{sum(counts.values()):,}' for counts in operators.values())} |")
    for kind in kinds[:15]:
        print(f"| `{kind}` | {' | '.join(str(counts.get(kind, 0)) for counts in operators.values())} |")
    print("\nTFLOP per step: " + ", ".join(f"{name} {each['flops'] / 1e12:.3g}" for name, each in counted.items()))
    write_json(args.json, {"counted": counted}, args)


def time_steps(args, setting):
    """Times our script and the other scripts in turns, and prints and saves the results."""
    how = dict(batch_size=args.train_batch_size, precision=args.mixed_precision)
    counted = {}
    turns = []
    rates = []
    for name in setting.scripts:
        counted[name] = setting.run(Command(name, "count", **how), steps=args.short).figures
        print(f"{name}: {sum(counted[name]['operators'].values()):,} operators per step", flush=True)
    for turn in range(args.repeats):
        machine, rate = matrix_rates([RATE_OF[args.mixed_precision]])
        rates += rate.values()
        results_by_script = {name: {} for name in setting.scripts}
        turns.append(results_by_script)
        for steps in (args.short, args.long):
            # Every second turn is in reverse order, so that a machine that slows down puts no script at a disadvantage.
            for name in list(setting.scripts)[:: 1 if turn % 2 == 0 else -1]:
                result = results_by_script[name][steps] = setting.run(Command(name, "time", **how), steps=steps)
                step = f"{result.figures['median']:.3g} s/step, {result.peak_memory_gib:.2f} GiB"
                print(f"{name}: {steps} steps in {result.seconds:.1f} s, {step}", flush=True)
    results = results_of(turns, counted, rates, args.short, args.long)
    print("\n" + table_of(results, "float32" if args.mixed_precision == "no" else args.mixed_precision))
    write_json(args.json, {"machine": machine, **results}, args)


def results_of(turns, counted, rates, short, long):
    """Returns medians, memory, rates and ratios of the turns. A turn is {runner: {number of steps: `Result`}}."""
    rate, runners = median(rates), {}
    for name, figures in counted.items():
        runs = [turn[name] for turn in turns]
        steps = [run[long].figures["median"] for run in runs]
        runners[name] = {
            "step_seconds": median(steps),
            "step_seconds_by_commands": median((r[long].seconds - r[short].seconds) / (long - short) for r in runs),
            "start_seconds": median(result.figures["start"] for r in runs for result in r.values()),
            "flops": figures["flops"],
            "mfu": figures["flops"] / median(steps) / rate,
            "operators": sum(figures["operators"].values()),
            "operators_by_kind": figures["operators"],
            "memory_gib": median(r[long].memory_gib for r in runs),
            "peak_memory_gib": max(result.peak_memory_gib for r in runs for result in r.values()),
            "runs": [{"steps": count, **result._asdict()} for r in runs for count, result in r.items()],
        }
    ratios = {}
    for one, other in RATIOS:
        if one in runners and other in runners:
            each = [turn[one][long].figures["median"] / turn[other][long].figures["median"] for turn in turns]
            ratios[f"{one} / {other}"] = {"median": median(each), "turns": each}
    return {"matrix_rate": rate, "matrix_rates": rates, "runners": runners, "ratios": ratios}


def table_of(results, precision):
    """Returns the results of `results_of` as a Markdown table and a line for each ratio."""
    lines = [
        "| script | s/step | s/step, by whole commands | start (s) | TFLOP/step | MFU | operators | memory during the steps "
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

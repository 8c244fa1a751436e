#!/usr/bin/env python
"""Trains with many settings and ranks them by the loss on pictures held out.

    python scripts/sweep.py sweep.yaml
    python scripts/sweep.py --sweep_dir sweeps/rank --sweep rank=4,16 train_batch_size=1,4 learning_rate=1e-4..1e-2 \\
        --sampler tpe --num_trials 20 --flags pretrained_model_name_or_path=models/mini-sd train_data_dir=metadata/weapons \\
        resolution=128 validation_split=0.1 validation_steps=50 max_train_steps=300

The trials are Optuna's (https://optuna.org), kept in the sweep's folder. The same command goes on where a sweep stopped:
trials that are done stay done, one that was cut off goes on from its checkpoint. Started several times, on one machine or
on several that share the folder, the workers divide the trials among them; give each its GPU by CUDA_VISIBLE_DEVICES.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from scripts.sweeping import results
from scripts.sweeping.settings import SAMPLERS, SweepError, command_of, settle
from scripts.sweeping.study import claim, has_result, open_study, suggest
from scripts.sweeping.trials import Refused, StoppedItself, run_trial, stop_children
from text_to_image_lora import log
from text_to_image_lora.reports.report_page import FILE as PAGE
from text_to_image_lora.reports.report_page import update_page


MOST_REFUSED = 3  # trials, before the sweep ends because not one can be run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="YAML file with the keys sweep, flags, and any of the options below")
    add("--sweep_dir", type=Path, help="folder of the sweep: trials, tables, pictures")
    add("--sweep", nargs="+", metavar="FLAG=VALUES", help="flags to vary: rank=4,16 or learning_rate=1e-4..1e-2 (log)")
    add("--flags", nargs="+", metavar="FLAG=VALUE", help="flags that are the same in all trials; true switches one on")
    add(
        "--sampler", choices=SAMPLERS, help="grid: all combinations (the default); random; tpe: learns from the trials"
    )
    add("--num_trials", type=int, help="how many trials random and tpe make (20)")
    add("--prune", action="store_true", default=None, help="stop trials that are worse than the median of the others")
    add("--launcher", help="what starts the training script (this Python); such as 'accelerate launch --multi_gpu'")
    add("--seed", type=int, help="of the sampler (0)")
    return parser.parse_args(argv)


def write_results(study, settings):
    """results.csv, results.md and pictures.png in the sweep's folder; returns what to print."""
    folder, varied = Path(settings["sweep_dir"]), list(settings["sweep"])
    rows = results.rank(study.get_trials(deepcopy=False), folder, varied)

    def again(params):
        return shlex.join(command_of(settings, params, f"{folder.name}-best"))

    return results.write(rows, folder, varied, again)


def main(argv=None):
    log.start()
    settings = settle(parse_args(argv))
    folder = Path(settings["sweep_dir"])
    try:
        import optuna  # noqa: F401
        from filelock import FileLock
    except ImportError as error:
        raise SweepError("A sweep needs Optuna. Run: pip install -r requirements.txt") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{folder}: it can't be made ({error.strerror}). Pass another --sweep_dir.") from error
    with FileLock(folder / "open.lock"):
        study = open_study(settings)
    refused = []
    while (claimed := claim(study, settings)) is not None:
        trial, lock = claimed
        params = suggest(trial, settings["sweep"])
        print(
            f"trial {trial.number}: {' '.join(f'{key}={results.shown(value)}' for key, value in params.items())}",
            flush=True,
        )
        try:
            outcome = run_trial(study, settings, trial, params, lock)
        except Refused as error:
            outcome = str(error)
            refused.append(f"trial {trial.number}: {outcome}")
        except StoppedItself as stopped:
            print(
                f"trial {trial.number}: stopped at a checkpoint; run the same command again to go on", file=sys.stderr
            )
            sys.exit(stopped.args[0])
        lock.release()
        print(f"trial {trial.number}: {outcome}", flush=True)
        if len(refused) == MOST_REFUSED and not has_result(study):
            break
    print("\n" + write_results(study, settings))
    if has_result(study) and update_page(folder, of_several=True):
        print(f"\nall of it, to look at: {folder / PAGE}")
    if refused and not has_result(study):
        raise SweepError(refused[0])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        main()
    except SweepError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        stop_children()  # one may have been about to start
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)

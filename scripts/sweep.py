#!/usr/bin/env python
"""Trains LoRAs with many combinations of settings, and ranks them by the loss on held-out pictures.

    python scripts/sweep.py sweep.yaml
    python scripts/sweep.py --sweep_dir sweeps/rank --sweep rank=4,16 train_batch_size=1,4 learning_rate=1e-4..1e-2 \\
        --sampler tpe --num_trials 20 --flags pretrained_model_name_or_path=models/mini-sd train_data_dir=metadata/weapons \\
        resolution=128 validation_split=0.1 validation_steps=50 max_train_steps=300

The trials are managed by Optuna (https://optuna.org) and stored in the sweep's folder. To resume a stopped sweep, run the
same command again: finished trials are kept, and an interrupted trial resumes from its checkpoint. To run trials in parallel,
start the command several times, on one machine or on several that share the folder; set CUDA_VISIBLE_DEVICES for each.
"""

import argparse
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

from scripts.sweeping import results
from scripts.sweeping.settings import SAMPLERS, SweepError, describe_command, settle, take_words
from scripts.sweeping.study import (
    all_failed,
    claim,
    describe_progress,
    has_result,
    open_study,
    running_elsewhere,
    suggest,
)
from scripts.sweeping.trials import Refused, StoppedItself, run_trial, stop_children
from text_to_image_lora import log
from text_to_image_lora.command_line import user_path
from text_to_image_lora.errors import InputError, Stopped, TrainingError, describe_system_error
from text_to_image_lora.files import counted
from text_to_image_lora.reports.report_page import FILE as PAGE
from text_to_image_lora.reports.report_page import update_page
from text_to_image_lora.training import interruption


MOST_NAMED = 5  # failed trials, in the last lines
MOST_REFUSED = 3  # a sweep without any result ends after this number of trials that cannot be run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    add("config", nargs="?", type=user_path, help="YAML file with the keys sweep and flags, and any of the options below; options on the command line override it")
    add("--sweep_dir", type=user_path, help="folder of the sweep, for its trials, tables and pictures")
    add("--sweep", nargs="+", metavar="FLAG=VALUES", help="flags to vary: a list of values such as rank=4,16, or a range on a log scale such as learning_rate=1e-4..1e-2")
    add("--flags", nargs="+", metavar="FLAG=VALUE", help="flags with one value for all trials; true turns a switch on")
    add("--sampler", choices=SAMPLERS, help="grid: all combinations; random: random values; tpe: values chosen from the results of earlier trials (default: grid)")
    add("--num_trials", type=int, help="number of trials for random and tpe (default: 20)")
    add("--prune", action="store_true", default=None, help="stop trials whose validation loss is worse than the median of the other trials")
    add("--launcher", help="command that launches the training script, such as 'accelerate launch --multi_gpu' (default: this Python)")
    add("--seed", type=int, help="random seed of the sampler (default: 0)")
    # fmt: on
    return parser.parse_args(argv)


def write_results(study, settings):
    """Writes results.csv, results.md and pictures.png into the sweep's folder; returns the text to print."""
    folder, varied = Path(settings["sweep_dir"]), list(settings["sweep"])
    rows = results.rank(study.get_trials(deepcopy=False), folder, varied)
    failed = [results.trial_dir("", row["trial"]).name for row in rows if row["state"] == "fail"]

    def make_best_command(params):
        return describe_command(settings, params, f"{folder.name}-best")

    text = results.write(rows, folder, varied, make_best_command)
    if failed:
        names = ", ".join(failed[:MOST_NAMED]) + (", ..." if len(failed) > MOST_NAMED else "")
        text += f"\n\n{len(failed)} of {counted(len(rows), 'trial')} failed ({names}). Each one's log.txt says why."
    return text


def main(argv=None):
    log.start()
    settings = settle(parse_args(take_words(argv)))
    folder = Path(settings["sweep_dir"])
    try:
        import optuna  # noqa: F401
        from filelock import FileLock
    except ImportError as error:
        raise SweepError("A sweep needs Optuna. Run: pip install -r requirements.txt") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{folder}: it can't be created ({error.strerror}). Pass another --sweep_dir.") from error
    with FileLock(folder / "open.lock"):
        study = open_study(settings)
    print(
        f"the output of each trial is written to log.txt in its folder, such as {results.trial_dir(folder, 0)}",
        flush=True,
    )
    refused, name, outcome = [], "", ""
    while (claimed := claim(study, settings)) is not None:
        trial, lock = claimed
        params, name = suggest(trial, settings["sweep"]), results.trial_dir("", trial.number)
        values = " ".join(f"{key}={results.format_value(value)}" for key, value in params.items())
        print(f"{describe_progress(study, settings, trial.number)} ({name}): {values}", flush=True)
        try:
            outcome = run_trial(study, settings, trial, params, lock)
        except Refused as error:
            outcome = str(error)
            refused.append(f"{name}: {outcome}")
        except StoppedItself as stopped:
            print(f"{name}: stopped at a checkpoint; run the same command again to resume", file=sys.stderr)
            sys.exit(stopped.args[0])
        lock.release()
        print(f"{name}: {outcome}", flush=True)
        if len(refused) == MOST_REFUSED and not has_result(study):
            break
    print("\n" + write_results(study, settings))
    if running := running_elsewhere(study):
        names = ", ".join(results.trial_dir("", number).name for number in running)
        print(
            f"\nnot finished: other processes still train {names}. If a worker of the sweep was killed, run the same command "
            "again when they have ended."
        )
    if has_result(study) and update_page(folder, of_several=True):
        print(f"\nreport of the sweep: {folder / PAGE}")
    if refused and not has_result(study):
        raise SweepError(refused[0])
    if all_failed(study):
        reason = "no trial succeeded, so there is no best one"
        raise TrainingError(
            f"{reason} (the last, {name}, {outcome}). Correct the cause and run the same command again: it repeats failed trials."
        )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    interruption.listen()
    try:
        main()
    except (InputError, TrainingError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        stop_children()
        print(
            f"sweep.py: {describe_system_error(error)} and run the same command again to resume.",
            file=sys.stderr,
        )
        sys.exit(1)
    except (Stopped, KeyboardInterrupt) as stopped:
        stop_children()  # a training process may just have been started
        print("\ninterrupted: run the same command again to resume", file=sys.stderr)
        sys.exit(getattr(stopped, "exit_code", 130))

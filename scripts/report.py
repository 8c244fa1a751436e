#!/usr/bin/env python
"""Writes report.html for a run again, or one page that compares several runs.

python scripts/report.py sd-model-finetuned-lora           # updates the run's report.html
python scripts/report.py run-a run-b --output both.html
python scripts/report.py sweeps/rank                       # report.html of a sweep, which compares its trials
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

import argparse

from text_to_image_lora.errors import InputError, TrainingError
from text_to_image_lora.files import reason_of
from text_to_image_lora.log import protect_streams
from text_to_image_lora.reports import report_page


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=lambda text: Path(text).expanduser(),
        metavar="RUN",
        help="output folder of a run, or a folder that contains several runs, such as that of a sweep",
    )
    add(
        "--output",
        type=lambda text: Path(text).expanduser(),
        metavar="FILE",
        help="file for the page of several runs (default: report.html, in the given folder or, if several are given, in the current folder)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    folders = report_page.find_runs(args.runs)
    if [folder.resolve() for folder in folders] == [folder.resolve() for folder in args.runs] and len(folders) == 1:
        if args.output is not None:
            raise InputError(
                "--output is for a page of several runs; the page of a single run is written to its folder. Leave --output out."
            )
        path = report_page.write_page(folders[0])
    else:
        place = args.runs[0] if len(args.runs) == 1 else Path.cwd()
        path = args.output or place / report_page.FILE
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: there is no such folder. Name another --output.")
        path = report_page.write_comparison(
            folders, path, args.runs[0].resolve().name if len(args.runs) == 1 else "runs"
        )
    print(f"report: {path}")


if __name__ == "__main__":
    protect_streams()
    try:
        main()
    except (InputError, TrainingError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"report.py: the page can't be written: {reason_of(error)}", file=sys.stderr)
        sys.exit(1)

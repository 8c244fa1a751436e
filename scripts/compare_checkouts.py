#!/usr/bin/env python
"""Runs the same commands in two checkouts and compares everything that they print and write.

    python scripts/compare_checkouts.py --before HEAD
    python scripts/compare_checkouts.py --before HEAD~3 --items help 'wrong_*' plain --work_dir ../compare

Shows that a change, such as a refactoring, changes nothing that a user sees. It compares, leaving out times and speeds:

- the --help of both commands, flag by flag, and the error messages and exit codes of wrong commands
- seeded training runs: the tensors and headers of every .safetensors file, metrics, pictures, checkpoints, run.yaml,
  about.json, the model card, report.html, the records of W&B, and every line on stdout and stderr
- pictures of infer.py: pixels, PNG chunks, names of files, stdout and stderr
- runs that the earlier checkout began and both checkouts resume, from its checkpoint and its cache

The results of a commit are kept in --work_dir, so that comparing with it again only runs the other checkout. Exit code 0:
everything is equal; 1: an item differs or fails; 2: a checkout or an item was not found.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

import argparse
import fnmatch
import io
import subprocess
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor

from scripts.comparing import items
from scripts.comparing.commands import TRAIN, Failed
from scripts.comparing.differences import NUMBERS_DIFFER, differences, list_of_words
from scripts.comparing.reading import read_item
from text_to_image_lora.errors import Stopped
from text_to_image_lora.training import interruption


ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--before", required=True, metavar="REV_OR_FOLDER", help="the earlier checkout: a git revision, or a folder")
    add("--after", type=Path, default=ROOT, metavar="FOLDER", help="the later checkout (default: this one)")
    add("--items", nargs="+", default=["*"], metavar="NAME", help=f"items to compare, as names or patterns such as wrong_*: {', '.join(items.all_items())} (default: all)")
    add("--work_dir", type=Path, default=Path(tempfile.gettempdir(), "compare_checkouts"), help="folder for the results")
    add("--jobs", type=int, default=2, help="number of items that run at the same time")
    add("--words", type=Path, metavar="FILE", help="accept differences of text, and list them in this file; numbers, weights and pictures must still be equal")
    # fmt: on
    return parser.parse_args(argv)


def git(folder, *words):
    """Returns the output of git as bytes, or None if it fails."""
    done = subprocess.run(["git", "--no-optional-locks", "-C", str(folder), *words], capture_output=True)
    return None if done.returncode else done.stdout.strip()


def open_before(name, temporary):
    """Returns the `Side` of --before. A revision is unpacked into `temporary`; a folder with changes has no commit."""
    folder = Path(name).resolve()
    if (folder / TRAIN).is_file():
        at_its_top = git(folder, "rev-parse", "--show-prefix") == b""
        clean = at_its_top and git(folder, "status", "--porcelain") == b""
        return items.Side("before", folder, git(folder, "rev-parse", "HEAD").decode() if clean else None)
    commit = git(ROOT, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        raise Failed(f"--before {name}: neither a folder with {TRAIN} nor a revision that git knows.")
    with tarfile.open(fileobj=io.BytesIO(git(ROOT, "archive", commit.decode()))) as archive:
        archive.extractall(temporary, filter="data")
    return items.Side("before", Path(temporary), commit.decode())


def compare_item(item, before, after, given, work_dir):
    """Returns the `Difference`s of an item (None if a command failed), a summary, and the folder of the later results."""
    folders, sides, times = [], [], []
    for side in (before, after):
        begun = folders[0] if item.begun_before and folders else None
        try:
            folder, made = items.make(item, side, given, work_dir, begun)
        except Failed as error:
            return None, f"FAILED {side.name}: {error}", None
        try:
            sides.append(read_item(item, folder, made))
        except Exception as error:  # a changed checkout may write files that the readers do not expect
            return None, f"FAILED {side.name}: {folder} can't be read ({type(error).__name__}: {error})", None
        folders.append(folder)
        times.append(f"{made['seconds']} s{' (kept)' if made['kept'] else ''}")
    return differences(*sides), f"{len(sides[0])} values ({', '.join(times)})", folders[1]


def verdict(found, summary, folder, words):
    """Returns whether an item passes, and the line to print. With `words`, an item passes if only its text differs."""
    if found is None:
        return False, summary
    failing = [one for one in found if not (words and one.lines)]
    if not failing:
        return True, f"equal: {summary}{f'; texts that differ: {len(found)}' if found else ''}"
    (folder / "differences.txt").write_text("\n".join(map(str, failing)) + "\n", encoding="utf-8")
    more = f" (and {len(failing) - 1} more: {folder}/differences.txt)" if len(failing) > 1 else ""
    return False, f"DIFFERS: {failing[0]}{more}"


def main(argv=None):
    args = parse_args(argv)
    after, work_dir, known = items.Side("after", args.after.resolve()), args.work_dir.resolve(), items.all_items()
    if not (after.checkout / TRAIN).is_file():
        raise Failed(f"--after {after.checkout}: there is no {TRAIN}.")
    for pattern in args.items:
        if not fnmatch.filter(known, pattern):
            raise Failed(f"--items {pattern}: there is no such item. There are: {', '.join(known)}.")
    chosen = [item for name, item in known.items() if any(fnmatch.fnmatch(name, pattern) for pattern in args.items)]
    passed, texts = [], {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        before, given = open_before(args.before, temporary), items.make_inputs(work_dir)
        waiting = [pool.submit(compare_item, item, before, after, given, work_dir) for item in chosen]
        try:
            for item, done in zip(chosen, waiting):
                found, summary, folder = done.result()
                passes, line = verdict(found, summary, folder, args.words)
                passed.append(passes)
                texts[item.name] = [one for one in found or () if one.lines]
                print(f"{item.name:<20}{line}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if args.words:
        listed = list_of_words(texts)
        args.words.write_text(listed, encoding="utf-8")
        print(f"list of the differences of text: {args.words} (changes of numbers: {listed.count(NUMBERS_DIFFER)})")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    interruption.listen()  # a signal now lets the running items end, and temporary folders are deleted
    try:
        sys.exit(main())
    except Failed as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stopped:
        print("\ninterrupted: run the same command again to continue with the results that are kept", file=sys.stderr)
        sys.exit(getattr(stopped, "exit_code", 130))

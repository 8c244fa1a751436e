#!/usr/bin/env python
"""Runs the same commands in two checkouts and compares all that they say and leave.

    python scripts/compare_checkouts.py --before HEAD
    python scripts/compare_checkouts.py --before HEAD~3 --items help 'wrong_*' plain --work_dir ../compare

For a change that is to change nothing that a user sees. Compared are, each independent of the time and the machine:

- both commands' --help, flag by flag, and what wrong commands answer: their one line, exit code, and order of complaints
- seeded training runs: the tensors and headers of every .safetensors file, metrics, pictures, checkpoints, run.yaml,
  about.json, the model card, the page of the run, what W&B is told, and every line on stdout and stderr
- what infer.py draws: pixels and PNG chunks, names of files, stdout and stderr
- runs that --before began, cache and checkpoint, and that both sides resume

What a commit leaves is kept in --work_dir, so that comparing with it again costs only the other side. Exit code 0: all
are equal; 1: one differs or fails; 2: there is nothing to compare with.
"""

import argparse
import fnmatch
import io
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from comparing import items
from comparing.commands import TRAIN, Failed
from comparing.differences import NUMBERS_DIFFER, differences, list_of_words
from comparing.reading import read_item


ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--before", required=True, metavar="REV_OR_FOLDER", help="what to compare with: a git revision, or a checkout")
    add("--after", type=Path, default=ROOT, metavar="FOLDER", help="the other checkout (default: this one)")
    add("--items", nargs="+", default=["*"], metavar="NAME", help=f"which items, * for any letters: {', '.join(items.all_items())} (default: all)")
    add("--work_dir", type=Path, default=Path(tempfile.gettempdir(), "compare_checkouts"), help="folder for what is left")
    add("--jobs", type=int, default=2, help="items at a time")
    add("--words", type=Path, metavar="FILE", help="let text differ, and write what differs into this file; numbers, weights and pictures must be equal")
    # fmt: on
    return parser.parse_args(argv)


def git(folder, *words):
    """What git prints, as bytes; None where it fails."""
    done = subprocess.run(["git", "--no-optional-locks", "-C", str(folder), *words], capture_output=True)
    return None if done.returncode else done.stdout.strip()


def open_before(name, temporary):
    """The `Side` of --before; a revision is unpacked into `temporary`, a folder with changes has no commit."""
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
    """(`Difference`s of an item or None if it can't be made, what is told of it, the later checkout's folder)."""
    folders, sides, times = [], [], []
    for side in (before, after):
        begun = folders[0] if item.begun_before and folders else None
        try:
            folder, made = items.make(item, side, given, work_dir, begun)
        except Failed as error:
            return None, f"FAILED {side.name}: {error}", None
        try:
            sides.append(read_item(item, folder, made))
        except Exception as error:  # a changed checkout may have written files of any form
            return None, f"FAILED {side.name}: {folder} can't be read ({type(error).__name__}: {error})", None
        folders.append(folder)
        times.append(f"{made['seconds']} s{' (kept)' if made['kept'] else ''}")
    return differences(*sides), f"{len(sides[0])} values ({', '.join(times)})", folders[1]


def verdict(found, told, folder, words):
    """(whether an item passes, what is said of it); with `words`, differences of text pass."""
    if found is None:
        return False, told
    failing = [one for one in found if not (words and one.lines)]
    if not failing:
        return True, f"equal: {told}{f'; texts that differ: {len(found)}' if found else ''}"
    (folder / "differences.txt").write_text("\n".join(map(str, failing)) + "\n", encoding="utf-8")
    more = f" (and {len(failing) - 1} more: {folder}/differences.txt)" if len(failing) > 1 else ""
    return False, f"DIFFERS: {failing[0]}{more}"


def main(argv=None):
    args = parse_args(argv)
    after, work_dir, known = items.Side("after", args.after.resolve()), args.work_dir.resolve(), items.all_items()
    if not (after.checkout / TRAIN).is_file():
        raise Failed(f"--after {after.checkout}: it holds no {TRAIN}.")
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
                found, told, folder = done.result()
                passes, said = verdict(found, told, folder, args.words)
                passed.append(passes)
                texts[item.name] = [one for one in found or () if one.lines]
                print(f"{item.name:<20}{said}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if args.words:
        listed = list_of_words(texts)
        args.words.write_text(listed, encoding="utf-8")
        print(f"what is worded differently: {args.words} (changes of numbers: {listed.count(NUMBERS_DIFFER)})")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on, with what --before has finished", file=sys.stderr)
        sys.exit(130)

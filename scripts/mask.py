#!/usr/bin/env python
"""Makes masks for the pictures of a folder by CLIPSeg, which finds what words say; training then counts only that.

    python scripts/mask.py my-dog --prompt "a dog"
    python scripts/mask.py my-dog --prompt "a dog" --exclude "a leash" "a hand" --feather 4
    python scripts/mask.py my-face --prompt "sunglasses" "a hat" --invert

What to look at is explained in docs/masks.md. Masks that are there are kept. To resume a stopped run, run the same command
again.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

from functools import partial

import numpy as np

from scripts.annotating.batches import annotate
from scripts.annotating.command import add_machine_flags, choose_machine, run_command, start
from scripts.annotating.journal import Journal
from scripts.annotating.models import find_model
from scripts.masking.dataset import (
    OWN_FOLDER,
    choose_pictures,
    keep_old_masks,
    read_dataset,
    write_masks,
)
from scripts.masking.find import ACCEPTED, DEFAULT_MODEL
from scripts.masking.shaping import Shaping
from scripts.masking.sheet import Shown, choose_sheet, write_sheet
from text_to_image_lora.command_line import Parser, between, filled_text, user_path
from text_to_image_lora.files import counted, printable, remove_leftovers
from text_to_image_lora.libraries import hide_modules
from text_to_image_lora.locks import alone_in


def build_parser():
    parser = Parser(description=__doc__.splitlines()[0], epilog=" ".join(__doc__.split("\n\n")[-1].split()))
    # fmt: off
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="folder with the pictures, also in its subfolders")
    group = parser.add_argument_group("model").add_argument
    group("--model", type=user_path, default=DEFAULT_MODEL, help="CLIPSeg model in transformers format: hub id or folder")
    group("--revision", help="branch, tag, commit or pull request (refs/pr/N) of a model on the hub")

    group = parser.add_argument_group("masks").add_argument
    group("--prompt", type=filled_text, nargs="+", required=True, metavar="TEXT", help="what is to be trained, such as \"a dog\"; of several, each")
    group("--exclude", type=filled_text, nargs="+", default=[], metavar="TEXT", help="what is not to be trained although it is on or beside it, such as \"a leash\"")
    group("--threshold", type=between(0.01, 0.99), default=0.3, help="least probability of what is found; lower values find more")
    group("--expand", type=between(0, 50), default=2.0, metavar="PERCENT", help="by how much what is found grows, in percent of the picture's shorter side; CLIPSeg finds edges about this exactly")
    group("--feather", type=between(0, 50), default=2.0, metavar="PERCENT", help="width of the soft edge, in percent of the picture's shorter side; 0: a hard edge")
    group("--invert", action="store_true", help="train everything except what is found")

    group = parser.add_argument_group("output").add_argument
    group("--overwrite", action="store_true", help=f"also replace the masks that are there, after copying them into FOLDER/{OWN_FOLDER}")
    group("--sheet", type=user_path, metavar="FILE", help=f"review sheet: pictures with what does not count in magenta, in one or several files (default: FOLDER/{OWN_FOLDER}/masks.png, which trainers ignore)")
    # fmt: on
    add_machine_flags(parser, batch="pictures that are looked at at once", precision="precision of the model")
    return parser


def load(args, model):
    """Loads the model onto the device, with the prompts."""
    from scripts.masking.segmenter import Segmenter

    return Segmenter(model, {"--prompt": args.prompt, "--exclude": args.exclude}, *choose_machine(args))


def find(segmenter, shaping, dataset, pictures):
    """Returns the masks of {path: picture} as {path: mask}, and {path: reason} of those without one."""
    masks, without = {}, {}
    for (path, image), found in zip(pictures.items(), segmenter.probabilities([*pictures.values()]), strict=True):
        shaped = shaping.shape(found["--prompt"], found["--exclude"], image.size)
        if shaped.mask is None:
            without[path] = shaped.reason + "; its old mask stays" * (path in dataset.beside)
        else:
            masks[path] = shaped.mask
    return masks, without


def settings_of(args):
    """Returns what determines the masks, as plain data, by which an unfinished run is recognised."""
    names = ("model", "revision", "prompt", "exclude", "threshold", "expand", "feather", "invert", "overwrite")
    return {name: getattr(args, name) for name in names}


def run(args, sheet, dataset):
    """Masks the pictures of a dataset; a run that was stopped or killed continues where it was."""
    folder = dataset.folder
    pictures = choose_pictures(dataset, overwrite=args.overwrite)
    journal = Journal(folder / OWN_FOLDER, settings_of(args))
    if not pictures and not journal.is_resumed:
        print(f"all {counted(len(dataset.pictures), 'picture')} in {printable(folder)} have masks: nothing to do. To make new "
              "ones, pass --overwrite.")  # fmt: skip
        return
    names = {picture: picture.relative_to(folder).as_posix() for picture in dataset.pictures}
    # Of the last batch, masks may be missing that were recorded before a kill. They are made again.
    made = journal.done.keys() - journal.last.keys()
    missing = [picture for picture in pictures if names[picture] not in made]
    segmenter = load(args, find_model(args.model, args.revision, ACCEPTED)) if missing else None
    for parent in {picture.parent for picture in pictures}:
        remove_leftovers(parent)
    if journal.is_resumed:
        print(f"resuming: {counted(len(made), 'mask')} of this command are there already", flush=True)
    else:
        journal.begin(keep_old_masks(dataset, pictures) if args.overwrite else None)

    def record(masks):
        journal.add(
            {names[picture]: round(float(np.asarray(mask).mean()) / 255, 4) for picture, mask in masks.items()}
        )
        write_masks(dataset, masks, overwrite=args.overwrite)

    shaping = Shaping(args.threshold, args.expand, args.feather, args.invert)
    failed = annotate(missing, args.batch_size, partial(find, segmenter, shaping, dataset), record, "masks")
    shown = [
        Shown(picture, dataset.place_of(picture) if name in journal.done else None, failed.get(picture, ""))
        for picture, name in names.items()
        if name in journal.done or picture in failed
    ]
    pages = write_sheet(sheet, shown, folder) if shown else []
    journal.end()
    report(dataset, journal, pages, failed)


def report(dataset, journal, pages, failed):
    """Prints what was written, and what was not."""
    written = len(journal.done)
    print(f"wrote {counted(written, 'mask')} beside the pictures; a training run reads them without a flag")
    if kept := len(dataset.pictures) - written - len(failed):
        print(f"kept the masks of {counted(kept, 'picture')}, which were there already")
    if journal.before is not None:
        print(f"the old masks are in {printable(dataset.folder / OWN_FOLDER / journal.before)}")
    if pages:
        more = f" (and {len(pages) - 1} more)" if len(pages) > 1 else ""
        print(f"look at them: {printable(pages[0])}{more}")
    if failed:
        print(
            f"made no mask for {counted(len(failed), 'picture')}, named above; without one, all of a picture is trained"
        )


def main(argv=None):
    args = build_parser().parse(argv)
    start("mask")
    folder = Path(args.folder)
    dataset = read_dataset(folder)
    sheet = choose_sheet(args.sheet, folder)
    # bitsandbytes would be imported by transformers, which takes a second.
    with alone_in(folder / OWN_FOLDER, "FOLDER"), hide_modules("bitsandbytes"):
        run(args, sheet, dataset)


if __name__ == "__main__":
    run_command("mask.py", main)

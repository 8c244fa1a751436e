#!/usr/bin/env python
"""Writes captions for the pictures of a folder by a model: sentences of BLIP, Florence-2 or a chat model, or tags of a tagger.

    python scripts/caption.py my-dog --trigger_word sks --class_name dog
    python scripts/caption.py my-dog --model Qwen/Qwen3-VL-2B-Instruct --omit "red collar"
    python scripts/caption.py mira --model SmilingWolf/wd-vit-tagger-v3 --trigger_word mira

The models, trigger words and what not to name are explained in docs/captions.md. Captions that are there are kept. To resume
a stopped run, run the same command again.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

from functools import partial

from scripts.annotating.batches import annotate
from scripts.annotating.command import add_machine_flags, choose_machine, run_command, start
from scripts.annotating.journal import Journal
from scripts.annotating.models import find_model
from scripts.captioning.dataset import OUTPUTS, OWN_FOLDER, choose_pictures, keep_old_captions, read_dataset
from scripts.captioning.find import ACCEPTED, DEFAULT_MODEL
from scripts.captioning.sheet import choose_sheet, write_sheet
from scripts.captioning.wording import Wording
from text_to_image_lora.command_line import Parser, between, count, user_path
from text_to_image_lora.errors import InputError
from text_to_image_lora.files import counted, printable, remove_leftovers
from text_to_image_lora.libraries import hide_modules
from text_to_image_lora.locks import alone_in


TAG_THRESHOLD = 0.35
CHARACTER_THRESHOLD = 0.85


def build_parser():
    parser = Parser(description=__doc__.splitlines()[0], epilog=" ".join(__doc__.split("\n\n")[-1].split()))
    # fmt: off
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="folder with the pictures, also in its subfolders")
    group = parser.add_argument_group("model").add_argument
    group("--model", type=user_path, default=DEFAULT_MODEL, help="model that describes pictures, in transformers format, or a tagger (model.onnx and selected_tags.csv): hub id or folder")
    group("--revision", help="branch, tag, commit or pull request (refs/pr/N) of a model on the hub")
    group("--prompt", metavar="TEXT", help="what a chat model is asked, a task of Florence-2 such as \"<MORE_DETAILED_CAPTION>\", or how BLIP's answer begins (default: depends on the model)")
    group("--max_new_tokens", type=count(1, 1000), default=120, help="maximum length of an answer in tokens")
    group("--tag_threshold", type=between(0, 1), help=f"least probability of a tagger's tags (default: {TAG_THRESHOLD})")
    group("--character_threshold", type=between(0, 1), help=f"least probability of a tagger's tags that name a character (default: {CHARACTER_THRESHOLD})")

    group = parser.add_argument_group("captions").add_argument
    group("--trigger_word", default="", metavar="TEXT", help="word or words that will call what is trained, for every caption: \"a photo of TEXT, ...\", or the first tag")
    group("--class_name", default="", metavar="TEXT", help="what the trigger word is, such as dog: \"a photo of sks dog, ...\"")
    group("--caption_template", metavar="TEXT", help="how the trigger word is added, such as \"{caption}, in {trigger} style\" (default: \"{medium} of {trigger} {class}, {caption}\" for sentences, where the medium is \"a photo\" or what the model names; \"{trigger}, {class}, {caption}\" for tags)")
    group("--omit", nargs="+", default=[], metavar="TEXT", help="words that captions must not contain, because the trigger word is to mean them")
    group("--prefix", default="", metavar="TEXT", help="text in front of every caption")
    group("--suffix", default="", metavar="TEXT", help="text behind every caption")

    group = parser.add_argument_group("output").add_argument
    group("--output", choices=[*OUTPUTS], default="txt", help="a .txt file beside each picture, or rows in FOLDER/metadata.jsonl")
    group("--overwrite", action="store_true", help=f"also replace the captions that are there, after copying them into FOLDER/{OWN_FOLDER}")
    group("--sheet", type=user_path, metavar="FILE", help=f"review sheet: pictures beside their captions, in one or several files (default: FOLDER/{OWN_FOLDER}/captions.png, which trainers ignore)")
    # fmt: on
    add_machine_flags(
        parser, batch="pictures that are described at once", precision="precision of the model; taggers have their own"
    )
    return parser


def check_fits(model, args):
    """Raises `InputError` for flags that a model of this kind does not use."""
    if model.kind is None:
        if args.prompt is not None:
            raise InputError(f"--prompt: {model.name} is a tagger, which is not asked anything. Leave the flag out.")
        return
    for name in ("tag_threshold", "character_threshold"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name}: {model.name} is not a tagger. Leave the flag out, or pass another --model.")
    prompts = model.kind.prompts
    if args.prompt is not None and prompts is not None and args.prompt not in prompts:
        allowed = f"Pass one of {' '.join(prompts)}." if prompts else "Leave the flag out."
        raise InputError(f"--prompt {args.prompt!r}: {model.name} ({model.kind.name}) does not take it. {allowed}")


def load(args, model):
    """Loads the model onto the device."""
    device, dtype = choose_machine(args)
    if model.kind is None:
        from scripts.captioning.tagger import Tagger

        thresholds = [
            default if given is None else given
            for given, default in (
                (args.tag_threshold, TAG_THRESHOLD),
                (args.character_threshold, CHARACTER_THRESHOLD),
            )
        ]
        return Tagger(model, *thresholds, device)
    from scripts.captioning.captioner import Captioner

    return Captioner(model, args.prompt, args.max_new_tokens, device, dtype)


def describe(captioner, wording, pictures):
    """Returns the captions of {path: picture} as {path: text}, and {path: reason} of those without one."""
    captions = dict(zip(pictures, captioner.describe(list(pictures.values()), wording), strict=True))
    without = {path: "nothing is left of the model's answer" for path, text in captions.items() if not text}
    return {path: text for path, text in captions.items() if text}, without


def settings_of(args, wording):
    """Returns what determines the captions, as plain data, by which an unfinished run is recognised."""
    names = ("model", "revision", "prompt", "max_new_tokens", "tag_threshold", "character_threshold")
    chosen = {name: getattr(args, name) for name in (*names, "output", "overwrite")}
    return chosen | {**wording._asdict(), "omit": list(wording.omit)}


def run(args, wording, sheet, dataset):
    """Captions the pictures of a dataset; a run that was stopped or killed continues where it was."""
    folder = dataset.folder
    pictures = choose_pictures(dataset, args.output, overwrite=args.overwrite)
    journal = Journal(folder / OWN_FOLDER, settings_of(args, wording))
    if not pictures and not journal.is_resumed:
        print(f"all {counted(len(dataset.pictures), 'picture')} in {printable(folder)} have captions: nothing to do. To write "
              "new ones, pass --overwrite.")  # fmt: skip
        return
    names = {picture: picture.relative_to(folder).as_posix() for picture in dataset.pictures}
    writer = OUTPUTS[args.output](dataset)
    model = find_model(args.model, args.revision, ACCEPTED)
    check_fits(model, args)
    missing = [picture for picture in pictures if names[picture] not in journal.done]
    captioner = load(args, model) if missing else None
    for parent in {picture.parent for picture in pictures}:
        remove_leftovers(parent)
    if journal.is_resumed:
        last = {picture: journal.last[name] for picture, name in names.items() if name in journal.last}
        writer.write(last, overwrite=args.overwrite)
        print(f"resuming: {counted(len(journal.done), 'caption')} of this command are there already", flush=True)
    else:
        journal.begin(keep_old_captions(dataset, args.output, pictures) if args.overwrite else None)

    def record(captions):
        journal.add({names[picture]: caption for picture, caption in captions.items()})
        writer.write(captions, overwrite=args.overwrite)

    failed = annotate(missing, args.batch_size, partial(describe, captioner, wording), record, "captions")
    written = [(picture, journal.done[name]) for picture, name in names.items() if name in journal.done]
    pages = write_sheet(sheet, written, folder) if written else []
    journal.end()
    report(args, dataset, journal, pages, failed)


def report(args, dataset, journal, pages, failed):
    """Prints what was written, and what was not."""
    folder, written = dataset.folder, len(journal.done)
    place = ".txt files beside the pictures" if args.output == "txt" else printable(folder / "metadata.jsonl")
    print(f"wrote {counted(written, 'caption')}: {place}")
    if kept := len(dataset.pictures) - written - len(failed):
        print(f"kept the captions of {counted(kept, 'picture')}, which were there already")
    if journal.before is not None:
        print(f"the old captions are in {printable(folder / OWN_FOLDER / journal.before)}")
    if pages:
        more = f" (and {len(pages) - 1} more)" if len(pages) > 1 else ""
        print(f"look at them: {printable(pages[0])}{more}")
    if failed:
        print(f"passed over {counted(len(failed), 'picture')} without a caption, named above")


def main(argv=None):
    args = build_parser().parse(argv)
    start("caption")
    wording = Wording(
        args.trigger_word.strip(), args.class_name.strip(), args.caption_template, args.prefix, args.suffix, tuple(args.omit)
    )  # fmt: skip
    wording.check()
    folder = Path(args.folder)
    dataset = read_dataset(folder)
    sheet = choose_sheet(args.sheet, folder)
    # bitsandbytes would be imported by transformers, which takes a second.
    with alone_in(folder / OWN_FOLDER, "FOLDER"), hide_modules("bitsandbytes"):
        run(args, wording, sheet, dataset)


if __name__ == "__main__":
    run_command("caption.py", main)

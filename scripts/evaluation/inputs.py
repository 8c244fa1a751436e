"""Finds and checks the inputs of an evaluation before any model is loaded, for `evaluate.py`."""

from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from text_to_image_lora.drawing import as_trained
from text_to_image_lora.drawing.find import find_base, find_checkpoints, vae_channels
from text_to_image_lora.drawing.fits import check_fits
from text_to_image_lora.drawing.pipeline import Job
from text_to_image_lora.drawing.prompts import read_prompts
from text_to_image_lora.drawing.rows import Drawing, check_drawing
from text_to_image_lora.drawing.settings import Model
from text_to_image_lora.errors import InputError
from text_to_image_lora.files import check_writable, expand_pattern
from text_to_image_lora.pictures.alike import divide
from text_to_image_lora.pictures.buckets import square
from text_to_image_lora.pictures.examine import examine, select_usable
from text_to_image_lora.pictures.layouts import ReadOptions
from text_to_image_lora.pictures.picture_set import PictureSet
from text_to_image_lora.pictures.settings import CaptionSettings, DataSettings
from text_to_image_lora.pictures.sources import load_records

from .judges import make_judge
from .pictures import choose_prompts


BASE = "base"


class Inputs(NamedTuple):
    """The inputs of an evaluation."""

    model: Model  # flags that choose the base model
    job: Job
    loras: dict  # {label: `Lora`}; the base model comes first, with None
    held_out: PictureSet
    trained: PictureSet | None
    asked: list  # of `Asked`
    judge: Any
    resolution: int

    def captions(self):
        """Returns the caption of each held-out picture."""
        return [group[0] for group in self.held_out.captions]

    def references(self):
        """Returns {concept: {name of the likeness: embeddings}} of the held-out pictures; the judge must be loaded."""
        concepts = self.held_out.records["concept"][:]
        return {
            name: self.judge.embed(images_of(self.held_out, [i for i, own in enumerate(concepts) if own == name]))
            for name in dict.fromkeys(concepts)
        }


def images_of(pictures, indices=None):
    """Returns the pictures of a `PictureSet`, or those at `indices`, as PIL images of their training size."""
    return [Image.fromarray(pictures.pixels(i, 0)) for i in (range(len(pictures)) if indices is None else indices)]


def read_pictures(args, folders, resolution):
    """Reads the `PictureSet` of folders, center-cropped to squares of the resolution."""
    data = DataSettings(
        train_data_dir=tuple(folders), caption_column=args.caption_column, concept_column=args.concept_column
    )
    captions = CaptionSettings(instance_prompt=args.instance_prompt, trigger_word=args.trigger_word)
    records = load_records(ReadOptions(data, captions, archive_dir=args.output_dir / "archives"))
    good, bad = examine(records, range(len(records)))
    for i, reason in bad.items():
        raise InputError(f"{records[i]['source']}: {reason}. Fix or remove the picture.")
    records, facts = select_usable(records, good, bad)
    sizes = square(resolution).choose_sizes(facts)
    return PictureSet(records, facts, sizes, records["captions"][:])


def divide_pictures(args, resolution):
    """Returns the held-out `PictureSet` and the training `PictureSet` or None, divided as in the training script."""
    trained = None if args.train_data_dir is None else read_pictures(args, args.train_data_dir, resolution)
    held_out = None
    if args.validation_data_dir is not None:
        held_out = read_pictures(args, args.validation_data_dir, resolution)
    if trained is not None:
        trained, held_out = divide(trained, held_out, args.validation_split)
        trained = trained.for_validation()
    if len(held_out) < 2:
        raise InputError(
            "There is 1 held-out picture. Hold out at least 2, better 10, to distinguish likeness from chance."
        )
    return held_out.for_validation(), trained


def find_loras(words):
    """Returns {label: `Lora`} of --lora, after the base model with None."""
    for word in words:
        if not expand_pattern(word):
            raise InputError(f"--lora {word}: no file or folder matches this pattern. Check the path.")
    count = sum(len(expand_pattern(word)) for word in words)
    found = find_checkpoints([BASE, *words], 1.0)
    if len(found) <= count:
        raise InputError(
            "--lora names a LoRA twice. Name each LoRA once; to compare strengths, use infer.py --grid lora_scale."
        )
    return found


def choose_resolution(args, base):
    """Returns the side of the pictures in pixels: --resolution, or by default that of the base model (a `find.Base`)."""
    side, model = base.unet_config.get("sample_size"), base.model
    resolution = args.resolution or (side * model.vae_factor if isinstance(side, int) else model.family.resolution)
    if resolution % model.image_factor:
        nearest = max(round(resolution / model.image_factor), 1) * model.image_factor
        raise InputError(
            f"--resolution {resolution}: this model needs a multiple of {model.image_factor}, e.g. {nearest}."
        )
    return resolution


def check_flags(args):
    """Raises `InputError` for flags that contradict each other or require another flag."""
    if (args.validation_data_dir is None) == (not args.validation_split):
        raise InputError(
            "Pass either --validation_data_dir or --validation_split, for pictures that no LoRA was trained on."
        )
    if args.validation_split and args.train_data_dir is None:
        raise InputError("--validation_split is a fraction of --train_data_dir: add --train_data_dir.")
    if args.trigger_word is not None and not args.trigger_word.strip():
        raise InputError("--trigger_word is empty: pass the words that call the concept, or leave the flag out.")
    check_drawing(Drawing(num_inference_steps=args.num_inference_steps, scheduler=args.scheduler))
    check_writable(args.output_dir, "--output_dir")


def find_models(args):
    """Finds the models as infer.py does; returns the base model's flags, the `Job` and {label: `Lora`}."""
    config = args.single_file_config
    model = Model(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant,
        single_file_config=None if config is None else Path(config), vae=args.vae,
    )  # fmt: skip
    base = find_base(model)
    loras = find_loras(args.lora)
    chosen = tuple(lora for lora in loras.values() if lora)
    trained, notes = as_trained.settle(chosen, base, args.scheduler, vae=model.vae)
    if base.shapes:
        check_fits(base.shapes, chosen, trained.clip_skip or 0, trained.vae and vae_channels(trained.vae))
    for line in notes:
        print(f"note: {line}")
    return model, Job(base, chosen, trained), loras


def read_other_prompts(args):
    """Reads the texts of --other_prompts."""
    prompts = read_prompts("--other_prompts", args.other_prompts or [])
    for prompt in prompts:
        if not prompt.text:
            raise InputError("--other_prompts is empty: write what to draw, or leave the flag out.")
        if prompt.options:
            raise InputError(
                f"--other_prompts {prompt.line!r}: only infer.py accepts options after a prompt. Leave them out."
            )
    return [prompt.text for prompt in prompts]


def find_inputs(args):
    """Returns the `Inputs` that the flags describe; raises `InputError` if they cannot be evaluated."""
    check_flags(args)
    others = read_other_prompts(args)
    model, job, loras = find_models(args)
    judge = make_judge(args.judge, args.pretrained_model_name_or_path, args.clip_model, args.dino_model)
    resolution = choose_resolution(args, job.base)
    held_out, trained = divide_pictures(args, resolution)
    captions, concepts = [group[0] for group in held_out.captions], held_out.records["concept"][:]
    asked = choose_prompts(captions, concepts, args.trigger_word, others or judge.other_prompts, args.num_prompts)
    judge.check_prompts([*captions, *(each.prompt for each in asked)])
    return Inputs(model, job, loras, held_out, trained, asked, judge, resolution)

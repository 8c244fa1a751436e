"""The base model and the pictures of a command, found and checked before torch is imported."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .. import log
from ..errors import InputError
from ..files import check_entries, check_writable, counted, printable, shorten_paths
from ..models.dialects import WEIGHTS_NAME
from ..models.loading import find_base_model
from ..models.lora_checks import check_family, check_lora
from ..pictures.captions import ConceptRemover, check_concept_remover, prompts_without_concept, tag_variations
from ..pictures.layouts import ReadOptions, triggers_of
from ..pictures.names import RUN_FILE
from ..pictures.records import with_class_pictures
from ..pictures.settings import CaptionSettings, DataSettings
from ..pictures.sources import load_records, log_left_out
from .class_images import ClassImages, plan


logger = logging.getLogger(__name__)
REPORT_NAME = "dataset.json"  # of a dry run, in the output folder


class Inputs(NamedTuple):
    """The base model and the pictures of a run."""

    base: Any  # the `BaseModel`
    records: Any  # `datasets.Dataset` of the pictures to train on, see `pictures.records`
    validation_records: Any  # `datasets.Dataset` of the pictures to validate on, or None
    left_out: list[tuple[str, str]]  # (source, reason) of unusable pictures, in a dry run
    notes: list[str]  # lines that were logged about the pictures
    class_images: Any = None  # the `ClassImages` at the end of the records, which may still have to be drawn, or None


def find_inputs(settings: Any) -> Inputs:
    """Finds the base model and the pictures; raises `InputError` if they can't be used. Does not import torch."""
    for note in settings.notes:  # from the parser, before logging was started
        logger.info(note)
    left_out: list[tuple[str, str]] = []
    leave_out: Any = log_left_out if settings.data.skip_bad_images else None
    if settings.data.dry_run:
        leave_out = lambda source, reason: left_out.append((source, reason))  # noqa: E731

    base = find_base(settings)
    with log.collect_messages("pictures") as notes:
        records, validation_records = find_records(settings, leave_out)
        num_class = sum(records["is_class"])
        own = records.select(range(len(records) - num_class))
        own_captions = [caption for group in own["captions"] for caption in group]
        check_concept(settings, own, own_captions)
        drawn = plan_class_images(settings, base, num_class, own_captions, find_concept(settings, own))
    if drawn is not None:
        records = with_class_pictures(records, drawn.make_records())
    check_rest(settings, base)
    if not settings.data.dry_run:
        logger.info(f"loading {shorten_paths(printable(base.source))}")
    return Inputs(base, records, validation_records, left_out, notes, drawn)


def find_base(settings: Any) -> Any:
    """Finds the `BaseModel`, and checks --resolution and --lora_weights against it."""
    given, lora_weights = settings.base, settings.lora.lora_weights
    if lora_weights is not None:
        check_lora(lora_weights)
    base = find_base_model(
        given.pretrained_model_name_or_path, revision=given.revision, variant=given.variant,
        single_file_config=given.single_file_config, cache_dir=given.cache_dir,
    )  # fmt: skip
    if lora_weights is not None:
        check_family(lora_weights, base)
    for side in settings.sizes.sides(base):
        if side % base.image_factor:
            nearest = max(round(side / base.image_factor), 1) * base.image_factor
            raise InputError(
                f"--resolution {side}: this model needs a multiple of {base.image_factor}, e.g. {nearest}."
            )
    settings.sizes.resolutions(base)
    return base


def reading_of(settings: Any) -> ReadOptions:
    """Returns how the pictures of a command are read."""
    archives = settings.cache.folder / "archives"
    return ReadOptions(settings.data, settings.captions, settings.base.cache_dir, archives)


def find_records(settings: Any, leave_out: Callable[[str, str], Any] | None) -> tuple[Any, Any]:
    """Returns the records to train on, including those of class pictures at the end, and those to validate on or None."""
    archives = settings.cache.folder / "archives"
    reading = reading_of(settings)._replace(leave_out=leave_out)
    records, validation_records = load_records(reading), None
    if settings.validation.validation_data_dir is not None:
        validation_data = dataclasses.replace(
            settings.data, dataset_name=None, dataset_config_name=None, max_train_samples=None,
            train_data_dir=settings.validation.validation_data_dir,
        )  # fmt: skip
        validation_records = load_records(reading._replace(data=validation_data))
    class_dir, wanted = settings.class_pictures.class_data_dir, settings.class_pictures.num_class_images
    if class_dir is not None and wanted and not Path(class_dir).is_file() and not any(Path(class_dir).glob("*")):
        raise InputError(
            f"{class_dir}: it contains no class pictures. Leave --class_data_dir out, and all {wanted} of --num_class_images "
            "are drawn and kept in the cache."
        )
    if class_dir is not None:
        class_data = DataSettings(train_data_dir=(class_dir,))
        captions = CaptionSettings(instance_prompt=settings.class_pictures.class_prompt)
        class_pictures = load_records(ReadOptions(class_data, captions, None, archives, leave_out))
        records = with_class_pictures(records, class_pictures)
    return records, validation_records


def make_concept_remover(settings: Any, records: Any) -> ConceptRemover | None:
    """Returns what removes the concept from the captions of records for --preservation, or None without it."""
    return find_concept(settings, records) if settings.preservation.preserves else None


def concept_of_run(settings: Any, records: Any) -> ConceptRemover | None:
    """Returns what removes the concept from captions for --preservation and to measure the drift.

    Returns None if the run does neither, or if no flag and no folder names the concept.
    """
    preservation, remove_concept = settings.preservation, find_concept(settings, records)
    if preservation.preserves:
        return remove_concept
    named = remove_concept.phrases or remove_concept.prompt is not None
    return remove_concept if named and settings.validation.validates else None


def check_concept(settings: Any, records: Any, captions: list[str]) -> None:
    """Logs what captions become without the concept; raises `InputError` if it can't be left out, but a flag needs that."""
    remove_concept = concept_of_run(settings, records)
    if remove_concept is not None:
        check_concept_remover(remove_concept, captions, trains=settings.preservation.preserves)
    elif settings.validation.max_drift is not None:
        raise InputError("--max_drift: nothing names the concept. Name it by --concept_phrases as the captions do.")


def find_concept(settings: Any, records: Any) -> ConceptRemover:
    """Returns what removes the concept from the captions of records; it has no phrases if none are known."""
    preservation, trigger = settings.preservation, settings.captions.trigger_word
    phrases = preservation.concept_phrases or (() if trigger is None else (trigger,))
    phrases = phrases or triggers_of(records, settings.captions)
    otherwise = settings.class_pictures.class_prompt or ""
    return ConceptRemover(phrases, preservation.preservation_prompt, otherwise)


def plan_class_images(
    settings: Any, base: Any, num_there: int, captions: list[str], remove_concept: ConceptRemover
) -> ClassImages | None:
    """Plans the class pictures that --class_data_dir lacks; returns None if there are none to draw."""
    own = settings.class_pictures
    count = own.num_class_images - num_there
    if num_there and own.num_class_images:
        logger.info(
            f"class pictures: {num_there} in {own.class_data_dir}; --num_class_images {own.num_class_images} adds {max(count, 0)}"
        )
    if count <= 0:
        return None
    prompts = prompts_without_concept(captions, remove_concept) if own.from_captions else [own.class_prompt]
    return plan(settings, base, prompts, count)


def check_rest(settings: Any, base: Any) -> None:
    """Raises `InputError` for a --clip_skip that is too large, a missing token or a folder that is not writable."""
    clip_skip, unused = settings.base.clip_skip, base.family.text_encoders[0].unreached(0)
    if clip_skip is not None and clip_skip + unused >= base.text_layers:
        without = f", {unused} of which {base.family.name} does not use" if unused else ""
        raise InputError(f"--clip_skip {clip_skip}: the text encoder has only {base.text_layers} layers{without}.")
    if settings.sharing.uploads:
        from huggingface_hub import get_token

        if not (settings.sharing.hub_token or get_token()):
            raise InputError("--push_to_hub and --push_checkpoints_to_hub need a token: run `hf auth login` first.")
    check_writable(settings.run.output_dir, "--output_dir")
    check_entries(settings.run.output_dir, "--output_dir")
    check_foreign_files(settings)
    preview = settings.data.preview_data
    if preview is not None:
        check_writable(Path(preview).parent, "--preview_data")
        if Path(preview).is_dir():
            raise InputError(f"--preview_data {preview}: this is a folder. Pass the name of a file.")
    drawn = settings.class_pictures.num_class_images
    if settings.cache.cache_variations != 0 or settings.validation.validates or drawn:
        check_writable(settings.cache.folder, "--latent_cache_dir")


def check_foreign_files(settings: Any) -> None:
    """Raises `InputError` if --output_dir holds a file that no run has written, and that this one would replace."""
    folder = Path(settings.run.output_dir)
    if settings.data.dry_run:
        names = [REPORT_NAME] if not _is_report(folder / REPORT_NAME) else []
    elif (folder / RUN_FILE).exists() or (folder / "about.json").exists():
        names = []
    else:
        names = ["README.md", "report.html", "metrics.jsonl", WEIGHTS_NAME]
        names += [f"{folder.resolve().name}.safetensors"] if settings.lora.output_kohya_format else []
    for path in (folder / name for name in names):
        if path.exists():
            raise InputError(
                f"{printable(path)}: it was not written by a run in this folder, and would be replaced. Move it, or pass another "
                "--output_dir."
            )


def _is_report(path):
    """Whether a file is the dataset.json of a dry run."""
    return path.is_file() and b'"findings"' in path.read_bytes()


def make_picture_sets(settings: Any, inputs: Inputs, usable: Callable[[Any], tuple[Any, list]]) -> tuple[Any, Any]:
    """Creates the `PictureSet` to train on, and the one to validate on or None.

    Pictures are divided before they are trained at several sizes, so that all sizes of a picture are on one side. Those to
    validate on have one size each, the largest: a second size of a picture would be no further evidence. `usable(records)`
    returns the records whose pictures can be used, and the `Picture` of each.
    """
    from ..pictures.alike import divide
    from ..pictures.picture_set import PictureSet, View

    view = View(settings.augmentation, settings.sizes.image_interpolation_mode, settings.data.alpha_mask)
    resolutions = settings.sizes.resolutions(inputs.base)

    def make(records):
        records, facts = usable(records)
        sizes = [own[0] for own in resolutions.sizes_of_each(facts)]
        return PictureSet(records, facts, sizes, records["captions"][:], view)

    pictures, validated, share = make(inputs.records), None, settings.validation.validation_split
    if inputs.validation_records is not None or share:
        validated = None if inputs.validation_records is None else make(inputs.validation_records)
        pictures, validated = divide(pictures, validated, share)
    _check_large_enough(pictures, resolutions)
    return pictures.at_sizes(resolutions.sizes_of_each(pictures.facts)), validated


def _check_large_enough(pictures, resolutions):
    """Raises `InputError` for a resolution, of several, at which none of the user's own pictures would be trained."""
    own = [fact for fact, is_class in zip(pictures.facts, pictures.is_class, strict=True) if not is_class]
    for resolution, small in resolutions.too_small(own).items():
        if len(small) == len(own):
            raise InputError(
                f"--resolution {resolution}: none of the {counted(len(own), 'picture')} is large enough for it, so that "
                f"nothing would be trained at this resolution. Leave {resolution} out, or add larger pictures."
            )


def with_cached_tag_orders(settings: Any, pictures: Any) -> Any:
    """Returns the `PictureSet` with each variation of its tags that is cached as a caption."""
    caches = settings.cache.num_variations(settings.augmentation)
    if not settings.captions.varies_tags or not caches or settings.lora.train_text_encoder:
        return pictures
    captions = [tag_variations(group, settings.captions) for group in pictures.captions]
    return dataclasses.replace(pictures, captions=captions)

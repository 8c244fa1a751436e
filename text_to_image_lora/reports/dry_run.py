"""--dry_run: a report about the dataset, its faults, and the memory that a run would take."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import log
from ..errors import InputError
from ..models import loading, modules, prompts
from ..pictures import examine, findings, inspection
from ..pictures.caption_tables import caption_tables
from ..training import caching, inputs, memory, trials
from ..training.run import choose_num_chunks, make_run_sampler
from ..training.settings import ways_to_save_memory
from . import dataset_page


def report(settings: Any, found: inputs.Inputs) -> None:
    """Prints the report, and writes dataset.json and dataset.html to --output_dir, and the file of --preview_data.

    Loads no model except the tokenizer. Raises `InputError` where training would.
    """
    base, left_out = found.base, found.left_out
    images = found.class_images
    not_drawn = {} if images is None else {images.recipe(i): images.fact(i) for i in images.missing()}
    usable = partial(_usable, left_out=left_out, not_drawn=not_drawn, alpha_mask=settings.data.alpha_mask)
    pictures, validated = inputs.make_picture_sets(settings, found, usable)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    sampler = make_run_sampler(settings, pictures, settings.run.seed or 0, 0, world_size)
    each_once, resolutions = pictures.each_once(), settings.sizes.resolutions(base)
    tokenizer = loading.load_tokenizer(base)
    token_counts, too_long = None, None
    num_chunks = 1
    if tokenizer is not None:
        token_counts = prompts.count_tokens(tokenizer, each_once.captions)
        try:
            num_chunks, _ = choose_num_chunks(settings, tokenizer, [pictures])
        except InputError as error:
            too_long = error
    described = inspection.describe(
        pictures, left_out, sampler, num_validated=len(validated or ()), token_counts=token_counts,
        token_limit=None if tokenizer is None or settings.captions.long_prompts else tokenizer.model_max_length,
        cache_bytes=_cache_bytes(settings, pictures, base, num_chunks),
        too_small=resolutions.too_small(each_once.facts),
    )  # fmt: skip
    lines = [*inspection.format_report(described), *_lengths(settings.batches, settings.schedule, sampler)]
    if images is not None:
        lines.append(images.describe(len(not_drawn)))
    own_found = findings.find_all(each_once)
    described["findings"] = inspection.describe_findings(own_found, each_once)
    lines += inspection.format_findings(described["findings"], each_once)
    print("\n".join(lines), flush=True)  # before the estimate of the memory, which takes seconds
    known_chunks = None if tokenizer is None else num_chunks
    drawn_at_once = images.batch_size if images is not None and not_drawn else 0
    needs, memory_lines = _memory(settings, base, pictures, sampler, known_chunks, drawn_at_once)
    report_file = Path(settings.run.output_dir) / inputs.REPORT_NAME
    inspection.write_report(described | {"memory_bytes": needs and needs._asdict()}, report_file)
    limit = described["tokens"] and described["tokens"]["limit"]
    cut = [i for i, group in enumerate(token_counts or []) if limit is not None and max(group) > limit]
    page = _write_page(settings, found, each_once, validated, own_found, cut)
    files = [f"full report: {report_file}", f"the pictures, to look through, and to edit their captions: {page}"]
    print("\n".join([*memory_lines, "", *files]))
    if settings.data.preview_data is not None:
        print(_write_preview(settings, pictures, sampler, not_drawn))
    if too_long is not None:
        raise too_long
    if left_out and not settings.data.skip_bad_images:
        source, reason = left_out[0]
        raise InputError(
            f"{source}: {reason} ({len(left_out)} bad pictures or rows in total). Fix them, or pass --skip_bad_images to "
            "leave them out."
        )


def _usable(records, *, left_out, not_drawn, alpha_mask):
    """Returns the records of the pictures that can be used, and their `Picture`s; adds the others to `left_out`.

    `not_drawn` has the `Picture` of each class picture that is still to be drawn, by its recipe.
    """
    recipes = records["recipe"][:]
    there = [i for i, recipe in enumerate(recipes) if recipe not in not_drawn]
    good, bad = examine.examine(records, there, alpha_mask=alpha_mask)
    good |= {i: not_drawn[recipe] for i, recipe in enumerate(recipes) if recipe in not_drawn}
    left_out.extend((records[index]["source"], reason) for index, reason in sorted(bad.items()))
    return examine.select_usable(records, good, bad)


def _write_preview(settings, pictures, sampler, not_drawn):
    """Writes the file of --preview_data, without the class pictures that are still to be drawn; returns a line about it."""
    drawn = [i for i, recipe in enumerate(pictures.records["recipe"]) if recipe not in not_drawn]
    if len(drawn) < len(pictures):
        pictures = pictures.select(drawn)
        sampler = make_run_sampler(settings, pictures, settings.run.seed or 0, 0, sampler.world_size)
    variations = settings.cache.num_variations(settings.augmentation)
    remove_concept = inputs.concept_of_run(settings, pictures.records)
    return inspection.write_preview(settings.data.preview_data, pictures, sampler, variations, remove_concept)


def _write_page(settings, found, each_once, validated, own_found, cut):
    """Writes dataset.html, and returns its path; `cut` has the indices of the pictures whose captions are truncated."""
    page = Path(settings.run.output_dir) / dataset_page.FILE
    with log.quiet("pictures"):
        tables = caption_tables(inputs.reading_of(settings))
    words = settings.captions
    added = [f"'{word}'" for word in (words.trigger_word, words.caption_prefix, words.caption_suffix) if word]
    remarks = (
        [f"The run adds {' and '.join(added)} to the captions, which are shown without it."]
        if added and tables
        else []
    )
    held_out = validated if settings.validation.validation_data_dir is None else None
    data = dataset_page.Data(each_once, held_out, own_found, cut, found.left_out, tables, remarks)
    dataset_page.write_dataset_page(page, data, title=f"Pictures for {Path(settings.run.output_dir).resolve().name}")
    return page


def _lengths(batches, schedule, sampler):
    """The lines of the report about the length of the run."""
    length = batches.describe_length(sampler.steps_per_epoch)
    lines = ["", f"training: {length} of batch {sampler.effective_batch_size}"]
    long_warmup = schedule.describe_long_warmup(batches.num_steps(sampler.steps_per_epoch))
    return lines if long_warmup is None else [*lines, long_warmup]


def _cache_bytes(settings, pictures, base, num_chunks):
    variations = settings.cache.num_variations(settings.augmentation)
    if not variations:
        return 0
    pictures = inputs.with_cached_tag_orders(settings, pictures)
    trains_text_encoder = settings.lora.train_text_encoder
    captions = (
        []
        if trains_text_encoder
        else caching.captions_to_cache(
            pictures, settings.captions, inputs.make_concept_remover(settings, pictures.records)
        )
    )
    dtype = torch.float32 if settings.speed.precision == "no" else torch.float16  # bfloat16 has the same size
    return caching.count_cache_bytes(
        pictures, base, variations=variations, captions=captions, num_chunks=num_chunks, dtype=dtype
    )


def _memory(settings, base, pictures, sampler, num_chunks, draws_class):
    """The `Needs` of the run, or None if the configuration of the base model is not known, and the lines of the report.

    `num_chunks` is None in the latter case, and `draws_class` is the number of class pictures that are drawn at once.
    """
    if num_chunks is None:
        return None, ["", "memory: unknown without the base model's configuration (--single_file_config FOLDER)"]
    index, batch_size = trials.heaviest_batch(pictures, sampler, sampler.batch_size)
    shapes = trials.find_shapes(pictures, index, base, num_chunks)
    plan = memory.make_plan(settings, base, modules.dtype_of(settings.speed.precision))
    needs = memory.estimate(base, shapes, plan._replace(draws_class=draws_class))
    device_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    ways, preserved = ways_to_save_memory(settings), settings.preservation.most(batch_size)
    return needs, ["", *memory.format_needs(needs, batch_size, ways, device_bytes, preserved=preserved)]

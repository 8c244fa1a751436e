"""--dry_run: what the dataset holds and what is wrong with it, and how much memory a run would take."""

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..models import loading, modules, prompts
from ..pictures import examine, inspection
from . import caching, inputs, memory, trials
from .run import choose_num_chunks, make_run_sampler
from .settings import ways_to_save_memory


def report(settings: Any, found: inputs.Inputs) -> None:
    """Prints the report and writes --output_dir/dataset.json and the sheet of --preview_data.

    No model is loaded but the tokenizer. Raises `InputError` for what training would refuse.
    """
    base, left_out = found.base, found.left_out

    def usable(records):
        good, bad = examine.examine(records, range(len(records)))
        left_out.extend((records[index]["source"], reason) for index, reason in sorted(bad.items()))
        return examine.usable_part(records, good)

    pictures, validated = inputs.make_picture_sets(settings, found, usable)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    sampler = make_run_sampler(settings, pictures, settings.run.seed or 0, 0, world_size)
    tokenizer, token_counts, num_chunks, too_long = loading.load_tokenizer(base), None, 1, None
    if tokenizer is not None:
        token_counts = prompts.count_tokens(tokenizer, pictures.captions)
        try:
            num_chunks, _ = choose_num_chunks(settings, tokenizer, [pictures])
        except InputError as error:
            too_long = error
    whole = tokenizer is None or settings.captions.long_prompts
    described = inspection.describe(
        pictures, left_out, sampler.samples, num_validated=len(validated or ()), token_counts=token_counts,
        token_limit=None if whole else tokenizer.model_max_length, steps_per_epoch=sampler.steps_per_epoch,
        cache_bytes=_cache_bytes(settings, pictures, base, num_chunks),
    )  # fmt: skip
    needs, memory_lines = _memory(settings, base, pictures, sampler, num_chunks, tokenizer is not None)
    report_file = Path(settings.run.output_dir) / "dataset.json"
    inspection.write_report(described | {"memory_bytes": needs and needs._asdict()}, report_file)
    print("\n".join([*inspection.lines_of(described), *memory_lines, "", f"all of it: {report_file}"]))
    if settings.data.preview_data is not None:
        variations = settings.cache.num_variations(settings.augmentation)
        print(inspection.write_preview(settings.data.preview_data, pictures, sampler, variations))
    if too_long is not None:
        raise too_long
    if left_out and not settings.data.skip_bad_images:
        source, reason = left_out[0]
        raise InputError(
            f"{source}: {reason} ({len(left_out)} such pictures or rows in all). Fix them, or pass --skip_bad_images to "
            "leave them out."
        )


def _cache_bytes(settings, pictures, base, num_chunks):
    variations = settings.cache.num_variations(settings.augmentation)
    if not variations:
        return 0
    seen = inputs.with_cached_tag_orders(settings, pictures)
    trains_text_encoder = settings.lora.train_text_encoder
    captions = [] if trains_text_encoder else caching.captions_to_cache(seen, settings.captions)
    dtype = torch.float32 if settings.speed.precision == "no" else torch.float16  # or another of two bytes
    return caching.count_cache_bytes(
        seen, base, variations=variations, captions=captions, num_chunks=num_chunks, dtype=dtype
    )


def _memory(settings, base, pictures, sampler, num_chunks, is_known):
    """The `Needs` of the run, and the lines that tell of them; None where the base's configuration is not there."""
    if not is_known:
        return None, ["", "memory: not told without the base's configuration (--single_file_config FOLDER)"]
    index, batch_size = trials.heaviest_batch(pictures, sampler, sampler.batch_size)
    shapes = trials.find_shapes(pictures, index, base, num_chunks)
    plan = memory.make_plan(settings, base, modules.dtype_of(settings.speed.precision))
    needs = memory.estimate(base, shapes, plan)
    own = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return needs, ["", *memory.format_needs(needs, batch_size, ways_to_save_memory(settings), own)]

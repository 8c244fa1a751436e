"""Reads pictures in batches while a model works on the batch before, and passes over those that can't be read."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from text_to_image_lora.errors import visible
from text_to_image_lora.files import counted, printable
from text_to_image_lora.pictures.inside import read_bytes
from text_to_image_lora.pictures.records import in_threads
from text_to_image_lora.pictures.transforms import ImageError, open_image
from text_to_image_lora.training import interruption


def open_picture(path: Path) -> tuple[Path, Any, str | None]:
    """Returns (path, picture, None), or (path, None, the reason why it can't be read)."""
    try:
        return path, open_image(read_bytes(path)), None
    except (ImageError, OSError) as error:
        return path, None, getattr(error, "strerror", None) or str(error)


def annotate(
    pictures: Sequence[Path],
    batch_size: int,
    work: Callable[[Mapping[Path, Any]], tuple[Mapping[Path, Any], Mapping[Path, str]]],
    record: Callable[[Mapping[Path, Any]], Any],
    title: str,
) -> dict[Path, str]:
    """Works on pictures in batches and passes the results to `record`; returns {path: reason} of those without a result.

    `work` returns {path: result} and {path: reason} for {path: picture}. `title` stands in front of the progress bar.
    """
    from tqdm import tqdm

    failed, done = {}, 0
    with tqdm(total=len(pictures), desc=title, unit="picture", disable=None) as bar:
        opened = in_threads(open_picture, pictures, ahead=batch_size)
        while batch := list(itertools.islice(opened, batch_size)):
            readable = {path: image for path, image, _ in batch if image is not None}
            reasons = {path: reason for path, _, reason in batch if reason is not None}
            results, without = work(readable) if readable else ({}, {})
            reasons |= without
            for path, reason in reasons.items():
                bar.write(visible(f"passed over: {printable(path)}: {reason}"))
            record(results)
            failed |= reasons
            done += len(batch)
            bar.update(len(batch))
            interruption.obey_requests(f"after {done} of {counted(len(pictures), 'picture')}")
    return failed

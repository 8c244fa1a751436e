"""Decodes all pictures once, to find the broken ones and to record sizes and perceptual hashes."""

import contextlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import InputError
from .masks import OPAQUE, WHOLLY, is_black, open_masked
from .records import image_id, in_threads, read_image_bytes, read_mask_bytes
from .transforms import ImageError


logger = logging.getLogger(__name__)
NOTHING = "so that nothing of the picture would be trained"
KNOWN_PICTURES = "pictures-3.txt"  # increase the number if pictures are judged or measured differently
# A line of that file, with its line break, because a killed run leaves half a line.
KNOWN = re.compile(rb"([0-9a-f]{32}) (\d+) (\d+) ([0-9a-f]{32}) ([012])\n")


class Picture(NamedTuple):
    """A usable picture: the id of its content, its size in pixels, its difference hash, and how transparent it is."""

    image_id: str
    width: int
    height: int
    hash: int = 0
    transparency: int = OPAQUE


def difference_hash(image: Image.Image) -> int:
    """Returns 128 bits: whether each cell of an 8x8 grid is brighter than its right neighbour, and than its lower neighbour.

    This is the dHash of N. Krawetz (2013) in both directions; resizing and compression hardly change it.
    """
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BILINEAR), dtype=int)
    bits = np.concatenate([(grey[:8, :8] > grey[:8, 1:]).ravel(), (grey[:8, :8] > grey[1:, :8]).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes())


def examine(
    records: Any, indices: Iterable[int], folder: str | Path | None = None, *, alpha_mask: bool = False
) -> tuple[dict[int, Picture], dict[int, str]]:
    """Decodes pictures; returns {index: `Picture`} of the usable ones and {index: reason} of the others.

    A list in `folder` records the usable pictures by their content, so that later runs do not decode them again. With
    `alpha_mask`, pictures of which nothing opaque would be trained are not usable.
    """
    known = {}
    memo = None if folder is None else Path(folder) / KNOWN_PICTURES
    if memo is not None and memo.exists():
        for line in memo.read_bytes().splitlines(keepends=True):
            if match := KNOWN.fullmatch(line):
                name = match[1].decode()
                known[name] = Picture(name, int(match[2]), int(match[3]), int(match[4], 16), int(match[5]))

    def look(index):
        try:
            row = records[index]
            data, mask = read_image_bytes(row["image"]), read_mask_bytes(row["mask"])
            name = image_id(data, mask)
            is_new = name not in known
            if is_new:
                opened = open_masked(data, mask)
                if opened.mask is not None and is_black(opened.mask):
                    raise ImageError(f"its mask is black everywhere, {NOTHING}")
                image = opened.image
                known[name] = Picture(
                    name, image.width, image.height, difference_hash(image), opened.transparency
                )  # fmt: skip
            if alpha_mask and known[name].transparency == WHOLLY:
                where = "everywhere" if mask is None else "wherever its mask is white"
                raise ImageError(f"it is transparent {where}, {NOTHING}")
            return index, known[name], None, is_new
        except (ImageError, OSError) as error:
            return index, None, str(error), False

    good, bad, new = {}, {}, []
    for index, found, reason, is_new in in_threads(look, indices):
        if reason is not None:
            bad[index] = reason
            continue
        good[index] = found
        if is_new:
            new.append(f"{found.image_id} {found.width} {found.height} {found.hash:032x} {found.transparency}\n")
    if new and memo is not None:
        with contextlib.suppress(OSError):  # if the list cannot be written, the next run decodes again
            memo.parent.mkdir(parents=True, exist_ok=True)
            with open(memo, "ab", buffering=0) as file:  # a single write, so that the lines of two runs do not mix
                file.write("".join(new).encode())
    return good, bad


def usable_pictures(
    records: Any, folder: str | Path, *, skip_bad_images: bool, accelerator: Any, alpha_mask: bool = False
) -> tuple[Any, list[Picture]]:
    """Returns the rows whose pictures can be decoded, and their `Picture`s; the processes share the work.

    Raises `InputError` for the first unusable picture; with `skip_bad_images` they are logged and left out instead.
    """
    from accelerate.utils import gather_object

    share = range(accelerator.process_index, len(records), accelerator.num_processes)
    found = gather_object([examine(records, share, folder, alpha_mask=alpha_mask)])
    good = {index: picture for part, _ in found for index, picture in part.items()}
    bad = {index: reason for _, part in found for index, reason in part.items()}
    if bad and not skip_bad_images:
        first = min(bad)
        more = f" ({len(bad)} unusable pictures in total)" if len(bad) > 1 else ""
        raise InputError(
            f"{records[first]['source']}: {bad[first]}{more}. Fix it, or pass --skip_bad_images to leave it out."
        )
    for index in sorted(bad):
        logger.info(f"left out: {records[index]['source']}: {bad[index]}")
    return select_usable(records, good, bad)


def select_usable(records: Any, good: dict[int, Picture], bad: dict[int, str]) -> tuple[Any, list[Picture]]:
    """Returns the rows that `examine` found usable, and their `Picture`s; raises `InputError` if there are none."""
    if not good:
        first = min(bad)
        raise InputError(
            f"{records[first]['source']}: {bad[first]}. None of the pictures can be used: there is nothing to train on."
        )
    return records.select(sorted(good)), [good[index] for index in sorted(good)]

"""The pictures themselves: which can be decoded, how large they are, and what they look like in 128 bits."""

import contextlib
import logging
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import InputError
from .records import image_id, in_threads, read_image_bytes, read_mask_bytes
from .transforms import ImageError, open_image, open_mask


logger = logging.getLogger(__name__)
# A line of the list of known pictures; the end of the line too, because a killed run leaves half a line.
KNOWN_PICTURES = "pictures-1.txt"  # another number for what is found out of a picture in another way
KNOWN = re.compile(rb"([0-9a-f]{32}) (\d+) (\d+) ([0-9a-f]{32})\n")


class Picture(NamedTuple):
    """A picture that can be used: its content's identity, sides in pixels, and difference hash."""

    image_id: str
    width: int
    height: int
    hash: int = 0


def difference_hash(image):
    """128 bits: whether each of 8x8 places is brighter than its neighbour to the right, and than the one below.

    The dHash of N. Krawetz (2013), in both directions; it stays nearly the same when a picture is resized or compressed.
    """
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BILINEAR), dtype=int)
    bits = np.concatenate([(grey[:8, :8] > grey[:8, 1:]).ravel(), (grey[:8, :8] > grey[1:, :8]).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes())


def examine(records, indices, folder=None):
    """{index: `Picture`} of those that can be used, and {index: reason} of the others.

    Pictures are decoded to see that they can be; with a `folder`, which keeps the list, those known by content are not
    decoded again.
    """
    known, memo = {}, None if folder is None else Path(folder) / KNOWN_PICTURES
    if memo is not None and memo.exists():
        for line in memo.read_bytes().splitlines(keepends=True):
            if match := KNOWN.fullmatch(line):
                name = match[1].decode()
                known[name] = Picture(name, int(match[2]), int(match[3]), int(match[4], 16))

    def look(index):
        try:
            row = records[index]
            data, mask = read_image_bytes(row["image"]), read_mask_bytes(row["mask"])
            name = image_id(data, mask)
            if name in known:
                return index, known[name], None, False
            image = open_image(data)
            if mask is not None:
                open_mask(mask, image.size)
            known[name] = Picture(name, *image.size, difference_hash(image))
            return index, known[name], None, True
        except (ImageError, OSError) as error:
            return index, None, str(error), False

    good, bad, new = {}, {}, []
    for index, found, reason, is_new in in_threads(look, indices):
        if reason is not None:
            bad[index] = reason
            continue
        good[index] = found
        if is_new:
            new.append(f"{found.image_id} {found.width} {found.height} {found.hash:032x}\n")
    if new and memo is not None:
        with contextlib.suppress(OSError):  # where the list can't be kept, the next run decodes again
            memo.parent.mkdir(parents=True, exist_ok=True)
            with open(memo, "ab", buffering=0) as file:  # one write, so that the lines of two runs don't mix
                file.write("".join(new).encode())
    return good, bad


def usable_pictures(records, folder, *, skip_bad_images, accelerator):
    """The rows whose pictures can be decoded, and the `Picture` of each; ranks share the work.

    Raises `InputError` for the first that can't be, unless `skip_bad_images`: then they are told and left out.
    """
    from accelerate.utils import gather_object

    share = range(accelerator.process_index, len(records), accelerator.num_processes)
    found = gather_object([examine(records, share, folder)])
    good, bad = ({k: v for part in found for k, v in part[which].items()} for which in (0, 1))
    if bad and not skip_bad_images:
        first = min(bad)
        more = f" ({len(bad)} such pictures in all)" if len(bad) > 1 else ""
        raise InputError(
            f"{records[first]['source']}: {bad[first]}{more}. Fix it, or pass --skip_bad_images to leave it out."
        )
    for index in sorted(bad):
        logger.info(f"left out: {records[index]['source']}: {bad[index]}")
    return select_usable(records, good)


def select_usable(records, good):
    """The rows that `examine` found good, and their `Picture`s; `InputError` where there are none."""
    if not good:
        raise InputError("Not one picture can be used: nothing to train on.")
    return records.select(sorted(good)), [good[index] for index in sorted(good)]

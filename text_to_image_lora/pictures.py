"""The pictures themselves: which can be decoded, how large they are, which are the same or look alike."""

import contextlib
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .errors import InputError
from .records import image_id, in_threads, read_image_bytes, read_mask_bytes
from .transforms import ImageError, open_image, open_mask


ALIKE_BITS = 7  # of the 128 bits of a difference hash; other pictures differ by some 30 at least
# A line of the list of known pictures; the end of the line too, because a killed run leaves half a line.
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


def examine(dataset, indices, folder=None):
    """{index: `Picture`} of those that can be used, and {index: reason} of the others.

    Pictures are decoded to see that they can be; with a `folder`, which keeps the list, those known by content are not
    decoded again.
    """
    known, memo = {}, None if folder is None else Path(folder) / "pictures.txt"
    if memo is not None and memo.exists():
        for line in memo.read_bytes().splitlines(keepends=True):
            if match := KNOWN.fullmatch(line):
                name = match[1].decode()
                known[name] = Picture(name, int(match[2]), int(match[3]), int(match[4], 16))

    def look(index):
        try:
            row = dataset[index]
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


def usable_part(dataset, good):
    """The rows that `examine` found good, and their `Picture`s; `InputError` where there are none."""
    if not good:
        raise InputError("Not one picture can be used: nothing to train on.")
    return dataset.select(sorted(good)), [good[index] for index in sorted(good)]


def usable_pictures(dataset, folder, *, skip_bad_images, accelerator, say):
    """The rows whose pictures can be decoded, and the `Picture` of each; ranks share the work.

    Raises `InputError` for the first that can't be, unless `skip_bad_images`: then they are told and left out.
    """
    from accelerate.utils import gather_object

    share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    found = gather_object([examine(dataset, share, folder)])
    good, bad = ({k: v for part in found for k, v in part[which].items()} for which in (0, 1))
    if bad and not skip_bad_images:
        first = min(bad)
        more = f" ({len(bad)} such pictures in all)" if len(bad) > 1 else ""
        raise InputError(
            f"{dataset[first]['source']}: {bad[first]}{more}. Fix it, or pass --skip_bad_images to leave it out."
        )
    for index in sorted(bad):
        say(f"left out: {dataset[index]['source']}: {bad[index]}")
    return usable_part(dataset, good)


def equal_pictures(pictures):
    """Groups of indices into a list of `Picture`s whose files are the same byte for byte."""
    groups = defaultdict(list)
    for index, picture in enumerate(pictures):
        groups[picture.image_id].append(index)
    return [group for group in groups.values() if len(group) > 1]


def alike_pictures(pictures):
    """Groups of indices of different files whose pictures look alike: hashes that differ by `ALIKE_BITS` at most.

    Hashes that near share one of eight bands of 16 bits, so only those within a band are compared.
    """
    first = {}
    for index, picture in enumerate(pictures):
        first.setdefault(picture.image_id, index)
    bands = defaultdict(list)
    for index in first.values():
        for band in range(8):
            bands[band, pictures[index].hash >> 16 * band & 0xFFFF].append(index)
    leader = {index: index for index in first.values()}

    def group_of(index):
        while leader[index] != index:
            index = leader[index] = leader[leader[index]]
        return index

    for members in bands.values():
        # Of a crowd each is compared with the first ones only: a band that so many share is a flat part of a picture.
        for place, a in enumerate(members):
            for b in members[max(0, place - 1000) : place] if len(members) < 5000 else members[: min(place, 20)]:
                if group_of(a) != group_of(b) and (pictures[a].hash ^ pictures[b].hash).bit_count() <= ALIKE_BITS:
                    leader[max(group_of(a), group_of(b))] = min(group_of(a), group_of(b))
    groups = defaultdict(list)
    for index in leader:
        groups[group_of(index)].append(index)
    return [sorted(group) for _, group in sorted(groups.items()) if len(group) > 1]


def groups_of(pictures):
    """A number for each picture; pictures that are the same or look alike have the same one."""
    group = list(range(len(pictures)))
    for alike in alike_pictures(pictures):
        for index in alike:
            group[index] = alike[0]
    for equal in equal_pictures(pictures):
        for index in equal:
            group[index] = group[equal[0]]
    return group


def hold_out(pictures, share):
    """Indices of the pictures to validate on: about `share` of them, those that look alike always together.

    Which they are depends on the pictures' content, not on their order or a seed, so that runs can be compared; a group of
    alike ones that would be too many stays in training. At least one picture is held out, or none where there is but one
    group.
    """
    groups = defaultdict(list)
    for index, group in enumerate(groups_of(pictures)):
        groups[group].append(index)

    def place(members):  # identities are hashes, so their order is a random one
        return min(pictures[index].image_id for index in members)

    ordered, wanted, chosen = sorted(groups.values(), key=place), max(1, round(share * len(pictures))), []
    for members in ordered:
        if len(chosen) + len(members) <= wanted:
            chosen += members
    if not chosen and len(ordered) > 1:
        chosen = min(ordered, key=len)
    return sorted(chosen)


def divide(dataset, images, others, share, say):
    """((records, pictures) to train on, (records, pictures) to validate on), with nothing in both.

    `others` are records and pictures to validate on; where it is None, `share` of the dataset's own are. Pictures to train
    on that look like one to validate on are left out, and so are class pictures. Raises `InputError` where nothing is left
    on either side.
    """

    def part(indices):
        return dataset.select(indices), [images[index] for index in indices]

    held_out, is_class = others, dataset["is_class"][:]
    if others is None:
        own = [index for index, other in enumerate(is_class) if not other]
        held_out = part([own[index] for index in hold_out([images[index] for index in own], share)])
    groups = groups_of([*images, *held_out[1]])
    taken = set(groups[len(images) :])
    kept = [index for index, group in enumerate(groups[: len(images)]) if group not in taken]
    more = len(images) - len(kept) - (len(held_out[1]) if others is None else 0)
    if others is not None and all(is_class[index] for index in kept):
        raise InputError("All pictures to train on look like one in --validation_data_dir. Put others into it.")
    if all(is_class[index] for index in kept) or not held_out[1]:
        raise InputError(
            f"{len(images)} pictures can't be divided into some to train on and others to validate on (those that look "
            "alike stay together). Leave --validation_split out, or bring more."
        )
    if more:
        say(f"{more} pictures are not trained on, because they look like one that is validated on")
    few = len(held_out[1])
    if few < 10:
        say(f"only {few} pictures to validate on: the validation loss is a rough guide (10 or more are better)")
    return part(kept), held_out


def probe_of(dataset, images, count, seed):
    """As many records and pictures that are trained on; their loss beside that of the others shows the overfitting."""
    own = np.flatnonzero(~np.asarray(dataset["is_class"][:], dtype=bool))
    chosen = sorted(np.random.default_rng([seed, 2]).permutation(own)[:count].tolist())
    return dataset.select(chosen), [images[index] for index in chosen]

"""Which pictures are the same or look alike, and a division of them that keeps those together."""

import logging
from collections import defaultdict

import numpy as np

from ..errors import InputError


logger = logging.getLogger(__name__)
ALIKE_BITS = 7  # of the 128 bits of a difference hash; other pictures differ by some 30 at least


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


def group_alike(pictures):
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
    for index, group in enumerate(group_alike(pictures)):
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


def divide(pictures, others, share):
    """(the `PictureSet` to train on, the one to validate on), with nothing in both.

    `others` are the pictures to validate on; where it is None, `share` of the set's own are. Pictures to train on that look
    like one to validate on are left out, and so are class pictures. Raises `InputError` where nothing is left on either
    side.
    """
    held_out, is_class = others, pictures.is_class
    if others is None:
        own = [index for index, other in enumerate(is_class) if not other]
        held_out = pictures.select([own[index] for index in hold_out([pictures.facts[index] for index in own], share)])
    groups = group_alike([*pictures.facts, *held_out.facts])
    taken = set(groups[len(pictures) :])
    kept = [index for index, group in enumerate(groups[: len(pictures)]) if group not in taken]
    more = len(pictures) - len(kept) - (len(held_out) if others is None else 0)
    if others is not None and all(is_class[index] for index in kept):
        raise InputError("All pictures to train on look like one in --validation_data_dir. Put others into it.")
    if all(is_class[index] for index in kept) or not len(held_out):
        raise InputError(
            f"{len(pictures)} pictures can't be divided into some to train on and others to validate on (those that look "
            "alike stay together). Leave --validation_split out, or bring more."
        )
    if more:
        logger.info(f"{more} pictures are not trained on, because they look like one that is validated on")
    few = len(held_out)
    if few == 1:
        logger.info("only 1 picture to validate on: best/ and early stopping follow it alone (10 or more are better)")
    elif few < 10:
        logger.info(
            f"only {few} pictures to validate on: the validation loss is a rough guide (10 or more are better)"
        )
    return pictures.select(kept), held_out


def pick_probe(pictures, count, seed):
    """As many pictures that are trained on; their loss beside that of the others shows the overfitting."""
    own = np.flatnonzero(~np.asarray(pictures.is_class, dtype=bool))
    return pictures.select(sorted(np.random.default_rng([seed, 2]).permutation(own)[:count].tolist()))

"""Finds pictures that are equal or look alike, and splits a set without separating them."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .examine import Picture
from .picture_set import PictureSet


logger = logging.getLogger(__name__)
ALIKE_BITS = 7  # of the 128 bits of a difference hash; different pictures differ in about 30 bits or more


def equal_pictures(pictures: Sequence[Picture]) -> list[list[int]]:
    """Returns groups of indices of the pictures whose files are equal byte for byte."""
    groups = defaultdict(list)
    for index, picture in enumerate(pictures):
        groups[picture.image_id].append(index)
    return [group for group in groups.values() if len(group) > 1]


def alike_pictures(pictures: Sequence[Picture]) -> list[list[int]]:
    """Returns groups of indices of different files that look alike: their hashes differ in at most `ALIKE_BITS` bits.

    Such hashes agree in at least one of eight bands of 16 bits, so only hashes that share a band are compared.
    """
    first = {}
    for index, picture in enumerate(pictures):
        first.setdefault(picture.image_id, index)
    bands = defaultdict(list)
    for index in first.values():
        for band in range(8):
            bands[band, pictures[index].hash >> 16 * band & 0xFFFF].append(index)
    leader = {index: index for index in first.values()}

    def find_leader(index):
        while leader[index] != index:
            index = leader[index] = leader[leader[index]]
        return index

    for members in bands.values():
        # A band that very many pictures share is a flat area; there, each picture is compared with the first ones only.
        for place, a in enumerate(members):
            for b in members[max(0, place - 1000) : place] if len(members) < 5000 else members[: min(place, 20)]:
                if (
                    find_leader(a) != find_leader(b)
                    and (pictures[a].hash ^ pictures[b].hash).bit_count() <= ALIKE_BITS
                ):
                    leader[max(find_leader(a), find_leader(b))] = min(find_leader(a), find_leader(b))
    groups = defaultdict(list)
    for index in leader:
        groups[find_leader(index)].append(index)
    return [sorted(group) for _, group in sorted(groups.items()) if len(group) > 1]


def group_alike(pictures: Sequence[Picture]) -> list[int]:
    """Returns a group number for each picture; pictures that are equal or look alike share it."""
    group = list(range(len(pictures)))
    for alike in alike_pictures(pictures):
        for index in alike:
            group[index] = alike[0]
    for equal in equal_pictures(pictures):
        for index in equal:
            group[index] = group[equal[0]]
    return group


def hold_out(pictures: Sequence[Picture], share: float) -> list[int]:
    """Returns the indices of about `share` of the pictures, to validate on; pictures that look alike stay together.

    The choice depends on the content of the pictures, not on their order or a seed, so that runs can be compared. Groups
    that are too large stay in the training set. At least one picture is held out if there are two groups or more.
    """
    groups = defaultdict(list)
    for index, group in enumerate(group_alike(pictures)):
        groups[group].append(index)

    def smallest_id(members):  # ids are hashes, so this order is random
        return min(pictures[index].image_id for index in members)

    ordered = sorted(groups.values(), key=smallest_id)
    wanted, chosen = max(1, round(share * len(pictures))), []
    for members in ordered:
        if len(chosen) + len(members) <= wanted:
            chosen += members
    if not chosen and len(ordered) > 1:
        chosen = min(ordered, key=len)
    return sorted(chosen)


def divide(pictures: PictureSet, others: Any, share: Any) -> tuple[PictureSet, PictureSet]:
    """Returns the training set and the validation set, which have no picture in common.

    `others` is the validation set; if it is None, `share` of the pictures (class pictures excepted) are held out. Training
    pictures that look like a validation picture are left out. Raises `InputError` if one of the sets is empty.
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
        raise InputError(
            "All training pictures look like validation pictures. Put different pictures into --validation_data_dir."
        )
    if all(is_class[index] for index in kept) or not len(held_out):
        raise InputError(
            f"{len(pictures)} pictures can't be split into training and validation pictures (pictures that look alike stay "
            "together). Remove --validation_split or add more pictures."
        )
    if more:
        logger.info(f"{more} pictures are not trained on, because they look like a validation picture")
    if len(held_out) == 1:
        logger.info("only 1 validation picture: best/ and early stopping depend on it alone (use 10 or more)")
    elif len(held_out) < 10:
        logger.info(
            f"only {len(held_out)} validation pictures: the validation loss is a rough estimate (use 10 or more)"
        )
    return pictures.select(kept), held_out


def pick_probe(pictures: PictureSet, count: int, seed: int) -> PictureSet:
    """Draws `count` training pictures, whose loss beside the validation loss shows overfitting."""
    pictures = pictures.each_once()
    own = np.flatnonzero(~np.asarray(pictures.is_class, dtype=bool))
    return pictures.select(sorted(np.random.default_rng([seed, 2]).permutation(own)[:count].tolist()))

"""Aspect-ratio buckets: which size each picture is trained at, so that little of it is cut off.

The sizes are those of kohya's sd-scripts (and of NovelAI's description of aspect-ratio bucketing, 2022): every multiple
of a step as the width, and the largest height with which the area stays that of the square.
"""

import math
from collections import Counter

from .errors import InputError


def make_buckets(resolution, *, smallest, largest, step):
    """Sizes (width, height) in pixels, each with sides from `smallest` to `largest` that are multiples of `step`.

    The square comes first; for every size the one turned on its side is there too.
    """
    square = resolution // step * step
    if not step <= smallest <= square <= largest:
        raise InputError(
            f"--bucket_min_size {smallest} and --bucket_max_size {largest}: they must enclose --resolution {resolution}, "
            f"and be no smaller than --bucket_step {step}."
        )
    sizes = [(square, square)]
    for width in range(-(-smallest // step) * step, largest + 1, step):
        height = min(largest, resolution**2 // width // step * step)
        if height >= smallest:
            sizes += [(width, height), (height, width)]
    return list(dict.fromkeys(sizes))


def choose_bucket(width, height, buckets):
    """The bucket whose aspect ratio is nearest to the picture's; of equals the larger one."""

    def distance(size):
        return round(abs(math.log(size[0] / size[1]) - math.log(width / height)), 9), -size[0] * size[1]

    return min(buckets, key=distance)


def own_size(width, height, resolution, *, smallest, largest, step):
    """The size of a picture that is not to be enlarged: its own, less what is over a multiple of the step.

    Pictures with more pixels than the square are reduced to its area first (kohya's `bucket_no_upscale`).
    """
    scale = min(1.0, resolution / (width * height) ** 0.5)
    sides = (min(max(int(side * scale + 1e-6) // step * step, smallest), largest) for side in (width, height))
    return tuple(sides)


def sizes_of(images, resolution, *, smallest, largest, step, no_upscale):
    """The size that each of the pictures (a list of (width, height)) is trained at."""
    if no_upscale:
        limits = dict(smallest=smallest, largest=largest, step=step)
        return [own_size(width, height, resolution, **limits) for width, height in images]
    buckets = make_buckets(resolution, smallest=smallest, largest=largest, step=step)
    chosen = {size: choose_bucket(*size, buckets) for size in set(images)}
    return [chosen[size] for size in images]


def settle_limits(resolution, image_factor, *, smallest=None, largest=None, step=None):
    """The limits of the buckets, in pixels, where some are not given: half and twice the resolution, in steps of 64.

    Fewer than 64 for small resolutions, a multiple of `image_factor` always. Sides that are no multiple of the step are
    moved inwards. Raises `InputError` where no sizes can be made of them.
    """
    if step is None:
        step = image_factor * max(1, min(64, resolution // 8) // image_factor)
    if step % image_factor:
        near = max(round(step / image_factor), 1) * image_factor
        raise InputError(f"--bucket_step {step}: this model needs a multiple of {image_factor}, e.g. {near}.")
    smallest = max(resolution // 2 // step, 1) * step if smallest is None else smallest
    largest = 2 * resolution if largest is None else largest
    limits = dict(smallest=-(-smallest // step) * step, largest=largest // step * step, step=step)
    make_buckets(resolution, **limits)
    return limits


def num_enlarged(images, sizes):
    """How many of the pictures (with `width` and `height`) are smaller than the size they are trained at."""
    return sum(im.width < width or im.height < height for im, (width, height) in zip(images, sizes, strict=True))


def table(sizes, samples):
    """Lines that tell each bucket's size, pictures and samples an epoch (indices of pictures), the largest first."""
    pictures, samples = Counter(sizes), Counter(sizes[index] for index in samples)
    lines = ["bucket        pictures  samples an epoch"]
    for (width, height), count in sorted(pictures.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"{f'{width}x{height}':<12}{count:>10}{samples[width, height]:>18}")
    return lines

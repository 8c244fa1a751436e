"""Aspect-ratio buckets: which size each picture is trained at, so that little of it is cut off.

The sizes are those of kohya's sd-scripts (and of NovelAI's description of aspect-ratio bucketing, 2022): every multiple
of a step as the width, and the largest height with which the area stays that of the square.
"""

import math
from collections import Counter
from typing import NamedTuple

from ..errors import InputError


class Buckets(NamedTuple):
    """Which sizes pictures are trained at: sides in pixels; with all four alike, the square alone."""

    resolution: int
    smallest: int
    largest: int
    step: int
    no_upscale: bool = False  # small pictures keep their own size

    def all(self):
        """The sizes (width, height), the square first; for every size the one turned on its side is there too."""
        square = self.resolution // self.step * self.step
        if not self.step <= self.smallest <= square <= self.largest:
            raise InputError(
                f"--bucket_min_size {self.smallest} and --bucket_max_size {self.largest}: they must enclose --resolution "
                f"{self.resolution}, and be no smaller than --bucket_step {self.step}."
            )
        sizes = [(square, square)]
        for width in range(-(-self.smallest // self.step) * self.step, self.largest + 1, self.step):
            height = min(self.largest, self.resolution**2 // width // self.step * self.step)
            if height >= self.smallest:
                sizes += [(width, height), (height, width)]
        return list(dict.fromkeys(sizes))

    def choose_sizes(self, pictures):
        """The size that each of the pictures (with `width` and `height`) is trained at."""
        sides = [(picture.width, picture.height) for picture in pictures]
        if self.no_upscale:
            return [self._own_size(*side) for side in sides]
        buckets = self.all()
        chosen = {side: choose_bucket(*side, buckets) for side in set(sides)}
        return [chosen[side] for side in sides]

    def _own_size(self, width, height):
        """The size of a picture that is not to be enlarged: its own, less what is over a multiple of the step.

        Pictures with more pixels than the square are reduced to its area first (kohya's `bucket_no_upscale`).
        """
        scale = min(1.0, self.resolution / (width * height) ** 0.5)
        return tuple(
            min(max(int(side * scale + 1e-6) // self.step * self.step, self.smallest), self.largest)
            for side in (width, height)
        )


def square(resolution):
    """No buckets: every picture at resolution x resolution pixels."""
    return Buckets(resolution, smallest=resolution, largest=resolution, step=resolution)


def choose_bucket(width, height, buckets):
    """The bucket whose aspect ratio is nearest to the picture's; of equals the larger one."""

    def distance(size):
        return round(abs(math.log(size[0] / size[1]) - math.log(width / height)), 9), -size[0] * size[1]

    return min(buckets, key=distance)


def make_buckets(resolution, image_factor, *, smallest=None, largest=None, step=None, no_upscale=False):
    """The `Buckets` where some limits are not given: half and twice the resolution, in steps of 64 pixels.

    Steps are smaller for small resolutions, and a multiple of `image_factor` always. Sides that are no multiple of the
    step are moved inwards. Raises `InputError` where no sizes can be made of them.
    """
    if step is None:
        step = image_factor * max(1, min(64, resolution // 8) // image_factor)
    if step % image_factor:
        near = max(round(step / image_factor), 1) * image_factor
        raise InputError(f"--bucket_step {step}: this model needs a multiple of {image_factor}, e.g. {near}.")
    smallest = max(resolution // 2 // step, 1) * step if smallest is None else smallest
    largest = 2 * resolution if largest is None else largest
    buckets = Buckets(resolution, -(-smallest // step) * step, largest // step * step, step, no_upscale)
    buckets.all()
    return buckets


def find_enlarged(pictures, sizes):
    """The indices of the pictures (with `width` and `height`) that are smaller than the size they are trained at."""
    return [
        index
        for index, (picture, (width, height)) in enumerate(zip(pictures, sizes, strict=True))
        if picture.width < width or picture.height < height
    ]


def table(sizes, samples):
    """Lines that tell each bucket's size, pictures and samples an epoch (indices of pictures), the largest first."""
    pictures, samples = Counter(sizes), Counter(sizes[index] for index in samples)
    lines = ["bucket        pictures  samples an epoch"]
    for (width, height), count in sorted(pictures.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"{f'{width}x{height}':<12}{count:>10}{samples[width, height]:>18}")
    return lines

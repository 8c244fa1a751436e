"""Aspect-ratio buckets: the size that each picture is trained at, so that little of it is cropped.

The sizes are those of kohya's sd-scripts (and of NovelAI's description of aspect-ratio bucketing, 2022): the width is a
multiple of a step, and the height is the largest one whose area does not exceed that of the square.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import InputError


class Buckets(NamedTuple):
    """The limits of the bucket sizes, in pixels; if all four are equal, the square is the only size."""

    resolution: int
    smallest: int
    largest: int
    step: int
    no_upscale: bool = False  # small pictures keep their own size

    def all(self) -> list[tuple[int, int]]:
        """Returns all sizes (width, height), the square first, each in both orientations."""
        square = self.resolution // self.step * self.step
        if not self.step <= self.smallest <= square <= self.largest:
            raise InputError(
                f"--bucket_min_size {self.smallest} and --bucket_max_size {self.largest}: they must enclose --resolution "
                f"{self.resolution} and must not be smaller than --bucket_step {self.step}."
            )
        sizes = [(square, square)]
        for width in range(-(-self.smallest // self.step) * self.step, self.largest + 1, self.step):
            height = min(self.largest, self.resolution**2 // width // self.step * self.step)
            if height >= self.smallest:
                sizes += [(width, height), (height, width)]
        return list(dict.fromkeys(sizes))

    def choose_sizes(self, pictures: Sequence[Any]) -> list[tuple[int, int]]:
        """Returns the size (width, height) for each picture, which has `width` and `height`."""
        sides = [(picture.width, picture.height) for picture in pictures]
        if self.no_upscale:
            return [self._own_size(*side) for side in sides]
        buckets = self.all()
        chosen = {side: choose_bucket(*side, buckets) for side in set(sides)}
        return [chosen[side] for side in sides]

    def large_enough(self, pictures: Sequence[Any]) -> list[bool]:
        """Returns whether each picture is trained at this resolution without being enlarged.

        Small pictures that keep their own size are not enlarged, but have less than the area of the square.
        """
        enlarged = {*find_enlarged(pictures, self.choose_sizes(pictures))}
        area = self.resolution**2 if self.no_upscale else 0
        return [i not in enlarged and picture.width * picture.height >= area for i, picture in enumerate(pictures)]

    def _own_size(self, width, height):
        """Returns the size of a picture that is not enlarged: its own size, rounded down to multiples of the step.

        Pictures with a larger area than the square are first scaled down to that area (kohya's `bucket_no_upscale`).
        """
        scale = min(1.0, self.resolution / (width * height) ** 0.5)

        def fit(side):
            return min(max(int(side * scale + 1e-6) // self.step * self.step, self.smallest), self.largest)

        return fit(width), fit(height)


class Resolutions(NamedTuple):
    """The `Buckets` of each --resolution, the smallest first."""

    buckets: tuple[Buckets, ...]

    def check_distinct(self) -> None:
        """Raises `InputError` if a step is so large that two resolutions have equal buckets."""
        for smaller, larger in itertools.pairwise(self.buckets):
            if smaller.all()[0] == larger.all()[0]:
                raise InputError(
                    f"--resolution {smaller.resolution} {larger.resolution}: with --bucket_step {larger.step}, they are one "
                    "size. Leave one of them out, or pass a smaller step."
                )

    def sizes_of_each(self, pictures: Sequence[Any]) -> list[list[tuple[int, int]]]:
        """Returns the sizes (width, height) that each picture is trained at, the largest first.

        A picture is trained at each resolution that it is large enough for. One that is too small for all is trained at the
        smallest resolution, as it would be if that were the only one.
        """
        first, *others = (buckets.choose_sizes(pictures) for buckets in self.buckets)
        if not others:
            return [[size] for size in first]
        fitting = [buckets.large_enough(pictures) for buckets in self.buckets]
        sizes = []
        for i, smallest in enumerate(first):
            fits = [row[i] for row, fit in zip([first, *others], fitting, strict=True) if fit[i]]
            # Where --bucket_max_size limits both, two resolutions can have equal sizes.
            sizes.append([*dict.fromkeys(reversed(fits or [smallest]))])
        return sizes

    def too_small(self, pictures: Sequence[Any]) -> dict[int, list[int]]:
        """Returns {resolution: indices of the pictures that are too small for it} for all resolutions but the smallest."""
        return {
            buckets.resolution: [i for i, fits in enumerate(buckets.large_enough(pictures)) if not fits]
            for buckets in self.buckets[1:]
        }


def square(resolution: int) -> Buckets:
    """Returns the `Buckets` whose only size is resolution x resolution."""
    return Buckets(resolution, smallest=resolution, largest=resolution, step=resolution)


def choose_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the bucket with the nearest aspect ratio; the larger one of equally near buckets."""

    def distance(size):
        return round(abs(math.log(size[0] / size[1]) - math.log(width / height)), 9), -size[0] * size[1]

    return min(buckets, key=distance)


def make_buckets(
    resolution: int, image_factor: int, *, smallest: int | None = None, largest: int | None = None,
    step: int | None = None, no_upscale: bool = False,
) -> Buckets:  # fmt: skip
    """Returns the `Buckets` with defaults for missing limits: half and twice the resolution, in steps of 64 pixels.

    The default step is smaller for small resolutions; a step is always a multiple of `image_factor`. Sides that are not
    multiples of the step are moved inwards. Raises `InputError` if the limits allow no size.
    """
    if step is None:
        step = image_factor * max(1, min(64, resolution // 8) // image_factor)
    if step % image_factor:
        nearest = max(round(step / image_factor), 1) * image_factor
        raise InputError(f"--bucket_step {step}: this model needs a multiple of {image_factor}, e.g. {nearest}.")
    smallest = max(resolution // 2 // step, 1) * step if smallest is None else smallest
    largest = 2 * resolution if largest is None else largest
    buckets = Buckets(resolution, -(-smallest // step) * step, largest // step * step, step, no_upscale)
    buckets.all()
    return buckets


def find_enlarged(pictures: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the indices of the pictures (with `width` and `height`) that are smaller than their training size."""
    return [
        index
        for index, (picture, (width, height)) in enumerate(zip(pictures, sizes, strict=True))
        if picture.width < width or picture.height < height
    ]


def format_table(sizes: Sequence[tuple[int, int]], samples: Iterable[int], title: str = "bucket") -> list[str]:
    """Formats a table of the sizes, the one with most pictures first; `samples` are the indices of an epoch."""
    pictures, num_samples = Counter(sizes), Counter(sizes[index] for index in samples)
    lines = [f"{title:<14}pictures  samples per epoch"]
    for (width, height), count in sorted(pictures.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"{f'{width}x{height}':<12}{count:>10}{num_samples[width, height]:>19}")
    return lines

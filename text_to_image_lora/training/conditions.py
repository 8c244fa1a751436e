"""What the denoiser is told of a variation of a picture itself."""

import torch

from ..pictures.transforms import corner_shown


def picture_condition_of(pictures, i, k, family):
    """What the family's denoiser is told of variation k of picture i itself, float32 tensors by name."""
    fact, size = pictures.facts[i], pictures.sizes[i]
    corner = corner_shown(fact.width, fact.height, pictures.variation(i, k), size)
    numbers = family.picture_condition((fact.width, fact.height), corner, size)
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in numbers.items()}

"""The conditions that a denoiser takes from a picture, beside its caption."""

from typing import Any

import torch

from ..pictures.transforms import corner_shown


def make_picture_condition(pictures: Any, i: int, k: int, family: Any) -> dict[str, torch.Tensor]:
    """Returns the float32 tensors by name that the family's denoiser takes for variation k of picture i."""
    fact, size = pictures.facts[i], pictures.sizes[i]
    corner = corner_shown(fact.width, fact.height, pictures.variation(i, k), size)
    numbers = family.picture_condition((fact.width, fact.height), corner, size)
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in numbers.items()}

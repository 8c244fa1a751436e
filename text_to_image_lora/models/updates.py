"""Compares, adds and resizes LoRA updates ΔW = B·A without computing the products.

State dicts are peft's with the scale folded into lora_B. Tensors of convolutions are used as matrices, (rank, in·k·k) and
(out, rank).
"""

import torch

from ..errors import InputError


def modules_of(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names of the adapted modules, in order."""
    return list(dict.fromkeys(key.partition(".lora_")[0] for key in state_dict))


def factors(state_dict: dict[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and B of a module in float64, flattened to matrices."""
    a, b = (state_dict[f"{module}.lora_{leaf}.weight"].double().flatten(1) for leaf in "AB")
    return a, b


def shapes_of(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns {module: shape of the base weight}: (out, in), or (out, in, k, k) for a convolution."""
    return {
        module: (len(state_dict[f"{module}.lora_B.weight"]), *state_dict[f"{module}.lora_A.weight"].shape[1:])
        for module in modules_of(state_dict)
    }


def norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the Frobenius norm of B·A."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()


def relative_difference(trained: tuple, other: tuple) -> float:
    """Returns the Frobenius norm of the difference of two updates (A, B), relative to the norm of the first one.

    It is computed as (B - B')·A + B'·(A - A'), so that equal values cancel before the products; inf if the first is zero.
    """
    rank = max(len(trained[0]), len(other[0]))
    (a, b), (a2, b2) = (
        (torch.nn.functional.pad(a, (0, 0, 0, rank - len(a))), torch.nn.functional.pad(b, (0, rank - len(a))))
        for a, b in (trained, other)
    )
    difference = norm(torch.cat([a, a - a2]), torch.cat([b - b2, b2], dim=1))
    if difference == 0:
        return 0.0
    return difference / norm(a, b) if norm(a, b) > 0 else float("inf")


def resize(state_dict: dict[str, torch.Tensor], rank: int) -> tuple[dict, dict[str, tuple[float, float]]]:
    """Returns the best approximation of each update with at most this rank, and {module: (error, norm)}.

    It keeps the largest singular values of B·A, computed from QR decompositions of A and B. A layer that is narrower than
    the rank, such as `conv_out`, gets its full rank. DoRA's magnitudes stay.
    """
    resized, errors = dict(state_dict), {}
    for module in modules_of(state_dict):
        a, b = factors(state_dict, module)
        if len(a) > rank:
            q_b, r_b = torch.linalg.qr(b)
            q_a, r_a = torch.linalg.qr(a.T)
            left, values, right = torch.linalg.svd(r_b @ r_a.T)
            own = min(rank, len(values))
            root = values[:own].sqrt()
            for leaf, value in ("A", (q_a @ right[:own].T * root).T), ("B", q_b @ left[:, :own] * root):
                key = f"{module}.lora_{leaf}.weight"
                shape = state_dict[key].shape
                shape = (own, *shape[1:]) if leaf == "A" else (shape[0], own, *shape[2:])
                resized[key] = value.reshape(shape).float().contiguous()
        errors[module] = relative_difference((a, b), factors(resized, module)) * norm(a, b), norm(a, b)
    return resized, errors


def merge(parts: list[tuple[dict[str, dict], float]]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the exact sum of strength x update over [(components, strength)]; the ranks add up."""
    merged = {}
    for components, strength in parts:
        for name, state_dict in components.items():
            if any(key.endswith((".lora_magnitude_vector", ".bias")) for key in state_dict):
                raise InputError(
                    "DoRA's update depends on the weights of the base model, so it can't be merged without them. Use "
                    "infer.py --lora A:0.5 B:0.3 --save_merged FOLDER, which merges LoRAs into the base model."
                )
            whole = merged.setdefault(name, {})
            for module in modules_of(state_dict):
                keys = [f"{module}.lora_{leaf}.weight" for leaf in "AB"]
                a, b = state_dict[keys[0]], state_dict[keys[1]] * strength
                if keys[0] in whole:
                    if whole[keys[0]].shape[1:] != a.shape[1:] or len(whole[keys[1]]) != len(b):
                        raise InputError(
                            f"{name}.{module} differs in shape between the LoRAs: they belong to different models."
                        )
                    a, b = torch.cat([whole[keys[0]], a]), torch.cat([whole[keys[1]], b], dim=1)
                whole |= dict(zip(keys, (a, b)))
    return merged

"""What can be done with LoRA updates ΔW = B·A without forming them: compared, added up, brought to a smaller rank.

State dicts are peft's with the scale in lora_B. A convolution's tensors count as matrices, (rank, in·k·k) and (out, rank).
"""

import torch

from ..errors import InputError


def modules_of(state_dict):
    """The names of the adapted modules, in order."""
    return list(dict.fromkeys(key.partition(".lora_")[0] for key in state_dict))


def factors(state_dict, module):
    """(A, B) of a module in float64, flattened to matrices."""
    return tuple(state_dict[f"{module}.lora_{leaf}.weight"].double().flatten(1) for leaf in "AB")


def shapes_of(state_dict):
    """{module: shape of its base weight}, as far as an adapter tells: (out, in), or (out, in, k, k)."""
    return {
        module: (len(state_dict[f"{module}.lora_B.weight"]), *state_dict[f"{module}.lora_A.weight"].shape[1:])
        for module in modules_of(state_dict)
    }


def norm(a, b):
    """The Frobenius norm of B·A."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()


def relative_difference(trained, other):
    """The Frobenius norm of the difference of two updates (A, B) as a share of the first one's; inf for one of nothing.

    As (B - B')·A + B'·(A - A'), so that what is equal cancels before it is multiplied.
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


def resize(state_dict, rank):
    """The best approximation of each update of at most this rank, and {module: (its error, its norm)}.

    By the singular values of B·A, found in the space of its rank (QR of both factors). DoRA's magnitudes stay.
    """
    resized, errors = dict(state_dict), {}
    for module in modules_of(state_dict):
        a, b = factors(state_dict, module)
        if len(a) > rank:
            q_b, r_b = torch.linalg.qr(b)
            q_a, r_a = torch.linalg.qr(a.T)
            left, values, right = torch.linalg.svd(r_b @ r_a.T)
            root = values[:rank].sqrt()
            for leaf, value in ("A", (q_a @ right[:rank].T * root).T), ("B", q_b @ left[:, :rank] * root):
                key = f"{module}.lora_{leaf}.weight"
                shape = state_dict[key].shape
                shape = (rank, *shape[1:]) if leaf == "A" else (shape[0], rank, *shape[2:])
                resized[key] = value.reshape(shape).float().contiguous()
        errors[module] = relative_difference((a, b), factors(resized, module)) * norm(a, b), norm(a, b)
    return resized, errors


def merge(parts):
    """The sum of strength x update over [(components, strength)], exactly: the ranks add up."""
    merged = {}
    for components, strength in parts:
        for name, state_dict in components.items():
            if any(key.endswith((".lora_magnitude_vector", ".bias")) for key in state_dict):
                raise InputError(
                    "DoRA's update depends on the base model's weights, so it can't be added to others without them: "
                    "infer.py --lora A:0.5 B:0.3 --save_merged FOLDER adds them in the base."
                )
            whole = merged.setdefault(name, {})
            for module in modules_of(state_dict):
                keys = [f"{module}.lora_{leaf}.weight" for leaf in "AB"]
                a, b = state_dict[keys[0]], state_dict[keys[1]] * strength
                if keys[0] in whole:
                    if whole[keys[0]].shape[1:] != a.shape[1:] or len(whole[keys[1]]) != len(b):
                        raise InputError(
                            f"{name}.{module} differs in shape between them: they are of different models."
                        )
                    a, b = torch.cat([whole[keys[0]], a]), torch.cat([whole[keys[1]], b], dim=1)
                whole |= dict(zip(keys, (a, b)))
    return merged

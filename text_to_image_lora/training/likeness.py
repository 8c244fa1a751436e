"""Checks state from a file against the state that the running objects have: names, shapes, dtypes and finiteness.

PyTorch copies what a file holds into an optimizer without looking at it, and fused kernels then read beyond their memory.
"""

import collections
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..models.modules import non_finite


def check_like(found: Any, like: Any, name: str) -> Any:
    """Returns a copy of `found`; raises `ValueError` unless it has the structure of `like`.

    Mappings must have equal keys, lists equal lengths, and tensors equal shapes and dtypes. Numbers must be finite, and other
    values of the same type. `name` is that of the value in messages.
    """
    if isinstance(like, torch.Tensor):
        return _check_tensor(found, like, name)
    if isinstance(like, dict):
        _check_type(found, dict, name)
        if found.keys() != like.keys():
            odd = sorted(map(str, found.keys() ^ like.keys()))
            raise ValueError(f"{name} has other entries than expected: {', '.join(odd[:3])}")
        return {key: check_like(value, like[key], f"{name}.{key}") for key, value in found.items()}
    if isinstance(like, list | tuple):
        _check_type(found, list | tuple, name)
        if len(found) != len(like):
            raise ValueError(f"{name} has {len(found)} values instead of {len(like)}")
        return type(like)(check_like(*pair, f"{name}[{i}]") for i, pair in enumerate(zip(found, like)))
    if isinstance(like, bool | str | None):
        _check_type(found, type(like), name)
        return found
    return check_number(found, name)


def check_number(found: Any, name: str) -> float:
    """Returns a number; raises `ValueError` if it is none, or not finite."""
    _check_type(found, int | float, name)
    if isinstance(found, bool) or not abs(found) < math.inf:
        raise ValueError(f"{name} is {found}, which is no finite number")
    return found


def _check_type(found, kind, name):
    if not isinstance(found, kind):
        raise ValueError(f"{name} is of the wrong type, {type(found).__name__}")


def _check_tensor(found, like, name):
    _check_type(found, torch.Tensor, name)
    if found.layout != torch.strided or found.is_meta or found.is_quantized:
        raise ValueError(f"{name} is no plain tensor")
    if (found.shape, found.dtype) != (like.shape, like.dtype):
        raise ValueError(f"{name} is {_describe(found)} instead of {_describe(like)}")
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise ValueError(f"{name} is not finite")
    return found.clone()  # several tensors, or parts of one, may share their memory


def _describe(tensor):
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_optimizer_state(stored: Any, optimizer: torch.optim.Optimizer, learned: set[str]) -> dict[str, Any]:
    """Returns a copy of an optimizer's state dict; raises `ValueError` unless this optimizer could have made it.

    Of the options in its groups, only the rate and those in `learned` are returned.
    """
    _check_type(stored, dict, "the optimizer's state")
    state, groups = stored.get("state"), stored.get("param_groups")
    _check_type(state, dict, "the optimizer's state")
    _check_type(groups, list, "the optimizer's groups")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"the optimizer's state has {len(groups)} groups instead of {len(optimizer.param_groups)}")
    checked_state, checked_groups, first = {}, [], 0
    for group, own in zip(groups, optimizer.param_groups):
        numbers = [*range(first, first + len(own["params"]))]
        first += len(numbers)
        if not isinstance(group, dict) or group.get("params") != numbers:
            raise ValueError("the optimizer's state is for other weights")
        expected = _after_a_step(optimizer, own)
        options = {
            key: check_like(value, expected.options[key], key) for key, value in group.items() if key in learned
        }
        checked_groups.append(options | {"params": numbers, "lr": check_number(group.get("lr"), "the learning rate")})
        for number, weight in zip(numbers, own["params"]):
            if state.get(number):  # a weight that never had a gradient has no state
                name = f"the optimizer's state {number}"
                checked_state[number] = check_like(state[number], expected.states[_kind_of(weight)], name)
                _check_not_negative(checked_state[number].items(), name)
    if odd := [number for number in state if number not in range(first)]:
        raise ValueError(f"the optimizer's state is for other weights: {odd[0]!r}")
    return {"state": checked_state, "param_groups": checked_groups}


class Expected(NamedTuple):
    """What an optimizer keeps of a group of weights after a step."""

    states: dict[tuple, dict[str, Any]]  # {`_kind_of` a weight: its state}
    options: dict[str, Any]


def _after_a_step(optimizer, group):
    """Returns the `Expected` of a group, from a step without a gradient of a weight of each kind."""
    kinds = dict.fromkeys(map(_kind_of, group["params"]))
    device = "cpu" if (device := group["params"][0].device).type == "meta" else device
    weights = [torch.full(shape, float(is_set), device=device, requires_grad=True) for shape, is_set in kinds]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    copy = object.__new__(type(optimizer))
    copy.__dict__ |= {name: value for name, value in vars(optimizer).items() if name != "step"}  # a schedule wraps it
    copy.state, copy.param_groups = collections.defaultdict(dict), [group | {"params": weights}]
    if hasattr(copy, "train"):  # a schedule-free optimizer
        copy.train()  # pyright: ignore - only such an optimizer has the method
    copy.step()
    stored = copy.state_dict()
    return Expected(dict(zip(kinds, stored["state"].values(), strict=True)), stored["param_groups"][0])


def _kind_of(weight):
    return tuple(weight.shape), weight.is_meta or bool(weight.any())  # Prodigy keeps less of weights that are zero


def _check_not_negative(values: Iterable[tuple[str, Any]], name: str) -> None:
    """Raises `ValueError` for a negative count of steps or mean of squares, whose root would be NaN."""
    for key, value in values:
        if key == "step" or key.endswith("_sq"):
            least = value.min().item() if isinstance(value, torch.Tensor) and value.numel() else value
            if isinstance(least, int | float) and least < 0:
                raise ValueError(f"{name}.{key} is negative")


def check_schedule(found: Any, lr_scheduler: Any) -> dict[str, Any]:
    """Returns the entries of a schedule's state that this one has, checked; other versions of PyTorch have others."""
    own = lr_scheduler.state_dict()
    _check_type(found, dict, "the schedule's state")
    found = {key: found[key] for key in own.keys() & found.keys()}
    checked = {key: check_like(value, own[key], f"the schedule's {key}") for key, value in found.items()}
    if type(step := checked.get("last_epoch")) is not int or step < 0:
        raise ValueError(f"the schedule's last_epoch is {step!r}")
    return checked


def check_adapter(adapter: dict[str, torch.Tensor]) -> None:
    """Raises `ValueError` unless the tensors of an adapter are finite and float32; `lora.load_adapter` checks the rest."""
    if wrong := [name for name, value in adapter.items() if value.dtype != torch.float32]:
        raise ValueError(f"{wrong[0]} is {adapter[wrong[0]].dtype} instead of torch.float32")
    if faults := non_finite(adapter.items()):
        raise ValueError(faults)

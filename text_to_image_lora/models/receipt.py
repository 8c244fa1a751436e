"""Reads a LoRA file as other programs do, and compares the update of every module with the trained update."""

from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import TrainingError
from . import readers
from .lora_file import fold_scale
from .updates import factors, modules_of, relative_difference


TOLERANCE = 1e-6  # relative to an update's norm; rounding to float32 causes a smaller difference


def layer_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape of the weight} of the linear and convolution layers of a model, with or without adapters."""
    return {
        name.removesuffix(".base_layer"): tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and ".lora_" not in name
    }


def check_lora_file(
    path: Path, trained: dict, layers: dict, *, by_kohyas_names: bool = False, tolerance: float = TOLERANCE
) -> int:
    """Reads a LoRA file as other programs do, and returns the number of modules.

    `trained` is {component: (state dict of peft, `LoraConfig`)}, and `layers` is {component: `layer_shapes` of the base}.
    Raises `TrainingError` if a module is missing, differs from its trained update, or was not trained.
    """
    with safe_open(path, "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    layers = {
        (component, name.removeprefix("text_model.")): shape
        for component, shapes in layers.items()
        for name, shape in shapes.items()
    }
    wanted = {}
    for component, adapter in trained.items():
        state_dict = fold_scale(*adapter)
        for module in modules_of(state_dict):
            magnitude = state_dict.get(f"{module}.lora_magnitude_vector")
            wanted[component, module.removeprefix("text_model.")] = *factors(state_dict, module), magnitude
    rules = {"diffusers": readers.diffusers}
    if by_kohyas_names:
        rules = {"ComfyUI": readers.comfyui}
        if readers.has_the_geometry_of_a1111(layers):
            rules["A1111"] = readers.a1111
    for reader, rule in rules.items():
        faults = _faults(wanted, rule(tensors, header, layers), layers, tolerance)
        if faults:
            raise TrainingError(
                f"{path.name}: {len(faults)} of {len(wanted)} modules are not read correctly by {reader}, the first: "
                f"{faults[0]}."
            )
    return len(wanted)


def _faults(wanted, found, layers, tolerance):
    """Returns a description of each module that is not read as it was trained, or that was not trained."""
    faults = []
    for place, (a, b, magnitude) in wanted.items():
        name = ".".join(place)
        if place not in found:
            faults.append(f"{name} is not found")
            continue
        got_a, got_b, got_magnitude = found[place]
        out, *inner = layers[place]
        if (len(got_b), got_a.shape[1]) != (out, torch.Size(inner).numel()) or got_b.shape[1] != len(got_a):
            faults.append(f"{name} has another shape")
        elif not (difference := relative_difference((a, b), (got_a, got_b))) <= tolerance:
            faults.append(f"{name} differs by {difference:.1e} of its update")
        elif not _alike(magnitude, got_magnitude, tolerance):
            faults.append(f"{name} differs in its DoRA magnitudes")
    return faults + [f"{'.'.join(place)} was not trained" for place in sorted(found.keys() - wanted.keys())]


def _alike(first, second, tolerance):
    if first is None or second is None:
        return first is second
    first, second = first.double().flatten(), second.double().flatten()
    return len(first) == len(second) and torch.allclose(first, second, rtol=tolerance, atol=0)

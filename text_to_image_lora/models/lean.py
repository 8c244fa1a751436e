"""A lean forward for plain adapters: few operators, in the precision of the base model, from float32 master weights.

peft still holds, saves and describes the adapters, but its forward is replaced in training steps. peft's layers cast each
input to float32 and back, multiply by the scale, and leave the backward to autograd: for Stable Diffusion 1.5 these are
more operators than those of the UNet itself, and at batch size 1 a GPU waits for their launches (docs/performance.md).
"""

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer

from .joined import join, projections


class LoraLinear(torch.autograd.Function):
    """Computes `x W' + bias + (x A') B'` for a frozen W, with a handwritten backward.

    Shapes: x (..., in), weight (out, in), bias (out) or None; a holds the elements of A (rank, in), and b those of B (out,
    rank).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b):
        rows, a, b = x.reshape(-1, weight.shape[1]), a.view(-1, weight.shape[1]), b.view(weight.shape[0], -1)
        hidden = torch.mm(rows, a.t())
        out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        out.addmm_(hidden, b.t())
        ctx.save_for_backward(rows, hidden, weight, a, b)
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad_output):
        rows, hidden, weight, a, b = ctx.saved_tensors
        grad_output = grad_output.reshape(-1, weight.shape[0])
        grad_hidden = torch.mm(grad_output, b)
        grad_a, grad_b = torch.mm(grad_hidden.t(), rows), torch.mm(grad_output.t(), hidden)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_output, weight).addmm_(grad_hidden, a).view(ctx.shape)
        return grad_x, None, None, grad_a.view(-1), grad_b.view(-1)


class LeanLinear(Linear):
    lean: Any  # the views of the masters that the layer computes with

    def forward(self, x, *others, **options):
        base = self.base_layer
        if self.disable_adapters:
            return base(x)
        return LoraLinear.apply(x, base.weight, base.bias, *self.lean)


class LeanConv2d(Conv2d):
    lean: Any

    def forward(self, x, *others, **options):
        base = self.base_layer
        if self.disable_adapters:
            return base(x)
        a, b = self.lean
        first: Any = self.lora_A["default"]
        second: Any = self.lora_B["default"]
        hidden = torch.nn.functional.conv2d(x, a.view(first.weight.shape), None, first.stride, first.padding)
        return base(x) + torch.nn.functional.conv2d(hidden, b.view(second.weight.shape))


LEAN = {Linear: LeanLinear, Conv2d: LeanConv2d}


class Gated(torch.autograd.Function):
    """Computes `value * gelu(gate)` of the two halves of x (..., 2 n) and recomputes the GELU in the backward.

    The adapted layer that follows keeps its input for the backward, unlike a frozen layer; keeping the equally large GELU
    too would cost more memory.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return value * torch.nn.functional.gelu(gate)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        gelu = torch.nn.functional.gelu(gate)
        if (
            torch.compiler.is_compiling()
        ):  # the compiler fuses these operations, and cannot write into a part of a tensor
            return torch.cat([grad_output * gelu, torch.ops.aten.gelu_backward(grad_output * value, gate)], dim=-1)
        grad_x = torch.empty_like(x)
        grad_value, grad_gate = grad_x.chunk(2, dim=-1)
        torch.mul(grad_output, gelu, out=grad_value)
        torch.mul(grad_output, value, out=grad_gate)
        torch.ops.aten.gelu_backward(grad_gate, gate, grad_input=grad_gate)
        return grad_x


class LeanGEGLU(GEGLU):
    def forward(self, hidden_states):
        return Gated.apply(self.proj(hidden_states))


class Masters:
    """The float32 master weights of a model's adapters, from which its layers get copies in the precision of the base.

    `trained` holds, for each of `groups` (lists of parameters), one flat tensor of which the parameters become views; or, if
    not `flat`, the parameters. The copies are made in each forward pass, and the gradients flow back, with one operator per
    group.
    """

    def __init__(self, model, groups, flat=True):
        layers = [module for module in model.modules() if type(module) in (LeanLinear, LeanConv2d)]
        # A and B share the scale equally, so that one factor serves all weights.
        scaling = {layer.scaling["default"] for layer in layers}
        (self.share,) = {value**0.5 for value in scaling}
        self.dtype = layers[0].base_layer.weight.dtype
        found = projections(model, LeanLinear)
        joinable = {layer for _, _, projected in found for layer in projected}
        holders = {layer: (layer,) for layer in layers if layer not in joinable}
        for attention, name, projected in found:
            holder = join(attention, name, projected)
            holders |= {layer: (layer,) for layer in projected} if holder is None else {holder: projected}
        # The weights of a holder's layers are adjacent, so that it gets them as one tensor. Without joining, the order is
        # the same, because a checkpoint may be resumed with another attention.
        pieces = {
            (holder, leaf): [getattr(layer, leaf)["default"].weight for layer in held]
            for leaf in ("lora_A", "lora_B")
            for holder, held in holders.items()
        }
        owners = [{id(parameter) for parameter in group} for group in groups]
        keys = [[key for key, piece in pieces.items() if id(piece[0]) in owner] for owner in owners]
        numbers = {key: number for number, key in enumerate(key for group in keys for key in group)}
        self.places = [(holder, numbers[holder, "lora_A"], numbers[holder, "lora_B"]) for holder in holders]
        self.sizes = [[sum(parameter.numel() for parameter in pieces[key]) for key in group] for group in keys]
        groups = [[parameter for key in group for parameter in pieces[key]] for group in keys]
        self.trained = groups
        if flat:
            self.trained = [[self.flattened(group)] for group in groups]
            # A separate module at the end, because the dtype of a model is that of its first parameter. Its name must
            # not contain "lora_", or peft would save it.
            model.add_module("adapter_masters", torch.nn.ParameterList(master for (master,) in self.trained))
        model.register_forward_pre_hook(self.cast_weights)

    @staticmethod
    def flattened(group: list[torch.nn.Parameter]) -> torch.nn.Parameter:
        """Returns one parameter with the values of a group, whose parameters become views that are not trained."""
        master = torch.nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in group]))
        sizes = [parameter.numel() for parameter in group]
        for parameter, part in zip(group, master.detach().split(sizes), strict=True):
            parameter.requires_grad_(False)
            parameter.data = part.view(parameter.shape)
        return master

    def cast_weights(self, *_):
        """Gives the layers their weights in the precision of the base; called before each forward pass."""
        parts = []
        for group, sizes in zip(self.trained, self.sizes, strict=True):
            whole = group[0] if len(group) == 1 else torch.cat([parameter.reshape(-1) for parameter in group])
            if self.share != 1:
                whole = whole * self.share
            parts += whole.reshape(-1).to(self.dtype).split(sizes)
        for holder, a, b in self.places:
            holder.__dict__["lean"] = parts[a], parts[b]


def is_plain(layer: LoraLayer) -> bool:
    """Whether the lean forward can replace that of a layer: one adapter without dropout, DoRA and bias."""
    return (
        type(layer) in LEAN
        and list(layer.lora_A) == ["default"]
        and not layer.lora_variant
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        and not layer.lora_bias["default"]
        and getattr(layer.base_layer, "groups", 1) == 1
    )


def use_lean_forward(model: torch.nn.Module, groups: list[list], flat: bool = True) -> list[list]:
    """Gives all adapters of a model the lean forward and returns the parameters to train for each group.

    If an adapter is not plain, the model stays unchanged and `groups` is returned. The model must already be on its device
    and in its precision, because moving it afterwards would separate the layers' weights from their masters.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not all(is_plain(layer) for layer in layers):
        return groups
    for layer in layers:
        layer.__class__ = LEAN[type(layer)]
    for module in model.modules():
        if type(module) is GEGLU:
            module.__class__ = LeanGEGLU
    return Masters(model, groups, flat).trained

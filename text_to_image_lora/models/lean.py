"""A lean forward for plain adapters: few operators, in the base's own precision, from float32 masters.

peft holds, saves and describes the adapters; what it computes in a training step is replaced. Its layers take each input
to float32 and back, multiply by the scale, and leave the backward to autograd: on Stable Diffusion v1.5 that is more
operators than the UNet itself has, and at batch 1 a GPU waits for each of them to be launched.
"""

import torch
from diffusers.models.activations import GEGLU
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer

from .joined import join, projections


class LoraLinear(torch.autograd.Function):
    """`x W' + bias + (x A') B'` for a frozen W, with the backward by hand.

    x (..., in), weight (out, in), bias (out) or None, a: the elements of A (rank, in), b: those of B (out, rank).
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
    def forward(self, x, *others, **options):
        base = self.base_layer
        if self.disable_adapters:
            return base(x)
        return LoraLinear.apply(x, base.weight, base.bias, *self.lean)


class LeanConv2d(Conv2d):
    def forward(self, x, *others, **options):
        base = self.base_layer
        if self.disable_adapters:
            return base(x)
        a, b = self.lean
        first, second = self.lora_A["default"], self.lora_B["default"]
        hidden = torch.nn.functional.conv2d(x, a.view(first.weight.shape), None, first.stride, first.padding)
        return base(x) + torch.nn.functional.conv2d(hidden, b.view(second.weight.shape))


LEAN = {Linear: LeanLinear, Conv2d: LeanConv2d}


class Gated(torch.autograd.Function):
    """`value * gelu(gate)` of the two halves of x (..., 2 n), in the backward of which the GELU is computed again.

    The adapted layer behind it keeps its input, which autograd alone doesn't make the frozen model do; what autograd would
    keep here, the GELU, is as large.
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
        if torch.compiler.is_compiling():  # it joins these itself, and can't write into a part of a tensor
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
    """The float32 weights of a model's adapters, and what its layers compute with: a copy in the base's precision.

    `trained` is, for each of `groups` (lists of the layers' parameters), one flat tensor of which the layers' own weights
    become views; or, not `flat`, the group's parameters. The copy is made at each forward pass of the model, in one operator
    for a group, and the gradients come back to the masters in one.
    """

    def __init__(self, model, groups, flat=True):
        layers = [module for module in model.modules() if type(module) in (LeanLinear, LeanConv2d)]
        # The scale in equal shares for A and B, so that one number does for all.
        scaling = {layer.scaling["default"] for layer in layers}
        (self.share,) = {value**0.5 for value in scaling}
        self.dtype = layers[0].base_layer.weight.dtype
        found = projections(model, LeanLinear)
        together = {layer for _, _, own in found for layer in own}
        holders = {layer: (layer,) for layer in layers if layer not in together}
        for attention, name, own in found:
            holder = join(attention, name, own)
            holders |= {layer: (layer,) for layer in own} if holder is None else {holder: own}
        # The weights of a holder's layers lie beside each other, so that they are handed out as one tensor; in the same
        # order where projections are not joined, for a checkpoint may be gone on from so.
        pieces = {
            (holder, leaf): [getattr(layer, leaf)["default"].weight for layer in of_holder]
            for leaf in ("lora_A", "lora_B")
            for holder, of_holder in holders.items()
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
            # A module of its own, after the others: who asks for the model's dtype looks at the first parameter. No
            # "lora_" in its name, or peft would save it.
            model.add_module("adapter_masters", torch.nn.ParameterList(master for (master,) in self.trained))
        model.register_forward_pre_hook(self.cast_weights)

    @staticmethod
    def flattened(group):
        """One parameter for a group, of which the group's become views that are not trained themselves."""
        master = torch.nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in group]))
        sizes = [parameter.numel() for parameter in group]
        for parameter, part in zip(group, master.detach().split(sizes), strict=True):
            parameter.requires_grad_(False)
            parameter.data = part.view(parameter.shape)
        return master

    def cast_weights(self, *_):
        """Before a forward pass: the layers get their weights, in the precision that they compute in."""
        parts = []
        for group, sizes in zip(self.trained, self.sizes, strict=True):
            whole = group[0] if len(group) == 1 else torch.cat([parameter.reshape(-1) for parameter in group])
            if self.share != 1:
                whole = whole * self.share
            parts += whole.reshape(-1).to(self.dtype).split(sizes)
        for holder, a, b in self.places:
            holder.__dict__["lean"] = parts[a], parts[b]


def is_plain(layer):
    """Whether the lean forward is that of this layer of peft's: one adapter, no dropout, no DoRA, no bias of its own."""
    return (
        type(layer) in LEAN
        and list(layer.lora_A) == ["default"]
        and not layer.lora_variant
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        and not layer.lora_bias["default"]
        and getattr(layer.base_layer, "groups", 1) == 1
    )


def use_lean_forward(model, groups, flat=True):
    """Gives the model's adapters the lean forward, and returns what to train of each group of their parameters.

    The groups themselves, and nothing is changed, where an adapter is not plain. To be called when the model is on its
    device and in its precision: moving it afterwards would part the layers' weights from their masters.
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

"""Computes the projections of an attention layer with the same input (queries, keys, values) in one matrix product."""

from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0


class LoraJoinedLinear(torch.autograd.Function):
    """Concatenates `x W' + (x A') B'` of `count` layers for one x, with frozen W and a handwritten backward.

    Shapes: x (..., in), weight (count * out, in); a holds the elements of A (count * rank, in), and b those of B (count,
    out, rank).
    """

    @staticmethod
    def forward(ctx, x, weight, a, b, count):
        rows, a = x.reshape(-1, weight.shape[1]), a.view(-1, weight.shape[1])
        b = b.view(count, len(weight) // count, -1)
        hidden, out = torch.mm(rows, a.t()), torch.mm(rows, weight.t())
        out = add_products(out, split_layers(hidden, count), b.transpose(1, 2))
        ctx.save_for_backward(rows, hidden, weight, a, b)
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad_output):
        rows, hidden, weight, a, b = ctx.saved_tensors
        grad_output = grad_output.reshape(-1, len(weight))
        split_grad = split_layers(grad_output, len(b))
        grad_hidden = add_products(torch.empty_like(hidden), split_grad, b, beta=0)
        grad_a = torch.mm(grad_hidden.t(), rows)
        # The transposed product needs no copy, but takes a CPU three times as long in bf16.
        grad_b = torch.bmm(split_layers(hidden, len(b)).transpose(1, 2), split_grad).transpose(1, 2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_output, weight).addmm_(grad_hidden, a).view(ctx.shape)
        return grad_x, None, grad_a.view(-1), grad_b.reshape(-1), None


def split_layers(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Returns rows (N, count * C) as a view (count, N, C) with a matrix for each layer."""
    return rows.view(len(rows), count, -1).transpose(0, 1)


def add_products(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor, beta: int = 1) -> torch.Tensor:
    """Adds first (count, N, K) @ second (count, K, C) to rows (N, count * C); with `beta=0`, replaces the rows."""
    if torch.compiler.is_compiling():  # the compiler cannot write into this view, and fuses these operations itself
        products = torch.bmm(first, second).transpose(0, 1).reshape(rows.shape)
        return rows + products if beta else products
    split_layers(rows, len(first)).baddbmm_(first, second, beta=beta)
    return rows


class JoinedLinear(torch.nn.Module):
    """Concatenates the outputs of lean layers with the same input; their frozen weights become views of one weight.

    `lean.Masters` sets `lean`: the elements of all A, and of all B.
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = tuple(layers)  # a tuple, because the layers are submodules of the attention already
        weights = [layer.base_layer.weight for layer in layers]
        self.weight = torch.nn.Parameter(torch.cat([weight.detach() for weight in weights]), requires_grad=False)
        for weight, part in zip(weights, self.weight.detach().chunk(len(weights)), strict=True):
            weight.data = part

    lean: Any  # the masters of all layers, which `use_lean_forward` sets

    def forward(self, x):
        if self.layers[0].disable_adapters:  # bit for bit the output of the base
            return torch.cat([layer.base_layer(x) for layer in self.layers], dim=-1)
        return LoraJoinedLinear.apply(x, self.weight, *self.lean, len(self.layers))


def projections(model: torch.nn.Module, kind: type) -> list[tuple[Attention, str, tuple[Any, ...]]]:
    """Finds layers that can be joined: (attention, diffusers' name of the fused layer, layers of class `kind` without bias)."""
    found = []
    for attention in [module for module in model.modules() if type(module) is Attention]:
        name = "to_kv" if attention.is_cross_attention else "to_qkv"
        layers: tuple[Any, ...] = (attention.to_k, attention.to_v)
        if not attention.is_cross_attention:
            layers = (attention.to_q, *layers)
        plain = all(type(layer) is kind and layer.base_layer.bias is None for layer in layers)
        if plain and len({layer.base_layer.weight.shape for layer in layers}) == 1:
            found.append((attention, name, layers))
    return found


def join(attention: Attention, name: str, layers: tuple[torch.nn.Module, ...]) -> JoinedLinear | None:
    """Replaces the layers by one `JoinedLinear` and returns it; returns None if the attention processor does not allow it.

    diffusers has a processor for fused projections that computes PyTorch's attention, but none for xformers, for example.
    """
    if type(attention.processor) is not AttnProcessor2_0:
        return None
    joined_layer = JoinedLinear(layers)
    attention.add_module(name, joined_layer)
    attention.set_processor(cast(Any, FusedAttnProcessor2_0()))
    return joined_layer

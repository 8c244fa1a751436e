"""The projections of an attention layer that have one input, computed together: queries, keys and values in one product."""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0


class LoraJoinedLinear(torch.autograd.Function):
    """Several `x W' + (x A') B'` of one x, beside each other, for a frozen W, with the backward by hand.

    x (..., in), weight (count out, in), a: the elements of A (count rank, in), b: those of B (count, out, rank).
    """

    @staticmethod
    def forward(ctx, x, weight, a, b, count):
        rows, a = x.reshape(-1, weight.shape[1]), a.view(-1, weight.shape[1])
        b = b.view(count, len(weight) // count, -1)
        hidden, out = torch.mm(rows, a.t()), torch.mm(rows, weight.t())
        out = add_products(out, each(hidden, count), b.transpose(1, 2))
        ctx.save_for_backward(rows, hidden, weight, a, b)
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad_output):
        rows, hidden, weight, a, b = ctx.saved_tensors
        grad_output = grad_output.reshape(-1, len(weight))
        of_each = each(grad_output, len(b))
        grad_hidden = add_products(torch.empty_like(hidden), of_each, b, beta=0)
        grad_a = torch.mm(grad_hidden.t(), rows)
        # The other way round, without the copy, takes a CPU three times as long in bf16.
        grad_b = torch.bmm(each(hidden, len(b)).transpose(1, 2), of_each).transpose(1, 2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_output, weight).addmm_(grad_hidden, a).view(ctx.shape)
        return grad_x, None, grad_a.view(-1), grad_b.reshape(-1), None


def each(rows, count):
    """Rows (N, count C) as what each of the layers has of them: a view (count, N, C)."""
    return rows.view(len(rows), count, -1).transpose(0, 1)


def add_products(rows, first, second, beta=1):
    """The products of first (count, N, K) and second (count, K, C), added to rows (N, count C) or, with beta 0, in their place."""
    if torch.compiler.is_compiling():  # it can't write into this view, and joins these itself
        products = torch.bmm(first, second).transpose(0, 1).reshape(rows.shape)
        return rows + products if beta else products
    each(rows, len(first)).baddbmm_(first, second, beta=beta)
    return rows


class JoinedLinear(torch.nn.Module):
    """What lean layers of one input give, beside each other; their frozen weights become views of its own.

    `lean`, the elements of all their A and of all their B, is handed out as a layer's own is (`lean.Masters`).
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = tuple(layers)  # which are modules of the attention already
        weights = [layer.base_layer.weight for layer in layers]
        self.weight = torch.nn.Parameter(torch.cat([weight.detach() for weight in weights]), requires_grad=False)
        for weight, part in zip(weights, self.weight.detach().chunk(len(weights)), strict=True):
            weight.data = part

    def forward(self, x):
        if self.layers[0].disable_adapters:  # to the bit what the base gives
            return torch.cat([layer.base_layer(x) for layer in self.layers], dim=-1)
        return LoraJoinedLinear.apply(x, self.weight, *self.lean, len(self.layers))


def projections(model, kind):
    """(attention, diffusers' name for them together, layers) of what can be joined: all of this kind, alike, without bias."""
    found = []
    for attention in [module for module in model.modules() if type(module) is Attention]:
        name, layers = "to_qkv", (attention.to_q, attention.to_k, attention.to_v)
        if attention.is_cross_attention:
            name, layers = "to_kv", layers[1:]
        plain = all(type(layer) is kind and layer.base_layer.bias is None for layer in layers)
        if plain and len({layer.base_layer.weight.shape for layer in layers}) == 1:
            found.append((attention, name, layers))
    return found


def join(attention, name, layers):
    """The `JoinedLinear` that an attention now computes instead of these layers; None, and nothing is changed, where it can't.

    diffusers' processor for fused projections calls it. xformers and others have none.
    """
    if type(attention.processor) is not AttnProcessor2_0:
        return None
    holder = JoinedLinear(layers)
    attention.add_module(name, holder)
    attention.set_processor(FusedAttnProcessor2_0())
    return holder

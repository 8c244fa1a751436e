"""Joined projections of one input equal separate projections, on tiny UNets of diffusers."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from lean_steps import PLAIN, Operators, batch_of, lean_unet, train

from text_to_image_lora.models import lora
from text_to_image_lora.models.joined import JoinedLinear, add_products, split_layers


PRODUCTS = ("mm", "addmm_", "bmm", "baddbmm_")


def joined_of(unet):
    return [module for module in unet.modules() if type(module) is JoinedLinear]


class Another(AttnProcessor2_0):
    """A copy of the processor under a name that has no joined projections, like the processor of xformers."""


def by_itself(unet):
    unet.set_attn_processor(Another())
    return unet


def test_queries_keys_and_values_are_joined_by_their_input(make_unet):
    unet = make_unet()
    attentions = list(unet.attn_processors.values())
    lean_unet(unet)
    counts = [len(holder.layers) for holder in joined_of(unet)]
    assert sorted(counts) == [2] * (len(attentions) // 2) + [3] * (len(attentions) // 2)
    assert {type(processor) for processor in unet.attn_processors.values()} == {FusedAttnProcessor2_0}


@pytest.mark.parametrize("flat", [True, False])
def test_twenty_steps_are_those_of_each_by_itself(make_unet, flat):
    unet, other = make_unet(), by_itself(make_unet())
    parameters, others = lean_unet(unet, flat), lean_unet(other, flat)
    assert joined_of(unet)
    assert not joined_of(other)
    torch.testing.assert_close(train(unet, parameters), train(other, others), rtol=1e-4, atol=1e-6)
    for value, expected in zip(lora.adapter_state(unet)[0].values(), lora.adapter_state(other)[0].values()):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("lora_plus", [True, False])
def test_what_is_trained_lies_in_one_order_joined_or_not(make_unet, flat, lora_plus):
    """A checkpoint's optimizer can be resumed with another kind of attention."""
    orders = []
    for unet in (make_unet(), by_itself(make_unet())):
        named = [(name, parameter) for name, parameter in unet.named_parameters() if parameter.requires_grad]
        groups = [[parameter for name, parameter in named if ("lora_B" in name) == of_b] for of_b in (False, True)]
        orders.append(lean_unet(unet, flat, groups if lora_plus else [[parameter for _, parameter in named]]))
    assert len(orders[0]) == len(orders[1])
    assert all(torch.equal(one, other) for one, other in zip(*orders))


def test_a_step_launches_less(make_unet):
    """A self-attention launches 3 of 9 products forward and 5 of 15 backward; a cross-attention 3 of 6 each.

    The input of the first self-attention needs no gradient, which saves two products per layer.
    """
    counts = []
    for unet in (make_unet(), by_itself(make_unet())):
        parameters = lean_unet(unet)
        train(unet, parameters, 1)
        with Operators() as operators:
            unet(*batch_of(0)).sample.square().mean().backward()
        counts.append(sum(name in PRODUCTS for name in operators.names))
    blocks = len(unet.attn_processors) // 2
    assert counts[1] - counts[0] == blocks * (6 + 10 + 3 + 3) - 4


def test_the_base_takes_no_more_memory(make_unet):
    def taken(unet):
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in unet.parameters()}
        return sum(storages.values())

    unet = make_unet()
    before = taken(unet)
    lean_unet(unet)
    assert taken(unet) == before


@pytest.mark.parametrize("left_out", ["to_k", "to_v"])
def test_what_is_not_adapted_whole_stays_apart(make_unet, left_out):
    targets = [name for name in PLAIN.target_modules if name != left_out]
    unet = make_unet(replace(PLAIN, target_modules=targets))
    parameters = lean_unet(unet)
    assert not joined_of(unet)
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert train(unet, parameters, 2).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_or_put_in_place_of_anything(dtype):
    """The output may also be uninitialised memory, which may contain NaN."""
    torch.manual_seed(0)
    first, second = torch.randn(3, 64, 8).to(dtype), torch.randn(3, 8, 16).to(dtype)
    products = torch.bmm(first, second)
    found = add_products(torch.full((64, 48), torch.nan, dtype=dtype), first, second, beta=0)
    torch.testing.assert_close(split_layers(found, 3), products)
    rows = torch.randn(64, 48).to(dtype)
    found = split_layers(add_products(rows.clone(), first, second), 3)
    torch.testing.assert_close(found, split_layers(rows, 3) + products, rtol=0.02, atol=0.02)

"""Operations on models in memory leave them unchanged."""

import copy

import pytest
import torch

from text_to_image_lora.models.modules import evaluating, non_finite, sample_identity


def test_evaluating_gives_the_mode_back():
    model = torch.nn.Dropout()
    for mode in (True, False):
        model.train(mode)
        with evaluating(model):
            assert not model.training
        assert model.training is mode


def test_a_model_is_known_in_each_precision_and_from_a_fine_tuned_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e-9)  # in float16 they are zeros, with a sign
    identities = {sample_identity(copy.deepcopy(model).to(d)) for d in (torch.float32, torch.bfloat16, torch.float16)}
    assert len(identities) == 1
    with torch.no_grad():
        model[0].weight.add_(1e-3 * torch.randn(64, 64))  # a hundredth of their standard deviation
    assert sample_identity(model) not in identities


KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_tensors_that_are_not_finite_are_found(dtype):
    """One value of many, at either end, is enough."""
    good = {
        "a": torch.linspace(-200, 200, 1001).to(dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "step": torch.tensor(3),
    }
    assert non_finite(good.items()) == ""
    for value in (float("nan"), float("inf"), float("-inf")):
        if dtype == torch.float8_e4m3fn and value == value:  # it has no infinities
            continue
        for place in (0, 500, -1):
            bad = torch.linspace(-200, 200, 1001)
            bad[place] = value
            tensors = [("zero", good["a"]), ("one", bad.to(dtype)), ("two", bad.to(dtype))]
            assert non_finite(tensors) == "2 of its tensors are not finite, the first: one"

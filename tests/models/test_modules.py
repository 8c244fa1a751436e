"""Operations on models in memory leave them unchanged."""

import copy

import torch

from text_to_image_lora.models.modules import evaluating, sample_identity


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

"""What can be done with any model in memory leaves it as it was."""

import torch

from text_to_image_lora.models.modules import evaluating


def test_evaluating_gives_the_mode_back():
    model = torch.nn.Dropout()
    for mode in (True, False):
        model.train(mode)
        with evaluating(model):
            assert not model.training
        assert model.training is mode

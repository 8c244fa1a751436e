"""State from a file that does not fit the running objects is refused before a kernel reads beyond its memory."""

import pytest
import torch

from text_to_image_lora.training.checkpoint import LEARNED_STATE
from text_to_image_lora.training.learning import make_optimizer
from text_to_image_lora.training.learning_settings import OptimizerSettings
from text_to_image_lora.training.likeness import check_like, check_optimizer_state


NAN = float("nan")
DAMAGES = {
    "shorter": lambda value: torch.zeros(2),
    "empty": lambda value: value.new_zeros(0),
    "flat": lambda value: value.flatten(),
    "of another dtype": lambda value: value.bfloat16() if value.dtype != torch.bfloat16 else value.float(),
    "of whole numbers": lambda value: value.long(),
    "not finite": lambda value: torch.full(value.shape, NAN).to(value.dtype),
    "sparse": lambda value: value.to_sparse(),
    "without memory": lambda value: value.to("meta"),
    "a text": lambda value: "x",
    "null": lambda value: None,
}


def make_state(name, steps=2):
    """Returns an optimizer of two weights, after some steps, and its state as a file holds it."""
    torch.manual_seed(0)
    weights = [torch.randn(32, 256).requires_grad_(), torch.zeros(4, 3).requires_grad_()]
    optimizer = make_optimizer(OptimizerSettings(optimizer=name), [{"params": weights}], torch.device("cpu"))
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return optimizer, optimizer.state_dict()


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedulefree", "adafactor", "adamw8bit"])
def test_the_state_of_each_optimizer_is_like_its_own(name):
    stored = make_state(name)[1]
    optimizer, _ = make_state(name, steps=0)
    checked = check_optimizer_state(stored, optimizer, LEARNED_STATE)
    assert not any(optimizer.state.values())
    flags = optimizer.param_groups[0]
    optimizer.load_state_dict(checked | {"param_groups": [{**flags, **checked["param_groups"][0]}]})
    assert optimizer.state_dict()["state"].keys() == stored["state"].keys()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedulefree", "adafactor", "adamw8bit"])
def test_a_state_of_another_shape_or_dtype_is_refused(name, damage):
    optimizer, stored = make_state(name)
    state = stored["state"][0]
    state = state.get("__bnb_optimizer_quant_state__", state)
    for key in [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()]:
        if damage in ("flat", "not finite") and (state[key].dim() < 2 or not state[key].is_floating_point()):
            continue
        before = state[key]
        state[key] = DAMAGES[damage](before)
        with pytest.raises(ValueError, match=rf"the optimizer's state 0\.(\w+\.)?{key} is "):
            check_optimizer_state(stored, optimizer, LEARNED_STATE)
        state[key] = before


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: 5,
        lambda stored: stored | {"state": []},
        lambda stored: stored | {"state": {"a": {}}},
        lambda stored: stored | {"state": stored["state"] | {7: {}}},
        lambda stored: stored | {"state": stored["state"] | {0: {"exp_avg": 1}}},
        lambda stored: stored | {"param_groups": 5},
        lambda stored: stored | {"param_groups": []},
        lambda stored: stored | {"param_groups": [{"params": ["a", "b"], "lr": 1}]},
        lambda stored: stored | {"param_groups": [stored["param_groups"][0] | {"lr": NAN}]},
        lambda stored: stored | {"param_groups": [stored["param_groups"][0] | {"params": [0]}]},
    ],
)
def test_a_state_for_other_weights_is_refused(change):
    optimizer, stored = make_state("adamw")
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own words
        check_optimizer_state(change(stored), optimizer, LEARNED_STATE)


@pytest.mark.parametrize(("key", "value"), [("step", -5.0), ("step", NAN), ("exp_avg_sq", -1.0)])
def test_a_count_or_a_square_that_is_no_such_number_is_refused(key, value):
    optimizer, stored = make_state("adamw")
    stored["state"][1][key] = torch.full_like(stored["state"][1][key], value)
    with pytest.raises(ValueError, match=f"the optimizer's state 1.{key} is "):
        check_optimizer_state(stored, optimizer, LEARNED_STATE)


@pytest.mark.parametrize(("key", "value"), [("d", NAN), ("d", "x"), ("k", [1])])
def test_what_prodigy_has_learned_must_be_numbers(key, value):
    optimizer, stored = make_state("prodigy")
    stored["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"^{key} is "):
        check_optimizer_state(stored, optimizer, LEARNED_STATE)


def test_a_copy_shares_no_memory():
    shared = torch.zeros(1).expand(4)
    checked = check_like({"a": shared, "b": shared}, {"a": torch.ones(4), "b": torch.ones(4)}, "state")
    checked["a"][0] = 1
    assert checked["a"].tolist() == [1, 0, 0, 0]
    assert checked["b"].tolist() == [0, 0, 0, 0]

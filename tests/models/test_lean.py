"""The lean forward pass equals that of peft, on tiny UNets of diffusers."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from lean_steps import PLAIN, Operators, batch_of, lean_unet, train
from safetensors.torch import load_file

from text_to_image_lora.models import lean, lora
from text_to_image_lora.models.families import STABLE_DIFFUSION
from text_to_image_lora.training.learning import Learning
from text_to_image_lora.training.learning_settings import OptimizerSettings, ScheduleSettings


WITH_CONVOLUTIONS = [*STABLE_DIFFUSION.target_modules, "conv1", "conv2", "conv_shortcut", "proj_in"]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        replace(PLAIN, lora_alpha=1),
        replace(PLAIN, use_rslora=True, lora_alpha=8),
        replace(PLAIN, target_modules=WITH_CONVOLUTIONS),
    ],
    ids=["plain", "alpha", "rslora", "convolutions"],
)
def test_twenty_steps_are_those_of_peft(make_unet, settings, flat):
    unet, other = make_unet(settings), make_unet(settings)
    expected = train(other, lora.trainable_parameters(other))
    found = train(unet, lean_unet(unet, flat))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    before = make_unet(settings)
    for (name, value), (_, trained), (_, start) in zip(
        lora.adapter_state(unet)[0].items(),
        lora.adapter_state(other)[0].items(),
        lora.adapter_state(before)[0].items(),
    ):
        assert not torch.equal(trained, start), name
        torch.testing.assert_close(value, trained, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("flat", [True, False])
def test_in_bf16_it_is_as_near_to_float32_as_autocast_is(make_unet, flat):
    """Compares twenty steps; the master weights stay float32."""
    exact, cast, unet = make_unet(), make_unet(dtype=torch.bfloat16), make_unet(dtype=torch.bfloat16)
    exact = train(exact, lora.trainable_parameters(exact))
    cast = train(cast, lora.trainable_parameters(cast), dtype=torch.bfloat16, autocast=True)
    parameters = lean_unet(unet, flat)
    found = train(unet, parameters, dtype=torch.bfloat16)
    assert unet.dtype == torch.bfloat16
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {value.dtype for value in lora.adapter_state(unet)[0].values()} == {torch.float32}
    worst = (cast / exact - 1).abs().max(dim=0).values
    assert ((found / exact - 1).abs().max(dim=0).values < 2 * worst + 0.01).all()


def test_every_gate_of_a_lean_unet_keeps_less(make_unet):
    unet = make_unet()
    gates = [module for module in unet.modules() if isinstance(module, GEGLU)]
    lean_unet(unet)
    assert gates
    assert {type(gate) for gate in gates} == {lean.LeanGEGLU}


def test_small_updates_are_not_lost_in_bf16(make_unet):
    """Updates of 1e-6 are too small to be added to a bf16 weight."""
    unet = make_unet(dtype=torch.bfloat16)
    (master,) = lean_unet(unet)
    start = master.detach().clone()
    optimizer = torch.optim.AdamW([master], lr=1e-6, weight_decay=0)
    for step in range(10):
        unet(*batch_of(step, torch.bfloat16)).sample.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ((master.detach() - start).abs() > 1e-7).float().mean() > 0.9


@pytest.mark.parametrize("how", ["checkpointed", "accumulated"])
def test_two_backwards_and_recomputed_forwards(make_unet, how):
    unet, other = make_unet(), make_unet()
    expected = train(other, lora.trainable_parameters(other), 5, accumulation=2)
    if how == "checkpointed":
        unet.enable_gradient_checkpointing()
    found = train(unet, lean_unet(unet), 5, accumulation=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flat", [True, False])
def test_peft_still_holds_saves_and_loads(make_unet, flat):
    unet, other = make_unet(), make_unet()
    names = list(lora.adapter_state(other)[0])
    parameters = lean_unet(unet, flat)
    train(unet, parameters, 2)
    state = lora.adapter_state(unet)[0]
    assert list(state) == names
    train(other, lora.trainable_parameters(other), 2)
    lora.load_adapter(unet, lora.adapter_state(other)[0])
    assert all(torch.equal(v, lora.adapter_state(other)[0][n]) for n, v in lora.adapter_state(unet)[0].items())
    with torch.no_grad():
        torch.testing.assert_close(unet(*batch_of(9)).sample, other(*batch_of(9)).sample, rtol=1e-4, atol=1e-5)
    # The loaded weights are then trained further.
    expected, found = train(other, lora.trainable_parameters(other), 3), train(unet, parameters, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_base_is_the_base_when_adapters_are_off(make_unet, tiny_sd):
    unet = make_unet()
    lean_unet(unet)
    base = UNet2DConditionModel.from_pretrained(tiny_sd / "unet").to(memory_format=torch.channels_last)
    unet.disable_adapters()
    with torch.no_grad():
        assert torch.equal(unet(*batch_of(0)).sample, base(*batch_of(0)).sample)
        unet.enable_adapters()
        assert not torch.allclose(unet(*batch_of(0)).sample, base(*batch_of(0)).sample, atol=1e-4)


@pytest.mark.parametrize("changes", [dict(lora_dropout=0.1), dict(use_dora=True)])
def test_what_is_not_plain_stays_as_peft_has_it(make_unet, changes):
    unet = make_unet(replace(PLAIN, **changes))
    groups = [lora.trainable_parameters(unet)]
    classes = [type(module) for module in unet.modules()]
    assert lean.use_lean_forward(unet, groups) is groups
    assert [type(module) for module in unet.modules()] == classes


@pytest.mark.parametrize(
    ("name", "ratio", "shapes"),
    [("adamw", None, 1), ("adamw", 4, 2), ("schedulefree", None, 1), ("prodigy", None, 1), ("adafactor", None, 60)],
)
def test_optimizers_that_look_at_matrices_get_them(make_unet, name, ratio, shapes):
    unet = make_unet()
    settings = OptimizerSettings(optimizer=name, learning_rate=1e-3, loraplus_lr_ratio=ratio)
    learning = Learning(
        {"unet": unet}, settings, ScheduleSettings(), num_steps=10, num_warmup_steps=0, device=torch.device("cpu")
    )
    tensors = [p for group in learning.optimizer.param_groups for p in group["params"]]
    assert len(tensors) == shapes == len(lora.trainable_parameters(unet))
    assert sum(p.numel() for p in tensors) == sum(v.numel() for v in lora.adapter_state(unet)[0].values())


def test_a_step_casts_no_inputs(make_unet):
    """Two casts for the master weights and a few of the UNet, for any number of layers; peft casts four times per layer."""
    counts = []
    for made_lean in (True, False):
        unet = make_unet(dtype=torch.bfloat16)
        parameters = lean_unet(unet) if made_lean else lora.trainable_parameters(unet)
        train(unet, parameters, 1, torch.bfloat16, autocast=not made_lean)
        with Operators() as operators:
            train(unet, parameters, 1, torch.bfloat16, autocast=not made_lean)
        counts.append(operators.names)
    assert counts[0].count("_to_copy") < 12
    assert counts[1].count("_to_copy") > 100
    assert len(counts[0]) < 0.75 * len(counts[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_gives_the_same_bits_and_keeps_one_tensor(dtype):
    torch.manual_seed(0)
    gate, plain = GEGLU(8, 16).to(dtype), GEGLU(8, 16).to(dtype)
    plain.load_state_dict(gate.state_dict())
    gate.__class__ = lean.LeanGEGLU
    x = torch.randn(2, 5, 8).to(dtype)
    results, kept = [], []
    for module in (gate, plain):
        given = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
            out = module(given)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (given, module.proj.weight))))
        if module is gate:
            sizes = {saved.data_ptr(): saved.untyped_storage().nbytes() for saved in kept}
    for found, expected in zip(*results):
        assert torch.equal(found, expected)
    # The input and the weight of its layer, and the layer's output of 32 numbers for each of 10 places.
    assert sum(sizes.values()) == (10 * 8 + 32 * 8 + 10 * 32) * dtype.itemsize


def test_the_script_trains_flat_masters(train_in, tmp_path):
    """AdamW's state in a checkpoint is one tensor, and the file contains every layer."""
    out = train_in(tmp_path)
    state = torch.load(out / "checkpoint-2" / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    assert len(state) == 1
    assert len(load_file(out / "pytorch_lora_weights.safetensors")) == 60

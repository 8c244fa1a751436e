"""LoRA adapters on a tiny UNet of diffusers."""

from dataclasses import replace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from text_to_image_lora.errors import InputError
from text_to_image_lora.models import lora, modules
from text_to_image_lora.models.families import STABLE_DIFFUSION
from text_to_image_lora.models.settings import LoraSettings


DEFAULTS = LoraSettings(rank=4, lora_alpha=4, target_modules=STABLE_DIFFUSION.target_modules)


@pytest.fixture
def make_unet(tiny_sd):
    from diffusers import UNet2DConditionModel

    return lambda: UNet2DConditionModel.from_pretrained(tiny_sd / "unet").eval()


def make_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 96, generator=generator)
    return latents.to(dtype), torch.tensor([10, 500]), states.to(dtype)


def output_of(unet, dtype=torch.float32):
    with torch.no_grad():
        return unet(*make_inputs(dtype)).sample


def randomize(unet, seed=1):
    """Gives every adapter random weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.trainable_parameters(unet):
        parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) / 10


def train_step(unet, max_norm=None):
    parameters = lora.trainable_parameters(unet)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    loss = unet(*make_inputs()).sample.square().mean() * 1e4
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm) if max_norm else None
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    optimizer.step()
    return norm, gradients


def test_every_attention_and_feed_forward_layer_is_adapted(make_unet):
    unet = make_unet()
    assert lora.add_lora(unet, DEFAULTS) == 30
    adapted = [name for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)]
    blocks = [name for name, module in unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"]
    layers = [f"attn{n}.{end}" for n in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")]
    layers += ["ff.net.0.proj", "ff.net.2"]
    assert sorted(adapted) == sorted(f"{block}.{layer}" for block in blocks for layer in layers)


@pytest.mark.parametrize(
    ("target_modules", "count"),
    [(["to_q"], 6), (["to_q", "to_v"], 12), (["attn2.to_k"], 3), (["ff.net.2"], 3), (["proj_in"], 3), (["conv1"], 6)],
)
def test_named_layers_are_adapted(make_unet, target_modules, count):
    unet = make_unet()
    ends = tuple("." + name for name in target_modules)
    expected = sum(name.endswith(ends) for name, _ in unet.named_modules())
    assert lora.add_lora(unet, replace(DEFAULTS, target_modules=target_modules)) == expected == count


@pytest.mark.parametrize("wrong", ["to_qq", "o_q", "attn1", "to_out", "all-linear", "", ".*to_q"])
def test_a_layer_that_is_not_there_is_refused(make_unet, wrong):
    unet = make_unet()
    with pytest.raises(InputError, match=r"Its layers are: .*attn1\.to_q") as caught:
        lora.add_lora(unet, replace(DEFAULTS, target_modules=["to_q", wrong]))
    assert str(caught.value).startswith(f"--target_modules {wrong}: ")
    assert not any(isinstance(module, BaseTunerLayer) for module in unet.modules())


@pytest.mark.parametrize("rank", [10**6, 10**9, 257])
@pytest.mark.parametrize(
    ("target_modules", "widest"),
    [(["to_q"], "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"), (["to_k", "conv_in"], None)],
)
def test_a_rank_above_the_width_of_every_layer_is_refused(make_unet, target_modules, widest, rank):
    unet = make_unet()
    layers = {name: module.weight for name, module in unet.named_modules() if name.endswith(tuple(target_modules))}
    width = max(max(len(weight), weight[0].numel()) for weight in layers.values())
    with pytest.raises(InputError) as caught:
        lora.add_lora(unet, replace(DEFAULTS, rank=rank, target_modules=target_modules))
    message = str(caught.value)
    assert message.startswith(
        f"A rank of {rank} is larger than the width of every layer that is adapted; the widest, "
    )
    assert f", has {width} inputs or outputs. Pass at most {width} as --rank, or " in message
    assert widest is None or widest in message
    assert not any(isinstance(module, BaseTunerLayer) for module in unet.modules())
    # A rank above the width of some layers is allowed.
    assert lora.add_lora(unet, replace(DEFAULTS, rank=width, target_modules=target_modules)) == len(layers)


def test_a_layer_renamed_upstream_is_noticed(make_unet):
    unet = make_unet()
    attention = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    attention.to_query = attention.to_q
    del attention.to_q
    num_adapted = lora.add_lora(unet, DEFAULTS)
    with pytest.raises(RuntimeError, match="29 modules were adapted where 3 transformer blocks have 10 each"):
        lora.check_count(unet, num_adapted, STABLE_DIFFUSION.modules_per_block)
    lora.check_count(unet, num_adapted + 1, STABLE_DIFFUSION.modules_per_block)


@pytest.mark.parametrize("init", lora.INITIALISATIONS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_adapter_changes_nothing(make_unet, init, use_dora):
    unet = make_unet()
    before = output_of(unet)
    lora.add_lora(unet, replace(DEFAULTS, init_lora_weights=init, use_dora=use_dora))
    torch.testing.assert_close(output_of(unet), before, rtol=1e-4, atol=1e-5)
    randomize(unet)
    assert (output_of(unet) - before).abs().max() > 1e-3


def test_training_moves_every_adapter_and_no_base_weight(make_unet):
    unet = make_unet()
    lora.add_lora(unet, DEFAULTS)
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in unet.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * 30
    randomize(unet)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    train_step(unet)
    moved = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained


def test_trainable_parameters_can_be_walked_twice(make_unet):
    """Fault 1: the `filter(...)` of diffusers' script is exhausted before gradients are clipped, so nothing is clipped."""
    unet = make_unet()
    lora.add_lora(unet, DEFAULTS)
    randomize(unet)
    parameters = lora.trainable_parameters(unet)
    assert len(list(parameters)) == len(list(parameters)) == 60
    norm, gradients = train_step(unet, max_norm=0.5)
    assert norm > 1
    assert gradients.norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_is_float32_on_a_half_precision_model(make_unet, dtype, use_dora):
    """Fault 3: at a learning rate of 1e-4, most updates are lost in bfloat16."""
    unet = make_unet().to(dtype)
    lora.add_lora(unet, replace(DEFAULTS, use_dora=use_dora))
    assert {parameter.dtype for parameter in lora.trainable_parameters(unet)} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {dtype}
    assert {value.dtype for value in lora.adapter_state(unet)[0].values()} == {torch.float32}
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            unet(*make_inputs(dtype)).sample.float().square().mean().backward()
        assert {p.grad.dtype for p in lora.trainable_parameters(unet)} == {torch.float32}


@pytest.mark.parametrize("options", [{}, dict(use_dora=True), dict(use_rslora=True, lora_alpha=3)])
def test_a_stored_adapter_comes_back(make_unet, options):
    first, second = make_unet(), make_unet()
    for seed, unet in enumerate((first, second)):
        lora.add_lora(unet, replace(DEFAULTS, **options))
        randomize(unet, seed)
    state, config = lora.adapter_state(first)
    assert config.r == 4
    assert not torch.equal(output_of(first), output_of(second))
    lora.load_adapter(second, {name: value.clone() for name, value in state.items()})
    assert torch.equal(output_of(first), output_of(second))
    assert {p.dtype for p in lora.trainable_parameters(second)} == {torch.float32}


def test_an_adapter_that_does_not_fit_is_refused(make_unet):
    unet = make_unet()
    lora.add_lora(unet, DEFAULTS)
    state = {name: value.clone() for name, value in lora.adapter_state(unet)[0].items()}
    before = output_of(unet)
    first = sorted(state)[0]
    misfits = [
        {},
        {name: value for name, value in state.items() if name != first},
        state | {first + ".more": state[first]},
        state | {first: state[first][:2]},
        {name.replace("to_q", "to_query"): value for name, value in state.items()},
    ]
    for misfit in misfits:
        changed = {name: value + 1 for name, value in misfit.items()}
        with pytest.raises(ValueError, match="of 60 tensors do not fit the adapter, the first: "):
            lora.load_adapter(unet, changed)
        assert torch.equal(output_of(unet), before)


@pytest.mark.parametrize("options", [{}, dict(use_rslora=True), dict(use_dora=True)])
@pytest.mark.parametrize("alpha", [4, 1, 9.5])
def test_starting_from_a_file_reproduces_its_product(make_unet, options, alpha):
    """Fault 8: the update in a file is B·A, and the adapter that starts from the file has another scale."""
    unet = make_unet()
    lora.add_lora(unet, replace(DEFAULTS, lora_alpha=alpha, **options))
    generator = torch.Generator().manual_seed(2)
    given = {k: torch.randn(v.shape, generator=generator) for k, v in lora.adapter_state(unet)[0].items()}
    lora.start_from(unet, given)
    compared = 0
    for name, module in unet.named_modules():
        if isinstance(module, BaseTunerLayer):
            product = given[f"{name}.lora_B.weight"] @ given[f"{name}.lora_A.weight"]
            torch.testing.assert_close(module.get_delta_weight("default"), product, rtol=1e-4, atol=1e-5)
            if options.get("use_dora"):
                magnitude = module.lora_magnitude_vector["default"].weight
                assert torch.equal(magnitude.data, given[f"{name}.lora_magnitude_vector"])
            compared += 1
    assert compared == 30


@pytest.mark.parametrize("options", [{}, dict(use_dora=True)])
def test_starting_from_a_smaller_rank_is_exact_and_learns_in_all_directions(make_unet, options):
    small, large = make_unet(), make_unet()
    lora.add_lora(small, replace(DEFAULTS, **options))
    randomize(small)
    lora.add_lora(large, replace(DEFAULTS, rank=8, lora_alpha=3, **options))
    lora.start_from(large, lora.adapter_state(small)[0])
    torch.testing.assert_close(output_of(large), output_of(small), rtol=1e-4, atol=1e-5)
    before = {name: parameter.clone() for name, parameter in large.named_parameters() if ".lora_B." in name}
    train_step(large)
    for name, parameter in large.named_parameters():
        if name in before:  # directions of A and B that were both zero would never move
            assert ((parameter - before[name]).abs() > 0).any(dim=0).all(), name


def test_starting_from_what_does_not_fit_is_refused(make_unet):
    small, large = make_unet(), make_unet()
    lora.add_lora(small, DEFAULTS)
    lora.add_lora(large, replace(DEFAULTS, rank=8))
    with pytest.raises(ValueError, match="do not fit"):
        lora.start_from(small, lora.adapter_state(large)[0])
    fewer = {name: value for name, value in lora.adapter_state(small)[0].items() if "to_q" not in name}
    for given, partial in (
        ({}, False),
        ({}, True),
        (fewer, False),
        (fewer | {"x.lora_A.weight": torch.ones(4, 4)}, True),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            lora.start_from(small, given, partial=partial)


@pytest.mark.parametrize("use_dora", [False, True])
def test_starting_from_a_text_encoder_without_its_last_layer(tiny_sd, use_dora):
    from transformers import CLIPTextModel

    models, tokens = [], torch.tensor([[1, 5, 6, 2]])
    for leave_out in (1, 0):
        model = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder").eval()
        settings = replace(DEFAULTS, target_modules=lora.text_layers(model, leave_out), use_dora=use_dora)
        lora.add_lora(model, settings)
        models.append(model)
    few, all_layers = models
    randomize(few)
    loaded = {"text_encoder": lora.adapter_state(few)[0]}
    lora.start_from_file({"text_encoder": all_layers}, loaded, "axes")
    with torch.no_grad():
        wanted, got = (model(tokens).last_hidden_state for model in models)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def two_adapted(tiny_sd):
    """Returns a UNet and a text encoder with adapters whose weights are not zero."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    models = {
        "unet": UNet2DConditionModel.from_pretrained(tiny_sd / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_sd / "text_encoder"),
    }
    lora.add_lora(models["unet"], DEFAULTS)
    lora.add_lora(models["text_encoder"], replace(DEFAULTS, target_modules=lora.text_layers(models["text_encoder"])))
    for seed, model in enumerate(models.values()):
        randomize(model, seed)
    return models


def test_joined_adapters_come_apart_again(two_adapted):
    states = {name: lora.adapter_state(model)[0] for name, model in two_adapted.items()}
    joined = lora.merge_states(states)
    assert len(joined) == sum(map(len, states.values()))
    for name, state in states.items():
        part = lora.extract_state(joined, name)
        assert part.keys() == state.keys()
        assert all(part[key] is state[key] for key in part)


def test_a_file_must_be_of_what_is_trained(two_adapted):
    loaded = {name: lora.adapter_state(model)[0] for name, model in two_adapted.items()}
    with pytest.raises(
        InputError, match="^axes: it adapts text_encoder and unet, but this run trains the unet only. Start"
    ):
        lora.start_from_file({"unet": two_adapted["unet"]}, loaded, "axes")
    with pytest.raises(
        InputError, match="^axes: it adapts unet, but this run trains the unet and the text_encoder. Start"
    ):
        lora.start_from_file(two_adapted, {"unet": loaded["unet"]}, "axes")
    with pytest.raises(InputError, match="^axes: .* do not fit .* Check --rank, --target_modules and --use_dora"):
        lora.start_from_file(two_adapted, {"unet": loaded["unet"], "text_encoder": {}}, "axes")


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_base_has_its_own_precision_after_the_adapters_have_read_it(make_unet, use_dora):
    """DoRA's magnitudes are the float32 norms of the base weights; a base that is cast earlier would give other norms."""
    whole, unet = make_unet(), make_unet()
    for model in (whole, unet):
        torch.manual_seed(0)
        lora.add_lora(model, replace(DEFAULTS, use_dora=use_dora))
    modules.place(unet, "cpu", torch.bfloat16)
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    states = [lora.adapter_state(model)[0] for model in (whole, unet)]
    assert all(
        torch.equal(states[0][name], value) and value.dtype == torch.float32 for name, value in states[1].items()
    )


def test_every_layer_of_sd15s_text_encoder():
    """The text encoder has 72 adapted modules, like kohya's default."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, num_attention_heads=12, hidden_size=768))
    assert len(lora.text_layers(model)) == 72
    assert len(lora.text_layers(model, 2)) == 60

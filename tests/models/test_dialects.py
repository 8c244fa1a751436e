"""LoRA files of other programs are read correctly, compared with how stock diffusers reads them."""

import logging
import re
import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from small_pipeline import (
    ADAPTERS,
    TEXT_TARGETS,
    UNET_TARGETS,
    adapter,
    adapters_of,
    assert_close,
    assert_differs,
    encode,
    pipeline_with,
    predict,
    small_pipeline,
    trained,
    trained_models,
)
from transformers import CLIPTextConfig, CLIPTextModel

from text_to_image_lora.errors import InputError
from text_to_image_lora.models import dialects, kohya, lora, lora_file
from text_to_image_lora.models.families import STABLE_DIFFUSION
from text_to_image_lora.models.settings import LoraSettings
from text_to_image_lora.models.updates import factors, modules_of


pytestmark = pytest.mark.lora_file
MIXED = {"lora_alpha": 6, "rank_pattern": {"to_q|q_proj": 2, "ff.net.2|fc2": 8}, "alpha_pattern": {"to_k|k_proj": 1}}


@pytest.fixture(scope="module")
def base():
    return small_pipeline()


@pytest.fixture(scope="module", params=[*ADAPTERS, "mixed"])
def models(base, request):
    """Returns a UNet and a text encoder with adapters of every kind, linear and convolutional."""
    return trained_models(base, MIXED if request.param == "mixed" else ADAPTERS[request.param])


def assert_same_updates(loaded, models):
    """Checks that the update of every module is the one of peft, and that DoRA's magnitudes are unchanged."""
    compared = 0
    for name, model in models.items():
        adapted = {
            key.removeprefix("text_model."): module
            for key, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        assert {module.removeprefix("text_model.") for module in modules_of(loaded[name])} == adapted.keys()
        for module in modules_of(loaded[name]):
            layer, (a, b) = adapted[module.removeprefix("text_model.")], factors(loaded[name], module)
            wanted = layer.get_delta_weight("default").detach().double().flatten(1)
            assert (b @ a - wanted).norm() <= 1e-6 * wanted.norm()
            if f"{module}.lora_magnitude_vector" in loaded[name]:
                magnitude = layer.lora_magnitude_vector["default"].weight
                assert torch.equal(loaded[name][f"{module}.lora_magnitude_vector"], magnitude.detach())
            else:
                assert not layer.lora_magnitude_vector
            compared += 1
    assert compared == 52 + 12


def save_peft(models, folder):
    """Saves adapted models as peft does, each in its own folder."""
    for name, model in models.items():
        state_dict, config = adapter(model)
        folder_of = folder / name
        folder_of.mkdir(parents=True)
        config.save_pretrained(folder_of)
        save_file(
            {f"base_model.model.{key}": value for key, value in state_dict.items()},
            folder_of / "adapter_model.safetensors",
        )
    return folder


def test_kohya_has_the_same_updates(models, tmp_path):
    path = kohya.save_kohya(tmp_path / "axes.safetensors", adapters_of(models), {})
    tensors = load_file(path)
    for name, model in models.items():  # unchanged: the scale is not folded into the weights, and ranks are not padded
        for key, value in adapter(model)[0].items():
            module, _, leaf = key.partition(".lora_")
            end = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight", "magnitude_vector": "dora_scale"}[
                leaf
            ]
            module = f"text_model.{module.removeprefix('text_model.')}" if name == "text_encoder" else module
            stored = tensors[f"lora_{'te' if name == 'text_encoder' else name}_{module.replace('.', '_')}.{end}"]
            assert torch.equal(stored.flatten(), value.flatten())
    assert lora_file.find_dialect(tensors) == "kohya"
    assert_same_updates(lora_file.load_lora(path)[0], models)


def test_ours_has_the_same_updates(models, tmp_path):
    path = lora_file.save_lora(tmp_path, adapters_of(models), {})
    assert lora_file.find_dialect(load_file(path)) == "diffusers"
    assert_same_updates(lora_file.load_lora(tmp_path)[0], models)


def test_peft_folders_have_the_same_updates(models, tmp_path):
    assert_same_updates(lora_file.load_lora(save_peft(models, tmp_path))[0], models)
    alone, _ = lora_file.load_lora(tmp_path / "text_encoder")
    file, _ = lora_file.load_lora(tmp_path / "unet" / "adapter_model.safetensors")
    assert_same_updates(alone | file, models)


def test_a_folder_as_peft_itself_writes_it(base, tmp_path):
    unet = trained(base.unet, UNET_TARGETS, **MIXED)
    config = unet.peft_config["default"]
    wrapped = get_peft_model(UNet2DConditionModel.from_config(base.unet.config), config)
    wrapped.load_state_dict({f"base_model.model.{k}": v for k, v in unet.state_dict().items()}, strict=True)
    wrapped.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    (loaded,) = lora_file.load_lora(tmp_path)[0].values()
    folded = lora_file.fold_scale(*adapter(unet))
    assert loaded.keys() == folded.keys()
    for key, value in folded.items():
        assert_close(loaded[key], value)


def test_stock_diffusers_takes_what_the_converter_gives(base, models, tmp_path):
    """Tests three formats with one rank, because diffusers 0.39 scales mixed ranks wrongly."""
    kohya.save_kohya(tmp_path / "kohya.safetensors", adapters_of(models), {"ss_v2": "False"})
    save_peft(models, tmp_path / "peft")
    lora_file.save_lora(tmp_path / "ours", adapters_of(models), {})
    for source in ("kohya.safetensors", "peft", "ours"):
        tensors, header = lora_file.as_diffusers(tmp_path / source)
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        assert {*tensors} == {*load_file(tmp_path / "ours" / lora_file.WEIGHTS_NAME)}
        assert header.get("ss_v2") == ("False" if source.startswith("kohya") else None)
        pipe = pipeline_with(base)
        pipe.load_lora_weights(tensors, adapter_name="theirs")
        assert_differs(predict(base.unet), predict(models["unet"]))
        assert_close(predict(pipe.unet), predict(models["unet"]))
        assert_close(encode(pipe.text_encoder), encode(models["text_encoder"]))


def test_what_kohyas_files_may_leave_out_or_name_otherwise(base, tmp_path):
    """A missing alpha means the rank; the text encoder of SD1 may be lora_te1_; Tucker convolutions have a third tensor."""
    models = {
        "unet": trained(base.unet, UNET_TARGETS, lora_alpha=4),
        "text_encoder": trained(base.text_encoder, TEXT_TARGETS, lora_alpha=4),
    }
    tensors = kohya.kohya_tensors(adapters_of(models))
    tensors = {
        re.sub("^lora_te_", "lora_te1_", key): value for key, value in tensors.items() if not key.endswith(".alpha")
    }
    save_file(tensors, tmp_path / "few.safetensors")
    assert_same_updates(lora_file.load_lora(tmp_path / "few.safetensors")[0], models)

    name, out, inner = "lora_unet_mid_block_resnets_0_conv1", 16, 16
    torch.manual_seed(0)
    down, mid, up = torch.randn(3, inner, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(out, 3, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    save_file({f"{name}.{leaf}": value for leaf, value in parts.items()}, tmp_path / "tucker.safetensors")
    a, b = factors(lora_file.load_lora(tmp_path / "tucker.safetensors")[0]["unet"], "mid_block.resnets.0.conv1")
    picture, conv = torch.randn(1, inner, 8, 8), torch.nn.functional.conv2d
    wanted = conv(conv(conv(picture, down), mid, padding=1), up) * 0.5
    assert_close(conv(picture, (b @ a).float().reshape(out, inner, 3, 3), padding=1), wanted)


def test_old_names_of_attention_in_the_text_encoder(base, tmp_path):
    model = trained(base.text_encoder, ["q_proj", "out_proj"], lora_alpha=4)
    folded = lora_file.fold_scale(*adapter(model))
    old = {}
    for key, value in folded.items():
        key = f"text_encoder.text_model.{key.removeprefix('text_model.')}"
        key = key.replace("q_proj", "to_q").replace("out_proj", "to_out")
        old[key.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.")] = value
    save_file(old, tmp_path / "old.safetensors")
    assert lora_file.find_dialect(old) == "old diffusers"
    loaded = lora_file.load_lora(tmp_path / "old.safetensors")[0]["text_encoder"]
    assert {key.removeprefix("text_model."): value.sum() for key, value in loaded.items()} == {
        key.removeprefix("text_model."): value.sum() for key, value in folded.items()
    }


def sd15_of_kohya(rank):
    """Returns {name: (shape of lora_down, shape of lora_up)} of kohya's default for SD1.5, from its geometry."""
    table = {}

    def add(name, inner, outer, is_convolution=False):
        ones = (1, 1) if is_convolution else ()
        table[name] = (rank, inner, *ones), (outer, rank, *ones)

    blocks = [(f"down_blocks_{i}_attentions_{j}", (320, 640, 1280)[i]) for i in range(3) for j in range(2)]
    blocks += [("mid_block_attentions_0", 1280)]
    blocks += [(f"up_blocks_{i}_attentions_{j}", (None, 1280, 640, 320)[i]) for i in (1, 2, 3) for j in range(3)]
    for block, width in blocks:
        name = f"lora_unet_{block}"
        add(f"{name}_proj_in", width, width, is_convolution=True)
        add(f"{name}_proj_out", width, width, is_convolution=True)
        name += "_transformer_blocks_0"
        for attention, context in (("attn1", width), ("attn2", 768)):
            add(f"{name}_{attention}_to_q", width, width)
            add(f"{name}_{attention}_to_k", context, width)
            add(f"{name}_{attention}_to_v", context, width)
            add(f"{name}_{attention}_to_out_0", width, width)
        add(f"{name}_ff_net_0_proj", width, 8 * width)  # GEGLU has two times four times the width
        add(f"{name}_ff_net_2", 4 * width, width)
    for layer in range(12):
        name = f"lora_te_text_model_encoder_layers_{layer}"
        for kind in "qkv":
            add(f"{name}_self_attn_{kind}_proj", 768, 768)
        add(f"{name}_self_attn_out_proj", 768, 768)
        add(f"{name}_mlp_fc1", 768, 3072)
        add(f"{name}_mlp_fc2", 3072, 768)
    return table


@pytest.fixture(scope="module")
def sd15():
    """Returns the UNet and the text encoder of SD1.5 on the meta device, adapted like kohya's default."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        clip = CLIPTextConfig(num_hidden_layers=12, num_attention_heads=12, hidden_size=768, intermediate_size=3072)
        models = {"unet": unet, "text_encoder": CLIPTextModel(clip)}
        targets = [*UNET_TARGETS[:6], "proj_in", "proj_out"]
        for model, names in zip(models.values(), (targets, lora.text_layers(models["text_encoder"]))):
            lora.add_lora(model, LoraSettings(rank=16, lora_alpha=8, target_modules=names))
    return models


def test_sd15s_whole_geometry_by_kohyas_names(sd15):
    states = {name: lora.adapter_state(model) for name, model in sd15.items()}
    states = {
        name: ({k: torch.empty(v.shape) for k, v in state.items()}, config) for name, (state, config) in states.items()
    }
    tensors, table = kohya.kohya_tensors(states), sd15_of_kohya(16)
    assert sum(name.startswith("lora_unet_") for name in table) == 192
    assert sum(name.startswith("lora_te_") for name in table) == 72
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        f"{name}.{leaf}": shape
        for name, (down, up) in table.items()
        for leaf, shape in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", ()))
    }
    assert {value.item() for key, value in tensors.items() if key.endswith(".alpha")} == {8.0}
    # Each name is converted back to the name of its layer.
    back = {dialects.parse_key(f"{name}.alpha", "kohya")[:2] for name in table}
    layers = {(name, module) for name, (state, _) in states.items() for module in modules_of(state)}
    assert {(c, m.removeprefix("text_model.")) for c, m in back} == {
        (c, m.removeprefix("text_model.")) for c, m in layers
    }


def test_every_layer_of_a_unet_and_a_text_encoder_has_a_name_that_leads_back(sd15):
    """In kohya's names, underscores stand for dots and for underscores, also of convolutions, resnets and embeddings."""
    for component, model in sd15.items():
        linear = (torch.nn.Linear, torch.nn.Conv2d)
        names = [
            n.removesuffix(".base_layer")
            for n, m in model.named_modules()
            if isinstance(m, linear) and ".lora_" not in n
        ]
        assert len(names) == {"unet": 282, "text_encoder": 72}[component]
        for name in names:
            name = name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = f"{STABLE_DIFFUSION.kohya.prefixes[component]}{name.replace('.', '_')}.lora_down.weight"
            assert dialects.parse_key(key, "kohya") == (component, name, "lora_A.weight")


REFUSED = {
    "it is LoHa, which is not supported": "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a",
    "it is LoKr, which is not supported": "lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1",
    "it is (IA)3, which is not supported": "lora_unet_mid_block_attentions_0_proj_in.on_input",
    "it is OFT, which is not supported": "lora_unet_mid_block_attentions_0_proj_in.oft_blocks",
    "it is GLoRA, which is not supported": "lora_unet_mid_block_attentions_0_proj_in.a1.weight",
    "it is a model's full difference, which is not supported": "lora_unet_mid_block_attentions_0_proj_in.diff",
    "it is a LoRA of Flux, which is not supported": "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
    "it is a LoRA of Stable Diffusion 3, which is not": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "it contains lora_unet_down_blocks_0_layer.lora_down.weight": "lora_unet_down_blocks_0_layer.lora_down.weight",
    "it contains lora_te_text_model_final_layer_norm.alpha": "lora_te_text_model_final_layer_norm.alpha",
    "it contains lora_unet_conv_in.what": "lora_unet_conv_in.what",
    "lacks its lora_A or its lora_B": "lora_unet_conv_in.lora_down.weight",
}


@pytest.mark.parametrize(("message", "key"), REFUSED.items())
def test_other_adapters_are_refused_by_name(tmp_path, message, key):
    save_file({key: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        lora_file.as_diffusers(tmp_path / "other.safetensors")
    assert str(caught.value).startswith(f"{tmp_path}/other.safetensors: ")
    assert "\n" not in str(caught.value)


def test_a_peft_folder_of_another_kind_is_refused_by_name(tmp_path):
    save_file({"base_model.model.conv_in.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    for config, message in (
        ('{"peft_type": "LOHA"}', "adapter_config.json says LOHA"),
        ("{", "its configuration can't be read"),
    ):
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(InputError, match=message):
            lora_file.load_lora(tmp_path)


def test_dora_of_the_inputs_is_refused(base, tmp_path):
    """LyCORIS' older form of DoRA exists neither in peft nor in diffusers."""
    tensors = kohya.kohya_tensors({"unet": adapter(trained(base.unet, ["ff.net.2"], use_dora=True))})
    of_inputs = {key: torch.ones(1, 32) if key.endswith("dora_scale") else value for key, value in tensors.items()}
    save_file(of_inputs, tmp_path / "old.safetensors")
    with pytest.raises(InputError, match=r"the DoRA magnitudes of unet\..* have the shape \[1, 32\]"):
        lora_file.load_lora(tmp_path / "old.safetensors")


def test_what_does_not_fit_together_is_refused(base, tmp_path):
    tensors = kohya.kohya_tensors({"unet": adapter(trained(base.unet, ["to_q"]))})
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    save_file(tensors | {key: tensors[key][:, :3].contiguous()}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="the two tensors of unet.down_blocks.* do not fit: .4, 8. and .8, 3."):
        lora_file.load_lora(tmp_path / "odd.safetensors")


# How stock diffusers reads such files, so that a change of diffusers is noticed.


@pytest.fixture
def warnings_of_diffusers():
    """Collects the messages that diffusers logs."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger, before = logging.getLogger("diffusers"), diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_warning()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    diffusers_logging.set_verbosity(before)


def read_by_diffusers(base, path):
    pipe = pipeline_with(base)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    return pipe


def error_of(got, wanted, before):
    """Returns the error of a prediction as a share of the change by training."""
    return ((got - wanted).norm() / (before - wanted).norm()).item()


STOCK = {
    "one rank and alpha": ({"lora_alpha": 6}, True),
    "rsLoRA": ({"lora_alpha": 6, "use_rslora": True}, True),
    "mixed ranks, one alpha": ({"lora_alpha": 6, "rank_pattern": {"to_q|q_proj": 2}}, True),
    "mixed ranks and alphas": (MIXED, False),
    "DoRA": ({"lora_alpha": 6, "use_dora": True}, False),
}


@pytest.mark.parametrize(("options", "right"), STOCK.values(), ids=STOCK)
def test_what_stock_diffusers_makes_of_kohyas_files(base, tmp_path, warnings_of_diffusers, options, right):
    """A single alpha is exact. Of several alphas one is used, and DoRA's magnitudes are dropped, with at most a warning."""
    models = {
        "unet": trained(base.unet, UNET_TARGETS, **options),
        "text_encoder": trained(base.text_encoder, TEXT_TARGETS, **options),
    }
    path = kohya.save_kohya(tmp_path / "kohya.safetensors", adapters_of(models), {})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pipe = read_by_diffusers(base, path)
    errors = (
        error_of(predict(pipe.unet), predict(models["unet"]), predict(base.unet)),
        error_of(encode(pipe.text_encoder), encode(models["text_encoder"]), encode(base.text_encoder)),
    )
    assert max(errors) < 1e-5 if right else min(errors) > 0.1
    of_peft = any("alpha_pattern keys did not match any targeted module" in str(row.message) for row in warned)
    of_diffusers = any(
        "filter out the keys associated to 'dora_scale`" in message for message in warnings_of_diffusers
    )
    assert (of_peft, of_diffusers) == (options is MIXED, "use_dora" in options)
    tensors, _ = lora_file.as_diffusers(path)  # and our reader reads it in this way
    pipe = pipeline_with(base)
    pipe.load_lora_weights(tensors)
    assert_close(predict(pipe.unet), predict(models["unet"]))
    assert_close(encode(pipe.text_encoder), encode(models["text_encoder"]))


def test_what_stock_diffusers_makes_of_pefts_names(base, tmp_path, warnings_of_diffusers):
    """diffusers ignores them: the picture is that of the base model, and only a warning is logged."""
    models = {"unet": trained(base.unet, UNET_TARGETS, lora_alpha=6)}
    path = save_peft(models, tmp_path) / "unet" / "adapter_model.safetensors"
    pipe = read_by_diffusers(base, path)
    assert torch.equal(predict(pipe.unet), predict(base.unet))
    assert any("No LoRA keys associated to UNet2DConditionModel" in message for message in warnings_of_diffusers)

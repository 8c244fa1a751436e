"""Stock diffusers reads the LoRA file and predicts what was trained."""

import copy
import hashlib
import json
import os
import re

import diffusers
import pytest
import safetensors.torch
import torch
from conftest import refusal_of
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_diffusers
from packaging.version import Version
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from small_pipeline import (
    ADAPTERS,
    TEXT_TARGETS,
    UNET_TARGETS,
    adapter,
    assert_close,
    assert_differs,
    draw,
    encode,
    pipeline_with,
    predict,
    small_pipeline,
    trained,
)
from transformers import CLIPTextModelWithProjection

from text_to_image_lora.errors import InputError
from text_to_image_lora.models import lora_file


TRAINING = {"rank": "4", "base_model": "mini", "trigger_word": "sks \u2013 \U0001f5e1", "dataset": "0123abcd"}
needs_load_attn_procs = pytest.mark.skipif(
    Version(diffusers.__version__) >= Version("0.40"), reason="diffusers 0.40 took LoRA out of load_attn_procs"
)


@pytest.fixture(scope="module")
def base():
    return small_pipeline()


@pytest.mark.lora_file
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_load_lora_weights_gives_the_trained_models(base, tmp_path, options):
    unet = trained(base.unet, UNET_TARGETS, **options)
    text_encoder = trained(base.text_encoder, TEXT_TARGETS, **options)
    lora_file.save_lora(tmp_path, {"unet": adapter(unet), "text_encoder": adapter(text_encoder)}, TRAINING)
    pipe = pipeline_with(base)
    pipe.load_lora_weights(tmp_path, weight_name=lora_file.WEIGHTS_NAME)
    assert_differs(predict(base.unet), predict(unet))
    assert_differs(encode(base.text_encoder), encode(text_encoder))
    assert_close(predict(pipe.unet), predict(unet))
    assert_close(encode(pipe.text_encoder), encode(text_encoder))
    assert_close(draw(pipe), draw(pipeline_with(base, unet=unet, text_encoder=text_encoder)))


@pytest.mark.lora_file
@needs_load_attn_procs
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_load_attn_procs_gives_the_trained_unet_and_the_same_picture(base, tmp_path, options):
    unet = trained(base.unet, UNET_TARGETS, **options)
    text_encoder = trained(base.text_encoder, TEXT_TARGETS, **options)
    lora_file.save_lora(tmp_path / "unet", {"unet": adapter(unet)}, TRAINING)
    lora_file.save_lora(tmp_path / "both", {"unet": adapter(unet), "text_encoder": adapter(text_encoder)}, TRAINING)
    pipes = {name: pipeline_with(base) for name in ("unet", "both", "load_lora_weights")}
    for name in ("unet", "both"):
        with pytest.warns(FutureWarning, match="`load_attn_procs` is deprecated"):
            pipes[name].unet.load_attn_procs(tmp_path / name)
        assert_close(predict(pipes[name].unet), predict(unet))
    pipes["load_lora_weights"].load_lora_weights(tmp_path / "unet", weight_name=lora_file.WEIGHTS_NAME)
    assert_close(draw(pipes["unet"]), draw(pipes["load_lora_weights"]))
    assert_close(draw(pipes["both"]), draw(pipes["load_lora_weights"]))


@pytest.mark.lora_file
def test_stable_diffusion_xl_reads_both_text_encoders(base, tmp_path):
    projecting = CLIPTextModelWithProjection(copy.deepcopy(base.text_encoder.config)).eval()
    models = {
        "unet": trained(base.unet, UNET_TARGETS, lora_alpha=6),
        "text_encoder": trained(base.text_encoder, TEXT_TARGETS, lora_alpha=1),
        "text_encoder_2": trained(projecting, TEXT_TARGETS, lora_alpha=2),
    }
    lora_file.save_lora(tmp_path, {name: adapter(model) for name, model in models.items()}, TRAINING)
    pipe = StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=copy.deepcopy(base.text_encoder), text_encoder_2=copy.deepcopy(projecting),
        tokenizer=base.tokenizer, tokenizer_2=base.tokenizer, unet=copy.deepcopy(base.unet), scheduler=base.scheduler,
        add_watermarker=False,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path, weight_name=lora_file.WEIGHTS_NAME)
    assert_differs(encode(projecting), encode(models["text_encoder_2"]))
    assert_close(encode(pipe.text_encoder_2), encode(models["text_encoder_2"]))
    assert_close(encode(pipe.text_encoder), encode(models["text_encoder"]))
    assert_close(predict(pipe.unet), predict(models["unet"]))


@pytest.mark.lora_file
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_fold_scale_makes_the_product_the_whole_update(base, options):
    unet = trained(base.unet, UNET_TARGETS, **options).to(memory_format=torch.channels_last)
    folded = lora_file.fold_scale(*adapter(unet.bfloat16()))
    assert {(value.dtype, value.is_contiguous()) for value in folded.values()} == {(torch.float32, True)}
    modules = {name: module for name, module in unet.float().named_modules() if isinstance(module, BaseTunerLayer)}
    assert len(modules) == 52
    for name, module in modules.items():
        product = folded[f"{name}.lora_B.weight"].flatten(1) @ folded[f"{name}.lora_A.weight"].flatten(1)
        assert_close(product, module.get_delta_weight("default").flatten(1).detach())


@pytest.mark.lora_file
def test_header_speaks_of_every_component_and_of_the_training(base, tmp_path):
    components = {
        "unet": adapter(trained(base.unet, ["to_q", "to_out.0"], lora_alpha=6, use_rslora=True)),
        "text_encoder": adapter(trained(base.text_encoder, ["q_proj"], lora_alpha=1, use_dora=True)),
        "text_encoder_2": ({}, LoraConfig()),
    }
    path = lora_file.save_lora(tmp_path, components, TRAINING | {"hub_token": "hf_secret"})
    assert path == tmp_path / LORA_WEIGHT_NAME_SAFE
    assert b"hf_secret" not in path.read_bytes()
    with safe_open(path, "pt") as file:
        header, keys = file.metadata(), list(file.keys())
    assert {key: header.pop(key) for key in TRAINING} == TRAINING
    assert header.pop("format") == "pt"
    adapters = json.loads(header.pop(LORA_ADAPTER_METADATA_KEY))
    body = path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :]
    digest = hashlib.sha256(body).hexdigest()
    assert (header.pop("sshs_model_hash"), header.pop("modelspec.hash_sha256")) == (digest, f"0x{digest}")
    # A hash of the bytes after the first MiB.
    assert header.pop("sshs_legacy_hash") == hashlib.sha256(b"").hexdigest()[:8]
    assert not header
    common = {
        "r": 4, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_bias": False,
    }  # fmt: skip
    for component, use_dora in (("unet", False), ("text_encoder", True)):
        config = {key.split(".")[1]: adapters.pop(key) for key in list(adapters) if key.split(".")[0] == component}
        modules = {key.partition(".lora_")[0] for key in keys if key.startswith(f"{component}.")}
        assert config.pop("target_modules") == sorted(re.sub(r"^\w+\.(text_model\.)?", "", key) for key in modules)
        assert config == common | {"use_dora": use_dora}
    assert not adapters
    assert {key.partition(".lora_")[0] for key in keys if key.startswith("text_encoder.")} == {
        f"text_encoder.text_model.encoder.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    }


@pytest.mark.lora_file
def test_the_same_weights_give_the_same_bytes(base, tmp_path):
    state_dict, config = adapter(trained(base.unet, UNET_TARGETS, lora_alpha=6))
    first = lora_file.save_lora(tmp_path / "first", {"unet": (state_dict, config)}, TRAINING).read_bytes()
    reverse = {key: state_dict[key] for key in reversed(state_dict)}
    for run in range(3):
        again = lora_file.save_lora(
            tmp_path / f"{run}.safetensors", {"unet": (reverse, config)}, dict(sorted(TRAINING.items()))
        )
        assert again.read_bytes() == first
    next(iter(state_dict.values()))[0] += 1
    assert lora_file.save_lora(tmp_path, {"unet": (state_dict, config)}, TRAINING).read_bytes() != first


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_alone(base, tmp_path, monkeypatch, step):
    old = {"unet": adapter(trained(base.unet, ["to_q"], lora_alpha=6))}
    before = lora_file.save_lora(tmp_path, old, TRAINING).read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        lora_file.save_lora(tmp_path, {"unet": adapter(trained(base.unet, ["to_k"], lora_alpha=6))}, TRAINING)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {lora_file.WEIGHTS_NAME: before}


@pytest.mark.lora_file
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_load_lora_reads_what_save_lora_wrote(base, tmp_path, options):
    components = {
        "unet": adapter(trained(base.unet, UNET_TARGETS, **options)),
        "text_encoder": adapter(trained(base.text_encoder, TEXT_TARGETS, **options)),
    }
    path = lora_file.save_lora(tmp_path, components, TRAINING)
    loaded, header = lora_file.load_lora(tmp_path)
    assert TRAINING.items() <= header.items()
    assert all(key.startswith("text_model.encoder.") for key in loaded["text_encoder"])
    for name, given in components.items():
        assert {key.removeprefix("text_model.") for key in loaded[name]} == {
            key.removeprefix("text_model.") for key in given[0]
        }
    # Saving the loaded tensors again gives an equal file, with equal names, scale and ranks.
    again = {name: (state_dict, LoraConfig(r=4, lora_alpha=4)) for name, state_dict in loaded.items()}
    assert lora_file.save_lora(tmp_path / "again", again, TRAINING).read_bytes() == path.read_bytes()


@pytest.mark.lora_file
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_load_lora_folds_the_alpha_of_a_file_of_diffusers(base, tmp_path, options):
    state_dict, config = adapter(trained(base.unet, UNET_TARGETS, **options))
    StableDiffusionPipeline.save_lora_weights(tmp_path, state_dict, unet_lora_adapter_metadata=config.to_dict())
    loaded = lora_file.load_lora(tmp_path)[0]["unet"]
    wanted = lora_file.fold_scale(state_dict, config)
    assert loaded.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_close(loaded[key], value)


@pytest.mark.lora_file
def test_load_lora_reads_old_names(base, tmp_path):
    unet, text_encoder = (
        lora_file.fold_scale(*adapter(trained(model, targets, lora_alpha=4)))
        for model, targets in ((base.unet, ["to_q", "to_out.0"]), (base.text_encoder, ["q_proj", "out_proj"]))
    )
    wanted = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text_encoder.items()}
    old = convert_state_dict_to_diffusers(unet)
    assert all(".lora.down." in key or ".lora.up." in key for key in old)
    old_text = convert_state_dict_to_diffusers(text_encoder)
    assert all(".lora_linear_layer." in key for key in old_text)
    oldest = {
        re.sub(r"\.(to_\w+?)(\.0)?\.lora\.", r".processor.\1_lora.", key): value.half() for key, value in old.items()
    }
    assert any(".attn1.processor.to_out_lora.down.weight" in key for key in oldest)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "old", old, old_text)
    safetensors.torch.save_file(oldest, tmp_path / "oldest.safetensors")
    loaded, _ = lora_file.load_lora(tmp_path / "old")
    assert loaded.keys() == {"unet", "text_encoder"}
    for got, want in ((loaded["unet"], unet), (loaded["text_encoder"], wanted)):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
    loaded, _ = lora_file.load_lora(tmp_path / "oldest.safetensors")
    assert all(torch.equal(loaded["unet"][key], value.half().float()) for key, value in unet.items())
    assert loaded["unet"].keys() == unet.keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model.diffusion_model.out.0.bias": 4},
            "it is not a LoRA of Stable Diffusion: it contains model.diffusion_model.out.0.bias",
        ),
        (
            {"transformer.x.lora_A.weight": 4},
            "it is not a LoRA of Stable Diffusion: it contains transformer.x.lora_A.weight",
        ),
        ({"unet.mid_block.x.lora_A.weight": 4}, "it is incomplete: unet.mid_block.x lacks its lora_A or its lora_B"),
        ({}, "contains no weights"),
    ],
)
def test_load_lora_refuses_other_files_in_one_line(tmp_path, tensors, message):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({key: torch.ones(size, 1) for key, size in tensors.items()}, path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        lora_file.load_lora(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"not a LoRA", b"\x08" + bytes(7) + b"{broken}"])
def test_load_lora_refuses_what_it_cannot_read_in_one_line(tmp_path, content):
    path = tmp_path / lora_file.WEIGHTS_NAME
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"can't be read as a safetensors file \(.*\). Pass a LoRA of Stable Diff"
    ) as error:
        lora_file.load_lora(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


DEEP = "[" * 100_000
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def write_file_of_diffusers(folder, metadata):
    """Writes a LoRA of one layer with this text as the configurations of peft in its header."""
    tensors = {f"unet.{MODULE}.lora_A.weight": torch.ones(4, 8), f"unet.{MODULE}.lora_B.weight": torch.ones(8, 4)}
    path = folder / "lora.safetensors"
    safetensors.torch.save_file(tensors, path, {LORA_ADAPTER_METADATA_KEY: metadata})
    return path


def write_peft_folder(folder, config):
    """Writes a LoRA of one layer in the format of peft."""
    tensors = {f"{MODULE}.lora_A.weight": torch.ones(4, 8), f"{MODULE}.lora_B.weight": torch.ones(8, 4)}
    tensors = {f"base_model.model.{key}": value for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config)
    return folder


CONFIGURATIONS = [
    DEEP, "[]", "5", "null", "{", '{"unet.r": 4, "unet.r": 8, "unet.lora_alpha": 4}',
    *(json.dumps({"unet.r": 4, "unet.lora_alpha": alpha}) for alpha in ("x", [1], None, float("nan"), True)),
    *(
        json.dumps({"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": pattern})
        for pattern in (5, [1], {"to_q": "x"}, {"to_q": None}, {"(((": 4}, {"(x+x+)+y": 4}, {".*": 4}, {"": 4})
    ),
    '{"unet.r": 4, "unet.lora_alpha": 4, "unet.use_rslora": "x"}',
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_configurations_of_other_kinds_are_refused(tmp_path, config):
    path = write_file_of_diffusers(tmp_path, config)
    assert refusal_of(lora_file.load_lora, path).startswith(f"{path}: its configuration can't be read (")
    folder = write_peft_folder(tmp_path, config.replace("unet.", ""))
    assert "its configuration can't be read (" in refusal_of(lora_file.load_lora, folder)


@pytest.mark.parametrize(
    ("pattern", "scale"),
    [
        ("to_q", 2), ("attn1.to_q", 2), (r"attn1\\.to_q", 2), (f"^{MODULE}", 2), (MODULE, 2), ("to_k|to_q", 2),
        ("to_k|^to_q", 1), ("o_q", 1), ("^to_q", 1), ("ttn1.to_q", 1), ("to_k", 1),
    ],
)  # fmt: skip
def test_alphas_of_modules_are_found_by_the_ends_of_their_names(tmp_path, pattern, scale):
    config = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {pattern.replace("\\\\", "\\"): 8}}
    components, _ = lora_file.load_lora(write_file_of_diffusers(tmp_path, json.dumps(config)))
    assert components["unet"][f"{MODULE}.lora_B.weight"].unique().tolist() == [scale]


@pytest.mark.parametrize(
    "config",
    [
        {"unet.lora_alpha": 1e300},
        {"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": -1e300}},
        {"unet.lora_alpha": 1e39, "unet.use_rslora": True},
    ],
)  # fmt: skip
def test_a_scale_that_makes_weights_infinite_is_refused(tmp_path, config):
    path = write_file_of_diffusers(tmp_path, json.dumps({"unet.r": 4} | config))
    line = refusal_of(lora_file.load_lora, path)
    assert line.startswith(f"{path}: with its alpha, 1 of its tensors is not finite, the first: unet.{MODULE}.lora_B")


def test_an_alpha_in_the_file_that_makes_weights_infinite_is_refused(tmp_path):
    name = f"lora_unet_{MODULE.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.lora_up.weight": torch.full((8, 1), 100.0)}
    safetensors.torch.save_file(tensors | {f"{name}.alpha": torch.tensor(1e38)}, tmp_path / "lora.safetensors")
    assert "with its alpha, 1 of its tensors is not finite" in refusal_of(
        lora_file.load_lora, tmp_path / "lora.safetensors"
    )

"""diffusers reads the LoRA file, yaml and a Markdown parser read the card, and a hub on a socket gets the upload."""

import base64
import copy
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt
from packaging.version import Version
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from text_to_image_lora import export
from text_to_image_lora.errors import InputError


UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # what --train_text_encoder adapts
# Every way to have another scale than 1, and DoRA, whose norm depends on that scale.
ADAPTERS = {
    "alpha": {"lora_alpha": 6},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "dora": {"lora_alpha": 6, "use_dora": True},
    "patterns": {"lora_alpha": 6, "rank_pattern": {"to_q|q_proj": 2}, "alpha_pattern": {"to_k|k_proj": 1}},
}
TRAINING = {"rank": "4", "base_model": "mini", "trigger_word": "sks \u2013 \U0001f5e1", "dataset": "0123abcd"}
needs_load_attn_procs = pytest.mark.skipif(
    Version(diffusers.__version__) >= Version("0.40"), reason="diffusers 0.40 took LoRA out of load_attn_procs"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost these tiny models 40 times their work where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base():
    """A Stable Diffusion pipeline, as small as its real classes allow."""
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *(letter + end for letter in "abcdefghij" for end in ("", "</w>"))]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def trained(model, targets, **options):
    """A copy of the model with an adapter whose lora_B and DoRA magnitudes are away from their start."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 1 + torch.rand(parameter.shape)
    return model.eval()


def adapter(model):
    return get_peft_model_state_dict(model), model.peft_config["default"]


def pipeline(base, **components):
    """The base with copies of its models, but for those given."""
    parts = {name: copy.deepcopy(part) for name, part in base.components.items() if name not in components}
    pipe = StableDiffusionPipeline(**parts, **components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def predict(unet):
    torch.manual_seed(2)
    return unet(torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 8, 16)).sample


@torch.no_grad()
def encode(text_encoder):
    return text_encoder(torch.tensor([[0, 3, 5, 7, 9, 11, 1, 1]])).last_hidden_state


def draw(pipe):
    return pipe("ab cd", num_inference_steps=2, generator=torch.manual_seed(3), output_type="np").images


def assert_close(got, wanted):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)


def assert_differs(got, other):
    assert (torch.as_tensor(got) - torch.as_tensor(other)).abs().max() > 1e-2


@pytest.mark.lora_file
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_load_lora_weights_gives_the_trained_models(base, tmp_path, options):
    unet = trained(base.unet, UNET_TARGETS, **options)
    text_encoder = trained(base.text_encoder, TEXT_TARGETS, **options)
    export.save_lora(tmp_path, {"unet": adapter(unet), "text_encoder": adapter(text_encoder)}, TRAINING)
    pipe = pipeline(base)
    pipe.load_lora_weights(tmp_path, weight_name=export.WEIGHTS_NAME)
    assert_differs(predict(base.unet), predict(unet))
    assert_differs(encode(base.text_encoder), encode(text_encoder))
    assert_close(predict(pipe.unet), predict(unet))
    assert_close(encode(pipe.text_encoder), encode(text_encoder))
    assert_close(draw(pipe), draw(pipeline(base, unet=unet, text_encoder=text_encoder)))


@pytest.mark.lora_file
@needs_load_attn_procs
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_load_attn_procs_gives_the_trained_unet_and_the_same_picture(base, tmp_path, options):
    unet = trained(base.unet, UNET_TARGETS, **options)
    text_encoder = trained(base.text_encoder, TEXT_TARGETS, **options)
    export.save_lora(tmp_path / "unet", {"unet": adapter(unet)}, TRAINING)
    export.save_lora(tmp_path / "both", {"unet": adapter(unet), "text_encoder": adapter(text_encoder)}, TRAINING)
    pipes = {name: pipeline(base) for name in ("unet", "both", "load_lora_weights")}
    for name in ("unet", "both"):
        with pytest.warns(FutureWarning, match="`load_attn_procs` is deprecated"):
            pipes[name].unet.load_attn_procs(tmp_path / name)
        assert_close(predict(pipes[name].unet), predict(unet))
    pipes["load_lora_weights"].load_lora_weights(tmp_path / "unet", weight_name=export.WEIGHTS_NAME)
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
    export.save_lora(tmp_path, {name: adapter(model) for name, model in models.items()}, TRAINING)
    pipe = StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=copy.deepcopy(base.text_encoder),
        text_encoder_2=copy.deepcopy(projecting),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=copy.deepcopy(base.unet),
        scheduler=base.scheduler,
        add_watermarker=False,
    )
    pipe.load_lora_weights(tmp_path, weight_name=export.WEIGHTS_NAME)
    assert_differs(encode(projecting), encode(models["text_encoder_2"]))
    assert_close(encode(pipe.text_encoder_2), encode(models["text_encoder_2"]))
    assert_close(encode(pipe.text_encoder), encode(models["text_encoder"]))
    assert_close(predict(pipe.unet), predict(models["unet"]))


@pytest.mark.lora_file
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_fold_scale_makes_the_product_the_whole_update(base, options):
    unet = trained(base.unet, UNET_TARGETS, **options).to(memory_format=torch.channels_last)
    folded = export.fold_scale(*adapter(unet.bfloat16()))
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
    path = export.save_lora(tmp_path, components, TRAINING | {"hub_token": "hf_secret"})
    assert path == tmp_path / LORA_WEIGHT_NAME_SAFE
    assert b"hf_secret" not in path.read_bytes()
    with safe_open(path, "pt") as file:
        header, keys = file.metadata(), list(file.keys())
    assert {key: header.pop(key) for key in TRAINING} == TRAINING
    assert header.pop("format") == "pt"
    adapters = json.loads(header.pop(LORA_ADAPTER_METADATA_KEY))
    assert not header
    common = {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "lora_bias": False,
    }
    for component, use_dora in (("unet", False), ("text_encoder", True)):
        told = {key.split(".")[1]: adapters.pop(key) for key in list(adapters) if key.split(".")[0] == component}
        modules = {key.partition(".lora_")[0] for key in keys if key.startswith(f"{component}.")}
        assert told.pop("target_modules") == sorted(re.sub(r"^\w+\.(text_model\.)?", "", key) for key in modules)
        assert told == common | {"use_dora": use_dora}
    assert not adapters
    assert {key.partition(".lora_")[0] for key in keys if key.startswith("text_encoder.")} == {
        f"text_encoder.text_model.encoder.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    }


@pytest.mark.lora_file
def test_the_same_weights_give_the_same_bytes(base, tmp_path):
    state_dict, config = adapter(trained(base.unet, UNET_TARGETS, lora_alpha=6))
    first = export.save_lora(tmp_path / "first", {"unet": (state_dict, config)}, TRAINING).read_bytes()
    reverse = {key: state_dict[key] for key in reversed(state_dict)}
    for run in range(3):
        again = export.save_lora(
            tmp_path / f"{run}.safetensors", {"unet": (reverse, config)}, dict(sorted(TRAINING.items()))
        )
        assert again.read_bytes() == first
    next(iter(state_dict.values()))[0] += 1
    assert export.save_lora(tmp_path, {"unet": (state_dict, config)}, TRAINING).read_bytes() != first


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_alone(base, tmp_path, monkeypatch, step):
    old = {"unet": adapter(trained(base.unet, ["to_q"], lora_alpha=6))}
    before = export.save_lora(tmp_path, old, TRAINING).read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        export.save_lora(tmp_path, {"unet": adapter(trained(base.unet, ["to_k"], lora_alpha=6))}, TRAINING)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {export.WEIGHTS_NAME: before}


@pytest.mark.lora_file
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_load_lora_reads_what_save_lora_wrote(base, tmp_path, options):
    components = {
        "unet": adapter(trained(base.unet, UNET_TARGETS, **options)),
        "text_encoder": adapter(trained(base.text_encoder, TEXT_TARGETS, **options)),
    }
    path = export.save_lora(tmp_path, components, TRAINING)
    loaded, header = export.load_lora(tmp_path)
    assert TRAINING.items() <= header.items()
    assert all(key.startswith("text_model.encoder.") for key in loaded["text_encoder"])
    for name, given in components.items():
        assert {key.removeprefix("text_model.") for key in loaded[name]} == {
            key.removeprefix("text_model.") for key in given[0]
        }
    # Written out again as it is, it is the same file: the names, the scale and the ranks hold.
    again = {name: (state_dict, LoraConfig(r=4, lora_alpha=4)) for name, state_dict in loaded.items()}
    assert export.save_lora(tmp_path / "again", again, TRAINING).read_bytes() == path.read_bytes()


@pytest.mark.lora_file
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_load_lora_folds_the_alpha_of_a_file_of_diffusers(base, tmp_path, options):
    state_dict, config = adapter(trained(base.unet, UNET_TARGETS, **options))
    StableDiffusionPipeline.save_lora_weights(tmp_path, state_dict, unet_lora_adapter_metadata=config.to_dict())
    loaded = export.load_lora(tmp_path)[0]["unet"]
    wanted = export.fold_scale(state_dict, config)
    assert loaded.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_close(loaded[key], value)


@pytest.mark.lora_file
def test_load_lora_reads_old_names(base, tmp_path):
    unet, text_encoder = (
        export.fold_scale(*adapter(trained(model, targets, lora_alpha=4)))
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
    loaded, _ = export.load_lora(tmp_path / "old")
    assert loaded.keys() == {"unet", "text_encoder"}
    for got, want in ((loaded["unet"], unet), (loaded["text_encoder"], wanted)):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
    loaded, _ = export.load_lora(tmp_path / "oldest.safetensors")
    assert all(torch.equal(loaded["unet"][key], value.half().float()) for key, value in unet.items())
    assert loaded["unet"].keys() == unet.keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_mid_block_attn.lora_down.weight": 4}, "is a LoRA in kohya's format, which can't be read yet"),
        ({"lora_te_text_model_x.alpha": 1}, "is a LoRA in kohya's format, which can't be read yet"),
        (
            {"model.diffusion_model.out.0.bias": 4},
            "not a LoRA of Stable Diffusion: it holds model.diffusion_model.out.0.bias",
        ),
        ({"transformer.x.lora_A.weight": 4}, "not a LoRA of Stable Diffusion: it holds transformer.x.lora_A.weight"),
        ({"unet.mid_block.x.lora_A.weight": 4}, "is incomplete: unet.mid_block.x lacks its lora_A or its lora_B"),
        ({}, "holds no weights"),
    ],
)
def test_load_lora_refuses_other_files_in_one_line(tmp_path, tensors, message):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({key: torch.ones(size, 1) for key, size in tensors.items()}, path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        export.load_lora(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"not a LoRA", b"\x08" + bytes(7) + b"{broken}"])
def test_load_lora_refuses_what_it_cannot_read_in_one_line(tmp_path, content):
    path = tmp_path / export.WEIGHTS_NAME
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="can't be read as a safetensors file: .* Pass a diffusers LoRA") as error:
        export.load_lora(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


HOSTILE = 'a "red": axe # \\ | `x` <b>*bold*</b>\n---\n![](x) $y$ \U0001f5e1'


def card(output_dir, **options):
    """A model card of ordinary inputs, but for those given."""
    ordinary = {
        "base_model": "owner/model",
        "dataset_name": "owner/pictures",
        "prompts": ["ab cd"],
        "image_paths": [],
        "hyperparameters": {"rank": 4},
    }
    return export.write_model_card(output_dir, **(ordinary | options))


def test_card_survives_any_prompt(tmp_path):
    values = {"validation_prompt": HOSTILE, "target_modules": ["to_q", "to_out.0"], "train_data_dir": "/home/me/axes"}
    path = card(
        tmp_path,
        prompts=[HOSTILE, "a blue axe"],
        image_paths=["image_0.png", "in a folder/image (1).png"],
        hyperparameters=values | {"hub_token": "hf_secret"},
        trigger_word=HOSTILE,
        repo_id="me/axes",
    )
    text = path.read_text(encoding="utf-8")
    assert "hf_secret" not in text
    assert metadata_load(path) == {
        "base_model": "owner/model",
        "datasets": ["owner/pictures"],
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "instance_prompt": HOSTILE,
        "tags": ["text-to-image", "stable-diffusion", "diffusers", "diffusers-training", "lora", "template:sd-lora"],
        "widget": [
            {"text": HOSTILE, "output": {"url": "image_0.png"}},
            {"text": "a blue axe", "output": {"url": "in a folder/image (1).png"}},
        ],
    }
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n")[-1])
    assert [token.type for token in tokens].count("table_open") == 1
    assert [token.type for token in tokens].count("fence") == 1
    inline = [token for token in tokens if token.type == "inline"]
    pictures = [child.attrs["src"] for token in inline for child in token.children if child.type == "image"]
    assert pictures == ["image_0.png", "in%20a%20folder/image%20%281%29.png"]
    cells = [
        "".join(child.content for child in tokens[i + 1].children)
        for i, token in enumerate(tokens)
        if token.type == "td_open"
    ]
    one_line = " ".join(HOSTILE.split())
    assert cells == [
        "validation_prompt", one_line, "target_modules", "['to_q', 'to_out.0']", "train_data_dir", "axes"
    ]  # fmt: skip
    assert {child.type for token in inline for child in token.children} <= {
        "text", "text_special", "code_inline", "image", "softbreak"
    }  # fmt: skip


def test_card_tells_no_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/mini-sd").mkdir(parents=True)
    for base_model in ("models/mini-sd", "./models/mini-sd/", str(tmp_path / "models/mini-sd")):
        path = card(tmp_path, base_model=base_model, dataset_name=base_model, license="mit")
        assert metadata_load(path).keys() == {"library_name", "license", "tags"}
        text = path.read_text(encoding="utf-8")
        assert "weights for mini-sd, fine-tuned on the mini-sd dataset" in text
        assert "from_pretrained('mini-sd')" in text
        assert "models" not in text
    assert "license" not in metadata_load(card(tmp_path, base_model="models/mini-sd"))


@pytest.mark.lora_file
@pytest.mark.parametrize("loader", ["load_lora_weights", pytest.param("load_attn_procs", marks=needs_load_attn_procs)])
def test_card_shows_code_that_runs(base, tmp_path, monkeypatch, loader):
    monkeypatch.chdir(tmp_path)
    unet = trained(base.unet, UNET_TARGETS, lora_alpha=6)
    export.save_lora(tmp_path, {"unet": adapter(unet)}, TRAINING)
    base.save_pretrained("mini-sd")
    text = card(tmp_path, base_model="mini-sd", prompts=[HOSTILE]).read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)[1]
    line = re.search(r"^pipe\.load_lora_weights.*$", code, re.M)[0]
    attn_procs = re.search(r"`(pipe\.unet\.load_attn_procs.*?)`", text)[1]
    torch.manual_seed(4)
    if loader == "load_attn_procs":
        with pytest.warns(FutureWarning, match="`load_attn_procs` is deprecated"):
            exec(code.replace(line, attn_procs), {})
    else:
        exec(code, {})
    torch.manual_seed(4)
    wanted = pipeline(base, unet=unet)(HOSTILE).images[0]
    difference = np.asarray(Image.open("picture.png"), dtype=int) - np.asarray(wanted, dtype=int)
    assert abs(difference).max() <= 1


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload meets; `server.seen` keeps every request."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.command, self.path, self.headers, body))
        url = f"http://127.0.0.1:{self.server.server_port}/me/axes"
        answers = {
            "/api/repos/create": lambda: {"url": url},
            "/api/validate-yaml": lambda: {"errors": [], "warnings": []},
            "/api/models/me/axes/preupload/main": lambda: {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
            },
            "/api/models/me/axes/commit/main": lambda: {"commitUrl": f"{url}/commit/abc", "commitOid": "abc"},
        }
        found = self.path in answers
        answer = json.dumps(answers[self.path]() if found else {"error": self.path}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self):
        self.headers["Content-Length"] = "0"
        self.do_POST()

    def log_message(self, *_):
        """Quiet."""


def test_upload_sends_weights_card_and_pictures_only(tmp_path):
    wanted = {export.WEIGHTS_NAME, "README.md", "image_0.png", "validation/image [1].png"}
    others = {
        "checkpoint-5/" + export.WEIGHTS_NAME,
        "checkpoint-5/optimizer.bin",
        "checkpoint-5/README.md",
        "run.yaml",
        "logs/events.out.tfevents",
        "wandb/run-1/files/config.yaml",
        "image_1.png",
        "validation/image 1.png",
        "validation/image_0.png",
        ".cache.json",
    }
    for name in wanted | others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"contents of {name}".encode())
    card(tmp_path, prompts=["ab", "cd"], image_paths=["image_0.png", "validation/image [1].png"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # huggingface_hub reads its endpoint when it is imported.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "NO_PROXY": "*",
        "HF_HOME": str(tmp_path / "home"),
    }
    code = "import sys; from text_to_image_lora.export import upload; print(upload(*sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path, "me/axes", "hf_secret"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.shutdown()
    server.server_close()
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1].endswith("/me/axes/commit/abc")
    assert "hf_secret" not in run.stdout + run.stderr
    (commit,) = (body for _, path, _, body in server.seen if path.endswith("/commit/main"))
    files = [row["value"] for row in map(json.loads, commit.splitlines()) if row["key"] != "header"]
    assert {file["path"]: base64.b64decode(file["content"]) for file in files} == {
        name: (tmp_path / name).read_bytes() for name in wanted
    }
    for command, path, headers, body in server.seen:
        assert command == "GET" or headers["Authorization"] == "Bearer hf_secret"
        assert b"hf_secret" not in body + path.encode()


def test_upload_without_weights_asks_nobody(tmp_path):
    card(tmp_path)
    with pytest.raises(FileNotFoundError, match=export.WEIGHTS_NAME):
        export.upload(tmp_path, "me/axes", "hf_secret")

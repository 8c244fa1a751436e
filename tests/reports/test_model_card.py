"""yaml and a Markdown parser read the card, its code runs in stock diffusers, and a hub on a socket gets the upload."""

import re
from pathlib import Path

import diffusers
import loopback_hub
import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt
from packaging.version import Version
from PIL import Image
from small_pipeline import UNET_TARGETS, adapter, pipeline_with, small_pipeline, trained

from text_to_image_lora.models import lora_file
from text_to_image_lora.reports.model_card import upload, write_model_card


HOSTILE = 'a "red": axe # \\ | `x` <b>*bold*</b>\n---\n![](x) $y$ \U0001f5e1'


def card(output_dir, **options):
    """Writes a model card from typical inputs, except for those given."""
    ordinary = {
        "base_model": "owner/model",
        "dataset_names": ["owner/pictures"],
        "pictures": [],
        "hyperparameters": {"rank": 4},
    }
    return write_model_card(output_dir, **(ordinary | options))


def test_card_survives_any_prompt(tmp_path):
    values = {"validation_prompt": HOSTILE, "trigger_word": HOSTILE, "target_modules": ["to_q", "to_out.0"]}
    values |= {"hub_model_id": "me/axes"}
    values |= {"class_data_dir": "/home/me/axes", "train_data_dir": ["/home/me/axes", "/home/me/my spears", "whips"]}
    path = card(
        tmp_path,
        pictures=[(HOSTILE, tmp_path / "image_0.png"), ("a blue axe", tmp_path / "in a folder" / "image (1).png")],
        hyperparameters=values | {"hub_token": "hf_secret"},
        kohya_file="my `axes` [1].safetensors",
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
    # The hub shows the widget's pictures there.
    assert [token.content for token in tokens if token.type == "html_block"] == ["<Gallery />\n"]
    inline = [token for token in tokens if token.type == "inline"]
    assert [child.content for token in inline for child in token.children if child.type == "html_inline"] == []
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"][1:]
    assert titles == ["Trigger words", "Use with diffusers", "Use with A1111, Forge and ComfyUI", "Training"]
    (link,) = (child for token in inline for child in token.children if child.type == "link_open")
    assert link.attrs["href"] == "https://huggingface.co/me/axes/resolve/main/my%20%60axes%60%20%5B1%5D.safetensors"
    one_line = " ".join(HOSTILE.split())
    code = [child.content for token in inline for child in token.children if child.type == "code_inline"]
    assert f"{one_line} <lora:my `axes` [1]:1>" in code
    assert any(
        token.content.startswith("Write ") and _text_of(token) == f"Write {one_line} in the prompt."
        for token in inline
    )
    cells = [
        "".join(child.content for child in tokens[i + 1].children)
        for i, token in enumerate(tokens)
        if token.type == "td_open"
    ]
    assert cells == [
        "validation_prompt", one_line, "trigger_word", one_line, "target_modules", "to_q to_out.0", "hub_model_id", "me/axes", "class_data_dir", "axes", "train_data_dir", "axes my spears whips"
    ]  # fmt: skip
    assert {child.type for token in inline for child in token.children} <= {
        "text", "text_special", "code_inline", "softbreak", "link_open", "link_close", "em_open", "em_close"
    }  # fmt: skip


def _text_of(token):
    """Returns the visible text of a paragraph."""
    return "".join(child.content for child in token.children)


def test_card_without_pictures_trigger_or_kohyas_file_has_none_of_their_parts(tmp_path):
    text = card(tmp_path).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == ["## Use with diffusers", "## Training"]
    assert "Gallery" not in text
    assert "\n\n\n" not in text
    local = card(
        tmp_path, kohya_file="axes.safetensors", hyperparameters={"trigger_word": "sks", "hub_model_id": "axes"}
    ).read_text(encoding="utf-8")
    assert "Download axes.safetensors.\n" in local
    assert "huggingface.co" not in local
    assert "put it in `models/Lora` and write ` sks <lora:axes:1> ` as the prompt" in local


def test_card_tells_no_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/mini-sd").mkdir(parents=True)
    for base_model in ("models/mini-sd", "./models/mini-sd/", str(tmp_path / "models/mini-sd")):
        path = card(tmp_path, base_model=base_model, dataset_names=[base_model])
        assert metadata_load(path).keys() == {"library_name", "tags"}
        text = path.read_text(encoding="utf-8")
        assert "weights for mini-sd, fine-tuned on the mini-sd dataset" in text
        assert "from_pretrained('mini-sd')" in text
        assert "models" not in text


def test_card_of_several_datasets(tmp_path):
    folders = [str(tmp_path / "secret" / name) for name in ("axes", "spears/")]
    text = card(tmp_path, dataset_names=folders, hyperparameters={"train_data_dir": folders}).read_text(
        encoding="utf-8"
    )
    assert "fine-tuned on the axes and spears dataset" in text
    assert "secret" not in text
    assert metadata_load(card(tmp_path, dataset_names=["me/axes", "axes"]))["datasets"] == ["me/axes"]


@pytest.mark.lora_file
@pytest.mark.parametrize("loader", ["load_lora_weights", "load_attn_procs"])
def test_card_shows_code_that_runs(tmp_path, monkeypatch, loader):
    if loader == "load_attn_procs" and Version(diffusers.__version__) >= Version("0.40"):
        pytest.skip("diffusers 0.40 took LoRA out of load_attn_procs")
    monkeypatch.chdir(tmp_path)
    base = small_pipeline()
    unet = trained(base.unet, UNET_TARGETS, lora_alpha=6)
    lora_file.save_lora(tmp_path, {"unet": adapter(unet)}, {})
    base.save_pretrained("mini-sd")
    pictures = [(HOSTILE, tmp_path / "image_0.png")]
    text = card(tmp_path, base_model="mini-sd", pictures=pictures).read_text(encoding="utf-8")
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
    wanted = pipeline_with(base, unet=unet)(HOSTILE).images[0]
    difference = np.asarray(Image.open("picture.png"), dtype=int) - np.asarray(wanted, dtype=int)
    assert abs(difference).max() <= 1


def test_upload_sends_weights_card_and_pictures_only(tmp_path):
    wanted = {lora_file.WEIGHTS_NAME, "README.md", "image_0.png", "validation/image [1].png"}
    others = {
        "checkpoint-5/" + lora_file.WEIGHTS_NAME, "checkpoint-5/optimizer.bin", "checkpoint-5/README.md", "run.yaml",
        "logs/events.out.tfevents", "wandb/run-1/files/config.yaml", "image_1.png", "validation/image 1.png",
        "validation/image_0.png", ".cache.json",
    }  # fmt: skip
    for name in wanted | others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"contents of {name}".encode())
    pictures = [("ab", tmp_path / "image_0.png"), ("cd", tmp_path / "validation" / "image [1].png")]
    card(tmp_path, pictures=pictures)
    wanted.add("axes.safetensors")
    (tmp_path / "axes.safetensors").write_bytes(b"by kohya's names")
    (tmp_path / "other.safetensors").write_bytes(b"another run's")
    with loopback_hub.serving(loopback_hub.Hub) as server, loopback_hub.taken_for_the_hub(server):
        url = upload(tmp_path, "me/axes", "hf_secret", [lora_file.WEIGHTS_NAME, "axes.safetensors"])
    assert url.endswith("/me/axes/commit/abc")
    assert loopback_hub.uploaded(server) == {name: (tmp_path / name).read_bytes() for name in wanted}
    for command, path, headers, body in server.seen:
        assert command == "GET" or headers["Authorization"] == "Bearer hf_secret"
        assert b"hf_secret" not in body + path.encode()


def test_upload_without_weights_asks_nobody(tmp_path):
    card(tmp_path)
    with pytest.raises(FileNotFoundError, match=lora_file.WEIGHTS_NAME):
        upload(tmp_path, "me/axes", "hf_secret")

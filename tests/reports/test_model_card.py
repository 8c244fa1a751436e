"""yaml and a Markdown parser read the card, its code runs in stock diffusers, and a hub on a socket gets the upload."""

import re
import shutil
from pathlib import Path

import diffusers
import loopback_hub
import numpy as np
import pytest
import torch
from conftest import train_script
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt
from packaging.version import Version
from PIL import Image
from small_pipeline import UNET_TARGETS, adapter, pipeline_with, small_pipeline, trained

from text_to_image_lora.models import lora_file
from text_to_image_lora.reports import stopping
from text_to_image_lora.reports.model_card import (
    Sources,
    describe_result,
    settings_that_matter,
    upload,
    write_model_card,
)


HOSTILE = 'a "red": axe # \\ | `x` <b>*bold*</b>\n---\n![](x) $y$ \U0001f5e1'


def card(output_dir, **options):
    """Writes a model card from typical inputs, except for those given."""
    sources = {"base_model": "owner/model", "dataset_names": ["owner/pictures"]}
    sources |= {name: options.pop(name) for name in Sources._fields if name in options}
    return write_model_card(
        output_dir, Sources(**sources), **{"pictures": [], "hyperparameters": {"rank": 4}} | options
    )


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
        "validation_prompt", one_line, "trigger_word", one_line, "target_modules", "to_q to_out.0", "class_data_dir", "axes", "train_data_dir", "axes my spears whips"
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


def test_card_tells_no_path_outside_the_working_directory(tmp_path, monkeypatch):
    """A base below it is named as it is found from the card; any other by its name, with what to do."""
    (tmp_path / "project" / "models" / "mini-sd").mkdir(parents=True)
    (tmp_path / "project" / "runs" / "axe").mkdir(parents=True)
    (tmp_path / "secret" / "mini-sd").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    inside = [Path("models/mini-sd"), Path("./models/mini-sd/"), tmp_path / "project" / "models" / "mini-sd"]
    for base_model, output_dir, found_at in [
        *((base, Path("runs/axe"), "../../models/mini-sd") for base in inside),
        (inside[0], Path("."), "models/mini-sd"),
        (tmp_path / "secret" / "mini-sd", Path("runs/axe"), "mini-sd"),
        (Path("../secret/mini-sd"), Path("runs/axe"), "mini-sd"),
        (inside[0], tmp_path / "elsewhere", "mini-sd"),
    ]:
        path = card(output_dir, base_model=str(base_model), dataset_names=["models/mini-sd"])
        assert metadata_load(path).keys() == {"library_name", "tags"}
        text = path.read_text(encoding="utf-8")
        assert "weights for mini-sd, fine-tuned on the mini-sd dataset" in text
        assert f"from_pretrained({found_at!r})" in text
        assert ("replace mini-sd by the path" in text) == (found_at == "mini-sd")
        assert ("in the folder of this card" in text) == (found_at != "mini-sd")
        assert (path.parent / found_at).exists() == (found_at != "mini-sd")
        assert "secret" not in text
        assert str(tmp_path) not in text
    # Who finds the card on the hub has no such folder.
    text = card(Path("runs/axe"), base_model="models/mini-sd", hyperparameters={"hub_model_id": "me/axe"}).read_text()
    assert "from_pretrained('mini-sd')" in text
    assert "replace mini-sd by the path" in text


def test_card_loads_the_weights_that_were_trained_on(tmp_path):
    assert "from_pretrained('owner/model', revision='v2', variant='fp16')" in card(
        tmp_path, hyperparameters={"variant": "fp16", "revision": "v2"}
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("step", "best_step", "expected"),
    [
        (300, 300, "Trained for 300 steps. On 2 pictures held out from training, its loss is 25.0% below the base model's."),
        (300, 120, "Trained for 300 steps. On 2 pictures held out from training, the loss was lowest at step 120, 25.0% below the base model's."),
        (1, None, "Trained for 1 step. On 2 pictures held out from training, no step was measurably better than the base model."),
    ],
)  # fmt: skip
def test_card_tells_the_result(tmp_path, step, best_step, expected):
    base = [[0.4, 0.02], [0.4, 0.02]]
    best = [[0.2, 0.02], [0.2, 0.02]] if best_step else base
    validation = stopping.Validation(base=base, base_probe=base, best=best, best_step=best_step)
    assert describe_result(step, validation) == expected
    assert expected in card(tmp_path, result=expected).read_text(encoding="utf-8")
    assert describe_result(1500, None) == "Trained for 1,500 steps. No pictures were held out to measure the result."


@pytest.mark.parametrize(
    ("flags", "listed"),
    [
        ({}, {}),
        ({"loss_type": "huber", "random_flip": True, "seed": 3}, {"loss_type": "huber", "random_flip": True, "seed": 3}),
        ({"rank": 4, "trigger_word": "sks"}, {"trigger_word": "sks"}),  # the default rank, which is listed anyway
        ({"hub_model_id": "me/axe", "report_to": "none", "num_cpu_threads": 2, "logging_dir": "x", "hub_token": "hf_x"}, {}),
    ],
)  # fmt: skip
def test_card_lists_what_differs_and_what_everybody_asks_for(flags, listed):
    words = [
        "--pretrained_model_name_or_path",
        "owner/model",
        "--train_data_dir",
        "axes",
        "--resolution",
        "64",
        "--learning_rate",
        "1e-3",
    ]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    always = {"pretrained_model_name_or_path": "owner/model", "train_data_dir": ["axes"], "resolution": 64, "rank": 4}
    always |= {"learning_rate": 1e-3, "train_batch_size": 16}
    assert settings_that_matter(train_script.parse_settings(words)) == always | listed


def test_the_card_of_a_run(train_in, tiny_sd, tmp_path, monkeypatch):
    """Its code runs as it stands, its settings fit on a screen, and it tells the result."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_sd, "base")
    out = train_in(
        tmp_path, pretrained_model_name_or_path="base", output_dir="runs/axe", validation_split=0.4, rank=2,
        validation_steps=1,
    )  # fmt: skip
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "Trained for 2 steps. On 2 pictures held out from training, " in text
    rows = dict(re.findall(r"^\| (\S+) \| (.*) \|$", text.replace("\\", ""), re.M))
    assert rows["rank"] == "2"
    assert rows["max_train_steps"] == "2"
    assert rows["learning_rate"] == "0.01"
    assert len(rows) < 16
    monkeypatch.chdir(out)
    exec(re.search(r"^```python\n(.*?)^```", text, re.M | re.S)[1], {})
    with Image.open("picture.png") as picture:
        assert picture.size == (32, 32)


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

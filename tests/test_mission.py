"""The complete use case in one run, which every change must keep: hub, several processes, mixed precision, W&B, the file."""

import json
import shutil

import datasets
import pytest
import torch
from conftest import TORCHRUN, read_metrics, run_command, write_pictures
from diffusers import UNet2DConditionModel
from loopback_hub import Repositories, environment, serving
from PIL import Image
from safetensors.torch import load_file

from scripts.comparing.wandb_record import history_of, read_wandb
from text_to_image_lora.models import lora
from text_to_image_lora.models.settings import LoraSettings


PROMPTS = ["a red axe", "a blue axe"]


def pokemon(folder, pictures):
    """Writes a dataset like svjack/pokemon-blip-captions-en-zh on the hub: pictures and two caption columns in parquet."""
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    columns = {"image": datasets.Image(), "en_text": datasets.Value("string"), "zh_text": datasets.Value("string")}
    table = {
        "image": [{"bytes": (pictures / row["file_name"]).read_bytes(), "path": None} for row in rows],
        "en_text": [row["text"] for row in rows],
        "zh_text": [f"斧 {k}" for k in range(len(rows))],
    }
    (folder / "data").mkdir(parents=True)
    stored = datasets.Dataset.from_dict(table, features=datasets.Features(columns))
    stored.to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def trained_output(model, checkpoint, inputs):
    """Returns the UNet's predictions with the trained adapter, loaded with peft, and without it."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
    with torch.no_grad():
        plain = unet(*inputs).sample
        lora.add_lora(
            unet,
            LoraSettings(
                rank=4,
                lora_alpha=8.0,
                target_modules=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
            ),
        )
        lora.load_adapter(unet, load_file(checkpoint / "adapter.safetensors"))
        return unet(*inputs).sample, plain


def test_the_mission(tiny_sd, tmp_path):
    """A model and a dataset of the hub, two processes, bf16, W&B with pictures, and a file for `load_attn_procs`."""
    root, out = tmp_path / "root" / "owner", tmp_path / "out"
    root.mkdir(parents=True)
    shutil.copytree(tiny_sd, root / "tiny")
    pokemon(root / "pokemon", write_pictures(tmp_path / "pictures"))
    words = f"""--pretrained_model_name_or_path owner/tiny --dataset_name owner/pokemon --caption_column en_text
        --resolution 32 --random_flip --train_batch_size 2 --max_train_steps 4 --checkpointing_steps 4 --rank 4
        --lora_alpha 8 --learning_rate 1e-2 --mixed_precision bf16 --seed 0 --report_to wandb --output_dir {out}
        --latent_cache_dir {tmp_path / "cache"} --num_validation_images 1 --validation_inference_steps 2
        --validation_steps 2 --validation_prompts""".split()
    with serving(Repositories, root=tmp_path / "root") as server:
        done = run_command(
            [*words, *PROMPTS], launcher=TORCHRUN, env=environment(server, tmp_path, WANDB_MODE="offline")
        )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu (1 thread) in bfloat16" in done.stdout

    # metrics.jsonl and W&B contain equal numbers; W&B has the pictures of both prompts at their steps.
    (run,) = (out / "wandb").glob("offline-run-*")
    history = history_of(read_wandb(run))
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert history[row["step"]]["train_loss"] == row["train_loss"]
        assert history[row["step"]]["lr"] == row["lr"]
    for step in (0, 2, 4):
        shown = history[step]
        for number, prompt in enumerate(PROMPTS):
            panel = f"samples/0{number} {prompt}"
            assert shown[f"{panel}.captions"][-1] == f"step {step}, seed 0: {prompt}"
            with (
                Image.open(run / "files" / shown[f"{panel}.filenames"][-1]) as sent,
                Image.open(out / "validation" / f"step-{step:06d}" / f"prompt-0{number}-0.png") as kept,
            ):
                assert sent.convert("RGB").tobytes() == kept.convert("RGB").tobytes()
    assert not any(name.startswith("samples/") for step in (1, 3) for name in history[step])

    # Stock diffusers predicts with the file what was trained, with alpha twice the rank.
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([10, 900]),
        torch.randn(2, 77, 96, generator=generator),
    )
    trained, plain = trained_output(tiny_sd, out / "checkpoint-4", inputs)
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").eval()
    # diffusers 0.39 is the last version in which it loads a LoRA.
    with pytest.warns(FutureWarning, match="load_attn_procs"):
        unet.load_attn_procs(out)
    with torch.no_grad():
        loaded = unet(*inputs).sample
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-5)
    assert (trained - plain).abs().max() > 1e-2

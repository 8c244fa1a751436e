"""Stable Diffusion XL and 2 are trained by the command like 1.5, on tiny pipelines of stock classes."""

import json
import os
import re
import shutil
import subprocess

import datasets
import numpy as np
import pytest
import torch
from conftest import TORCHRUN, read_lora, read_metrics, run_command, train_script, write_pictures
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from infer_fixtures import difference, draw
from loopback_hub import Repositories, environment, serving
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from text_to_image_lora.models import loading, lora, lora_file
from text_to_image_lora.models.updates import factors, modules_of, relative_difference
from text_to_image_lora.training.run import adapt


WEIGHTS = "pytorch_lora_weights.safetensors"
PIPELINES = {"xl": StableDiffusionXLPipeline, "2": StableDiffusionPipeline}
# Further options for stock diffusers, and the numbers of adapted modules of UNet and text encoders.
OPTIONS = {"xl": {"add_watermarker": False}, "2": {"safety_checker": None}}
COUNTS = {"xl": (170, 2 * 6 + 3 * 6), "2": (30, 3 * 6)}
PROMPT = "a red axe"


@pytest.fixture(scope="module", params=["xl", "2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def base(family, tiny_xl, tiny_sd2):
    return {"xl": tiny_xl, "2": tiny_sd2}[family]


@pytest.fixture(scope="module")
def run(family, base, train_in, tmp_path_factory):
    """A run of UNet and text encoders with sample pictures and kohya's file, which the tests share."""
    return train_in(
        tmp_path_factory.mktemp("run"), pretrained_model_name_or_path=base, learning_rate=0.05, lora_alpha=6, rank=4,
        train_text_encoder=True, text_encoder_rank=2, output_kohya_format=True, resolution=None, seed=3,
        validation_prompt=PROMPT, validation_guidance_scale=3, validation_inference_steps=3,
    )  # fmt: skip


def stock_pipeline(family, base):
    pipe = PIPELINES[family].from_pretrained(base, **OPTIONS[family])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def outputs_of(pipe, captions=(PROMPT, "a blue axe, seen from behind")):
    """Returns the encoded prompts and the predictions of stock diffusers for fixed noise."""
    encoded = pipe.encode_prompt(
        prompt=list(captions), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.manual_seed(5)
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    more = {}
    if pipe.unet.config.addition_embed_type:
        time_ids = torch.tensor([[40.0, 32, 0, 4, 32, 32], [32, 32, 0, 0, 32, 32]])
        more = {"added_cond_kwargs": {"text_embeds": encoded[2], "time_ids": time_ids}}
    return pipe.unet(latents, timesteps, encoded[0], **more).sample


def test_the_files_say_what_was_trained(family, base, run, capsys):
    unet, texts = COUNTS[family]
    weights = read_lora(run)
    counts = {}
    for name in weights:
        component = name.partition(".")[0]
        counts[component] = counts.get(component, 0) + name.endswith("lora_A.weight")
    assert counts.pop("unet") == unet
    assert counts == ({"text_encoder": 12, "text_encoder_2": 18} if family == "xl" else {"text_encoder": 18})
    assert sum(counts.values()) == texts
    assert all(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    assert all(".text_model.encoder." in name for name in weights if not name.startswith("unet."))
    with safe_open(run / WEIGHTS, "pt") as file:
        header = file.metadata()
    adapters = json.loads(header["lora_adapter_metadata"])
    assert {adapters[f"{name}.lora_alpha"] for name in counts} == {2}
    assert header["resolution"] == "32"  # the base model's resolution, because --resolution was not given
    wanted = {"xl": ("sdxl_base_v1-0", "False", "epsilon"), "2": ("sd_v2_v", "True", "v_prediction")}[family]
    assert (header["ss_base_model_version"], header["ss_v2"], header["prediction_type"]) == wanted


def test_stock_diffusers_gives_the_trained_outputs(family, base, run):
    """Compares the models of training, with the adapters of its checkpoint, to stock diffusers with the file."""
    pipe = stock_pipeline(family, base)
    plain = outputs_of(pipe)
    pipe.load_lora_weights(run, weight_name=WEIGHTS)
    loaded = outputs_of(pipe)
    trained = stock_pipeline(family, base)
    found = loading.find_base_model(str(base))
    words = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", "pictures", "--train_text_encoder"]
    settings = train_script.parse_settings([*words, "--rank", "4", "--lora_alpha", "6", "--text_encoder_rank", "2"])
    adapted = {name: getattr(trained, name) for name in ("unet", *(row.name for row in found.family.text_encoders))}
    adapt(settings, adapted, found.family, seed=0)
    stored = load_file(run / "checkpoint-2" / "adapter.safetensors")
    for name, model in adapted.items():
        lora.load_adapter(model, lora.extract_state(stored, name))
    wanted = outputs_of(trained)
    assert (loaded - wanted).norm() <= 1e-5 * wanted.norm()
    assert (loaded - plain).norm() > 1e-2 * wanted.norm()


def test_sample_pictures_are_what_stock_diffusers_draws(family, base, run):
    drawn = {}
    for step in (0, 2):
        pipe = stock_pipeline(family, base)
        if step:
            pipe.load_lora_weights(run, weight_name=WEIGHTS)
        image = pipe(
            PROMPT, guidance_scale=3, num_inference_steps=3, height=32, width=32,
            generator=torch.Generator().manual_seed(3),
        ).images[0]  # fmt: skip
        mine = np.asarray(Image.open(run / "validation" / f"step-{step:06d}" / "prompt-00-0.png"), dtype=int)
        assert abs(np.asarray(image, dtype=int) - mine).max() <= 2
        drawn[step] = mine
    assert abs(drawn[0] - drawn[2]).max() > 3


def test_kohyas_file_is_the_same_lora(family, base, run):
    """Both by converting its names back, and in stock diffusers, which converts the names itself."""
    path = run / "out.safetensors"
    ours, theirs = lora_file.load_lora(run)[0], lora_file.load_lora(path)[0]
    assert ours.keys() == theirs.keys()
    for component, state_dict in ours.items():
        assert set(modules_of(state_dict)) == set(modules_of(theirs[component]))
        for module in modules_of(state_dict):
            assert relative_difference(factors(state_dict, module), factors(theirs[component], module)) < 1e-6
    with safe_open(path, "pt") as file:
        names = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
    if family == "2":
        assert {re.match("lora_(unet_(down|up)|te)_", name)[0] for name in names} == {
            "lora_unet_down_", "lora_unet_up_", "lora_te_"
        }  # fmt: skip
        return
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
    assert "lora_unet_output_blocks_2_1_transformer_blocks_1_ff_net_0_proj" in names
    assert "lora_te2_text_model_encoder_layers_2_mlp_fc1" in names
    first, second = stock_pipeline(family, base), stock_pipeline(family, base)
    first.load_lora_weights(run, weight_name=WEIGHTS)
    second.load_lora_weights(run, weight_name=path.name)
    wanted = outputs_of(first)
    assert (outputs_of(second) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", ["", "out.safetensors"])
def test_infer_draws_what_training_drew(base, run, tmp_path, name):
    """With both files."""
    flags = ["--lora", run / name, "--guidance_scale", 3, "--num_inference_steps", 3, "--seed", 3]
    (picture,) = draw(base, tmp_path, *flags, "--height", 32, "--width", 32, prompt=(PROMPT,)).values()
    assert difference(picture, Image.open(run / "validation" / "step-000002" / "prompt-00-0.png")) <= 2


def test_a_dry_run_tells_what_it_takes(base, train, tmp_path):
    train(pretrained_model_name_or_path=base, dry_run=True, resolution=None)
    memory = json.loads((tmp_path / "out" / "dataset.json").read_text())["memory_bytes"]
    assert memory["step"] > memory["further_sample"] > 0


def test_training_lowers_the_loss(base, train, pictures):
    """On the training pictures, because a random model cannot generalise to other pictures."""
    out = train(
        pretrained_model_name_or_path=base, train_batch_size=5, max_train_steps=12, learning_rate=1e-2, rank=8,
        validation_split=0.17, validation_steps=12, checkpointing_steps=0, center_crop=True,
    )  # fmt: skip
    last = [row["validation/relative_loss_in_training"] for row in read_metrics(out) if "validation/loss" in row][-1]
    assert last < 0.95


OTHER_WAYS = dict(
    max_train_steps=3, learning_rate=1e-3, random_flip=True, caption_dropout=0.3, validation_split=0.34, rank=2,
    checkpointing_steps=2, center_crop=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(base, train_in, tmp_path_factory):
    """A run with batch size four, whose metrics other ways to the same effective batch size must reproduce."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_in(folder, pretrained_model_name_or_path=base, train_batch_size=4, **OTHER_WAYS)


def assert_same_run(first, second):
    for a, b in zip(read_metrics(first), read_metrics(second), strict=True):
        for name in {"train_loss", "grad_norm", "validation/loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    a, b = read_lora(first), read_lora(second)
    assert a.keys() == b.keys()
    difference = torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()
    assert difference < 2e-3 * torch.cat([value.flatten() for value in a.values()]).norm()


def test_batches_equal_accumulation_and_the_validation_loss_stays(whole, base, train, tmp_path):
    folder, wanted = whole
    parts = dict(train_batch_size=1, gradient_accumulation_steps=4, train_data_dir=folder / "pictures")
    out = train(pretrained_model_name_or_path=base, **parts, **OTHER_WAYS)
    assert_same_run(wanted, out)
    first, others = ([r["validation/loss"] for r in read_metrics(o) if "validation/loss" in r] for o in (wanted, out))
    assert first[0] == others[0]


def test_cached_equals_live(whole, base, train):
    folder, wanted = whole
    live = dict(cache_variations=0, train_batch_size=4, train_data_dir=folder / "pictures")
    out = train(pretrained_model_name_or_path=base, **live, **OTHER_WAYS)
    assert_same_run(wanted, out)


def test_killed_and_resumed_equals_straight(whole, base, train, tmp_path):
    folder, straight = whole
    parts = tmp_path / "parts"
    shutil.copytree(straight, parts, ignore=shutil.ignore_patterns("checkpoint-3", "*.safetensors"))
    shutil.copytree(straight / "checkpoint-2", parts / "checkpoint-2", dirs_exist_ok=True)
    out = train(
        pretrained_model_name_or_path=base, output_dir=parts, train_batch_size=4, train_data_dir=folder / "pictures",
        **OTHER_WAYS,
    )  # fmt: skip
    a, b = read_lora(straight), read_lora(out)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_metrics(straight)[-1]["validation/loss"] == read_metrics(out)[-1]["validation/loss"]


@pytest.mark.long
@pytest.mark.parametrize("both", [False, True])
def test_two_processes_equal_one(base, train, arguments, tmp_path, both):
    """Trains the text encoders too: each model has its own wrapper and must use all of its adapters."""
    options = OTHER_WAYS | dict(pretrained_model_name_or_path=base, train_text_encoder=both)
    one = train(train_batch_size=4, output_dir=tmp_path / "one", **options)
    done = run_command(
        arguments(train_batch_size=2, output_dir=tmp_path / "two", **options), TORCHRUN,
        env={"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_run(one, tmp_path / "two")


@pytest.mark.skipif("NEWEST_PYTHON" not in os.environ, reason="`make test-newest` says where the newest stack is")
def test_the_newest_stack_gives_the_trained_outputs(family, base, run, tmp_path):
    """On the newest stack, the file loads with `load_lora_weights` and gives equal outputs."""
    code = (
        "import sys, torch, diffusers\n"
        "name, base, run, out = sys.argv[1:]\n"
        "pipe = getattr(diffusers, name).from_pretrained(base)\n"
        f"pipe.load_lora_weights(run, weight_name={WEIGHTS!r})\n"
        "torch.manual_seed(5)\n"
        "with torch.no_grad():\n"
        f"    encoded = pipe.encode_prompt(prompt=[{PROMPT!r}, 'a blue axe, seen from behind'], device='cpu',"
        " num_images_per_prompt=1, do_classifier_free_guidance=False)\n"
        "    latents, timesteps, more = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), {}\n"
        "    if pipe.unet.config.addition_embed_type:\n"
        "        ids = torch.tensor([[40.0, 32, 0, 4, 32, 32], [32, 32, 0, 0, 32, 32]])\n"
        "        more = {'added_cond_kwargs': {'text_embeds': encoded[2], 'time_ids': ids}}\n"
        "    torch.save(pipe.unet(latents, timesteps, encoded[0], **more).sample, out)\n"
    )
    words = [PIPELINES[family].__name__, base, run, tmp_path / "there.pt"]
    subprocess.run([os.environ["NEWEST_PYTHON"], "-c", code, *map(str, words)], check=True, timeout=300)
    pipe = stock_pipeline(family, base)
    pipe.load_lora_weights(run, weight_name=WEIGHTS)
    here, there = outputs_of(pipe), torch.load(tmp_path / "there.pt")
    assert (there - here).norm() <= 1e-5 * here.norm()


@pytest.mark.long
@pytest.mark.parametrize("both", [False, True])
def test_diffusers_own_test_of_its_xl_script(tiny_xl, tmp_path, both):
    """Runs `test_text_to_image_lora.py` of diffusers' examples with unchanged flags; model and pictures come from a hub."""
    root, out = tmp_path / "root" / "owner", tmp_path / "out"
    shutil.copytree(tiny_xl, root / "tiny_xl")
    (root / "dummy" / "data").mkdir(parents=True)
    plain = write_pictures(tmp_path / "plain", count=4, size=(80, 64))
    images = [{"bytes": (plain / f"{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": images, "text": ["a red axe"] * 4}, features=features)
    rows.to_parquet(root / "dummy" / "data" / "train-00000-of-00001.parquet")
    words = ["--pretrained_model_name_or_path", "owner/tiny_xl", "--dataset_name", "owner/dummy", "--resolution", "64"]
    words += ["--train_batch_size", "1", "--gradient_accumulation_steps", "1", "--max_train_steps", "6"]
    words += ["--learning_rate", "5.0e-04", "--scale_lr", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"]
    words += ["--output_dir", str(out), "--checkpointing_steps=2", "--checkpoints_total_limit=2"]
    words += ["--train_text_encoder"] * both + ["--latent_cache_dir", str(tmp_path / "cache"), "--report_to", "none"]
    with serving(Repositories, root=tmp_path / "root") as server:
        done = run_command(words, env=environment(server, tmp_path))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir() if "checkpoint" in path.name} == {"checkpoint-4", "checkpoint-6"}
    names = read_lora(out).keys()
    assert all("lora" in name for name in names)
    assert {name.partition(".")[0] for name in names} == {
        "unet",
        *(["text_encoder", "text_encoder_2"] if both else []),
    }
    pipe = stock_pipeline("xl", tiny_xl)
    pipe.load_lora_weights(out, weight_name=WEIGHTS)
    pipe("a prompt", num_inference_steps=1)

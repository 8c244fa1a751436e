"""`infer.py` on a tiny pipeline, with the real command wherever the command matters."""

import copy
import itertools
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from infer_fixtures import PROMPT, command, difference, draw, flat
from original_weights import Attack, lightning_checkpoint, to_ldm, vae_to_ldm
from PIL import Image
from safetensors.torch import save_file

import infer
from text_to_image_lora.drawing import pipeline
from text_to_image_lora.models.samplers import SAMPLERS


pytestmark = pytest.mark.usefixtures("library_settings")


def test_command_draws_names_and_labels(model, lora, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\n  a yellow spear  \n")
    code, out, err, _ = command(
        *("--pretrained_model_name_or_path", model, "--lora", lora, "--lora_scale", 0.8, "--compare_base"),
        *("--prompt", tmp_path / "prompts.txt", "--negative_prompt", "blur, ключ", "--num_images", 2, "--seed", 3),
        *("--num_inference_steps", 2, "--scheduler", "dpm++_karras", "--output_dir", tmp_path / "out"),
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"loading {model}"
    pictures, sheet = out.splitlines()[-2:]
    assert pictures.startswith(f"{tmp_path / 'out'}: 8 pictures")
    assert sheet.startswith(str(tmp_path / "out" / "comparison.png"))

    pictures = {path.name: Image.open(path) for path in sorted((tmp_path / "out").iterdir())}
    slugs = ["00-a-red-axe-on-a-blue-background", "01-a-yellow-spear"]
    drawn = [f"{slug}-seed{seed}{end}.png" for slug in slugs for seed in (3, 4) for end in ("-base", "")]
    assert sorted(pictures) == sorted([*drawn, "comparison.png"])
    assert all(pictures[name].size == (64, 64) for name in drawn)
    for name in drawn[1::2]:
        assert difference(pictures[name], pictures[name.replace(".png", "-base.png")]) > 3

    text = pictures[drawn[3]].text
    assert text["parameters"] == (
        f"{PROMPT}\nNegative prompt: blur, ключ\nSteps: 2, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 4, "
        "Size: 64x64, Model: tiny, Lora: axe:0.8"
    )
    expected = dict(prompt=PROMPT, negative_prompt="blur, ключ", seed="4", num_inference_steps="2")
    expected |= dict(guidance_scale="7.5", scheduler="DPMSolverMultistepScheduler", width="64", height="64")
    expected |= dict(pretrained_model_name_or_path=model, lora=lora, lora_scale="0.8")
    assert text.items() >= expected.items()
    assert "diffusers_version" in text
    base = pictures[drawn[2]].text
    assert base["seed"] == "4"
    assert "lora" not in base
    assert "Lora" not in base["parameters"]
    assert pictures["comparison.png"].text["prompt"] == f"{PROMPT} | a yellow spear"


def test_picture_i_is_seed_plus_i(model, tmp_path):
    """Also in the second batch of a prompt."""
    flags = ["--guidance_scale", 1, "--seed"]
    five = draw(model, tmp_path / "five", *flags, 5, "--num_images", 5, prompt=("a dog", PROMPT))
    stems = ("00-a-dog", f"01-{PROMPT.replace(' ', '-')}")
    assert list(five) == [f"{stem}-seed{seed}.png" for stem in stems for seed in range(5, 10)]
    dogs = [five[f"00-a-dog-seed{seed}.png"] for seed in range(5, 10)]
    assert min(difference(a, b) for a, b in itertools.combinations(dogs, 2)) > 3
    for seed in (6, 9):
        (alone,) = draw(model, tmp_path / str(seed), *flags, seed, prompt=("a dog",)).values()
        assert difference(dogs[seed - 5], alone) <= 1  # a batch of four is rounded differently from a batch of one


def test_same_command_same_bytes_and_nothing_overwritten(model, tmp_path):
    name = f"00-{PROMPT.replace(' ', '-')}-seed0.png"
    draw(model, tmp_path)
    first = (tmp_path / name).read_bytes()
    assert list(draw(model, tmp_path)) == [name]
    assert (tmp_path / name).read_bytes() == first
    assert sorted(draw(model, tmp_path, "--guidance_scale", 3)) == [name.replace(".png", "-1.png"), name]
    assert (tmp_path / name).read_bytes() == first


def test_several_loras_add_up(model, lora, compared, lora_weights, write_lora, tmp_path):
    """They equal one LoRA with both ranks and with the strengths in its weights; the second has no part for the text encoder."""
    import torch

    hat = {f"unet.{key}": value.flip(-1).contiguous() for key, value in lora_weights["unet"].items()}
    both = {k: v * (0.8 if "lora_B" in k else 1) for k, v in flat(lora_weights).items()}
    for key, value in hat.items():
        both[key] = torch.cat([both[key], value * 0.5 if "lora_B" in key else value], dim=int("lora_B" in key))
    hat = write_lora("hat, red", hat)
    (added,) = draw(model, tmp_path / "added", "--lora", hat, f"{lora}:0.8", "--lora_scale", 0.5).values()
    (one,) = draw(model, tmp_path / "one", "--lora", write_lora("both", both)).values()
    assert difference(added, one) <= 1
    assert min(difference(added, picture) for picture in compared) > 3
    (zero,) = draw(model, tmp_path / "zero", "--lora", f"{lora}:0", f"{hat}:0").values()
    assert difference(zero, compared[0]) == 0

    (path,) = (tmp_path / "added").iterdir()
    text = Image.open(path).text
    assert text["parameters"].endswith('Lora: "hat  red:0.5, axe:0.8"')
    assert (text["lora"], text["lora_scale"]) == (f"{hat}\n{lora}", "0.5\n0.8")


def test_another_vae(tiny_pipeline, model, lora, compared, write_lora, tmp_path, monkeypatch, capsys):
    import torch
    from safetensors.torch import save_file

    vae = copy.deepcopy(tiny_pipeline.vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.3
    vae.save_pretrained(tmp_path / "vae")
    save_file(vae_to_ldm(tmp_path), tmp_path / "bright.safetensors")
    monkeypatch.chdir(tmp_path)
    trained = write_lora("trained", pretrained_vae_model_name_or_path="vae")
    (by_header,) = draw(model, tmp_path / "1", "--lora", trained).values()
    assert (
        capsys.readouterr().err
        == "note: the LoRA was trained with the VAE vae; these pictures are drawn accordingly\n"
    )
    (by_flag,) = draw(model, tmp_path / "2", "--lora", lora, "--vae", "bright.safetensors").values()
    assert difference(by_header, by_flag) == 0
    assert difference(by_header, compared[1]) > 30
    (path,) = (tmp_path / "2").iterdir()
    assert Image.open(path).text["vae"] == "bright.safetensors"
    assert ", VAE: bright, Lora: axe:1" in Image.open(path).text["parameters"]


def test_schedulers_draw(tiny_pipeline):
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(**tiny_pipeline.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for name, changes, *_ in SAMPLERS.values():
        pipe.scheduler = getattr(diffusers, name).from_config(tiny_pipeline.scheduler.config, **changes)
        latents = pipe(PROMPT, guidance_scale=1, num_inference_steps=3, output_type="latent").images
        assert latents.isfinite().all(), name


@pytest.mark.parametrize(("wanted", "threads"), [([], 3), (["--num_cpu_threads", "2"], 2)])
def test_how_many_threads(cores, monkeypatch, wanted, threads):
    """The rule is that of the training command."""
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    # The number of threads is set before.
    monkeypatch.setattr(pipeline, "load_pipeline", mock.Mock(side_effect=KeyboardInterrupt))
    model = ["--pretrained_model_name_or_path", str(ROOT / "models" / "mini-sd")]
    with pytest.raises(KeyboardInterrupt):
        infer.main([*model, "--prompt", "a dog", "--device", "cpu", *wanted])
    assert torch.get_num_threads() == threads


def test_a_truncated_prompt_is_reported_and_bf16_draws(model, tmp_path, capsys):
    pictures = draw(model, tmp_path, "--mixed_precision", "bf16", "--height", 32, prompt=("axe " * 80,))
    assert [picture.size for picture in pictures.values()] == [(64, 32)]
    assert "CLIP reads 77 of the 82 tokens" in capsys.readouterr().err


def test_single_files(model, compared, lora_weights, tmp_path, capsys):
    weights = to_ldm(Path(model))
    save_file(weights, tmp_path / "model.safetensors")
    lightning_checkpoint(tmp_path / "model.ckpt", weights, np.float64(0.1))
    torch.save({"state_dict": weights, "callbacks": Attack(str(tmp_path / "hacked"))}, tmp_path / "evil.ckpt")
    for file in ("model.safetensors", "model.ckpt"):
        (picture,) = draw(tmp_path / file, tmp_path / file[-4:], "--single_file_config", model).values()
        assert difference(compared[0], picture) == 0, file
    with pytest.raises(SystemExit):
        draw(tmp_path / "evil.ckpt", tmp_path / "1", "--single_file_config", model)
    assert "carries more than weights (posix.mkdir)" in capsys.readouterr().err
    assert not (tmp_path / "hacked").exists()

    # Layers that do not exist in the loaded model: diffusers by itself would only log a warning.
    bad = flat(lora_weights)
    for leaf in ("lora_A.weight", "lora_B.weight"):
        bad[f"unet.nowhere.to_q.{leaf}"] = bad.pop(next(key for key in bad if key.endswith(f"to_q.{leaf}")))
    save_file(bad, tmp_path / "bad.safetensors")
    argv = ["--single_file_config", model, "--lora", tmp_path / "bad.safetensors"]
    with pytest.raises(SystemExit):
        draw(tmp_path / "model.safetensors", tmp_path / "1", *argv)
    assert f"2 of its {len(bad)} keys match no layer" in capsys.readouterr().err
    assert not (tmp_path / "1").exists()


BAD_INPUT = {
    "--num_images 0": "must be a whole number from 1 to 100000",
    "--num_cpu_threads 0": "must be a whole number from 1 to 1024",
    "--num_inference_steps -1": "must be a whole number from 1 to 1000",
    "--height 100": "must be a whole number, a multiple of 8",
    "--width 0": "must be a whole number, a multiple of 8",
    "--clip_skip -1": "must be a whole number, 0 or more",
    "--clip_skip 2": "the text encoder has 2 layers. Pass --clip_skip 1 at most",
    "--guidance_scale nan": "it must be a number from -1000 to 1000",
    "--lora_scale inf": "it must be a number from -1000 to 1000",
    "--lora_scale 0.5": "--lora_scale needs --lora",
    "--scheduler eulr": "invalid choice: 'eulr'",
    "--num_inference_step 3": "Did you mean --num_inference_steps?",
    "--promt dog": "Did you mean --prompt?",
    "--compare_base": "--compare_base needs --lora",
    "--prompt {bad}/none.txt": "No such file",
    "--prompt {bad}/empty.txt": "is empty",
    "--prompt {bad}/latin.txt": "not UTF-8",
    "--output_dir {bad}/empty.txt/out": "empty.txt is a file. Name another folder.",
    "--pretrained_model_name_or_path ./missing": "does not exist",
    "--pretrained_model_name_or_path models/none/x": "does not exist",
    "--pretrained_model_name_or_path none.safetensors": "does not exist",
    "--pretrained_model_name_or_path owner/name": "not a local file or folder, and can't be downloaded from the hub",
    "--pretrained_model_name_or_path {bad}": "no readable model_index.json",
    "--pretrained_model_name_or_path {bad}/flux": "is a FluxPipeline",
    "--pretrained_model_name_or_path {bad}/lora.bin": "must be .safetensors or .ckpt",
    "--pretrained_model_name_or_path {bad}/cut.safetensors": "not a complete safetensors file",
    "--lora ./missing": "does not exist",
    "--lora {bad}": "Pass the LoRA file itself",
    "--lora {bad}/lora.bin": "only .safetensors",
    "--lora {bad}/cut.safetensors": "not a complete safetensors file",
    "--lora {bad}/model.safetensors": "is not a LoRA file",
    "--lora {bad}/layer.safetensors": "1 of its",
    "--lora {bad}/size.safetensors": "2 of its",
    "--lora {bad}/half.safetensors": "1 of its",
    "--lora {bad}/skip.safetensors:nan": "must be a number from -1000 to 1000",
    "--lora {bad}/skip.safetensors:0,5": "does not exist",
    "--lora {bad}/skip.safetensors {bad}/none": "does not exist",
    "--lora {bad}/skip5.safetensors": "clip skip 5: the text encoder has 2 layers",
    "--lora {bad}/v.safetensors {bad}/skip.safetensors": "v.safetensors was trained with prediction_type v_prediction, ",
    "--lora {bad}/skip5.safetensors {bad}/skip.safetensors": "skip.safetensors with 1. Pass --clip_skip to choose.",
    "--vae ./missing": "does not exist",
    "--vae {bad}": "contains no config.json of an AutoencoderKL",
    "--vae {bad}/wide": "encodes latents with 16 channels, but the UNet expects 4",
    "--vae {bad}/lora.bin": "must be .safetensors, .ckpt or .pt",
    "--vae {bad}/cut.safetensors": "not a complete safetensors file",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input(flags, bad_files, refusal):
    assert BAD_INPUT[flags] in refusal(*flags.format(bad=bad_files).split())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--lora {bad}/layer.safetensors --vae {bad}/wide", "1 of its"),
        ("--lora {bad}/lora.bin", "only .safetensors files are read, because other formats can contain code"),
        ("--image {bad}/latin.txt", "it is not a picture"),
        ("--grid checkpont=run/epoch-*", "Did you mean checkpoint?"),
    ],
)
def test_bad_input_of_the_command(flags, reason, model, bad_files, tmp_path):
    given = ["--pretrained_model_name_or_path", model, "--prompt", "a dog", "--output_dir", tmp_path / "out"]
    code, out, err, seconds = command(*given, *flags.format(bad=bad_files).split())
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert reason in err
    assert seconds < 3  # no torch


def test_help_is_quick_and_needs_no_torch():
    runs = [command("--help") for _ in range(3)]
    assert min(seconds for *_, seconds in runs) < 0.5
    assert runs[0][0] == 0
    assert "(default: 7.5)" in runs[0][1]
    imports = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "infer.py", "--help"], capture_output=True, text=True
    ).stderr
    assert not re.search(r"\| +(torch|diffusers|transformers|PIL|numpy)$", imports, re.MULTILINE)

"""`infer.py` on a tiny real pipeline, through the command as typed wherever the command is what matters."""

import copy
import inspect
import itertools
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
from conftest import ROOT, THREADS, write_pictures
from infer_fixtures import PROMPT, command, difference, draw, flat
from PIL import Image

import infer
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


def test_equals_stock_diffusers(model, lora, compared, tmp_path):
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    own = draw(model, tmp_path / "own", "--scheduler", "pndm")
    first = pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert difference(*own.values(), first) == 0
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    stock = []
    for with_lora in (False, True):
        if with_lora:
            pipe.load_lora_weights(lora, weight_name=infer.WEIGHT_NAME)
        stock += pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert difference(compared[0], stock[0]) == 0
    assert difference(compared[1], stock[1]) == 0
    assert difference(*compared) > 3


def test_picture_i_is_seed_plus_i(model, tmp_path):
    """In the second batch of a prompt too."""
    flags = ["--guidance_scale", 1, "--seed"]
    five = draw(model, tmp_path / "five", *flags, 5, "--num_images", 5, prompt=("a dog", PROMPT))
    stems = ("00-a-dog", f"01-{PROMPT.replace(' ', '-')}")
    assert list(five) == [f"{stem}-seed{seed}.png" for stem in stems for seed in range(5, 10)]
    dogs = [five[f"00-a-dog-seed{seed}.png"] for seed in range(5, 10)]
    assert min(difference(a, b) for a, b in itertools.combinations(dogs, 2)) > 3
    for seed in (6, 9):
        (alone,) = draw(model, tmp_path / str(seed), *flags, seed, prompt=("a dog",)).values()
        assert difference(dogs[seed - 5], alone) <= 1  # a batch of four rounds otherwise than a batch of one


def test_same_command_same_bytes_and_nothing_overwritten(model, tmp_path):
    name = f"00-{PROMPT.replace(' ', '-')}-seed0.png"
    draw(model, tmp_path)
    first = (tmp_path / name).read_bytes()
    assert list(draw(model, tmp_path)) == [name]
    assert (tmp_path / name).read_bytes() == first
    assert sorted(draw(model, tmp_path, "--guidance_scale", 3)) == [name.replace(".png", "-1.png"), name]
    assert (tmp_path / name).read_bytes() == first


def test_several_loras_add_up(model, lora, compared, lora_weights, write_lora, tmp_path):
    """Like one LoRA with the ranks of both and the strengths in its weights; the second has no text encoder's part."""
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


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no colon in a name")
def test_strength_after_the_last_colon(write_lora, tmp_path):
    odd = tmp_path / "odd:0.5"
    odd.mkdir()
    write_lora("hat").rename(odd / infer.WEIGHT_NAME)
    for given, path, scale in ((odd, odd, 0.7), (f"{odd}:-0.25", odd, -0.25), (f"{odd}:1e-1", odd, 0.1)):
        found = infer.find_lora(str(given), 0.7, "lora0")
        assert (found.given, found.path, found.scale) == (str(path), odd / infer.WEIGHT_NAME, scale)


AS_TRAINED = dict(prediction_type="v_prediction", rescale_betas_zero_snr="True", clip_skip="1", long_prompts="True")


def test_drawn_as_it_was_trained(tiny_pipeline, model, write_lora, tmp_path, capsys):
    """What stock diffusers draws when told all that the header says."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    if not hasattr(tiny_pipeline.text_encoder, "text_model"):
        pytest.skip("no pipeline of diffusers can skip CLIP layers with transformers 5.6 and later")
    lora = write_lora("axe", **AS_TRAINED, pretrained_vae_model_name_or_path="mse")
    (own,) = draw(model, tmp_path / "own", "--lora", lora, prompt=("a red axe " * 26,)).values()  # 75 + 3 tokens
    assert capsys.readouterr().err.splitlines() == [
        "note: the LoRA was trained with the VAE mse; the pictures are not drawn so: its header has the last part of the "
        "path alone. Pass --vae with the whole.",
        "note: the LoRA was trained with v-prediction, zero terminal SNR, long prompts and clip skip 1; "
        "the pictures are drawn so",
    ]
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    changes = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **changes)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    chunks = {"prompt_embeds": [("a red axe " * 25, 1), ("a red axe", 1)], "negative_prompt_embeds": [("", None)] * 2}
    with torch.no_grad():
        embeds = {
            name: torch.cat([pipe.encode_prompt(text, "cpu", 1, False, clip_skip=n)[0] for text, n in parts], dim=1)
            for name, parts in chunks.items()
        }
    stock = pipe(**embeds, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert difference(own, stock) <= 1


def test_why_it_is_not_drawn_as_trained(model, write_lora, tmp_path, monkeypatch, capsys):
    lora = write_lora("axe", **AS_TRAINED, pretrained_vae_model_name_or_path="owner/name")
    monkeypatch.setattr(infer, "load_pipeline", mock.Mock(side_effect=KeyboardInterrupt))  # all is said by then
    with pytest.raises(KeyboardInterrupt):
        draw(model, tmp_path / "out", "--lora", lora, "--scheduler", "heun", "--clip_skip", 0)
    lines = capsys.readouterr().err.splitlines()
    reasons = {
        "zero terminal SNR": "--scheduler heun can't. Leave it out, or take ddim.",
        "clip skip 1": "--clip_skip 0 overrules it.",
        "the VAE owner/name": "--vae owner/name is no file or folder here, and the hub does not give it: ",
    }
    for line, (words, reason) in zip(lines, reasons.items()):
        assert line.startswith(f"note: the LoRA was trained with {words}; the pictures are not drawn so: {reason}")
    assert lines[3:] == ["note: the LoRA was trained with v-prediction and long prompts; the pictures are drawn so"]


def test_another_vae(tiny_pipeline, model, lora, compared, write_lora, tmp_path, monkeypatch, capsys):
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    vae = copy.deepcopy(tiny_pipeline.vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.3
    vae.save_pretrained(tmp_path / "bright")
    pipe = StableDiffusionPipeline(**{**tiny_pipeline.components, "vae": vae}, requires_safety_checker=False)
    weights = single_file_weights(pipe)
    save_file({k: v for k, v in weights.items() if k.startswith("first_stage")}, tmp_path / "bright.safetensors")
    monkeypatch.chdir(tmp_path)
    trained = write_lora("trained", pretrained_vae_model_name_or_path="bright")
    (by_header,) = draw(model, tmp_path / "1", "--lora", trained).values()
    assert capsys.readouterr().err == "note: the LoRA was trained with the VAE bright; the pictures are drawn so\n"
    (by_flag,) = draw(model, tmp_path / "2", "--lora", lora, "--vae", "bright.safetensors").values()
    assert difference(by_header, by_flag) == 0
    assert difference(by_header, compared[1]) > 30
    (path,) = (tmp_path / "2").iterdir()
    assert Image.open(path).text["vae"] == "bright.safetensors"
    assert ", VAE: bright, Lora: axe:1" in Image.open(path).text["parameters"]


@pytest.mark.parametrize("chunks", ["1", "3"])
def test_prompts_are_padded_as_in_training(tiny_pipeline, model, write_lora, tmp_path, capsys, chunks):
    """The UNet attends to the padding too: to as many chunks as the training had, or more where a prompt needs them."""
    lora, seen = write_lora("axe", long_prompts="True", num_chunks=chunks), []
    encode = infer.PromptEncoder.__call__

    def look(*args):
        seen.append(encode(*args))
        return seen[-1]

    with mock.patch.object(infer.PromptEncoder, "__call__", look):
        draw(model, tmp_path, "--lora", lora, prompt=("a red axe", "a red axe " * 80))
    said = capsys.readouterr().err
    assert ("3 chunks a prompt" in said) == (chunks == "3")
    short, long = ([v.shape[1] // 77 for k, v in options.items() if k.endswith("embeds")] for options in seen)
    assert (short, long) == ([int(chunks)] * 2, [4, 4])


def test_the_most_chunks_of_several_loras(write_lora):
    loras = [
        infer.find_lora(str(write_lora(f"axe{chunks}", long_prompts="True", num_chunks=chunks)), 1.0, f"lora{chunks}")
        for chunks in ("2", "4", "1")
    ]
    base = infer.Model("tiny", None, None, None, "sd", {}, "epsilon")
    settings, notes = infer.settle(loras, base, None, {})
    assert (settings["long_prompts"], settings["num_chunks"]) == (True, 4)


def test_header_of_a_real_run(train, tiny_sd, tmp_path, capsys):
    """The training script's validation picture is drawn again, by what its LoRA file says."""
    prompt = "a red axe"  # a chunk; the longest caption has two, and so the prompt has in training
    out = train(
        train_data_dir=write_pictures(tmp_path / "pictures", captions=["a red axe " * 26]),
        prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_skip=1, long_prompts=True, learning_rate=0.1,
        validation_prompt=prompt, validation_inference_steps=3,
    )  # fmt: skip
    capsys.readouterr()
    flags = ["--lora", out, "--num_inference_steps", 3]
    (picture,) = draw(tiny_sd, tmp_path / "drawn", *flags, prompt=(prompt,)).values()
    assert (
        "zero terminal SNR, long prompts, 2 chunks a prompt and clip skip 1; the pictures" in capsys.readouterr().err
    )
    assert difference(picture, Image.open(out / "validation" / "step-000002" / "prompt-00-0.png")) <= 2


@pytest.fixture(scope="module")
def kohya(lora_weights, tmp_path_factory):
    """The LoRA under kohya's names, its strength in alpha; the header has no say in how it is drawn."""
    import torch
    from safetensors.torch import save_file

    weights = {}
    for key, value in flat(lora_weights).items():
        path, leaf = re.fullmatch(r"(.+)\.(lora_[AB]\.weight)", key).groups()
        path = path.replace("text_encoder.", "te.", 1).replace(".", "_")
        leaf, strength = {"lora_A.weight": ("lora_down.weight", 1), "lora_B.weight": ("lora_up.weight", 2)}[leaf]
        weights[f"lora_{path}.{leaf}"] = value * strength
        weights[f"lora_{path}.alpha"] = torch.tensor(2.0)  # of rank 4
    path = tmp_path_factory.mktemp("kohya") / "kohya.safetensors"
    save_file(weights, path, {"ss_clip_skip": "2", "ss_v2": "False"})
    return path


@pytest.fixture(scope="module")
def peft_folder(tiny_pipeline, tmp_path_factory):
    """A LoRA of the UNet in peft's own dialect, alpha not the rank; and its update per module {name: B·A·scale}."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(tiny_pipeline.unet), config)
    folder = tmp_path_factory.mktemp("peft") / "hat"
    wrapped.save_pretrained(folder)
    return folder, wrapped.merge_and_unload()


def test_other_dialects(tiny_pipeline, model, compared, kohya, peft_folder, tmp_path, capsys):
    """Names with underscores and an alpha, and a folder of peft's, which stock diffusers would misread or leave out."""
    from diffusers import StableDiffusionPipeline

    (theirs,) = draw(model, tmp_path / "kohya", "--lora", kohya).values()
    assert difference(compared[1], theirs) <= 1
    folder, unet = peft_folder
    (theirs,) = draw(model, tmp_path / "peft", "--lora", folder, "--scheduler", "ddim").values()
    parts = {**tiny_pipeline.components, "unet": unet}
    parts["scheduler"] = infer.make_scheduler(parts["scheduler"], "ddim", {"prediction_type": None, "zero_snr": None})
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "merged")
    (merged,) = draw(tmp_path / "merged", tmp_path / "1", "--scheduler", "ddim").values()
    assert difference(merged, theirs) <= 1
    assert difference(merged, compared[0]) > 3
    assert capsys.readouterr().err == ""


def test_schedulers_draw(tiny_pipeline):
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(**tiny_pipeline.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for name, changes, _ in SAMPLERS.values():
        pipe.scheduler = getattr(diffusers, name).from_config(tiny_pipeline.scheduler.config, **changes)
        latents = pipe(PROMPT, guidance_scale=1, num_inference_steps=3, output_type="latent").images
        assert latents.isfinite().all(), name


def test_schedulers_with_zero_terminal_snr(tiny_pipeline):
    import diffusers
    import torch

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for flag, (name, *_) in SAMPLERS.items():
        can = "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, name)).parameters
        assert can == (flag not in infer.NO_ZERO_SNR), name
        if can:
            training = {"prediction_type": "v_prediction", "zero_snr": True}
            scheduler = infer.make_scheduler(tiny_pipeline.scheduler, flag, training)
            scheduler.set_timesteps(3)
            assert scheduler.timesteps[0] == 999, name
            sample = latents * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                prediction = scheduler.scale_model_input(sample, timestep)
                sample = scheduler.step(prediction, timestep, sample).prev_sample
            assert sample.isfinite().all(), name


def test_no_sampler_clips_latents(tiny_pipeline):
    """DDIM and DDPM clip at 1 unless the settings they are made from say no; a latent reaches 4."""
    import diffusers

    settings = {k: v for k, v in tiny_pipeline.scheduler.config.items() if k != "clip_sample"}
    for name, changes, _ in SAMPLERS.values():
        assert not getattr(diffusers, name).from_config(settings, **changes).config.get("clip_sample")


@pytest.mark.parametrize(("wanted", "environment", "threads"), THREADS)
def test_how_many_threads(cores, monkeypatch, wanted, environment, threads):
    """The rule of the training; this script imports nothing of it."""
    import torch

    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(infer, "load_pipeline", mock.Mock(side_effect=KeyboardInterrupt))  # settled by then
    argv = [
        "--pretrained_model_name_or_path",
        str(ROOT / "models" / "mini-sd"),
        "--prompt",
        "a dog",
        "--device",
        "cpu",
    ]
    with pytest.raises(KeyboardInterrupt):
        infer.main([*argv, *(["--num_cpu_threads", str(wanted)] if wanted else [])])
    assert torch.get_num_threads() == threads


def test_clip_skip(tiny_pipeline, model, write_lora, compared, tmp_path, capsys):
    if not hasattr(tiny_pipeline.text_encoder, "text_model"):
        pytest.skip("no pipeline of diffusers can skip CLIP layers with transformers 5.6 and later")
    lora = write_lora("axe", prediction_type="epsilon", rescale_betas_zero_snr="False", clip_skip="1")
    (skipped,) = draw(model, tmp_path, "--lora", lora, "--clip_skip", 1).values()
    assert capsys.readouterr().err == ""  # a base of epsilon, and a flag that agrees with the header, are no news
    assert difference(compared[1], skipped) > 0
    (path,) = tmp_path.iterdir()
    assert Image.open(path).text["clip_skip"] == "1"
    assert Image.open(path).text["parameters"].endswith("Clip skip: 2")


def test_cut_prompt_is_told_and_bf16_draws(model, tmp_path, capsys):
    pictures = draw(model, tmp_path, "--mixed_precision", "bf16", "--height", 32, prompt=("axe " * 80,))
    assert [picture.size for picture in pictures.values()] == [(64, 32)]
    assert "CLIP reads 77 of the 82 tokens" in capsys.readouterr().err


def single_file_weights(pipe):
    """The weights under the names of the original Stable Diffusion code."""
    leaves = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    leaves |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    names = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    names |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    names |= {"mid_block.attentions.0": "middle_block.1"}
    # (32, 64) channels, one layer a block, attention in the outer blocks
    names |= {"down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1"}
    names |= {"down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op"}
    names |= {"down_blocks.1.resnets.0": "input_blocks.3.0", "up_blocks.0.upsamplers.0": "output_blocks.1.1"}
    for i in range(4):
        names[f"up_blocks.{i // 2}.resnets.{i % 2}"] = f"output_blocks.{i}.0"
        names[f"up_blocks.1.attentions.{i % 2}"] = f"output_blocks.{2 + i % 2}.1"
    weights = {}
    for key, value in pipe.unet.state_dict().items():
        old = next(name for name in names if key.startswith(f"{name}."))
        rest = key.removeprefix(old)
        if "resnets" in old:
            rest = "." + leaves[rest.split(".")[1]] + rest[rest.rindex(".") :]
        weights[f"model.diffusion_model.{names[old]}{rest}"] = value
    for key, value in pipe.vae.state_dict().items():
        for old, new in {
            r"up_blocks\.(\d)": lambda m: f"up.{2 - int(m[1])}",
            r"down_blocks": "down",
            r"mid_block\.resnets\.(\d)": lambda m: f"mid.block_{int(m[1]) + 1}",
            r"mid_block\.attentions\.0": "mid.attn_1",
            r"resnets": "block",
            r"(down|up)samplers\.0": r"\1sample",
            r"conv_shortcut": "nin_shortcut",
            r"conv_norm_out": "norm_out",
            r"group_norm": "norm",
            r"to_([qkv])": r"\1",
            r"to_out\.0": "proj_out",
        }.items():
            key = re.sub(old, new, key)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)
        weights[f"first_stage_model.{key}"] = value[:, :, None, None] if is_attention else value
    for key, value in pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.{'' if key.startswith('text_model.') else 'text_model.'}{key}"] = value
    return {key: value.contiguous() for key, value in weights.items()}


class Shell:
    """What an attacker's checkpoint holds: unpickling it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_single_files(tiny_pipeline, model, compared, lora_weights, tmp_path, monkeypatch, capsys):
    import types

    import numpy as np
    import torch
    from safetensors.torch import save_file

    weights = single_file_weights(tiny_pipeline)
    save_file(weights, tmp_path / "model.safetensors")
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for i in range(1, 4):  # Lightning is not installed here: what it would pickle is
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:i]), types.ModuleType(name))
    checkpoint_class = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = checkpoint_class
    instance = checkpoint_class()
    instance.monitor = "val/loss"
    callbacks = {checkpoint_class: {"best_model_score": np.float64(0.1), "state": instance}}
    torch.save({"state_dict": weights, "callbacks": callbacks}, tmp_path / "model.ckpt")
    torch.save({"state_dict": weights, "callbacks": Shell(tmp_path / "hacked")}, tmp_path / "evil.ckpt")

    for file in ("model.safetensors", "model.ckpt"):
        (picture,) = draw(tmp_path / file, tmp_path / file[-4:], "--single_file_config", model).values()
        assert difference(compared[0], picture) == 0, file
    with pytest.raises(SystemExit):
        draw(tmp_path / "evil.ckpt", tmp_path / "1", "--single_file_config", model)
    assert "carries more than weights (posix.system)" in capsys.readouterr().err
    assert not (tmp_path / "hacked").exists()

    # Layers that only the loaded model can tell of: diffusers by itself would warn and go on.
    bad = flat(lora_weights)
    bad["unet.nowhere.to_q.lora_A.weight"] = bad.pop(next(iter(bad)))
    save_file(bad, tmp_path / "bad.safetensors")
    argv = ["--single_file_config", model, "--lora", tmp_path / "bad.safetensors"]
    with pytest.raises(SystemExit):
        draw(tmp_path / "model.safetensors", tmp_path / "1", *argv)
    assert f"2 of its {len(bad)} keys match no layer" in capsys.readouterr().err
    assert not (tmp_path / "1").exists()


BAD_INPUT = {
    "--num_images 0": "must be a whole number, 1 or more",
    "--num_cpu_threads 0": "must be a whole number, 1 or more",
    "--num_inference_steps -1": "must be a whole number, 1 or more",
    "--height 100": "must be a whole number, a multiple of 8",
    "--width 0": "must be a whole number, a multiple of 8",
    "--clip_skip -1": "must be a whole number, 0 or more",
    "--clip_skip 2": "the text encoder has 2 layers. Pass --clip_skip 1 at most",
    "--guidance_scale nan": "it must be a finite number",
    "--lora_scale inf": "it must be a finite number",
    "--lora_scale 0.5": "--lora_scale needs --lora",
    "--scheduler eulr": "invalid choice: 'eulr'",
    "--num_inference_step 3": "Did you mean --num_inference_steps?",
    "--promt dog": "Did you mean --prompt?",
    "--compare_base": "--compare_base needs --lora",
    "--prompt {bad}/none.txt": "No such file",
    "--prompt {bad}/empty.txt": "is empty",
    "--prompt {bad}/latin.txt": "not UTF-8",
    "--output_dir {bad}/empty.txt/out": "can't write into",
    "--pretrained_model_name_or_path ./missing": "does not exist",
    "--pretrained_model_name_or_path models/none/x": "does not exist",
    "--pretrained_model_name_or_path none.safetensors": "does not exist",
    "--pretrained_model_name_or_path owner/name": "no file or folder here, and the hub does not give it",
    "--pretrained_model_name_or_path {bad}": "no readable model_index.json",
    "--pretrained_model_name_or_path {bad}/flux": "is a FluxPipeline",
    "--pretrained_model_name_or_path {bad}/lora.bin": "must be .safetensors or .ckpt",
    "--pretrained_model_name_or_path {bad}/cut.safetensors": "not a whole safetensors file",
    "--lora ./missing": "does not exist",
    "--lora {bad}": "Pass the LoRA file itself",
    "--lora {bad}/lora.bin": "only .safetensors",
    "--lora {bad}/cut.safetensors": "not a whole safetensors file",
    "--lora {bad}/model.safetensors": "is not a LoRA file",
    "--lora {bad}/layer.safetensors": "1 of its",
    "--lora {bad}/size.safetensors": "2 of its",
    "--lora {bad}/half.safetensors": "1 of its",
    "--lora {bad}/skip.safetensors:nan": "must be a finite number",
    "--lora {bad}/skip.safetensors:0,5": "does not exist",
    "--lora {bad}/skip.safetensors {bad}/none": "does not exist",
    "--lora {bad}/skip5.safetensors": "clip skip 5: the text encoder has 2 layers",
    "--lora {bad}/v.safetensors {bad}/skip.safetensors": "v.safetensors was trained with prediction_type v_prediction, ",
    "--lora {bad}/skip5.safetensors {bad}/skip.safetensors": "skip.safetensors with 1. Pass --clip_skip to choose.",
    "--vae ./missing": "does not exist",
    "--vae {bad}": "holds no config.json of an AutoencoderKL",
    "--vae {bad}/wide": "makes latents of 16 channels, and the UNet takes 4",
    "--vae {bad}/lora.bin": "must be .safetensors, .ckpt or .pt",
    "--vae {bad}/cut.safetensors": "not a whole safetensors file",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input(flags, model, bad_files, tmp_path, monkeypatch, capsys):
    """One line before anything is loaded; nothing is written."""
    monkeypatch.setattr(infer, "load_pipeline", lambda *args: pytest.fail("a model is loaded"))
    argv = ["--pretrained_model_name_or_path", model, "--prompt", "a dog", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        infer.main([*argv, *flags.format(bad=bad_files).split()])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("infer.py: error: ")
    assert len(err.splitlines()) == 1
    assert BAD_INPUT[flags] in err
    assert not list(tmp_path.iterdir())


def test_bad_input_of_the_command(model, bad_files, tmp_path):
    argv = ["--pretrained_model_name_or_path", model, "--prompt", "a dog", "--output_dir", tmp_path / "out"]
    code, out, err, seconds = command(*argv, "--lora", bad_files / "layer.safetensors", "--vae", bad_files / "wide")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "1 of its" in err
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


@pytest.mark.parametrize(
    ("count", "columns", "bands", "side"), [(1, 1, 1, 64), (8, 8, 1, 64), (11, 6, 2, 64), (2, 2, 1, 768)]
)
def test_comparison_sheet(count, columns, bands, side):
    """Every tile is whole, in its row and its column."""
    red, blue = Image.new("RGB", (side, side), (255, 0, 0)), Image.new("RGB", (side, side), (0, 0, 255))
    rows = [("base", ""), ("with LoRA", "at 0.5")]
    sheet = infer.layout(rows, [("a long prompt " * 20, "")] * count, [red] * count + [blue] * count)
    tile = 256 if side == 64 else 512
    counts = {colour: number for number, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert counts[255, 0, 0] == counts[0, 0, 255] == count * tile**2
    # Red ends at the right margin, blue at the right and the lower one, and both margins are the same.
    red_box, blue_box = (sheet.getchannel(c).point(lambda value: 255 * (value == 0)).getbbox() for c in "BR")
    assert sheet.width - blue_box[2] == sheet.width - red_box[2] == sheet.height - blue_box[3]
    assert columns * tile < sheet.width < (columns + 2) * tile
    assert sheet.height > bands * 2 * tile


def test_any_grid():
    """Three rows with long labels, in two bands: read from left to right and from top to bottom, the tiles are in order."""
    cells = [(row, column) for row in range(3) for column in range(9)]
    images = [Image.new("RGB", (64, 64), (250, 10 + 40 * row, 10 + 20 * column)) for row, column in cells]
    rows = [(f"a label of row {row} that has no end " * 3, "its note") for row in range(3)]
    sheet = infer.layout(rows, [(f"column {column}", "") for column in range(9)], images)
    colours = sheet.getcolors(maxcolors=1 << 20)
    assert {colour for number, colour in colours if number == 256**2} == {image.getpixel((0, 0)) for image in images}
    places = {}
    for y, x in itertools.product(range(0, sheet.height, 16), range(0, sheet.width, 16)):
        red, green, blue = sheet.getpixel((x, y))
        if red == 250 and green < 100:
            places.setdefault(((green - 10) // 40, (blue - 10) // 20), (x, y))
    bands = [range(5), range(5, 9)]
    assert list(places) == [(row, column) for band in bands for row in range(3) for column in band]
    assert all(places[row, 0][0] == places[row, 5][0] for row in range(3))

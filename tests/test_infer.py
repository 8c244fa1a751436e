"""`infer.py` on a tiny real pipeline, through the command as typed wherever the command is what matters."""

import ast
import copy
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image, ImageChops


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import infer  # noqa: E402


PROMPT = "a red axe on a blue background"


@pytest.fixture(autouse=True)
def library_settings():
    """What main sets for its own process does not outlive the test."""
    import diffusers
    import torch
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models wait for each other's threads on a busy machine
    libraries = [module.utils.logging for module in (diffusers, transformers)]
    levels = [library.get_verbosity() for library in libraries]
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    for library, level in zip(libraries, levels):
        library.set_verbosity(level)
        library.enable_progress_bar()


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from mini_sd import make_pipeline, make_text_encoder, write_tokenizer
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=96,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )
    return make_pipeline(vae, unet, make_text_encoder(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def model(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def lora_weights(tiny_pipeline):
    """Random LoRA weights of the UNet and the text encoder, strong enough to be seen."""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(1)
    weights = {}
    for name, targets in {
        "unet": ["to_q", "to_k", "to_v", "to_out.0"],
        "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    }.items():
        module = copy.deepcopy(getattr(tiny_pipeline, name))
        module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
        weights[name] = get_peft_model_state_dict(module)
    return weights


@pytest.fixture(scope="session")
def lora(lora_weights, tmp_path_factory):
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("loras") / "axe"
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=lora_weights["unet"], text_encoder_lora_layers=lora_weights["text_encoder"]
    )
    return str(folder)


def flat(lora_weights):
    return {f"{part}.{key}": value for part, weights in lora_weights.items() for key, value in weights.items()}


def command(*argv):
    """(exit code, stdout, stderr, seconds) of infer.py, with no hub to ask."""
    started = time.perf_counter()
    run = subprocess.run(
        [sys.executable, ROOT / "infer.py", *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return run.returncode, run.stdout, run.stderr, time.perf_counter() - started


def draw(model, output_dir, *argv, prompt=(PROMPT,)):
    """Runs main in this process; the pictures by file name."""
    argv = ["--pretrained_model_name_or_path", model, "--output_dir", output_dir, "--num_inference_steps", 2, *argv]
    infer.main([*map(str, argv), "--prompt", *map(str, prompt)])
    return {path.name: Image.open(path).copy() for path in sorted(Path(output_dir).iterdir())}


def difference(a, b):
    """The largest difference of two pictures in any channel, in steps of 1/255."""
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


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


def test_equals_stock_diffusers(model, lora, tmp_path):
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
    base, with_lora, sheet = draw(model, tmp_path / "out", "--lora", lora, "--compare_base").values()
    assert difference(base, stock[0]) == 0
    assert difference(with_lora, stock[1]) == 0
    assert difference(base, with_lora) > 3


def test_picture_i_is_seed_plus_i(model, tmp_path):
    two = draw(model, tmp_path / "two", "--num_images", 2, "--seed", 5, prompt=("a dog", PROMPT))
    one = draw(model, tmp_path / "one", "--seed", 6, prompt=("a dog",))
    assert list(two) == [f"{n}-seed{s}.png" for n in ("00-a-dog", f"01-{PROMPT.replace(' ', '-')}") for s in (5, 6)]
    # A batch of two rounds otherwise than a batch of one.
    assert difference(two["00-a-dog-seed6.png"], one["00-a-dog-seed6.png"]) <= 1
    assert difference(two["00-a-dog-seed5.png"], two["00-a-dog-seed6.png"]) > 3


def test_same_command_same_bytes_and_nothing_overwritten(model, tmp_path):
    name = f"00-{PROMPT.replace(' ', '-')}-seed0.png"
    draw(model, tmp_path)
    first = (tmp_path / name).read_bytes()
    assert list(draw(model, tmp_path)) == [name]
    assert (tmp_path / name).read_bytes() == first
    assert sorted(draw(model, tmp_path, "--guidance_scale", 3)) == [name.replace(".png", "-1.png"), name]
    assert (tmp_path / name).read_bytes() == first


def test_lora_scale(model, lora, tmp_path):
    base, zero, _ = draw(model, tmp_path / "0", "--lora", lora, "--lora_scale", 0, "--compare_base").values()
    assert difference(base, zero) == 0


def test_kohya_file(model, lora, lora_weights, tmp_path):
    """Names with underscores pass the check, and draw the same picture as those with dots."""
    import torch
    from safetensors.torch import save_file

    kohya = {}
    for key, value in flat(lora_weights).items():
        path, leaf = re.fullmatch(r"(.+)\.(lora_[AB]\.weight)", key).groups()
        path = path.replace("text_encoder.", "te.", 1).replace(".", "_")
        kohya[f"lora_{path}.{leaf.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}"] = value
        kohya[f"lora_{path}.alpha"] = torch.tensor(4.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    (ours,) = draw(model, tmp_path / "ours", "--lora", lora).values()
    (theirs,) = draw(model, tmp_path / "theirs", "--lora", tmp_path / "kohya.safetensors").values()
    assert difference(ours, theirs) <= 1


def test_schedulers_draw(tiny_pipeline):
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(**tiny_pipeline.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for name, changes, _ in infer.SCHEDULERS.values():
        pipe.scheduler = getattr(diffusers, name).from_config(tiny_pipeline.scheduler.config, **changes)
        latents = pipe(PROMPT, num_inference_steps=3, output_type="latent").images
        assert latents.isfinite().all(), name


def test_no_sampler_clips_latents(tiny_pipeline):
    """DDIM and DDPM clip at 1 unless the settings they are made from say no; a latent reaches 4."""
    import diffusers

    settings = {k: v for k, v in tiny_pipeline.scheduler.config.items() if k != "clip_sample"}
    for name, changes, _ in infer.SCHEDULERS.values():
        assert not getattr(diffusers, name).from_config(settings, **changes).config.get("clip_sample")


def test_clip_skip(tiny_pipeline, model, tmp_path):
    if not hasattr(tiny_pipeline.text_encoder, "text_model"):
        pytest.skip("no pipeline of diffusers can skip CLIP layers with transformers 5.6 and later")
    (plain,), (skipped,) = (draw(model, tmp_path / n, *("--clip_skip", n)).values() for n in "01")
    assert difference(plain, skipped) > 0
    (path,) = (tmp_path / "1").iterdir()
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


def test_single_files(tiny_pipeline, model, lora_weights, tmp_path, monkeypatch, capsys):
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

    (folder,) = draw(model, tmp_path / "0").values()
    for file in ("model.safetensors", "model.ckpt"):
        (picture,) = draw(tmp_path / file, tmp_path / file[-4:], "--single_file_config", model).values()
        assert difference(folder, picture) == 0, file
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


@pytest.fixture(scope="session")
def bad_files(lora_weights, tmp_path_factory):
    import torch
    from safetensors.torch import save_file

    folder, good = tmp_path_factory.mktemp("bad"), flat(lora_weights)
    first, second, *_ = good
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(4, 4), **good}, folder / "layer.safetensors")
    save_file(good | {first: torch.zeros(4, 5), second: torch.zeros(5, 4)}, folder / "size.safetensors")
    save_file({key: value for key, value in good.items() if key != second}, folder / "half.safetensors")
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "size.safetensors").read_bytes()[:-100])
    (folder / "lora.bin").write_bytes(b"")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "flux").mkdir()
    (folder / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder


BAD_INPUT = {
    "--num_images 0": "must be 1 or more",
    "--num_inference_steps -1": "must be 1 or more",
    "--height 100": "must be a multiple of 8",
    "--width 0": "must be a multiple of 8",
    "--clip_skip -1": "must be 0 or more",
    "--guidance_scale nan": "finite",
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
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input(flags, model, bad_files, tmp_path):
    argv = ["--pretrained_model_name_or_path", model, "--prompt", "a dog", "--output_dir", tmp_path / "out"]
    code, out, err, seconds = command(*argv, *flags.format(bad=bad_files).split())
    assert (code, out) == (2, "")
    assert err.startswith("infer.py: error: ")
    assert len(err.splitlines()) == 1
    assert BAD_INPUT[flags] in err
    assert seconds < 3
    assert not list(tmp_path.iterdir())


def test_help_is_quick_and_needs_no_torch():
    runs = [command("--help") for _ in range(3)]
    assert min(seconds for *_, seconds in runs) < 0.5
    assert runs[0][0] == 0
    assert "(default: 7.5)" in runs[0][1]
    imports = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "infer.py", "--help"], capture_output=True, text=True
    ).stderr
    assert not re.search(r"\| +(torch|diffusers|transformers|PIL|numpy)$", imports, re.MULTILINE)


def test_imports_nothing_local():
    names = set()
    for node in ast.walk(ast.parse((ROOT / "infer.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    third_party = names - sys.stdlib_module_names
    assert third_party == {"torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "PIL", "tqdm"}


@pytest.mark.parametrize(
    ("count", "columns", "bands", "side"), [(1, 1, 1, 64), (8, 8, 1, 64), (11, 6, 2, 64), (2, 2, 1, 768)]
)
def test_comparison_sheet(count, columns, bands, side):
    """Every tile is whole, in its row and its column."""
    red, blue = Image.new("RGB", (side, side), (255, 0, 0)), Image.new("RGB", (side, side), (0, 0, 255))
    sheet = infer.comparison_sheet([("a long prompt " * 20, "", red, blue)] * count, scale=0.5)
    tile = 256 if side == 64 else 512
    counts = {colour: number for number, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert counts[255, 0, 0] == counts[0, 0, 255] == count * tile**2
    # Red ends at the right margin, blue at the right and the lower one, and both margins are the same.
    red_box, blue_box = (sheet.getchannel(c).point(lambda value: 255 * (value == 0)).getbbox() for c in "BR")
    assert sheet.width - blue_box[2] == sheet.width - red_box[2] == sheet.height - blue_box[3]
    assert columns * tile < sheet.width < (columns + 2) * tile
    assert sheet.height > bands * 2 * tile

"""Fixtures and helpers of the tests of `infer.py`: a tiny pipeline, LoRAs, and runs of the command."""

import copy
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT
from PIL import Image, ImageChops, ImageDraw

import infer
from text_to_image_lora.drawing import pipeline


PROMPT = "a red axe on a blue background"
NAME = f"00-{PROMPT.replace(' ', '-')}-seed0"  # the name of the picture's file


@pytest.fixture
def library_settings():
    """Restores the settings of libraries and the environment that `main` changes for its process."""
    import diffusers
    import torch
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, the threads of tiny models wait for each other
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

    from scripts.mini_sd.model import make_pipeline, make_text_encoder, write_tokenizer

    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, cross_attention_dim=96,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=8, sample_size=64,
    )  # fmt: skip
    return make_pipeline(vae, unet, make_text_encoder(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def model(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def lora_weights(tiny_pipeline):
    """Returns random LoRA weights of the UNet and the text encoder with a visible effect."""
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


@pytest.fixture(scope="session")
def write_lora(lora_weights, tmp_path_factory):
    """Returns a function that writes a LoRA file with these strings in its header, and returns the path."""
    from safetensors.torch import save_file

    def write(name, weights=None, **header):
        path = tmp_path_factory.mktemp("loras") / f"{name}.safetensors"
        save_file(weights or flat(lora_weights), path, {"format": "pt", **header})
        return path

    return write


@pytest.fixture(scope="session")
def compared(model, lora, tmp_path_factory):
    """Returns the pictures of the base model and of the LoRA with seed 0."""
    base, with_lora, _ = draw(model, tmp_path_factory.mktemp("compared"), "--lora", lora, "--compare_base").values()
    return base, with_lora


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
    save_file(good, folder / "v.safetensors", {"prediction_type": "v_prediction"})
    save_file(good, folder / "skip.safetensors", {"clip_skip": "1"})
    save_file(good, folder / "skip5.safetensors", {"clip_skip": "5"})
    (folder / "cut.safetensors").write_bytes((folder / "size.safetensors").read_bytes()[:-100])
    (folder / "lora.bin").write_bytes(b"")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "flux").mkdir()
    (folder / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (folder / "wide").mkdir()
    (folder / "wide" / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 16}')
    return folder


def flat(lora_weights):
    return {f"{part}.{key}": value for part, weights in lora_weights.items() for key, value in weights.items()}


def command(*argv):
    """Returns (exit code, stdout, stderr, seconds) of infer.py without access to the hub."""
    started = time.perf_counter()
    run = subprocess.run(
        [sys.executable, ROOT / "infer.py", *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return run.returncode, run.stdout, run.stderr, time.perf_counter() - started


def draw(model, output_dir, *argv, prompt=(PROMPT,)):
    """Runs `main` in this process and returns the pictures by file name."""
    given = ["--pretrained_model_name_or_path", model, "--prompt", *prompt, "--output_dir", output_dir]
    infer.main([str(word) for word in [*given, "--num_inference_steps", 2, *argv]])
    return {path.name: Image.open(path).copy() for path in sorted(Path(output_dir).iterdir())}


def difference(a, b):
    """Returns the largest difference between two pictures in any channel, in steps of 1/255."""
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


def stock(name, folder, **more):
    """Returns a pipeline of diffusers with the sampler that infer.py uses instead of PNDM."""
    import diffusers

    pipe = getattr(diffusers, name).from_pretrained(folder, safety_checker=None, **more)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def disk(size=(96, 64), centre=(30, 30), colour="red", mode="RGB", ground="navy"):
    """Returns a picture of a disk on a plain ground, so that edges can be found."""
    image = Image.new(mode, size, ground)
    ImageDraw.Draw(image).ellipse([c - 20 for c in centre] + [c + 20 for c in centre], fill=colour)
    return image


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "disk.png"
    disk().save(path)
    return path


def write_controlnet(unet, folder):
    """Saves a ControlNet of the UNet with random weights and a strong effect, and returns its folder."""
    import torch
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "controlnet_" in name and parameter.ndim > 1:  # these weights are initially zero
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def controlnet(tiny_pipeline, tmp_path_factory):
    return write_controlnet(tiny_pipeline.unet, tmp_path_factory.mktemp("controlnets") / "edges")


@pytest.fixture
def refusal(model, tmp_path, monkeypatch, capsys):
    """Returns a function that returns the error message of invalid flags.

    It checks that no model is loaded and nothing is written.
    """
    monkeypatch.setattr(pipeline, "load_pipeline", lambda *args: pytest.fail("a model is loaded"))

    def refuse(*flags, prompt=("a dog",)):
        with pytest.raises(SystemExit) as stop:
            draw(model, tmp_path / "out", *flags, prompt=prompt)
        out, err = capsys.readouterr()
        assert (stop.value.code, out, len(err.splitlines())) == (2, "", 1)
        assert err.startswith("infer.py: error: ")
        assert not (tmp_path / "out").exists()
        return err

    return refuse

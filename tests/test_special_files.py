"""Named pipes and devices where a command expects a file are refused in one line: reading them could take forever."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refusal_of
from infer_fixtures import draw
from PIL import Image

import train_text_to_image_lora as script
from scripts import convert_lora
from scripts.evaluation.judges import find_vision_model
from text_to_image_lora.training import inputs


pytestmark = pytest.mark.usefixtures("library_settings")


FEEDER = """
import os, sys, time
while True:
    try:
        os.close(os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # nobody reads it
        time.sleep(0.01)
"""


@pytest.fixture
def put_pipe():
    """A function that puts a named pipe at a path, in place of a file. Whoever reads it gets nothing, instead of waiting.

    The pipe is fed by another process, because some readers hold Python's global lock while they wait.
    """
    feeders = []

    def put(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        feeders.append(subprocess.Popen([sys.executable, "-S", "-c", FEEDER, path]))
        return path

    yield put
    for feeder in feeders:
        feeder.kill()
        feeder.wait()


def refused_by_infer(model, capsys, tmp_path, *flags, **options):
    with pytest.raises(SystemExit) as stop:
        draw(model, tmp_path / "out", *flags, **options)
    err = capsys.readouterr().err
    assert (stop.value.code, len(err.splitlines())) == (2, 1), err
    return err


OF_A_MODEL = [
    "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "unet/diffusion_pytorch_model.safetensors.index.json",
]  # fmt: skip


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_a_pipe_in_a_base_model_is_refused(model, put_pipe, tmp_path, capsys, name):
    path = put_pipe(Path(shutil.copytree(model, tmp_path / "model"), name))
    reason = f"{path}: it is a named pipe, not a file."
    assert reason in refused_by_infer(tmp_path / "model", capsys, tmp_path)
    words = ["--pretrained_model_name_or_path", tmp_path / "model", "--train_data_dir", tmp_path]
    settings = script.parse_settings([*map(str, words)])
    assert reason in refusal_of(inputs.find_base, settings)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"])
def test_a_device_or_a_folder_in_a_base_model_is_refused(model, tmp_path, capsys, name):
    path = Path(shutil.copytree(model, tmp_path / "model"), name)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert f"{path}: it is a device, not a file." in refused_by_infer(tmp_path / "model", capsys, tmp_path)
    path.unlink()
    path.mkdir()
    assert f"{path}: it is a folder, not a file." in refused_by_infer(tmp_path / "model", capsys, tmp_path)


FILES = {
    "--lora": "lora.safetensors", "--vae": "vae.safetensors", "--image": "image.png", "--from_png": "drawn.png",
    "--pretrained_model_name_or_path": "model.safetensors", "--prompt": "prompts.txt",
}  # fmt: skip


@pytest.mark.parametrize(("flag", "name"), FILES.items())
def test_a_pipe_that_a_flag_names_is_refused(model, put_pipe, tmp_path, capsys, flag, name):
    path = put_pipe(tmp_path / name)
    line = refused_by_infer(model, capsys, tmp_path, flag, path)
    assert str(path) in line
    assert "a named pipe" in line or flag == "--pretrained_model_name_or_path"


@pytest.mark.parametrize("name", ["vae.pt", "vae.ckpt", "VAE.SAFETENSORS"])
def test_a_pipe_as_a_vae_is_refused(model, put_pipe, tmp_path, capsys, name):
    path = put_pipe(tmp_path / name)
    assert f"{path}: it is a named pipe, not a file." in refused_by_infer(model, capsys, tmp_path, "--vae", path)
    words = ["--pretrained_model_name_or_path", model, "--train_data_dir", tmp_path]
    words += ["--pretrained_vae_model_name_or_path", path]
    assert f"{path}: it is a named pipe, not a file." in refusal_of(script.parse_settings, [*map(str, words)])


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_a_pipe_in_the_folder_of_another_model_is_refused(model, controlnet, put_pipe, photo, tmp_path, capsys, name):
    path = put_pipe(Path(shutil.copytree(Path(model, "vae"), tmp_path / "vae"), name))
    assert str(path) in refused_by_infer(model, capsys, tmp_path, "--vae", tmp_path / "vae")
    path = put_pipe(Path(shutil.copytree(controlnet, tmp_path / "edges"), name))
    flags = ("--controlnet", tmp_path / "edges", "--image", photo, "--control", "canny")
    assert str(path) in refused_by_infer(model, capsys, tmp_path, *flags)
    assert str(path) in refusal_of(find_vision_model, "--clip_model", str(tmp_path / "edges"), "clip")


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "run/pytorch_lora_weights.safetensors"])
def test_a_pipe_is_not_converted(put_pipe, tmp_path, name):
    (tmp_path / "run").mkdir()
    put_pipe(tmp_path / name)
    words = [str(tmp_path / name.partition("/")[0]), str(tmp_path / "out.safetensors")]
    assert "it is a named pipe, not a file." in refusal_of(convert_lora.main, convert_lora.parse_args(words))


@pytest.mark.parametrize("flag", ["--lora_weights", "--validation_prompts"])
def test_training_refuses_a_pipe(model, put_pipe, tmp_path, flag):
    path = put_pipe(tmp_path / {"--lora_weights": "l.safetensors", "--validation_prompts": "p.txt"}[flag])
    words = ["--pretrained_model_name_or_path", model, "--train_data_dir", tmp_path, flag, path]

    def find(words):
        inputs.find_base(script.parse_settings(words))

    assert "it is a named pipe, not a file." in refusal_of(find, [*map(str, words)])


def test_a_picture_beside_a_pipe_is_drawn_again(model, put_pipe, tmp_path):
    """The run.yaml of a folder above a picture may be anything."""
    draw(model, tmp_path / "out")
    (path,) = (tmp_path / "out").iterdir()
    put_pipe(tmp_path / "run.yaml")
    draw(model, tmp_path / "again", "--from_png", path)
    (again,) = (tmp_path / "again").iterdir()
    assert Image.open(again).tobytes() == Image.open(path).tobytes()

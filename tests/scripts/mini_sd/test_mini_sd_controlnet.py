"""The ControlNet of the embedded base model: resuming its training, its measurement, and whether objects follow edges."""

import kornia
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file

from scripts.mini_sd import controlnet, pictures
from scripts.mini_sd.drawings import draw_scene
from scripts.mini_sd.model import sentence_of
from scripts.mini_sd.pipeline import load_pipeline


BASE, CONTROLNET = ROOT / "models" / "mini-sd", ROOT / "models" / "mini-controlnet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a work folder with eight drawings, drawn in this process."""
    folder = tmp_path_factory.mktemp("controlnet")
    np.save(folder / "pictures.npy", np.stack([pictures.draw_for_unet(0, i) for i in range(8)]))
    return folder


def run(folder, output_dir, *flags):
    """Runs the script for two steps of two drawings, by default without measuring, and returns the exit code."""
    few = ["--num_drawings", "8", "--steps", "2", "--batch_size", "2", "--num_pictures", "0"]
    paths = ["--model", str(BASE), "--work_dir", str(folder), "--output_dir", str(output_dir)]
    return controlnet.main(controlnet.parse_args([*few, *paths, *flags]))


def test_stopped_and_resumed_it_writes_the_weights_of_an_undisturbed_run(folder, tmp_path):
    assert run(folder, tmp_path / "straight") == 0
    (folder / "controlnet.pt").unlink()
    assert run(folder, tmp_path / "resumed", "--max_minutes", "0") == 75
    assert torch.load(folder / "controlnet.pt", weights_only=True)["step"] == 1
    assert not (tmp_path / "resumed").exists()
    assert run(folder, tmp_path / "resumed") == 0
    straight, resumed = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("straight", "resumed")
    )
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    trained = ControlNetModel.from_pretrained(tmp_path / "resumed")
    assert all(layer.weight.abs().sum() > 0 for layer in trained.controlnet_down_blocks)
    fresh = controlnet.make_controlnet(load_pipeline(BASE).unet)
    assert not any(layer.weight.abs().sum() > 0 for layer in fresh.controlnet_down_blocks)


def test_a_control_image_is_kornias_canny_in_white_on_black():
    picture = pictures.draw_for_unet(0, 0)
    edges = controlnet.canny_edges([picture])
    pixels = torch.tensor(picture).permute(2, 0, 1)[None] / 255
    _, expected = kornia.filters.canny(pixels, 0.1, 0.2, (5, 5), (1, 1), hysteresis=True)
    control = controlnet.control_image(edges[0])
    assert (control.mode, control.size) == ("RGB", (128, 128))
    assert np.array_equal(np.asarray(control), 255 * expected[0, 0, ..., None].numpy().repeat(3, axis=2))
    assert 0.01 < edges.mean() < 0.2


def test_agreement_forgives_a_pixel_and_counts_what_is_missing_and_what_is_too_much():
    frame, line = np.zeros((2, 1, 32, 32), dtype=bool)
    frame[0, 8, 8:24] = frame[0, 24, 8:24] = True
    line[0, 8, 8:24] = True
    assert controlnet.edge_agreement(frame, np.roll(frame, 1, axis=1)) == pytest.approx(1)
    assert controlnet.edge_agreement(frame, np.roll(frame, 2, axis=1)) == 0
    assert controlnet.edge_agreement(line, frame) == pytest.approx(2 / 3)
    assert controlnet.edge_agreement(frame, line) == pytest.approx(2 / 3)
    assert controlnet.edge_agreement(np.zeros_like(frame), frame) == 0


def test_it_ships_small_and_in_half_precision():
    file = CONTROLNET / "diffusion_pytorch_model.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert file.stat().st_size < 6e6


def test_measuring_prints_a_row_for_each_way_to_draw_and_the_sheet_is_drawn(tmp_path, capsys):
    flags = ("--measure_only", "--num_pictures", "2", "--num_inference_steps", "2", "--sheet", str(tmp_path / "s.png"))
    assert run(tmp_path, CONTROLNET, *flags) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "agreement" not in line]
    assert [row.split("|")[1].strip() for row in rows] == [
        "drawings through the autoencoder", "with edges", "without", "with another drawing's edges",
    ]  # fmt: skip
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (6 * 132 + 4, 22 + 3 * (22 + 136))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_one_prompt_and_two_control_images_give_two_pictures_that_follow_them(seed):
    """A held-out prompt with two poses and equal noise; `controlnet.py --measure_only` measures this on more pictures."""
    (scene,), _ = controlnet.held_out_drawings(1, seed)
    words = (scene.kind, scene.colour, scene.background)
    poses = [draw_scene(*words, 128, np.random.default_rng([seed, i])) for i in (1, 2)]
    edges = controlnet.canny_edges(poses)
    pipeline = controlnet.load_controlled(BASE, CONTROLNET)

    def edges_drawn(scale):
        prompts = [sentence_of(scene)] * 2
        options = dict(guidance_scale=4.0, num_inference_steps=20, controlnet_conditioning_scale=scale)
        images = controlnet.draw_controlled(pipeline, prompts, edges, [seed, seed], **options)
        return controlnet.canny_edges(images)

    followed = edges_drawn(1.0)
    agreement = controlnet.edge_agreement(followed, edges)
    assert agreement.min() > controlnet.edge_agreement(followed, edges[::-1].copy()).max() + 0.2
    assert agreement.min() > controlnet.edge_agreement(edges_drawn(0.0), edges).max() + 0.2

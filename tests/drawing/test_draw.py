"""Drawing pictures: their sizes, their batches, and the calls of the models."""

import contextlib
import copy
import io

import pytest
import torch
import tqdm
from infer_fixtures import PROMPT, difference, draw
from PIL import Image

from text_to_image_lora.drawing import draw as drawing
from text_to_image_lora.drawing.as_trained import AsTrained
from text_to_image_lora.drawing.draw import batches_of, draw_batch, size_of, sized
from text_to_image_lora.drawing.find import find_base
from text_to_image_lora.drawing.pipeline import Job, open_studio
from text_to_image_lora.drawing.rows import Drawing
from text_to_image_lora.drawing.settings import Machine, Model


pytestmark = pytest.mark.usefixtures("library_settings")


@pytest.mark.parametrize(
    ("wanted", "shape", "size"),
    [
        ((None, None), None, (512, 512)),
        ((None, 640), None, (512, 640)),
        ((None, None), (1000, 1000), (512, 512)),
        ((None, None), (4000, 3000), (440, 592)),
        ((None, None), (30, 40), (592, 440)),
        ((None, 768), (4000, 3000), (576, 768)),
        ((768, None), (4000, 3000), (768, 1024)),
        ((320, 640), (30, 40), (320, 640)),
        ((None, None), (9000, 9), (16, 16192)),
    ],
)
def test_sizes(wanted, shape, size):
    """Sizes are (height, width): the area of the model's resolution in the aspect ratio of the (width, height) picture."""
    assert size_of(Drawing(height=wanted[0], width=wanted[1]), (512, 512), shape) == size


def test_large_pictures_are_decoded_in_tiles(model, tmp_path, monkeypatch):
    """Whether a picture is decoded in tiles depends only on its own size, not on the other pictures."""
    flags = ["--guidance_scale", 1]
    whole = draw(model, tmp_path / "whole", *flags, prompt=["a dog", "a dog --width 128"])
    monkeypatch.setattr(drawing, "TILED_FROM", 64 * 64)
    tiled = draw(model, tmp_path / "tiled", *flags, prompt=["a dog", "a dog --width 128"])
    (small, large), (small_too, large_too) = whole.values(), tiled.values()
    assert difference(small, small_too) == 0
    assert difference(large, large_too) > 0


def test_too_little_memory_is_reported_in_one_line(model, tmp_path, monkeypatch, capsys):
    def full(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", full)
    with pytest.raises(SystemExit) as stop:
        draw(model, tmp_path, "--num_images", 2)
    assert stop.value.code == 1
    line = "the GPU's memory is too small for 2 pictures of 64x64 at once. Pass a smaller --batch_size, or --offload."
    assert capsys.readouterr().err == f"infer.py: error: {line}\n"


def unet_and_encoder_calls(run):
    """Counts the calls of the UNet and of the text encoder."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (UNet2DConditionModel, CLIPTextModel):

            def counting(self, *args, forward=kind.forward, kind=kind, **options):
                calls.append(kind)
                return forward(self, *args, **options)

            patch.setattr(kind, "forward", counting)
        run()
    return calls.count(UNet2DConditionModel), calls.count(CLIPTextModel)


def test_each_text_is_encoded_once_and_batches_are_full(model, lora_weights, write_lora, tmp_path):
    """Draws two prompts with two seeds and two strengths; the LoRA does not change the text encoder."""
    lora = write_lora("unet", {f"unet.{key}": value for key, value in lora_weights["unet"].items()})
    flags = ["--lora", lora, "--num_images", 2, "--scheduler", "ddim"]
    prompts = ("a dog", f"{PROMPT} --negative blurry")

    def run():
        pictures = draw(model, tmp_path / "1", *flags, "--grid", "prompt", "lora_scale=0.5,1", "seed", prompt=prompts)
        assert len(pictures) == 9

    unet, encoder = unet_and_encoder_calls(run)
    assert (unet, encoder) == (2 * 2, 4)  # two batches of two steps; two prompts, "blurry" and ""


def test_a_lora_of_the_text_encoder_reads_prompts_anew(model, lora, tmp_path):
    flags = ["--lora", lora, "--grid", "lora_scale=0,0.5,1", "seed=1,2", "--guidance_scale", 1]
    assert unet_and_encoder_calls(lambda: draw(model, tmp_path, *flags))[1] == 3


@pytest.mark.parametrize("scheduler", ["heun", "dpm++", "pndm", "lcm"])
def test_the_bar_counts_every_step(scheduler, model, tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    flags = ["--image", tmp_path / "black.png", "--strength", 0.5, 1, "--num_inference_steps", 5]
    draw(model, tmp_path / "out", *flags, "--scheduler", scheduler, "--guidance_scale", 1)
    assert bars[0].n == bars[0].total > 5


class Encoded:
    """Conditions of prompts that were encoded before, like those that a training run keeps."""

    def __init__(self, encoder, drawings):
        self.conditions = {drawing.prompt: encoder(drawing) for drawing in drawings}

    def num_chunks(self, drawing):
        return 0

    def __call__(self, drawing):
        return self.conditions[drawing.prompt]


@pytest.fixture
def in_training(tiny_pipeline, model):
    """Returns the `Studio` of a training run, without text encoders and with an adapter in its UNet, and its drawings."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    base = find_base(Model(model))
    whole = open_studio(Job(base, (), AsTrained()), Machine(), "cpu", torch.float32)
    drawings = sized(whole, [Drawing(prompt=prompt, seed=k, num_inference_steps=3) for k, prompt in enumerate("abc")])
    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe = StableDiffusionPipeline(
        vae=tiny_pipeline.vae, unet=unet, scheduler=tiny_pipeline.scheduler, text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def decode(latents):
        with torch.no_grad():
            decoded = [pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample for latent in latents.split(1)]
        return [pipe.image_processor.postprocess(each)[0] for each in decoded]

    encoder = Encoded(whole.encoder, drawings)
    return whole._replace(
        pipe=pipe, encoder=encoder, use_loras=lambda pipe, loras: contextlib.nullcontext(), decode=decode
    ), drawings


def test_models_in_training_draw_their_share_of_the_batches(in_training):
    """The models are loaded, the prompts are encoded, and another process draws the other batches."""
    studio, drawings = in_training
    batches, steps = batches_of(studio, drawings, 2), []
    assert [batch.indices for batch in batches] == [[0, 1], [2]]
    drawn = [each for batch in batches for each in draw_batch(studio, drawings, batch, steps.append)]
    assert ([each.index for each in drawn], len(steps)) == ([0, 1, 2], 6)
    options = studio.encoder(drawings[2]) | {"num_inference_steps": 3, "guidance_scale": 7.5}
    theirs = studio.pipe(generator=torch.Generator().manual_seed(2), height=64, width=64, **options).images[0]
    assert difference(drawn[2].image, theirs) == 0
    assert studio.pipe.get_active_adapters() == ["default"]


def test_a_run_that_is_asked_to_stop_leaves_out_the_steps_that_remain(in_training, monkeypatch):
    studio, drawings = in_training
    calls = []
    monkeypatch.setattr(
        studio.pipe.unet, "forward", lambda *args, f=studio.pipe.unet.forward, **kw: calls.append(1) or f(*args, **kw)
    )
    (batch, _) = batches_of(studio, drawings, 2)
    assert draw_batch(studio, drawings, batch, lambda pipe: setattr(pipe, "_interrupt", True)) == []
    assert len(calls) == 1

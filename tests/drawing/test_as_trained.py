"""LoRAs are drawn with the settings that they were trained with."""

from unittest import mock

import pytest
from conftest import write_pictures
from infer_fixtures import difference, draw
from PIL import Image

from text_to_image_lora.drawing import as_trained, find, pipeline
from text_to_image_lora.drawing.as_trained import settle


pytestmark = pytest.mark.usefixtures("library_settings")


AS_TRAINED = dict(prediction_type="v_prediction", rescale_betas_zero_snr="True", clip_skip="1", long_prompts="True")


def test_drawn_as_it_was_trained(tiny_pipeline, model, write_lora, tmp_path, capsys):
    """Compares the picture with that of stock diffusers, configured by hand with the settings of the header."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    if not hasattr(tiny_pipeline.text_encoder, "text_model"):
        pytest.skip("no pipeline of diffusers can skip CLIP layers with transformers 5.6 and later")
    lora = write_lora("axe", **AS_TRAINED, pretrained_vae_model_name_or_path="mse")
    (own,) = draw(model, tmp_path / "own", "--lora", lora, prompt=("a red axe " * 26,)).values()  # 75 + 3 tokens
    assert capsys.readouterr().err.splitlines() == [
        "note: the LoRA was trained with the VAE mse; these pictures do not use it, because the LoRA's metadata contains "
        "only the last part of the VAE's path. Pass the full path with --vae.",
        "note: the LoRA was trained with v-prediction, zero terminal SNR, long prompts and clip skip 1; "
        "these pictures are drawn accordingly",
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
    # All notes have been printed by then.
    monkeypatch.setattr(pipeline, "load_pipeline", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        draw(model, tmp_path / "out", "--lora", lora, "--scheduler", "heun", "--clip_skip", 0)
    lines = capsys.readouterr().err.splitlines()
    reasons = {
        "zero terminal SNR": "--scheduler heun does not support it. Omit --scheduler or use ddim.",
        "clip skip 1": "--clip_skip 0 overrides it.",
        "the VAE owner/name": "--vae owner/name is not a local file or folder, and can't be downloaded from the hub: ",
    }
    for line, (words, reason) in zip(lines, reasons.items()):
        note = f"note: the LoRA was trained with {words}; these pictures do not use it, because {reason}"
        assert line.startswith(note)
    used = "note: the LoRA was trained with v-prediction and long prompts; these pictures are drawn accordingly"
    assert lines[3:] == [used]


def test_the_most_chunks_of_several_loras(write_lora):
    loras = [
        find.find_lora(str(write_lora(f"axe{chunks}", long_prompts="True", num_chunks=chunks)), 1.0, f"lora{chunks}")
        for chunks in ("2", "4", "1")
    ]
    trained, _ = settle(loras, find.Base(None, prediction_type="epsilon"), None)
    assert (trained.long_prompts, trained.num_chunks) == (True, 4)


def test_header_of_a_real_run(train, tiny_sd, tmp_path, capsys):
    """infer.py draws the sample picture of a training run again, with the settings in the header of its LoRA file."""
    prompt = "a red axe"  # one chunk; the longest caption has two chunks, and therefore the prompt in training too
    out = train(
        train_data_dir=write_pictures(tmp_path / "pictures", captions=["a red axe " * 26]),
        prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_skip=1, long_prompts=True, learning_rate=0.1,
        validation_prompt=prompt, validation_inference_steps=3,
    )  # fmt: skip
    capsys.readouterr()
    flags = ["--lora", out, "--num_inference_steps", 3]
    (picture,) = draw(tiny_sd, tmp_path / "drawn", *flags, prompt=(prompt,)).values()
    assert (
        "zero terminal SNR, long prompts, 2 chunks per prompt and clip skip 1; these pictures"
        in capsys.readouterr().err
    )
    assert difference(picture, Image.open(out / "validation" / "step-000002" / "prompt-00-0.png")) <= 2


def test_clip_skip(model, write_lora, compared, tmp_path, capsys):
    lora = write_lora("axe", prediction_type="epsilon", rescale_betas_zero_snr="False", clip_skip="1")
    (skipped,) = draw(model, tmp_path, "--lora", lora, "--clip_skip", 1).values()
    assert capsys.readouterr().err == ""  # no note about an epsilon base model, or a flag that agrees with the header
    assert difference(compared[1], skipped) > 0
    (path,) = tmp_path.iterdir()
    assert Image.open(path).text["clip_skip"] == "1"
    assert Image.open(path).text["parameters"].endswith("Clip skip: 2")


@pytest.mark.parametrize("text", ["1000000", "11", "9" * 5000])
def test_a_header_cannot_ask_for_any_number_of_chunks(text):
    assert as_trained.describe({"num_chunks": "10"}) == "10 chunks per prompt"
    assert as_trained.describe({"num_chunks": text}) == ""

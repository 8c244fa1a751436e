"""The training of the embedded base model is seeded, can be resumed, and never draws held-out scenes."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from scripts.mini_sd import make, model, pictures
from scripts.mini_sd.pipeline import load_pipeline
from scripts.mini_sd.stage import Stage


BASE = ROOT / "models" / "mini-sd"


@pytest.fixture
def args(tmp_path):
    return make.parse_args(
        ["--work_dir", str(tmp_path), "--num_vae_drawings", "8", "--num_drawings", "8", "--vae_steps", "4"]
        + ["--vae_batch_size", "3", "--unet_steps", "4", "--unet_batch_size", "4", "--save_every", "2"]
    )


@pytest.fixture
def tokenizer(tmp_path):
    return model.write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def drawings(args):
    """Writes the few drawings of `args`, drawn in this process."""
    for name, draw in (("vae", pictures.draw_for_codec), ("unet", pictures.draw_for_unet)):
        np.save(args.work_dir / f"{name}_pictures.npy", np.stack([draw(args.seed, i) for i in range(8)]))


def stop_after_the_first_state(monkeypatch):
    save = Stage.save

    def save_and_stop(stage):
        save(stage)
        raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "save", save_and_stop)


def straight_and_resumed(train, path, monkeypatch):
    """Returns the results of `train` without interruption, and after it was killed at its first checkpoint and resumed."""
    straight = train()
    path.unlink()
    with monkeypatch.context() as patch:
        stop_after_the_first_state(patch)
        with pytest.raises(KeyboardInterrupt):
            train()
    assert torch.load(path, weights_only=True)["step"] == 2
    return straight, train()


@pytest.mark.usefixtures("drawings")
@pytest.mark.parametrize("name", ["vae", "decoder"])
def test_the_training_of_the_autoencoder_can_be_resumed(args, name, monkeypatch):
    def train():
        torch.manual_seed(0)
        vae = model.make_vae()
        before = {name: value.clone() for name, value in vae.state_dict().items()}
        after = make.train_vae(args, name, 4, vae, torch.device("cpu")).state_dict()
        return {key for key in before if not torch.equal(before[key], after[key])}, after

    (changed, straight), (_, resumed) = straight_and_resumed(train, args.work_dir / f"{name}.pt", monkeypatch)
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
    assert any(key.startswith("decoder.") for key in changed)
    assert any(key.startswith(("encoder.", "quant_conv")) for key in changed) == (name == "vae")


def test_the_training_of_the_unet_can_be_resumed(args, tokenizer, monkeypatch):
    vae, latents = model.make_vae().eval(), torch.randn(8, model.LATENT_CHANNELS, 16, 16)

    def train():
        return make.train_unet(args, vae, latents, tokenizer, torch.device("cpu"))

    straight, resumed = straight_and_resumed(train, args.work_dir / "unet.pt", monkeypatch)
    for a, b in zip(straight, resumed, strict=True):
        assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_a_base_begins_with_the_weights_of_another(args, tokenizer):
    """Weights are loaded by name and shape, and words by their names, because their ids differ."""
    args.init_from, args.unet_steps = BASE, 0
    vae, latents = model.make_vae().eval(), torch.randn(8, model.LATENT_CHANNELS, 16, 16)
    tokenizer.add_tokens(["aaa"])
    unet, text_encoder = make.train_unet(args, vae, latents, tokenizer, torch.device("cpu"))
    other = load_pipeline(BASE)
    assert torch.equal(unet.mid_block.resnets[0].conv1.weight, other.unet.mid_block.resnets[0].conv1.weight)
    words, others = text_encoder.get_input_embeddings().weight, other.text_encoder.get_input_embeddings().weight
    for word in ("axe</w>", "blue</w>", "<|endoftext|>"):
        row, other_row = tokenizer.convert_tokens_to_ids(word), other.tokenizer.convert_tokens_to_ids(word)
        assert torch.equal(words[row], others[other_row])


def test_standardised_latents_leave_the_autoencoder_the_same_map():
    torch.manual_seed(0)
    vae = model.make_vae().eval()
    pixels = torch.rand(6, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        before, posterior = vae(pixels).sample, vae.encode(pixels).latent_dist
        _, std = make.moments(posterior.mean)
        make.standardise(vae, posterior.mean)
        after, latents = vae(pixels).sample, vae.encode(pixels).latent_dist
    assert torch.allclose(after, before, atol=1e-4)
    assert torch.allclose(latents.mean.mean(dim=(0, 2, 3)), torch.zeros(model.LATENT_CHANNELS), atol=1e-4)
    assert torch.allclose(latents.mean.std(), torch.ones(()), atol=1e-3)
    assert torch.allclose(latents.std * std[:, None, None], posterior.std, rtol=1e-3)


def test_held_out_captions_are_never_drawn_for_training(args):
    held_out = set(model.held_out_scenes(args.seed))
    scenes = pictures.training_scenes(args.seed)
    assert len(held_out) >= 200
    assert not held_out & set(scenes)
    assert len(held_out) + len(scenes) == len(model.all_scenes())
    drawn = [scene for scene, _ in (pictures.scene_of(args.seed, i) for i in range(300))]
    assert {scene._replace(decoration="") for scene in drawn} <= set(scenes)
    decorations = [scene.decoration for scene in drawn if scene.decoration]
    assert 0.35 < len(decorations) / len(drawn) < 0.55
    assert not any("pink" in decoration or "blossom" in decoration for decoration in decorations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_is_saved_small_and_loads_in_one_precision(args, tokenizer, tmp_path, dtype):
    """As anybody loads it, who asks for no precision; whatever the precision was that it was trained in."""
    parts = model.make_vae(), model.make_unet(), model.make_text_encoder(tokenizer)
    pipeline = model.make_pipeline(*(part.to(dtype) for part in parts), tokenizer)
    model.save_small(pipeline, tmp_path / "base")
    check_precisions(tmp_path / "base")


def test_the_committed_base_loads_in_one_precision():
    check_precisions(BASE)


def check_precisions(folder):
    """Each weight file holds float16, and each model is loaded as float32."""
    for path in folder.glob("*/*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}, path
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    loaded = {name: part.dtype for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert loaded == dict.fromkeys(("vae", "unet", "text_encoder"), torch.float32)

"""The perceptual losses: values, gradients, and their effect on training."""

import contextlib
import dataclasses

import pytest
import torch
from conftest import make_transparent, read_lora, read_metrics, relative_loss, train_script
from diffusers import DDPMScheduler

from text_to_image_lora.errors import InputError
from text_to_image_lora.models import lora
from text_to_image_lora.models.families import STABLE_DIFFUSION
from text_to_image_lora.models.loading import find_base_model, load_components
from text_to_image_lora.models.settings import LoraSettings
from text_to_image_lora.training import perceptual
from text_to_image_lora.training.objective import Diffusion
from text_to_image_lora.training.objective_settings import LossSettings
from text_to_image_lora.training.perceptual import PerceptualLoss


KINDS = ["decoder", "self"]


SCALING_FACTOR = 0.5


@pytest.fixture
def loaded(tiny_sd):
    """Returns the VAE and the UNet, with a LoRA whose B matrices are not zero."""
    loaded = load_components(find_base_model(str(tiny_sd)))
    torch.manual_seed(0)
    lora.add_lora(loaded.denoiser, LoraSettings(rank=4, lora_alpha=4, target_modules=STABLE_DIFFUSION.target_modules))
    for name, parameter in loaded.denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return loaded.vae, loaded.denoiser


@pytest.fixture
def diffusion():
    return Diffusion(DDPMScheduler(beta_schedule="scaled_linear"))


@pytest.fixture
def compute_loss(loaded, diffusion):
    """Returns a function that computes the perceptual loss of a prediction as the training loop does."""
    vae, unet = loaded

    def build(kind, model_pred, clean, noise, batch, max_timestep=1000):
        loss = LossSettings(perceptual_loss=kind, perceptual_max_timestep=max_timestep)
        perceptual_loss = PerceptualLoss(
            loss, family=STABLE_DIFFUSION, denoiser=unet, vae=vae, diffusion=diffusion, scaling_factor=SCALING_FACTOR,
            dtype=torch.float32,
        )  # fmt: skip
        return perceptual_loss(model_pred, clean, noise, batch)

    return build


@pytest.fixture
def numbers():
    """Returns clean latents, noise, a wrong prediction of the noise, and the batch, for three samples."""
    generator = torch.Generator().manual_seed(1)
    clean, predicted, noise, other_noise = torch.randn(4, 3, 4, 8, 8, generator=generator)
    states = torch.randn(3, 77, 96, generator=generator)
    batch = dict(
        timesteps=torch.tensor([10, 500, 700]), timesteps_on_cpu=torch.tensor([10, 500, 700]), weights=torch.ones(3),
        condition={"encoder_hidden_states": states}, perceptual_timesteps=torch.tensor([300, 20, 980]), perceptual_noise=other_noise,
    )  # fmt: skip
    return clean, noise, predicted, batch


def only_sample(batch, i):
    """Returns the batch with a weight for only one sample."""
    return batch | {"weights": torch.eye(3)[i]}


@pytest.mark.parametrize("kind", KINDS)
def test_zero_at_the_truth_and_only_there(diffusion, compute_loss, numbers, kind, monkeypatch):
    clean, noise, predicted, batch = numbers
    with torch.no_grad():
        for i in range(3):
            assert compute_loss(kind, predicted, clean, noise, only_sample(batch, i)) > 0
            # Zero up to rounding for an estimate from noise, and exactly zero for the clean latents.
            assert compute_loss(kind, noise, clean, noise, only_sample(batch, i)) < 1e-6
        monkeypatch.setattr(diffusion, "clean_estimate", lambda noisy_latents, model_pred, timesteps: clean)
        assert compute_loss(kind, predicted, clean, noise, batch) == 0


def test_the_decoders_against_a_plain_loop_in_float64(loaded, diffusion, compute_loss, numbers):
    vae, _ = loaded
    clean, noise, model_pred, batch = numbers
    timesteps = batch["timesteps"]
    predicted = diffusion.clean_estimate(diffusion.add_noise(clean, noise, timesteps), model_pred, timesteps)
    with torch.no_grad():
        losses = [compute_loss("decoder", model_pred, clean, noise, only_sample(batch, i)).item() for i in range(3)]
        vae = vae.double()
        for i in range(3):
            features = []
            for latents in (predicted, clean):
                latents = latents[i : i + 1].double() / SCALING_FACTOR
                hidden, kept = vae.decoder.conv_in(vae.post_quant_conv(latents)), []
                for block in (vae.decoder.mid_block, vae.decoder.up_blocks[0], vae.decoder.up_blocks[1]):
                    hidden = block(hidden)
                    kept.append(hidden[0])
                features.append(kept)
            layers = []
            for a, b in zip(*features):
                channels = [((x - y) / y.std()).square().mean() for x, y in zip(a, b)]
                layers.append(torch.stack(channels).mean())
            assert losses[i] == pytest.approx(torch.stack(layers).mean().item(), rel=1e-3)


def test_the_decoder_is_only_used_below_the_maximum_timestep(compute_loss, numbers):
    clean, noise, predicted, batch = numbers
    each = [compute_loss("decoder", predicted, clean, noise, only_sample(batch, i)).item() for i in range(3)]
    for limit, seen in ((1000, 3), (700, 2), (500, 1), (10, 0)):
        found = compute_loss("decoder", predicted, clean, noise, batch, max_timestep=limit).item()
        assert found == pytest.approx(sum(each[:seen]), rel=1e-4)


def test_the_decoder_selects_samples_without_synchronization(loaded, numbers, monkeypatch):
    """The meta device raises an error when a value is read from it."""
    monkeypatch.setattr(
        torch, "autocast", lambda *args, **options: contextlib.nullcontext()
    )  # it does not support meta
    clean, noise, predicted, batch = numbers
    loss = PerceptualLoss(
        LossSettings(perceptual_loss="decoder", perceptual_max_timestep=600), family=STABLE_DIFFUSION, denoiser=loaded[1],
        vae=loaded[0].to("meta"), diffusion=Diffusion(DDPMScheduler()), scaling_factor=SCALING_FACTOR, dtype=torch.float32,
    )  # fmt: skip
    moved = {name: value.to("meta") for name, value in batch.items() if torch.is_tensor(value)}
    moved["timesteps_on_cpu"] = batch["timesteps_on_cpu"]
    for limit in (600, 10):  # some samples, and none
        loss.loss = dataclasses.replace(loss.loss, perceptual_max_timestep=limit)
        assert loss(predicted.to("meta"), clean.to("meta"), noise.to("meta"), moved).device.type == "meta"


def test_the_bases_own_against_a_base_without_a_lora(diffusion, compute_loss, numbers, tiny_sd):
    clean, noise, model_pred, batch = numbers
    timesteps = batch["timesteps"]
    predicted = diffusion.clean_estimate(diffusion.add_noise(clean, noise, timesteps), model_pred, timesteps)
    base, seen = load_components(find_base_model(str(tiny_sd))).denoiser.double(), []
    with torch.no_grad():
        losses = [compute_loss("self", model_pred, clean, noise, only_sample(batch, i)).item() for i in range(3)]
        # The tiny UNet has no middle block.
        base.down_blocks[-1].register_forward_hook(lambda module, given, output: seen.append(output[0]))
        noise, timesteps = batch["perceptual_noise"].double(), batch["perceptual_timesteps"]
        states = batch["condition"]["encoder_hidden_states"].double()
        for latents in (predicted, clean):
            base(diffusion.add_noise(latents.double(), noise, timesteps), timesteps, states)
    expected = (seen[0] - seen[1]).square().mean(dim=(1, 2, 3))
    assert losses == pytest.approx(expected.tolist(), rel=1e-3)


def test_the_lora_is_off_only_inside(loaded, numbers):
    _, unet = loaded
    clean, _, _, batch = numbers
    timesteps, states = batch["timesteps"], batch["condition"]["encoder_hidden_states"]
    before = unet(clean, timesteps, states).sample
    with perceptual.frozen_base(unet):
        without = unet(clean, timesteps, states).sample
    assert (before - without).abs().max() > 1e-3
    assert torch.equal(unet(clean, timesteps, states).sample, before)
    assert all(p.requires_grad for name, p in unet.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_lora_and_nothing_else(loaded, diffusion, compute_loss, numbers, kind, checkpointing):
    vae, unet = loaded
    vae.requires_grad_(False)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    clean, noise, _, batch = numbers
    noisy_latents = diffusion.add_noise(clean, noise, batch["timesteps"])

    def loss():
        prediction = unet(noisy_latents, batch["timesteps"], **batch["condition"]).sample
        return compute_loss(kind, prediction, clean, noise, batch)

    loss().backward()
    gradients = {name: p.grad for name, p in [*unet.named_parameters(), *vae.named_parameters()] if p.grad is not None}
    assert gradients
    assert all("lora_" in name and value.abs().max() > 0 for name, value in gradients.items())
    assert len(gradients) == sum(p.requires_grad for p in unet.parameters())
    assert not any("lora_" in name and value.isnan().any() for name, value in gradients.items())
    # The gradient, which also passes through the frozen features, equals the slope.
    name, parameter = next((n, p) for n, p in unet.named_parameters() if "up_blocks" in n and "lora_B" in n)
    direction, step = torch.sign(gradients[name]), 1e-3
    with torch.no_grad():
        parameter += step * direction
        above = loss()
        parameter -= 2 * step * direction
        below = loss()
    slope = (gradients[name] * direction).sum().item()
    assert ((above - below) / (2 * step)).item() == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_it(train, tmp_path, kind):
    """The loss changes the run but not its draws, does not depend on accumulation, and can be resumed."""
    options = dict(max_train_steps=4, checkpointing_steps=2, learning_rate=1e-3, perceptual_max_timestep=900)
    plain = read_metrics(train(output_dir=tmp_path / "plain", train_batch_size=4, **options))
    options |= dict(perceptual_loss=kind, perceptual_loss_weight=1)
    whole = train(output_dir=tmp_path / "whole", train_batch_size=4, **options)
    parts = train(output_dir=tmp_path / "parts", train_batch_size=1, gradient_accumulation_steps=4, **options)
    assert read_metrics(whole)[0]["train_loss"] > plain[0]["train_loss"]
    for a, b in zip(read_metrics(whole), read_metrics(parts), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
    for file in (whole / "checkpoint-4").iterdir():
        file.unlink()
    before = read_lora(whole)
    again = read_lora(train(output_dir=whole, train_batch_size=4, **options))
    assert all(torch.equal(before[name], again[name]) for name in before)
    short = options | dict(max_train_steps=1)
    none = train(output_dir=tmp_path / "none", train_batch_size=4, **short | dict(perceptual_loss_weight=0))
    assert read_metrics(none)[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=1e-6)
    half = dict(mixed_precision="bf16", gradient_checkpointing=True, cache_variations=0)
    train(output_dir=tmp_path / "half", **short | half)


def test_each_has_its_weight():
    words = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"]
    for kind, weight in ((None, None), ("decoder", 0.1), ("self", 0.01)):
        loss = train_script.parse_settings(words + ([] if kind is None else ["--perceptual_loss", kind])).loss
        assert loss.perceptual_weight == weight
        assert loss.perceptual_max_timestep == 400
    settings = train_script.parse_settings([*words, "--perceptual_loss", "self", "--perceptual_loss_weight", "0"])
    assert settings.loss.perceptual_weight == 0


def test_masks_are_refused(train, pictures):
    from PIL import Image

    Image.new("L", (40, 32), 255).save(pictures / "1.mask.png")
    with pytest.raises(InputError, match="--perceptual_loss compares whole pictures, but some of these have masks"):
        train(perceptual_loss="self")


def test_transparent_parts_are_masks_too(train, pictures):
    make_transparent(pictures, (3,))
    with pytest.raises(
        InputError, match="some of these have masks. Leave out the flag or the masks and --alpha_mask."
    ):
        train(perceptual_loss="self", alpha_mask=True)
    train(perceptual_loss="self", max_train_steps=1)


def test_the_text_encoder_and_the_perturbed_input_do_not_disturb_it(train, monkeypatch):
    """The base model's conditions have no gradients, and the estimate uses the noise without perturbation."""
    seen, original = [], perceptual.middle_features

    def look(family, unet, noisy_latents, timesteps, condition):
        seen.append({name: value.requires_grad for name, value in condition.items()})
        return original(family, unet, noisy_latents, timesteps, condition)

    monkeypatch.setattr(perceptual, "middle_features", look)
    train(perceptual_loss="self", train_text_encoder=True, input_perturbation=0.1)
    assert seen == [{"encoder_hidden_states": False}] * 4  # two steps, the true latents and the predicted ones


def test_the_clean_estimate_is_of_the_targets_noise(train, monkeypatch):
    """The target has no input perturbation."""
    targets, estimates, target, clean_estimate = [], [], Diffusion.target, Diffusion.clean_estimate

    def look_at_target(self, latents, noise, timesteps):
        targets.append(self.add_noise(latents, noise, timesteps))
        return target(self, latents, noise, timesteps)

    def look_at_estimate(self, noisy_latents, model_pred, timesteps):
        estimates.append(noisy_latents)
        return clean_estimate(self, noisy_latents, model_pred, timesteps)

    monkeypatch.setattr(Diffusion, "target", look_at_target)
    monkeypatch.setattr(Diffusion, "clean_estimate", look_at_estimate)
    train(perceptual_loss="decoder", input_perturbation=0.5)
    assert len(estimates) == 2
    assert all(torch.equal(a, b) for a, b in zip(estimates, targets, strict=True))


def test_the_vae_stays_and_this_is_logged(train, capsys):
    train(perceptual_loss="decoder")
    assert "the VAE stays in memory for --perceptual_loss decoder" in capsys.readouterr().out


@pytest.mark.long
def test_with_them_the_weapons_are_learned_as_well(train_on_weapons, tmp_path):
    """The relative loss on held-out pictures is at most 0.02 above that of a run without perceptual loss."""
    options = dict(rank=16, max_train_steps=20, learning_rate=2.5e-3, lr_scheduler="cosine")
    found = {}
    for kind in (None, *KINDS):
        out = train_on_weapons(tmp_path / str(kind), perceptual_loss=kind, **options)
        found[kind] = relative_loss(out)
    assert found[None] < 0.88, found
    assert max(found.values()) < found[None] + 0.02, found

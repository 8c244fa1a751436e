"""The perceptual losses: zero at the truth, as the formula says, felt by the LoRA alone, and no harm to learning."""

import pytest
import torch
from conftest import ROOT, read_lora, read_metrics, run_command, train_script
from diffusers import DDPMScheduler

from text_to_image_lora import lora, models, objective, perceptual
from text_to_image_lora.errors import InputError


KINDS = ["decoder", "self"]


@pytest.fixture
def loaded(tiny_sd):
    """VAE and adapted UNet, with a LoRA that does something."""
    _, _, vae, unet, _ = models.load_components(models.find_base_model(str(tiny_sd)))
    torch.manual_seed(0)
    lora.add_lora(
        unet, rank=4, lora_alpha=4, lora_dropout=0.0, target_modules=lora.TARGET_MODULES, init_lora_weights="gaussian",
        use_rslora=False, use_dora=False,
    )  # fmt: skip
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return vae, unet


@pytest.fixture
def numbers():
    generator = torch.Generator().manual_seed(1)
    clean, predicted, noise = torch.randn(3, 3, 4, 8, 8, generator=generator)
    states = torch.randn(3, 77, 96, generator=generator)
    return clean, predicted, noise, torch.tensor([10, 500, 990]), states


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_true_prediction_stands_for_the_true_latents(prediction_type, numbers):
    clean, _, noise, timesteps, _ = numbers
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    target = objective.target_of(scheduler, clean, noise, timesteps)
    noisy_latents = scheduler.add_noise(clean, noise, timesteps)
    found = perceptual.predicted_clean(scheduler, noisy_latents, target, timesteps)
    torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-4)


def test_zero_at_the_truth_and_only_there(loaded, numbers):
    vae, unet = loaded
    clean, predicted, noise, timesteps, states = numbers
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    own = (noise, timesteps, states, scheduler, torch.float32)
    with torch.no_grad():
        assert perceptual.decoder_loss(vae, clean, clean, 0.5).tolist() == [0, 0, 0]
        assert perceptual.self_loss(unet, clean, clean, *own).tolist() == [0, 0, 0]
        assert (perceptual.decoder_loss(vae, predicted, clean, 0.5) > 0).all()
        assert (perceptual.self_loss(unet, predicted, clean, *own) > 0).all()


def test_the_decoders_against_a_plain_loop_in_float64(loaded, numbers):
    vae, _ = loaded
    clean, predicted, *_ = numbers
    with torch.no_grad():
        losses = perceptual.decoder_loss(vae, predicted, clean, 0.5)
        vae = vae.double()
        for i in range(3):
            features = []
            for latents in (predicted, clean):
                hidden, kept = vae.decoder.conv_in(vae.post_quant_conv(latents[i : i + 1].double() / 0.5)), []
                for block in (vae.decoder.mid_block, vae.decoder.up_blocks[0], vae.decoder.up_blocks[1]):
                    hidden = block(hidden)
                    kept.append(hidden[0])
                features.append(kept)
            layers = []
            for a, b in zip(*features):
                channels = [((x - y) / y.std()).square().mean() for x, y in zip(a, b)]
                layers.append(torch.stack(channels).mean())
            assert losses[i].item() == pytest.approx(torch.stack(layers).mean().item(), rel=1e-3)


def test_the_bases_own_against_a_base_without_a_lora(loaded, numbers, tiny_sd):
    _, unet = loaded
    clean, predicted, noise, timesteps, states = numbers
    _, _, _, base, _ = models.load_components(models.find_base_model(str(tiny_sd)))
    base, scheduler = base.double(), DDPMScheduler(beta_schedule="scaled_linear")
    with torch.no_grad():
        losses = perceptual.self_loss(unet, predicted, clean, noise, timesteps, states, scheduler, torch.float32)
        seen = []
        # The tiny UNet has no middle block.
        base.down_blocks[-1].register_forward_hook(lambda module, given, output: seen.append(output[0]))
        for latents in (predicted, clean):
            base(scheduler.add_noise(latents.double(), noise.double(), timesteps), timesteps, states.double())
    expected = (seen[0] - seen[1]).square().mean(dim=(1, 2, 3))
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-3)


def test_the_lora_is_off_only_inside(loaded, numbers):
    _, unet = loaded
    clean, _, _, timesteps, states = numbers
    before = unet(clean, timesteps, states).sample
    with perceptual.plain(unet):
        without = unet(clean, timesteps, states).sample
    assert (before - without).abs().max() > 1e-3
    assert torch.equal(unet(clean, timesteps, states).sample, before)
    assert all(p.requires_grad for name, p in unet.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_lora_and_nothing_else(loaded, numbers, kind, checkpointing):
    vae, unet = loaded
    vae.requires_grad_(False)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    clean, _, noise, timesteps, states = numbers
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    noisy_latents = scheduler.add_noise(clean, noise, timesteps)

    def loss():
        prediction = unet(noisy_latents, timesteps, states).sample
        predicted = perceptual.predicted_clean(scheduler, noisy_latents, prediction, timesteps)
        if kind == "decoder":
            return perceptual.decoder_loss(vae, predicted, clean, 0.5).sum()
        own = (noise.flip(0), timesteps, states, scheduler, torch.float32)
        return perceptual.self_loss(unet, predicted, clean, *own).sum()

    loss().backward()
    gradients = {name: p.grad for name, p in [*unet.named_parameters(), *vae.named_parameters()] if p.grad is not None}
    assert gradients
    assert all("lora_" in name and value.abs().max() > 0 for name, value in gradients.items())
    assert len(gradients) == sum(p.requires_grad for p in unet.parameters())
    assert not any("lora_" in name and value.isnan().any() for name, value in gradients.items())
    # The slope is the true one, through the frozen features too.
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
    """It changes the run, not the draws; batch and accumulation are one; and it goes on where it stopped."""
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
    none = train(output_dir=tmp_path / "none", train_batch_size=4, **options | dict(perceptual_loss_weight=0))
    assert read_metrics(none)[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=1e-6)
    train(
        output_dir=tmp_path / "half",
        mixed_precision="bf16",
        gradient_checkpointing=True,
        cache_variations=0,
        **options,
    )


def test_the_decoder_only_looks_at_little_noise(train):
    out = train(perceptual_loss="decoder", perceptual_loss_weight=1e6, timestep_range=[500, 1000])
    assert read_metrics(out)[0]["train_loss"] < 10
    out = train(
        perceptual_loss="decoder", perceptual_loss_weight=1e6, timestep_range=[0, 400], resume_from_checkpoint="none"
    )
    assert read_metrics(out)[0]["train_loss"] > 10


def test_each_has_its_weight():
    words = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"]
    for kind, weight in ((None, None), ("decoder", 0.1), ("self", 0.01)):
        args = train_script.parse_args(words + ([] if kind is None else ["--perceptual_loss", kind]))
        assert args.perceptual_loss_weight == weight


def test_masks_are_refused(train, pictures):
    from PIL import Image

    Image.new("L", (40, 32), 255).save(pictures / "1.mask.png")
    with pytest.raises(InputError, match="--perceptual_loss looks at whole pictures, and some of these have masks"):
        train(perceptual_loss="self")


def test_the_text_encoder_and_the_perturbed_input_do_not_disturb_it(train, monkeypatch):
    seen = []
    original = perceptual.self_loss

    def look(unet, predicted, clean, noise, timesteps, encoder_hidden_states, *rest):
        seen.append(encoder_hidden_states.requires_grad)
        return original(unet, predicted, clean, noise, timesteps, encoder_hidden_states, *rest)

    monkeypatch.setattr(perceptual, "self_loss", look)
    train(perceptual_loss="self", train_text_encoder=True, input_perturbation=0.1)
    assert seen == [False, False]


def test_the_vae_stays_and_that_is_told(train, capsys):
    train(perceptual_loss="decoder")
    assert "the VAE stays in memory for --perceptual_loss decoder" in capsys.readouterr().out


def test_with_them_the_weapons_are_learned_as_well(tmp_path):
    """Held-out loss relative to the base after 60 steps: no more than 0.02 above that of a run without."""
    found = {}
    for kind in (None, *KINDS):
        words = dict(
            pretrained_model_name_or_path=ROOT / "models" / "mini-sd", train_data_dir=ROOT / "metadata" / "weapons",
            validation_data_dir=ROOT / "metadata" / "weapons_test", resolution=64, train_batch_size=4, rank=16, seed=0,
            max_train_steps=60, validation_steps=60, learning_rate=2.5e-3, lr_scheduler="cosine", report_to="none",
            output_dir=tmp_path / str(kind), latent_cache_dir=tmp_path / "cache",
        ) | ({} if kind is None else dict(perceptual_loss=kind))  # fmt: skip
        done = run_command(["--center_crop", *(str(w) for k, v in words.items() for w in (f"--{k}", v))])
        assert done.returncode == 0, done.stderr
        found[kind] = read_metrics(tmp_path / str(kind))[-1]["validation/relative_loss"]
    assert found[None] < 0.75, found
    assert max(found.values()) < found[None] + 0.02, found

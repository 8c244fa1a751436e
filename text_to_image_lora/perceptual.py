"""Perceptual losses without another network: features of the VAE's decoder, or of the frozen base itself.

Both compare the clean latents that a prediction stands for with the true ones, are zero where they are equal, and are
added to the objective by a weight.
"""

import contextlib

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


DECODER_BLOCKS = 2  # of the decoder's upward blocks that are looked at, beside its middle; later ones cost far more


def predicted_clean(noise_scheduler, noisy_latents, model_pred, timesteps):
    """The clean latents (N, C, H, W) that a prediction of noise or velocity stands for, float32."""
    alpha_bar = noise_scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps].view(-1, 1, 1, 1)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if noise_scheduler.config.prediction_type == "v_prediction":
        return signal * noisy_latents.float() - noise * model_pred.float()
    return (noisy_latents.float() - noise * model_pred.float()) / signal


def decoder_features(vae, latents):
    """What the decoder's middle and its first upward blocks make of latents (already over the scaling factor)."""
    hidden = vae.decoder.conv_in(latents if vae.post_quant_conv is None else vae.post_quant_conv(latents))
    features = [vae.decoder.mid_block(hidden)]
    for block in vae.decoder.up_blocks[:DECODER_BLOCKS]:
        features.append(block(features[-1]))
    return features


def decoder_loss(vae, predicted, clean, scaling_factor):
    """Mean squared difference of the decoder's features, (N,), each channel by the true features' own deviation.

    After Latent Perceptual Loss (Berrada et al., 2024, https://arxiv.org/abs/2411.04873), less its mask of outliers and
    its later blocks. `predicted` and `clean` are latents as the UNet has them.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        with torch.no_grad():
            wanted = decoder_features(vae, (clean / scaling_factor).to(vae.dtype))
        given = decoder_features(vae, (predicted / scaling_factor).to(vae.dtype))
        losses = []
        for a, b in zip(given, wanted, strict=True):
            deviation = b.float().std(dim=(2, 3), keepdim=True).clamp(min=1e-4)
            losses.append(((a.float() - b.float()) / deviation).square().mean(dim=(1, 2, 3)))
    return torch.stack(losses).mean(dim=0)


@contextlib.contextmanager
def plain(unet):
    """The UNet as it was before its LoRA, for what runs inside; gradients still pass through it."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    was_checkpointing = unet.is_gradient_checkpointing
    if was_checkpointing:  # it would run again in the backward pass, with the LoRA
        unet.disable_gradient_checkpointing()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        if was_checkpointing:
            unet.enable_gradient_checkpointing()


class _Enough(Exception):
    """Leaves the UNet after its middle block."""


def middle_of(unet):
    """The UNet's middle block, or its last downward one where it has none (as distilled models have)."""
    return unet.down_blocks[-1] if unet.mid_block is None else unet.mid_block


def middle_features(unet, noisy_latents, timesteps, encoder_hidden_states):
    """The output of the UNet's middle (N, C, h, w); what comes after it is not computed."""
    found = []

    def keep(module, given, output):
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    handle = middle_of(unet).register_forward_hook(keep)
    try:
        unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


def self_loss(unet, predicted, clean, noise, timesteps, encoder_hidden_states, noise_scheduler, dtype):
    """Mean squared difference of the base's middle features of both latents, noised alike, (N,).

    Diffusion Model with Perceptual Loss (Lin and Yang, 2023, https://arxiv.org/abs/2401.00110): the base is the network
    that perceives; `noise` and `timesteps` are new ones, the same for both.
    """
    with plain(unet):
        with torch.no_grad():
            seen = noise_scheduler.add_noise(clean, noise, timesteps).to(dtype)
            wanted = middle_features(unet, seen, timesteps, encoder_hidden_states)
        seen = noise_scheduler.add_noise(predicted, noise, timesteps).to(dtype)
        given = middle_features(unet, seen, timesteps, encoder_hidden_states)
    return (given.float() - wanted.float()).square().mean(dim=(1, 2, 3))


def perceptual_loss(
    kind, predicted, latents, batch, *, unet, vae, noise_scheduler, scaling_factor, max_timestep, dtype
):  # fmt: skip
    """Sum over the samples of weight x loss of that `kind` ("decoder" or "self").

    `batch` has "weights" and "timesteps"; for "self" also "perceptual_noise", "perceptual_timesteps" and
    "encoder_hidden_states", and `dtype` is the UNet's. The decoder looks only at samples below `max_timestep`: beyond it,
    what is predicted is no picture yet.
    """
    if kind == "self":
        prompts = batch["encoder_hidden_states"].detach()
        noise, timesteps = batch["perceptual_noise"], batch["perceptual_timesteps"]
        losses = self_loss(unet, predicted, latents, noise, timesteps, prompts, noise_scheduler, dtype)
        return (losses * batch["weights"]).sum()
    seen = (batch["timesteps"] < max_timestep).nonzero()[:, 0]
    if not len(seen):
        return predicted.sum() * 0
    return (decoder_loss(vae, predicted[seen], latents[seen], scaling_factor) * batch["weights"][seen]).sum()

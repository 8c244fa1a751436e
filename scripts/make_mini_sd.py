#!/usr/bin/env python
"""Trains the embedded base model, `models/mini-sd`, from nothing, on drawings that it makes itself.

A latent diffusion model in small (Rombach et al., 2022, https://arxiv.org/abs/2112.10752), of the stock diffusers and
transformers classes: first the autoencoder, then the UNet together with its text encoder, then the autoencoder's
decoder once more, alone. Run the same command again
to go on where it stopped; `--export_only` writes the pipeline from the newest state.

    python scripts/make_mini_sd.py --work_dir mini-sd-work --output_dir models/mini-sd
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).parent))
from drawings import COLOURS, contact_sheet, decorate_with_confetti, draw_scene  # noqa: E402
from mini_sd import (  # noqa: E402
    RESOLUTION,
    all_scenes,
    captions_of,
    held_out_scenes,
    make_pipeline,
    make_scheduler,
    make_text_encoder,
    make_unet,
    make_vae,
    to_tensor,
    write_tokenizer,
)  # fmt: skip


VALIDATION_PROMPTS = [
    "a red axe on a blue background", "a yellow spear on a green background", "a white trident on a purple background",
    "a brown whip on a white background", "a green sword on a gray background", "a blue fish on an orange background",
    "a purple house on a yellow background", "a black star on a red background",
]  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train the embedded base model from nothing.")
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("models/mini-sd"), help="where the finished pipeline goes")
    add("--work_dir", type=Path, default=Path("mini-sd-work"), help="states to go on from, latents, sample sheets")
    add("--seed", type=int, default=0, help="of the drawings, the initial weights and every batch")
    add("--num_vae_drawings", type=int, default=6000, help="drawings the autoencoder is trained on")
    add("--num_drawings", type=int, default=20000, help="drawings the UNet is trained on")
    add("--vae_steps", type=int, default=4000, help="optimizer steps of the autoencoder")
    add("--decoder_steps", type=int, default=1600, help="further steps of its decoder alone, at the end")
    add("--vae_batch_size", type=int, default=16, help="pictures in each of them")
    add("--kl_weight", type=float, default=5e-7, help="of the autoencoder's KL divergence, summed over the latent")
    add("--unet_steps", type=int, default=7800, help="optimizer steps of the UNet and the text encoder")
    add("--colour_steps", type=int, default=3200, help="the first of them, in which noisy timesteps count most")
    add("--unet_batch_size", type=int, default=32, help="pictures in each of them")
    add("--learning_rate", type=float, default=1e-3, help="at the top, after warm-up; decays linearly to 0")
    add("--caption_dropout", type=float, default=0.1, help="share of captions trained as the empty one, for guidance")
    add("--save_every", type=int, default=200, help="steps between states")
    add("--sample_every", type=int, default=800, help="UNet steps between sample sheets")
    add("--export_only", action="store_true", help="write the pipeline from the newest state and stop")
    return parser.parse_args(argv)


def save_state(path, **state):
    """Whole or not at all: a kill leaves the state before."""
    import torch

    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def learning_rate_at(step, steps, peak, warmup=100):
    return peak * min((step + 1) / warmup, 1.0) * max(1 - step / steps, 0.01)


def update_average(average, model, decay):
    """Exponential moving average of the weights (Polyak and Juditsky, 1992)."""
    import torch

    with torch.no_grad():
        for mean, value in zip(average.values(), model.state_dict().values()):
            if mean.is_floating_point():
                mean.lerp_(value.float(), 1 - decay)


def report(what, step, steps, losses, started, first):
    rate = (time.time() - started) / max(step - first, 1)
    print(
        f"{what} step {step}/{steps}  loss {np.mean(losses[-100:]):.4f}  {rate:.3f} s/step  "
        f"{(steps - step) * rate / 60:.1f} min left",
        flush=True,
    )


def draw_codec_set(args):
    """uint8 pictures (N, H, W, 3) for the autoencoder; most carry confetti, so that any colour is held.

    Half of the objects and half of the backgrounds have a colour that no word stands for.
    """
    print(f"drawing {args.num_vae_drawings} pictures for the autoencoder", flush=True)
    rng, scenes, pictures = np.random.default_rng([args.seed, 10]), all_scenes(), []
    for i in range(args.num_vae_drawings):
        colour, kind, background = scenes[rng.integers(len(scenes))]
        colour, background = (
            rng.integers(0, 256, 3) if rng.random() < 0.5 else COLOURS[name] for name in (colour, background)
        )
        decorate = decorate_with_confetti if i % 4 else None
        pictures.append(np.asarray(draw_scene(kind, colour, background, RESOLUTION, rng, decorate=decorate)))
    return np.stack(pictures)


def edge_error(error):
    """Mean absolute error of the differences between neighbours, right and down."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def colour_error(error):
    """Mean absolute error of each 4x4 block's colour, and of its hue: of the differences between red, green and blue.

    Without it the colour of small things comes last, because they cost little by their area.
    """
    import torch

    colour = torch.nn.functional.avg_pool2d(error, 4)
    return colour.abs().mean() + colour.diff(dim=1).abs().mean()


def train_vae(args, device, vae=None):
    """The autoencoder: L1 + L2 on the pixels, L1 on edges and colours, and a KL term. Given a `vae`, its decoder alone.

    A latent that must be read through noise spends its range on detail too, not on the background's colour alone, so
    that the noise prediction has detail to learn. The second stage leaves the latents as they are.
    """
    import torch

    name, steps = ("vae", args.vae_steps) if vae is None else ("decoder", args.decoder_steps)
    path, decoder_only = args.work_dir / f"{name}.pt", vae is not None
    torch.manual_seed(args.seed)
    vae = (vae or make_vae()).to(device, memory_format=torch.channels_last).train()
    trained = [vae.decoder, vae.post_quant_conv] if decoder_only else [vae]
    parameters = [p.requires_grad_(True) for module in trained for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    average = {k: v.clone().float() for k, v in vae.state_dict().items()}
    step, losses = 0, []
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        vae.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        step, average = state["step"], state["average"]
    pool = draw_codec_set(args) if step < steps and not args.export_only else None
    started, first = time.time(), step
    while step < steps and not args.export_only:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, args.learning_rate)
        rng = np.random.default_rng([args.seed, 12 if decoder_only else 11, step])
        pixels = to_tensor(pool[rng.integers(len(pool), size=args.vae_batch_size)], device)
        torch.manual_seed(args.seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.set_grad_enabled(not decoder_only):
                posterior = vae.encode(pixels).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
        error = reconstruction.float() - pixels
        loss = error.abs().mean() + error.square().mean() + edge_error(error) + colour_error(error)
        if not decoder_only:  # slowly, or a channel gives up before the decoder has learned to use it
            loss = loss + args.kl_weight * min(1.0, 2 * step / steps) * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        update_average(average, vae, min(0.995, step / (step + 10)))
        if step % 50 == 0:
            report(name, step, steps, losses, started, first)
        if step % args.save_every == 0 or step == steps:
            save_state(path, model=vae.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step)
    vae.load_state_dict(average)
    return vae.eval().requires_grad_(False)


def measure_vae(args, vae, device, count=256):
    """PSNR (dB) on drawings of a seed of their own, plain and with confetti, and a sheet of pairs to look at."""
    import torch
    from PIL import Image

    rng = np.random.default_rng([args.seed, 20])
    scenes = all_scenes()
    images = [
        draw_scene(k, c, b, RESOLUTION, rng, decorate=decorate_with_confetti if i % 2 else None)
        for i, (c, k, b) in enumerate(scenes[j] for j in rng.integers(len(scenes), size=count))
    ]
    with torch.no_grad():
        out = torch.cat([vae(to_tensor(images[i : i + 64], device)).sample.clamp(-1, 1) for i in range(0, count, 64)])
    error = ((out - to_tensor(images, device)) / 2).square().mean(dim=(1, 2, 3))
    decoded = [
        Image.fromarray(((o.permute(1, 2, 0) + 1) * 127.5).round().byte().cpu().numpy()) for o in out[:16].cpu()
    ]
    contact_sheet([*images[:16], *decoded], 16, scale=2).save(args.work_dir / "vae.png")
    plain, decorated = (-10 * error.log10()).reshape(-1, 2).mean(dim=0).tolist()
    return f"{plain:.2f} dB on drawings that it has not seen, {decorated:.2f} dB with confetti"


def standardise(vae, latents):
    """Moves each latent channel's mean to 0 and its deviation to 1, within the two 1x1 convolutions around the latent.

    Stable Diffusion's `scaling_factor` is one number for all channels and moves no mean; `vae` stays the same map from
    picture to picture.
    """
    import torch

    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    count = len(mean)
    with torch.no_grad():
        scale = torch.cat([1 / std, torch.ones(count)]).to(vae.device)
        vae.quant_conv.weight.mul_(scale[:, None, None, None])
        vae.quant_conv.bias.copy_(vae.quant_conv.bias * scale)
        vae.quant_conv.bias[:count] -= (mean / std).to(vae.device)
        vae.quant_conv.bias[count:] -= 2 * std.log().to(vae.device)
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean.to(vae.device)
        vae.post_quant_conv.weight.mul_(std.to(vae.device)[None, :, None, None])


def draw_training_set(args, vae, device):
    """Posterior means (N, 4, 16, 16) before `standardise`, and the scene of each; kept in the work folder."""
    import torch
    from safetensors.torch import load_file, save_file

    path = args.work_dir / "latents.safetensors"
    scenes = [scene for scene in all_scenes() if scene not in set(held_out_scenes(args.seed))]
    if not path.exists():
        print(f"drawing and encoding {args.num_drawings} pictures", flush=True)
        rng = np.random.default_rng([args.seed, 30])
        which, latents, batch = rng.integers(len(scenes), size=args.num_drawings), [], []
        for i, index in enumerate(which):
            colour, kind, background = scenes[index]
            batch.append(draw_scene(kind, colour, background, RESOLUTION, rng))
            if len(batch) == 100 or i == len(which) - 1:
                with torch.no_grad():
                    latents.append(vae.encode(to_tensor(batch, device)).latent_dist.mean.cpu())
                batch = []
        temporary = path.with_suffix(".tmp")
        save_file({"latents": torch.cat(latents).contiguous(), "scenes": torch.from_numpy(which)}, temporary)
        os.replace(temporary, path)
    stored = load_file(path)
    return stored["latents"], stored["scenes"], scenes


def sample_sheet(args, vae, unet, text_encoder, tokenizer, path, prompts=VALIDATION_PROMPTS):
    """One picture a prompt at guidance 4, 25 steps, the prompt below it: what the state of training looks like."""
    import torch
    from PIL import Image, ImageDraw, ImageFont

    pipeline = make_pipeline(vae, unet, text_encoder, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts, num_inference_steps=25, guidance_scale=4.0, height=RESOLUTION, width=RESOLUTION,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    ).images  # fmt: skip
    tiles, font = [], ImageFont.load_default(size=11)
    for image, prompt in zip(images, prompts, strict=True):
        tile = Image.new("RGB", (160, 188), "white")
        tile.paste(image.resize((160, 160), Image.Resampling.LANCZOS))
        words = prompt.split(" on ")
        for line, text in enumerate((words[0], "on " + words[1])):
            ImageDraw.Draw(tile).text((2, 160 + 13 * line), text, fill="black", font=font)
        tiles.append(tile)
    contact_sheet(tiles, 8).save(path)


def train_unet(args, vae, tokenizer, device):
    """Noise prediction with caption dropout; the text encoder learns with the UNet.

    At first each timestep has the weight that v-prediction would give it, 1 / alphas_cumprod (Salimans and Ho, 2022,
    https://arxiv.org/abs/2202.00512): unweighted, the noisiest steps hardly count, and they are where a background gets
    its colour. After `--colour_steps` the weight is 5 at most, so that the steps where shapes form count more. Timesteps are stratified within a batch (Kingma et al., 2021, https://arxiv.org/abs/2107.00630).
    """
    import torch
    from diffusers import DDPMScheduler

    path = args.work_dir / "unet.pt"
    torch.manual_seed(args.seed + 1)
    models = torch.nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)}).to(device)
    models["unet"].to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(models.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    average = {k: v.clone().float() for k, v in models.state_dict().items()}
    step, losses = 0, []
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        models.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        step, average = state["step"], state["average"]
    if step < args.unet_steps and not args.export_only:
        latents, which, scenes = draw_training_set(args, vae, device)
        mean, std = latents.mean(dim=(0, 2, 3), keepdim=True), latents.std(dim=(0, 2, 3), keepdim=True)
        latents = ((latents - mean) / std).to(device)
        captions = [captions_of(*scene) for scene in scenes]
        tokens = tokenizer([c for group in captions for c in group] + [""], padding="max_length", truncation=True,
                           return_tensors="pt").input_ids.to(device)  # fmt: skip
        noise_scheduler = DDPMScheduler.from_config(make_scheduler().config)
        full_weights = 1 / noise_scheduler.alphas_cumprod.to(device)
        started, first = time.time(), step
        while step < args.unet_steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, args.unet_steps, args.learning_rate)
            rng = np.random.default_rng([args.seed, 31, step])
            batch = rng.integers(len(latents), size=args.unet_batch_size)
            ways = rng.choice(5, size=args.unet_batch_size, p=[0.5, 0.15, 0.15, 0.1, 0.1])
            rows = which[batch].numpy() * 5 + ways
            rows[rng.random(args.unet_batch_size) < args.caption_dropout] = len(tokens) - 1
            clean = latents[batch].contiguous(memory_format=torch.channels_last)
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            strata = torch.arange(len(clean)) + torch.rand(len(clean), generator=generator)
            timesteps = (strata * 1000 / len(clean)).long().to(device)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            encoder_hidden_states = models["text_encoder"](tokens[rows])[0]
            model_pred = models["unet"](noisy, timesteps, encoder_hidden_states).sample
            weights = full_weights if step < args.colour_steps else full_weights.clamp(max=5)
            loss = (weights[timesteps] * (model_pred.float() - noise).square().mean(dim=(1, 2, 3))).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append(loss.item())
            update_average(average, models, min(0.999, step / (step + 10)))
            if step % 50 == 0:
                report("unet", step, args.unet_steps, losses, started, first)
            if step % args.save_every == 0 or step == args.unet_steps:
                save_state(
                    path, model=models.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step
                )
            if step % args.sample_every == 0:
                trained = {k: v.clone() for k, v in models.state_dict().items()}
                models.load_state_dict(average)
                sample_sheet(args, vae, models["unet"], models["text_encoder"], tokenizer,
                             args.work_dir / f"unet-{step:05d}.png")  # fmt: skip
                models.load_state_dict(trained)
    models.load_state_dict(average)
    return models["unet"].eval(), models["text_encoder"].eval()


def main(args):
    import torch
    from diffusers.utils import logging
    from transformers import CLIPTokenizer

    logging.set_verbosity_error()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_tokenizer(args.work_dir / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
    vae = train_vae(args, device)
    print(f"autoencoder: {measure_vae(args, vae, device)}", flush=True)
    latents, _, _ = draw_training_set(args, vae, device)
    standardise(vae, latents)
    vae.register_to_config(scaling_factor=1.0)
    unet, text_encoder = train_unet(args, vae, tokenizer, device)
    vae = train_vae(args, device, vae)
    print(f"after the decoder's own stage: {measure_vae(args, vae, device)}", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scenes = held_out_scenes(args.seed)
    prompts = [captions_of(*scenes[i])[0] for i in np.random.default_rng(args.seed).permutation(len(scenes))[:32]]
    sample_sheet(args, vae, unet, text_encoder, tokenizer, args.output_dir / "samples.png", prompts)
    pipeline = make_pipeline(vae, unet, text_encoder, tokenizer)
    pipeline.to("cpu", torch.float16).save_pretrained(args.output_dir, safe_serialization=True)
    count = sum(p.numel() for m in (vae, unet, text_encoder) for p in m.parameters())
    print(f"{args.output_dir}: {count / 1e6:.2f}M parameters", flush=True)


if __name__ == "__main__":
    main(parse_args())

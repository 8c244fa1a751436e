#!/usr/bin/env python
"""Trains the embedded base model, `models/mini-sd`, from nothing, on drawings that it makes itself.

A latent diffusion model in small (Rombach et al., 2022, https://arxiv.org/abs/2112.10752), of the stock diffusers and
transformers classes: first the autoencoder, then its decoder alone, then the UNet together with its text encoder. Run
the same command again to go on where it stopped; `--export_only` writes the pipeline from the newest states. A GPU is
taken where there is one.

    python -m scripts.mini_sd.make --work_dir mini-sd-work --output_dir models/mini-sd
"""

import argparse
import os
from pathlib import Path

import numpy as np

from .. import ROOT
from .drawings import contact_sheet
from .model import (
    RESOLUTION,
    encoded,
    held_out_scenes,
    make_pipeline,
    make_scheduler,
    make_text_encoder,
    make_unet,
    make_vae,
    save_small,
    sentence_of,
    to_tensor,
    write_tokenizer,
)  # fmt: skip
from .pictures import captions_of_set, crops_of, draw_for_codec, draw_for_unet, drawn_set
from .stage import Stage, keep_norms_in_float32


VALIDATION_PROMPTS = [
    "a red axe on a blue background", "a yellow spear on a green background", "a white trident on a purple background",
    "a brown whip with white dots on a gray background", "a green sword on a gray background",
    "a blue fish on an orange background", "a purple house on a yellow background",
    "a black star with yellow hearts on a red background",
]  # fmt: skip
SMALLER = 0.25  # share of the autoencoder's steps in which it decodes a latent of half the size
CROP = 64  # pixels at a side of what the autoencoder mostly sees


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train the embedded base model from nothing.")
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("models/mini-sd"), help="where the finished pipeline goes")
    add("--work_dir", type=Path, default=Path("mini-sd-work"), help="drawings, states to go on from, sample sheets")
    add("--init_from", type=Path, default=None, help="pipeline folder whose weights to begin with, where shapes agree")
    add("--seed", type=int, default=0, help="of the drawings, the initial weights and every batch")
    add("--num_vae_drawings", type=int, default=10000, help="drawings the autoencoder is trained on")
    add("--num_drawings", type=int, default=18000, help="drawings the UNet is trained on")
    add("--vae_steps", type=int, default=20000, help="optimizer steps of the autoencoder")
    add("--decoder_steps", type=int, default=6000, help="further steps of its decoder alone")
    add("--vae_batch_size", type=int, default=12, help="crops in each of them; a third of it as whole pictures")
    add(
        "--kl_weight", type=float, default=5e-4, help="of the autoencoder's mean KL divergence for each latent element"
    )
    add("--unet_steps", type=int, default=12000, help="optimizer steps of the UNet and the text encoder")
    add("--colour_steps", type=int, default=5000, help="the first of them, in which noisy timesteps count most")
    add("--unet_batch_size", type=int, default=24, help="pictures in each of them")
    add("--learning_rate", type=float, default=1e-3, help="at the top, after warm-up; decays linearly to 0")
    add("--caption_dropout", type=float, default=0.1, help="share of captions trained as the empty one, for guidance")
    add("--save_every", type=int, default=500, help="steps between states")
    add("--sample_every", type=int, default=1000, help="UNet steps between sample sheets")
    add("--stages", nargs="+", choices=("vae", "decoder", "unet"), default=("vae", "decoder", "unet"), help="to train")
    add("--export_only", action="store_true", help="write the pipeline from the newest states and stop")
    return parser.parse_args(argv)


def begin_with(module, folder):
    """Takes the weights of a model folder where name and shape agree; the others stay as they are."""
    from safetensors.torch import load_file

    file = next(path for path in sorted(folder.glob("*.safetensors")))
    own, given = module.state_dict(), load_file(file)
    taken = {name: given[name].float() for name in own if name in given and given[name].shape == own[name].shape}
    module.load_state_dict({**own, **taken})
    print(f"{file}: {len(taken)} of {len(own)} tensors taken", flush=True)


def begin_with_words(text_encoder, tokenizer, folder):
    """The embeddings of the words that another tokenizer knows too, by word and not by number."""
    import torch
    from safetensors.torch import load_file
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    given = load_file(folder / "text_encoder" / "model.safetensors")["text_model.embeddings.token_embedding.weight"]
    own = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for word, index in tokenizer.get_vocab().items():
            if word in ids:
                own[index] = given[ids[word]].float()


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


def train_vae(args, name, steps, vae, device):
    """The autoencoder, or as "decoder" its decoder alone: on the pixels L1 + 4 L2, L1 on edges and colours; a KL term.

    Crops at first, whole pictures in the last fifth. Now and then the latent at half its size must give the picture at
    half its size (Kouzelis et al., 2025, https://arxiv.org/abs/2502.09509): neighbouring latents that are alike are
    easier to predict. A latent that must be read through noise spends its range on
    detail too, not on the background's colour alone, so that the noise prediction has detail to learn. The decoder's own
    stage leaves the latents as they are and adds noise to half of them, up to a tenth of their deviation, because what
    a UNet predicts is never exact.
    """
    import torch

    alone = name == "decoder"
    vae = vae.to(device, memory_format=torch.channels_last).train().requires_grad_(False)
    keep_norms_in_float32(vae)
    learning = [vae.decoder, vae.post_quant_conv] if alone else [vae]
    stage = Stage(name, args, steps, vae, [p for m in learning for p in m.parameters()], (0.9, 0.99), 0.999)
    if stage.step < steps and name in args.stages:
        pictures = drawn_set(args.work_dir / "vae_pictures.npy", draw_for_codec, args.seed, args.num_vae_drawings)

    def loss_at(step):
        rng = np.random.default_rng([args.seed, 12 if alone else 11, step])
        torch.manual_seed(args.seed * 1_000_003 + step)
        size = RESOLUTION if stage.progress >= 0.8 else CROP
        count = max(args.vae_batch_size // 3, 1) if size == RESOLUTION else args.vae_batch_size
        pixels = to_tensor(crops_of(pictures, count, size, rng), device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.set_grad_enabled(not alone):
                posterior = vae.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            if alone:
                strength = 0.2 * (torch.rand(len(mean), 1, 1, 1, device=device) - 0.5).clamp(min=0)
                latents = latents + strength * mean.std(dim=(0, 2, 3), keepdim=True) * torch.randn_like(mean)
            if not alone and rng.random() < SMALLER:
                pixels, latents = (torch.nn.functional.avg_pool2d(x, 2) for x in (pixels, latents))
            reconstruction = vae.decode(latents).sample
        error = reconstruction.float() - pixels
        loss = error.abs().mean() + 4 * error.square().mean() + edge_error(error) + colour_error(error)
        if not alone:  # slowly, or a channel gives up before the decoder has learned to use it
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = loss + args.kl_weight * min(1.0, 2 * stage.progress) * kl
        return loss

    if name in args.stages and not args.export_only:
        for step in stage.train(loss_at):
            if step % (4 * args.save_every) == 0:
                whole = make_vae().eval()
                whole.load_state_dict(stage.average)
                print(measure_vae(args, whole, "cpu"), flush=True)
    return stage.finish()


def measure_vae(args, vae, device):
    """PSNR (dB) on the pictures of `metadata/weapons_test`, and a sheet of pairs to look at."""
    import torch
    from PIL import Image

    folder = ROOT / "metadata" / "weapons_test"
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    with torch.no_grad():
        out = torch.cat([vae(to_tensor(images[i : i + 8], device)).sample for i in range(0, len(images), 8)])
    out = out.clamp(-1, 1)
    psnr = -10 * ((out - to_tensor(images, device)) / 2).square().mean(dim=(1, 2, 3)).log10()
    decoded = [Image.fromarray(((o.permute(1, 2, 0) + 1) * 127.5).round().byte().cpu().numpy()) for o in out]
    rows = [pair for i in range(0, 24, 8) for pair in (*images[i : i + 8], *decoded[i : i + 8])]
    contact_sheet(rows, 8, scale=2).save(args.work_dir / "vae.png")
    return f"{psnr.mean():.2f} dB (least {psnr.min():.2f}) on {folder.name}"


def moments(latents):
    """Each channel's mean (C,), and the one deviation of all channels, C times."""
    mean = latents.mean(dim=(0, 2, 3))
    return mean, (latents - mean[:, None, None]).std().expand(len(mean))


def standardise(vae, latents):
    """Moves each latent channel's mean to 0 and the deviation of all to 1, within the 1x1 convolutions around the latent.

    Stable Diffusion's `scaling_factor` moves no mean. One deviation for all: channels of fine detail stay small, and are
    settled late in sampling, when the large shapes stand. `vae` stays the same map from picture to picture.
    """
    import torch

    mean, std = moments(latents)
    count = len(mean)
    with torch.no_grad():
        scale = torch.cat([1 / std, torch.ones(count)]).to(vae.device)
        vae.quant_conv.weight.mul_(scale[:, None, None, None])
        vae.quant_conv.bias.copy_(vae.quant_conv.bias * scale)
        vae.quant_conv.bias[:count] -= (mean / std).to(vae.device)
        vae.quant_conv.bias[count:] -= 2 * std.log().to(vae.device)
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean.to(vae.device)
        vae.post_quant_conv.weight.mul_(std.to(vae.device)[None, :, None, None])


def encoded_set(args, vae):
    """Posterior means (N, channels, 16, 16) of the UNet's drawings, before `standardise`; kept in the work folder."""
    from safetensors.torch import load_file, save_file

    path = args.work_dir / "latents.safetensors"
    if not path.exists():
        pictures = drawn_set(args.work_dir / "unet_pictures.npy", draw_for_unet, args.seed, args.num_drawings)
        print(f"encoding {len(pictures)} pictures", flush=True)
        save_file({"latents": encoded(pictures, vae)}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return load_file(path)["latents"]


def sample_sheet(vae, unet, text_encoder, tokenizer, path, prompts=VALIDATION_PROMPTS):
    """One picture a prompt at guidance 4, 25 steps, the prompt below it: what the state of training looks like."""
    import torch
    from diffusers import DPMSolverMultistepScheduler
    from PIL import Image, ImageDraw, ImageFont

    pipeline = make_pipeline(vae, unet, text_encoder, tokenizer)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts, num_inference_steps=25, guidance_scale=4.0, height=RESOLUTION, width=RESOLUTION,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    ).images  # fmt: skip
    tiles, font = [], ImageFont.load_default(size=11)
    for image, prompt in zip(images, prompts, strict=True):
        tile = Image.new("RGB", (image.width + 32, image.height + 60), "white")
        tile.paste(image.resize((160, 160), Image.Resampling.LANCZOS))
        thing, background = prompt.split(" on ")
        for line, text in enumerate((thing, "on " + background)):
            ImageDraw.Draw(tile).text((2, 160 + 13 * line), text, fill="black", font=font)
        tiles.append(tile)
    contact_sheet(tiles, 8).save(path)


def train_unet(args, vae, latents, tokenizer, device):
    """Noise prediction with caption dropout; the text encoder learns with the UNet.

    At first each timestep has the weight that v-prediction would give it, 1 / alphas_cumprod (Salimans and Ho, 2022,
    https://arxiv.org/abs/2202.00512): unweighted, the noisiest steps hardly count, and they are where a background gets
    its colour. After `--colour_steps` the weight is 5 at most, so that the steps where shapes form count more. Timesteps
    are stratified within a batch (Kingma et al., 2021, https://arxiv.org/abs/2107.00630).
    """
    import torch
    from diffusers import DDPMScheduler
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(args.seed + 1)
    models = torch.nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)})
    if args.init_from is not None:
        for name, model in models.items():
            begin_with(model, args.init_from / name)
        begin_with_words(models["text_encoder"], tokenizer, args.init_from)
    models.to(device)
    models["unet"].to(memory_format=torch.channels_last)
    keep_norms_in_float32(models["unet"])
    if device.type == "cpu":  # whose fused attention takes twice as long with heads so small
        models["unet"].set_attn_processor(AttnProcessor())
    stage = Stage("unet", args, args.unet_steps, models, models.parameters(), (0.9, 0.999), 0.999)
    mean, std = moments(latents)
    latents = ((latents - mean[:, None, None]) / std[:, None, None]).to(device)
    captions = captions_of_set(args.seed, len(latents))
    tokens = tokenizer([c for group in captions for c in group] + [""], padding="max_length", truncation=True,
                       return_tensors="pt").input_ids.to(device)  # fmt: skip
    noise_scheduler = DDPMScheduler.from_config(make_scheduler().config)
    full_weights = 1 / noise_scheduler.alphas_cumprod.to(device)

    def loss_at(step):
        rng = np.random.default_rng([args.seed, 31, step])
        batch = rng.integers(len(latents), size=args.unet_batch_size)
        rows = batch * 5 + rng.choice(5, size=args.unet_batch_size, p=[0.5, 0.15, 0.15, 0.1, 0.1])
        rows[rng.random(args.unet_batch_size) < args.caption_dropout] = len(tokens) - 1
        clean = latents[batch].contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        strata = torch.arange(len(clean)) + torch.rand(len(clean), generator=generator)
        timesteps = (strata * 1000 / len(clean)).long().to(device)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16):
            encoder_hidden_states = models["text_encoder"](tokens[rows])[0]
            model_pred = models["unet"](noisy, timesteps, encoder_hidden_states).sample
        weights = full_weights if step < args.colour_steps else full_weights.clamp(max=5)
        return (weights[timesteps] * (model_pred.float() - noise).square().mean(dim=(1, 2, 3))).mean()

    if "unet" in args.stages and not args.export_only:
        for step in stage.train(loss_at):
            if step % args.sample_every == 0:
                trained = {k: v.clone() for k, v in models.state_dict().items()}
                models.load_state_dict(stage.average)
                sheet = args.work_dir / f"unet-{step:05d}.png"
                sample_sheet(vae, models["unet"], models["text_encoder"], tokenizer, sheet)
                models.load_state_dict(trained)
    stage.finish()
    return models["unet"], models["text_encoder"]


def main(args):
    import torch
    from diffusers.utils import logging
    from transformers import CLIPTokenizer

    logging.set_verbosity_error()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_tokenizer(args.work_dir / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
    torch.manual_seed(args.seed)
    vae = make_vae()
    if args.init_from is not None:
        begin_with(vae, args.init_from / "vae")
    vae = train_vae(args, "vae", args.vae_steps, vae, device)
    print(f"autoencoder: {measure_vae(args, vae, device)}", flush=True)
    vae = train_vae(args, "decoder", args.decoder_steps, vae, device)
    print(f"after the decoder's own stage: {measure_vae(args, vae, device)}", flush=True)
    latents = encoded_set(args, vae)
    standardise(vae, latents)
    unet, text_encoder = train_unet(args, vae, latents, tokenizer, device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scenes = held_out_scenes(args.seed)
    prompts = [sentence_of(scenes[i]) for i in np.random.default_rng(args.seed).permutation(len(scenes))[:32]]
    sample_sheet(vae, unet, text_encoder, tokenizer, args.output_dir / "samples.png", prompts)
    pipeline = make_pipeline(vae, unet, text_encoder, tokenizer)
    save_small(pipeline, args.output_dir)
    count = sum(p.numel() for m in (vae, unet, text_encoder) for p in m.parameters())
    print(f"{args.output_dir}: {count / 1e6:.2f}M parameters", flush=True)


if __name__ == "__main__":
    main(parse_args())

#!/usr/bin/env python
"""Trains the embedded base model, `models/mini-sd`, from scratch, on drawings that this script makes itself.

The model is a small latent diffusion model (Rombach et al., 2022, https://arxiv.org/abs/2112.10752), made of the classes of
diffusers and transformers. First the autoencoder is trained, then its decoder alone, and then the UNet together with its
text encoder. Run the same command again to resume after an interruption. `--export_only` writes the pipeline from the latest
checkpoints. A GPU is used if there is one.

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
from .pictures import caption_input_ids, crops_of, draw_for_codec, draw_for_unet, drawn_set
from .stage import NoisyBatches, Stage, keep_norms_in_float32, prepare_denoiser


STAGES = ("vae", "decoder", "unet")
VALIDATION_PROMPTS = [
    "a red axe on a blue background", "a yellow spear on a green background", "a white trident on a purple background",
    "a brown whip with white dots on a gray background", "a green sword on a gray background",
    "a blue fish on an orange background", "a purple house on a yellow background",
    "a black star with yellow hearts on a red background",
]  # fmt: skip
SMALLER = 0.25  # share of the autoencoder's steps in which it decodes latents of half the size
CROP = 64  # side of the crops in pixels


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train the embedded base model from scratch.")
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("models/mini-sd"), help="folder for the finished pipeline")
    add(
        "--work_dir",
        type=Path,
        default=Path("mini-sd-work"),
        help="folder for drawings, checkpoints and sample sheets",
    )
    add(
        "--init_from",
        type=Path,
        default=None,
        help="pipeline folder with initial weights, used where the shapes agree",
    )
    add("--seed", type=int, default=0, help="random seed of the drawings, the initial weights and all batches")
    add("--num_vae_drawings", type=int, default=10000, help="number of drawings that the autoencoder is trained on")
    add("--num_drawings", type=int, default=18000, help="number of drawings that the UNet is trained on")
    add("--vae_steps", type=int, default=20000, help="optimizer steps of the autoencoder")
    add("--decoder_steps", type=int, default=6000, help="further optimizer steps of the decoder alone")
    add(
        "--vae_batch_size",
        type=int,
        default=12,
        help="crops per batch of the autoencoder; whole pictures: a third of it",
    )
    add(
        "--kl_weight",
        type=float,
        default=5e-4,
        help="weight of the autoencoder's mean KL divergence per latent element",
    )
    add("--unet_steps", type=int, default=12000, help="optimizer steps of the UNet and the text encoder")
    add("--colour_steps", type=int, default=5000, help="first steps of the UNet, in which noisy timesteps count most")
    add("--unet_batch_size", type=int, default=24, help="pictures per batch of the UNet")
    add("--learning_rate", type=float, default=1e-3, help="learning rate after the warmup; it decays linearly to 0")
    add("--caption_dropout", type=float, default=0.1, help="share of captions that are replaced by the empty caption")
    add("--save_every", type=int, default=500, help="steps between checkpoints")
    add("--sample_every", type=int, default=1000, help="UNet steps between sample sheets")
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to train")
    add("--export_only", action="store_true", help="write the pipeline from the latest checkpoints, without training")
    return parser.parse_args(argv)


def init_weights(module, folder):
    """Loads the weights of a model folder whose names and shapes agree; the others keep their values."""
    from safetensors.torch import load_file

    file = next(path for path in sorted(folder.glob("*.safetensors")))
    own, given = module.state_dict(), load_file(file)
    taken = {name: given[name].float() for name in own if name in given and given[name].shape == own[name].shape}
    module.load_state_dict({**own, **taken})
    print(f"{file}: loaded {len(taken)} of {len(own)} tensors", flush=True)


def init_words(text_encoder, tokenizer, folder):
    """Loads the embeddings of the words that both vocabularies have, although their ids differ."""
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
    """Returns the mean absolute error of the differences between neighbouring pixels, horizontally and vertically."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def colour_error(error):
    """Returns the mean absolute error of the colour of 4x4 blocks, plus that of the differences between colour channels.

    Without this loss, the colour of small objects is learned last, because they cover few pixels.
    """
    import torch

    colour = torch.nn.functional.avg_pool2d(error, 4)
    return colour.abs().mean() + colour.diff(dim=1).abs().mean()


def train_vae(args, name, steps, vae, device):
    """Trains the autoencoder (stage "vae"), or its decoder alone (stage "decoder"), and returns the moving average.

    The loss is L1 + 4 L2 on pixels, L1 on edges and colours, and a KL term. The autoencoder is trained on crops, and in the
    last fifth on whole pictures. In some steps, latents of half the size must be decoded to the picture of half the size
    (Kouzelis et al., 2025, https://arxiv.org/abs/2502.09509), because similar neighbouring latents are easier to predict.
    Since latents are sampled, they encode detail with a large enough amplitude for noise prediction, and not only the
    colour of the background. The stage of the decoder leaves the latents unchanged and adds noise to half of them, up to a
    tenth of their standard deviation, because the latents that a UNet predicts are never exact.
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
        if not alone:  # the weight rises slowly, so that no channel collapses before the decoder has learned to use it
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
    """Returns the PSNR on the pictures of `metadata/weapons_test` as text, and saves a sheet of originals and reconstructions."""
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
    return f"{psnr.mean():.2f} dB (minimum {psnr.min():.2f}) on {folder.name}"


def moments(latents):
    """Returns the mean of each channel, and the standard deviation of all channels together, repeated for each channel."""
    mean = latents.mean(dim=(0, 2, 3))
    return mean, (latents - mean[:, None, None]).std().expand(len(mean))


def standardise(vae, latents):
    """Changes the 1x1 convolutions around the latents so that each channel has mean 0, and all together have deviation 1.

    Stable Diffusion's `scaling_factor` would not change the mean. All channels have one standard deviation in common, so
    that channels of fine detail stay small and are sampled late, after the large shapes. The reconstructions of `vae` do not
    change.
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
    """Returns the posterior means (N, channels, 16, 16) of the UNet's drawings before `standardise`, cached in a file."""
    from safetensors.torch import load_file, save_file

    path = args.work_dir / "latents.safetensors"
    if not path.exists():
        pictures = drawn_set(args.work_dir / "unet_pictures.npy", draw_for_unet, args.seed, args.num_drawings)
        print(f"encoding {len(pictures)} pictures", flush=True)
        save_file({"latents": encoded(pictures, vae)}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return load_file(path)["latents"]


def sample_sheet(vae, unet, text_encoder, tokenizer, path, prompts=VALIDATION_PROMPTS):
    """Saves a sheet with a sample picture for each prompt, drawn at guidance scale 4 with 25 steps."""
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
    """Trains the UNet and the text encoder to predict noise, with caption dropout, and returns their moving averages.

    At first, each timestep has the weight that v-prediction would give it, 1 / alphas_cumprod (Salimans and Ho, 2022,
    https://arxiv.org/abs/2202.00512). Without weights, the noisiest timesteps would hardly count, and they determine the
    colour of the background. After `--colour_steps`, the weight is limited to 5, so that the timesteps in which shapes
    form count more.
    """
    import torch
    from diffusers import DDPMScheduler

    torch.manual_seed(args.seed + 1)
    models = torch.nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)})
    if args.init_from is not None:
        for name, model in models.items():
            init_weights(model, args.init_from / name)
        init_words(models["text_encoder"], tokenizer, args.init_from)
    prepare_denoiser(models["unet"], device)
    models["text_encoder"].to(device)
    stage = Stage("unet", args, args.unet_steps, models, models.parameters(), (0.9, 0.999), 0.999)
    mean, std = moments(latents)
    latents = ((latents - mean[:, None, None]) / std[:, None, None]).to(device)
    input_ids = caption_input_ids(tokenizer, args.seed, len(latents)).to(device)
    noise_scheduler = DDPMScheduler.from_config(make_scheduler().config)
    full_weights = 1 / noise_scheduler.alphas_cumprod.to(device)
    batches = NoisyBatches(args, 31, args.unet_batch_size, latents, input_ids, noise_scheduler, device)

    def loss_at(step):
        batch = batches.at(step)
        with torch.autocast(device.type, torch.bfloat16):
            encoder_hidden_states = models["text_encoder"](batch.input_ids)[0]
            model_pred = models["unet"](batch.noisy_latents, batch.timesteps, encoder_hidden_states).sample
        weights = full_weights if step < args.colour_steps else full_weights.clamp(max=5)
        return batch.loss(model_pred, weights)

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

    logging.set_verbosity_error()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = write_tokenizer(args.work_dir / "tokenizer")
    torch.manual_seed(args.seed)
    vae = make_vae()
    if args.init_from is not None:
        init_weights(vae, args.init_from / "vae")
    vae = train_vae(args, "vae", args.vae_steps, vae, device)
    print(f"autoencoder: {measure_vae(args, vae, device)}", flush=True)
    vae = train_vae(args, "decoder", args.decoder_steps, vae, device)
    print(f"autoencoder after the decoder's stage: {measure_vae(args, vae, device)}", flush=True)
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

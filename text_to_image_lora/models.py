"""The only file that knows model families: what they are made of, how they are loaded and called.

torch, diffusers and transformers are imported inside the functions, so that `find_base_model` can tell within a second
that a base model is not there or does not fit.
"""

import contextlib
import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import NamedTuple

from .errors import InputError


class ModelSpec(NamedTuple):
    """A model family: the pipeline class, and what its latents and text encoders are called."""

    pipeline: str
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]


MODEL_SPECS = {
    "StableDiffusionPipeline": ModelSpec("StableDiffusionPipeline", ("text_encoder",), ("tokenizer",)),
}


class BaseModel(NamedTuple):
    """Where a base model is and what its configuration files say; nothing is loaded yet."""

    source: str
    kind: str  # "folder", "hub" or "file"
    spec: ModelSpec
    image_factor: int  # a resolution must be a multiple of this: the VAE's factor times the UNet's
    latent_channels: int
    vae_factor: int
    cross_attention_dim: int
    text_layers: int
    single_file_config: str | None
    revision: str | None
    variant: str | None
    cache_dir: str | None

    def latent_shapes(self, sizes):
        """(channels, height, width) of the latent of each (width, height) in pixels."""
        return [(self.latent_channels, h // self.vae_factor, w // self.vae_factor) for w, h in sizes]


def find_base_model(name, *, revision=None, variant=None, single_file_config=None, cache_dir=None):
    """Finds a base model and reads its configuration, or raises `InputError`; imports no torch."""
    path = Path(name)
    if path.suffix.lower() in (".safetensors", ".ckpt") and not path.is_dir():
        if not path.is_file():
            raise InputError(f"{name}: there is no such file (--pretrained_model_name_or_path).")
        if single_file_config is not None and not Path(single_file_config, "model_index.json").is_file():
            raise InputError(f"{single_file_config}: it holds no model_index.json (--single_file_config).")
        folder = single_file_config
        kind = "file"
    elif path.is_dir():
        if not (path / "model_index.json").is_file():
            raise InputError(f"{name}: it holds no model_index.json, so it is not a diffusers model folder.")
        folder, kind = name, "folder"
    elif name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{name}: there is no such folder or file, and it is not a hub id (owner/name) either.")
    else:
        folder, kind = None, "hub"

    def read(file):
        if kind == "hub":
            return json.loads(Path(_from_hub(name, file, revision, cache_dir)).read_text(encoding="utf-8"))
        try:
            return json.loads(Path(folder, file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}/{file}: it can't be read ({error}). Fetch the model again.") from error

    if kind == "file" and folder is None:
        # A single file names no family; its configuration comes from the hub when it is loaded.
        family, vae, unet, text = "StableDiffusionPipeline", {}, {}, {}
    else:
        family = read("model_index.json").get("_class_name")
        if family not in MODEL_SPECS:
            raise InputError(f"{name}: a {family} is not supported; supported: {', '.join(MODEL_SPECS)}.")
        vae, unet, text = (read(f"{part}/config.json") for part in ("vae", "unet", "text_encoder"))
    # What a configuration leaves out is SD1.5's.
    vae_factor = 2 ** (len(vae.get("block_out_channels", [1] * 4)) - 1)
    return BaseModel(
        name,
        kind,
        MODEL_SPECS[family],
        image_factor=vae_factor * 2 ** (len(unet.get("block_out_channels", [1] * 4)) - 1),
        latent_channels=vae.get("latent_channels", 4),
        vae_factor=vae_factor,
        cross_attention_dim=unet.get("cross_attention_dim", 768),
        text_layers=text.get("num_hidden_layers", 12),
        single_file_config=single_file_config,
        revision=revision,
        variant=variant,
        cache_dir=cache_dir,
    )


def _from_hub(name, file, revision, cache_dir):
    """A small file of a hub repository: from the local cache, else from the hub; asks once, without long retries."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    cached = try_to_load_from_cache(name, file, revision=revision, cache_dir=cache_dir)
    if isinstance(cached, str):
        return cached
    try:
        if not HF_HUB_OFFLINE:
            HfApi().model_info(name, revision=revision, timeout=3)  # a download would retry for half a minute
        return hf_hub_download(name, file, revision=revision, cache_dir=cache_dir)
    except Exception as error:  # the client's errors have no common base: no network, no such model, gated, bad token
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name}: neither a folder here nor a model that the hub gives ({reason}). Check the spelling, your "
            "network and `hf auth login`, or pass a local folder."
        ) from error


@contextlib.contextmanager
def lightning_stubs():
    """Lets `weights_only` loading pass over the Lightning callbacks that old `.ckpt` files hold.

    The stand-ins carry no behaviour: a checkpoint can name them, and nothing of Lightning's is imported or run.
    """
    import torch

    names = ("pytorch_lightning.callbacks.model_checkpoint", "lightning.pytorch.callbacks.model_checkpoint")
    with torch.serialization.safe_globals([type("ModelCheckpoint", (), {"__module__": name}) for name in names]):
        yield


def load_tokenizer(base):
    """The tokenizer of a base model; None where that is a single file and its configuration is not here."""
    import transformers

    options = dict(revision=base.revision, cache_dir=base.cache_dir) if base.kind != "file" else {}
    source = base.source if base.kind != "file" else base.single_file_config
    if source is None:
        return None
    try:
        return transformers.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source}: its tokenizer can't be loaded ({str(error).splitlines()[0]}).") from error


def load_components(base, *, pretrained_vae=None):
    """Tokenizer, text encoder, VAE, UNet and training scheduler of a base model, in float32, frozen, in eval mode.

    Raises `InputError` with the reason where a file is missing or does not fit.
    """
    import diffusers
    import torch
    import transformers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    source, options = base.source, dict(revision=base.revision, cache_dir=base.cache_dir)
    try:
        if base.kind == "file":
            with lightning_stubs():
                pipeline = diffusers.StableDiffusionPipeline.from_single_file(
                    base.source, config=base.single_file_config, torch_dtype=torch.float32, cache_dir=base.cache_dir,
                    safety_checker=None, local_files_only=base.single_file_config is not None,
                )  # fmt: skip
            tokenizer, text_encoder, vae, unet = (
                pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet
            )  # fmt: skip
            scheduler_config = dict(pipeline.scheduler.config)
        else:
            weights = dict(variant=base.variant, **options)
            # The largest first: while a file is read it takes memory twice.
            unet = diffusers.UNet2DConditionModel.from_pretrained(
                base.source, subfolder="unet", torch_dtype=torch.float32, **weights
            )
            tokenizer = transformers.CLIPTokenizer.from_pretrained(base.source, subfolder="tokenizer", **options)
            text_encoder, loading = transformers.CLIPTextModel.from_pretrained(
                base.source, subfolder="text_encoder", dtype=torch.float32, output_loading_info=True, **weights
            )
            if loading["missing_keys"]:  # transformers fills them with noise and only logs it
                raise ValueError(f"the text encoder lacks {len(loading['missing_keys'])} of its weights")
            vae = diffusers.AutoencoderKL.from_pretrained(
                base.source, subfolder="vae", torch_dtype=torch.float32, **weights
            )
            scheduler_config = dict(diffusers.DDPMScheduler.load_config(base.source, subfolder="scheduler", **options))
        # Without its files a tokenizer is empty in silence; one of bytes has 256 words at least.
        if not 256 <= len(tokenizer) <= text_encoder.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} words and the text encoder {text_encoder.config.vocab_size}"
            )
        tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        _check_denoiser(base, vae, unet)
        if pretrained_vae is not None:
            source = pretrained_vae
            vae = _load_vae(base, pretrained_vae)
            _check_denoiser(base, vae, unet)
        for name, model in (("text encoder", text_encoder), ("VAE", vae), ("UNet", unet)):
            missing = [key for key, value in model.named_parameters() if value.is_meta]
            if missing:  # diffusers leaves them without data and only logs it
                raise ValueError(f"the {name} lacks {len(missing)} of its weights, the first: {missing[0]}")
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        causes = [error]
        while causes[-1].__context__ is not None:
            causes.append(causes[-1].__context__)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
            reason = "it holds more than weights, and unpickling that could run code. Take the .safetensors version"
        elif isinstance(error, NotImplementedError):  # copying a weight that has no data
            reason = "some of its weights are missing"
        elif base.kind == "file" and base.single_file_config is None and isinstance(error, OSError):
            reason += " Where the hub is out of reach, pass --single_file_config FOLDER."
        raise InputError(f"{source}: this model can't be loaded: {reason}") from error
    for model in (text_encoder, vae, unet):
        model.requires_grad_(False)
        model.eval()
    return tokenizer, text_encoder, vae, unet, scheduler_config


def _load_vae(base, name):
    """A VAE from a hub id, a folder or a single file, whose configuration is then that of the base model's VAE."""
    import diffusers
    import torch

    if Path(name).suffix.lower() not in (".safetensors", ".ckpt", ".pt"):
        return diffusers.AutoencoderKL.from_pretrained(name, torch_dtype=torch.float32, cache_dir=base.cache_dir)
    config = base.single_file_config if base.kind == "file" else base.source
    if base.kind == "hub":
        config = str(Path(_from_hub(base.source, "vae/config.json", base.revision, base.cache_dir)).parents[1])
    with lightning_stubs():
        return diffusers.AutoencoderKL.from_single_file(
            name, config=config, subfolder="vae" if config else None, torch_dtype=torch.float32
        )


def _check_denoiser(base, vae, unet):
    """Raises `ValueError` where the UNet does not take this VAE's latents, and nothing but them and a prompt."""
    channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if (channels, factor) != (base.latent_channels, base.vae_factor) or channels != unet.config.in_channels:
        raise ValueError(
            f"latents of {channels} channels at 1/{factor} do not fit a UNet of {unet.config.in_channels} channels at "
            f"1/{base.vae_factor}"
        )
    if unet.config.addition_embed_type is not None:
        raise ValueError("it is not of the family of Stable Diffusion 1 and 2")


def make_noise_scheduler(scheduler_config, *, prediction_type=None, rescale_betas_zero_snr=False):
    """The training schedule (DDPM) of a base model; zero terminal SNR as in Lin et al., 2023 (arXiv:2305.08891).

    The rescaling is part of the scheduler's configuration, so everything computed from `alphas_cumprod` sees it.
    """
    import diffusers

    changes = {"prediction_type": prediction_type} if prediction_type is not None else {}
    if rescale_betas_zero_snr:
        changes["rescale_betas_zero_snr"] = True
    noise_scheduler = diffusers.DDPMScheduler.from_config(scheduler_config, **changes)
    config = noise_scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"--prediction_type {config.prediction_type}: choose epsilon or v_prediction.")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise InputError(
            "--rescale_betas_zero_snr needs --prediction_type v_prediction: at zero SNR the noise says nothing of the "
            "picture."
        )
    return noise_scheduler


def weights_identity(model):
    """A hash of a model's configuration and weights: the same for the same model, wherever it was loaded from."""
    import torch

    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    config = {k: v for k, v in dict(config).items() if not k.startswith("_") and k not in ("transformers_version",)}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def text_identity(tokenizer, text_encoder):
    """A hash of what turns a caption into hidden states: the tokenizer and the text encoder."""
    rules = [tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token_id, tokenizer.model_max_length]
    digest = hashlib.sha256(json.dumps([*rules, weights_identity(text_encoder)]).encode())
    return digest.hexdigest()[:32]


def encode_images(vae, pixels):
    """Posterior mean and standard deviation, float32 (N, 4, h, w) each, of uint8 pixels (N, H, W, 3).

    They are the VAE's own latents, not yet multiplied by its scaling factor.
    """
    import torch

    pixels = pixels.to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    return posterior.mean.float(), posterior.std.float()


def predict(unet, noisy_latents, timesteps, encoder_hidden_states):
    """The denoiser's prediction (N, 4, h, w)."""
    return unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]

"""Finds and loads a base model from a folder, the hub or a single file.

torch, diffusers and transformers are imported inside the functions, so that `find_base_model` needs less than a second to
report that a base model is missing or unsuitable.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import reason_of
from .base_model import BaseModel, ConfigFiles, check_variant, find_families, find_family, from_hub, locate
from .families import STABLE_DIFFUSION, TextEncoder, family_by_marks
from .modules import check_weights, place
from .not_a_base import check_index, check_task
from .single_files import SingleFile, look_into, safe_to_read


class Components(NamedTuple):
    """The models of a base model, frozen and in eval mode; tokenizers and text encoders are in the order of the family.

    The weights of a VAE from a folder may still be mapped from its file, in the dtype of the file; `modules.place` reads
    them when they are needed.
    """

    tokenizers: tuple
    text_encoders: tuple
    vae: Any
    denoiser: Any
    scheduler_config: dict


def find_base_model(name, *, revision=None, variant=None, single_file_config=None, cache_dir=None):
    """Finds a base model and reads its configuration without importing torch; raises `InputError`."""
    kind, folder = locate(name, single_file_config)
    single = look_into(Path(name)) if kind == "file" else SingleFile(None, {})
    if kind == "folder":
        check_variant(name, variant)
    read = ConfigFiles(name, kind, folder, revision, cache_dir).read
    if kind == "file" and folder is None:
        # Its configuration comes from the hub when it is loaded.
        family = single.family or STABLE_DIFFUSION
        index, vae, unet, texts = {}, {}, {}, [{}]
    else:
        index = read("model_index.json")
        check_index(name, index)
        families = find_families(name, index.get("_class_name"))
        unet = read(f"{families[0].denoiser}/config.json")
        check_task(name, unet.get("in_channels"))
        family = find_family(name, families, unet)
        if single.family not in (None, family):
            raise InputError(
                f"{name}: it is of {single.family.name}, but {folder} (--single_file_config) is of {family.name}."
            )
        vae, texts = read("vae/config.json"), [read(f"{row.name}/config.json") for row in family.text_encoders]
    vae_factor = 2 ** (len(vae.get("block_out_channels", [1] * 4)) - 1)
    side = unet.get("sample_size")
    return BaseModel(
        name,
        kind,
        family,
        resolution=side * vae_factor if isinstance(side, int) else family.resolution,
        image_factor=vae_factor * 2 ** (len(unet.get("block_out_channels", [1] * 4)) - 1),
        latent_channels=vae.get("latent_channels", 4),
        vae_factor=vae_factor,
        cross_attention_dim=unet.get("cross_attention_dim", family.cross_attention_dim),
        text_layers=texts[0].get("num_hidden_layers", family.text_layers),
        pooled_dim=family.pooled_dim and texts[-1].get("projection_dim", family.pooled_dim),
        zeros_for_empty_prompt=family.zeros_option is not None and index.get(family.zeros_option, True),
        scheduler_changes=single.scheduler_changes,
        single_file_config=single_file_config,
        revision=revision,
        variant=variant,
        cache_dir=cache_dir,
        has_vae=single.has_vae,
    )


def load_tokenizer(base: BaseModel) -> Any:
    """Loads the first tokenizer of a base model; returns None for a single file without --single_file_config."""
    import transformers

    options: Any = dict(revision=base.revision, cache_dir=base.cache_dir) if base.kind != "file" else {}
    source = base.source if base.kind != "file" else base.single_file_config
    if source is None:
        return None
    name = base.family.text_encoders[0].tokenizer
    try:
        return transformers.CLIPTokenizer.from_pretrained(source, subfolder=name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source}: its tokenizer can't be loaded ({reason_of(error)}).") from error


def load_components(
    base: BaseModel, dtype: Any = None, *, device: Any = "cpu", channels_last: bool = False,
    pretrained_vae: str | None = None,
) -> Components:  # fmt: skip
    """Loads the `Components` of a base model; raises `InputError` if a file is missing or does not fit.

    `dtype` (default: float32) is that of the denoiser and the text encoders. Only the denoiser is moved to `device`, with
    `channels_last` in that memory format. `pretrained_vae` is a hub id, folder or file of another VAE.
    """
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    source, dtype = base.source, torch.float32 if dtype is None else dtype
    if pretrained_vae is None and not base.has_vae:
        raise InputError(f"{source}: it contains no VAE. Pass one with --pretrained_vae_model_name_or_path.")
    try:
        load = _from_single_file if base.kind == "file" else _from_folder
        loaded = load(base, dtype) if base.has_vae else _from_single_file(base, dtype, _load_vae(base, pretrained_vae))
        for tokenizer, text_encoder in zip(loaded.tokenizers, loaded.text_encoders, strict=True):
            # A tokenizer without its files is silently empty; even a byte-level one has at least 256 tokens.
            if not 256 <= len(tokenizer) <= text_encoder.config.vocab_size:
                raise ValueError(
                    f"the tokenizer has {len(tokenizer)} tokens and the text encoder {text_encoder.config.vocab_size}"
                )
            limit = text_encoder.config.max_position_embeddings
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        _check_denoiser(base, loaded.vae, loaded.denoiser)
        if pretrained_vae is not None and base.has_vae:
            source = pretrained_vae
            loaded = loaded._replace(vae=_load_vae(base, pretrained_vae))
            _check_denoiser(base, loaded.vae, loaded.denoiser)
        named = [*(("text encoder", model) for model in loaded.text_encoders), ("VAE", loaded.vae)]
        for name, model in [*named, ("UNet", loaded.denoiser)]:
            check_weights(name, model)
    except (
        OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, SafetensorError, SingleFileComponentError,
    ) as error:  # fmt: skip
        raise InputError(f"{source}: this model can't be loaded: {_why_not_loaded(base, error)}") from error
    for model in (*loaded.text_encoders, loaded.vae, loaded.denoiser):
        model.requires_grad_(False)
        model.eval()
    place(loaded.denoiser, device, dtype, channels_last=channels_last)
    return loaded


def _from_single_file(base, dtype, vae=None):
    import diffusers
    import torch

    family, given = base.family, {} if vae is None else {"vae": vae}
    with safe_to_read(base.source) as readable:
        pipeline = getattr(diffusers, family.pipeline).from_single_file(
            readable, config=base.single_file_config, torch_dtype=torch.float32, cache_dir=base.cache_dir,
            local_files_only=base.single_file_config is not None, **family.pipeline_options, **given,
        )  # fmt: skip
    return Components(
        tuple(getattr(pipeline, row.tokenizer) for row in family.text_encoders),
        tuple(getattr(pipeline, row.name).to(dtype) for row in family.text_encoders),
        pipeline.vae,
        getattr(pipeline, family.denoiser),
        dict(pipeline.scheduler.config) | base.scheduler_changes,
    )


def _from_folder(base, dtype):
    """Loads a diffusers folder, local or from the hub."""
    import diffusers
    import torch
    import transformers

    family, options = base.family, dict(revision=base.revision, cache_dir=base.cache_dir)
    denoiser = _with_variant(
        getattr(diffusers, family.denoiser_class), base, family.denoiser,
        torch_dtype=_dtype_in_file(base, family.denoiser) or dtype,
    )  # fmt: skip
    tokenizers, text_encoders = [], []
    for row in family.text_encoders:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(base.source, subfolder=row.tokenizer, **options)
        text_encoder = load_text_encoder(base, row, dtype)
        tokenizers.append(tokenizer)
        text_encoders.append(text_encoder)
    vae = _with_variant(diffusers.AutoencoderKL, base, "vae", torch_dtype=_dtype_in_file(base, "vae") or torch.float32)
    scheduler_config: Any = diffusers.DDPMScheduler.load_config(base.source, subfolder="scheduler", **options)
    return Components(tuple(tokenizers), tuple(text_encoders), vae, denoiser, dict(scheduler_config))


def _variant_of(base, part):
    """Returns the variant of a part of a model; None if its folder has only its usual files, as diffusers' pipelines do."""
    variant = base.variant
    if variant is None or base.kind != "folder":
        return variant
    names = [path.name for path in Path(base.source, part).glob("*")]
    return variant if any(f".{variant}." in name or f".{variant}-" in name for name in names) else None


def _with_variant(model_class, base, part, **options):
    """Loads a part of a model in the variant, or from its usual files if there is no such variant of the part."""
    options |= dict(subfolder=part, revision=base.revision, cache_dir=base.cache_dir)
    variant = _variant_of(base, part)
    try:
        return model_class.from_pretrained(base.source, variant=variant, **options)
    except OSError:
        if variant is None or base.kind != "hub":
            raise
        return model_class.from_pretrained(base.source, **options)


def load_text_encoder(base: BaseModel, row: TextEncoder, dtype: Any) -> Any:
    """Loads a text encoder of a diffusers folder, local or from the hub; raises `ValueError` if weights are missing."""
    import transformers

    model_class = getattr(transformers, row.model_class)
    text_encoder, loading = _with_variant(model_class, base, row.name, dtype=dtype, output_loading_info=True)
    # transformers only logs this and initializes the weights randomly.
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"the text encoder lacks {len(missing)} of its weights, the first: {missing[0]}")
    return text_encoder


def _dtype_in_file(base, component):
    """Returns the dtype of a model's safetensors files, in which they are mapped instead of copied; None if it is mixed."""
    import torch
    from safetensors import safe_open

    folder = Path(base.source, component)
    if base.kind == "hub":  # the part of it that was downloaded before
        folder = from_hub(base.source, f"{component}/config.json", base.revision, base.cache_dir).parent
    variant = f".{name}" if (name := _variant_of(base, component)) else ""
    whole, stem = folder / f"diffusion_pytorch_model{variant}.safetensors", "diffusion_pytorch_model"
    files = (
        [whole] if whole.is_file() else [*folder.glob(f"{stem}{variant}-0*"), *folder.glob(f"{stem}-0*{variant}.*")]
    )
    kinds = set()
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                names = file.keys()
                kinds |= {file.get_slice(name).get_dtype() for name in names}
    except Exception:  # noqa: BLE001 - loading the file reports what is wrong with it
        return None
    return (
        {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}.get(*kinds) if len(kinds) == 1 else None
    )


def empty_components(base: BaseModel, dtype: Any) -> Components:
    """Makes the `Components` of a base model from its configuration alone, with uninitialized weights and no tokenizers.

    Denoiser and text encoders have `dtype`. Raises `InputError` if the configuration cannot be read.
    """
    import diffusers
    import torch
    import transformers

    family = base.family
    options: Any = dict(revision=base.revision, cache_dir=base.cache_dir)
    source: Any = base.source if base.kind != "file" else base.single_file_config

    def make(model_class, name, dtype):
        config = model_class.load_config(source, subfolder=name, **options)
        with torch.device("meta"):
            model = model_class.from_config(config)
        move: Any = torch.nn.Module.to
        model = move(model, dtype=dtype, memory_format=torch.channels_last)
        return model.to_empty(device="cpu").requires_grad_(False)

    try:
        text_encoders = []
        for row in family.text_encoders:
            config = transformers.CLIPTextConfig.from_pretrained(source, subfolder=row.name, **options)
            with torch.device("meta"):
                text_encoders.append(getattr(transformers, row.model_class)(config).to(dtype))
        vae = make(diffusers.AutoencoderKL, "vae", torch.float32).eval()
        denoiser = make(getattr(diffusers, family.denoiser_class), family.denoiser, dtype)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source}: its configuration can't be read ({reason_of(error)}).") from error
    return Components((), tuple(text_encoders), vae, denoiser, {})


def _why_not_loaded(base, error):
    causes = [error]
    while causes[-1].__context__ is not None:
        causes.append(causes[-1].__context__)
    if any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
        return "it contains more than weights, and unpickling it could run code. Use the .safetensors version"
    if isinstance(error, NotImplementedError):  # a weight without data was copied
        return "some of its weights are missing"
    if base.kind == "file" and base.single_file_config is None and isinstance(error, OSError):
        return f"{reason_of(error)} If the hub cannot be reached, pass --single_file_config FOLDER."
    return reason_of(error)


def _load_vae(base, name):
    """Loads a VAE from a hub id, a folder or a single file, which uses the configuration of the base model's VAE."""
    import diffusers
    import torch

    if Path(name).suffix.lower() not in (".safetensors", ".ckpt", ".pt"):
        return diffusers.AutoencoderKL.from_pretrained(name, torch_dtype=torch.float32, cache_dir=base.cache_dir)
    config = base.single_file_config if base.kind == "file" else base.source
    if base.kind == "hub":
        config = str(from_hub(base.source, "vae/config.json", base.revision, base.cache_dir).parents[1])
    with safe_to_read(name) as readable:
        return diffusers.AutoencoderKL.from_single_file(
            readable, config=config, subfolder="vae" if config else None, torch_dtype=torch.float32
        )


def _check_denoiser(base, vae, unet):
    """Raises `ValueError` unless the UNet is of the family and accepts the latents of this VAE and nothing else."""
    channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if (channels, factor) != (base.latent_channels, base.vae_factor) or channels != unet.config.in_channels:
        raise ValueError(
            f"latents of {channels} channels at 1/{factor} do not fit a UNet of {unet.config.in_channels} channels at "
            f"1/{base.vae_factor}"
        )
    if family_by_marks(unet.config) is not base.family:
        raise ValueError(f"it is not of the family of {base.family.name}")


def make_noise_scheduler(
    scheduler_config: dict[str, Any], *, prediction_type: str | None = None, rescale_betas_zero_snr: bool = False
) -> Any:
    """Makes the noise scheduler (DDPM) for training; zero terminal SNR is that of Lin et al., 2023 (arXiv:2305.08891).

    The rescaling is part of the scheduler's configuration, so it affects everything computed from `alphas_cumprod`.
    """
    import diffusers

    kind = scheduler_config.get("_class_name", "")
    if "beta_schedule" not in scheduler_config and kind.startswith(("EDM", "FlowMatch")):
        raise InputError(f"The base model's scheduler is a {kind}, a kind of diffusion that can't be trained here.")
    changes: dict[str, Any] = {"prediction_type": prediction_type} if prediction_type is not None else {}
    if rescale_betas_zero_snr:
        changes["rescale_betas_zero_snr"] = True
    noise_scheduler: Any = diffusers.DDPMScheduler.from_config(scheduler_config, **changes)
    config = noise_scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"--prediction_type {config.prediction_type}: choose epsilon or v_prediction.")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise InputError(
            "--rescale_betas_zero_snr needs --prediction_type v_prediction: at zero SNR, the noise contains no information "
            "about the picture."
        )
    return noise_scheduler

"""Finds and loads a base model from a folder, the hub or a single file.

torch, diffusers and transformers are imported inside the functions, so that `find_base_model` needs less than a second to
report that a base model is missing or unsuitable.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, is_out_of_memory
from ..files import check_regular, reason_of
from ..small_files import Values, is_kind
from .base_model import BaseModel, ConfigFiles, find_families, find_family, from_hub, locate
from .configurations import check_part
from .families import STABLE_DIFFUSION, TextEncoder, family_by_marks
from .load_errors import DOWNLOAD, naming_part, quiet_loaders, reason_in_words
from .modules import check_weights, place
from .not_a_base import check_index, check_task
from .single_files import SingleFile, look_into, safe_to_read
from .weights_files import check_dtypes, check_variant, dtype_in_file, load_part


SHORTEST_PROMPT = 3  # tokens: the start, a word and the end


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
        check_dtypes(name, variant)
    read = ConfigFiles(name, kind, folder, revision, cache_dir).read
    if kind == "file" and folder is None:
        # Its configuration comes from the hub when it is loaded.
        family = single.family or STABLE_DIFFUSION
        index, vae, unet, texts = {}, {}, {}, [{}]
    else:
        index = read("model_index.json")
        check_index(name, index)
        families = find_families(name, index.want("_class_name", str))
        unet = read(f"{families[0].denoiser}/config.json")
        check_task(name, unet.get("in_channels"))
        family = find_family(name, families, unet)
        if single.family not in (None, family):
            raise InputError(
                f"{name}: it is of {single.family.name}, but {folder} (--single_file_config) is of {family.name}."
            )
        vae, texts = read("vae/config.json"), [read(f"{row.name}/config.json") for row in family.text_encoders]
        read("scheduler/scheduler_config.json")
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
    except Exception as error:  # the loader raises many kinds of exceptions for unusable files
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

    source, dtype = base.source, torch.float32 if dtype is None else dtype
    if pretrained_vae is None and not base.has_vae:
        raise InputError(f"{source}: it contains no VAE. Pass one with --pretrained_vae_model_name_or_path.")
    try:
        load = _from_single_file if base.kind == "file" else _from_folder
        with quiet_loaders():
            loaded = (
                load(base, dtype) if base.has_vae else _from_single_file(base, dtype, _load_vae(base, pretrained_vae))
            )
        for pair in zip(loaded.tokenizers, loaded.text_encoders, strict=True):
            check_tokenizer(*pair)
        _check_denoiser(base, loaded.vae, loaded.denoiser)
        if pretrained_vae is not None and base.has_vae:
            source = pretrained_vae
            with quiet_loaders():
                loaded = loaded._replace(vae=_load_vae(base, pretrained_vae))
            _check_denoiser(base, loaded.vae, loaded.denoiser)
        named = [*(("text encoder", model) for model in loaded.text_encoders), ("VAE", loaded.vae)]
        for name, model in [*named, ("UNet", loaded.denoiser)]:
            check_weights(name, model)
        check_part("vae", Values(dict(loaded.vae.config), source))
        check_part("scheduler", Values(loaded.scheduler_config, base.source))
    except InputError:
        raise
    except Exception as error:  # the loaders raise many kinds of exceptions for unusable files
        if is_out_of_memory(error):
            raise
        raise InputError(f"{source}: this model can't be loaded: {_why_not_loaded(base, source, error)}") from error
    for model in (*loaded.text_encoders, loaded.vae, loaded.denoiser):
        model.requires_grad_(False)
        model.eval()
    place(loaded.denoiser, device, dtype, channels_last=channels_last)
    return loaded


def check_tokenizer(tokenizer: Any, text_encoder: Any) -> None:
    """Limits the length of prompts to that of the text encoder; raises `ValueError` if the two do not fit together."""
    config = text_encoder.config
    # A tokenizer without its files is silently empty; even a byte-level one has at least 256 tokens.
    if not 256 <= len(tokenizer) <= config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens and the text encoder {config.vocab_size}")
    length = tokenizer.model_max_length
    if not is_kind(length, float) or length < SHORTEST_PROMPT:
        raise ValueError(f"the tokenizer's model_max_length is {length!r}, not a number of at least {SHORTEST_PROMPT}")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no token that fills up short prompts (pad_token)")
    tokenizer.model_max_length = min(length, config.max_position_embeddings)


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

    family, options = base.family, dict(revision=base.revision, cache_dir=base.cache_dir)
    with naming_part(family.denoiser):
        denoiser = load_part(
            getattr(diffusers, family.denoiser_class), base, family.denoiser,
            torch_dtype=dtype_in_file(base, family.denoiser) or dtype,
        )  # fmt: skip
    tokenizers = [load_tokenizer_of(base, row) for row in family.text_encoders]
    text_encoders = [load_text_encoder(base, row, dtype) for row in family.text_encoders]
    with naming_part("vae"):
        vae = load_part(diffusers.AutoencoderKL, base, "vae", torch_dtype=dtype_in_file(base, "vae") or torch.float32)
    scheduler_config: Any = diffusers.DDPMScheduler.load_config(base.source, subfolder="scheduler", **options)
    return Components(tuple(tokenizers), tuple(text_encoders), vae, denoiser, dict(scheduler_config))


def load_tokenizer_of(base: BaseModel, row: TextEncoder) -> Any:
    """Loads the tokenizer of a text encoder of a diffusers folder, local or from the hub; raises `ValueError`."""
    import transformers

    options: Any = dict(subfolder=row.tokenizer, revision=base.revision, cache_dir=base.cache_dir)
    with naming_part(row.tokenizer):
        return transformers.CLIPTokenizer.from_pretrained(base.source, **options)


def load_text_encoder(base: BaseModel, row: TextEncoder, dtype: Any) -> Any:
    """Loads a text encoder of a diffusers folder, local or from the hub.

    Raises `ValueError` if weights are missing or do not fit the configuration.
    """
    import transformers

    model_class = getattr(transformers, row.model_class)
    # Without a name for the attention, a configuration could choose a kernel that is downloaded.
    options: Any = dict(dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    options["ignore_mismatched_sizes"] = True  # they are refused below, because the exception does not name them
    with naming_part(row.name):
        text_encoder, loading = load_part(model_class, base, row.name, **options)
    if odd := sorted((name, list(own), list(wanted)) for name, own, wanted in loading["mismatched_keys"]):
        name, own, wanted = odd[0]
        fault = f"{name} must have the shape {wanted}, but has {own}"
        raise ValueError(f"{row.name}: the weights do not fit its configuration: {fault}")
    # transformers only logs this and initializes the weights randomly.
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"the text encoder lacks {len(missing)} of its weights, the first: {missing[0]}")
    return text_encoder


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
    except Exception as error:  # the models raise many kinds of exceptions for unusable values
        raise InputError(f"{source}: its configuration can't be read ({reason_of(error)}).") from error
    return Components((), tuple(text_encoders), vae, denoiser, {})


def _why_not_loaded(base, source, error):
    """Returns the reason and the remedy."""
    remedy = DOWNLOAD if source == base.source else "Pass another VAE, or download it again."
    causes = [error]
    while causes[-1].__context__ is not None:
        causes.append(causes[-1].__context__)
    if any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
        return "it contains more than weights, and unpickling it could run code. Use the .safetensors version."
    if isinstance(error, NotImplementedError):  # a weight without data was copied
        return f"some of its weights are missing. {remedy}"
    if base.kind == "file" and base.single_file_config is None and isinstance(error, OSError):
        return f"{reason_of(error)} If the hub cannot be reached, pass --single_file_config FOLDER."
    if base.kind == "hub" and isinstance(error, OSError):
        return f"{reason_in_words(error)}. Check your network, or pass a local folder."
    return f"{reason_in_words(error)}. {remedy}"


def _load_vae(base, name):
    """Loads a VAE from a hub id, a folder or a single file, which uses the configuration of the base model's VAE."""
    import diffusers
    import torch

    check_regular(name)
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

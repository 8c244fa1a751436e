"""Loads the diffusers pipeline with its LoRAs, moves it to its device, or saves it with the LoRAs merged into it."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import check_regular, reason_of, written_whole
from ..models.configurations import check_part
from ..models.dialects import COMPONENTS
from ..models.families import Family
from ..models.load_errors import DOWNLOAD, reason_in_words
from ..models.loading import check_tokenizer, load_text_encoder, load_tokenizer_of
from ..models.modules import check_weights, non_finite
from ..models.samplers import make_sampler
from ..models.single_files import safe_to_read
from ..small_files import Values
from .as_trained import AsTrained, in_words
from .encode import PromptEncoder
from .find import Base, ControlNet, Given
from .fits import check_controlnet_fits
from .loras import load_loras, read_weights, set_loras, use_loras
from .rows import Lora
from .settings import Machine


logger = logging.getLogger(__name__)


# {kind of pipeline, of `families.PIPELINE_KINDS`: {argument of its call: field of a `Drawing` or of `Given`}}
PIPELINES = {
    "": {"height": "height", "width": "width"},
    "Img2Img": {"image": "image", "strength": "strength"},
    "ControlNet": {"image": "control_image", "controlnet_conditioning_scale": "controlnet_scale"},
}
PIPELINES["ControlNetImg2Img"] = PIPELINES["ControlNet"] | PIPELINES["Img2Img"] | {"control_image": "control_image"}


# {component of a pipeline: its name in messages}
NAMES = dict.fromkeys(COMPONENTS, "text encoder") | {"unet": "UNet", "vae": "VAE", "controlnet": "ControlNet"}


class Job(NamedTuple):
    """What pictures are drawn with, before any model is loaded."""

    base: Base
    loras: tuple[Lora, ...]  # of all pictures
    as_trained: AsTrained
    controlnet: ControlNet | None = None
    given: Given = Given()

    @property
    def kind(self) -> str:
        """The kind of pipeline, a key of `PIPELINES`."""
        return ("ControlNet" if self.controlnet else "") + ("Img2Img" if self.given.image else "")


class Studio(NamedTuple):
    """The pipeline, and what all pictures of a run have in common."""

    pipe: Any
    family: Family
    arguments: dict[str, str]  # of `PIPELINES`
    scheduler_config: dict[str, Any]  # of the base model's own scheduler
    as_trained: AsTrained
    # (drawing) -> {argument of the pipeline's call: tensor (1, ...)}; pictures are only drawn together if its method
    # `num_chunks(drawing)` returns the same number for them
    encoder: Any
    given: Given = Given()
    # (pipeline, active LoRAs) -> the context in which the pipeline draws with them
    use_loras: Callable[[Any, Sequence[Lora]], contextlib.AbstractContextManager] = use_loras
    # (latents (N, C, h, w)) -> pictures; None: the pipeline decodes
    decode: Callable[[Any], list[Any]] | None = None


def choose_device(device: str, precision: str | None) -> tuple[str, Any]:
    """Returns the torch device and the dtype of the flags; raises `InputError` for a device that this machine does not have."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} can't be used here: {str(error).splitlines()[0]}") from error
    # A T4 reports bf16 as supported, but emulates it slowly.
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = precision or ("bf16" if bf16 else "fp16" if device.startswith("cuda") else "no")
    if precision == "fp16" and device == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU. Omit it, or use bf16.")
    return device, {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def open_studio(job: Job, machine: Machine, device: str, dtype: Any) -> Studio:
    """Loads the models of a job; raises `InputError` for models that do not fit together."""
    trained, family = job.as_trained, job.base.model.family
    weights = {lora.adapter: read_weights(lora) for lora in job.loras}
    pipe = load_pipeline(job, dtype)
    if job.controlnet:
        check_controlnet_fits(job.controlnet, pipe.unet.config, pipe.vae_scale_factor)
    load_loras(pipe, job.loras, weights, trained.clip_skip or 0)
    place(pipe, machine, device)
    scheduler_config = dict(pipe.scheduler.config) | {"_class_name": type(pipe.scheduler).__name__}
    encoder = PromptEncoder(pipe, family, (trained.num_chunks or 1) if trained.long_prompts else 0)
    return Studio(pipe, family, PIPELINES[job.kind], scheduler_config, trained, encoder, job.given)


@contextlib.contextmanager
def explaining(source: str, remedy: str = "") -> Iterator[None]:
    """Turns the exceptions of a context that loads a model into an `InputError` with the model's path or hub id."""
    try:
        yield
    except InputError:
        raise
    except NotImplementedError as error:  # a weight without data was copied
        raise InputError(f"{source} can't be loaded: some of its weights are missing. {DOWNLOAD}") from error
    except Exception as error:  # the loaders raise many kinds of exceptions for broken files
        raise InputError(f"{source} can't be loaded: {reason_in_words(error)}. {remedy or DOWNLOAD}") from error


def load_weights(model_class: Any, source: str, **options: Any) -> Any:
    """Loads a model or pipeline of diffusers from a folder, a hub id or a single file, without running code from the file."""
    check_regular(source)
    if not Path(source).is_file():
        with explaining(source):
            return model_class.from_pretrained(source, **options)
    with explaining(source, "Where there is no hub, pass --single_file_config."), safe_to_read(source) as readable:
        return model_class.from_single_file(readable, **options)


def load_pipeline(job: Job, dtype: Any) -> Any:
    """Loads the diffusers pipeline of a job, without the safety checker."""
    import diffusers
    import transformers

    # diffusers 0.39 only accepts this name; 0.42 also accepts `dtype`.
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    for library in (diffusers, transformers):  # the advice of their loaders would confuse users
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    model, vae = job.base.model, job.as_trained.vae
    config, options = model.single_file_config, {"torch_dtype": dtype}
    if vae is None and not model.has_vae:
        raise InputError(f"{model.source}: it contains no VAE. Pass one with --vae.")
    if vae is not None:
        vae_config = config if model.kind == "file" else model.source
        like = {"config": vae_config, "subfolder": "vae"} if vae_config and Path(vae).is_file() else {}
        options["vae"] = load_weights(
            diffusers.AutoencoderKL, vae, torch_dtype=dtype, cache_dir=model.cache_dir, **like
        )
    if job.controlnet is not None:
        options["controlnet"] = load_weights(diffusers.ControlNetModel, job.controlnet.source, torch_dtype=dtype)
    if model.kind != "file":  # diffusers would not notice that a text encoder lacks weights
        for row in model.family.text_encoders:
            with explaining(model.source):
                options[row.tokenizer] = load_tokenizer_of(model, row)
                options[row.name] = load_text_encoder(model, row, dtype)
    options |= model.family.pipeline_options
    options |= {"config": config} if model.kind == "file" else {"revision": model.revision, "variant": model.variant}
    options["cache_dir"] = model.cache_dir
    pipeline_class = getattr(diffusers, model.family.pipeline_of(job.kind))
    pipe = load_weights(pipeline_class, model.source, **options)
    sources = {"vae": vae or model.source, "controlnet": job.controlnet and job.controlnet.source}
    for name in (*COMPONENTS, *sources):
        if pipe.components.get(name) is not None:
            with explaining(sources.get(name) or model.source):
                check_weights(NAMES[name], pipe.components[name])
    check_part("vae", Values(dict(pipe.vae.config), vae or model.source))
    check_part("scheduler", Values(dict(pipe.scheduler.config), model.source))
    with explaining(model.source):
        for row in model.family.text_encoders:
            check_tokenizer(pipe.components[row.tokenizer], pipe.components[row.name])
    pipe.vae.enable_slicing()  # one picture at a time, because the decoder needs more memory than the UNet
    pipe.set_progress_bar_config(disable=True)
    return pipe


def place(pipe: Any, machine: Machine, device: str) -> None:
    """Moves the pipeline to its device, or enables model CPU offloading, and compiles the UNet's blocks on request."""
    import torch
    import torch._dynamo

    on_cuda = torch.device(device).type == "cuda"
    if machine.offload and not on_cuda:
        logger.warning("--offload has no effect on %s: it only applies to CUDA GPUs.", device)
    if machine.offload and on_cuda:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    if machine.compile:
        # Each scale of a LoRA needs its own graph; beyond the limit, torch would silently continue without compiling.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
        warnings.filterwarnings("ignore", r"Dynamo detected a call to a `functools.lru_cache`", UserWarning)
        pipe.unet.compile_repeated_blocks()


def save_merged(studio: Studio, loras: Sequence[Lora], folder: Path) -> None:
    """Writes the pipeline with the LoRAs merged into its weights, atomically. The studio must not be used afterwards."""
    import diffusers

    pipe, trained = studio.pipe, studio.as_trained
    active = [lora for lora in loras if lora.scale]
    set_loras(pipe, active)
    if active:
        try:
            pipe.fuse_lora(components=[part for part, adapters in pipe.get_list_adapters().items() if adapters])
        except RuntimeError as error:  # a bias that the base model's layer has no place for
            raise InputError(f"--save_merged {folder}: the LoRAs can't be merged. {reason_of(error)}") from error
    pipe.unload_lora_weights()
    for name in COMPONENTS:
        model = getattr(pipe, name, None)
        if model is not None and (faults := non_finite(model.named_parameters())):
            reason = (
                f"the merged {NAMES[name]} is not finite ({faults}). Pass smaller strengths with --lora PATH:STRENGTH"
            )
            raise InputError(f"--save_merged {folder}: {reason}.")
    for name in COMPONENTS[1:]:
        if getattr(pipe, name, None) is not None:
            # transformers 5 keeps the renaming of the LoRA's keys, and would apply it to the keys of the encoder.
            getattr(pipe, name)._weight_conversions = None
    components = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    components["scheduler"] = make_sampler(
        studio.scheduler_config, prediction_type=trained.prediction_type, zero_snr=bool(trained.zero_snr)
    )
    settings = ("requires_safety_checker", "force_zeros_for_empty_prompt")
    components |= {name: pipe.config[name] for name in settings if name in pipe.config}
    with written_whole(folder, folder=True) as temporary:
        getattr(diffusers, studio.family.pipeline_of())(**components).save_pretrained(temporary)
    for name in ("clip_skip", "long_prompts"):
        if value := getattr(trained, name):
            logger.warning(
                "%s does not record %s: set it in the program that you draw with", folder, in_words(name, value)
            )

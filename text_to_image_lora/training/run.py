"""The preparation of a run: its seed, pictures, steps and models."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..command_line import iterate_flags, plain
from ..errors import InputError
from ..files import counted, reason_of
from ..models import kohya, loading, lora, lora_file, modules, prompts, samplers
from ..models.latents import LatentEncoder
from ..models.prompts import PromptEncoder
from ..models.settings import LoraSettings
from ..pictures.examine import usable_pictures
from ..pictures.inspection import format_samples, write_preview
from . import checkpoint, freed_memory, hub_checkpoints, inputs, processes
from .batches import Division, make_batch_sampler
from .learning_settings import OptimizerSettings
from .objective import Diffusion


logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run before any model is loaded."""

    base: Any  # the `BaseModel`
    state: checkpoint.TrainState  # at the start
    resume_path: Path | None
    seed: int
    pictures: Any  # the `PictureSet` to train on
    validated: Any  # the `PictureSet` to validate on, or None
    sampler: Any  # the `EffectiveBatchSampler`
    lora: LoraSettings  # of the denoiser
    optimizer: OptimizerSettings  # with --scale_lr applied
    num_steps: int  # total number of optimizer steps
    num_warmup_steps: int
    variations: int  # cached variations of each picture; 0: no cache
    resolution: int  # side of the largest square in pixels
    notes: list[str]  # lines that were logged about the pictures
    identity: dict[str, Any]  # settings that must be equal to resume a checkpoint
    identity_before: dict[str, Any] | None  # the identity of the checkpoint


def make_run(settings: Any, found: inputs.Inputs, accelerator: Any) -> Run:
    """Prepares a new or resumed `Run`."""
    from .. import log

    # Only the main process looks, as other machines may not see its output folder.
    find_resume_point = functools.partial(_find_resume_point, settings)
    resume_path, state, identity_before = processes.broadcast_from_main(find_resume_point, accelerator)
    seed = state.seed if settings.run.seed is None else settings.run.seed
    usable = functools.partial(
        usable_pictures,
        folder=settings.cache.folder,
        skip_bad_images=settings.data.skip_bad_images,
        accelerator=accelerator,
        alpha_mask=settings.data.alpha_mask,
    )
    with log.collect_messages("pictures") as notes:
        pictures, validated = inputs.make_picture_sets(settings, found, usable)
    if pictures.masked and settings.loss.perceptual_loss is not None:
        masks = "the masks and --alpha_mask" if settings.data.alpha_mask else "the masks"
        raise InputError(
            f"--perceptual_loss compares whole pictures, but some of these have masks. Leave out the flag or {masks}."
        )
    sampler = make_run_sampler(settings, pictures, seed, accelerator.process_index, accelerator.num_processes)
    lora_settings = settings.lora.of_denoiser(found.base.family)
    identity = identity_of_run(settings, found.base, pictures, sampler, seed)
    processes.check_equal_everywhere(identity)
    if resume_path is not None:
        checkpoint.check_same_run(resume_path, identity_before, identity)
    num_steps = settings.batches.num_steps(sampler.steps_per_epoch)
    num_warmup_steps = settings.schedule.num_warmup_steps(num_steps)
    optimizer = settings.optimizer.scaled(sampler.effective_batch_size)
    settings.schedule.check_rate(optimizer.rate)
    resolutions = settings.sizes.resolutions(found.base)
    bucketed, balanced = settings.sizes.aspect_ratio_buckets, settings.data.balanced
    for line in format_samples(pictures, sampler.samples, resolutions, bucketed=bucketed, balanced=balanced):
        logger.info(line)
    return Run(
        found.base, state, resume_path, seed, pictures, validated, sampler, lora_settings, optimizer, num_steps,
        num_warmup_steps, settings.cache.num_variations(settings.augmentation), settings.sizes.side(found.base),
        [*found.notes, *notes], identity, identity_before,
    )  # fmt: skip


def _find_resume_point(settings):
    """Returns the checkpoint to resume from or None, the `TrainState`, and the identity of the checkpoint or None."""
    wanted, token = settings.checkpoints.resume_from_checkpoint, settings.sharing.hub_token
    path = hub_checkpoints.find_checkpoint(settings.run.output_dir, wanted, token)
    if path is not None:
        return path, *checkpoint.read_state(path)
    drawn = int.from_bytes(os.urandom(4), "little")
    seed = drawn if settings.run.seed is None else settings.run.seed
    return None, checkpoint.TrainState(seed=seed, started_at=int(time.time())), None


def make_run_sampler(settings: Any, pictures: Any, seed: int, rank: int, world_size: int) -> Any:
    """Creates the `EffectiveBatchSampler` of a run."""
    batches = settings.batches
    division = Division(batches.batch_size, batches.gradient_accumulation_steps, rank, world_size)
    return make_batch_sampler(
        pictures, seed, division, balanced=settings.data.balanced,
        prior_loss_weight=settings.class_pictures.prior_loss_weight, preservation=settings.preservation,
    )  # fmt: skip


def one_or_list(values: Sequence[int]) -> int | list[int] | None:
    """Returns the only one of several values, which is recorded as such, or a list; None if there are none."""
    return (list(values) if len(values) > 1 else values[0]) if values else None


def identity_of_run(settings: Any, base: Any, pictures: Any, sampler: Any, seed: int) -> dict[str, Any]:
    """Returns the settings that must be equal to resume a checkpoint, by the names of the flags."""
    limits = settings.sizes.resolutions(base).buckets if settings.sizes.aspect_ratio_buckets else ()
    lora_settings = settings.lora.of_denoiser(base.family)
    text_rank = lora_settings.text_encoder_rank or lora_settings.rank
    derived = {
        "seed": seed,
        "resolution": one_or_list(settings.sizes.sides(base)),
        "bucket_min_size": one_or_list([each.smallest for each in limits]),
        "bucket_max_size": one_or_list([each.largest for each in limits]),
        "bucket_step": one_or_list([each.step for each in limits]),
        "clip_skip": settings.base.clip_skip or None,
        "cache_variations": settings.cache.num_variations(settings.augmentation),
        "lora_alpha": lora_settings.alpha,
        "target_modules": list(lora_settings.target_modules or ()),
        "text_encoder_rank": text_rank if lora_settings.train_text_encoder else None,
        "optimizer": settings.optimizer.name,
        "loraplus": settings.optimizer.loraplus_lr_ratio is not None,
        "preservation": settings.preservation.preservation if settings.preservation.preserves else None,
        "perceptual_loss_weight": settings.loss.perceptual_weight,
        "effective_batch_size": sampler.effective_batch_size,
        "dataset": pictures.fingerprint([sampler.samples.tolist(), sampler.groups.tolist()]),
    }
    flags = {field.name: plain(value) for field, value in iterate_flags(settings) if not field.metadata["may_change"]}
    identity = flags | derived
    if settings.timesteps.prediction_type is None:
        del identity["prediction_type"]  # the base model's, which `_check_models` adds once it is loaded
    return identity


@dataclass
class Models:
    """The models of a run, on the device."""

    family: Any
    adapted: dict[str, torch.nn.Module]  # the models that are trained, by component; the denoiser comes first
    num_adapted: int  # number of adapted modules
    diffusion: Diffusion
    vae: Any
    latent_encoder: Any  # None once it is no longer needed
    prompt_encoder: Any
    scheduler_config: dict[str, Any]
    dtype: torch.dtype  # of the frozen base
    scaling_factor: float  # of the VAE's latents

    @property
    def denoiser(self) -> Any:
        return self.adapted[self.family.denoiser]

    @property
    def trains_text_encoder(self) -> bool:
        return len(self.adapted) > 1

    def encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds latents and conditions that are not cached to the batch, except conditions from trained text encoders."""
        if "pixels" in batch:
            mean, std = self.latent_encoder(batch["pixels"])
            # Rounded as in the cache, so that results do not depend on it.
            batch["mean"] = mean.to(self.latent_encoder.dtype).float()
            batch["std"] = std.to(self.latent_encoder.dtype).float()
        if "captions" in batch and not self.trains_text_encoder:
            batch["condition"] |= self.prompt_encoder(batch["captions"])
        return batch

    def release_encoders(self, settings: Any) -> None:
        """Moves the encoders off the device once everything is cached, except those that training steps need."""
        self.latent_encoder = None
        if not self.trains_text_encoder:
            self.prompt_encoder = None
        if settings.loss.perceptual_loss == "decoder":
            logger.info("the VAE stays in memory for --perceptual_loss decoder")
        else:
            self.vae = self.vae.to("cpu") if settings.samples.prompts else None
        freed_memory.release(next(self.denoiser.parameters()).device)


def load_models(settings: Any, run: Run, accelerator: Any) -> Models:
    """Loads the base model onto the device and adds the LoRA, before anything is encoded, to report wrong flags early."""
    family, device = run.base.family, accelerator.device
    lora_settings = settings.lora
    weight_dtype = modules.dtype_of(accelerator.mixed_precision)
    # DoRA computes its magnitudes from the float32 base.
    dtype = torch.float32 if lora_settings.use_dora else weight_dtype
    loaded = loading.load_components(
        run.base, dtype, device="cpu" if lora_settings.use_dora else device, channels_last=device.type != "mps",
        pretrained_vae=settings.base.pretrained_vae_model_name_or_path,
    )  # fmt: skip
    sets = [pictures for pictures in (run.pictures, run.validated) if pictures is not None]
    num_chunks, long_captions = choose_num_chunks(settings, loaded.tokenizers[0], sets)
    if long_captions is not None:
        logger.info(long_captions)
    if settings.data.preview_data is not None and accelerator.is_main_process:
        remove_concept = inputs.concept_of_run(settings, run.pictures.records)
        preview = write_preview(settings.data.preview_data, run.pictures, run.sampler, run.variations, remove_concept)
        logger.info(preview)
    diffusion = Diffusion(
        samplers.make_noise_scheduler(
            loaded.scheduler_config,
            prediction_type=settings.timesteps.prediction_type,
            rescale_betas_zero_snr=settings.timesteps.rescale_betas_zero_snr,
        )
    )
    text_encoders = {row.name: model for row, model in zip(family.text_encoders, loaded.text_encoders, strict=True)}
    words = [prompts.vocabulary_identity(tokenizer) for tokenizer in loaded.tokenizers]
    run.identity["vocabulary of"] = dict(zip((row.tokenizer for row in family.text_encoders), words, strict=True))
    _check_models(run, {family.denoiser: loaded.denoiser, "vae": loaded.vae, **text_encoders}, diffusion, num_chunks)
    adapted = {family.denoiser: loaded.denoiser, **(text_encoders if lora_settings.train_text_encoder else {})}
    num_adapted = adapt(settings, adapted, family, run.seed)
    for model in adapted.values():
        if lora_settings.use_dora:
            modules.place(model, device, weight_dtype)
        else:
            model.to(device)
    if device.type == "cpu":  # after the weights have their final place in memory
        freed_memory.keep_for_reuse()
    if weight_dtype == torch.float16 and loaded.vae.config.force_upcast:
        logger.info("the VAE stays in float32, as its configuration sets force_upcast: it overflows in fp16")
    if not lora_settings.train_text_encoder:
        for text_encoder in loaded.text_encoders:
            text_encoder.to(device, weight_dtype)
    cached_dtype = torch.float32 if weight_dtype == torch.float32 else torch.float16
    latent_encoder = LatentEncoder(loaded.vae, cached_dtype, device)
    if settings.samples.prompts or settings.loss.perceptual_loss == "decoder" or not run.variations:
        latent_encoder.get_ready()  # otherwise the VAE is only needed if something is not cached
    prompt_encoder = PromptEncoder(
        family, loaded.tokenizers, loaded.text_encoders, clip_skip=settings.base.clip_skip, num_chunks=num_chunks,
        dtype=weight_dtype, autocast=accelerator.autocast if lora_settings.train_text_encoder else contextlib.nullcontext,
    )  # fmt: skip
    return Models(
        family, adapted, num_adapted, diffusion, loaded.vae, latent_encoder, prompt_encoder, loaded.scheduler_config,
        weight_dtype, latent_encoder.scaling_factor,
    )  # fmt: skip


def choose_num_chunks(settings: Any, tokenizer: Any, sets: list) -> tuple[int, str | None]:
    """Calls `models.prompts.choose_num_chunks` for the captions of `PictureSet`s and the prompts of sample pictures."""
    sets = [pictures.each_once() for pictures in sets]
    captions = [group for pictures in sets for group in pictures.captions]
    sources = [source for pictures in sets for source in pictures.records["source"]]
    drawn = [[text] for text in settings.samples.texts]
    preserved, remove_concept = [], inputs.concept_of_run(settings, sets[0].records)
    if remove_concept is not None:
        preserved = [[remove_concept(caption)] for group in captions for caption in group]
    counts = prompts.count_tokens(tokenizer, captions + drawn + preserved)
    sources += ["--validation_prompts"] * len(drawn) + ["--preservation_prompt"] * len(preserved)
    return prompts.choose_num_chunks(tokenizer, counts, sources, long_prompts=settings.captions.long_prompts)


def _check_models(run, parts, diffusion, num_chunks):
    """Adds the properties of the loaded models to the run's identity, and compares it with the checkpoint's."""
    run.identity.update({f"{name} weights": modules.sample_identity(model) for name, model in parts.items()})
    # With other settings, such as another number of attention heads or another noise schedule, equal weights compute other
    # numbers.
    run.identity.update({f"{name} config": modules.settings_of(model) for name, model in parts.items()})
    run.identity["noise schedule"] = modules.settings_of(diffusion)
    run.identity.update(
        num_chunks=num_chunks,
        prediction_type=diffusion.config.prediction_type,
        rescale_betas_zero_snr=diffusion.config.rescale_betas_zero_snr,
    )
    if run.resume_path is not None:
        checkpoint.check_same_run(run.resume_path, run.identity_before, run.identity)


def adapt(settings: Any, adapted: dict[str, Any], family: Any, seed: int) -> int:
    """Adds the LoRA to the models and enables checkpointing and attention kernels; returns the number of adapted modules.

    `adapted` is {component: model}, with the denoiser first.
    """
    lora_settings = settings.lora
    torch.manual_seed(seed)
    denoiser, num_adapted = adapted[family.denoiser], 0
    for name, model in adapted.items():
        if name == family.denoiser:
            num_adapted += lora.add_lora(model, lora_settings.of_denoiser(family))
            if lora_settings.target_modules is None:
                lora.check_count(model, num_adapted, family.modules_per_block)
        else:
            row = next(row for row in family.text_encoders if row.name == name)
            layers = lora.text_layers(model, row.unreached(settings.base.clip_skip or 0))
            num_adapted += lora.add_lora(model, lora_settings.of_text_encoder(layers))
    if lora_settings.lora_weights is not None:
        loaded, _ = lora_file.load_lora(lora_settings.lora_weights)
        lora.start_from_file(adapted, loaded, lora_settings.lora_weights)
    if settings.speed.gradient_checkpointing:
        for name, model in adapted.items():
            model.enable_gradient_checkpointing() if name == family.denoiser else model.gradient_checkpointing_enable()
    if settings.speed.enable_npu_flash_attention:
        denoiser.enable_npu_flash_attention()
    if settings.speed.enable_xformers_memory_efficient_attention:
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
            raise InputError(f"xformers can't be used here ({reason_of(error)}). Leave the flag out.") from error
    return num_adapted


def check_kohyas_names(settings: Any, models: Models) -> None:
    """Raises `InputError` if --output_kohya_format has no names for the adapted modules."""
    if not settings.lora.output_kohya_format:
        return
    states = {name: lora.adapter_state(model) for name, model in models.adapted.items()}
    kohya.kohya_tensors(states, models.family.kohya)
    if settings.lora.use_dora:
        logger.info(
            "--use_dora: A1111 divides DoRA's magnitudes by the norms of the inputs and ComfyUI by those of the base, "
            "instead of the norms used in training; the kohya file draws different pictures there, and equal ones in LyCORIS"
        )


def log_beginning(settings: Any, run: Run, models: Models, num_parameters: int, accelerator: Any) -> None:
    """Logs a summary of the run."""
    sampler, num_steps = run.sampler, run.num_steps
    dtype = str(models.dtype).removeprefix("torch.")
    num_pictures = len(run.pictures.each_once())
    several = f" ({len(run.pictures)} with their sizes)" if len(run.pictures) > num_pictures else ""
    logger.info(
        f"{counted(num_pictures, 'picture')}{several}, {counted(sampler.steps_per_epoch, 'step')} an epoch, "
        f"{settings.batches.describe_length(sampler.steps_per_epoch)}; effective batch "
        f"{sampler.effective_batch_size} on {accelerator.num_processes} x {processes.describe_device(accelerator.device)} in "
        f"{dtype}; rank-{settings.lora.rank} LoRA on {models.num_adapted} modules ({num_parameters:,} parameters)"
    )
    long_warmup = settings.schedule.describe_long_warmup(num_steps)
    if long_warmup is not None:
        logger.info(long_warmup)
    if run.state.global_step >= num_steps:
        logger.info(f"finished at step {run.state.global_step}; raise --max_train_steps to continue")

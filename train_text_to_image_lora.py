#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "diffusers==0.39.0",
#     "transformers==5.5.4",
#     "accelerate==1.15.0",
#     "peft==0.21.2",
#     "datasets==5.2.0",
#     "huggingface_hub==1.33.0",
#     "safetensors==0.8.0",
#     "wandb==0.31.0",
#     "pillow==13.0.0",
#     "numpy==2.4.6",
#     "PyYAML==6.0.3",
#     "kornia==0.9.0",
#     "tqdm==4.70.1",
#     "prodigyopt==1.1.2",
#     "schedulefree==1.4.1",
#     "jinja2==3.1.6",
#     "bokeh==3.9.2",
#     "optuna==5.0.0",
#     "filelock==4.2.11",
#     "psutil==7.2.2",
#     'bitsandbytes==0.50.2; platform_machine == "x86_64" or platform_machine == "AMD64" or platform_machine == "aarch64" or (sys_platform == "darwin" and platform_machine == "arm64")',
#     'xformers==0.0.35; (sys_platform == "linux" and platform_machine == "x86_64") or sys_platform == "win32"',
# ]
# ///
"""Fine-tunes Stable Diffusion with LoRA on your own pictures.

    accelerate launch --config_file accelerate_config.yaml train_text_to_image_lora.py \
        --pretrained_model_name_or_path models/mini-sd --train_data_dir metadata/weapons --resolution 128

Writes `pytorch_lora_weights.safetensors` into --output_dir. Run the same command again to resume after an interruption.
"""

from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    exit_on_signals()  # before the slow imports, or else a signal would end them with a traceback

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from text_to_image_lora import log
from text_to_image_lora.command_line import Parser
from text_to_image_lora.config_file import explains_file
from text_to_image_lora.errors import Stopped
from text_to_image_lora.libraries import hide_modules, quiet_libraries
from text_to_image_lora.locks import writes_alone
from text_to_image_lora.models.settings import BaseModelSettings, LoraSettings
from text_to_image_lora.pictures.settings import (
    AugmentationSettings,
    CaptionSettings,
    ClassPictureSettings,
    DataSettings,
    SizeSettings,
)
from text_to_image_lora.reports.settings import SampleSettings, SharingSettings, TrackingSettings, ValidationSettings
from text_to_image_lora.training import interruption
from text_to_image_lora.training.ending import end
from text_to_image_lora.training.launcher import check_launcher
from text_to_image_lora.training.learning_settings import OptimizerSettings, ScheduleSettings
from text_to_image_lora.training.objective_settings import LossSettings, PreservationSettings, TimestepSettings
from text_to_image_lora.training.settings import (
    BatchSettings,
    CacheSettings,
    CheckpointSettings,
    RunSettings,
    SpeedSettings,
    ways_to_save_memory,
)


@dataclass(frozen=True)
class Settings:
    """All flags, in groups in the order of --help. A flag is a field of its group, in the `settings.py` of its room."""

    run: RunSettings
    base: BaseModelSettings
    data: DataSettings
    captions: CaptionSettings
    class_pictures: ClassPictureSettings
    sizes: SizeSettings
    augmentation: AugmentationSettings
    cache: CacheSettings
    lora: LoraSettings
    batches: BatchSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    loss: LossSettings
    preservation: PreservationSettings
    timesteps: TimestepSettings
    speed: SpeedSettings
    checkpoints: CheckpointSettings
    validation: ValidationSettings
    samples: SampleSettings
    tracking: TrackingSettings
    sharing: SharingSettings


def build_parser() -> Parser:
    return Parser(
        Settings,
        usage="%(prog)s --pretrained_model_name_or_path MODEL (--dataset_name ID | --train_data_dir FOLDER) [flags]",
        description=str(__doc__).splitlines()[0],
    )


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Parses the flags, with the command line overriding `--config`; raises `InputError`."""
    return build_parser().settings(argv)


@explains_file
@writes_alone
def main(settings: Settings) -> None:
    started = time.monotonic()
    interruption.listen(settings.run.max_seconds)
    trackers = settings.tracking.trackers
    from text_to_image_lora.training.inputs import find_inputs  # which --help and a wrong flag need not wait for

    check_launcher()
    quiet_libraries()
    is_main_process = os.environ.get("RANK", "0") == "0"
    log.start(is_main_process)
    inputs = find_inputs(settings)  # reports a wrong command within a second, before torch is imported

    if settings.data.dry_run:
        with hide_modules(*settings.speed.unused_libraries):
            from text_to_image_lora.reports import dry_run
        if is_main_process:
            dry_run.report(settings, inputs)
        return

    import torch

    with hide_modules(*settings.speed.unused_libraries):
        import diffusers
        import transformers

        from text_to_image_lora.reports import model_card
        from text_to_image_lora.reports.reports import start_reports
        from text_to_image_lora.reports.sample_pictures import make_painter
        from text_to_image_lora.training import (
            batch_size,
            caching,
            class_images,
            data,
            objective,
            preservation,
            processes,
            resume,
            trials,
        )
        from text_to_image_lora.training.accelerator import make_accelerator
        from text_to_image_lora.training.learning import Learning
        from text_to_image_lora.training.perceptual import make_perceptual_loss
        from text_to_image_lora.training.run import check_kohyas_names, load_models, make_run

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()

    # Set up the run, its models, and the optimizer.
    accelerator = make_accelerator(settings, trackers)
    device, rank = accelerator.device, accelerator.process_index
    class_images.draw_missing(settings, inputs, accelerator)
    run = make_run(settings, inputs, accelerator)
    family, batch_sampler, state, loss_settings = run.base.family, run.sampler, run.state, settings.loss
    models = load_models(settings, run, accelerator)
    painter = make_painter(settings, run, models, accelerator)
    check_kohyas_names(settings, models)
    diffusion, adapted = models.diffusion, models.adapted
    learning = Learning(
        adapted, run.optimizer, settings.schedule, num_steps=run.num_steps, num_warmup_steps=run.num_warmup_steps,
        device=device, scaler=accelerator.scaler,
    )  # fmt: skip
    trial = batch_size.settle(settings, run, models, accelerator)  # before anything is encoded
    interruption.defer_requests()
    cached = caching.fill(settings, run, models, accelerator)
    if run.variations:
        models.release_encoders(settings)
    resume.load(settings, run, models, learning, accelerator)
    loader = data.make_run_loader(settings, run, cached.training, diffusion.num_train_timesteps, device)
    if settings.speed.compile != "off":
        trials.compile_denoiser(settings, run, models, trial)
    # Models are on the device already; moving them would separate the weights from the masters that are trained.
    trained = [accelerator.prepare(model, device_placement=[False]) for model in adapted.values()]
    learning.prepare(accelerator)
    perceptual_loss = make_perceptual_loss(loss_settings, models)

    # Set up the reports.
    reports = start_reports(settings, run, models, learning, cached, painter, accelerator)
    reports.show_base(adapted)
    for model in trained:
        model.train()
    learning.optimizer.train()  # switches schedule-free optimizers to their training weights
    ending = reports.begin()

    # Train.
    batches = iter(loader)
    while ending is None and reports.has_steps_left():
        step, train_loss, picture_losses = state.global_step, torch.zeros((), device=device), {}
        num_micro_batches = batch_sampler.num_micro_batches(step)
        for micro_step in range(num_micro_batches):
            batch = models.encode(next(batches).on(device))  # latents and conditions that are not cached
            timesteps = batch["timesteps"]
            latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * models.scaling_factor
            noise = batch["noise"] + loss_settings.noise_offset * batch["channel_noise"]
            input_noise = noise
            if loss_settings.input_perturbation:
                input_noise = noise + loss_settings.input_perturbation * batch["perturbation"]
            noisy_latents = diffusion.add_noise(latents, input_noise, timesteps)
            target = diffusion.target(latents, noise, timesteps)
            target = preservation.with_base_predictions(target, models, noisy_latents, batch)
            weights = batch["weights"] * diffusion.weights(timesteps, loss_settings)
            if settings.lora.lora_dropout:
                torch.manual_seed(data.derive_seed(run.seed, step, micro_step, rank))
            with processes.no_sync(accelerator, trained, unless=micro_step == num_micro_batches - 1):
                if models.trains_text_encoder:
                    batch["condition"] |= models.prompt_encoder.in_training(trained[1:], batch["captions"])
                model_pred = family.predict(
                    trained[0], noisy_latents.to(models.dtype), timesteps, **batch["condition"]
                )
                huber_c = objective.scheduled_huber_c(loss_settings, timesteps, diffusion.num_train_timesteps)
                loss = objective.diffusion_loss(model_pred, target, weights, batch.get("mask"), huber_c)
                if settings.tracking.debug_loss:
                    picture_losses |= objective.losses_by_name(batch, model_pred, target, huber_c)
                if perceptual_loss is not None:
                    loss = loss + loss_settings.perceptual_weight * perceptual_loss(model_pred, latents, noise, batch)
                accelerator.backward(loss)
            train_loss += loss.detach()
        train_loss, asked_to_stop = interruption.reduce_loss_and_stop(accelerator, train_loss)
        grad_norm = accelerator.clip_grad_norm_(learning.parameters, settings.optimizer.max_grad_norm or math.inf)
        lr = learning.step(train_loss + grad_norm)  # skipped if loss or gradient is not finite
        state.global_step += 1
        numbers = {"train_loss": train_loss, "lr": lr, "grad_norm": grad_norm, **picture_losses}
        ending = reports.step(numbers, asked_to_stop, batch_sampler.num_samples(step))

    # Save the results.
    files = reports.leave(ending, started)
    # Drops the DDP wrappers, which would keep Gloo's threads alive until the interpreter ends and sometimes abort it.
    trained, model = None, None
    accelerator.free_memory()
    reports.close()
    if ending is not None:
        raise ending
    if settings.sharing.push_to_hub and accelerator.is_main_process:
        interruption.obey_requests("in the upload; the LoRA is written")
        model_card.upload_run(settings, files)


if __name__ == "__main__":
    parsed: list[Settings] = []  # the file of --config may be gone when the run ends, or be a pipe
    try:
        parsed.append(parse_settings())
        main(*parsed)
    except (Exception, KeyboardInterrupt, Stopped) as error:
        end(error, Path(__file__).name, lambda: ways_to_save_memory(*parsed))

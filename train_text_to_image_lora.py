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

Writes `pytorch_lora_weights.safetensors` into --output_dir. Run the same command again to go on after an interruption.
"""

import argparse
import contextlib
import functools
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from text_to_image_lora.command_line import (
    Parser,
    above,
    at_least,
    between,
    duration,
    from_up_to,
    hub_id,
    seconds_of,
)
from text_to_image_lora.drawing.prompts import parse_prompt, read_prompts
from text_to_image_lora.errors import InputError, NotANumberError, Stopped, TrainingError
from text_to_image_lora.files import check_writable, counted, reason_of, without_folders
from text_to_image_lora.libraries import hidden, quiet_libraries
from text_to_image_lora.models.compiling import OPTIONS as COMPILED
from text_to_image_lora.pictures import buckets
from text_to_image_lora.pictures.captions import CaptionRules, shuffled_variations
from text_to_image_lora.pictures.layouts import LAYOUTS, Reading
from text_to_image_lora.pictures.records import with_class_pictures
from text_to_image_lora.pictures.sources import load_records
from text_to_image_lora.pictures.tables import Columns
from text_to_image_lora.reports.notes import Notes
from text_to_image_lora.reports.tracking import TRACKERS, trackers_of
from text_to_image_lora.training import interruption
from text_to_image_lora.training.ending import end
from text_to_image_lora.training.launcher import check_launcher
from text_to_image_lora.training.optimizers import OPTIMIZERS, OptimizerSettings, Schedule, check_optimizer


SECRETS = ("hub_token",)
NOT_SHOWN = (*SECRETS, "config", "local_rank")
ENDLESS_VARIATIONS_CACHED = 4
# What may stand behind the prompt of a sample picture.
SAMPLE_OPTIONS = ("negative_prompt", "seed", "num_inference_steps", "guidance_scale", "height", "width")
PREVIEWED = 10  # pictures on the sheet of --preview_data
PERCEPTUAL_WEIGHTS = {"decoder": 0.1, "self": 0.01}  # docs/findings.md
# What a run that goes on from a checkpoint may have otherwise than before; whatever else differs is refused. Pictures,
# captions and weights are compared by their content, wherever they come from.
MAY_CHANGE = set(
    """
    config output_dir resume_from_checkpoint checkpointing_steps checkpoints_total_limit save_every_n_epochs local_rank
    num_cpu_threads pretrained_model_name_or_path revision variant single_file_config pretrained_vae_model_name_or_path
    cache_dir dataset_name dataset_config_name train_data_dir dataset_layout image_column caption_column instance_prompt
    caption_template trigger_word caption_prefix caption_suffix concept_column mask_column class_data_dir class_prompt
    max_train_samples dry_run preview_data skip_bad_images latent_cache_dir latent_cache_limit dataloader_num_workers
    train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing learning_rate
    text_encoder_lr loraplus_lr_ratio scale_lr lr_scheduler lr_warmup_steps lr_warmup_ratio lr_num_cycles lr_power lr_step_rules
    optimizer_args use_8bit_adam ema_decay adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
    mixed_precision deterministic allow_tf32 compile max_train_time enable_xformers_memory_efficient_attention
    enable_npu_flash_attention debug_loss validation_split validation_data_dir
    early_stopping_patience validation_prompt validation_prompts validation_negative_prompt num_validation_images
    validation_epochs validation_steps validation_guidance_scale validation_inference_steps report_to
    tracker_project_name trackio_space_id logging_dir push_to_hub push_checkpoints_to_hub hub_token hub_model_id output_kohya_format kohya_extras
    """.split()  # noqa: SIM905 (one name a word reads better than one a line)
)


class PromptLines(argparse.Action):
    """Puts the lines of a file of prompts in its place."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [prompt.line for prompt in read_prompts(option_string, values)])


def build_parser():
    parser = Parser(
        usage="%(prog)s --pretrained_model_name_or_path MODEL (--dataset_name ID | --train_data_dir FOLDER) [flags]",
        description=__doc__.splitlines()[0],
    )
    # Each has its --no-..., so that the command line can also take back what --config says.
    switch = dict(action=argparse.BooleanOptionalAction)
    yes = dict(default=False, **switch)
    # fmt: off
    group = parser.add_argument_group("run").add_argument
    group("--config", metavar="FILE", help="a YAML file with flags, one a line; the command line goes before it (each run saves its own as run.yaml)")
    group("--output_dir", default="sd-model-finetuned-lora", help="folder for the LoRA, checkpoints, sample pictures and metrics")
    group("--seed", type=between(0, 2**63 - 1, int), help="makes a run reproducible; when not given, one is drawn and saved in run.yaml")
    group("--resume_from_checkpoint", default="latest", help="a checkpoint folder to go on from; latest: the newest in --output_dir that is whole; hf://owner/name[/checkpoint-N]: the newest there or in --output_dir; none: start over")
    group("--checkpointing_steps", type=at_least(0), default=500, help="optimizer steps between checkpoints, from which a killed run goes on (one more comes at the end, or where the run is asked to stop); 0: only there where it is asked to stop")
    group("--checkpoints_total_limit", type=at_least(1), help="keep so many checkpoints and delete the oldest; all when not given")
    group("--max_train_time", type=duration, metavar="TIME", help="stop in time, with a checkpoint and exit code 75, so that the whole command takes no longer than this, such as 3h50m")
    group("--save_every_n_epochs", type=at_least(0), default=0, help="write a LoRA ready for use (epoch-0005/...) every so many epochs; 0: only at the end")
    group("--num_cpu_threads", type=at_least(1), help="threads for computing on a CPU; when not given, the physical cores divided by the processes, unless OMP_NUM_THREADS says otherwise")
    group("--local_rank", type=int, default=-1, help="set by the launcher, not by you")

    group = parser.add_argument_group("base model").add_argument
    group("--pretrained_model_name_or_path", help="the base model, a Stable Diffusion 1, 2 or XL: hub id, local diffusers folder, or a single .safetensors/.ckpt file")
    group("--revision", help="branch, tag or commit of the base model on the hub")
    group("--variant", help="which of the base model's weight files to take, such as fp16")
    group("--single_file_config", metavar="FOLDER", help="diffusers folder with the configuration for a base model that is a single file, where the hub is out of reach")
    group("--pretrained_vae_model_name_or_path", help="another VAE than the base model's: hub id, folder or single file")
    group("--clip_skip", type=at_least(0), help="leave out so many of the text encoder's last layers, in training and validation")
    group("--cache_dir", help="where downloaded models and datasets are stored")

    group = parser.add_argument_group("data").add_argument
    group("--dataset_name", help="hub id of a dataset, or a local folder that holds one")
    group("--dataset_config_name", help="which configuration of the hub dataset, where it has several")
    group("--train_data_dir", nargs="+", metavar="FOLDER", help="folder, .zip or .tar of pictures with captions, or several of them; metadata/README.md shows every layout")
    group("--dataset_layout", choices=LAYOUTS, help="how captions lie in --train_data_dir; recognised when not given")
    group("--image_column", help="column with the pictures; found by itself when not given")
    group("--caption_column", help="column with the captions, text or lists of text; found by itself when not given")
    group("--instance_prompt", help="the caption of all pictures, where they have none")
    group("--caption_template", default="{trigger} {class}", help="the caption of pictures in folders named [trigger]_[class]")
    group("--trigger_word", help="word that is put in front of every caption that lacks it")
    group("--caption_prefix", default="", help="text that is put in front of every caption")
    group("--caption_suffix", default="", help="text that is put after every caption")
    group("--caption_dropout", type=from_up_to(0, 1), default=0.0, help="share of samples that are trained with an empty caption, for guidance")
    group("--shuffle_tags", **yes, help="put a caption's tags (between commas) in another order each time")
    group("--keep_tags", type=at_least(0), default=0, help="with --shuffle_tags: leave the first so many tags where they are")
    group("--tag_variations", type=at_least(1), default=8, help="with --shuffle_tags: orders of each caption that are cached; without the cache they are endless")
    group("--balance", choices=["concept"], help="concept: draw each class folder equally often, by repeating the smaller ones")
    group("--long_prompts", **yes, help="read captions of more than 77 tokens whole, in chunks; infer.py then does it too, and A1111 always")
    group("--concept_column", help="column with the concept of each picture, for --balance; the folder's name when not given")
    group("--mask_column", help="column with masks: what is white in a mask counts in the loss; name.mask.png beside a picture needs no flag")
    group("--class_data_dir", metavar="FOLDER", help="pictures of the class in general, trained beside yours so that it isn't forgotten (DreamBooth's prior preservation)")
    group("--class_prompt", help="the caption of the pictures in --class_data_dir, where they have none")
    group("--prior_loss_weight", type=at_least(0, float), default=1.0, help="how much each picture of --class_data_dir counts in the loss, where one of yours counts 1")
    group("--max_train_samples", type=at_least(1), help="train on so many of the pictures, a choice that never changes; on all when not given")
    group("--resolution", type=at_least(1), help="side in pixels of the square that pictures are resized and cropped to; what the base model is made for when not given (512 for Stable Diffusion 1, 768 or 512 for 2, 1024 for XL)")
    group("--aspect_ratio_buckets", **yes, help="keep the pictures' shapes: train each at the nearest of several sizes with the area of the --resolution square")
    group("--bucket_min_size", type=at_least(1), help="smallest side of a bucket in pixels; half of --resolution when not given")
    group("--bucket_max_size", type=at_least(1), help="largest side of a bucket in pixels; twice --resolution when not given")
    group("--bucket_step", type=at_least(1), help="sides of buckets are multiples of so many pixels; 64 when not given, and less for small resolutions")
    group("--bucket_no_upscale", **yes, help="with --aspect_ratio_buckets: train small pictures at their own size")
    group("--center_crop", **yes, help="crop the middle of each picture; otherwise the place is random")
    group("--random_flip", **yes, help="mirror half of the pictures")
    group("--random_rotation", type=between(0, 180), default=0.0, help="turn pictures by up to so many degrees; less of them is shown, and corners stay filled")
    group("--random_crop_scale", type=between(0.1, 1), default=1.0, help="crop pictures down to this share of their sides, such as 0.8; 1: show all that fits")
    group("--random_brightness", type=between(0, 1), default=0.0, help="change the brightness by up to this share, such as 0.1")
    group("--random_contrast", type=between(0, 1), default=0.0, help="change the contrast by up to this share, such as 0.1")
    group("--random_saturation", type=between(0, 1), default=0.0, help="change the saturation by up to this share, such as 0.1")
    group("--random_hue", type=between(0, 0.5), default=0.0, help="shift the hue by up to this share of the colour circle, such as 0.02")
    group("--image_interpolation_mode", default="lanczos", choices=["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"], help="how pictures are resized")
    group("--dry_run", **yes, help="look at the dataset, say what it holds and what is wrong with it, write --output_dir/dataset.json, and stop")
    group("--preview_data", metavar="FILE", help="write a sheet of what the model will see: some pictures, their variations and captions")
    group("--skip_bad_images", **yes, help="leave out pictures that can't be read and rows without a picture or caption, instead of stopping")
    group("--cache_variations", type=at_least(0), help="variations of each picture in the cache; when not given 1, 2 with --random_flip, 4 with random crops and other augmentation; 0: no cache, encode in each step")
    group("--latent_cache_dir", metavar="FOLDER", default="~/.cache/text_to_image_lora", help="where latents and prompt embeddings are kept for later runs")
    group("--latent_cache_limit", type=above(0), metavar="GIB", help="delete what has not been used for longest from --latent_cache_dir, beyond so many GiB; never what this run needs; no limit when not given")
    group("--dataloader_num_workers", type=at_least(0), default=0, help="processes that load data; worth it with --cache_variations 0")

    group = parser.add_argument_group("LoRA").add_argument
    group("--rank", type=at_least(1), default=4, help="dimension of the update matrices")
    group("--lora_alpha", type=above(0), help="the LoRA's update is scaled by alpha / rank; the rank when not given")
    group("--lora_dropout", type=from_up_to(0, 1), default=0.0, help="dropout before the update matrices")
    group("--target_modules", nargs="+", metavar="NAME", help="layers to adapt, by the ends of their names; all of attention and feed-forward when not given")
    group("--init_lora_weights", default="gaussian", help="how the update matrices begin: true (Kaiming), gaussian or orthogonal")
    group("--use_rslora", **yes, help="scale the LoRA's update by alpha / sqrt(rank)")
    group("--use_dora", **yes, help="weight-decomposed LoRA (DoRA)")
    group("--lora_weights", metavar="PATH", help="start from this LoRA file or folder")
    group("--output_kohya_format", **yes, help="write the LoRA in kohya's format too, for A1111, ComfyUI, Forge and InvokeAI; the file is named after --output_dir")
    group("--kohya_extras", nargs="+", default=[], choices=["thumbnail", "tags"], help="what the kohya file may tell of your pictures: thumbnail: the last sample picture; tags: how often each tag comes in the captions")
    group("--train_text_encoder", **yes, help="adapt the text encoder too (of Stable Diffusion XL both); captions are then encoded in each step")
    group("--text_encoder_rank", type=at_least(1), help="rank of the text encoder's LoRA; --rank when not given")
    group("--text_encoder_lr", type=above(0), help="learning rate of the text encoder's LoRA; --learning_rate when not given")

    group = parser.add_argument_group("training").add_argument
    group("--train_batch_size", type=at_least(1, word="auto"), default=16, help="pictures per process and forward pass; auto: of the --gradient_accumulation_steps pictures of a step, as many at once as fit")
    group("--num_train_epochs", type=at_least(1), default=100, help="passes over the pictures")
    group("--max_train_steps", type=at_least(1), help="optimizer steps; goes before --num_train_epochs")
    group("--gradient_accumulation_steps", type=at_least(1), default=1, help="forward passes per optimizer step")
    group("--gradient_checkpointing", **yes, help="compute activations again in the backward pass: less memory, slower")
    group("--learning_rate", type=above(0), help="learning rate after warm-up; 1e-4 when not given, 1 with --optimizer prodigy")
    group("--scale_lr", **yes, help="multiply the learning rate by processes x accumulation x batch size")
    group("--lr_scheduler", default="constant", choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant"], help="how the learning rate changes over the run")
    group("--lr_warmup_steps", type=at_least(0), help="optimizer steps in which the learning rate rises from 0; when not given, the smaller of 500 and a tenth of the run")
    group("--lr_warmup_ratio", type=between(0, 1), help="share of the run in which the learning rate rises from 0, instead of --lr_warmup_steps")
    group("--lr_num_cycles", type=at_least(1), default=1, help="restarts of --lr_scheduler cosine_with_restarts")
    group("--lr_power", type=at_least(0, float), default=1.0, help="power of --lr_scheduler polynomial")
    group("--lr_step_rules", default="", help="factors of --lr_scheduler piecewise_constant and the steps they end at, such as 1:100,0.1:200,0.01")
    group("--loss_type", choices=["mse", "huber"], default="mse", help="mse: squared error; huber: a scheduled pseudo-Huber loss, for sets with broken pictures or captions in them")
    group("--huber_c", type=above(0), default=0.1, help="width of --loss_type huber at the noisiest timestep")
    group("--perceptual_loss", choices=["decoder", "self"], help="add a loss on features of the VAE's decoder (which then stays in memory), or of the base model itself; no other network is needed")
    group("--perceptual_loss_weight", type=at_least(0, float), help="how much the perceptual loss counts; when not given, 0.1 for decoder and 0.01 for self")
    group("--perceptual_max_timestep", type=at_least(1), default=400, help="--perceptual_loss decoder looks only at timesteps below this one, where pictures can be seen")
    group("--snr_gamma", type=above(0), help="gamma of Min-SNR loss weighting; 5.0 is usual; not used when not given")
    group("--debiased_estimation", **yes, help="weight the loss by 1 / sqrt(SNR), so that noisy timesteps count more")
    group("--timestep_sampling", choices=["uniform", "logit_normal", "mode"], default="uniform", help="which timesteps are drawn more often, as in diffusers' training helpers")
    group("--timestep_range", type=int, nargs=2, metavar=("FIRST", "LAST"), help="train on these timesteps only, of 0 (clean) to 1000 (noise)")
    group("--logit_mean", type=between(-100, 100), default=0.0, help="mean of --timestep_sampling logit_normal; below 0: noisier timesteps")
    group("--logit_std", type=above(0), default=1.0, help="standard deviation of --timestep_sampling logit_normal")
    group("--mode_scale", type=between(-1, 1.75), default=1.29, help="scale of --timestep_sampling mode; above 0, the middle timesteps come more often")
    group("--input_perturbation", type=at_least(0, float), default=0.0, help="scale of noise that is added to the model's input only; 0.1 is usual")
    group("--noise_offset", type=at_least(0, float), default=0.0, help="scale of a noise that is constant over each channel")
    group("--prediction_type", choices=["epsilon", "v_prediction"], help="what the model predicts; the base model's own when not given")
    group("--rescale_betas_zero_snr", **yes, help="let the last timestep be noise alone (zero terminal SNR); needs v_prediction")
    group("--optimizer", choices=[*OPTIMIZERS], help="which optimizer; adamw when not given")
    group("--optimizer_args", nargs="+", default=[], metavar="KEY=VALUE", help="more options of the optimizer, such as d_coef=0.5")
    group("--use_8bit_adam", **yes, help="another way to write --optimizer adamw8bit")
    group("--loraplus_lr_ratio", type=above(0), help="LoRA+: how many times the learning rate the B matrices have; 16 is usual")
    group("--use_ema", **yes, help="validate and save the moving average of the LoRA's weights")
    group("--ema_decay", type=from_up_to(0, 1), default=0.999, help="decay of the moving average of --use_ema; it begins lower")
    group("--adam_beta1", type=from_up_to(0, 1), default=0.9, help="decay of the optimizer's first moment")
    group("--adam_beta2", type=from_up_to(0, 1), default=0.999, help="decay of the optimizer's second moment")
    group("--adam_weight_decay", type=at_least(0, float), default=1e-2, help="the optimizer's weight decay")
    group("--adam_epsilon", type=at_least(0, float), default=1e-8, help="what the optimizer adds to its denominator")
    group("--max_grad_norm", type=at_least(0, float), default=1.0, help="clip the gradient to this norm; 0: don't")
    group("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the frozen base model; the launcher's when not given. The LoRA is always float32")
    group("--deterministic", **yes, help="a seed gives equal bits each time on a GPU too: deterministic kernels and plain attention, whose memory grows with the square of the picture's area; slower")
    group("--allow_tf32", **switch, default=True, help="TF32 matrix products where the GPU has them")
    group("--compile", choices=["off", *COMPILED], default="off", help="torch.compile of the training steps, for runs of thousands of steps: each kind of transformer block once, the full denoiser, or that with CUDA graphs; what it gives is said at the start")
    group("--enable_xformers_memory_efficient_attention", **yes, help="xformers attention instead of PyTorch's own")
    group("--enable_npu_flash_attention", **yes, help="flash attention of Ascend NPUs (needs torch_npu)")

    group = parser.add_argument_group("validation loss").add_argument
    group("--validation_split", type=between(0, 0.5), default=0.0, help="share of the pictures that are not trained on, to tell learning from overfitting; pictures that look alike stay together")
    group("--validation_data_dir", nargs="+", metavar="FOLDER", help="pictures to validate on in folders of their own, laid out as in --train_data_dir")
    group("--early_stopping_patience", type=at_least(1), help="stop when so many validations in a row were no better; the best LoRA is in best/ in any case")

    group = parser.add_argument_group("sample pictures").add_argument
    group("--validation_prompt", help="a prompt to draw sample pictures with while training")
    group("--validation_prompts", nargs="+", action=PromptLines, default=[], metavar="PROMPT", help="several prompts to draw sample pictures with while training, or a .txt file with one a line; options may stand behind each: a red axe --seed 3 --width 768 --negative blurry (also --steps, --guidance, --height, and kohya's --n --w --h --d --l --s)")
    group("--validation_negative_prompt", default="", help="what the sample pictures are to avoid")
    group("--num_validation_images", type=at_least(0), default=4, help="sample pictures of each prompt; 0: none")
    group("--validation_epochs", type=at_least(0), default=1, help="validate every so many epochs, before training and at the end; 0: only before and at the end")
    group("--validation_steps", type=at_least(1), help="validate every so many optimizer steps, instead of --validation_epochs")
    group("--validation_guidance_scale", type=at_least(0, float), default=7.5, help="how strictly the sample pictures follow their prompt (classifier-free guidance)")
    group("--validation_inference_steps", type=at_least(1), default=30, help="denoising steps of the sample pictures")

    group = parser.add_argument_group("tracking and sharing").add_argument
    group("--report_to", choices=[*TRACKERS, "all", "none"], help="where metrics and sample pictures go; wandb when it is installed (offline without key or network)")
    group("--debug_loss", **yes, help="report the loss of each picture in each step too, as loss_for_ and the name of its file")
    group("--tracker_project_name", default="text2image-fine-tune", help="the project's name in the trackers")
    group("--trackio_space_id", type=hub_id, metavar="OWNER/NAME", help="the hub Space that trackio's dashboard runs in, private when it is made; on this machine when not given")
    group("--logging_dir", default="logs", help="TensorBoard's folder, inside --output_dir")
    group("--push_to_hub", **yes, help="upload the LoRA, its model card and sample pictures at the end")
    group("--push_checkpoints_to_hub", **yes, help="upload each checkpoint beside the training, into a repository that is private when it is made; --resume_from_checkpoint hf://... goes on from it on another machine")
    group("--hub_token", help="token for the upload; better: hf auth login")
    group("--hub_model_id", help="repository to upload to; the output folder's name when not given")
    # fmt: on
    return parser


def parse_args(argv=None):
    """The flags, from the command line over those of `--config`; raises `InputError`. Nothing writes into them later."""
    args = build_parser().parse(argv)
    check_model_and_data(args)
    check_lora_and_optimizer(args)
    check_schedule_and_loss(args)
    check_validation_and_upload(args)
    return args


# Checks that need two flags, or more than a number's bounds.


def check_model_and_data(args):
    if args.pretrained_model_name_or_path is None:
        raise InputError("--pretrained_model_name_or_path is needed: a hub id, a local folder or a single file.")
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise InputError("Pass one of --dataset_name (hub id or folder) and --train_data_dir (folder).")
    try:
        caption = args.caption_template.format_map({"trigger": "a", "class": "b"})
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"--caption_template {args.caption_template!r}: it may hold {{trigger}} and {{class}}, and no other braces."
        ) from error
    if args.class_data_dir is None and args.class_prompt is not None:
        raise InputError("--class_prompt is the caption of --class_data_dir's pictures: add it.")
    prompts = dict(caption_template=caption, instance_prompt=args.instance_prompt, class_prompt=args.class_prompt)
    for name, text in prompts.items():
        if text is not None and not text.strip():
            raise InputError(f"--{name} is empty: write what the pictures show.")
    vae = args.pretrained_vae_model_name_or_path
    if vae is not None and vae.startswith((".", "/", "~")) and not Path(vae).exists():
        raise InputError(f"{vae}: there is no such file or folder (--pretrained_vae_model_name_or_path).")
    if args.preview_data is not None and Path(args.preview_data).suffix.lower() not in (".png", ".jpg", ".webp"):
        raise InputError(f"--preview_data {args.preview_data}: name a .png, .jpg or .webp file.")
    of_buckets = ("bucket_min_size", "bucket_max_size", "bucket_step", "bucket_no_upscale")
    given = [name for name in of_buckets if getattr(args, name) not in (None, False)]
    if given and not args.aspect_ratio_buckets:
        raise InputError(f"--{given[0]} says how buckets are: add --aspect_ratio_buckets.")


def check_lora_and_optimizer(args):
    if args.init_lora_weights not in ("true", "gaussian", "orthogonal"):
        rewrites = args.init_lora_weights.startswith(("pissa", "olora", "corda", "loftq"))
        reason = " It rewrites the base model, so the saved file would be wrong on the plain one." if rewrites else ""
        raise InputError(f"--init_lora_weights {args.init_lora_weights}: choose true, gaussian or orthogonal.{reason}")
    ranks = [args.rank, *([args.text_encoder_rank] if args.text_encoder_rank is not None else [])]
    if args.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
        raise InputError(f"--init_lora_weights orthogonal needs an even rank, not {' and '.join(map(str, ranks))}.")
    if args.lora_weights is not None and not Path(args.lora_weights).exists():
        raise InputError(f"{args.lora_weights}: there is no such file or folder (--lora_weights).")
    if args.kohya_extras and not args.output_kohya_format:
        raise InputError("--kohya_extras is for the file in kohya's format: add --output_kohya_format.")
    if "thumbnail" in args.kohya_extras and not sample_prompts(args):
        raise InputError("--kohya_extras thumbnail takes a sample picture: add --validation_prompt.")
    if not args.train_text_encoder and (args.text_encoder_rank is not None or args.text_encoder_lr is not None):
        raise InputError(
            "--text_encoder_rank and --text_encoder_lr are for a text encoder that is trained: add --train_text_encoder."
        )
    if args.use_8bit_adam and args.optimizer not in (None, "adamw8bit"):
        raise InputError(f"Pass one of --use_8bit_adam and --optimizer {args.optimizer}.")
    name = optimizer_name(args)
    if name == "schedulefree" and args.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise InputError(
            f"--optimizer schedulefree needs no --lr_scheduler {args.lr_scheduler}: leave that out, or take another optimizer."
        )
    if name == "prodigy" and (args.loraplus_lr_ratio is not None or args.text_encoder_lr is not None):
        raise InputError(
            "--optimizer prodigy has one learning rate for all: leave --loraplus_lr_ratio and --text_encoder_lr out."
        )
    if name == "prodigy" and args.scale_lr:
        raise InputError("--optimizer prodigy finds the learning rate itself: leave --scale_lr out.")
    check_optimizer(name, args.optimizer_args)


def check_schedule_and_loss(args):
    if args.compile != "off" and args.perceptual_loss == "self":
        raise InputError(
            "--perceptual_loss self looks into the UNet where --compile leaves nothing to see: leave one out."
        )
    if args.deterministic and args.enable_xformers_memory_efficient_attention:
        raise InputError(
            "--deterministic needs plain attention: leave --enable_xformers_memory_efficient_attention out."
        )
    if args.train_batch_size == "auto" and args.gradient_accumulation_steps == 1:
        raise InputError(
            "--train_batch_size auto takes as many of a step's pictures at once as fit: say how many a step has with "
            "--gradient_accumulation_steps, such as 8."
        )
    if args.lr_warmup_ratio is not None and args.lr_warmup_steps is not None:
        raise InputError("Pass one of --lr_warmup_steps and --lr_warmup_ratio.")
    if args.lr_scheduler == "piecewise_constant" and not args.lr_step_rules:
        raise InputError("--lr_scheduler piecewise_constant needs --lr_step_rules, such as 1:100,0.1:200,0.01.")
    factor = r"\d*\.?\d+(e[+-]?\d+)?"
    if not re.fullmatch(rf"({factor}:\d+,)*{factor}", args.lr_step_rules or "1"):
        raise InputError(
            f"--lr_step_rules {args.lr_step_rules}: write factor:step pairs and the last factor, such as "
            "1:100,0.1:200,0.01."
        )
    if not args.scale_lr:
        check_polynomial(args, learning_rate_of(args))
    if args.snr_gamma is not None and args.debiased_estimation:
        raise InputError("Pass one of --snr_gamma and --debiased_estimation: both weight the loss by the timestep.")
    if args.timestep_range is not None and not 0 <= args.timestep_range[0] < args.timestep_range[1] <= 1000:
        given = " ".join(map(str, args.timestep_range))
        raise InputError(f"--timestep_range {given}: write two numbers from 0 to 1000, the smaller one first.")


def check_polynomial(args, learning_rate):
    if args.lr_scheduler == "polynomial" and learning_rate <= 1e-7:  # where diffusers' schedule ends
        raise InputError(f"--learning_rate {learning_rate}: polynomial ends at 1e-07, so it must be more than that.")


def check_validation_and_upload(args):
    if args.validation_split and args.validation_data_dir:
        raise InputError("Pass one of --validation_split and --validation_data_dir.")
    if args.early_stopping_patience and not (args.validation_split or args.validation_data_dir):
        raise InputError("--early_stopping_patience needs pictures to judge by: add --validation_split 0.1")
    if args.trackio_space_id is not None and args.report_to not in ("trackio", "all"):
        raise InputError("--trackio_space_id says where trackio's dashboard runs: add --report_to trackio.")
    if args.early_stopping_patience and not (args.validation_steps or args.validation_epochs):
        raise InputError(
            "--early_stopping_patience needs validations: add --validation_steps, or --validation_epochs 1"
        )
    if any(not prompt.strip() for prompt in sample_prompts(args)):
        raise InputError("--validation_prompt is empty: write what the picture shows, or leave the flag out.")
    if alien := [name for options in sample_options(args) for name in options if name not in SAMPLE_OPTIONS]:
        listed = ", ".join(f"--{name}" for name in SAMPLE_OPTIONS)
        raise InputError(f"--{alien[0]} behind a prompt is for infer.py alone. Sample pictures have {listed}.")
    uploads = [name for name in ("push_to_hub", "push_checkpoints_to_hub") if getattr(args, name)]
    if uploads and os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise InputError(
            f"--{uploads[0]} can't work with HF_HUB_OFFLINE set: unset it, or upload later with `hf upload`."
        )


# What the flags mean, as the values that each room acts on.


def optimizer_name(args):
    return "adamw8bit" if args.use_8bit_adam else args.optimizer or "adamw"


def learning_rate_of(args):
    if args.learning_rate is not None:
        return args.learning_rate
    return 1.0 if optimizer_name(args) == "prodigy" else 1e-4


def sample_lines(args):
    """The prompts of the sample pictures as they were written, each with its own options."""
    prompts = [args.validation_prompt] if args.validation_prompt is not None else []
    return [*prompts, *args.validation_prompts] if args.num_validation_images else []


def sample_prompts(args):
    return [parse_prompt(line, "--validation_prompts").text for line in sample_lines(args)]


def sample_options(args):
    """For each prompt what its sample pictures have otherwise {name: value}."""
    return [parse_prompt(line, "--validation_prompts").options for line in sample_lines(args)]


def resolution_of(args, base):
    return base.resolution if args.resolution is None else args.resolution


def cache_folder(args):
    return Path(args.latent_cache_dir).expanduser()


def reading_of(args):
    return Reading(
        Columns(args.image_column, args.caption_column, args.mask_column, args.concept_column),
        layout=args.dataset_layout,
        instance_prompt=args.instance_prompt,
        caption_template=args.caption_template,
        config_name=args.dataset_config_name,
        cache_dir=args.cache_dir,
        archive_dir=cache_folder(args) / "archives",
    )


def caption_rules_of(args):
    return CaptionRules(
        args.trigger_word, args.caption_prefix, args.caption_suffix, args.shuffle_tags, args.keep_tags,
        args.tag_variations, args.caption_dropout,
    )  # fmt: skip


def buckets_of(args, base):
    """The `Buckets`; `InputError` where no sizes can be made of their limits."""
    resolution = resolution_of(args, base)
    if not args.aspect_ratio_buckets:
        return buckets.square(resolution)
    return buckets.settle(
        resolution, base.image_factor, smallest=args.bucket_min_size, largest=args.bucket_max_size,
        step=args.bucket_step, no_upscale=args.bucket_no_upscale,
    )  # fmt: skip


def augmentation_of(args):
    from text_to_image_lora.pictures.transforms import Augmentation

    return Augmentation(
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        rotation=args.random_rotation,
        crop_scale=args.random_crop_scale,
        brightness=args.random_brightness,
        contrast=args.random_contrast,
        saturation=args.random_saturation,
        hue=args.random_hue,
    )


def num_variations(args):
    """How many variations of each picture are cached; 0 where pictures are encoded live."""
    if args.cache_variations is not None:
        return args.cache_variations
    return augmentation_of(args).variations() or ENDLESS_VARIATIONS_CACHED


def batching_of(args, seed):
    """With --train_batch_size auto, of one sample a batch until it is found how many fit: the steps' samples stay."""
    from text_to_image_lora.training.batches import Batching

    return Batching(
        1 if args.train_batch_size == "auto" else args.train_batch_size,
        args.gradient_accumulation_steps,
        seed,
        args.balance == "concept",
        args.prior_loss_weight,
    )


def draws_of(args, seed, num_train_timesteps):
    from text_to_image_lora.training.data import Draws, TimestepSampling

    sampling = None
    if args.timestep_sampling != "uniform" or args.timestep_range is not None:
        first, last = args.timestep_range or (0, num_train_timesteps)
        last = min(last, num_train_timesteps)
        sampling = TimestepSampling(
            args.timestep_sampling, first, last, args.logit_mean, args.logit_std, args.mode_scale
        )
    return Draws(
        seed, num_train_timesteps, caption_rules_of(args), sampling, bool(args.input_perturbation),
        perceptual=args.perceptual_loss == "self",
    )  # fmt: skip


def loss_of(args):
    from text_to_image_lora.training.objective import Loss

    weight = args.perceptual_loss_weight
    return Loss(
        huber_c=args.huber_c if args.loss_type == "huber" else None,
        snr_gamma=args.snr_gamma,
        debiased=args.debiased_estimation,
        noise_offset=args.noise_offset,
        input_perturbation=args.input_perturbation,
        perceptual=args.perceptual_loss,
        perceptual_weight=PERCEPTUAL_WEIGHTS.get(args.perceptual_loss) if weight is None else weight,
        perceptual_max_timestep=args.perceptual_max_timestep,
    )


def lora_settings_of(args, family):
    """The `LoraSettings` of the denoiser; a text encoder's differ in rank, alpha and layers."""
    from text_to_image_lora.models.lora import LoraSettings

    return LoraSettings(
        args.rank,
        args.rank if args.lora_alpha is None else args.lora_alpha,
        args.target_modules or family.target_modules,
        dropout=args.lora_dropout,
        init=args.init_lora_weights,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )


def optimizer_of(args, effective_batch_size):
    scale = effective_batch_size if args.scale_lr else 1
    check_polynomial(args, scale * learning_rate_of(args))
    return OptimizerSettings(
        optimizer_name(args),
        scale * learning_rate_of(args),
        text_encoder_lr=None if args.text_encoder_lr is None else scale * args.text_encoder_lr,
        loraplus_lr_ratio=args.loraplus_lr_ratio,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
        options=args.optimizer_args,
    )


def schedule_of(args, steps_per_epoch):
    num_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    warmup_steps = args.lr_warmup_steps
    if args.lr_warmup_ratio is not None:
        warmup_steps = round(args.lr_warmup_ratio * num_steps)
    elif warmup_steps is None:
        warmup_steps = min(500, num_steps // 10)
    if args.lr_scheduler == "polynomial" and warmup_steps >= num_steps:
        raise InputError(
            f"--lr_scheduler polynomial: {warmup_steps} of {num_steps} steps are warm-up. Leave some for it."
        )
    rules = args.lr_step_rules or None
    return Schedule(args.lr_scheduler, num_steps, warmup_steps, args.lr_num_cycles, args.lr_power, rules)


def plan_of(args, base, dtype):
    """What of the settings a run's memory depends on."""
    from text_to_image_lora.reports.sample_pictures import AT_ONCE
    from text_to_image_lora.training.memory import Plan

    state = OPTIMIZERS[optimizer_name(args)][-1] + (4 if args.use_ema else 0)
    live = not num_variations(args)
    return Plan(
        dtype, lora_settings_of(args, base.family), state, args.gradient_checkpointing, caches=not live,
        encoders_stay=live or args.train_text_encoder or args.perceptual_loss == "decoder",
        draws=min(AT_ONCE, len(sample_prompts(args)) * args.num_validation_images),
    )  # fmt: skip


def ways_to_save_memory(args):
    """In words, the flags that make a run take less, the cheapest first; the last of them make it another run."""
    ways = []
    if precision_of(args) == "no":
        ways.append("--mixed_precision bf16 (fp16 on GPUs before 2020)")
    if args.train_batch_size not in (1, "auto"):
        accumulation = args.train_batch_size * args.gradient_accumulation_steps
        ways.append(f"--train_batch_size 1 --gradient_accumulation_steps {accumulation}")
    if not args.gradient_checkpointing:
        ways.append("--gradient_checkpointing (slower)")
    anew = "a smaller --resolution, which begins a new run (another --output_dir)"
    return " or ".join([*ways, anew if num_variations(args) else f"--cache_variations 4 or {anew}"])


def samples_of(args, base, seed):
    from text_to_image_lora.reports.sample_pictures import Samples

    return Samples(
        sample_prompts(args),
        args.validation_negative_prompt,
        args.num_validation_images,
        resolution=resolution_of(args, base),
        num_inference_steps=args.validation_inference_steps,
        guidance_scale=args.validation_guidance_scale,
        seed=seed,
        own=sample_options(args),
    )


# Before the models: what is there, what may be shown, what stops the run at once.


def hide_secrets(args):
    """Takes tokens out of `sys.argv`, which trackers record, and returns the flags that may be shown."""
    for name in SECRETS:
        secret = getattr(args, name)
        if secret:
            sys.argv[:] = [word.replace(secret, "***") for word in sys.argv]
    return {k: v for k, v in vars(args).items() if k not in NOT_SHOWN and v not in (None, [])}


def find_inputs(args, leave_out, say):
    """The `BaseModel`, the records to train on, and those to validate on or None, as the command names them.

    What is wrong with them is told before torch is imported. Rows that can't be used go to `leave_out(source, reason)`,
    where there is one.
    """
    from huggingface_hub import get_token

    from text_to_image_lora.models.dialects import check_family, check_lora
    from text_to_image_lora.models.loading import find_base_model

    if args.lora_weights is not None:
        check_lora(args.lora_weights)
    base = find_base_model(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant,
        single_file_config=args.single_file_config, cache_dir=args.cache_dir,
    )  # fmt: skip
    if args.lora_weights is not None:
        check_family(args.lora_weights, base)
    side = resolution_of(args, base)
    if side % base.image_factor:
        near = max(round(side / base.image_factor), 1) * base.image_factor
        raise InputError(f"--resolution {side}: this model needs a multiple of {base.image_factor}, e.g. {near}.")
    buckets_of(args, base)
    if leave_out is None and args.skip_bad_images:

        def leave_out(source, reason):
            say(f"left out: {source}: {reason}")

    reading, rules = reading_of(args), caption_rules_of(args)
    records = load_records(
        reading, rules, dataset_name=args.dataset_name, train_data_dir=args.train_data_dir,
        max_train_samples=args.max_train_samples, leave_out=leave_out, say=say,
    )  # fmt: skip
    validation_records = None
    if args.validation_data_dir is not None:
        plain = reading._replace(config_name=None)
        validation_records = load_records(
            plain, rules, train_data_dir=args.validation_data_dir, leave_out=leave_out, say=say
        )
    if args.class_data_dir is not None:
        own = Reading(instance_prompt=args.class_prompt, archive_dir=reading.archive_dir)
        class_pictures = load_records(
            own, CaptionRules(), train_data_dir=args.class_data_dir, leave_out=leave_out, say=say
        )
        records = with_class_pictures(records, class_pictures)
    unused = base.family.text_encoders[0].unreached(0)
    if args.clip_skip is not None and args.clip_skip + unused >= base.text_layers:
        without = f", {unused} of them not used by {base.family.name}" if unused else ""
        raise InputError(
            f"--clip_skip {args.clip_skip}: the text encoder has only {base.text_layers} layers{without}."
        )
    if (args.push_to_hub or args.push_checkpoints_to_hub) and not (args.hub_token or get_token()):
        raise InputError("--push_to_hub and --push_checkpoints_to_hub need a token: run `hf auth login` first.")
    check_writable(args.output_dir, "--output_dir")
    if args.preview_data is not None:
        check_writable(Path(args.preview_data).parent, "--preview_data")
        if Path(args.preview_data).is_dir():
            raise InputError(f"--preview_data {args.preview_data}: it is a folder. Name a file in it.")
    if args.cache_variations != 0 or args.validation_split or args.validation_data_dir:
        check_writable(cache_folder(args), "--latent_cache_dir")
    return base, records, validation_records


def picture_sets(args, base, records, validation_records, *, usable, say):
    """The `PictureSet` to train on and the one to validate on, or None; `usable(records)` leaves out what can't be used."""
    from text_to_image_lora.pictures.alike import divide
    from text_to_image_lora.pictures.picture_set import PictureSet, View

    view = View(augmentation_of(args), args.image_interpolation_mode)

    def make(records):
        records, facts = usable(records)
        return PictureSet(records, facts, buckets_of(args, base).sizes_of(facts), records["captions"][:], view)

    pictures = make(records)
    if validation_records is None and not args.validation_split:
        return pictures, None
    others = None if validation_records is None else make(validation_records)
    return divide(pictures, others, args.validation_split, say)


def to_train_on(args, pictures):
    """The pictures as they are trained on: where shuffled tags are cached, each order is a caption of its own."""
    if not args.shuffle_tags or not num_variations(args) or args.train_text_encoder:
        return pictures
    rules = caption_rules_of(args)
    return pictures.having(captions=[shuffled_variations(group, rules) for group in pictures.captions])


def write_preview(args, pictures, sampler):
    """Draws what the model will see of the first pictures; returns the line that says where."""
    from text_to_image_lora.pictures.inspection import preview_sheet

    chosen = list(dict.fromkeys([*sampler.samples_of(0).tolist(), *range(len(pictures))]))[:PREVIEWED]
    sheet = preview_sheet(pictures, chosen, min(num_variations(args) or 4, 4))
    Path(args.preview_data).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.preview_data)
    return f"what the model will see: {args.preview_data}"


def choose_num_chunks(args, tokenizer, sets, say):
    """How many chunks of tokens the captions of these `PictureSet`s and the prompts of the sample pictures need."""
    from text_to_image_lora.models import prompts

    captions = [group for pictures in sets for group in pictures.captions]
    sources = [source for pictures in sets for source in pictures.records["source"]]
    drawn = [[prompt] for prompt in sample_prompts(args)]
    counts = prompts.count_tokens(tokenizer, captions + drawn)
    sources += ["--validation_prompts"] * len(drawn)
    return prompts.choose_num_chunks(tokenizer, counts, sources, long_prompts=args.long_prompts, say=say)


def look_at_data(args, base, records, validation_records, left_out):
    """--dry_run: what the dataset holds, what is wrong with it, and with --preview_data what the model will see of it.

    No model is loaded but the tokenizer. Raises `InputError` for what training would refuse.
    """
    import torch

    with hidden(*not_needed(args)):
        from text_to_image_lora.models import loading, modules, prompts
        from text_to_image_lora.pictures import examine, inspection
        from text_to_image_lora.training import batches, caching, memory, trials

    def usable(records):
        good, bad = examine.examine(records, range(len(records)))
        left_out.extend((records[index]["source"], reason) for index, reason in sorted(bad.items()))
        return examine.usable_part(records, good)

    seed, report_file = args.seed or 0, Path(args.output_dir) / "dataset.json"
    pictures, validated = picture_sets(args, base, records, validation_records, usable=usable, say=print)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    sampler = batches.make_sampler(pictures, batching_of(args, seed), rank=0, world_size=world_size)
    tokenizer, token_counts, num_chunks, too_long = loading.load_tokenizer(base), None, 1, None
    if tokenizer is not None:
        token_counts = prompts.count_tokens(tokenizer, pictures.captions)
        try:
            num_chunks = choose_num_chunks(args, tokenizer, [pictures], lambda line: None)
        except InputError as error:
            too_long = error
    cache_bytes = 0
    if num_variations(args):
        seen = to_train_on(args, pictures)
        captions = [] if args.train_text_encoder else caching.captions_to_cache(seen, caption_rules_of(args))
        dtype = torch.float32 if precision_of(args) == "no" else torch.float16  # or another of two bytes
        cache_bytes = caching.bytes_of_cache(
            seen, base, variations=num_variations(args), captions=captions, num_chunks=num_chunks, dtype=dtype
        )
    report = inspection.describe(
        pictures, left_out, sampler.samples, num_validated=len(validated or ()), token_counts=token_counts,
        token_limit=None if tokenizer is None or args.long_prompts else tokenizer.model_max_length,
        steps_per_epoch=sampler.steps_per_epoch, cache_bytes=cache_bytes,
    )  # fmt: skip
    needs, lines = None, ["", "memory: not told without the base's configuration (--single_file_config FOLDER)"]
    if tokenizer is not None:
        index, batch_size = trials.heaviest_batch(pictures, sampler, sampler.batch_size)
        shapes = trials.shapes_of(pictures, index, base, num_chunks)
        needs = memory.estimate(base, shapes, plan_of(args, base, modules.dtype_of(precision_of(args))))
        own = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        lines = ["", *memory.lines_of(needs, batch_size, ways_to_save_memory(args), own)]
    inspection.write_report(report | {"memory_bytes": needs and needs._asdict()}, report_file)
    print("\n".join([*inspection.lines_of(report), *lines, "", f"all of it: {report_file}"]))
    if args.preview_data is not None:
        print(write_preview(args, pictures, sampler))
    if too_long is not None:
        raise too_long
    if left_out and not args.skip_bad_images:
        source, reason = left_out[0]
        raise InputError(
            f"{source}: {reason} ({len(left_out)} such pictures or rows in all). Fix them, or pass --skip_bad_images to "
            "leave them out."
        )


# What a run is, and what is told of it.


def identity_of_run(args, base, pictures, sampler, lora_settings, seed):
    """What must be the same for a checkpoint to be gone on from, by the flags' names."""
    limits = buckets_of(args, base) if args.aspect_ratio_buckets else None
    settled = {
        "seed": seed,
        "resolution": resolution_of(args, base),
        "bucket_min_size": limits and limits.smallest,
        "bucket_max_size": limits and limits.largest,
        "bucket_step": limits and limits.step,
        "clip_skip": args.clip_skip or None,
        "cache_variations": num_variations(args),
        "lora_alpha": lora_settings.alpha,
        "target_modules": list(lora_settings.target_modules),
        "text_encoder_rank": (args.text_encoder_rank or args.rank) if args.train_text_encoder else None,
        "optimizer": optimizer_name(args),
        "loraplus": args.loraplus_lr_ratio is not None,
        "perceptual_loss_weight": loss_of(args).perceptual_weight,
        "effective_batch_size": sampler.effective_batch_size,
        "dataset": pictures.fingerprint([sampler.samples.tolist(), sampler.groups.tolist()]),
    }
    identity = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE} | settled
    if args.prediction_type is None:
        del identity["prediction_type"]  # the base model's own, which is known when it is loaded
    return identity


def write_about_run(args, run, shown, described, notes, accelerator):
    """Writes run.yaml, for --config, and about.json, for the page and the trackers; returns what the second holds.

    run.yaml has the run's flags, its seed, and nothing that follows from other flags: so that --config run.yaml --rank 16
    has the alpha of rank 16.
    """
    from text_to_image_lora.reports import about

    flags = {name: value for name, value in shown.items() if name not in ("validation_prompt", "validation_prompts")}
    flags |= ({"validation_prompts": sample_lines(args)} if sample_lines(args) else {}) | {"seed": run.seed}
    words = build_parser().words(flags | {"mixed_precision": accelerator.mixed_precision})
    return about.write_about(
        args.output_dir, flags=flags, command=about.command_line(Path(__file__).name, words, accelerator),
        machine=about.machine(accelerator), settings=described,
        dataset=about.data_sheet(run.pictures, run.validated, run.sampler, notes),
    )  # fmt: skip


def precision_of(args):
    """The precision that the flag or the launcher asks for."""
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(f"ACCELERATE_MIXED_PRECISION={precision}: choose no, fp16 or bf16.")
    return precision


def make_accelerator(args, lora_settings, trackers):
    """The `Accelerator` in the run's precision, which is checked against the device; computing threads are settled."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, ProjectConfiguration

    from text_to_image_lora.training import processes

    precision = precision_of(args)
    if precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise InputError("--mixed_precision fp16 needs a GPU: on a CPU it would train in float32. Use bf16 or no.")
    processes.be_deterministic(args.deterministic)
    logging_dir = os.path.join(args.output_dir, args.logging_dir)
    accelerator = Accelerator(
        mixed_precision=precision,
        # Said outright, or ACCELERATE_GRADIENT_ACCUMULATION_STEPS would divide the gradients once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=logging_dir),
        # Plain adapters compute in the base's own precision; peft's, in float32, need the casts.
        kwargs_handlers=[AutocastKwargs(enabled=lora_settings.needs_autocast)],
    )
    if args.enable_xformers_memory_efficient_attention and accelerator.device.type != "cuda":
        raise InputError("--enable_xformers_memory_efficient_attention needs a CUDA GPU: leave it out here.")
    if args.enable_npu_flash_attention and accelerator.device.type != "npu":
        raise InputError("--enable_npu_flash_attention needs an Ascend NPU and torch_npu: leave it out here.")
    if args.compile == "graphs" and accelerator.device.type != "cuda":
        raise InputError("--compile graphs needs a CUDA GPU: take blocks or full here.")
    if accelerator.device.type == "cpu":
        torch.set_num_threads(processes.num_cpu_threads(args.num_cpu_threads, os.environ))
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32  # PyTorch's own default is yes
    return accelerator


class Run(NamedTuple):
    """What a run is, before any model is loaded."""

    base: Any  # the `BaseModel`
    state: Any  # the `TrainState` to begin with
    resume_path: Path | None
    seed: int
    pictures: Any  # the `PictureSet` to train on
    validated: Any  # the one to validate on, or None
    sampler: Any
    lora: Any  # the settings of LoRA, loss, optimizer, schedule and sample pictures, as their rooms define them
    loss: Any
    optimizer: OptimizerSettings
    schedule: Schedule
    samples: Any
    variations: int  # of each picture in the cache; 0: no cache
    identity: dict  # what must be the same for a checkpoint to be gone on from
    identity_before: dict | None  # that of the checkpoint


def prepare(args, base, records, validation_records, accelerator, say, notes):
    """The `Run` that the command means: where it stopped, with which seed, pictures, steps and settings.

    What is said of the pictures is kept in `notes`.
    """
    from text_to_image_lora.pictures.examine import usable_pictures
    from text_to_image_lora.pictures.inspection import lines_of_samples
    from text_to_image_lora.training import checkpoint, hub_checkpoints, processes
    from text_to_image_lora.training.batches import make_sampler

    def where_it_stopped():
        path = hub_checkpoints.find_checkpoint(args.output_dir, args.resume_from_checkpoint, args.hub_token, say)
        if path is not None:
            return path, *checkpoint.read_state(path)
        drawn = int.from_bytes(os.urandom(4), "little")
        seed = drawn if args.seed is None else args.seed
        return None, checkpoint.TrainState(seed=seed, started_at=int(time.time())), None

    # The main process decides: on several machines the others may not see its output folder.
    resume_path, state, identity_before = processes.as_main_says(where_it_stopped, accelerator)
    seed = state.seed if args.seed is None else args.seed
    usable = functools.partial(
        usable_pictures,
        folder=cache_folder(args),
        skip_bad_images=args.skip_bad_images,
        accelerator=accelerator,
        say=notes,
    )
    pictures, validated = picture_sets(args, base, records, validation_records, usable=usable, say=notes)
    if pictures.masked and args.perceptual_loss is not None:
        raise InputError(
            "--perceptual_loss looks at whole pictures, and some of these have masks: leave one of the two out."
        )
    sampler = make_sampler(
        pictures, batching_of(args, seed), rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    lora_settings = lora_settings_of(args, base.family)
    identity = identity_of_run(args, base, pictures, sampler, lora_settings, seed)
    processes.check_alike(identity)
    if resume_path is not None:
        checkpoint.check_same_run(resume_path, identity_before, identity)
    schedule = schedule_of(args, sampler.steps_per_epoch)
    optimizer_settings = optimizer_of(args, sampler.effective_batch_size)
    for line in lines_of_samples(pictures, sampler.samples, args.aspect_ratio_buckets, args.balance is not None):
        say(line)
    return Run(
        base, state, resume_path, seed, pictures, validated, sampler, lora_settings, loss_of(args), optimizer_settings,
        schedule, samples_of(args, base, seed), num_variations(args), identity, identity_before,
    )  # fmt: skip


def adapt(args, adapted, lora_settings, family, seed):
    """Adds the LoRA to the models ({component: model}, the denoiser first), and sets what the flags want of them.

    Returns how many modules were adapted.
    """
    import torch

    from text_to_image_lora.models import lora, lora_file

    torch.manual_seed(seed)
    num_adapted = 0
    for name, model in adapted.items():
        if name == family.denoiser:
            num_adapted += lora.add_lora(model, lora_settings)
            if args.target_modules is None:
                lora.check_count(model, num_adapted, family.modules_per_block)
        else:
            rank = args.text_encoder_rank or args.rank
            row = next(row for row in family.text_encoders if row.name == name)
            layers = lora.text_layers(model, row.unreached(args.clip_skip or 0))
            own = lora_settings._replace(
                rank=rank, alpha=lora_settings.alpha * rank / args.rank, target_modules=layers
            )
            num_adapted += lora.add_lora(model, own)
    if args.lora_weights is not None:
        lora.start_from_file(adapted, lora_file.load_lora(args.lora_weights)[0], args.lora_weights)
    if args.gradient_checkpointing:
        for name, model in adapted.items():
            model.enable_gradient_checkpointing() if name == family.denoiser else model.gradient_checkpointing_enable()
    if args.enable_npu_flash_attention:
        adapted[family.denoiser].enable_npu_flash_attention()
    if args.enable_xformers_memory_efficient_attention:
        try:
            adapted[family.denoiser].enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
            raise InputError(f"xformers can't be used here ({reason_of(error)}): leave the flag out.") from error
    return num_adapted


def load_models(args, run, weight_dtype, accelerator, say):
    """Loads the base onto the device and adds the LoRA to it, which comes first: a wrong --target_modules costs seconds.

    Returns ({component: adapted model}, how many modules were adapted, the `Diffusion`, the VAE, the `LatentEncoder`, the
    `PromptEncoder`, and the `Painter` or None).
    """
    import torch

    from text_to_image_lora.models import loading, modules
    from text_to_image_lora.models.latents import LatentEncoder
    from text_to_image_lora.models.prompts import PromptEncoder
    from text_to_image_lora.reports.sample_pictures import Painter, make_pipeline
    from text_to_image_lora.training import checkpoint, freed_memory
    from text_to_image_lora.training.objective import Diffusion

    family, device = run.base.family, accelerator.device
    # DoRA reads its magnitudes from the base in float32.
    dtype = torch.float32 if args.use_dora else weight_dtype
    tokenizers, text_encoders, vae, denoiser, scheduler_config = loading.load_components(
        run.base, dtype, device="cpu" if args.use_dora else device, channels_last=device.type != "mps",
        pretrained_vae=args.pretrained_vae_model_name_or_path,
    )  # fmt: skip
    sets = [run.pictures] if run.validated is None else [run.pictures, run.validated]
    num_chunks = choose_num_chunks(args, tokenizers[0], sets, say)
    if args.preview_data is not None and accelerator.is_main_process:
        say(write_preview(args, run.pictures, run.sampler))
    diffusion = Diffusion(
        loading.make_noise_scheduler(
            scheduler_config, prediction_type=args.prediction_type, rescale_betas_zero_snr=args.rescale_betas_zero_snr
        )
    )
    adapted = {family.denoiser: denoiser}
    if args.train_text_encoder:
        adapted |= {row.name: model for row, model in zip(family.text_encoders, text_encoders, strict=True)}
    parts = {family.denoiser: denoiser, "vae": vae}
    parts |= {row.name: model for row, model in zip(family.text_encoders, text_encoders, strict=True)}
    run.identity.update({f"{name} weights": modules.sample_identity(model) for name, model in parts.items()})
    run.identity.update(
        num_chunks=num_chunks, prediction_type=diffusion.config.prediction_type,
        rescale_betas_zero_snr=diffusion.config.rescale_betas_zero_snr,
    )  # fmt: skip
    if run.resume_path is not None:
        checkpoint.check_same_run(run.resume_path, run.identity_before, run.identity)
    num_adapted = adapt(args, adapted, run.lora, family, run.seed)
    for model in adapted.values():
        if args.use_dora:
            modules.place(model, device, weight_dtype)
        else:
            model.to(device)
    if device.type == "cpu":  # now that the weights are where they stay
        freed_memory.keep()
    if weight_dtype == torch.float16 and vae.config.force_upcast:
        say("the VAE stays in float32, as its configuration asks for: it overflows in fp16")
    if not args.train_text_encoder:
        for text_encoder in text_encoders:
            text_encoder.to(device, weight_dtype)
    latent_encoder = LatentEncoder(vae, torch.float32 if weight_dtype == torch.float32 else torch.float16, device)
    if run.samples.prompts or args.perceptual_loss == "decoder" or not run.variations:  # else the cache may be full
        latent_encoder.get_ready()
    prompt_encoder = PromptEncoder(
        family, tokenizers, text_encoders, clip_skip=args.clip_skip, num_chunks=num_chunks, dtype=weight_dtype,
        autocast=accelerator.autocast if args.train_text_encoder else contextlib.nullcontext,
    )  # fmt: skip
    painter = None
    if run.samples.prompts:
        painter = Painter(
            make_pipeline(run.base, denoiser, vae, scheduler_config, diffusion.config), family, run.samples, prompt_encoder,
            accelerator=accelerator, output_dir=Path(args.output_dir), keep_encoder=args.train_text_encoder,
        )  # fmt: skip
    return adapted, num_adapted, diffusion, vae, latent_encoder, prompt_encoder, painter


def fill_cache(args, run, denoiser, latent_encoder, prompt_encoder, accelerator, say):
    """Encodes what is not in the cache yet; on a GPU the denoiser makes room for it.

    Returns the `TrainingSet`'s pictures, their latents and conditions (None where they are encoded live), and the two
    `ValidationSet`s (of pictures held out, and of as many that are trained on) or None.
    """
    from text_to_image_lora.pictures.alike import probe_of
    from text_to_image_lora.reports.validation_loss import ValidationSet
    from text_to_image_lora.training import caching, shards, trials

    prompts = None if args.train_text_encoder else prompt_encoder
    cache = caching.Cache(cache_folder(args), run.base, latent_encoder, prompts)
    pictures, latents, conditions, validation_sets = to_train_on(args, run.pictures), None, None, None
    with trials.base_set_aside(denoiser, accelerator.device):
        if run.variations:
            captions = caching.captions_to_cache(pictures, caption_rules_of(args))
            latents, conditions = cache.build(pictures, run.variations, captions, accelerator)
        if run.validated is not None:
            parts = [run.validated, probe_of(run.pictures, len(run.validated), run.seed)]
            parts = [part.to_validate_on() for part in parts]
            validation_sets = [
                ValidationSet(part, *cache.build(part, 1, [group[0] for group in part.captions], accelerator))
                for part in parts
            ]
    if accelerator.is_main_process and (run.variations or validation_sets):
        caches = [cached for part in validation_sets or () for cached in (part.latents, part.prompts)]
        needed = [cached.reader for cached in (latents, conditions, *caches) if cached is not None]
        say(shards.trim(cache_folder(args), args.latent_cache_limit, [path for r in needed for path in r.paths]))
    accelerator.wait_for_everyone()
    return pictures, latents, conditions, validation_sets


def settle_batch_size(args, run, denoiser, vae, prompt_encoder, accelerator, say):
    """A `Trial` of the run's heaviest batch, and how many samples a forward pass takes.

    That is what the flag says, or for `auto` what the main process finds to fit. On a GPU a step is tried, so that a run
    which doesn't fit ends before anything is encoded, with a `TrainingError`; on a CPU `auto` goes by the estimate.
    """
    from text_to_image_lora.models.lora import trainable_parameters
    from text_to_image_lora.training import memory, processes, trials

    auto, device = args.train_batch_size == "auto", accelerator.device
    limit = args.gradient_accumulation_steps if auto else args.train_batch_size
    index, heaviest = trials.heaviest_batch(run.pictures, run.sampler, limit)
    # A single file says how wide its prompts are only when it is loaded.
    base = run.base._replace(cross_attention_dim=denoiser.config.cross_attention_dim)
    shapes = trials.shapes_of(run.pictures, index, base, run.identity["num_chunks"])
    dtype, autocast = next(denoiser.parameters()).dtype, run.lora.needs_autocast
    trial = trials.Trial(
        base.family, denoiser, trainable_parameters(denoiser), shapes, dtype, device, autocast=autocast
    )
    if auto and device.type != "cuda" and base.kind == "file" and base.single_file_config is None:
        raise InputError(
            "--train_batch_size auto needs the base's configuration here: add --single_file_config FOLDER."
        )

    def first_that_fits():
        kept = run.state.batch_size
        sizes = [limit] if not auto else trials.even_parts(limit) if kept is None else [kept]
        needs = functools.partial(memory.estimate, base, shapes, plan_of(args, base, dtype))
        return trials.first_that_fits(trial, device, sizes, heaviest, lambda: needs().further_sample)

    idle = [] if args.train_text_encoder or not run.variations else [*prompt_encoder.text_encoders]
    idle += [vae] if run.variations and args.perceptual_loss != "decoder" else []
    with trials.set_aside(idle, device):
        found = processes.as_main_says(first_that_fits, accelerator)
    if not found:
        raise TrainingError(
            f"Out of memory: a training step does not fit this device. Try {ways_to_save_memory(args)}."
        )
    if auto:
        run.state.batch_size = found
        say(f"--train_batch_size auto: {found} of a step's {limit} pictures at once")
    return trial, found


def go_on(args, run, adapted, optimizer, lr_scheduler, average, accelerator, say):
    """Puts back what the run's checkpoint holds."""
    from text_to_image_lora.models import lora
    from text_to_image_lora.training import checkpoint, processes

    stored = processes.as_main_says(functools.partial(checkpoint.read_checkpoint, run.resume_path), accelerator)
    adapter = checkpoint.load_checkpoint(
        stored, optimizer=optimizer, lr_scheduler=lr_scheduler, scaler=accelerator.scaler, average=average
    )
    if average is not None:
        average.decay = args.ema_decay
    for name, model in adapted.items():
        lora.load_adapter(model, lora.part_of(adapter, name))
    say(checkpoint.where_it_goes_on(stored, lr_scheduler, run.schedule))


def compile_denoiser(args, run, denoiser, trial, say):
    """--compile: the denoiser's training steps are compiled from here on, and it is said what that gives."""
    from text_to_image_lora.models.compiling import compile_steps
    from text_to_image_lora.training import trials

    sampler, sizes = run.sampler, len(set(run.pictures.sizes))
    _, batch_size = trials.heaviest_batch(run.pictures, sampler, sampler.batch_size)
    passes = sampler.num_micro_batches(run.state.global_step) * (run.schedule.num_steps - run.state.global_step)
    say("compiling" + (f"; each of the {sizes} sizes once, the others when they come" if sizes > 1 else ""))
    start = functools.partial(compile_steps, denoiser, args.compile, batch_size, cache_folder(args) / "compiled")
    say(trials.what_compiling_gives(start, trial, batch_size, passes))


def describe_run(args, run, shown):
    """What trackers and the LoRA's header tell of a run: its flags, and what those that were not given became."""
    settled = {
        "seed": run.seed, "resolution": run.samples.resolution, "cache_variations": run.variations,
        "validation_prompts": sample_prompts(args), "learning_rate": learning_rate_of(args),
        "perceptual_loss_weight": run.loss.perceptual_weight if args.perceptual_loss is not None else None,
        "max_train_steps": run.schedule.num_steps, "lr_warmup_steps": run.schedule.warmup_steps,
    }  # fmt: skip
    whole = shown | settled | run.identity
    return {k: v for k, v in whole.items() if v not in (None, []) and k != "validation_prompt"}


def check_kohyas_names(args, family, adapted, say):
    """Raises `InputError` before training where --output_kohya_format has no names for what is adapted."""
    from text_to_image_lora.models import kohya, lora

    kohya.kohya_tensors({name: lora.adapter_state(model) for name, model in adapted.items()}, family.kohya)
    if args.use_dora:
        say(
            "--use_dora: A1111 divides DoRA's magnitudes by the norms of the inputs and ComfyUI by those of the base, neither "
            "by those it was trained with; the kohya file draws something else there, and the same in LyCORIS"
        )


def lora_writer(args, run, adapted, told):
    from text_to_image_lora.reports.lora_writer import LoraWriter

    return LoraWriter(
        adapted, Path(args.output_dir), told, run.base.family.kohya, run.state.started_at, run.sampler.steps_per_epoch,
        run.pictures.captions, args.output_kohya_format, args.kohya_extras, sample_prompts(args),
    )  # fmt: skip


def not_needed(args):
    """Libraries that diffusers and peft would import and the run does without; 8-bit Adam imports bitsandbytes itself."""
    return ["bitsandbytes", *([] if args.enable_xformers_memory_efficient_attention else ["xformers"])]


def say_what_is_better(args, device, weight_dtype, say):
    import torch

    from text_to_image_lora.training import processes

    if args.hub_token is not None:
        say(
            "--hub_token: a launcher that fails prints its command, and the token with it. `hf auth login`, or HF_TOKEN in "
            "the environment, doesn't leak."
        )
    if weight_dtype == torch.bfloat16 and processes.emulates_bf16(device):
        say("this GPU has no bf16 and emulates it slowly: --mixed_precision fp16 is faster here")


def say_what_begins(args, run, num_adapted, num_parameters, accelerator, say):
    from text_to_image_lora.models import modules
    from text_to_image_lora.training import processes

    step, num_steps, sampler = run.state.global_step, run.schedule.num_steps, run.sampler
    dtype = str(modules.dtype_of(accelerator.mixed_precision)).removeprefix("torch.")
    say(
        f"{counted(len(run.pictures), 'picture')}, {counted(sampler.steps_per_epoch, 'step')} an epoch, "
        f"{counted(num_steps, 'step')}; effective batch "
        f"{sampler.effective_batch_size} on {accelerator.num_processes} x {processes.in_words(accelerator.device)} in "
        f"{dtype}; rank-{args.rank} LoRA on {num_adapted} modules ({num_parameters:,} parameters)"
    )
    if step >= num_steps:
        say(f"finished at step {step}; raise --max_train_steps to go on")


def start_reports(args, run, shown, described, notes, accelerator):
    """Writes what the run is, starts the trackers, and returns the `MetricsFile`; only on the main process."""
    from text_to_image_lora.reports import dashboard, metrics

    if not accelerator.is_main_process:
        return None
    output_dir, state = Path(args.output_dir), run.state
    output_dir.mkdir(parents=True, exist_ok=True)
    about = write_about_run(args, run, shown, described, notes, accelerator)
    metrics_file = metrics.MetricsFile(output_dir / "metrics.jsonl", state.global_step, state.due)
    state.tracker_run_id = dashboard.start(
        accelerator, args.tracker_project_name, about, output_dir, state.tracker_run_id,
        space_id=args.trackio_space_id, first_step=state.global_step, given_up=metrics_file.given_up,
    )  # fmt: skip
    return metrics_file


def make_judge(args, run, validation_sets, measure, metrics_file, accelerator, say):
    """The `Judge` of the losses that `measure` gives, with what is best so far."""
    from text_to_image_lora.reports.validation_loss import Judge

    judge = Judge(
        *validation_sets, measure, accelerator=accelerator, metrics_file=metrics_file, output_dir=Path(args.output_dir),
        patience=args.early_stopping_patience, kept=run.state.validation,
    )  # fmt: skip
    if judge.begins_anew:
        say("the pictures to validate on are others than before: what was best so far is looked for anew")
    if run.resume_path is not None and accelerator.is_main_process:
        judge.restore_best(run.resume_path)
    return judge


def write_card(args, family, shown, kohya_file):
    """Writes the model card beside the finished LoRA, and returns its path."""
    from text_to_image_lora.reports import model_card, sample_pictures

    return model_card.write_model_card(
        args.output_dir, base_model=args.pretrained_model_name_or_path, repo_id=args.hub_model_id,
        dataset_names=[args.dataset_name] if args.dataset_name else args.train_data_dir,
        pictures=sample_pictures.latest_images(Path(args.output_dir), sample_prompts(args)), hyperparameters=shown,
        kohya_file=kohya_file and kohya_file.name, family=family,
    )  # fmt: skip


def due_after(args, step, sampler, num_steps):
    """What is to be done after a step: the "loss" of the validation, the "lora" of an epoch, the sample "pictures"."""
    epoch, into_epoch = divmod(step, sampler.steps_per_epoch)
    if args.validation_steps:
        validates = step % args.validation_steps == 0
    else:
        validates = args.validation_epochs and into_epoch == 0 and epoch % args.validation_epochs == 0
    saves = args.save_every_n_epochs and into_epoch == 0 and epoch % args.save_every_n_epochs == 0
    validates = validates or step == num_steps
    return ["loss"] * bool(validates) + ["lora"] * bool(saves) + ["pictures"] * bool(validates)


def main(args):
    started = time.time()
    interruption.listen(seconds_of(args.max_train_time))
    shown = hide_secrets(args)
    trackers = trackers_of(args.report_to)
    check_launcher()
    quiet_libraries()
    is_main, left_out = os.environ.get("RANK", "0") == "0", []
    notes = Notes(print if is_main else None)
    inputs = find_inputs(args, (lambda *row: left_out.append(row)) if args.dry_run else None, notes)
    if args.dry_run:
        if is_main:
            look_at_data(args, *inputs, left_out)
        return

    import torch

    with hidden(*not_needed(args)):
        import diffusers
        import transformers
        from diffusers.training_utils import EMAModel
        from tqdm.auto import tqdm

        from text_to_image_lora.models import lora, modules
        from text_to_image_lora.reports import metrics, model_card, tracking
        from text_to_image_lora.reports.validation_loss import LossMeter
        from text_to_image_lora.training import checkpoint, data, freed_memory, hub_checkpoints, objective, optimizers
        from text_to_image_lora.training.perceptual import PerceptualLoss

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    accelerator = make_accelerator(args, lora_settings_of(args, inputs[0].family), trackers)
    device, rank = accelerator.device, accelerator.process_index
    weight_dtype = modules.dtype_of(accelerator.mixed_precision)
    say = tqdm.write if accelerator.is_main_process else lambda line: None
    say_what_is_better(args, device, weight_dtype, say)
    run = prepare(args, *inputs, accelerator, say, notes)
    family, seed, state, sampler, num_steps = run.base.family, run.seed, run.state, run.sampler, run.schedule.num_steps
    adapted, num_adapted, diffusion, vae, latent_encoder, prompt_encoder, painter = load_models(
        args, run, weight_dtype, accelerator, say
    )
    denoiser, scaling_factor = adapted[family.denoiser], latent_encoder.scaling_factor
    if args.output_kohya_format:
        check_kohyas_names(args, family, adapted, say)
    optimizer, lr_scheduler = optimizers.make_optimizer_and_schedule(adapted, run.optimizer, run.schedule, device)
    params_to_optimize = [parameter for model in adapted.values() for parameter in lora.trainable_parameters(model)]
    trial, sampler.batch_size = settle_batch_size(args, run, denoiser, vae, prompt_encoder, accelerator, say)
    interruption.hold()
    pictures, latents, conditions, validation_sets = fill_cache(
        args, run, denoiser, latent_encoder, prompt_encoder, accelerator, say
    )
    if run.variations:  # from here on, the denoiser alone is needed on the device
        latent_encoder, prompt_encoder = None, prompt_encoder if args.train_text_encoder else None
        if args.perceptual_loss == "decoder":
            say("the VAE stays in memory for --perceptual_loss decoder")
        else:
            vae = vae.to("cpu") if painter is not None else None
        freed_memory.give_back(device)

    # What is trained, where it stopped, and on what.
    average = EMAModel(params_to_optimize, decay=args.ema_decay, foreach=True) if args.use_ema else None
    if run.resume_path is not None:
        go_on(args, run, adapted, optimizer, lr_scheduler, average, accelerator, say)
    sampler.first_step, sampler.num_steps = state.global_step, num_steps
    draws = draws_of(args, seed, diffusion.num_train_timesteps)
    training_set = data.TrainingSet(
        pictures, run.base, draws, latents=latents, prompts=conditions, named=args.debug_loss
    )
    loader = data.make_loader(training_set, sampler, args.dataloader_num_workers, device)
    if args.compile != "off":
        compile_denoiser(args, run, denoiser, trial, say)
    # As each process wraps them. They are where they belong: to be moved would part the weights from their masters.
    trained = [accelerator.prepare(model, device_placement=[False]) for model in adapted.values()]
    optimizer = accelerator.prepare(optimizer)
    weights_for_use = functools.partial(optimizers.weights_for_use, params_to_optimize, optimizer, average)
    perceptual_loss = None
    if args.perceptual_loss is not None:
        perceptual_loss = PerceptualLoss(
            run.loss, family=family, denoiser=denoiser, vae=vae, diffusion=diffusion, scaling_factor=scaling_factor,
            dtype=weight_dtype,
        )  # fmt: skip

    # Reports and files.
    output_dir, described = Path(args.output_dir), describe_run(args, run, shown)
    judge, metrics_file = None, start_reports(args, run, shown, described, notes.lines, accelerator)
    num_parameters = sum(parameter.numel() for parameter in params_to_optimize)
    say_what_begins(args, run, num_adapted, num_parameters, accelerator, say)
    if validation_sets is not None:
        measure = LossMeter(
            family, denoiser, diffusion, scaling_factor=scaling_factor, dtype=weight_dtype, seed=seed,
            accelerator=accelerator, prompt_encoder=prompt_encoder if args.train_text_encoder else None,
        )  # fmt: skip
        judge = make_judge(args, run, validation_sets, measure, metrics_file, accelerator, say)

    writer = lora_writer(args, run, adapted, without_folders(described))

    def save_lora(folder):
        return writer.write(folder, state.global_step)

    def add_to_checkpoint(folder):
        with weights_for_use():
            save_lora(folder)
        if judge is not None:
            judge.keep_best(folder)

    def save_checkpoint():
        state.validation = None if judge is None else judge.state()
        uploads.wait()  # for the one before, which may go now
        path = checkpoint.write_checkpoint(
            output_dir, add_to_checkpoint, limit=args.checkpoints_total_limit, state=state, say=say, settings=run.identity,
            adapter=lora.joined({name: lora.adapter_state(model)[0] for name, model in adapted.items()}),
            average=None if average is None else average.state_dict(),
            optimizer=optimizer, lr_scheduler=lr_scheduler, scaler=accelerator.scaler,
        )  # fmt: skip
        uploads.send(path)

    def do_what_is_due():
        while state.due:
            with weights_for_use():
                if state.due[0] == "loss" and judge is not None:
                    judge.take_in(state.global_step, save_lora)
                elif state.due[0] == "lora" and accelerator.is_main_process:
                    save_lora(output_dir / f"epoch-{state.global_step // sampler.steps_per_epoch:04d}")
                elif state.due[0] == "pictures" and painter is not None:
                    painter.draw(state.global_step)
            del state.due[0]

    # The loop.
    repository = args.hub_model_id or output_dir.resolve().name
    uploads = hub_checkpoints.Uploads(repository if args.push_checkpoints_to_hub else None, args.hub_token, say)
    progress = tqdm(
        total=num_steps, initial=state.global_step, desc="training", disable=not accelerator.is_local_main_process
    )
    reports = metrics.StepReports(accelerator, metrics_file, progress, output_dir, say, ways_to_save_memory(args))
    with lora.without_adapters(*adapted.values()):
        if judge is not None and judge.validation is None:
            judge.start()
        if painter is not None and state.global_step == 0:
            painter.draw(0)
    if judge is not None and state.global_step == 0:
        judge.take_in(0, save_lora, is_base=args.lora_weights is None)
    for model in trained:
        model.train()
    optimizer.train()  # schedulefree has two sets of weights; the others do nothing
    if judge is not None and judge.out_of_patience():
        say(f"finished at step {state.global_step}; raise --early_stopping_patience to go on")
    # Of a run that was stopped in it.
    ending = interruption.stopped_in(do_what_is_due, f"after step {state.global_step}")
    reports.write_page()
    batches, clock = iter(loader), time.time()
    while ending is None and state.global_step < num_steps and not (judge is not None and judge.out_of_patience()):
        step, train_loss, of_pictures = state.global_step, torch.zeros((), device=device), {}
        num_micro_batches = sampler.num_micro_batches(step)
        for micro_step in range(num_micro_batches):
            batch = next(batches).on(device)
            if "pixels" in batch:
                batch["mean"], batch["std"] = (
                    t.to(latent_encoder.dtype).float() for t in latent_encoder(batch["pixels"])
                )
            if "captions" in batch and not args.train_text_encoder:
                batch["condition"] |= prompt_encoder(batch["captions"])
            timesteps = batch["timesteps"]
            latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * scaling_factor
            noise = batch["noise"] + run.loss.noise_offset * batch["channel_noise"]
            seen_noise = noise
            if run.loss.input_perturbation:
                seen_noise = noise + run.loss.input_perturbation * batch["perturbation"]
            noisy_latents = diffusion.add_noise(latents, seen_noise, timesteps)
            target = diffusion.target(latents, noise, timesteps)
            weights = batch["weights"] * diffusion.weights(
                timesteps, snr_gamma=run.loss.snr_gamma, debiased=run.loss.debiased
            )
            if args.lora_dropout:
                torch.manual_seed(data.seed_of(seed, step, micro_step, rank))
            with contextlib.ExitStack() as stack:
                for model in trained if micro_step < num_micro_batches - 1 else ():
                    stack.enter_context(accelerator.no_sync(model))
                if args.train_text_encoder:
                    batch["condition"] |= prompt_encoder.in_training(trained[1:], batch["captions"])
                model_pred = family.predict(
                    trained[0], noisy_latents.to(weight_dtype), timesteps, **batch["condition"]
                )
                huber_c = objective.scheduled_huber_c(run.loss.huber_c, timesteps, diffusion.num_train_timesteps)
                loss = objective.diffusion_loss(model_pred, target, weights, batch.get("mask"), huber_c)
                if args.debug_loss:
                    of_pictures |= objective.losses_by_name(batch, model_pred, target, huber_c)
                if perceptual_loss is not None:
                    loss = loss + run.loss.perceptual_weight * perceptual_loss(model_pred, latents, noise, batch)
                accelerator.backward(loss)
            train_loss += loss.detach()
        train_loss, asked = interruption.mean_and_asked(accelerator, train_loss)
        grad_norm = accelerator.clip_grad_norm_(params_to_optimize, args.max_grad_norm or math.inf)
        optimizers.step_if_finite(optimizer, train_loss + grad_norm)
        lr = lr_scheduler.get_last_lr()[0]
        # Also where the step was skipped, as it was not a number: to ask for that would be to wait for the GPU.
        lr_scheduler.step()
        if average is not None:
            average.step(params_to_optimize)
        optimizer.zero_grad()
        state.global_step += 1
        progress.update()

        now = time.time()
        reports.put(
            state.global_step,
            {"train_loss": train_loss, "asked": asked, "lr": lr, "grad_norm": grad_norm}
            | {"epoch": state.global_step / sampler.steps_per_epoch, **of_pictures},
            samples=sampler.num_samples(step),
            seconds=now - clock,
        )
        clock = now
        # What is due after this step; the checkpoint comes last, so that what a run goes on after is all there.
        state.due, finished = due_after(args, state.global_step, sampler, num_steps), state.global_step == num_steps
        checkpoints = args.checkpointing_steps and state.global_step % args.checkpointing_steps == 0
        pauses = bool(state.due or checkpoints)  # which are no part of the training's speed
        if pauses or finished:
            reports.flush()
        where = f"after step {state.global_step}, with a checkpoint"
        ending = reports.trouble(finished) or interruption.stopped_in(do_what_is_due, where)
        finished = finished or (judge is not None and judge.out_of_patience())
        if ending is None and not finished and reports.asked:
            ending = interruption.agreed(where)
        checkpoints = (
            (checkpoints or (finished and args.checkpointing_steps)) and ending is None and reports.in_a_row < 2
        )
        if accelerator.is_main_process and (checkpoints or isinstance(ending, Stopped)):
            reports.flush()
            save_checkpoint()
        if pauses:
            reports.write_page()
            clock = time.time()
    progress.close()
    if judge is not None and ending is None:
        say(judge.in_words(state.global_step))

    # What the run leaves.
    if accelerator.is_main_process and isinstance(ending, NotANumberError):
        with weights_for_use():
            save_lora(output_dir / metrics.LAST_GOOD)
    if accelerator.is_main_process and ending is None:
        with weights_for_use():
            weights_file, kohya_file, arrives = save_lora(output_dir)
        card = write_card(args, family, shown, kohya_file)
        say(arrives)
        say(f"LoRA: {weights_file}  (model card: {card}, {time.time() - started:.0f} s)")
    reports.leave(ending)
    # The others leave when all is written; and without the DDP wrapper, which would keep Gloo's threads alive until the
    # interpreter ends, and then now and then abort the process.
    accelerator.wait_for_everyone()
    trained, model = None, None
    accelerator.free_memory()
    tracking.finish_trackers(accelerator, say)
    uploads.wait()
    if ending is not None:
        raise ending
    if args.push_to_hub and accelerator.is_main_process:
        interruption.let_go("in the upload; the LoRA is written")
        files = [path.name for path in (weights_file, kohya_file) if path is not None]
        say(model_card.upload_or_tell(output_dir, repository, args.hub_token, files))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (Exception, KeyboardInterrupt, Stopped) as error:
        end(error, Path(__file__).name, lambda: ways_to_save_memory(parse_args()))

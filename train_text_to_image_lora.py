#!/usr/bin/env python
"""Fine-tunes Stable Diffusion with LoRA on your own pictures.

    accelerate launch --config_file accelerate_config.yaml train_text_to_image_lora.py \
        --pretrained_model_name_or_path models/mini-sd --train_data_dir metadata/weapons --resolution 64

Writes `pytorch_lora_weights.safetensors` into --output_dir. Run the same command again to go on after an interruption.
"""

import argparse
import collections
import contextlib
import difflib
import functools
import math
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from text_to_image_lora import buckets
from text_to_image_lora.errors import InputError, TrainingError
from text_to_image_lora.layouts import LAYOUTS
from text_to_image_lora.optimizers import OPTIMIZERS, check_optimizer
from text_to_image_lora.records import fingerprint, load_records, with_class_pictures
from text_to_image_lora.tracking import TRACKERS, trackers_of


SECRETS = ("hub_token",)
NOT_SHOWN = (*SECRETS, "config", "local_rank", "left_open")
ENDLESS_VARIATIONS_CACHED = 4
PREVIEWED = 10  # pictures on the sheet of --preview_data


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something, and one letter for what a flag takes."""

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "NAME")

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "", []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line, and names the nearest flag there is."""

    def error(self, message):
        if "unrecognized arguments:" in message:
            unknown = [word for word in message.split(": ", 1)[1].split() if word.startswith("-")]
            known = [option for action in self._actions for option in action.option_strings]
            if unknown:
                near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
                message = f"there is no flag {unknown[0]}." + (f" Did you mean {near[0]}?" if near else " See --help.")
        raise InputError(message)


def build_parser():
    parser = Parser(
        usage="%(prog)s --pretrained_model_name_or_path MODEL (--dataset_name ID | --train_data_dir FOLDER) [flags]",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    # Each has its --no-..., so that the command line can also take back what --config says.
    switch = dict(action=argparse.BooleanOptionalAction)
    yes = dict(default=False, **switch)
    # fmt: off
    group = parser.add_argument_group("run").add_argument
    group("--config", metavar="FILE", help="a YAML file with the same flags; the command line wins (each run saves its own as run.yaml)")
    group("--output_dir", default="sd-model-finetuned-lora", help="where the LoRA, checkpoints, pictures and metrics go")
    group("--seed", type=int, help="makes a run reproducible; drawn and saved in run.yaml when not given")
    group("--resume_from_checkpoint", default="latest", help="a checkpoint folder; latest: go on where --output_dir stopped; none: start over")
    group("--checkpointing_steps", type=int, default=500, help="save all that is needed to resume every so many steps, and at the end; 0: never")
    group("--checkpoints_total_limit", type=int, help="keep this many checkpoints, delete the oldest")
    group("--save_every_n_epochs", type=int, default=0, help="write a usable LoRA (epoch-0005/...) every so many epochs; 0: only at the end")
    group("--local_rank", type=int, default=-1, help="set by the launcher")

    group = parser.add_argument_group("base model").add_argument
    group("--pretrained_model_name_or_path", help="hub id, local diffusers folder, or a single .safetensors/.ckpt file")
    group("--revision", help="branch, tag or commit of the base model on the hub")
    group("--variant", help="variant of its files, such as fp16")
    group("--single_file_config", metavar="FOLDER", help="configuration for a single file, where the hub is out of reach")
    group("--pretrained_vae_model_name_or_path", help="another VAE than the base model's: hub id, folder or single file")
    group("--clip_skip", type=int, help="leave out that many of the text encoder's last layers, in training and validation")
    group("--cache_dir", help="where downloaded models and datasets are stored")

    group = parser.add_argument_group("data").add_argument
    group("--dataset_name", help="hub id, or a local folder with a dataset")
    group("--dataset_config_name", help="configuration of the hub dataset, where it has several")
    group("--train_data_dir", nargs="+", metavar="FOLDER", help="folder, .zip or .tar of pictures with captions, or several; metadata/README.md shows every layout")
    group("--dataset_layout", choices=LAYOUTS, help="how captions lie in --train_data_dir; recognised when not given")
    group("--image_column", help="column with the pictures; found by itself when not given")
    group("--caption_column", help="column with the captions, text or lists of text; found by itself when not given")
    group("--instance_prompt", help="the caption of all pictures, where they have none")
    group("--caption_template", default="{trigger} {class}", help="caption of the pictures in folders [trigger]_[class]")
    group("--trigger_word", help="put in front of every caption that lacks it")
    group("--caption_prefix", default="", help="put in front of every caption")
    group("--caption_suffix", default="", help="put after every caption")
    group("--caption_dropout", type=float, default=0.0, help="share of samples trained with the empty caption, for guidance")
    group("--shuffle_tags", **yes, help="put a caption's tags (between commas) in another order each time")
    group("--keep_tags", type=int, default=0, help="leave the first so many tags where they are")
    group("--tag_variations", type=int, default=8, help="orders of each caption in the cache; without the cache they are endless")
    group("--balance", choices=["concept"], help="concept: draw each class folder equally often, repeating the smaller ones")
    group("--long_prompts", **yes, help="read captions of more than 77 tokens whole, in chunks; so must be what draws with the LoRA")
    group("--concept_column", help="column with the concept of each picture, for --balance; its folder's name when not given")
    group("--mask_column", help="column with masks: what is white in them counts in the loss; name.mask.png beside a picture needs no flag")
    group("--class_data_dir", help="pictures of the class in general, trained beside yours so that it isn't forgotten (DreamBooth's prior preservation)")
    group("--class_prompt", help="the caption of those pictures, where they have none")
    group("--prior_loss_weight", type=float, default=1.0, help="how much each of those pictures counts")
    group("--max_train_samples", type=int, help="train on this many pictures, always the same ones")
    group("--resolution", type=int, default=512, help="side of the square that pictures are resized and cropped to, in pixels")
    group("--aspect_ratio_buckets", **yes, help="keep the pictures' shapes: train each at the nearest of several sizes with the square's area")
    group("--bucket_min_size", type=int, help="least side of a bucket, in pixels; half of --resolution when not given")
    group("--bucket_max_size", type=int, help="greatest side; twice --resolution when not given")
    group("--bucket_step", type=int, help="sides are multiples of it; 64 when not given, less for small resolutions")
    group("--bucket_no_upscale", **yes, help="train small pictures at their own size")
    group("--center_crop", **yes, help="crop the middle; otherwise the place is random")
    group("--random_flip", **yes, help="mirror half of the pictures")
    group("--random_rotation", type=float, default=0.0, help="turn pictures by up to so many degrees; what is shown gets smaller, corners stay filled")
    group("--random_crop_scale", type=float, default=1.0, help="crop down to this share of the picture's sides, such as 0.8")
    group("--random_brightness", type=float, default=0.0, help="change the brightness by up to this share, such as 0.1")
    group("--random_contrast", type=float, default=0.0, help="the same for the contrast")
    group("--random_saturation", type=float, default=0.0, help="the same for the saturation")
    group("--random_hue", type=float, default=0.0, help="shift the hue by up to this share of the colour circle, such as 0.02")
    group("--image_interpolation_mode", default="lanczos", choices=["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"], help="how pictures are resized")
    group("--dry_run", **yes, help="look at the dataset, say what it holds and what is wrong with it, write --output_dir/dataset.json, and stop")
    group("--preview_data", metavar="FILE", help="write a picture of what the model will see: some pictures, their variations and captions")
    group("--skip_bad_images", **yes, help="leave out pictures that can't be read, and rows without one, instead of stopping")
    group("--cache_variations", type=int, help="variations of each picture in the cache (1, 2 with --random_flip, 4 with random crops and other augmentation); 0: no cache, encode live")
    group("--latent_cache_dir", default="~/.cache/text_to_image_lora", help="where latents and prompt embeddings are kept for later runs")
    group("--dataloader_num_workers", type=int, default=0, help="processes that load data; worth it with --cache_variations 0")

    group = parser.add_argument_group("LoRA").add_argument
    group("--rank", type=int, default=4, help="dimension of the update matrices")
    group("--lora_alpha", type=float, help="scale of the update: alpha / rank; the rank when not given")
    group("--lora_dropout", type=float, default=0.0, help="dropout before the update matrices")
    group("--target_modules", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"], help="layers to adapt, by the ends of their names")
    group("--init_lora_weights", default="gaussian", help="true, gaussian or orthogonal")
    group("--use_rslora", **yes, help="scale by alpha / sqrt(rank)")
    group("--use_dora", **yes, help="weight-decomposed LoRA")
    group("--lora_weights", metavar="PATH", help="start from this LoRA file or folder")

    group("--train_text_encoder", **yes, help="adapt the text encoder too; captions are then encoded in each step")
    group("--text_encoder_rank", type=int, help="rank of its LoRA; --rank when not given")
    group("--text_encoder_lr", type=float, help="its learning rate; --learning_rate when not given")

    group = parser.add_argument_group("training").add_argument
    group("--train_batch_size", type=int, default=16, help="pictures per process and forward pass")
    group("--num_train_epochs", type=int, default=100, help="passes over the pictures")
    group("--max_train_steps", type=int, help="optimizer steps; goes before --num_train_epochs")
    group("--gradient_accumulation_steps", type=int, default=1, help="forward passes per optimizer step")
    group("--gradient_checkpointing", **yes, help="less memory, slower")
    group("--learning_rate", type=float, help="after warm-up; 1e-4 when not given, 1 with prodigy")
    group("--scale_lr", **yes, help="multiply the learning rate by processes x accumulation x batch size")
    group("--lr_scheduler", default="constant", choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant"], help="the schedule of the learning rate")
    group("--lr_warmup_steps", type=int, help="optimizer steps of warm-up; the smaller of 500 and a tenth of the run when not given")
    group("--lr_warmup_ratio", type=float, help="the same as a share of the run")
    group("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts")
    group("--lr_power", type=float, default=1.0, help="power of polynomial")
    group("--lr_step_rules", default="", help="rules of piecewise_constant, such as 1:100,0.1:200,0.01")
    group("--loss_type", choices=["mse", "huber"], default="mse", help="huber: a scheduled pseudo-Huber loss, for sets with broken pictures or captions in them")
    group("--huber_c", type=float, default=0.1, help="its width at the noisiest timestep")
    group("--perceptual_loss", choices=["decoder", "self"], help="add a loss on features of the VAE's decoder (it then stays in memory), or of the base itself; no other network is needed")
    group("--perceptual_loss_weight", type=float, help="how much of it; 0.1 of decoder and 0.01 of self when not given")
    group("--perceptual_max_timestep", type=int, default=400, help="decoder: only for timesteps below this one, where pictures can be seen")
    group("--snr_gamma", type=float, help="Min-SNR loss weighting; 5.0 is usual")
    group("--debiased_estimation", **yes, help="weight the loss by 1 / sqrt(SNR), so that noisy timesteps count more")
    group("--timestep_sampling", choices=["uniform", "logit_normal", "mode"], default="uniform", help="which timesteps are drawn more often, as in diffusers' training helpers")
    group("--timestep_range", type=int, nargs=2, metavar=("FIRST", "LAST"), help="train on these timesteps only, of 0 (clean) to 1000 (noise)")
    group("--logit_mean", type=float, default=0.0, help="of logit_normal; below 0: noisier timesteps")
    group("--logit_std", type=float, default=1.0, help="of logit_normal")
    group("--mode_scale", type=float, default=1.29, help="of mode")
    group("--input_perturbation", type=float, default=0.0, help="noise added to the model's input only; 0.1 is usual")
    group("--noise_offset", type=float, default=0.0, help="scale of a noise that is constant over each channel")
    group("--prediction_type", choices=["epsilon", "v_prediction"], help="what the model predicts; the base model's own when not given")
    group("--rescale_betas_zero_snr", **yes, help="zero terminal SNR (with v_prediction)")
    group("--optimizer", choices=[*OPTIMIZERS], help="adamw when not given")
    group("--optimizer_args", nargs="+", default=[], metavar="KEY=VALUE", help="more of its options")
    group("--use_8bit_adam", **yes, help="the same as --optimizer adamw8bit")
    group("--loraplus_lr_ratio", type=float, help="LoRA+: how many times the learning rate the B matrices have; 16 is usual")
    group("--use_ema", **yes, help="validate and save the moving average of the LoRA's weights")
    group("--ema_decay", type=float, default=0.999, help="of that average; it begins lower")
    group("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    group("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    group("--adam_weight_decay", type=float, default=1e-2, help="weight decay")
    group("--adam_epsilon", type=float, default=1e-8, help="epsilon")
    group("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm; 0: don't")
    group("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the frozen base; the launcher's when not given. The LoRA is float32 always")
    group("--allow_tf32", **switch, default=True, help="TF32 matrix products where the GPU has them")
    group("--enable_xformers_memory_efficient_attention", **yes, help="xformers attention instead of PyTorch's own")

    group = parser.add_argument_group("validation loss").add_argument
    group("--validation_split", type=float, default=0.0, help="share of the pictures that are not trained on, to tell learning from overfitting; those that look alike stay together")
    group("--validation_data_dir", nargs="+", metavar="FOLDER", help="pictures for that in folders of their own, as in --train_data_dir")
    group("--early_stopping_patience", type=int, help="stop when so many validations in a row were no better; the best LoRA is in best/ in any case")

    group = parser.add_argument_group("validation pictures").add_argument
    group("--validation_prompt", help="a prompt to make pictures with")
    group("--validation_prompts", nargs="+", default=[], metavar="PROMPT", help="several of them")
    group("--validation_negative_prompt", default="", help="what the pictures are to avoid")
    group("--num_validation_images", type=int, default=4, help="pictures of each prompt; 0: none")
    group("--validation_epochs", type=int, default=1, help="validate every so many epochs, before training and at the end; 0: only these two")
    group("--validation_steps", type=int, help="every so many optimizer steps instead")
    group("--validation_guidance_scale", type=float, default=7.5, help="classifier-free guidance")
    group("--validation_inference_steps", type=int, default=30, help="denoising steps")

    group = parser.add_argument_group("tracking and sharing").add_argument
    group("--report_to", choices=[*TRACKERS, "all", "none"], help="where metrics and pictures go; wandb when it is installed (offline without key or network)")
    group("--tracker_project_name", default="text2image-fine-tune", help="the trackers' project")
    group("--logging_dir", default="logs", help="TensorBoard's folder, inside --output_dir")
    group("--push_to_hub", **yes, help="upload weights, model card and pictures at the end")
    group("--hub_token", help="token for the upload; better: hf auth login")
    group("--hub_model_id", help="repository to upload to; the output folder's name when not given")
    # fmt: on
    return parser


def parse_args(argv=None):
    """The flags, from the command line over those of `--config`; raises `InputError`."""
    parser = build_parser()
    config = parser.parse_known_args(argv)[0].config if argv is None or "--help" not in argv else None
    if config is not None:
        import yaml

        try:
            values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{config}: it can't be read as YAML ({str(error).splitlines()[0]}).") from error
        if not isinstance(values, dict | None):
            raise InputError(f"{config}: it must hold one flag a line, such as 'rank: 16'.")
        actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
        words = []
        for key, value in (values or {}).items():
            if key not in actions:
                near = difflib.get_close_matches(str(key), actions, n=1)
                raise InputError(
                    f"{config}: there is no flag '{key}'." + (f" Did you mean {near[0]}?" if near else "")
                )
            if isinstance(value, bool):
                if actions[key].nargs != 0:
                    raise InputError(
                        f"{config}: '{key}' takes a value, not {str(value).lower()}; quote it if it is a word."
                    )
                words.append(f"--{key}" if value else f"--no-{key}")
            elif isinstance(value, list):
                words += [f"--{key}", *map(str, value)]
            elif value is not None:
                words.append(f"--{key}={value}")
        try:
            parser.parse_args(words)
        except InputError as error:
            raise InputError(f"{config}: {error}") from error
        argv = words + list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    args.left_open = [name for name, value in vars(args).items() if value is None]
    check_args(args)
    return args


# What numbers may be: from the first to the second, where there is one.
RANGES = dict(
    rank=(1,), resolution=(1,), train_batch_size=(1,), num_train_epochs=(1,), max_train_steps=(1,), max_train_samples=(1,),
    gradient_accumulation_steps=(1,), checkpoints_total_limit=(1,), checkpointing_steps=(0,), save_every_n_epochs=(0,),
    validation_steps=(1,), validation_epochs=(0,), validation_inference_steps=(1,), num_validation_images=(0,),
    validation_split=(0, 0.5), early_stopping_patience=(1,), cache_variations=(0,), dataloader_num_workers=(0,),
    max_grad_norm=(0,), clip_skip=(0,), seed=(0,), lr_num_cycles=(1,), lr_warmup_steps=(0,),
    lr_power=(0,), lr_warmup_ratio=(0, 1), adam_weight_decay=(0,), adam_epsilon=(0,), noise_offset=(0,), input_perturbation=(0,),
    keep_tags=(0,), tag_variations=(1,), bucket_min_size=(1,), bucket_max_size=(1,), bucket_step=(1,),
    random_crop_scale=(0.1, 1), random_rotation=(0, 180), random_brightness=(0, 1), random_contrast=(0, 1),
    random_saturation=(0, 1), random_hue=(0, 0.5), prior_loss_weight=(0,), text_encoder_rank=(1,),
    perceptual_loss_weight=(0,), perceptual_max_timestep=(1,), validation_guidance_scale=(0,), logit_mean=(-100, 100), mode_scale=(-1, 1.75),
)  # fmt: skip
POSITIVE = ("learning_rate", "text_encoder_lr", "loraplus_lr_ratio", "lora_alpha", "snr_gamma", "huber_c", "logit_std")
BELOW_ONE = ("lora_dropout", "caption_dropout", "adam_beta1", "adam_beta2", "ema_decay")


def check_numbers(args):
    for name, (least, *most) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= (most or [sys.float_info.max])[0]:  # nor nan, nor infinite
            allowed = f"from {least} to {most[0]}" if most else f"{least} or more"
            raise InputError(f"--{name} {value}: it must be {allowed}.")
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} {value}: it must be more than 0 and finite.")
    for name in BELOW_ONE:
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: it must be at least 0 and less than 1.")
    if args.seed is not None and args.seed >= 2**63:
        raise InputError(f"--seed {args.seed}: it must be less than {2**63}.")
    if args.timestep_range is not None and not 0 <= args.timestep_range[0] < args.timestep_range[1] <= 1000:
        given = " ".join(map(str, args.timestep_range))
        raise InputError(f"--timestep_range {given}: write two numbers from 0 to 1000, the smaller one first.")


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


def check_lora_and_optimizer(args):
    """And settles what the optimizer, its learning rate and the LoRA's alpha are."""
    if args.init_lora_weights not in ("true", "gaussian", "orthogonal"):
        rewrites = args.init_lora_weights.startswith(("pissa", "olora", "corda", "loftq"))
        reason = " It rewrites the base model, so the saved file would be wrong on the plain one." if rewrites else ""
        raise InputError(f"--init_lora_weights {args.init_lora_weights}: choose true, gaussian or orthogonal.{reason}")
    ranks = [args.rank, *([args.text_encoder_rank] if args.text_encoder_rank is not None else [])]
    if args.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
        raise InputError(f"--init_lora_weights orthogonal needs an even rank, not {' and '.join(map(str, ranks))}.")
    if args.lora_weights is not None and not Path(args.lora_weights).exists():
        raise InputError(f"{args.lora_weights}: there is no such file or folder (--lora_weights).")
    args.lora_alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    if not args.train_text_encoder and (args.text_encoder_rank is not None or args.text_encoder_lr is not None):
        raise InputError(
            "--text_encoder_rank and --text_encoder_lr are for a text encoder that is trained: add --train_text_encoder."
        )
    if args.use_8bit_adam and args.optimizer not in (None, "adamw8bit"):
        raise InputError(f"Pass one of --use_8bit_adam and --optimizer {args.optimizer}.")
    args.optimizer = "adamw8bit" if args.use_8bit_adam else args.optimizer or "adamw"
    if args.optimizer == "schedulefree" and args.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise InputError(
            f"--optimizer schedulefree needs no --lr_scheduler {args.lr_scheduler}: leave that out, or take another optimizer."
        )
    if args.optimizer == "prodigy" and (args.loraplus_lr_ratio is not None or args.text_encoder_lr is not None):
        raise InputError(
            "--optimizer prodigy has one learning rate for all: leave --loraplus_lr_ratio and --text_encoder_lr out."
        )
    if args.optimizer == "prodigy" and args.scale_lr:
        raise InputError("--optimizer prodigy finds the learning rate itself: leave --scale_lr out.")
    check_optimizer(args.optimizer, args.optimizer_args)
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else 1e-4


def check_polynomial(args, learning_rate):
    if args.lr_scheduler == "polynomial" and learning_rate <= 1e-7:  # where diffusers' schedule ends
        raise InputError(
            f"--learning_rate {args.learning_rate}: polynomial ends at 1e-07, so it must be more than that."
        )


def check_schedule_and_loss(args):
    """And settles how much of a perceptual loss there is."""
    if args.perceptual_loss_weight is None and args.perceptual_loss is not None:
        args.perceptual_loss_weight = {"decoder": 0.1, "self": 0.01}[args.perceptual_loss]  # docs/findings.md
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
        check_polynomial(args, args.learning_rate)
    if args.snr_gamma is not None and args.debiased_estimation:
        raise InputError("Pass one of --snr_gamma and --debiased_estimation: both weight the loss by the timestep.")


def check_validation_and_upload(args):
    """And settles what the validation prompts are."""
    if args.validation_split and args.validation_data_dir:
        raise InputError("Pass one of --validation_split and --validation_data_dir.")
    if args.early_stopping_patience and not (args.validation_split or args.validation_data_dir):
        raise InputError("--early_stopping_patience needs pictures to judge by: add --validation_split 0.1")
    if args.early_stopping_patience and not (args.validation_steps or args.validation_epochs):
        raise InputError(
            "--early_stopping_patience needs validations: add --validation_steps, or --validation_epochs 1"
        )
    prompts = [args.validation_prompt] if args.validation_prompt is not None else []
    args.validation_prompts = [*prompts, *args.validation_prompts] if args.num_validation_images else []
    if any(not prompt.strip() for prompt in args.validation_prompts):
        raise InputError("--validation_prompt is empty: write what the picture shows, or leave the flag out.")
    if args.push_to_hub and os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise InputError(
            "--push_to_hub can't work with HF_HUB_OFFLINE set: unset it, or upload later with `hf upload`."
        )


def check_args(args):
    """Everything that the flags alone can tell; defaults that depend on other flags are settled."""
    check_model_and_data(args)
    check_numbers(args)
    check_lora_and_optimizer(args)
    check_schedule_and_loss(args)
    check_validation_and_upload(args)
    args.resume_from_checkpoint = None if args.resume_from_checkpoint == "none" else args.resume_from_checkpoint


def check_folder(output_dir, flag):
    """Raises `InputError` where the folder can't be written; makes nothing, as other processes check it too."""
    path = Path(output_dir)
    try:
        nearest = next(p for p in (path, *path.parents) if p.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise InputError(f"{output_dir}: it can't be written ({error.strerror}). Pass another {flag}.") from error


def hide_secrets(args):
    """Takes tokens out of `sys.argv`, which trackers record, and returns the flags that may be shown."""
    for name in SECRETS:
        secret = getattr(args, name)
        if secret:
            sys.argv[:] = [word.replace(secret, "***") for word in sys.argv]
    return {k: v for k, v in vars(args).items() if k not in NOT_SHOWN and v not in (None, [])}


def quiet_libraries():
    """Keeps the libraries' import-time advice off the terminal: none of it is about the user's run."""
    import logging
    import warnings

    # diffusers 0.39 passes it to huggingface_hub 1.x, which doesn't know it any more.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns when a loader's worker is forked
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("xformers", "bitsandbytes", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_inputs(args, leave_out=None):
    """Base model, pictures, and those to validate on or None, as the command names them.

    What is wrong with them is told before torch is imported. Rows that can't be used go to `leave_out(source, reason)`, where there is one.
    """
    from huggingface_hub import get_token

    from text_to_image_lora import models

    base = models.find_base_model(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        single_file_config=args.single_file_config,
        cache_dir=args.cache_dir,
    )
    if args.resolution % base.image_factor:
        near = max(round(args.resolution / base.image_factor), 1) * base.image_factor
        raise InputError(
            f"--resolution {args.resolution}: this model needs a multiple of {base.image_factor}, e.g. {near}."
        )
    settle_buckets(args, base.image_factor)
    where_and_how = dict(
        archive_dir=Path(args.latent_cache_dir).expanduser() / "archives",
        skip_bad_images=args.skip_bad_images,
        leave_out=leave_out,
        say=print if os.environ.get("RANK", "0") == "0" else lambda line: None,
    )
    columns_and_captions = dict(
        dataset_layout=args.dataset_layout,
        image_column=args.image_column,
        caption_column=args.caption_column,
        mask_column=args.mask_column,
        concept_column=args.concept_column,
        instance_prompt=args.instance_prompt,
        caption_template=args.caption_template,
        trigger_word=args.trigger_word,
        caption_prefix=args.caption_prefix,
        caption_suffix=args.caption_suffix,
        **where_and_how,
    )
    dataset = load_records(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        cache_dir=args.cache_dir,
        max_train_samples=args.max_train_samples,
        **columns_and_captions,
    )
    validation_dataset = None
    if args.validation_data_dir is not None:
        validation_dataset = load_records(train_data_dir=args.validation_data_dir, **columns_and_captions)
    if args.class_data_dir is not None:
        class_pictures = load_records(
            train_data_dir=args.class_data_dir, instance_prompt=args.class_prompt, **where_and_how
        )
        dataset = with_class_pictures(dataset, class_pictures)
    if args.clip_skip is not None and args.clip_skip >= base.text_layers:
        raise InputError(f"--clip_skip {args.clip_skip}: the text encoder has only {base.text_layers} layers.")
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise InputError("--push_to_hub needs a token: run `hf auth login` first.")
    check_folder(args.output_dir, "--output_dir")
    if args.preview_data is not None:
        check_folder(Path(args.preview_data).parent, "--preview_data")
        if Path(args.preview_data).is_dir():
            raise InputError(f"--preview_data {args.preview_data}: it is a folder. Name a file in it.")
    if args.cache_variations != 0 or args.validation_split or args.validation_data_dir:
        check_folder(Path(args.latent_cache_dir).expanduser(), "--latent_cache_dir")
    return base, dataset, validation_dataset


def settle_buckets(args, image_factor):
    """Settles the limits of the buckets; `InputError` where no sizes can be made of them, or there are to be no buckets."""
    names = dict(smallest="bucket_min_size", largest="bucket_max_size", step="bucket_step")
    limits = {limit: getattr(args, name) for limit, name in names.items()}
    if args.aspect_ratio_buckets:
        for limit, value in buckets.settle_limits(args.resolution, image_factor, **limits).items():
            setattr(args, names[limit], value)
        return
    given = [names[limit] for limit, value in limits.items() if value is not None]
    if given or args.bucket_no_upscale:
        raise InputError(f"--{(given or ['bucket_no_upscale'])[0]} says how buckets are: add --aspect_ratio_buckets.")


def sizes_to_train_at(args, images):
    """(width, height) in pixels for each picture."""
    if not args.aspect_ratio_buckets:
        return [(args.resolution, args.resolution)] * len(images)
    return buckets.sizes_of(
        [(image.width, image.height) for image in images],
        args.resolution,
        smallest=args.bucket_min_size,
        largest=args.bucket_max_size,
        step=args.bucket_step,
        no_upscale=args.bucket_no_upscale,
    )


def timestep_sampling_of(args, num_train_timesteps):
    """The `TimestepSampling` that the flags mean; None where every timestep is as likely."""
    from text_to_image_lora.data import TimestepSampling

    if args.timestep_sampling == "uniform" and args.timestep_range is None:
        return None
    first, last = args.timestep_range or (0, num_train_timesteps)
    return TimestepSampling(
        args.timestep_sampling, first, min(last, num_train_timesteps), args.logit_mean, args.logit_std, args.mode_scale
    )


def augmentation_of(args):
    from text_to_image_lora.transforms import Augmentation

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


def captions_to_train_on(args, dataset):
    """A list of captions for each picture; where shuffled tags are cached, each order is one of them."""
    from text_to_image_lora import captions

    groups = dataset["captions"][:]
    if not args.shuffle_tags or not num_variations(args) or args.train_text_encoder:
        return groups
    return [captions.shuffled_variations(group, args.tag_variations, args.seed, args.keep_tags) for group in groups]


def bytes_of_cache(args, base, images, sizes, caption_lists, num_chunks, masked):
    """How many bytes the whole cache takes."""
    import torch

    from text_to_image_lora import caching

    dtype = torch.float32 if args.mixed_precision in (None, "no") else torch.float16  # or another of two bytes
    shards, _ = caching.plan_latents(
        images, sizes, cache_variations=num_variations(args), interpolation="", augmentation=augmentation_of(args),
        seed=args.seed, identity="", dtype=dtype, folder="",
    )  # fmt: skip
    prompt_shards, _ = caching.plan_prompts(
        [] if args.train_text_encoder else [c for group in caption_lists for c in group] + [""] * (args.caption_dropout > 0),
        identity="", dtype=dtype, clip_skip=None, folder="",
    )  # fmt: skip
    return caching.bytes_of(
        shards, prompt_shards, latent_shapes=base.latent_shapes(sizes), latent_dtype=dtype, prompt_dtype=dtype,
        prompt_shape=(77 * num_chunks, base.cross_attention_dim), masked=masked,
    )  # fmt: skip


def make_sampler(args, dataset, sizes, *, rank, world_size):
    from text_to_image_lora import data

    is_class = dataset["is_class"][:]
    samples = data.samples_of_dataset(
        is_class, dataset["concept"][:], dataset["num_repeats"][:], balanced=args.balance == "concept", seed=args.seed
    )
    groups = {size: number for number, size in enumerate(sorted(set(sizes)))}
    return data.EffectiveBatchSampler(
        samples,
        groups=[groups[size] for size in sizes],
        loss_weights=[args.prior_loss_weight if other else 1.0 for other in is_class],
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=args.seed,
    )


def write_preview(args, dataset, images, sizes, sampler):
    """Draws what the model will see of the first pictures; returns the line that says where."""
    from text_to_image_lora import inspection

    chosen = list(dict.fromkeys([*sampler.samples_of(0).tolist(), *range(len(dataset))]))[:PREVIEWED]
    sheet = inspection.preview_sheet(
        dataset,
        images,
        sizes,
        chosen,
        num_variations=min(num_variations(args) or 4, 4),
        interpolation=args.image_interpolation_mode,
        augmentation=augmentation_of(args),
        seed=args.seed,
    )
    Path(args.preview_data).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.preview_data)
    return f"what the model will see: {args.preview_data}"


def pictures_to_use(args, dataset, validation_dataset, usable, say):
    """((records, pictures) to train on, the same to validate on or None); `usable(records)` leaves out what can't be."""
    from text_to_image_lora import pictures

    dataset, images = usable(dataset)
    if validation_dataset is None and not args.validation_split:
        return (dataset, images), None
    others = None if validation_dataset is None else usable(validation_dataset)
    return pictures.divide(dataset, images, others, args.validation_split, say)


def look_at_data(args, base, dataset, validation_dataset, left_out):
    """--dry_run: what the dataset holds, what is wrong with it, and with --preview_data what the model will see of it.

    No model is loaded but the tokenizer. Raises `InputError` for what training would refuse.
    """
    from text_to_image_lora import inspection, models, pictures, prompts

    args = argparse.Namespace(**vars(args) | {"seed": args.seed or 0})
    report_file = Path(args.output_dir) / "dataset.json"

    def usable(records):
        good, bad = pictures.examine(records, range(len(records)))
        left_out.extend((records[index]["source"], reason) for index, reason in sorted(bad.items()))
        return pictures.usable_part(records, good)

    (dataset, images), validated = pictures_to_use(args, dataset, validation_dataset, usable, print)
    sizes = sizes_to_train_at(args, images)
    sampler = make_sampler(args, dataset, sizes, rank=0, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    tokenizer, token_counts, num_chunks, too_long = models.load_tokenizer(base), None, 1, None
    if tokenizer is not None:
        token_counts = prompts.count_tokens(tokenizer, dataset["captions"][:])
        try:
            num_chunks = prompts.choose_num_chunks(
                tokenizer, token_counts, dataset["source"], long_prompts=args.long_prompts, say=lambda line: None
            )
        except InputError as error:
            too_long = error
    masked = any(row is not None for row in dataset["mask"])
    report = inspection.describe(
        dataset,
        images,
        left_out,
        sizes,
        sampler.samples,
        num_validated=0 if validated is None else len(validated[1]),
        token_counts=token_counts,
        token_limit=None if tokenizer is None or args.long_prompts else tokenizer.model_max_length,
        steps_per_epoch=sampler.steps_per_epoch,
        cache_bytes=bytes_of_cache(args, base, images, sizes, captions_to_train_on(args, dataset), num_chunks, masked)
        if num_variations(args)
        else 0,
    )
    inspection.write_report(report, report_file)
    print("\n".join([*inspection.lines_of(report), "", f"all of it: {report_file}"]))
    if args.preview_data is not None:
        print(write_preview(args, dataset, images, sizes, sampler))
    if too_long is not None:
        raise too_long
    if left_out and not args.skip_bad_images:
        source, reason = left_out[0]
        raise InputError(
            f"{source}: {reason} ({len(left_out)} such pictures or rows in all). Fix them, or pass --skip_bad_images to "
            "leave them out."
        )


def identity_of_run(args, dataset, images, sampler):
    """What must be the same for a checkpoint to be gone on from."""
    return {
        "base_model": args.pretrained_model_name_or_path,
        "dataset": fingerprint(
            [image.image_id for image in images],
            dataset["captions"],
            [sampler.samples.tolist(), sampler.groups.tolist()],
        ),
        "rank": args.rank,
        "lora_alpha": args.lora_alpha,
        "target_modules": list(args.target_modules),
        "use_rslora": args.use_rslora,
        "use_dora": args.use_dora,
        "seed": args.seed,
        "balance": args.balance,
        "caption_dropout": args.caption_dropout,
        "prior_loss_weight": args.prior_loss_weight if args.class_data_dir is not None else None,
        "long_prompts": args.long_prompts,
        "tags": [args.shuffle_tags, args.keep_tags, args.tag_variations],
        "buckets": [args.bucket_min_size, args.bucket_max_size, args.bucket_step, args.bucket_no_upscale],
        "effective_batch_size": sampler.effective_batch_size,
        "optimizer": [args.optimizer, args.loraplus_lr_ratio is not None],
        "use_ema": args.use_ema,
        "text_encoder": (args.text_encoder_rank or args.rank) if args.train_text_encoder else None,
    }


def adapt(unet, text_encoder, args):
    """Adds the LoRA to the UNet, and to the text encoder if there is one, and sets what the flags want of them.

    Returns how many modules were adapted.
    """
    import torch

    from text_to_image_lora import export, lora

    common = dict(
        lora_dropout=args.lora_dropout,
        init_lora_weights=args.init_lora_weights,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )
    torch.manual_seed(args.seed)
    adapted = {"unet": unet} | ({} if text_encoder is None else {"text_encoder": text_encoder})
    num_adapted = lora.add_lora(
        unet, rank=args.rank, lora_alpha=args.lora_alpha, target_modules=args.target_modules, **common
    )
    if text_encoder is not None:
        rank = args.text_encoder_rank or args.rank
        num_adapted += lora.add_lora(
            text_encoder,
            rank=rank,
            lora_alpha=args.lora_alpha * rank / args.rank,
            target_modules=lora.text_layers(text_encoder, args.clip_skip or 0),
            **common,
        )
    if args.lora_weights is not None:
        loaded, _ = export.load_lora(args.lora_weights)
        if set(loaded) != set(adapted):
            raise InputError(
                f"{args.lora_weights}: it adapts {' and '.join(sorted(loaded)) or 'nothing'}, and this trains the "
                f"{' and the '.join(adapted)}{'' if len(adapted) > 1 else ' alone'}. Start from a LoRA of the same."
            )
        try:
            for name, model in adapted.items():
                lora.start_from(model, loaded[name])
        except ValueError as error:
            raise InputError(
                f"{args.lora_weights}: {error}. Check --rank, --target_modules and --use_dora."
            ) from error
    if args.gradient_checkpointing and text_encoder is not None:
        text_encoder.gradient_checkpointing_enable()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
            raise InputError(
                f"xformers can't be used here ({str(error).splitlines()[0]}): leave the flag out."
            ) from error
    return num_adapted


def settings_of(args, shown):
    """The flags of a run: those that were given, and what the defaults became."""
    hidden = (*NOT_SHOWN, "validation_prompt")
    return {k: v for k, v in vars(args).items() if k not in hidden and (k in shown or v not in (None, [], "", False))}


def write_run_file(args, shown, path):
    """run.yaml, for --config: the run's flags, its seed, and nothing that follows from other flags.

    So that --config run.yaml --rank 16 has the alpha of rank 16.
    """
    import yaml

    flags = {k: v for k, v in settings_of(args, shown).items() if k == "seed" or k not in args.left_open}
    path.write_text(yaml.safe_dump(flags, sort_keys=False, allow_unicode=True), encoding="utf-8")


def without_folders(values):
    """The values as strings; of an absolute path the last name only, the rest would tell of the author's disk."""

    def shown(value):
        return Path(value).name if os.path.isabs(value) else value

    return {
        name: " ".join(shown(str(v)) for v in value) if isinstance(value, list) else shown(str(value))
        for name, value in values.items()
    }


def make_accelerator(args, trackers):
    """The `Accelerator` in the precision that the flag or the launcher asks for; both are checked against the device."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(f"ACCELERATE_MIXED_PRECISION={precision}: choose no, fp16 or bf16.")
    if precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise InputError("--mixed_precision fp16 needs a GPU: on a CPU it would train in float32. Use bf16 or no.")
    logging_dir = os.path.join(args.output_dir, args.logging_dir)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=logging_dir),
    )
    if args.enable_xformers_memory_efficient_attention and accelerator.device.type != "cuda":
        raise InputError("--enable_xformers_memory_efficient_attention needs a CUDA GPU: leave it out here.")
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def upload(args, say):
    """Uploads what the run left; a failure is a `TrainingError` that says that nothing is lost."""
    from text_to_image_lora import export

    output_dir = Path(args.output_dir)
    try:
        url = export.upload(output_dir, args.hub_model_id or output_dir.resolve().name, args.hub_token)
    except Exception as error:  # whatever it is, the weights are written and the user must hear so
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"The upload failed ({reason}). Everything is in {output_dir}: run the same command again to upload it."
        ) from error
    say(f"uploaded: {url}")


def make_validation_set(args, base, records, images, build_cache):
    """The `ValidationSet` of some records and pictures, through the cache: cropped in the middle, nothing augmented."""
    from text_to_image_lora.transforms import Augmentation
    from text_to_image_lora.validation import ValidationSet

    sizes, captions = sizes_to_train_at(args, images), [group[:1] for group in records["captions"]]
    masked = any(mask is not None for mask in records["mask"])
    latents, prompts = build_cache(
        records, images, sizes, captions, latent_shapes=base.latent_shapes(sizes), cache_variations=1,
        augmentation=Augmentation(center_crop=True), masked=masked,
    )  # fmt: skip
    return ValidationSet(images, captions, latents=latents, prompts=prompts, masked=masked)


def settle_steps(args, sampler):
    """Settles how many steps there are, how many of warm-up, and what --scale_lr makes of the learning rates."""
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * sampler.steps_per_epoch
    if args.lr_warmup_ratio is not None:
        args.lr_warmup_steps = round(args.lr_warmup_ratio * args.max_train_steps)
    elif args.lr_warmup_steps is None:
        args.lr_warmup_steps = min(500, args.max_train_steps // 10)
    scale = sampler.effective_batch_size if args.scale_lr else 1
    check_polynomial(args, scale * args.learning_rate)
    if args.lr_scheduler == "polynomial" and args.lr_warmup_steps >= args.max_train_steps:
        raise InputError(
            f"--lr_scheduler polynomial: {args.lr_warmup_steps} of {args.max_train_steps} steps are warm-up. Leave some for it."
        )
    return scale


def make_optimizer_and_schedule(args, adapted, scale, device):
    """(optimizer, lr_scheduler) for the adapted models; learning rates are multiplied by `scale`."""
    from diffusers.optimization import get_scheduler

    from text_to_image_lora import optimizers

    own = {"text_encoder": args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr}
    groups = []
    for name, model in adapted.items():
        groups += optimizers.parameter_groups(model, scale * own.get(name, args.learning_rate), args.loraplus_lr_ratio)
    optimizer = optimizers.make_optimizer(
        args.optimizer,
        groups,
        learning_rate=scale * args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        words=args.optimizer_args,
        device=device,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        step_rules=args.lr_step_rules or None,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    return optimizer, lr_scheduler


def make_loader(args, dataset, images, sizes, captions, sampler, *, num_train_timesteps, device, **cached):
    """The loader of the micro-batches; `cached` is what `TrainingSet` takes beside."""
    import torch

    from text_to_image_lora import data

    training_set = data.TrainingSet(
        dataset,
        images,
        sizes,
        captions,
        num_train_timesteps=num_train_timesteps,
        timestep_sampling=timestep_sampling_of(args, num_train_timesteps),
        caption_dropout=args.caption_dropout,
        shuffle_tags=args.shuffle_tags,
        keep_tags=args.keep_tags,
        interpolation=args.image_interpolation_mode,
        augmentation=augmentation_of(args),
        input_perturbation=args.input_perturbation,
        perceptual=args.perceptual_loss == "self",
        seed=args.seed,
        **cached,
    )
    return torch.utils.data.DataLoader(
        training_set,
        batch_sampler=sampler,
        collate_fn=data.collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=device.type == "cuda",
    )


def tell_samples(args, dataset, images, sizes, sampler, say):
    """Says what is enlarged, and what the buckets and the concepts hold."""
    small = buckets.num_enlarged(images, sizes)
    if small:
        say(f"{small} of {len(images)} pictures are smaller than what they are trained at, and are enlarged")
    if args.aspect_ratio_buckets:
        say("\n".join(buckets.table(sizes, sampler.samples)))
    if args.balance is not None:
        concepts = dataset["concept"][:]
        for concept, count in sorted(collections.Counter(concepts[i] for i in sampler.samples).items()):
            say(f"concept {concept}: {concepts.count(concept)} pictures, {count} samples an epoch")


def main(args):
    started = time.time()
    shown = hide_secrets(args)
    trackers = trackers_of(args.report_to)
    quiet_libraries()

    left_out = []
    base, dataset, validation_dataset = check_inputs(
        args, (lambda *what: left_out.append(what)) if args.dry_run else None
    )
    if args.dry_run:
        if os.environ.get("RANK", "0") == "0":
            look_at_data(args, base, dataset, validation_dataset, left_out)
        return

    import diffusers
    import torch
    import transformers
    from accelerate.utils import broadcast_object_list
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    from text_to_image_lora import (
        caching,
        checkpoint,
        data,
        export,
        lora,
        models,
        objective,
        optimizers,
        perceptual,
        pictures,
        prompts,
        stopping,
        tracking,
        validation,
    )  # fmt: skip

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    accelerator = make_accelerator(args, trackers)
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    precision = accelerator.mixed_precision
    weight_dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    say = tqdm.write if accelerator.is_main_process else lambda line: None

    usable = functools.partial(
        pictures.usable_pictures, folder=Path(args.latent_cache_dir).expanduser(), skip_bad_images=args.skip_bad_images,
        accelerator=accelerator, say=say,
    )  # fmt: skip
    (dataset, images), validated = pictures_to_use(args, dataset, validation_dataset, usable, say)
    masked = any(row is not None for row in dataset["mask"])
    if masked and args.perceptual_loss is not None:
        raise InputError(
            "--perceptual_loss looks at whole pictures, and some of these have masks: leave one of the two out."
        )
    sizes = sizes_to_train_at(args, images)
    latent_shapes = base.latent_shapes(sizes)
    args.cache_variations = num_variations(args)

    # Where a run of this command stopped, if it did.
    resume_path = checkpoint.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if resume_path is not None:
        state, settings_before = checkpoint.read_state(resume_path)
        args.seed = state.seed if args.seed is None else args.seed
    if args.seed is None:
        args.seed = broadcast_object_list([int.from_bytes(os.urandom(4), "little")])[0]
    sampler = make_sampler(args, dataset, sizes, rank=rank, world_size=world_size)
    settings = identity_of_run(args, dataset, images, sampler)
    if resume_path is not None:
        checkpoint.check_same_run(resume_path, settings_before, settings)
    else:
        state = checkpoint.TrainState(seed=args.seed)
    lr_scale = settle_steps(args, sampler)
    tell_samples(args, dataset, images, sizes, sampler, say)

    # Models. The LoRA is added first: a wrong --target_modules costs seconds.
    tokenizer, text_encoder, vae, unet, scheduler_config = models.load_components(
        base, pretrained_vae=args.pretrained_vae_model_name_or_path
    )
    read = [dataset] if validated is None else [dataset, validated[0]]
    num_chunks = prompts.choose_num_chunks(
        tokenizer,
        prompts.count_tokens(tokenizer, [group for records in read for group in records["captions"]]),
        [source for records in read for source in records["source"]],
        long_prompts=args.long_prompts,
        say=say,
    )
    if args.preview_data is not None and accelerator.is_main_process:
        say(write_preview(args, dataset, images, sizes, sampler))
    noise_scheduler = models.make_noise_scheduler(
        scheduler_config, prediction_type=args.prediction_type, rescale_betas_zero_snr=args.rescale_betas_zero_snr
    )
    if device.type != "mps":
        unet.to(memory_format=torch.channels_last)
    num_adapted = adapt(unet, text_encoder if args.train_text_encoder else None, args)
    adapted = {"unet": unet} | ({"text_encoder": text_encoder} if args.train_text_encoder else {})
    for model in adapted.values():
        lora.cast_frozen(model, weight_dtype)
        model.to(device)
    params_to_optimize = [parameter for model in adapted.values() for parameter in lora.trainable_parameters(model)]

    # The cache: with it, the denoiser alone stays on the device.
    vae.to(device)  # in float32: some VAEs overflow in float16
    if not args.train_text_encoder:
        text_encoder.to(device, weight_dtype)
    vae_encode = functools.partial(models.encode_images, vae)

    @torch.no_grad()
    def text_encode(texts, clip_skip=args.clip_skip):
        with contextlib.ExitStack() as stack:
            stack.enter_context(validation.evaluating(text_encoder))
            if args.train_text_encoder:  # its LoRA is float32
                stack.enter_context(accelerator.autocast())
            return prompts.encode_prompts(tokenizer, text_encoder, texts, clip_skip, num_chunks).to(weight_dtype)

    def embeds_to_validate():
        """Of the validation prompts, and of the negative one; as in diffusers' pipeline, that has no clip_skip."""
        negative = text_encode([args.validation_negative_prompt], clip_skip=None)[0].cpu()
        return text_encode(args.validation_prompts).cpu(), negative

    embeds = embeds_to_validate() if args.validation_prompts and not args.train_text_encoder else None
    scaling_factor, latent_dtype = vae.config.scaling_factor, torch.float16 if precision != "no" else torch.float32
    of_text = dict(text_encode=None, text_identity="")
    if not args.train_text_encoder:
        of_text = dict(
            text_encode=text_encode, text_identity=f"{models.text_identity(tokenizer, text_encoder)} x {num_chunks}"
        )
    build_cache = functools.partial(
        caching.build,
        vae_encode=vae_encode,
        vae_identity=models.weights_identity(vae),
        latent_dtype=latent_dtype,
        prompt_shape=(77 * num_chunks, base.cross_attention_dim),
        prompt_dtype=weight_dtype,
        clip_skip=args.clip_skip,
        **of_text,
        folder=Path(args.latent_cache_dir).expanduser(),
        accelerator=accelerator,
        interpolation=args.image_interpolation_mode,
        seed=args.seed,
    )
    caption_lists = captions_to_train_on(args, dataset)
    cached = dict(latents=(None, None), prompts=(None, None), latent_shapes=latent_shapes, masked=masked)
    if args.cache_variations:
        cached["latents"], cached["prompts"] = build_cache(
            dataset, images, sizes, caption_lists, latent_shapes=latent_shapes, masked=masked,
            cache_variations=args.cache_variations, augmentation=augmentation_of(args), caption_dropout=args.caption_dropout,
        )  # fmt: skip
    validation_sets = []  # what is held out, and as much of what is trained on
    if validated is not None:
        probe = pictures.probe_of(dataset, images, len(validated[1]), args.seed)
        validation_sets = [make_validation_set(args, base, *part, build_cache) for part in (validated, probe)]
    if args.cache_variations:
        if args.perceptual_loss == "decoder":
            say("the VAE stays in memory for --perceptual_loss decoder")
        else:
            vae = vae.to("cpu") if args.validation_prompts else None
        del vae_encode, build_cache
        if not args.train_text_encoder:
            del text_encoder, text_encode
        if device.type == "cuda":
            torch.cuda.empty_cache()

    # Optimizer, schedule, loader.
    optimizer, lr_scheduler = make_optimizer_and_schedule(args, adapted, lr_scale, device)
    average = EMAModel(params_to_optimize, decay=args.ema_decay) if args.use_ema else None
    if resume_path is not None:
        adapter = checkpoint.load_checkpoint(
            resume_path, optimizer=optimizer, lr_scheduler=lr_scheduler, scaler=accelerator.scaler, average=average
        )
        if average is not None:
            average.decay = args.ema_decay
        for name, model in adapted.items():
            lora.load_adapter(model, lora.part_of(adapter, name))
    sampler.first_step, sampler.num_steps = state.global_step, args.max_train_steps
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    loader = make_loader(
        args, dataset, images, sizes, caption_lists, sampler, num_train_timesteps=num_train_timesteps, device=device, **cached
    )  # fmt: skip
    trained = accelerator.prepare(*adapted.values())  # as each process wraps them
    trained = [trained] if len(adapted) == 1 else list(trained)
    optimizer = accelerator.prepare(optimizer)

    # Reports and files.
    output_dir = Path(args.output_dir)
    described = {**settings_of(args, shown), **settings}
    training_header = without_folders(described)
    metrics_file = None
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_run_file(args, shown, output_dir / "run.yaml")
        metrics_file = tracking.MetricsFile(output_dir / "metrics.jsonl", state.global_step)
        state.tracker_run_id = tracking.start_trackers(
            accelerator, args.tracker_project_name, described, output_dir, state.tracker_run_id
        )
    say(
        f"{len(dataset)} pictures, {sampler.steps_per_epoch} steps an epoch, {args.max_train_steps} steps; effective batch "
        f"{sampler.effective_batch_size} on {world_size} x {device.type} in {str(weight_dtype).removeprefix('torch.')}; "
        f"rank-{args.rank} LoRA on {num_adapted} modules ({sum(p.numel() for p in params_to_optimize):,} parameters)"
    )
    if resume_path is not None:
        say(f"going on from {resume_path} (step {state.global_step})")

    def make_pictures():
        pipeline = validation.make_pipeline(
            unet,
            vae,
            scheduler_config,
            prediction_type=noise_scheduler.config.prediction_type,
            rescale_betas_zero_snr=noise_scheduler.config.rescale_betas_zero_snr,
        )
        made = validation.generate_images(
            pipeline,
            *(embeds or embeds_to_validate()),
            num_images=args.num_validation_images,
            seed=args.seed,
            resolution=args.resolution,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            accelerator=accelerator,
        )
        if accelerator.is_main_process:
            folder = output_dir / "validation" / f"step-{state.global_step:06d}"
            validation.save_images(made, args.validation_prompts, folder)
            tracking.log_pictures(accelerator, made, args.validation_prompts, state.global_step)

    weights_for_use = functools.partial(optimizers.weights_for_use, params_to_optimize, optimizer, average)
    validation_losses = functools.partial(
        validation.loss_tables,
        unet,
        validation_sets,
        noise_scheduler=noise_scheduler,
        scaling_factor=scaling_factor,
        weight_dtype=weight_dtype,
        seed=args.seed,
        accelerator=accelerator,
        text_encode=text_encode if args.train_text_encoder else None,
    )

    def judge():
        """Takes in the validation losses of this step; keeps the LoRA in best/ where it is the best so far."""
        table, probe = validation_losses()
        values = stopping.values_of(table, probe, state.validation, validation.strata(num_train_timesteps))
        begins = state.global_step == 0 and args.lora_weights is None  # with nothing learnt, it is the base itself
        improved = not begins and stopping.take_in(state.validation, table, state.global_step)
        if state.validation.best_step is not None:
            values["validation/best_step"] = state.validation.best_step
        if accelerator.is_main_process:
            metrics_file.write(state.global_step, values)
            if improved:
                with checkpoint.written_whole(output_dir / "best") as folder:
                    save_lora(folder)
            elif state.validation.best_step is None:  # what is there is another run's
                shutil.rmtree(output_dir / "best", ignore_errors=True)
        accelerator.log(values, step=state.global_step)

    def out_of_patience():
        return args.early_stopping_patience is not None and state.validation.waited >= args.early_stopping_patience

    def save_lora(folder):
        components = {name: lora.adapter_state(model) for name, model in adapted.items()}
        if not all(value.isfinite().all() for state_dict, _ in components.values() for value in state_dict.values()):
            raise TrainingError(
                f"After step {state.global_step} the weights are not numbers any more. Lower --learning_rate; what was "
                f"saved before is in {output_dir}."
            )
        return export.save_lora(folder, components, training_header)

    def save_checkpoint():
        with checkpoint.written_whole(output_dir / f"checkpoint-{state.global_step}") as folder:
            checkpoint.save_checkpoint(
                folder,
                adapter=lora.joined({name: lora.adapter_state(model)[0] for name, model in adapted.items()}),
                average=None if average is None else average.state_dict(),
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                scaler=accelerator.scaler,
                state=state,
                settings=settings,
            )
            with weights_for_use():
                save_lora(folder)
            if state.validation is not None and state.validation.best_step is not None:
                checkpoint.copy_best(output_dir, folder)
        checkpoint.prune_checkpoints(output_dir, args.checkpoints_total_limit, newest=state.global_step)

    if validation_sets:
        identities = [validation_set.identity() for validation_set in validation_sets]
        if state.validation is not None and state.validation.pictures != identities:
            say("the pictures to validate on are others than before: what was best so far is looked for anew")
            state.validation = None
        if state.validation is not None and accelerator.is_main_process:  # a later one may be there, of steps given up
            shutil.rmtree(output_dir / "best", ignore_errors=True)
            checkpoint.copy_best(resume_path, output_dir)

    # The loop.
    progress = tqdm(
        total=args.max_train_steps,
        initial=state.global_step,
        desc="training",
        disable=not accelerator.is_local_main_process,
    )
    reports = tracking.StepReports(accelerator, metrics_file, progress, output_dir)
    for model in adapted.values():
        model.disable_adapters()
    if validation_sets and state.validation is None:
        table, probe = (table.tolist() for table in validation_losses())
        state.validation = stopping.Validation(base=table, base_probe=probe, best=table, pictures=identities)
    if args.validation_prompts and state.global_step == 0:
        make_pictures()
    for model in adapted.values():
        model.enable_adapters()
    if validation_sets and state.global_step == 0:
        judge()
    for model in trained:
        model.train()
    optimizer.train()  # schedulefree has two sets of weights; the others do nothing
    batches, clock = iter(loader), time.time()
    while state.global_step < args.max_train_steps and not out_of_patience():
        step = state.global_step
        num_micro_batches = sampler.num_micro_batches(step)
        train_loss = torch.zeros((), device=device)
        for micro_step in range(num_micro_batches):
            batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in next(batches).items()}
            if "pixels" in batch:
                batch["mean"], batch["std"] = (t.to(latent_dtype).float() for t in vae_encode(batch["pixels"]))
            if "captions" in batch and not args.train_text_encoder:
                batch["encoder_hidden_states"] = text_encode(batch["captions"])
            timesteps = batch["timesteps"]
            latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * scaling_factor
            noise = batch["noise"] + args.noise_offset * batch["channel_noise"]
            seen_noise = noise + args.input_perturbation * batch["perturbation"] if args.input_perturbation else noise
            noisy_latents = noise_scheduler.add_noise(latents, seen_noise, timesteps)
            target = objective.target_of(noise_scheduler, latents, noise, timesteps)
            weights, huber_c = batch["weights"], None
            weights = weights * objective.timestep_weights(
                noise_scheduler, timesteps, snr_gamma=args.snr_gamma, debiased=args.debiased_estimation
            )
            if args.loss_type == "huber":
                huber_c = objective.scheduled_huber_c(args.huber_c, timesteps, num_train_timesteps)
            if args.lora_dropout:
                torch.manual_seed(data.seed_of(args.seed, step, micro_step, rank))
            last = micro_step == num_micro_batches - 1
            with contextlib.ExitStack() as stack:
                for model in trained if not last else ():
                    stack.enter_context(accelerator.no_sync(model))
                if args.train_text_encoder:
                    with accelerator.autocast():
                        batch["encoder_hidden_states"] = prompts.encode_prompts(
                            tokenizer, trained[1], batch["captions"], args.clip_skip, num_chunks
                        )
                model_pred = models.predict(
                    trained[0], noisy_latents.to(weight_dtype), timesteps, batch["encoder_hidden_states"]
                )
                loss = objective.diffusion_loss(model_pred, target, weights, batch.get("mask"), huber_c)
                if args.perceptual_loss is not None:
                    truly_noisy = noise_scheduler.add_noise(latents, noise, timesteps)  # without --input_perturbation
                    predicted = perceptual.predicted_clean(noise_scheduler, truly_noisy, model_pred, timesteps)
                    loss = loss + args.perceptual_loss_weight * perceptual.perceptual_loss(
                        args.perceptual_loss, predicted, latents, batch, unet=unet, vae=vae, dtype=weight_dtype,
                        noise_scheduler=noise_scheduler, scaling_factor=scaling_factor,
                        max_timestep=args.perceptual_max_timestep,
                    )  # fmt: skip
                accelerator.backward(loss)
            train_loss += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(params_to_optimize, args.max_grad_norm or math.inf)
        optimizer.step()
        lr = lr_scheduler.get_last_lr()[0]
        # A loss scale that was too high: the step is skipped, and fp16 tries a lower one. Accelerate's own sign of it
        # misses optimizers that skip by themselves, as fused AdamW does.
        if accelerator.scaler is None or grad_norm.isfinite():
            lr_scheduler.step()
            if average is not None:
                average.step(params_to_optimize)
        optimizer.zero_grad()
        state.global_step += 1
        progress.update()

        now = time.time()
        reports.put(
            state.global_step,
            {
                "train_loss": accelerator.reduce(train_loss, "mean"),
                "lr": lr,
                "grad_norm": grad_norm,
                "epoch": state.global_step / sampler.steps_per_epoch,
                "images_per_second": sampler.num_samples(step) / (now - clock),
            },
        )
        clock = now
        epoch, into_epoch = divmod(state.global_step, sampler.steps_per_epoch)
        end_of_epoch, finished = into_epoch == 0, state.global_step == args.max_train_steps
        if args.validation_steps:
            due = state.global_step % args.validation_steps == 0
        else:
            due = args.validation_epochs and end_of_epoch and epoch % args.validation_epochs == 0
        validates = due or finished
        if validation_sets and validates:
            reports.flush()
            with weights_for_use():
                judge()
            finished = finished or out_of_patience()
        checkpoints = args.checkpointing_steps and (finished or state.global_step % args.checkpointing_steps == 0)
        if finished or checkpoints:
            reports.flush()
        saves = args.save_every_n_epochs and end_of_epoch and epoch % args.save_every_n_epochs == 0
        if saves and accelerator.is_main_process:
            with weights_for_use():
                save_lora(output_dir / f"epoch-{epoch:04d}")
        if args.validation_prompts and validates:
            reports.flush()
            with weights_for_use():
                make_pictures()
        if checkpoints and accelerator.is_main_process:  # last, so that what it goes on after is all there
            save_checkpoint()
        if validates or checkpoints or saves:  # no part of the training's speed
            clock = time.time()
    progress.close()
    if validation_sets:
        say(stopping.in_words(state.validation, state.global_step))

    # What the run leaves.
    if accelerator.is_main_process:
        with weights_for_use():
            lora_file = save_lora(output_dir)
        shown_pictures = validation.latest_images(output_dir, args.validation_prompts)
        export.write_model_card(
            output_dir,
            base_model=args.pretrained_model_name_or_path,
            dataset_name=args.dataset_name or " ".join(args.train_data_dir),
            prompts=[prompt for prompt, _ in shown_pictures],
            image_paths=[path.relative_to(output_dir).as_posix() for _, path in shown_pictures],
            hyperparameters=shown,
            repo_id=args.hub_model_id,
        )
        say(f"LoRA: {lora_file}  (model card: {output_dir / 'README.md'}, {time.time() - started:.0f} s)")
    # The others leave when all is written; and without the DDP wrapper, which would keep Gloo's threads alive until the
    # interpreter ends, and then now and then abort the process.
    accelerator.wait_for_everyone()
    trained, model = None, None
    accelerator.free_memory()
    line = tracking.finish_trackers(accelerator)
    if line is not None:
        say(line)
    if args.push_to_hub and accelerator.is_main_process:
        upload(args, say)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, TrainingError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # rank 0 says the same, and the launcher then ends this one; else it is this rank's alone
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on from the last checkpoint", file=sys.stderr)
        sys.exit(130)

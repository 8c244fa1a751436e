"""The training runs that are compared: short runs of the embedded base, which together use most of the flags.

The lines are written as for a shell, see `commands.run`. $data is the folder with the files of `inputs.pictures`, and $out
the output folder of the run. && separates two commands that share this folder.
"""

COMMON = """train --pretrained_model_name_or_path models/mini-sd --resolution 128 --seed 7 --rank 4 --learning_rate 2e-3
    --train_batch_size 4 --num_validation_images 1 --validation_inference_steps 3 --validation_epochs 0
    --report_to none --output_dir $out --latent_cache_dir $out/cache"""
RUNS = {
    "plain": """--train_data_dir metadata/weapons --max_train_samples 22 --num_train_epochs 2 --random_flip
        --random_crop_scale 0.8 --lr_scheduler cosine --noise_offset 0.1 --snr_gamma 5
        --validation_prompt 'a red axe'""",
    "live": """--train_data_dir $data/tags --max_train_steps 6 --cache_variations 0 --dataloader_num_workers 1
        --shuffle_tags --keep_tags 1 --caption_dropout 0.3 --input_perturbation 0.1 --random_flip --random_rotation 15
        --random_brightness 0.2 --random_contrast 0.2 --random_saturation 0.2 --random_hue 0.05 --debug_loss""",
    "buckets": """--train_data_dir $data/shapes --num_train_epochs 2 --train_batch_size 2 --aspect_ratio_buckets
        --balance concept --class_data_dir $data/class --class_prompt 'a spear' --prior_loss_weight 0.5
        --preview_data $out/preview.png""",
    "validation": """--train_data_dir metadata/weapons --max_train_samples 26 --max_train_steps 14 --center_crop
        --learning_rate 2e-2 --use_ema --ema_decay 0.7 --validation_split 0.15 --validation_steps 2
        --early_stopping_patience 2 --validation_prompts 'a red axe --seed 3 --guidance 3 --negative blue'
        'a blue whip --width 160' --validation_negative_prompt pink""",
    "text_encoder": """--train_data_dir metadata/creatures --max_train_samples 16 --max_train_steps 6
        --train_text_encoder --text_encoder_rank 2 --text_encoder_lr 1e-3 --clip_skip 1 --gradient_checkpointing
        --caption_dropout 0.2 --validation_split 0.2 --validation_steps 3 --validation_prompt 'a red creature'""",
    "perceptual_decoder": """--train_data_dir metadata/creatures --max_train_samples 12 --max_train_steps 6
        --perceptual_loss decoder --perceptual_max_timestep 600""",
    "perceptual_self": """--train_data_dir metadata/creatures --max_train_samples 12 --max_train_steps 6
        --perceptual_loss self --gradient_checkpointing --input_perturbation 0.1""",
    "schedulefree": """--train_data_dir metadata/creatures --max_train_samples 20 --max_train_steps 12
        --optimizer schedulefree --lr_scheduler constant_with_warmup --lr_warmup_ratio 0.25
        --validation_data_dir $data/shapes/whip --validation_steps 6 --checkpointing_steps 6""",
    "adamw8bit": """--train_data_dir metadata/weapons/axe --max_train_steps 8 --use_8bit_adam
        --optimizer_args min_8bit_size=256 --adam_beta2 0.99 --adam_weight_decay 0.1 --max_grad_norm 0.1""",
    "dora": """--train_data_dir metadata/weapons/whip --max_train_steps 8 --use_dora --use_rslora --lora_dropout 0.2
        --lora_alpha 8 --init_lora_weights orthogonal --target_modules to_q to_v ff.net.2
        --lr_scheduler cosine_with_restarts --lr_num_cycles 2""",
    "two_processes": """--train_data_dir metadata/weapons --max_train_samples 12 --max_train_steps 6
        --train_batch_size 2 --gradient_accumulation_steps 2 --random_flip --lora_dropout 0.1
        --validation_split 0.1 --validation_steps 3 --validation_prompts 'a red axe' 'a blue whip' 'a spear'""",
    "resumed": """--train_data_dir metadata/weapons/axe --max_train_samples 10 --max_train_steps 6 --use_ema
        --random_flip && --train_data_dir metadata/weapons/axe --max_train_samples 10 --max_train_steps 12 --use_ema
        --random_flip""",
    "prodigy": """--train_data_dir metadata/weapons/spear --max_train_steps 10 --optimizer prodigy --learning_rate 1
        --loss_type huber --huber_c 0.05 --lr_scheduler cosine""",
    "loraplus": """--train_data_dir metadata/weapons/spear --max_train_steps 8 --loraplus_lr_ratio 16
        --debiased_estimation --timestep_sampling logit_normal --logit_mean -0.5 --timestep_range 100 900
        --lr_scheduler polynomial --lr_power 2 --target_modules to_out.0 conv1 conv2""",
    "v_prediction": """--train_data_dir metadata/weapons/trident --max_train_steps 6 --prediction_type v_prediction
        --rescale_betas_zero_snr --snr_gamma 5 --timestep_sampling mode --validation_prompt 'a red trident'""",
    "bf16": """--train_data_dir $data/tags --max_train_steps 8 --mixed_precision bf16 --long_prompts --shuffle_tags
        --tag_variations 3 --trigger_word sks --caption_prefix 'a drawing, ' --caption_suffix ', white background'
        --lr_scheduler piecewise_constant --lr_step_rules 1:4,0.1 --validation_prompt 'sks, a red axe'""",
    "kohya": """--train_data_dir metadata/creatures --max_train_samples 8 --max_train_steps 2 --output_dir $out/first
        && --train_data_dir $data/kohya --num_train_epochs 2 --lora_weights $out/first --train_batch_size 2
        --lora_alpha 2 --gradient_accumulation_steps 2 --scale_lr --learning_rate 1e-4 --random_flip
        --validation_prompt 'a red axe' --output_kohya_format --kohya_extras thumbnail tags""",
    "class_folders": """--train_data_dir $data/pets --config $data/run.yaml --max_train_steps 6""",
    "adafactor": """--dataset_name metadata/weapons_test --num_train_epochs 4 --train_batch_size 8
        --save_every_n_epochs 2 --optimizer adafactor --lr_scheduler linear --checkpointing_steps 4
        --checkpoints_total_limit 2""",
    "tracked": """--train_data_dir $data/shapes --max_train_steps 4 --report_to wandb --validation_split 0.2
        --validation_steps 2 --validation_prompt 'a red axe'""",
    "dry_run": """--train_data_dir $data/shapes --dry_run --aspect_ratio_buckets --balance concept --random_flip
        --validation_split 0.2 --preview_data $out/preview.png && --train_data_dir $data/tags $data/kohya --dry_run
        --output_dir $out/tags --mixed_precision bf16 --shuffle_tags --train_text_encoder --gradient_checkpointing""",
}
# The first command of these runs is run by the earlier checkout only. Both checkouts then resume from a copy of its output
# folder, including the cache: checkpoints and caches that were written before a change must still be usable after it.
RESUMED = {
    "begun_before": """--train_data_dir metadata/weapons --max_train_samples 12 --random_flip --max_train_steps 6
        && --train_data_dir metadata/weapons --max_train_samples 12 --random_flip --max_train_steps 10""",
    "begun_before_all": """--train_data_dir metadata/creatures --max_train_samples 14 --train_text_encoder --use_ema
        --validation_split 0.2 --validation_steps 3 --validation_prompt 'a red creature' --max_train_steps 6
        && --train_data_dir metadata/creatures --max_train_samples 14 --train_text_encoder --use_ema
        --validation_split 0.2 --validation_steps 3 --validation_prompt 'a red creature' --max_train_steps 10""",
}


def lines_of(name):
    """Returns the complete lines of a training run."""
    program = COMMON.replace("train", "torchrun", 1) if name == "two_processes" else COMMON
    return [f"{program} {flags}" for flags in (RUNS | RESUMED)[name].split("&&")]

"""The pictures of `infer.py` that are compared: every mode, sampler and prompt option, with few steps.

The lines are written as in `runs`. $drawing is the folder with the files of `inputs.drawing_inputs`.
"""

COMMON = "infer --pretrained_model_name_or_path models/mini-sd --num_inference_steps 4 --output_dir $out"
DRAWINGS = {
    "drawn_text": """--lora $drawing/axe --num_images 2 --negative_prompt pink --prompt 'a red axe on a blue background'
        'a green spear --seed 5 --width 96 --height 160 --negative gray --steps 3 --guidance 4 --lora_scale 0.5'
        && --prompt $drawing/prompts.txt --output_dir $out/prompts --mixed_precision bf16 --batch_size 1""",
    "drawn_samplers": """--prompt 'an axe --scheduler ddim' 'an axe --scheduler ddpm' 'an axe --scheduler pndm'
        'an axe --scheduler euler' 'an axe --scheduler euler_a' 'an axe --scheduler heun' 'an axe --scheduler dpm++'
        'an axe --scheduler dpm++_karras' 'an axe --scheduler unipc' 'an axe --scheduler lcm'
        && --prompt 'a red axe' --output_dir $out/zero_snr --lora $drawing/zero_snr.safetensors""",
    "drawn_image": """--prompt 'a red axe' 'a blue whip --strength 0.9' --image $drawing/wide.png --strength 0.5 0.75
        && --prompt 'a red axe' --image $drawing/transparent.png --width 96 --output_dir $out/transparent
        --guidance_scale 1""",
    "drawn_controlnet": """--prompt 'a red axe' --controlnet models/mini-controlnet --control canny
        --image $drawing/wide.png --controlnet_scale 0.8
        && --prompt 'a red axe --controlnet_scale 0.3' 'a whip' --controlnet models/mini-controlnet
        --control_image $drawing/transparent.png --output_dir $out/given""",
    "drawn_grid": """--prompt 'a red axe' 'a blue whip' --lora $drawing/axe --grid lora_scale=0,0.5,1 guidance=2,7.5
        && --prompt 'a red axe' --grid 'checkpoint=base,$drawing/run/epoch-*' seed steps=2,4 --num_images 2
        --output_dir $out/checkpoints
        && --prompt 'a red axe' 'a blue whip' --lora $drawing/axe:0.7 --compare_base --num_images 2
        --output_dir $out/compared""",
    "drawn_again": """--prompt 'a red axe' 'a green spear' --lora $drawing/axe:0.8 $drawing/kohya.safetensors --seed 11
        && --from_png $out/01-a-green-spear-seed11.png --output_dir $out/again
        && --from_png $out/01-a-green-spear-seed11.png --output_dir $out/changed --guidance_scale 3""",
    "drawn_merged": """--lora $drawing/axe $drawing/kohya.safetensors:0.5 --save_merged $out/merged
        && --prompt 'a red axe' --pretrained_model_name_or_path $out/merged""",
    "drawn_as_trained": """--prompt 'a red axe' --lora $drawing/skip.safetensors
        && --prompt 'a red axe' --lora $drawing/skip.safetensors --clip_skip 0 --output_dir $out/given
        && --prompt 'a red axe on a blue background, with a long handle made of old dark wood and a bright round blade of
        ice and fire, beside a tall green tree with silver leaves, under a gold sky full of birds, in front of a stone
        wall with a pink door, near a lake of blue water with a white boat on it, and a second boat that is red, and a
        third boat that is black and has two tall round sails' --lora $drawing/long.safetensors --output_dir $out/long""",
}


def lines_of(name):
    """Returns the complete lines of an item."""
    return [f"{COMMON} {flags}" for flags in DRAWINGS[name].split("&&")]

"""Reads LoRA files of Stable Diffusion by the rules of diffusers, ComfyUI and A1111.

This code shares nothing with the code that writes the files, so that each can be checked against the other. Each reader
takes the tensors of a file, its header, and `layers`: {(component, module): shape of the weight} of the linear and
convolution layers of the base model, without the `text_model.` of text encoders. It returns {(component, module): (A,
B·scale, DoRA's magnitudes or None)} for the modules that match a layer, with A and B as float64 matrices.
"""

import re

from .lora_file import read_adapter_metadata


def diffusers(tensors, header, layers):
    """Reads a file like `load_lora_weights` of diffusers 0.39, and like `load_attn_procs`, which ignores alphas.

    In `loaders/peft.py` and `loaders/lora_base.py`, the part of a key after the component is the name of the layer, and the
    configuration in the header gives the scale. The scale must be 1, or the two functions would differ.
    """
    adapters, matched = read_adapter_metadata(header), {}
    for key in tensors:
        found = re.fullmatch(r"(\w+)\.(?:text_model\.)?(.+)\.lora_A\.weight", key)
        up, magnitude = (
            key.replace("lora_A.weight", end) for end in ("lora_B.weight", "lora_magnitude_vector.weight")
        )
        if not found or found.groups() not in layers or up not in tensors:
            continue
        component, module = found.groups()
        config = {
            name: adapters.get(f"{component}.{name}") for name in ("r", "lora_alpha", "use_rslora", "target_modules")
        }
        unscaled = len(tensors[key]) == config["r"] == config["lora_alpha"] and not config["use_rslora"]
        if module in (config["target_modules"] or ()):
            scale = 1.0 if unscaled else float("nan")
            matched[component, module] = *_pair(tensors, key, up, scale), tensors.get(magnitude)
    return matched


def comfyui(tensors, header, layers):
    """Reads a file like ComfyUI: `model_lora_keys_unet` and `model_lora_keys_clip` in its `comfy/lora.py`.

    ComfyUI knows the UNet's layers by diffusers' names with underscores and by those of the original code; of the text
    encoders, it knows only the six layers of its LORA_CLIP_MAP.
    """
    names = {
        name.replace("diffusion_model", "lora_unet"): place
        for name, place in _original_names(layers, is_sd2=False).items()
        if place[0] == "unet"
    }
    for component, module in layers:
        if component == "unet":
            names["lora_unet_" + module.replace(".", "_")] = component, module
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.(self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])", module):
            layer, kind = found.groups()
            for prefix in ("te2",) if component == "text_encoder_2" else ("te", "te1"):
                names[f"lora_{prefix}_text_model_encoder_layers_{layer}_{kind.replace('.', '_')}"] = component, module
    return _kohya_pairs(tensors, names.get)


def a1111(tensors, header, layers):
    """Reads a file like A1111: `load_network` in its `extensions-builtin/Lora/networks.py`.

    A1111 converts kohya's names to those of the original code, by patterns that fit only the blocks of Stable Diffusion;
    files of Stable Diffusion XL have the original names already. OpenCLIP, the text encoder of Stable Diffusion 2 and the
    second one of XL, has query, key, value and output in one module, which is patched only if the file has all four.
    """
    is_sd2 = layers.get(("text_encoder", "encoder.layers.0.self_attn.q_proj"), ())[:1] == (1024,)
    names = _original_names(layers, is_sd2)
    matched = _kohya_pairs(tensors, lambda name: names.get(_in_the_original(name, is_sd2)))
    attentions = {}
    for component, module in matched:
        if ".self_attn." in module and (is_sd2 or component == "text_encoder_2"):
            attentions.setdefault(module.rpartition(".")[0], []).append((component, module))
    for places in attentions.values():
        if len(places) < 4:
            for place in places:
                del matched[place]
    return matched


def has_the_geometry_of_a1111(layers):
    """Whether the UNet has the blocks of Stable Diffusion 1 and 2, or of XL, which A1111's patterns assume."""
    found = {re.match(r"down_blocks\.(\d+\.resnets\.\d+)\.", module) for _, module in layers}
    blocks = {match[1] for match in found if match}
    return any(blocks == {f"{i}.resnets.{j}" for i in range(levels) for j in range(2)} for levels in (3, 4))


def _pair(tensors, down, up, scale):
    return tensors[down].double().flatten(1), tensors[up].double().flatten(1) * scale


def _kohya_pairs(tensors, find_place):
    """Reads the modules whose kohya name `find_place` knows; without an alpha, both programs use the scale 1."""
    matched = {}
    for key in tensors:
        name, _, leaf = key.partition(".")
        up = f"{name}.lora_up.weight"
        if leaf == "lora_down.weight" and up in tensors and (place := find_place(name)) is not None:
            alpha = tensors.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else alpha.item() / len(tensors[key])
            matched[place] = *_pair(tensors, key, up, scale), tensors.get(f"{name}.dora_scale")
    return matched


_IN_RESNETS = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def _original_names(layers, is_sd2):
    """Returns {name in the original code, with underscores: (component, module)} by counting the blocks of the UNet."""
    blocks = {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}
    blocks |= {"time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2"}
    blocks |= {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
    blocks |= {"mid_block.resnets.0": "middle_block_0", "mid_block.attentions.0": "middle_block_1"}
    blocks |= {"mid_block.resnets.1": "middle_block_2"}
    down, up = 1, 0
    for level in range(4):
        for k in range(2):
            blocks[f"down_blocks.{level}.resnets.{k}"] = f"input_blocks_{down}_0"
            blocks[f"down_blocks.{level}.attentions.{k}"] = f"input_blocks_{down}_1"
            down += 1
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks_{down}_0_op"
        down += 1
        for k in range(3):
            blocks[f"up_blocks.{level}.resnets.{k}"] = f"output_blocks_{up}_0"
            blocks[f"up_blocks.{level}.attentions.{k}"] = f"output_blocks_{up}_1"
            up += 1
        after_attention = any(module.startswith(f"up_blocks.{level}.attentions.") for _, module in layers)
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks_{up - 1}_{1 + after_attention}_conv"
    names = {}
    for component, module in layers:
        if component == "unet":
            block = next((name for name in blocks if f"{module}.".startswith(f"{name}.")), None)
            rest = module[len(block) + 1 :] if block else ""
            name = "_".join(filter(None, (blocks.get(block or ""), _IN_RESNETS.get(rest, rest.replace(".", "_")))))
            names[f"diffusion_model_{name}"] = component, module
        elif is_sd2 or component == "text_encoder_2":
            name = module.removeprefix("encoder.layers.").replace("self_attn", "attn")
            name = name.replace("fc1", "c_fc").replace("fc2", "c_proj").replace(".", "_")
            names[f"{'' if is_sd2 else '1_'}model_transformer_resblocks_{name}"] = component, module
        else:
            for number in ("", "0_"):  # of one or of two text encoders
                names[f"{number}transformer_text_model_{module.replace('.', '_')}"] = component, module
    return names


def _in_the_original(name, is_sd2):
    """A1111's `convert_diffusers_name_to_compvis`."""

    def inside(kind, rest):
        return _IN_RESNETS.get(rest, rest) if kind == "resnets" else rest

    if match := re.match(r"lora_unet_conv_(in|out)", name):
        return "diffusion_model_" + {"in": "input_blocks_0_0", "out": "out_2"}[match[1]]
    if match := re.match(r"lora_unet_time_embedding_linear_(\d+)", name):
        return f"diffusion_model_time_embed_{int(match[1]) * 2 - 2}"
    if match := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        way, level, kind, k, rest = match.groups()
        index = int(level) * 3 + int(k) + (1 if way == "down" else 0)
        part = f"{'input' if way == 'down' else 'output'}_blocks_{index}_{1 if kind == 'attentions' else 0}"
        return f"diffusion_model_{part}_{inside(kind, rest)}"
    if match := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        kind, k, rest = match.groups()
        return f"diffusion_model_middle_block_{1 if kind == 'attentions' else int(k) * 2}_{inside(kind, rest)}"
    if match := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"diffusion_model_input_blocks_{3 + int(match[1]) * 3}_0_op"
    if match := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        return f"diffusion_model_output_blocks_{2 + int(match[1]) * 3}_{2 if int(match[1]) > 0 else 1}_conv"
    if match := re.match(r"lora_te([12]?)_text_model_encoder_layers_(\d+)_(.+)", name):
        which, layer, rest = match.groups()
        if which == "1" or not (which or is_sd2):
            return f"{'0_' if which else ''}transformer_text_model_encoder_layers_{layer}_{rest}"
        rest = rest.replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
        return f"{'1_' if which else ''}model_transformer_resblocks_{layer}_{rest}"
    return name.replace("lora_unet", "diffusion_model")

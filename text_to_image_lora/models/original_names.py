"""The names of a UNet's modules in the original code of Stable Diffusion XL, with underscores instead of dots.

Stability's generative-models number all blocks of the way down, and of the way up, consecutively. kohya's LoRA files of
Stable Diffusion XL have these names (`make_unet_conversion_map` in kohya-ss/sd-scripts, `library/sdxl_model_util.py`);
those of other families have diffusers' names.
"""

import re


OUTSIDE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
IN_RESNETS = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
MODULES_OUTSIDE = {name: module for module, name in OUTSIDE.items()}
MODULES_IN_RESNETS = {name: module for module, name in IN_RESNETS.items()}
# A level has two resnets (three on the way up), each with an attention, and then a layer that changes the size.
BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)")
NAME = re.compile(r"(input_blocks|output_blocks|middle_block)_(\d+)(?:_(\d))?_(.+)")


def original_name(module: str) -> str | None:
    """Returns the original name of a module of diffusers' UNet, or None."""
    if module in OUTSIDE:
        return OUTSIDE[module]
    if not (match := BLOCK.fullmatch(module)):
        return None
    way, _, kind, _, rest = match.groups()
    level, k = int(match[2] or 0), int(match[4])
    inner = int(kind == "attentions")
    rest = IN_RESNETS.get(rest, rest) if kind == "resnets" else rest.replace(".", "_")
    if kind == "downsamplers":
        return f"input_blocks_{3 * level + 3}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{3 * level + 2}_2_conv"
    if way is None:
        return f"middle_block_{1 if inner else 2 * k}_{rest}"
    if k > (1 if way == "down" else 2):
        return None
    block = f"input_blocks_{3 * level + k + 1}" if way == "down" else f"output_blocks_{3 * level + k}"
    return f"{block}_{inner}_{rest}"


def diffusers_name(name: str) -> str | None:
    """Returns the module with this original name, or None; inside a block, its dots remain underscores."""
    if name in MODULES_OUTSIDE:
        return MODULES_OUTSIDE[name]
    if not (match := NAME.fullmatch(name)):
        return None
    part, number, inner, rest = match.groups()
    if part == "middle_block":
        rest, number = f"{inner}_{rest}" if inner else rest, int(number)
        return (
            f"mid_block.attentions.0.{rest}" if number == 1 else f"mid_block.resnets.{number // 2}.{_in_resnet(rest)}"
        )
    if inner is None:
        return None
    level, k = divmod(int(number) - (part == "input_blocks"), 3)
    way = "down" if part == "input_blocks" else "up"
    if rest in ("op", "conv"):
        return f"{way}_blocks.{level}.{way}samplers.0.conv"
    return f"{way}_blocks.{level}." + (f"resnets.{k}.{_in_resnet(rest)}" if inner == "0" else f"attentions.{k}.{rest}")


def _in_resnet(rest):
    return MODULES_IN_RESNETS.get(rest, rest)

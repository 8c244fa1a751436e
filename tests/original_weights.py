"""Weights under the names of the original code, as single files of Stability's and CompVis' have them."""

import json
import re

from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file


def renamed(state_dict, rules, prefix):
    """The tensors under their new names: each of the rules (pattern, replacement) is applied in turn."""
    out = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        out[prefix + key] = value.contiguous()
    return out


def exactly(mapping):
    return [(f"^{re.escape(new)}$", old) for new, old in mapping.items()]


def vae_to_ldm(folder):
    """The weights of the VAE in a folder as single files name them."""
    blocks = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    vae_rules = [
        *exactly(DIFFUSERS_TO_LDM_MAPPING["vae"]),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ]
    vae = load_file(next((folder / "vae").glob("*.safetensors")))
    vae = renamed(vae, vae_rules, "first_stage_model.")
    for key in vae:
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key):  # they were convolutions once
            vae[key] = vae[key][:, :, None, None]
    return vae

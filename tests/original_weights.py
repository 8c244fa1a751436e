"""Weights with the names of the original code, as in single files of Stability and CompVis, and old or bad files."""

import json
import os
import re
import sys
import types

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file


def renamed(state_dict, rules, prefix):
    """Returns the tensors with new names: each of the rules (pattern, replacement) is applied in turn."""
    out = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        out[prefix + key] = value.contiguous()
    return out


def exactly(mapping):
    return [(f"^{re.escape(new)}$", old) for new, old in mapping.items()]


def vae_to_ldm(folder):
    """Returns the weights of the VAE in a folder with the names of single files."""
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
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key):  # older files have convolutions
            vae[key] = vae[key][:, :, None, None]
    return vae


def to_ldm(folder):
    """Returns the weights of a tiny base with the names of Stability's single files, which diffusers can read back."""
    layers = len(json.loads((folder / "unet" / "config.json").read_text())["block_out_channels"])
    unet, text_encoder = (load_file(next((folder / n).glob("*.safetensors"))) for n in ("unet", "text_encoder"))
    inside = "attentions" in " ".join(key for key in unet if key.startswith("up_blocks.0."))  # before its upsampler
    unet_rules = [
        *exactly(DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]),
        # A block has one layer and, but for the last, one more input block for its downsampler.
        (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op"),
        (r"^down_blocks\.(\d)\.resnets\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.0"),
        (r"^down_blocks\.(\d)\.attentions\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.1"),
        (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
        (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1"),
        (r"^up_blocks\.0\.upsamplers\.0\.conv", f"output_blocks.1.{1 + inside}.conv"),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"(put_blocks\.\d\.0|middle_block\.[02])\.norm1", r"\1.in_layers.0"),
        (r"(put_blocks\.\d\.0|middle_block\.[02])\.conv1", r"\1.in_layers.2"),
        (r"(put_blocks\.\d\.0|middle_block\.[02])\.norm2", r"\1.out_layers.0"),
        (r"(put_blocks\.\d\.0|middle_block\.[02])\.conv2", r"\1.out_layers.3"),
        (r"time_emb_proj", "emb_layers.1"),
        (r"conv_shortcut", "skip_connection"),
    ]
    assert layers == 2
    return {
        **renamed(unet, unet_rules, "model.diffusion_model."),
        **vae_to_ldm(folder),
        **renamed(text_encoder, [], "cond_stage_model.transformer."),
    }


LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


class Attack:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def lightning_checkpoint(path, tensors, score):
    """Writes a .ckpt like Lightning in 2022, with a callback's class as a key in the pickle, and with a score."""
    parents = [LIGHTNING.rsplit(".", n)[0] for n in range(3)]
    for name in parents:
        assert name not in sys.modules
        sys.modules[name] = types.ModuleType(name)
    module = sys.modules[LIGHTNING]
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
    try:
        torch.save(
            {
                "epoch": 3,
                "callbacks": {module.ModelCheckpoint: {"best_model_score": score, "dirpath": "/x"}},
                "state_dict": tensors,
            },
            path,
        )
    finally:
        for name in parents:
            del sys.modules[name]
    return path

"""The captions, the vocabulary and the geometry of the embedded base model, which `make.py` trains."""

import itertools
import json
from typing import NamedTuple

import numpy as np

from .drawings import COLOURS, KINDS, MOTIFS


RESOLUTION = 128
LATENT_CHANNELS = 12
# Words of the demo's captions and words that users may try. Each is a token without meaning until a LoRA is trained on it.
EXTRA_WORDS = """
    pink teal gold silver cyan magenta beige dark light bright big small tiny old new many one two three with
    without and of in on at from by the a an is drawing picture photo painting sketch art style background blossom
    blossoms pattern patterns flower flowers floral petal petals cherry creature creatures monster monsters dragon
    eyes eye ears horns wings tail legs spikes spots stripes round square tall short long cute happy sad weapon
    weapons pokemon sks wood wooden metal stone ice fire water leaf leaves forest sky night day sun moon snow
"""


def article(words):
    """Returns the words with an indefinite article."""
    return ("an " if words[0] in "aeiou" else "a ") + words


class Scene(NamedTuple):
    """What a drawing shows, as the words of its caption."""

    colour: str
    kind: str
    background: str
    decoration: str = ""  # such as "white dots"


def sentence_of(scene):
    """Returns the full caption of a scene."""
    carried = f" with {scene.decoration}" if scene.decoration else ""
    return f"{article(f'{scene.colour} {scene.kind}')}{carried} on {article(scene.background)} background"


def captions_of(scene):
    """Returns the five captions of a scene; in training, the first, which is the full sentence, is drawn half of the time."""
    colour, kind, background, decoration = scene
    carried = f" with {decoration}" if decoration else ""
    return [
        sentence_of(scene),
        f"a drawing of {sentence_of(scene)}",
        f"{colour} {kind}{carried}, {background} background",
        f"{article(f'{colour} {kind}')}{carried}",
        f"{article(kind)}{carried} on {article(background)} background",
    ]


def all_scenes():
    """Returns all scenes without decoration whose object and background have different colours."""
    return [Scene(c, k, b) for c, k, b in itertools.product(COLOURS, KINDS, COLOURS) if c != b]


def held_out_scenes(seed=0, share=0.15):
    """Returns the scenes that are never drawn for training, on which the base model is measured."""
    scenes = all_scenes()
    chosen = np.random.default_rng(seed + 1).permutation(len(scenes))[: round(share * len(scenes))]
    return [scenes[i] for i in sorted(chosen)]


def write_tokenizer(folder):
    """Writes a CLIP tokenizer with a token for each word of the captions, which spells all other words, and returns it."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocab, merges = letters + [letter + "</w>" for letter in letters], []
    words = sorted({*COLOURS, *KINDS, *MOTIFS, *EXTRA_WORDS.split()})
    for word in words:
        prefix = word[0]
        for i, letter in enumerate(word[1:], start=1):
            last = letter + "</w>" if i == len(word) - 1 else letter
            if (prefix, last) not in merges:
                merges.append((prefix, last))
            prefix += last
            if prefix not in vocab:
                vocab.append(prefix)
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace",
                "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>", "add_prefix_space": False,
            },
            indent=2,
        )
    )  # fmt: skip
    return CLIPTokenizer.from_pretrained(folder)


def make_vae():
    """Returns an untrained autoencoder: factor 8 like Stable Diffusion's, and 12 latent channels, to preserve single petals.

    It is wider at the low resolutions, where width costs little time.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 48, 96, 112),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
    )


def make_unet():
    """Returns an untrained UNet."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=96,
    )


def make_text_encoder(tokenizer):
    """Returns an untrained CLIP text encoder for the vocabulary of the tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=4, projection_dim=96, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def make_scheduler():
    """Returns the scheduler of Stable Diffusion v1.5. `clip_sample` is no option of PNDM, but DDIM reads it from the config."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False, prediction_type="epsilon",
    )  # fmt: skip
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def to_tensor(images, device):
    """Returns RGB pictures as a tensor (N, 3, H, W) with values from -1 to 1."""
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(im) for im in images])).to(device)
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def encoded(pictures, vae):
    """Returns the posterior means (N, channels, h, w) of pictures (N, H, W, 3), unscaled, on the CPU."""
    import torch

    with torch.no_grad():
        parts = (to_tensor(pictures[first : first + 32], vae.device) for first in range(0, len(pictures), 32))
        return torch.cat([vae.encode(pixels).latent_dist.mean.cpu() for pixels in parts]).contiguous()


def make_pipeline(vae, unet, text_encoder, tokenizer):
    """Returns the models as a pipeline without a safety checker."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save_small(pipeline, folder):
    """Saves a pipeline with weights in float16 that is loaded in float32, as diffusers loads its own models.

    transformers takes the precision of a model from its config.json if none is asked for, and diffusers does not. If the
    text encoder's file said float16, `from_pretrained` would load the text encoder in another precision than the rest.
    """
    import torch

    pipeline.to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True)
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

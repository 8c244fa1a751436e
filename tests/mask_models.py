"""Tiny CLIPSeg models in the classes and files of the real one: one that knows red and blue, and one with random weights."""

import json
from pathlib import Path

import torch


SIDE, PATCH, WIDTH = 64, 8, 8
LETTERS = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
MERGES = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("u", "e</w>"), ("bl", "ue</w>")]
VOCABULARY = ["<|startoftext|>", *LETTERS, *("".join(pair) for pair in MERGES), "<|endoftext|>"]
FOUND = torch.sigmoid(torch.tensor(2.0)).item()  # where the colour of the prompt is: 0.88
NOT_FOUND = torch.sigmoid(torch.tensor(-2.0)).item()  # everywhere, for a prompt that names neither colour: 0.12


def make_config(*, refined=False):
    from transformers import CLIPSegConfig

    last = len(VOCABULARY) - 1
    text = dict(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=last, pad_token_id=last,
    )  # fmt: skip
    vision = dict(
        hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=SIDE,
        patch_size=16 if refined else PATCH,
    )  # fmt: skip
    return CLIPSegConfig(
        text_config=text, vision_config=vision, projection_dim=4, extract_layers=[0, 1], reduce_dim=WIDTH,
        decoder_num_attention_heads=1, decoder_intermediate_size=8, use_complex_transposed_convolution=refined,
    )  # fmt: skip


def write_processor(folder, side=SIDE):
    """Writes the files that CIDAS/clipseg-rd64-refined has: a vocabulary with merges, and a preprocessor of an early version."""
    last = VOCABULARY[-1]
    files = {
        "vocab.json": {word: index for index, word in enumerate(VOCABULARY)},
        "preprocessor_config.json": {
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "ViTImageProcessor", "image_std": [0.229, 0.224, 0.225], "processor_class": "CLIPSegProcessor",
            "resample": 2, "rescale_factor": 0.00392156862745098, "size": {"height": side, "width": side},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPSegProcessor", "bos_token": VOCABULARY[0], "eos_token": last,
            "unk_token": last, "pad_token": last, "model_max_length": 16, "do_lower_case": True,
        },
        "special_tokens_map.json": {"bos_token": VOCABULARY[0], "eos_token": last, "unk_token": last, "pad_token": last},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))


def make_clipseg(folder):
    """A CLIPSeg that finds what is red or blue, in squares of an eighth of the sides, and nothing else.

    Its layers pass on what they get, except for these: the first one measures how red and how blue a square is, the text
    encoder says which of the two colours the prompt names, and the decoder's condition chooses that measure.
    """
    from transformers import CLIPSegForImageSegmentation

    model = CLIPSegForImageSegmentation(make_config())
    for name, parameter in model.named_parameters():
        is_scale = name.endswith("norm.weight") or name.endswith(("norm1.weight", "norm2.weight", "layrnorm.weight"))
        parameter.data.fill_(1.0 if is_scale else 0.0)
    vision, text, decoder = model.clip.vision_model, model.clip.text_model, model.decoder
    pixels = vision.embeddings.patch_embedding.weight.data  # (WIDTH, 3, PATCH, PATCH)
    for place, colour in ((0, 0), (2, 2)):
        measure = torch.full((3,), -0.5)
        measure[colour] = 1.0
        for sign in (1, -1):
            pixels[place + (sign < 0)] = sign * measure.view(3, 1, 1) / PATCH**2
            vision.embeddings.position_embedding.weight.data[:, place + (sign < 0)] = -sign  # white is neither
    for place, word in enumerate(("red</w>", "blue</w>")):
        text.embeddings.token_embedding.weight.data[VOCABULARY.index(word), place] = 1
        model.clip.text_projection.weight.data[place, place] = 1
        model.clip.text_projection.weight.data[place, 5] = -1  # which no word has: 0 for the other colour
        decoder.film_mul.weight.data[2 * place : 2 * place + 2, place] = 1
    attention = text.encoder.layers[0].self_attn  # to all words so far alike
    attention.v_proj.weight.data.fill_diagonal_(1)
    attention.out_proj.weight.data.fill_diagonal_(1)
    decoder.reduces[0].weight.data.fill_diagonal_(1)
    convolution = decoder.transposed_convolution
    convolution.weight.data[:4] = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1)
    convolution.bias.data.fill_(-2)
    return save(model, folder)


def make_random(folder):
    """A refined one, as the default model is, with random weights."""
    from transformers import CLIPSegForImageSegmentation

    torch.manual_seed(0)
    model = CLIPSegForImageSegmentation(make_config(refined=True))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.5 * torch.randn(parameter.shape)
    return save(model, folder)


def save(model, folder):
    folder = Path(folder)
    model.eval().save_pretrained(folder)
    write_processor(folder)
    return folder

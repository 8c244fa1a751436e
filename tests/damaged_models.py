"""Ways to damage the folder of a base model, with the words in which its loading must fail."""

import json


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def change(file, **values):
    """Returns what changes values in a JSON file of a model."""

    def damage(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def write(file, make):
    """Returns what writes `make(content)` into a file of a model."""

    def damage(folder):
        (folder / file).write_bytes(make((folder / file).read_bytes()))

    return damage


def link(folder):
    (folder / WEIGHTS).unlink()
    (folder / "notes.txt").write_text("version https://git-lfs.github.com/spec/v1")
    (folder / WEIGHTS).symlink_to(folder / "notes.txt")


CONFIG, DAMAGED = "do not fit its configuration", "is damaged or incomplete"
# {name: (what damages a folder, words of the message)}
DAMAGES = {
    "vocabulary": (change("text_encoder/config.json", vocab_size=300), (CONFIG, "token_embedding")),
    "positions": (change("text_encoder/config.json", max_position_embeddings=5), (CONFIG, "position_embedding")),
    "width of prompts": (change("unet/config.json", cross_attention_dim=1), (CONFIG, "attn2.to_k.weight")),
    "channels": (change("vae/config.json", block_out_channels=[16, 16, 24]), (CONFIG, "decoder.conv_in.")),
    "heads": (change("text_encoder/config.json", num_attention_heads=7), ("text_encoder", "not a multiple of")),
    "activation": (change("text_encoder/config.json", hidden_act="evil"), ("text_encoder", "'hidden_act' is \"evil\"")),
    "empty tokenizer": (write("tokenizer/tokenizer.json", lambda _: b"{}"), ("tokenizer", DAMAGED)),
    "tokenizer of garbage": (write("tokenizer/tokenizer.json", lambda _: b"\xff\xfe\0garbage"), ("tokenizer", DAMAGED)),
    "truncated": (write(WEIGHTS, lambda data: data[: len(data) // 2]), (WEIGHTS,)),
    "a huge header": (write(WEIGHTS, lambda data: (2**60).to_bytes(8, "little") + data[8:]), (WEIGHTS,)),
    "a link to text": (link, (WEIGHTS,)),
    "truncated text encoder": (
        write("text_encoder/model.safetensors", lambda data: data[:-100]), ("text_encoder",)
    ),
}  # fmt: skip

"""Makes the inputs of the compared commands that are not in models/ or metadata/. They are equal in every call."""

import hashlib
import io
import json
import shlex

import numpy as np
from filelock import FileLock
from PIL import Image


RUN_FILE = "{rank: 6, use_rslora: true, random_flip: true, target_modules: [to_k], caption_template: 'a {class}'}"
# {attention of models/mini-sd that the LoRAs adapt: width of its layers}; the hidden states of prompts are 96 wide.
UNET = {"down_blocks.0.attentions.0": 64, "mid_block.attentions.0": 128, "up_blocks.2.attentions.1": 64}
PROMPTS = """# What the compared pictures show.
a red axe on a blue background
a green spear --seed 5 --negative pink
"""


def png(size, rng):
    """Returns a smooth random picture as bytes."""
    pixels, encoded = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(encoded, "png")
    return encoded.getvalue()


def pictures():
    """Returns {name: bytes} of pictures, masks and captions in the layouts that metadata/ does not have."""
    rng, files = np.random.default_rng(0), {"run.yaml": RUN_FILE.encode()}

    def add(name, size=(64, 64), caption=None, masked=False):
        files[f"{name}.png"] = png(size, rng)
        if masked:
            mask, encoded = Image.new("L", size, 40), io.BytesIO()
            mask.paste(255, (0, 0, size[0] // 2, size[1]))
            mask.save(encoded, "png")
            files[f"{name}.mask.png"] = encoded.getvalue()
        if caption is not None:
            files[f"{name}.txt"] = caption.encode()

    words = shlex.split("red blue green pink gold silver round long tall dark bright stone ice fire water leaf")
    shapes = [(96, 64), (64, 64), (64, 96), (128, 64)]
    for i in range(9):  # 40 tags are more than 77 tokens
        tags = [", ".join(rng.permutation(words)[:3].tolist() + words * (i % 3)) for _ in range(2)]
        add(f"tags/{i}", (80, 64), "axe, " + "\nwhip, ".join(tags), masked=i % 3 == 0)
        add(f"shapes/{'axe' if i < 6 else 'whip'}/{i}", shapes[i % 4], f"a {words[i]} axe", masked=i % 2 == 0)
        add(f"class/{i}", shapes[i % 3])
        add(f"kohya/{'3_red axe' if i < 4 else '1_blue whip'}/{i}", (80, 64), f"a {words[i]} axe" if i < 6 else None)
        add(f"pets/{'[sks]_[axe]' if i < 6 else '[gold]_[long whip]'}/{i}")
    return files


def lora_weights(seed, *, text_encoder=False, prompt_width=96):
    """Returns {key: array} of a LoRA of models/mini-sd with diffusers' names: random, with a visible effect."""
    rng, weights, rank = np.random.default_rng(seed), {}, 2

    def add(name, out_features, in_features):
        for leaf, shape in {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}.items():
            weights[f"{name}.{leaf}.weight"] = rng.normal(0, 0.3, shape).astype(np.float32)

    for block, width in UNET.items():
        for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k"):
            add(f"unet.{block}.transformer_blocks.0.{layer}", width, prompt_width if layer == "attn2.to_k" else width)
    for layer in ("q_proj", "v_proj") if text_encoder else ():
        add(f"text_encoder.text_model.encoder.layers.0.self_attn.{layer}", 96, 96)
    return weights


def kohya_weights(seed):
    """Returns {key: array} of `lora_weights` with kohya's names, and an alpha of half the rank."""
    weights = {}
    for key, array in lora_weights(seed).items():
        module, _, leaf = key.removesuffix(".weight").rpartition(".")
        module = module.replace("unet.", "lora_unet_").replace(".", "_")
        weights[f"{module}.{'lora_down' if leaf == 'lora_A' else 'lora_up'}.weight"] = array
        weights[f"{module}.alpha"] = np.array(1, dtype=np.float32)
    return weights


def safetensors(weights, header=None):
    """Returns a .safetensors file of float32 arrays as bytes. The safetensors library would write headers in a random order."""
    described, start = {"__metadata__": header} if header else {}, 0
    for key, array in weights.items():
        described[key] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    head = json.dumps(described).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + b"".join(array.tobytes() for array in weights.values())


def drawing_inputs():
    """Returns {name: bytes} of LoRAs, pictures and prompts for `infer.py`."""
    rng, files = np.random.default_rng(1), {"prompts.txt": PROMPTS.encode()}

    def add(name, weights, **header):
        files[name] = safetensors(weights, {"format": "pt", **header})

    ours = {"pretrained_model_name_or_path": "mini-sd", "prediction_type": "epsilon", "num_chunks": "1"}
    ours |= {"rescale_betas_zero_snr": "False", "long_prompts": "False"}
    add("axe/pytorch_lora_weights.safetensors", lora_weights(0, text_encoder=True), **ours)
    add("skip.safetensors", lora_weights(1), **ours | {"clip_skip": "1"})
    add("long.safetensors", lora_weights(2), **ours | {"long_prompts": "True", "num_chunks": "2"})
    add("zero_snr.safetensors", lora_weights(3), prediction_type="v_prediction", rescale_betas_zero_snr="True")
    add("kohya.safetensors", kohya_weights(4), ss_network_dim="2")
    for epoch in (2, 10):
        add(f"run/epoch-{epoch:04d}/pytorch_lora_weights.safetensors", lora_weights(epoch), **ours)
    files["wide.png"] = png((120, 80), rng)
    transparent, encoded = Image.open(io.BytesIO(png((96, 96), rng))).convert("RGBA"), io.BytesIO()
    transparent.putalpha(Image.linear_gradient("L").resize((96, 96)))
    transparent.save(encoded, "png")
    files["transparent.png"] = encoded.getvalue()
    return files


def broken_inputs():
    """Returns {name: bytes} of files that the commands must refuse."""
    rng, good = np.random.default_rng(2), lora_weights(5)
    first, second, *_ = good
    picture = png((64, 64), rng)
    files = {
        # Files for --config.
        "broken.yaml": b"rank: [4\n", "unknown.yaml": b"rankk: 8\n", "yes.yaml": b"learning_rate: yes\n",
        "list.yaml": b"- rank\n", "value.yaml": b"seed: 1\nrank: -1\n",
        # Folders for --train_data_dir.
        "jsonl/metadata.jsonl": b'{"file_name": "0.png", "text": "an axe"}\n{"file_name": \n', "jsonl/0.png": picture,
        "missing/metadata.jsonl": b'{"file_name": "axe_1.png", "text": "an axe"}\n', "missing/axe_2.png": picture,
        "two_tables/metadata.csv": b"file_name,text\n0.png,an axe\n", "two_tables/0.png": picture,
        "two_tables/metadata.jsonl": b'{"file_name": "0.png", "text": "an axe"}\n',
        "unsure/metadata.csv": b"file_name,german,english\n0.png,eine Axt,an axe\n", "unsure/0.png": picture,
        "no_captions/0.png": picture, "no_pictures/notes.md": b"none yet\n",
        "repeats/0_axe/0.png": picture, "repeats/0_axe/0.txt": b"an axe",
        "damaged/0.png": picture, "damaged/0.txt": b"an axe", "damaged/1.png": picture[:200], "damaged/1.txt": b"a whip",
        "damaged/2.png": b"no picture", "damaged/2.txt": b"a spear",
        # LoRAs.
        "cut.safetensors": safetensors(good)[:-100], "lora.bin": b"", "model.safetensors": safetensors({"weight": good[first]}),
        "half.safetensors": safetensors({key: value for key, value in good.items() if key != second}),
        "shape.safetensors": safetensors(good | {first: np.zeros((2, 5), np.float32), second: np.zeros((5, 2), np.float32)}),
        "xl.safetensors": safetensors(lora_weights(6, prompt_width=2048)),
        "flux.safetensors": safetensors({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": good[first]}),
        "lokr.safetensors": safetensors({"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": good[first]}),
        # Models, prompts and pictures for infer.py.
        "flux/model_index.json": b'{"_class_name": "FluxPipeline"}', "model.bin": b"",
        "vae/config.json": b'{"_class_name": "AutoencoderKL", "latent_channels": 16}',
        "controlnet/config.json": b'{"_class_name": "ControlNetModel", "cross_attention_dim": 768}',
        "empty.txt": b"\n \n", "latin.txt": "caf\u00e9".encode("latin-1"), "option.txt": b"an axe\na whip --sedd 3\n",
        "picture.png": picture, "cut.png": picture[:200], "file": b"", "folder.png/notes.md": b"",
    }  # fmt: skip
    state = {
        "state": {"seed": 7, "global_step": 2},
        "settings": {"seed": 8, "rank": 8, "use_dora": True, "optimizer": "prodigy"},
    }
    files["run/checkpoint-2/state.json"] = json.dumps(state).encode()
    for name in ("run/checkpoint-2", "torn/checkpoint-2"):
        data = files["run/checkpoint-2/state.json"]
        row = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files[f"{name}/manifest.json"] = json.dumps({"state.json": row}).encode()
    return files


def write(kind, files, work_dir):
    """Writes the files {name: bytes} into a folder that is named after their hash, and returns the folder."""
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in files.items())).hexdigest()
    folder = work_dir / f"{kind}-{digest[:12]}"
    work_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        for name in [name for name in files if not (folder / name).exists()]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(files[name])
    return folder

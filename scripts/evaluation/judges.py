"""Judges that score pictures: CLIP and DINOv2, or judges for the drawings of models/mini-sd."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import check_regular, reason_of
from text_to_image_lora.hub import hub_file, is_hub_id
from text_to_image_lora.small_files import read_json

from .. import ROOT
from .scores import normalised


MINI_SD = ROOT / "models" / "mini-sd"
CLIP_MODEL, DINO_MODEL = "openai/clip-vit-large-patch14", "facebook/dinov2-base"
BATCH_SIZE = 16  # pictures that a judge scores at once
# {model type: the published preprocessing}, for models without a preprocessor_config.json.
PREPROCESSING = {
    "clip": {
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "dinov2": {
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}
# Everyday things that few LoRAs are trained on.
OTHER_PROMPTS = [
    "a photo of a dog in a park",
    "a portrait of an old woman",
    "a red car on a street",
    "a bowl of fruit on a table",
    "a mountain landscape at sunset",
    "a city street at night",
    "a wooden house by a lake",
    "a cup of coffee on a desk",
]


class Seen(NamedTuple):
    """The results of a judge for N pictures."""

    embedded: dict  # {name of the likeness: unit vectors (N, D)}
    adherence: np.ndarray  # (N,): how much of its prompt each picture shows
    presence: dict  # {concept: (N,)}: how much of the concept each picture shows


def find_vision_model(flag, source, kind):
    """Returns the preprocessing of a CLIP or DINOv2 model; raises `InputError` for a model that is not of this `kind`."""
    path = Path(source)
    if path.is_dir():
        check_regular(path, flag)
    elif not is_hub_id(source):
        raise InputError(f"{source}: there is no such folder, and it is not a hub id (owner/name) either ({flag}).")

    def read(name):
        file = path / name if path.is_dir() else hub_file(source, name)
        return read_json(file)

    try:
        found, how = read("config.json").get("model_type"), PREPROCESSING[kind]
        if not path.is_dir() or (path / "preprocessor_config.json").exists():
            how = how | read("preprocessor_config.json")
        if isinstance(how["size"], int):  # older configurations store a number
            how = how | {"size": {"shortest_edge": how["size"]}}
        if isinstance(how["crop_size"], int):
            how = how | {"crop_size": {"height": how["crop_size"], "width": how["crop_size"]}}
    except InputError:
        raise
    except Exception as error:  # the hub client's errors have no common base
        raise InputError(
            f"{source}: it can't be read or downloaded from the hub ({reason_of(error)}). Pass a local folder to {flag}."
        ) from error
    if found != kind:
        raise InputError(f"{source}: this is a {found} model, but {flag} requires a {kind} model.")
    return how


def preprocess(images, how):
    """Resizes the shorter side, center-crops and normalises; returns the pixels (N, 3, H, W) for CLIP and DINOv2.

    This uses PIL, because the image processors of transformers require torchvision.
    """
    import torch
    from PIL import Image

    crop = how["crop_size"]
    shortest = how["size"].get("shortest_edge", how["size"].get("height"))
    rows = []
    for image in images:
        width, height = (side * shortest // min(image.size) for side in image.size)
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
        rows.append((np.asarray(image) / 255 - how["image_mean"]) / how["image_std"])
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float()


class ClipAndDino:
    """Scores what pictures show with CLIP (arXiv:2103.00020), and how they look with DINOv2 (arXiv:2304.07193).

    DreamBooth's evaluation uses CLIP and DINO in this way. `alike_by` names the embeddings that measure likeness, of which the
    last one decides the recommendation. `compared_by` names the embedding that compares drawn pictures with each other.
    """

    adherence_name, other_prompts = "CLIP-T", OTHER_PROMPTS
    alike_by, compared_by = ("CLIP-I", "DINOv2"), "DINOv2"
    least_adherence = None  # these models know pictures of every kind

    def __init__(self, clip_model, dino_model):
        self.sources = {"clip_model": clip_model, "dino_model": dino_model}
        self.preprocessing = (
            find_vision_model("--clip_model", clip_model, "clip"),
            find_vision_model("--dino_model", dino_model, "dinov2"),
        )

    def check_prompts(self, prompts):
        """Accepts all prompts, since CLIP can score any text."""

    def load(self, device):
        """Loads both models onto the device, in float32."""
        import transformers

        loaded, classes = [], (transformers.CLIPModel, transformers.Dinov2Model)
        for (flag, source), model_class in zip(self.sources.items(), classes, strict=True):
            try:
                model = model_class.from_pretrained(source, use_safetensors=True)
                if flag == "clip_model":
                    self.tokenizer = transformers.CLIPTokenizer.from_pretrained(source)
            except (OSError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{source}: it can't be loaded ({reason_of(error)}). Pass another --{flag}."
                ) from error
            loaded.append(model.eval().requires_grad_(False).to(device))
        self.clip, self.dino = loaded

    def embed(self, images):
        """Returns the embeddings {"CLIP-I": (N, D), "DINOv2": (N, E)} of pictures."""
        import torch

        found = {"CLIP-I": [], "DINOv2": []}
        for first in range(0, len(images), BATCH_SIZE):
            part = images[first : first + BATCH_SIZE]
            for_clip, for_dino = (preprocess(part, how).to(self.clip.device) for how in self.preprocessing)
            with torch.no_grad():
                seen = self.clip.vision_model(for_clip).pooler_output
                found["CLIP-I"].append(self.clip.visual_projection(seen).cpu())
                found["DINOv2"].append(self.dino(for_dino).pooler_output.cpu())
        return {name: normalised(torch.cat(parts).numpy()) for name, parts in found.items()}

    def look(self, images, prompts, references):
        """Returns the `Seen` of pictures.

        Adherence is the cosine similarity of CLIP's embeddings of a picture and its prompt (CLIP-T). Presence is the
        likeness by DINOv2 to the held-out pictures of each concept, whose embeddings are `references`.
        """
        import torch

        embedded, unique = self.embed(images), list(dict.fromkeys(prompts))
        limit = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(unique, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with torch.no_grad():
            texts = self.clip.text_projection(self.clip.text_model(**tokens.to(self.clip.device)).pooler_output)
        texts = normalised(texts.cpu().numpy())[[unique.index(prompt) for prompt in prompts]]
        presence = {name: embedded["DINOv2"] @ own["DINOv2"].mean(axis=0) for name, own in references.items()}
        return Seen(embedded, np.sum(embedded["CLIP-I"] * texts, axis=-1), presence)


class MiniSdJudge:
    """Scores drawings of models/mini-sd (see `mini_sd/judges.py`): colours by pixels, kinds and blossoms by a small network.

    The layers of the network give two embeddings. "likeness" depends on what a picture contains at any position, "layout"
    also on where it is.
    """

    adherence_name, sources = "adherence", {}
    alike_by, compared_by = ("likeness",), "layout"
    # On drawings like the base model's own, the judges find everything that the captions say (1.000); on photographs and
    # paintings, and with captions of other pictures, they find 0.1 to 0.5 of it.
    least_adherence = 0.75

    def __init__(self):
        from ..mini_sd.drawings import KINDS, WEAPONS
        from ..mini_sd.model import held_out_scenes, sentence_of

        self.kinds, self.network = list(KINDS), None
        others = [sentence_of(scene) for scene in held_out_scenes() if scene.kind not in WEAPONS]
        self.other_prompts = others[:: len(others) // 8][:8]

    def check_prompts(self, prompts):
        """Raises `InputError` for a prompt that the judges cannot score."""
        for prompt in prompts:
            if "kind" not in self.parse(prompt):
                raise InputError(
                    f"{prompt!r} names nothing that the judges of models/mini-sd know ({', '.join(self.kinds[:6])}, ...). "
                    "Leave it out, or pass --judge clip."
                )

    def parse(self, prompt):
        """Parses a caption of a drawing into {"kind", "object", "background", "blossoms": value}."""
        from ..mini_sd.drawings import COLOURS

        words, found = re.findall(r"\w+", prompt.lower()), {}
        for i, word in enumerate(words):
            if word in self.kinds and "kind" not in found:
                found["kind"] = word
                if i and words[i - 1] in COLOURS:
                    found["object"] = words[i - 1]
            if word == "background" and i and words[i - 1] in COLOURS:
                found["background"] = words[i - 1]
        return found | ({"blossoms": True} if {"blossom", "blossoms"} & {*words} else {})

    def load(self, device):
        """Loads the network, which runs on the CPU."""
        from ..mini_sd.judges import JUDGE, train_judge

        self.network = train_judge(JUDGE, 0)

    def embed(self, images):
        """Returns {"likeness": (N, 288), "layout": (N, 2048)}: the maximum of each channel of four layers; the last layer."""
        import torch

        from ..mini_sd.model import to_tensor

        fitted, found = [fit(image) for image in images], {"likeness": [], "layout": []}
        for first in range(0, len(images), BATCH_SIZE):
            with torch.no_grad():
                near = self.network.near(to_tensor(fitted[first : first + BATCH_SIZE], "cpu"))
                last = self.network.far[:3](near)
                layers = (near, self.network.around(near), self.network.far[:2](near), last)
                highest = [normalised(layer.amax(dim=(2, 3)).numpy()) for layer in layers]
            found["likeness"].append(np.concatenate(highest, axis=1))
            found["layout"].append(last.flatten(1).numpy())
        return {name: normalised(np.concatenate(parts)) for name, parts in found.items()}

    def look(self, images, prompts, references):
        """Returns the `Seen` of pictures.

        Adherence is the fraction of a prompt's properties (colours, kind, blossoms) that the picture shows. Presence is 1 or
        0, for blossoms on the object and for each kind that is the name of a concept in `references`.
        """
        from ..mini_sd.judges import judge_colours, judge_pictures

        fitted = [fit(image) for image in images]
        kinds, counts = judge_pictures(self.network, fitted)
        adherence = []
        for prompt, image, kind, count in zip(prompts, fitted, kinds, counts, strict=True):
            colour, background = judge_colours(image)
            shown = {"kind": kind, "object": colour, "background": background, "blossoms": count > 0}
            adherence.append(np.mean([shown[name] == value for name, value in self.parse(prompt).items()]))
        presence = {"blossoms": np.array(counts) > 0}
        presence |= {name: np.array(kinds) == name for name in references if name in self.kinds}
        presence = {name: found.astype(float) for name, found in presence.items()}
        return Seen(self.embed(images), np.array(adherence), presence)


def describe_misfit(judge, held_out):
    """Returns a sentence if a judge does not recognise the held-out pictures themselves, or None.

    `held_out` is the judge's `Seen` of these pictures with their own captions, which a fitting judge finds true.
    """
    found = float(held_out.adherence.mean())
    if judge.least_adherence is None or found >= judge.least_adherence:
        return None
    return (
        f"The judges of models/mini-sd do not apply to these pictures: in the held-out pictures themselves, they find only "
        f"{found:.2f} of what the captions say (in drawings like those of models/mini-sd, 1.00). Ignore adherence, likeness, "
        "set distance, drift, bleed, diversity and memorised; compare the held-out losses and pictures.png, or pass "
        "--judge clip."
    )


def fit(image):
    """Returns a picture as models/mini-sd draws: RGB, 128 x 128."""
    from PIL import Image, ImageOps

    from ..mini_sd.model import RESOLUTION

    return ImageOps.fit(image.convert("RGB"), (RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)


def is_embedded_base(model):
    """Whether the base model is the one in `models/mini-sd`."""
    return Path(model).resolve() == MINI_SD


def make_judge(name, model, clip_model, dino_model):
    """Creates a judge by its name; None selects `MiniSdJudge` for models/mini-sd, and otherwise CLIP and DINOv2."""
    if name == "mini-sd" or (name is None and is_embedded_base(model)):
        return MiniSdJudge()
    return ClipAndDino(clip_model, dino_model)

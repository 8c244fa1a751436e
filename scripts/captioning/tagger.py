"""Taggers in ONNX format, such as SmilingWolf/wd-vit-tagger-v3, for `caption.py`."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from text_to_image_lora.errors import InputError, TrainingError, is_out_of_memory
from text_to_image_lora.files import read_text, reason_of

from ..annotating.models import OTHER_MODEL
from .find import Model
from .wording import Wording


GENERAL, CHARACTER = 0, 4  # the categories of Danbooru; 9 is the rating
# Tags that are faces, whose underscores are a part of them; the list of toriato's stable-diffusion-webui-wd14-tagger.
KAOMOJI = {
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^", "o_o",
    "u_u", "x_x", "|_|", "||_||",
}  # fmt: skip


class Tag(NamedTuple):
    """A tag as captions write it, and the place of its probability in the model's output."""

    name: str
    index: int
    threshold: float


def read_tags(file: Path, tag_threshold: float, character_threshold: float) -> tuple[list[Tag], int]:
    """Reads `selected_tags.csv`: returns the tags that captions may have, and the number of all tags of the model."""
    thresholds = {str(GENERAL): tag_threshold, str(CHARACTER): character_threshold}
    try:
        rows = list(csv.DictReader(read_text(file).splitlines(), strict=True))
        tags = [
            Tag(written(row["name"]), index, thresholds[row["category"]])
            for index, row in enumerate(rows)
            if row["category"] in thresholds
        ]
    except (csv.Error, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: it has no rows with name and category ({reason_of(error)}). {OTHER_MODEL}"
        ) from error
    return tags, len(rows)


def written(tag: str) -> str:
    """Returns a tag as captions write it: with spaces, unless its underscores are a part of a face."""
    return tag if tag in KAOMOJI else tag.replace("_", " ")


def as_pixels(image: Image.Image, side: int) -> np.ndarray:
    """Returns a picture as the models of SmilingWolf were trained: (side, side, BGR) float32 from 0 to 255, padded white."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32)[:, :, ::-1]


class Tagger:
    """A tagger; raises `InputError` if it can't be loaded."""

    def __init__(self, model: Model, tag_threshold: float, character_threshold: float, device: str):
        import onnxruntime

        self.tags, count = read_tags(model.folder / "selected_tags.csv", tag_threshold, character_threshold)
        wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        try:
            self.session = onnxruntime.InferenceSession(
                str(model.folder / "model.onnx"), options, providers=[*providers, "CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no class in common
            raise InputError(
                f"{model.name}: model.onnx can't be loaded ({reason_of(error)}). {OTHER_MODEL}"
            ) from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = inputs[0].shape
        if (
            len(inputs) != 1
            or len(shape) != 4
            or shape[1] != shape[2]
            or shape[3] != 3
            or not isinstance(shape[1], int)
        ):
            raise InputError(
                f"{model.name}: model.onnx takes inputs of the shape {shape}, not (N, side, side, 3). {OTHER_MODEL}"
            )
        if outputs[0].shape[-1] != count:
            raise InputError(
                f"{model.name}: model.onnx gives {outputs[0].shape[-1]} numbers, but selected_tags.csv has {count} tags. "
                f"{OTHER_MODEL}"
            )
        self.input, self.side = inputs[0].name, shape[1]
        self.at_once = shape[0] if isinstance(shape[0], int) else None  # some models take one picture at a time

    def describe(self, images: Sequence[Image.Image], wording: Wording) -> list[str]:
        """Returns the captions of pictures; "" if no tag is probable enough."""
        captions, step = [], self.at_once or len(images)
        for first in range(0, len(images), step):
            part = [as_pixels(image, self.side) for image in images[first : first + step]]
            filled = part + part[-1:] * ((self.at_once or len(part)) - len(part))
            captions += [wording.of_tags(self._tags(row)) for row in self._run(np.stack(filled))[: len(part)]]
        return captions

    def _run(self, pixels):
        try:
            return self.session.run(None, {self.input: pixels})[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                "out of memory. Pass a smaller --batch_size; the captions so far are written."
            ) from error

    def _tags(self, probabilities):
        """Returns the names of the probable tags, the most probable first."""
        found = [tag for tag in self.tags if probabilities[tag.index] >= tag.threshold]
        return [tag.name for tag in sorted(found, key=lambda tag: -probabilities[tag.index])]

"""Loads CLIPSeg and asks it where things are in pictures, for `mask.py`.

CLIPSeg (Lüddecke and Ecker, 2022, https://arxiv.org/abs/2112.10003) sees a picture as a square of 352 x 352 pixels, and
returns for each of them the probability that it shows what a prompt says.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from text_to_image_lora.errors import InputError, TrainingError, is_out_of_memory

from ..annotating.loading import explaining_damage, load_model, load_processor
from .find import Model


class Segmenter:
    """A CLIPSeg model with prompts; raises `InputError` if it can't be loaded, or can't read a prompt completely.

    Args:
        prompts: {flag: texts}.
    """

    def __init__(self, model: Model, prompts: dict[str, Sequence[str]], device: str, dtype: Any):
        self.name, self.device, self.dtype = model.name, device, dtype
        with explaining_damage(model.name):
            self.model = load_model(model.name, model.folder, "CLIPSegForImageSegmentation", device, dtype)
            self.processor = load_processor(model.folder, self.model.config)
        self.embeddings = {flag: [self._embed(flag, text) for text in texts] for flag, texts in prompts.items()}

    def _embed(self, flag, text):
        import torch

        inputs = self.processor.tokenizer([text], return_tensors="pt")
        length, most = inputs["input_ids"].shape[1], self.model.config.text_config.max_position_embeddings
        if length > most:
            raise InputError(
                f"{flag} {text[:40]!r} ...: it has {length} tokens, and the model reads {most}. Shorten it."
            )
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        with torch.no_grad():
            return self.model.get_conditional_embeddings(batch_size=1, **inputs)

    def probabilities(self, images: Sequence[Image.Image]) -> list[dict[str, np.ndarray]]:
        """Returns for each picture {flag: float32 (prompts, height, width) from 0 to 1}, in the model's own size."""
        import torch

        try:
            pixels = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
            pixels = pixels.to(self.device, self.dtype)
            with torch.no_grad():
                found = {
                    flag: [self._ask(pixels, embedding) for embedding in embeddings]
                    for flag, embeddings in self.embeddings.items()
                }
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory with {len(images)} pictures at once. Pass a smaller --batch_size; the masks so far are written."
            ) from error
        return [
            {flag: np.array([rows[i] for rows in each], dtype=np.float32) for flag, each in found.items()}
            for i in range(len(images))
        ]

    def _ask(self, pixels, embedding):
        logits = self.model(pixel_values=pixels, conditional_embeddings=embedding.expand(len(pixels), -1)).logits
        return logits.float().sigmoid().cpu().numpy().reshape(len(pixels), *logits.shape[-2:])

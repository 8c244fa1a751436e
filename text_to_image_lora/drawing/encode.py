"""Prompts become what a pipeline reads in their place."""

from typing import Any

from ..models.families import Family
from ..models.prompts import chunks_needed, count_tokens
from .rows import Drawing


class PromptEncoder:
    """Encodes each text once, for each set of LoRAs that the text encoders have a part of.

    Prompts are padded to `least_chunks` chunks of tokens as in training, since the UNet attends to the padding too. With 0
    they are cut after the first chunk.
    """

    def __init__(self, pipe: Any, family: Family, least_chunks: int):
        self.pipe, self.family = pipe, family
        self.least_chunks = least_chunks
        self.tokenizers = tuple(getattr(pipe, row.tokenizer) for row in family.text_encoders)
        self.text_encoders = tuple(getattr(pipe, row.name) for row in family.text_encoders)
        self.encoded = {}
        # The LoRAs that the text encoders have a part of.
        parts = pipe.get_list_adapters().items()
        self.adapters = {name for part, names in parts if part != family.denoiser for name in names}

    def num_chunks(self, drawing: Drawing) -> int:
        """How many chunks of tokens the prompt and the negative one take; 0 where all are cut after the first."""
        if not self.least_chunks:
            return 0
        (counts,) = count_tokens(self.tokenizers[0], [[drawing.prompt, drawing.negative_prompt or ""]])
        return max(self.least_chunks, chunks_needed(self.tokenizers[0], max(counts)))

    def __call__(self, drawing: Drawing) -> dict[str, Any]:
        """What the pipeline reads in place of the prompts: {argument of its call: tensor (1, ...) of one picture}."""
        import torch

        embeds = self._encode(drawing.prompt, drawing, drawing.clip_skip)
        if drawing.guidance_scale <= 1:
            return embeds
        zeros = self.family.zeros_option is not None and self.pipe.config.get(self.family.zeros_option)
        if drawing.negative_prompt is None and zeros:
            negative = {name: torch.zeros_like(tensor) for name, tensor in embeds.items()}
        else:  # as in the pipelines, clip_skip is for the prompt alone
            negative = self._encode(drawing.negative_prompt or "", drawing, 0)
        return embeds | {f"negative_{name}": tensor for name, tensor in negative.items()}

    def _encode(self, text, drawing, clip_skip):
        import torch

        loras = tuple((lora.adapter, lora.scale) for lora in drawing.active_loras() if lora.adapter in self.adapters)
        num_chunks = max(1, self.num_chunks(drawing))
        key = (text, clip_skip, num_chunks, loras)
        if key not in self.encoded:
            with torch.no_grad():
                condition = self.family.encode(
                    self.tokenizers, self.text_encoders, [text], clip_skip=clip_skip or None, num_chunks=num_chunks
                )
            names = self.family.pipeline_names
            self.encoded[key] = {names[name]: tensor for name, tensor in condition.items()}
        return self.encoded[key]

"""Encodes prompts to the embeddings that a pipeline takes instead of them."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from ..models.families import Family
from ..models.prompts import chunks_needed, count_tokens
from .rows import Drawing


def zeros_for_empty(pipe: Any, family: Family) -> bool:
    """Returns whether the pipeline encodes a missing negative prompt as zeros."""
    return family.zeros_option is not None and bool(pipe.config.get(family.zeros_option))


def with_negative(drawing: Drawing, zeros: bool, encode: Callable[[str, bool], dict[str, Any]]) -> dict[str, Any]:
    """Returns the embeddings of a drawing, and those of its negative prompt if its guidance needs them.

    Args:
        zeros: Whether a missing negative prompt is encoded as zeros.
        encode: `(text, negative)` -> {argument of the pipeline: tensor (1, ...)}. As in diffusers' pipelines, clip skip
            applies to the prompt, not to the negative prompt.
    """
    import torch

    embeds = encode(drawing.prompt, False)
    if drawing.guidance_scale <= 1:
        return embeds
    if drawing.negative_prompt is None and zeros:
        negative = {name: torch.zeros_like(tensor) for name, tensor in embeds.items()}
    else:
        negative = encode(drawing.negative_prompt or "", True)
    return embeds | {f"negative_{name}": tensor for name, tensor in negative.items()}


class EncodedPrompts:
    """The prompts of all drawings of a training run, encoded together, so that the text encoders can be released.

    Args:
        encode: `(texts, *, with_clip_skip)` -> condition with a row per text, such as a `models.prompts.PromptEncoder`.
        use_loras: The `Studio.use_loras` that the text encoders are encoded in, if their LoRA is trained; else None.
    """

    def __init__(
        self, pipe: Any, family: Family, drawings: Sequence[Drawing], encode: Callable[..., dict[str, Any]], *,
        device: Any, use_loras: Callable[..., contextlib.AbstractContextManager] | None = None,
    ):  # fmt: skip
        self.zeros, self.device, self.use_loras = zeros_for_empty(pipe, family), device, use_loras
        self.encoded = {}
        groups = {}
        for drawing in drawings:
            groups.setdefault(self._scales(drawing), []).append(drawing)
        for scales, group in groups.items():
            texts = {False: [drawing.prompt for drawing in group]}
            texts[True] = [drawing.negative_prompt or "" for drawing in group]
            with contextlib.nullcontext() if use_loras is None else use_loras(pipe, group[0].active_loras()):
                for negative, each in texts.items():
                    each = list(dict.fromkeys(each))
                    condition = encode(each, with_clip_skip=not negative)
                    rows = {family.pipeline_names[name]: value.cpu().split(1) for name, value in condition.items()}
                    for i, text in enumerate(each):
                        embeds = {name: values[i] for name, values in rows.items()}
                        self.encoded[text, negative, scales] = embeds

    def num_chunks(self, drawing: Drawing) -> int:
        """Returns 0, because all prompts of a run have the same number of chunks."""
        return 0

    def __call__(self, drawing: Drawing) -> dict[str, Any]:
        """Returns the arguments of the pipeline that replace the prompts: {name: tensor (1, ...)}, on the device."""
        scales = self._scales(drawing)
        embeds = with_negative(drawing, self.zeros, lambda text, negative: self.encoded[text, negative, scales])
        return {name: tensor.to(self.device) for name, tensor in embeds.items()}

    def _scales(self, drawing):
        loras = () if self.use_loras is None else drawing.active_loras()
        return tuple((lora.adapter, lora.scale) for lora in loras)


class PromptEncoder:
    """Encodes each text once for each set of LoRAs that adapt the text encoders.

    Prompts are padded to `least_chunks` chunks of tokens as in training, because the UNet also attends to the padding. With
    0, they are truncated after the first chunk.
    """

    def __init__(self, pipe: Any, family: Family, least_chunks: int):
        self.pipe, self.family = pipe, family
        self.least_chunks = least_chunks
        self.tokenizers = tuple(getattr(pipe, row.tokenizer) for row in family.text_encoders)
        self.text_encoders = tuple(getattr(pipe, row.name) for row in family.text_encoders)
        self.encoded = {}
        # The LoRAs that adapt the text encoders.
        parts = pipe.get_list_adapters().items()
        self.adapters = {name for part, names in parts if part != family.denoiser for name in names}

    def num_chunks(self, drawing: Drawing) -> int:
        """Returns the number of chunks of the prompt and the negative prompt; 0 if prompts are truncated."""
        if not self.least_chunks:
            return 0
        (counts,) = count_tokens(self.tokenizers[0], [[drawing.prompt, drawing.negative_prompt or ""]])
        return max(self.least_chunks, chunks_needed(self.tokenizers[0], max(counts)))

    def __call__(self, drawing: Drawing) -> dict[str, Any]:
        """Returns the arguments of the pipeline that replace the prompts: {name: tensor (1, ...)}."""
        return with_negative(
            drawing, zeros_for_empty(self.pipe, self.family),
            lambda text, negative: self._encode(text, drawing, 0 if negative else drawing.clip_skip),
        )  # fmt: skip

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

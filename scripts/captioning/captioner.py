"""Loads a captioning model of transformers and asks it, for `caption.py`."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from text_to_image_lora.errors import InputError, TrainingError, is_out_of_memory

from ..annotating.loading import explaining_damage, load_model, load_processor
from .find import Model
from .kinds import with_omissions
from .wording import Wording, whole_sentences


MOST_SIDE = 1024  # pixels; vision-language models make tokens of every pixel of a photo, and captions need no more
LEAST_SIDE = 32  # pixels; and at least a tenth of the longer side, which the processors of all models accept


def fitted(image: Image.Image) -> Image.Image:
    """Returns a picture of a size that models accept: large ones smaller, and very narrow ones with white beside them."""
    image = image.copy()
    image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    least = max(LEAST_SIDE, max(image.size) // 10)
    if min(image.size) >= least:
        return image
    size = (max(image.width, least), max(image.height, least))
    padded = Image.new("RGB", size, "white")
    padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return padded


class Captioner:
    """A model of transformers that describes pictures; raises `InputError` if it can't be loaded."""

    def __init__(self, model: Model, prompt: str | None, max_new_tokens: int, device: str, dtype: Any):
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        assert model.kind is not None
        self.kind = model.kind
        self.name = model.name
        self.prompt = prompt or model.kind.prompt
        self.max_new_tokens = max_new_tokens
        self.device = device
        self.dtype = dtype
        with explaining_damage(model.name):
            name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model.config["model_type"]]
            self.model = load_model(model.name, model.folder, name, device, dtype)
            self.processor = load_processor(model.folder, self.model.config)

    def describe(self, images: Sequence[Image.Image], wording: Wording) -> list[str]:
        """Returns the captions of pictures; "" for an answer of which nothing is left."""
        import torch

        prompt = with_omissions(self.kind, self.prompt, wording.omit)
        try:
            with torch.no_grad():
                inputs = self.kind.ask(self.processor, [fitted(image) for image in images], prompt)
                inputs = {name: self._moved(value) for name, value in inputs.items()}
                token_ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        except IndexError as error:  # a text model has a table of positions
            raise InputError(
                f"--max_new_tokens {self.max_new_tokens}: a prompt and an answer of so many tokens are too long for "
                f"{self.name}. Pass fewer tokens, or a shorter --prompt."
            ) from error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory with {len(images)} pictures at once. Pass a smaller --batch_size, or another --model; the "
                "captions so far are written."
            ) from error
        answers = self.kind.read(self.processor, inputs, token_ids)
        eos = self.model.generation_config.eos_token_id
        ends = {*self.processor.tokenizer.all_special_ids, *(eos if isinstance(eos, list) else [eos])}
        for i, last in enumerate(token_ids[:, -1].tolist()):
            if last not in ends:
                answers[i] = whole_sentences(answers[i])
        return [wording.of_sentence(answer, prompt) for answer in answers]

    def _moved(self, value):
        is_real = hasattr(value, "is_floating_point") and value.is_floating_point()
        return value.to(self.device, self.dtype) if is_real else value.to(self.device)

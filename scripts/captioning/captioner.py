"""Loads a captioning model of transformers and asks it, for `caption.py`."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from text_to_image_lora.errors import InputError, TrainingError, is_out_of_memory
from text_to_image_lora.files import reason_of

from .find import Model
from .kinds import with_omissions
from .wording import Wording, whole_sentences


# No code of a repository is run. (A dict, because tests/test_project.py forbids the keyword in every call.)
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
MOST_SIDE = 1024  # pixels; vision-language models make tokens of every pixel of a photo, and captions need no more
LEAST_SIDE = 32  # pixels; and at least a tenth of the longer side, which the processors of all models accept


def load_processor(folder: Path, config: Any) -> Any:
    """Loads what prepares pictures and texts for a model.

    Processors of models that also see videos load a processor of videos, which needs torchvision. Here they are loaded without
    it, and prepare pictures with Pillow.
    """
    from transformers import AutoTokenizer

    # The name in the package itself needs torchvision, which this class does not.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if type(config) not in PROCESSOR_MAPPING:  # an encoder and a decoder that were put together
        return SimpleNamespace(
            image_processor=AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, **NO_CODE
            ),
            tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE),
        )
    whole = PROCESSOR_MAPPING[type(config)]

    class OfPictures(whole):
        @classmethod
        def get_attributes(cls):
            return [name for name in whole.get_attributes() if "video" not in name]

    OfPictures.__name__ = whole.__name__  # transformers compares it with the name in the processor's files
    return OfPictures.from_pretrained(folder, local_files_only=True, **NO_CODE)


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
        assert model.kind is not None
        self.kind = model.kind
        self.name = model.name
        self.prompt = prompt or model.kind.prompt
        self.max_new_tokens = max_new_tokens
        self.device = device
        self.dtype = dtype
        try:
            self._load(model)
        except InputError:
            raise
        except Exception as error:  # a damaged file makes transformers raise all kinds of exceptions
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"{model.name}: it can't be loaded ({reason_of(error)}). Pass another --model."
            ) from error

    def _load(self, model):
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        transformers.utils.logging.disable_progress_bar()  # of reading the weights, which takes seconds
        name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model.config["model_type"]]
        loaded, info = getattr(transformers, name).from_pretrained(
            model.folder, use_safetensors=True, dtype=self.dtype, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            # transformers would draw them at random. The original Florence-2 has the type but other weights, for example.
            raise InputError(
                f"{model.name}: its weights do not fit the class {name} of transformers ({missing[0]} is missing). Pass a "
                "version of the model that was converted for transformers as --model."
            )
        self.model = loaded.eval().requires_grad_(False).to(self.device)
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

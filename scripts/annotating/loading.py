"""Loads a model of transformers from a folder, with what prepares its inputs; code of the folder is never run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from text_to_image_lora.errors import InputError, is_out_of_memory
from text_to_image_lora.files import reason_of

from .models import OTHER_MODEL


# No code of a repository is run. (A dict, because tests/test_project.py forbids the keyword in every call.)
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


@contextlib.contextmanager
def explaining_damage(name: str) -> Iterator[None]:
    """Turns what transformers raises on damaged files into an `InputError` that names the model."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file makes transformers raise all kinds of exceptions
        if is_out_of_memory(error):
            raise
        raise InputError(f"{name}: it can't be loaded ({reason_of(error)}). {OTHER_MODEL}") from error


def load_model(name: str, folder: Path, class_name: str, device: str, dtype: Any) -> Any:
    """Loads a model of a class of transformers onto a device; raises `InputError` if weights of it are missing."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of reading the weights, which takes seconds
    loaded, info = getattr(transformers, class_name).from_pretrained(
        folder, use_safetensors=True, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        # transformers would draw them at random. The original Florence-2 has the type but other weights, for example.
        raise InputError(
            f"{name}: its weights do not fit the class {class_name} of transformers ({missing[0]} is missing). Pass a "
            "version of the model that was converted for transformers as --model."
        )
    return loaded.eval().requires_grad_(False).to(device)


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

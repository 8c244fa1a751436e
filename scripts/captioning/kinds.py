"""The kinds of models that write captions, as rows of a table: how each is asked, and how its answer is read, for `caption.py`.

A kind's functions get the processor of transformers for the model. Pictures are RGB `PIL.Image`s, and all pictures of a batch
get the prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


CHAT_PROMPT = (
    "Describe this picture in one sentence of at most 40 words, as the caption of a training picture for an image generator. "
    "Name what is there, how it looks and where it is. Answer with the caption only."
)
FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")


class Kind(NamedTuple):
    """A kind of models of transformers.

    Args:
        name: What messages call it.
        model_types: The `model_type`s of config.json; empty for all models with a chat template.
        prompt: The prompt if the user gives none.
        prompts: The only prompts that the kind accepts; None for any text, () for none.
        ask: Returns the inputs of `generate` for (processor, pictures, prompt).
        read: Returns the answers for (processor, inputs, generated token ids).
        obeys: Whether the kind follows instructions in its prompt, such as what not to mention.
    """

    name: str
    model_types: tuple[str, ...]
    prompt: str
    prompts: tuple[str, ...] | None
    ask: Callable[[Any, Sequence[Any], str], Any]
    read: Callable[[Any, Any, Any], list[str]]
    obeys: bool = False


def _ask_with_picture(processor, images, prompt):
    return processor.image_processor(images=list(images), return_tensors="pt")


def _ask_with_beginning(processor, images, prompt):
    if not prompt:
        return _ask_with_picture(processor, images, prompt)
    return processor(images=list(images), text=[prompt] * len(images), return_tensors="pt")


def _ask_with_task(processor, images, prompt):
    return processor(images=list(images), text=[prompt] * len(images), padding=True, return_tensors="pt")


def _ask_in_chat(processor, images, prompt):
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    processor.tokenizer.padding_side = "left"  # answers are appended at the right
    return processor(
        text=[text] * len(images), images=[[image] for image in images], padding=True, return_tensors="pt"
    )


def _read_all(processor, inputs, token_ids):
    return processor.tokenizer.batch_decode(token_ids, skip_special_tokens=True)


def _read_new(processor, inputs, token_ids):
    return processor.tokenizer.batch_decode(token_ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


KINDS = (
    Kind("BLIP", ("blip",), "", None, _ask_with_beginning, _read_all),
    Kind("Florence-2", ("florence2",), "<DETAILED_CAPTION>", FLORENCE_TASKS, _ask_with_task, _read_all),
    Kind("captioner", ("blip-2", "git", "vision-encoder-decoder"), "", (), _ask_with_picture, _read_all),
    Kind("chat model", (), CHAT_PROMPT, None, _ask_in_chat, _read_new, obeys=True),
)


def find_kind(model_type: str, *, has_chat_template: bool) -> Kind | None:
    """Returns the kind of a model, or None if it is of none of the `KINDS`."""
    named = next((kind for kind in KINDS if model_type in kind.model_types), None)
    return named or next((kind for kind in KINDS if not kind.model_types and has_chat_template), None)


def with_omissions(kind: Kind, prompt: str, omit: Sequence[str]) -> str:
    """Returns the prompt with the request not to mention phrases, for kinds that obey it."""
    if not omit or not kind.obeys:
        return prompt
    *first, last = [f'"{phrase}"' for phrase in omit]
    named = f"{', '.join(first)} or {last}" if first else last
    return f"{prompt} Do not mention {named}; describe the picture as if this were not there."

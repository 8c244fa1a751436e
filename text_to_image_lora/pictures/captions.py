"""Edits captions before they are encoded."""

import hashlib
import logging
import re
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import counted
from .settings import CaptionSettings


logger = logging.getLogger(__name__)
PAIRS_SHOWN = 3


def edit_caption(caption: str, settings: CaptionSettings) -> str:
    """Adds the trigger word in front, unless the caption contains it as a whole word, and the prefix and the suffix."""
    trigger = settings.trigger_word
    if trigger and not _whole_words(trigger).search(caption):
        caption = f"{trigger}, {caption}"
    return f"{settings.caption_prefix}{caption}{settings.caption_suffix}"


def _whole_words(phrase):
    """A pattern that finds a phrase where it does not start or end inside a word, in upper or lower case."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def leave_out_phrase(caption: str, phrase: str) -> str:
    """Returns the caption without a phrase and without the comma and spaces that belong to it."""
    without = _whole_words(phrase).sub("\0", caption)
    if without == caption:
        return caption
    tags = [" ".join(part.strip() for part in tag.split("\0")).strip() for tag in without.split(",")]
    return ", ".join(tag for tag in tags if tag)


class ConceptRemover(NamedTuple):
    """Turns a caption into one without the concept.

    Args:
        phrases: The phrases that name the concept.
        prompt: The result for every caption, with `{caption}` for the caption without the phrases; None for just that.
        otherwise: The result for captions that contain none of the phrases.
    """

    phrases: tuple[str, ...]
    prompt: str | None = None
    otherwise: str = ""

    def finds(self, caption: str) -> bool:
        """Whether the caption contains one of the phrases."""
        return any(_whole_words(phrase).search(caption) for phrase in self.phrases)

    def __call__(self, caption: str) -> str:
        without = caption
        for phrase in self.phrases:
            without = leave_out_phrase(without, phrase)
        if self.prompt is not None:
            return self.prompt.replace("{caption}", without)
        return without if self.finds(caption) else self.otherwise


def check_concept_remover(remove_concept: ConceptRemover, captions: Iterable[str], *, trains: bool = True) -> None:
    """Logs what captions become without the concept; raises `InputError` if nothing in them names it.

    `trains` is whether these are trained, for --preservation; otherwise they only serve to measure the drift.
    """
    pairs = {caption: remove_concept(caption) for caption in captions}
    purpose = "--preservation" if trains else "drift"
    if remove_concept.prompt is None:
        finds = sum(map(remove_concept.finds, pairs))
        if not finds and (remove_concept.phrases or not remove_concept.otherwise):
            named = " or ".join(f"'{phrase}'" for phrase in remove_concept.phrases)
            reason = f"contains {named}" if named else "is known to name the concept"
            raise InputError(
                f"{purpose}: no caption {reason}; the first is '{next(iter(pairs))}'. Name the concept by "
                "--concept_phrases as the captions do, or write a caption without it: --preservation_prompt TEXT."
            )
        if finds < len(pairs):
            use = "their samples are also trained as" if trains else "to measure the drift, they become"
            logger.info(
                f"{purpose.lstrip('-')}: {len(pairs) - finds} of {len(pairs)} different captions contain no phrase of the "
                f"concept; {use} '{remove_concept.otherwise}'"
            )
    for caption, without in list(pairs.items())[: PAIRS_SHOWN if trains else 1]:
        if trains:
            logger.info(f"preservation: '{caption}' is also trained as '{without}', with the base model's prediction")
        else:
            logger.info(f"drift: measured on captions without the concept, such as '{without}' for '{caption}'")


def prompts_without_concept(captions: Iterable[str], remove_concept: ConceptRemover) -> list[str]:
    """Returns the different captions without the concept, from which class pictures are drawn, and logs an example.

    Captions that do not name the concept are left out, because they may be about it all the same. The order is fixed and
    mixed, so that the first prompts are of all kinds. Raises `InputError` if there are none.
    """
    different = dict.fromkeys(captions)
    named = [caption for caption in different if remove_concept.prompt is not None or remove_concept.finds(caption)]
    pairs = {without: caption for caption in reversed(named) if (without := remove_concept(caption).strip())}
    if not pairs:
        phrases = " or ".join(f"'{phrase}'" for phrase in remove_concept.phrases)
        reason = (
            f"no caption contains {phrases}" if phrases else "it is not known what in the captions names the concept"
        )
        if named:
            reason = f"no caption contains more than {phrases}"
        raise InputError(
            f"--num_class_images: {reason}; the first is '{next(iter(different))}'. Describe the class by --class_prompt TEXT, "
            "or name the concept by --concept_phrases as the captions do."
        )
    if len(named) < len(different):
        logger.info(
            f"class pictures: {len(different) - len(named)} of {len(different)} different captions contain no phrase of the "
            "concept, so no class picture is drawn from them"
        )
    prompts = sorted(pairs, key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())
    logger.info(
        f"class pictures: {counted(len(prompts), 'prompt')} from the captions without the concept, such as '{prompts[0]}' from "
        f"'{pairs[prompts[0]]}'"
    )
    return prompts


def vary_tags(caption: str, rng: Any, settings: CaptionSettings) -> str:
    """Shuffles the comma-separated tags of a caption and leaves out some, except the first `keep_tags`.

    `rng` is a NumPy generator.
    """
    tags = [tag for tag in (tag.strip() for tag in caption.split(",")) if tag]
    kept, others = tags[: settings.keep_tags], tags[settings.keep_tags :]
    if settings.shuffle_tags:
        others = [others[i] for i in rng.permutation(len(others))]
    if settings.caption_tag_dropout:
        others = [tag for tag in others if rng.random() >= settings.caption_tag_dropout]
    return ", ".join(kept + others)


def tag_variations(captions: list[str], settings: CaptionSettings) -> list[str]:
    """Returns `tag_variations` varied copies of each caption; equal copies stay, so that all captions are drawn equally often.

    They depend only on the captions, so that runs with different seeds share the cache.
    """
    import numpy as np

    rng = np.random.default_rng([0, zlib.crc32("\n".join(captions).encode())])
    return [vary_tags(caption, rng, settings) for caption in captions for _ in range(settings.tag_variations)]

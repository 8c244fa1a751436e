"""Edits captions before they are encoded."""

import re
import zlib
from typing import Any

from .settings import CaptionSettings


def edit_caption(caption: str, settings: CaptionSettings) -> str:
    """Adds the trigger word in front, unless the caption contains it as a whole word, and the prefix and the suffix."""
    trigger = settings.trigger_word
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        caption = f"{trigger}, {caption}"
    return f"{settings.caption_prefix}{caption}{settings.caption_suffix}"


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

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


def shuffle_tags(caption: str, rng: Any, keep: int = 0) -> str:
    """Shuffles the comma-separated tags of a caption, except the first `keep`; `rng` is a NumPy generator."""
    tags = [tag for tag in (tag.strip() for tag in caption.split(",")) if tag]
    return ", ".join(tags[:keep] + [tags[keep:][i] for i in rng.permutation(max(len(tags) - keep, 0))])


def shuffled_variations(captions: list[str], settings: CaptionSettings) -> list[str]:
    """Returns `tag_variations` shuffled copies of each caption; equal copies stay, so that all captions are drawn equally often.

    The orders depend only on the captions, so that runs with different seeds share the cache.
    """
    import numpy as np

    rng = np.random.default_rng([0, zlib.crc32("\n".join(captions).encode())])
    return [
        shuffle_tags(caption, rng, settings.keep_tags) for caption in captions for _ in range(settings.tag_variations)
    ]

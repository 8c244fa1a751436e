"""What is done to a caption before it is encoded."""

import re
import zlib

from .settings import CaptionSettings


def edit_caption(caption: str, settings: CaptionSettings) -> str:
    """The caption with the trigger word put in front where it is missing as a word of its own, and prefix and suffix."""
    trigger = settings.trigger_word
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        caption = f"{trigger}, {caption}"
    return f"{settings.caption_prefix}{caption}{settings.caption_suffix}"


def shuffle_tags(caption, rng, keep=0):
    """The caption's tags, between commas, in another order; the first `keep` stay where they are."""
    tags = [tag for tag in (tag.strip() for tag in caption.split(",")) if tag]
    return ", ".join(tags[:keep] + [tags[keep:][i] for i in rng.permutation(max(len(tags) - keep, 0))])


def shuffled_variations(captions: list[str], settings: CaptionSettings) -> list[str]:
    """`tag_variations` orders of the tags of each caption, alike or not, so that each is drawn as often as before.

    They depend on the captions alone, so that runs of other seeds share the cache.
    """
    import numpy as np

    rng = np.random.default_rng([0, zlib.crc32("\n".join(captions).encode())])
    return [
        shuffle_tags(caption, rng, settings.keep_tags) for caption in captions for _ in range(settings.tag_variations)
    ]

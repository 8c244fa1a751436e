"""What is done to a caption before it is encoded."""

import re
import zlib


def edit_caption(caption, *, trigger_word=None, prefix="", suffix=""):
    """The caption with the trigger word put in front where it is missing as a word of its own, and prefix and suffix."""
    if trigger_word and not re.search(rf"(?<!\w){re.escape(trigger_word)}(?!\w)", caption, re.IGNORECASE):
        caption = f"{trigger_word}, {caption}"
    return f"{prefix}{caption}{suffix}"


def shuffle_tags(caption, rng, keep=0):
    """The caption's tags, between commas, in another order; the first `keep` stay where they are."""
    tags = [tag for tag in (tag.strip() for tag in caption.split(",")) if tag]
    return ", ".join(tags[:keep] + [tags[keep:][i] for i in rng.permutation(max(len(tags) - keep, 0))])


def shuffled_variations(captions, count, seed, keep=0):
    """`count` orders of the tags of each caption, alike or not, so that each caption is drawn as often as before."""
    import numpy as np

    rng = np.random.default_rng([seed, zlib.crc32("\n".join(captions).encode())])
    return [shuffle_tags(caption, rng, keep) for caption in captions for _ in range(count)]

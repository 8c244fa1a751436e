"""What is done to a caption before it is encoded."""

import re


def edit_caption(caption, *, trigger_word=None, prefix="", suffix=""):
    """The caption with the trigger word put in front where it is missing as a word of its own, and prefix and suffix."""
    if trigger_word and not re.search(rf"(?<!\w){re.escape(trigger_word)}(?!\w)", caption, re.IGNORECASE):
        caption = f"{trigger_word}, {caption}"
    return f"{prefix}{caption}{suffix}"

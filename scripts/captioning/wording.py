"""Turns what a model answers into captions: cleaned, without what is not to be named, with the trigger word, for `caption.py`."""

import re
import string
import unicodedata
from typing import NamedTuple

from text_to_image_lora.errors import InputError

from .omitting import contains, mentions, omit_from_sentence, omit_from_tags


MOST_CHARACTERS = 2000  # of an answer; a model that repeats itself would write captions that no reader accepts
SENTENCE_TEMPLATE = "{medium} of {trigger} {class}, {caption}"
TAG_TEMPLATE = "{trigger}, {class}, {caption}"
FIELDS = {"medium", "trigger", "class", "caption"}
PHOTO = "a photo"
PICTURES = "photo|photograph|picture|image|shot|snapshot"
MEDIA = (
    "painting|drawing|illustration|sketch|cartoon|watercolor|watercolour|rendering|render|engraving|woodcut|3d render"
)
# How answers begin that say nothing about the picture: "The image shows", "In this picture we can see".
CHATTER = re.compile(
    rf"(?:(?:sure|certainly|okay)[,!.:]\s*)?(?:here(?:'s| is) (?:a|the) caption[^:]*:\s*|(?:a |the )?(?:caption|description):\s*)?"
    rf"(?:(?:the|this) (?:{PICTURES}) (?:shows|depicts|features|presents|displays|captures|is of)\s+|"
    rf"in (?:the|this) (?:{PICTURES}),? (?:(?:we|you|i) can see\s+|there (?:is|are)\s+)|"
    rf"(?:this|it) is (?=an? ))?",
    re.IGNORECASE,
)
PHOTO_OF = re.compile(rf"(?:an?|the)\s+(?:[\w-]+\s+)?(?:{PICTURES})\s+of\s+", re.IGNORECASE)
MEDIUM_OF = re.compile(rf"((?:an?|the)\s+(?:[\w-]+\s+){{0,3}}?(?:{MEDIA}))\s+of\s+", re.IGNORECASE)
# Words whose capital letter only says that they begin a sentence.
STARTERS = {
    "a", "an", "the", "this", "that", "these", "those", "there", "it", "he", "she", "they", "his", "her", "its", "their",
    "one", "two", "three", "four", "five", "several", "some", "many", "in", "on", "at", "with", "under", "behind", "close",
}  # fmt: skip


class Wording(NamedTuple):
    """What the captions say besides the model's answer."""

    trigger_word: str = ""
    class_name: str = ""
    template: str | None = None  # with the names of `FIELDS` in braces; None: the template of sentences or of tags
    prefix: str = ""
    suffix: str = ""
    omit: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `InputError` for texts that no caption can contain, or that contradict each other."""
        named = {"--trigger_word": self.trigger_word, "--class_name": self.class_name, "--prefix": self.prefix}
        named |= {"--suffix": self.suffix, "--caption_template": self.template or ""}
        for flag, text in [*named.items(), *(("--omit", phrase) for phrase in self.omit)]:
            if not text.isprintable():
                raise InputError(f"{flag} {text!r}: a caption is one line without control characters. Leave them out.")
        for phrase in self.omit:
            if not re.search(r"\w", phrase):
                raise InputError("--omit: a phrase is empty. Pass the words that captions must not contain.")
            for flag, text in named.items():
                if mentions(text, phrase):
                    raise InputError(f"--omit {phrase!r}: {flag} contains these words. Change one of the two.")
        if self.class_name and not self.trigger_word:
            raise InputError("--class_name says what --trigger_word is. Add --trigger_word, or use --prefix.")
        if self.template is not None:
            self._check_template()

    def _check_template(self):
        try:
            parts = [part for part in string.Formatter().parse(self.template or "") if part[1] is not None]
        except ValueError as error:
            raise InputError(f"--caption_template {self.template!r}: it can't be read ({error}).") from error
        fields, is_formatted = {name for _, name, _, _ in parts}, any(spec or how for _, _, spec, how in parts)
        if is_formatted or not fields <= FIELDS or not {"trigger", "caption"} <= fields:
            raise InputError(
                f"--caption_template {self.template!r}: it needs {{trigger}} and {{caption}}, and may have {{class}} and "
                "{medium}, such as '{caption}, in {trigger} style'."
            )
        if not self.trigger_word:
            raise InputError("--caption_template says where --trigger_word stands. Add --trigger_word.")

    def of_sentence(self, answer: str, prompt: str = "") -> str:
        """Returns the caption of a picture for the answer of a model that writes sentences; "" if nothing is left of it."""
        caption = omit_from_sentence(clean(answer, prompt), self.omit)
        if not re.search(r"\w", caption):
            return ""
        if self.trigger_word and not contains(caption, self.trigger_word):
            medium, caption = split_medium(caption)
            caption = self._woven(self.template or SENTENCE_TEMPLATE, lower_first(caption), medium)
        return f"{self.prefix}{caption}{self.suffix}"

    def of_tags(self, tags: list[str]) -> str:
        """Returns the caption of a picture for its tags; "" if none of them is left."""
        own = {self.trigger_word.casefold(), self.class_name.casefold()}
        caption = ", ".join(tag for tag in omit_from_tags(tags, self.omit) if tag.casefold() not in own)
        if not caption:
            return ""
        if self.trigger_word:
            caption = self._woven(self.template or TAG_TEMPLATE, caption, PHOTO)
        return f"{self.prefix}{caption}{self.suffix}"

    def _woven(self, template, caption, medium):
        values = {"medium": medium, "trigger": self.trigger_word, "class": self.class_name, "caption": "\0"}
        woven = re.sub(r"\s+", " ", template.format_map(values))
        woven = re.sub(r"\s+,", ",", re.sub(r"(?:,\s*)+,", ",", woven))  # where there is no class
        return woven.replace("\0", caption).strip()


def clean(answer: str, prompt: str = "") -> str:
    """Returns an answer as one line without control characters, without a repetition of the prompt, quotes and chatter."""
    text = re.sub(r"<think>.*?(?:</think>|$)", " ", answer, flags=re.DOTALL)
    text = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in text)
    text = " ".join(text[: 4 * MOST_CHARACTERS].split())
    asked = " ".join(prompt.split())
    if asked and text.casefold().startswith(asked.casefold()):
        text = text[len(asked) :].lstrip(" :")
    text = text.strip(' *_#`"“”')
    begun = CHATTER.match(text)
    if begun is not None and begun.end() and begun.end() < len(text):
        text = text[begun.end() :].strip(' *"“”')
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS].rpartition(" ")[0]
    if text.endswith(".") and not re.search(r"[.!?]\s", text) and not text.endswith(".."):
        text = text[:-1]  # of a single sentence, so that tags or a suffix can follow
    return text.strip()


def whole_sentences(text: str) -> str:
    """Returns an answer that was cut at its limit up to its last whole sentence; the answer itself if it has none."""
    found = re.match(r"(.*[.!?])\s", text, re.DOTALL)
    return text if found is None else found[1]


def split_medium(caption: str) -> tuple[str, str]:
    """Splits "a painting of a dog" into ("a painting", "a dog"); a caption without a medium is one of a photo."""
    if (found := MEDIUM_OF.match(caption)) is not None and found.end() < len(caption):
        return lower_first(found[1]), caption[found.end() :]
    found = PHOTO_OF.match(caption)
    return PHOTO, caption[found.end() :] if found is not None and found.end() < len(caption) else caption


def lower_first(text: str) -> str:
    """Returns a text that begins with a small letter, unless its first word may be a name."""
    first = re.match(r"\w+", text)
    return text[0].lower() + text[1:] if first is not None and first[0].lower() in STARTERS else text

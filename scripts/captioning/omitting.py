"""Takes phrases out of captions, because what a trigger word is to mean must not be described, for `caption.py`.

A sentence has to stay a sentence, so the words that join the phrase to the rest go with it: "an axe with pink blossoms on it
lying on a table" becomes "an axe lying on a table".
"""

import re


# Words that can stand between the joining words and the phrase only if they describe the phrase ("some small ...").
MOST_DESCRIBING = 4
PLACES = (
    "next to|in front of|on top of|near|in|into|on|onto|under|behind|beside|besides|among|amongst|amid|by|at|over|against|"
    "between|around|above|below|beneath|along|through|inside|within|from|of|to|toward|towards|for|like|as|about"
)
HOLDING = (
    "holding|wearing|carrying|having|featuring|showing|displaying|including|containing|bearing|growing|"
    "holds|wears|carries|has|have|had|features|shows|displays|includes|contains|bears"
)
STATES = "covered|decorated|adorned|surrounded|filled|topped|wrapped|entwined|embellished|overgrown|crowned|made|full|dotted"
JOINING = rf"(?:and also|as well as|along with|together with|and|or|but|plus|with|without|{PLACES}|{HOLDING})"
# The last joining word in front of the phrase, with the words that lead to it: ", and", "that has", "covered in".
JOINED = rf"(?P<comma>\s*[,;])?\s*(?:\b(?:and|or|but|which|that|who|is|are)\s+)*(?:\b(?:{STATES})\s+)?\b(?P<join>{JOINING})\s+"
MEASURES = r"bunch|cluster|bouquet|pattern|lot|lots|group|row|pair|sprig|wreath|crown|bundle|number|plenty|couple|ring"
DESCRIBING = rf"(?:(?!{JOINING}\b)[\w'’-]+\s+){{0,{MOST_DESCRIBING}}}?"
BEFORE = rf"(?:(?:{DESCRIBING})(?:{MEASURES})\s+of\s+)?{DESCRIBING}"
# Where the phrase is, told by a pronoun: "on it", "in her hair", "all over its handle".
WHERE = (
    r"(?:\s+(?:all\s+)?(?:on|in|around|over|at|near|above|along|across|behind|inside|through|to)\s+"
    r"(?:top(?!\s+of)|(?:it|them|him)\b|(?:its|her|his|their)\s+[\w'’-]+))"
)
# A clause about the phrase: "growing on the handle". It ends with the clause.
CLAUSE = r"(?:\s+(?:that|which|who)\b[^,.;]*|\s+\w+(?:ing|ed)\b(?:(?!\s+(?:and|but)\b)[^,.;])*)"
# Verbs that can follow "and": the next word is no thing that takes the phrase's place.
ACTION = (
    r"(?:is|are|was|were|has|have|looks?|sits?|stands?|lies|holds?|smiles?|plays?|runs?|walks?|wears?|eats?|sleeps?|faces?|"
    r"points?|\w+ing)\b"
)
# Any other verb in front of the phrase, with the words that describe the phrase: "smelling", "picks some".
OTHER_VERB = r"(?P<comma>)\s+(?P<join>(?!(?:his|its|this|as|is|has|was)\b)\w{2,}(?:ing|s))\s+"
VERB = r"\s+(?:is|are|was|were|has|have|can|grow|grows|bloom|blooms|cover|covers|surround|surrounds|adorn|adorns)\b"
# What can follow a noun. Anything else is a noun that the phrase describes: "a pink blossom pattern".
END = rf"(?=\s*$|\s*[,.;:!?)]|\s+(?:{JOINING}|that|which|who|while|when|where|it|this|all|\w+ing|\w+ed|is|are)\b)"


def number_free(phrase: str) -> str:
    """A pattern for a phrase as whole words, whose last word may be singular or plural."""
    *first, last = phrase.split()
    stem = last[:-1] if re.search(r"[^su]s$", last, re.IGNORECASE) else last
    words = r"\s+".join([*map(re.escape, first), re.escape(stem) + r"(?:e?s)?"])
    return rf"(?<![\w-]){words}(?![\w-])"


def contains(text: str, words: str) -> bool:
    """Whether a text contains these words, not as parts of other words, in upper or lower case."""
    pattern = r"\s+".join(map(re.escape, words.split()))
    return re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) is not None


def mentions(text: str, phrase: str) -> bool:
    """Whether a text contains a phrase as whole words, in upper or lower case, in the singular or in the plural."""
    return re.search(number_free(phrase), text, re.IGNORECASE) is not None


def omit_from_tags(tags: list[str], phrases: tuple[str, ...]) -> list[str]:
    """Returns the tags that contain none of the phrases."""
    return [tag for tag in tags if not any(mentions(tag, phrase) for phrase in phrases)]


def omit_from_sentence(text: str, phrases: tuple[str, ...]) -> str:
    """Returns the text without the phrases and the words that join them to the rest; "" if the text is about them alone."""
    for phrase in phrases:
        while mentions(text, phrase):  # each call takes out the first mention at least
            text = _omit_first(text, number_free(phrase))
    return text


def _omit_first(text, phrase):
    """Takes out the first mention of a phrase (a pattern)."""
    first = re.search(phrase, text, re.IGNORECASE)
    assert first is not None
    after = text[first.end() :]
    if not re.match(END, after, re.IGNORECASE) and not re.match(VERB, after, re.IGNORECASE):
        return _mended(text[: first.start()] + after)  # it describes a noun, which stays
    found = _joined(text, phrase, first.end())
    if found is None:
        return _without_subject(text, first)
    before, join = text[: found.start()], found["join"].lower()
    tail = re.match(f"{WHERE}|{CLAUSE}", after, re.IGNORECASE)
    rest = after[tail.end() if tail else 0 :]
    following = re.match(r"\s*,?\s*(?:and|or)\s+", rest, re.IGNORECASE)
    if following is None or join in ("and", "or", "but") or found["comma"]:
        return _mended(before + rest)
    if not re.match(ACTION, rest[following.end() :], re.IGNORECASE):
        # "with PHRASE and leaves" becomes "with leaves": the next thing takes the phrase's place.
        return _mended(f"{text[: found.end('join')]} {rest[following.end() :]}")
    is_predicate = re.fullmatch(f"{HOLDING}", join) and not join.endswith("ing")
    return _mended(before + (f" {rest[following.end() :]}" if is_predicate else rest))


def _joined(text, phrase, end):
    """Finds the words that join the mention of a phrase that ends at `end` to what is before it, or None."""
    for joined in (JOINED, OTHER_VERB):
        found = re.search(rf"{joined}{BEFORE}{phrase}", text, re.IGNORECASE)
        if found is not None and found.end() == end and text[: found.start()].strip(" ,.;"):
            # "a bunch of PHRASE lies there": the phrase is what the sentence is about.
            is_measured = found["join"].lower() == "of" and re.search(rf"(?:{MEASURES})$", text[: found.start()])
            return None if is_measured else found
    return None


def _without_subject(text, first):
    """Takes out a phrase with nothing that joins it to words before it: it begins the sentence, or a part of it."""
    start = max(text.rfind(mark, 0, first.start()) for mark in ".;,!?") + 1
    end = min((i for mark in ".;!?" if (i := text.find(mark, first.end())) >= 0), default=len(text))
    rest = text[first.end() : end]
    said = re.search(rf"^{VERB}|\b(?:is|are|was|were)\b", rest, re.IGNORECASE)
    if start and text[start - 1] == "," and re.match(r"\s+(?:and|or)\b", rest) and said is None:
        return _mended(text[: start - 1] + text[first.end() :])  # "leaves, PHRASE and thorns"
    lead = re.match(rf"\s*(?:,?\s*(?:and|or)\s+|,\s*|{PLACES})\b\s*", rest, re.IGNORECASE)
    if lead is not None and said is None:
        return _mended(f"{text[:start]} {rest[lead.end() :]}{text[end:]}")  # "PHRASE and an axe", "PHRASE on an axe"
    return _mended(text[:start] + text[end:])  # the sentence, or the part between commas, is about the phrase


def _mended(text):
    """Repairs spaces, punctuation and articles where something was taken out."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    text = re.sub(r"[,;:]+(?=[,;:.!?])", "", text)
    text = re.sub(r"([.!?])(?:\s*[.!?])+", r"\1", text)
    text = re.sub(r"\b(a)(?=\s+[aeiou]\w)", r"\1n", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(a)n(?=\s+[^aeiou\W])", r"\1", text, flags=re.IGNORECASE)
    text = re.sub(rf"(?:[\s,;]+(?:{JOINING}|a|an|the))+(?=\s*[.!?]?\s*$)", "", text, flags=re.IGNORECASE)
    return re.sub(r"^[\s,.;:!?]*(?:(?:and|or|but|with|of)\b\s*)*", "", text, flags=re.IGNORECASE).strip(" ,;")

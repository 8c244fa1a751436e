"""Secrets, such as tokens, that no message, file or tracker may contain."""

import re
from collections.abc import Iterable, Sequence


MASK = "***"
SECRETS: set[str] = set()
SHORTEST = 4  # letters; shorter words would be masked inside of others
# Tokens of the hub, the user and password of an address, and tokens in its query.
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[\w.~%+!$*:-]+(?=@[\w.-])|(?<=[?&])((?:access_)?token|api_?key|password|secret|signature)=[^&\s]+",
    re.IGNORECASE,
)


def hide(values: Iterable[str]) -> None:
    """From here on, `redact` masks these values."""
    SECRETS.update(value for value in values if len(value) >= SHORTEST)


def hide_values(argv: Sequence[str], flags: Iterable[str]) -> None:
    """From here on, `redact` masks every word that stands behind one of these flags on a command line, such as "--hub_token"."""
    follows = False
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            follows = word in flags
            hide([value] if equals and name in flags else [])
        elif follows:
            hide([word])


def redact(text: str) -> str:
    """Masks the values that were hidden, and everything that looks like a token or stands before the host of an address."""
    for secret in sorted(SECRETS, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return SHAPES.sub(lambda match: f"{match[1]}={MASK}" if match[1] else MASK, text)

"""The settings that each picture can have."""

import argparse
import re

import pytest

from text_to_image_lora.drawing.rows import number


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "wish"),
    [
        (dict(kind=float, least=0, most=1), ["0", "0.65", "1"], ["-0.1", "1.5", "nan", "x"], "a number from 0 to 1"),
        (dict(kind=int), ["-3", "0"], ["1.5", ""], "a whole number."),
        (dict(kind=int, least=8, multiple_of=8), ["8", "64"], ["0", "12"], "a whole number, a multiple of 8"),
    ],
)
def test_numbers_with_bounds(bounds, good, bad, wish):
    parse = number(**bounds)
    assert [parse(text) for text in good] == [bounds["kind"](text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(wish)):
            parse(text)

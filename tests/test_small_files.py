"""Small JSON and YAML files of anyone are read with limits, and their values with types."""

import json
import os

import pytest
from conftest import refusal_of

from text_to_image_lora import small_files
from text_to_image_lora.command_line import above, between
from text_to_image_lora.small_files import Values, load_yaml, parse_json, read_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "more than 50 levels"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "more than 50 levels"),
        ('{"a": ' + "[" * 60 + "]" * 60 + "}", "more than 50 levels"),
        ('{"seed": 1, "b": {"seed": 1, "seed": 2}}', 'the key "seed" is there twice'),
        ('{"seed": 1, "seed": 1}', 'the key "seed" is there twice'),
        ("[]", "a list instead of a mapping"),
        ("null", "null instead of a mapping"),
        ('"text"', '"text" instead of a mapping'),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("1" * 5000, "Exceeds the limit"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
    ],
)
def test_what_is_no_small_mapping_is_refused_in_one_line(tmp_path, text, reason):
    message = refusal_of(parse_json, text, "config.json", "Get another.")
    assert message.startswith("config.json: it can't be read (")
    assert reason in message
    assert message.endswith(" Get another.")
    (tmp_path / "x.json").write_bytes(text.encode() if isinstance(text, str) else text)
    assert reason in refusal_of(read_json, tmp_path / "x.json")


def test_a_file_that_is_too_large_or_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(small_files, "MOST_BYTES", 100)
    (tmp_path / "large.json").write_text(json.dumps({"a": "x" * 100}))
    assert "the limit is 100" in refusal_of(read_json, tmp_path / "large.json")
    assert "No such file" in refusal_of(read_json, tmp_path / "gone.json")
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path, tmp_path / "pipe.json", "/dev/zero"):
        assert "it is no file" in refusal_of(read_json, path)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -5], [True, 1.5, "1", None, [], NAN]),
        (float, [0, 1.5], [True, "1", NAN, INFINITY, None]),
        (str, ["", "a"], [1, None, ["a"]]),
        (bool, [True, False], [1, "true", None]),
        (dict, [{}], [[], None, "{}"]),
        (between(1, 5, int), [1, 5], [0, 6, 2.0, "3", True]),
        (above(0, float), [1, 0.5], [0, -1, NAN, INFINITY, "x"]),
        ([int], [[1, 2]], [[], [1, "a"], 1, None, [True]]),
        ({"a", "b"}, ["a"], ["c", 1, None, ["a"]]),
        ((int, [int]), [1, [1]], ["a", [], [None]]),
    ],
)
def test_values_have_kinds(kind, good, bad):
    for value in good:
        assert Values({"key": value}, "file").want("key", kind) == value
    for value in bad:
        message = refusal_of(Values({"key": value}, "file").want, "key", kind)
        assert message.startswith("file: 'key' is ")
        assert ", but must be " in message


def test_a_default_stands_for_a_missing_key_and_only_none_for_null():
    values = Values({"null": None}, "file")
    assert values.want("gone", int, 7) == 7
    assert values.want("null", int, None) is None
    assert "'null' is null" in refusal_of(values.want, "null", int, 7)
    assert "'gone' is missing" in refusal_of(values.want, "gone", int)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {rank: 4}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "its aliases make it longer than 1,000,000 values"),
        (MERGES, "its aliases make it longer than 1,000,000 values"),
        ("a: &a [*a]\n", "stands for a part that contains the alias"),
        ("a: &a {b: *a}\n", "stands for a part that contains the alias"),
        ("a: " + "[" * 100_000, "more than 50 levels"),
        ("a: " + "{a: " * 50_000, "more than 50 levels"),
        ("".join(f"{' ' * i}a:\n" for i in range(100)), "more than 50 levels"),
    ],
)
def test_yaml_that_grows_without_end_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        load_yaml(text)


def test_yaml_with_a_few_anchors_is_read():
    assert load_yaml("a: &a [1, x]\nb: *a\nc: {<<: {d: 1}}\n")[1] == {"a": [1, "x"], "b": [1, "x"], "c": {"d": 1}}
    assert load_yaml("") == (None, None)

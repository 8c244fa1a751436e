"""Prompts: which values are files, and which syntax is read literally."""

import logging
import time

import pytest
from conftest import refusal_of

from text_to_image_lora.drawing import grids
from text_to_image_lora.drawing.prompts import note_of_a1111s_syntax, parse_prompt, read_prompts
from text_to_image_lora.drawing.rows import Drawing
from text_to_image_lora.errors import InputError


@pytest.mark.parametrize(
    "text",
    [
        "a sign that says readme.txt",
        "~nobody says readme.txt",
        "a robot, notes.TXT",
        "一张纸上 写着 a.txt",
        "a" * 300 + " b.txt",
    ],
)
def test_a_prompt_may_end_in_txt(text):
    assert [prompt.text for prompt in read_prompts("--prompt", [text])] == [text]


def test_files_of_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my prompts.txt").write_text("a red axe\n")
    (tmp_path / "p.txt").write_text("a dog\n")
    for value in ("my prompts.txt", str(tmp_path / "my prompts.txt"), "~/my prompts.txt"):
        assert [prompt.text for prompt in read_prompts("--prompt", [value])] == ["a red axe"]
    assert [prompt.text for prompt in read_prompts("--prompt", ["~/p.txt", "p.txt"])] == ["a dog", "a dog"]


@pytest.mark.parametrize("value", ["prompts.txt", "~/prompts.txt", "a folder/prompts.txt", "readme.txt"])
def test_a_file_that_is_not_there(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=r"can't be read \(No such file or directory\)\. A prompt of one word must not end"
    ):
        read_prompts("--prompt", [value])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "a dog --seed 18446744073709551616",
            "it must be a whole number from -9223372036854775808 to 18446744073709551615",
        ),
        ("a dog --d -9223372036854775809", "it must be a whole number from"),
        ("a dog --steps 1001", "it must be a whole number from 1 to 1000"),
        ("a dog --s 0", "it must be a whole number from 1 to 1000"),
    ],
)
def test_options_that_nothing_can_draw(line, message):
    with pytest.raises(InputError, match=message):
        parse_prompt(line, "--prompt")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a (red:1.3) axe", "(red:1.3)"),
        ("a (red, old: .8 ) axe", "(red, old: .8 )"),
        ("an axe <lora:blossoms:0.8>", "<lora:blossoms:0.8>"),
        ("an axe <lyco:x:1>", "<lyco:x:1>"),
        ("an axe BREAK a tree", "BREAK"),
        ("a [dog:cat:0.5]", "[dog:cat:0.5]"),
        ("a ((red)) axe", "((red))"),
        ("eine (rote:1.2) Axt 斧", "(rote:1.2)"),
    ],
)
def test_a1111s_syntax_is_noted_as_literal(text, found):
    assert f"A1111's syntax has no effect: {found}." in note_of_a1111s_syntax(["a dog", text, text])


@pytest.mark.parametrize(
    "text",
    [
        "a dog (brown)",
        "1girl, saber (fate)",
        "ratio (16:9 film)",
        "a sign: open",
        "break of dawn",
        "BREAKFAST",
        "a <red> axe",
        "[x]",
    ],
)
def test_plain_prompts_are_not_noted(text):
    assert note_of_a1111s_syntax([text]) is None


def test_the_note_comes_once_per_command(caplog):
    caplog.set_level(logging.INFO, "text_to_image_lora")
    prompts = [parse_prompt(f"a (red:1.{i}) axe", "") for i in range(5)]
    grids.plan(Drawing(negative_prompt="BREAK"), grids.arrange({}, prompts, 3, []))
    (record,) = caplog.records
    assert "(red:1.0), BREAK, (red:1.1)" in record.getMessage()


@pytest.mark.parametrize(
    "text",
    [
        " " * 200_000 + "x",
        "a --n" + " " * 200_000 + "b" + " " * 200_000 + "c",
        "(a:" + "1" * 100_000,
        "[:" + "1" * 100_000,
    ],
)
def test_no_text_takes_long_to_parse(text):
    started = time.monotonic()
    prompt = parse_prompt(text, "--prompt")
    note_of_a1111s_syntax([prompt.text])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u2028"])
def test_an_empty_prompt_draws_without_a_prompt(text):
    assert [prompt.text for prompt in read_prompts("--prompt", [text])] == [""]


@pytest.mark.parametrize("value", ["a\0b", "a\0b c.txt", "\0"])
def test_a_prompt_may_have_any_letter(value):
    assert [prompt.text for prompt in read_prompts("--prompt", [value])] == [value]


@pytest.mark.parametrize("value", ["a\0b.txt", "\0.txt", "x/\0.TXT"])
def test_a_name_of_a_file_with_nul_is_refused(value):
    assert refusal_of(read_prompts, "--prompt", [value]).startswith("--prompt ")


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_a_file_of_prompts_is_divided_at_line_breaks_only(tmp_path, sign):
    path = tmp_path / "p.txt"
    path.write_bytes(f"a{sign}red axe\r\na dog\rb{sign}\n\n# no{sign}prompt\nc".encode())
    found = [prompt.text for prompt in read_prompts("--prompt", [str(path)])]
    assert found == [f"a{sign}red axe", "a dog", "b", "c"]


@pytest.mark.parametrize("line", ["--seed 3", " --width 64 --n x", "--steps 2"])
def test_options_without_a_prompt_are_explained(line):
    flag = line.split()[0]
    message = f"--prompt: there is no prompt before {flag}. Write the prompt first, such as: a red axe {line.strip()}."
    assert refusal_of(parse_prompt, line, "--prompt") == message

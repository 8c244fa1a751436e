"""Command lines: bounds, error messages of one line, --help, and flags from a YAML file."""

import argparse
import re

import pytest
from conftest import refusal_of

from text_to_image_lora.command_line import (
    Parser,
    above,
    at_least,
    between,
    count,
    filled_text,
    from_up_to,
    inner_folder,
    output_folder,
    path_text,
    user_path,
)
from text_to_image_lora.errors import InputError


def small_parser():
    """Returns a parser with a flag of each kind."""
    parser = Parser(description="A small command.")
    add = parser.add_argument
    switch = dict(action=argparse.BooleanOptionalAction)
    add("--config")
    add("--rank", type=count(1), default=4, help="dimension of the update matrices")
    add("--seed", type=between(0, 2**63 - 1, int), help="makes a run reproducible")
    add("--learning_rate", type=above(0), help="learning rate after warm-up")
    add("--max_grad_norm", type=at_least(0), default=1.0, help="clip the gradient")
    add("--adam_beta1", type=from_up_to(0, 1), default=0.9, help="decay")
    add("--lr_scheduler", choices=["constant", "cosine"], default="constant", help="how the learning rate changes")
    add("--mixed_precision", choices=["no", "bf16"], help="precision of the base")
    add("--prompts", nargs="+", default=[], help="several prompts")
    add("--negative_prompt", default="", help="what to avoid")
    add("--center_crop", default=False, help="crop the middle", **switch)
    add("--random_flip", default=False, help="mirror half of the pictures", **switch)
    add("--allow_tf32", default=True, help="faster products", **switch)
    return parser


def parse(*words):
    return small_parser().parse(list(words))


def refused(*words):
    """Returns the error message for these words, which has one line."""
    return refusal_of(parse, *words)


# Numbers.


@pytest.mark.parametrize(
    ("number", "taken", "others"),
    [
        (count(1), {"1": 1, "007": 7, " 4 ": 4, "1000000000": 10**9}, ["0", "-1", "1000000001"]),
        (count(1, word="auto"), {"1": 1, "auto": "auto"}, ["0", "-1", "1" + "0" * 30]),
        (at_least(0), {"0": 0.0, "1e-3": 1e-3}, ["-0.1", "inf", "-inf", "nan"]),
        (between(0, 0.5), {"0": 0.0, "0.5": 0.5}, ["-1e-9", "0.51", "inf", "nan"]),
        (between(0, 2**63 - 1, int), {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63)]),
        (above(0), {"1e-9": 1e-9, "1": 1.0}, ["0", "-1", "inf", "nan"]),
        (from_up_to(0, 1), {"0": 0.0, "0.999": 0.999}, ["1", "-0.1", "nan", "inf"]),
    ],
    ids=["count", "count or a word", "at_least", "between", "between int", "above", "from_up_to"],
)
def test_a_number_within_its_bounds_is_taken_and_no_other(number, taken, others):
    for text, value in taken.items():
        assert number(text) == value
        assert type(number(text)) is (number.kind if text != number.word else str)
    for text in others:
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            number(text)
        too_large = text.isdigit() and float(text) > number.most
        assert str(caught.value) == f"{text}: it must be {f'at most {number.most:,}' if too_large else number.allowed}"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--rank", "0"], "--rank 0: it must be 1 or more."),
        (["--rank=-1"], "--rank -1: it must be 1 or more."),
        (["--rank", "four"], "--rank four: it must be a whole number, 1 or more."),
        (["--rank", "4.0"], "--rank 4.0: it must be a whole number, 1 or more."),
        (["--rank", ""], "--rank : it must be a whole number, 1 or more."),
        (["--seed", str(2**64)], f"--seed {2**64}: it must be from 0 to {2**63 - 1}."),
        (["--seed", "x"], f"--seed x: it must be a whole number, from 0 to {2**63 - 1}."),
        (["--learning_rate", "0.0"], "--learning_rate 0.0: it must be more than 0 and finite."),
        (["--learning_rate", "inf"], "--learning_rate inf: it must be more than 0 and finite."),
        (["--learning_rate", "1e-4x"], "--learning_rate 1e-4x: it must be more than 0 and finite."),
        (["--learning_rate", "1e300"], "--learning_rate 1e300: it must be at most 1,000,000,000,000."),
        (["--max_grad_norm", "1e13"], "--max_grad_norm 1e13: it must be at most 1,000,000,000,000."),
        (["--learning_rate", "3e38"], "--learning_rate 3e38: it must be at most 1,000,000,000,000."),
        (["--max_grad_norm", "nan"], "--max_grad_norm nan: it must be 0 or more and finite."),
        (["--max_grad_norm", "-1"], "--max_grad_norm -1: it must be 0 or more and finite."),
        (["--adam_beta1", "1.0"], "--adam_beta1 1.0: it must be at least 0 and less than 1."),
    ],
)
def test_the_answer_has_the_number_as_it_was_typed(words, answer):
    assert refused(*words) == answer


# Answers.


def test_an_unknown_flag_names_the_nearest():
    assert refused("--learning_rat", "1e-4") == "there is no flag --learning_rat. Did you mean --learning_rate?"
    assert refused("--rnak=4") == "there is no flag --rnak. Did you mean --rank?"
    assert refused("--no-center_corp") == "there is no flag --no-center_corp. Did you mean --no-center_crop?"
    assert refused("--xyzzy") == "there is no flag --xyzzy. See --help."
    assert "stray" in refused("stray")


def test_flags_are_not_abbreviated():
    assert refused("--learn", "1e-4").startswith("there is no flag --learn.")
    with pytest.raises(InputError):
        parse("--center")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--lr_scheduler", "cosin"], "--lr_scheduler: invalid choice: 'cosin'"),
        (["--rank"], "--rank: expected one argument"),
        (["--center_crop=1"], "--center_crop"),
    ],
)
def test_other_mistakes_are_reported_with_their_flag(words, answer):
    assert answer in refused(*words)


def test_help_shows_the_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help", "--config", "void.yaml")
    assert end.value.code == 0
    lines = {
        line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines() if line.strip()
    }
    assert lines["--rank"] == "N dimension of the update matrices (default: 4)"
    assert lines["--seed"] == "N makes a run reproducible"
    assert lines["--max_grad_norm"] == "X clip the gradient (default: 1.0)"
    assert lines["--negative_prompt"] == "NAME"  # its help is on a separate line, without a default
    assert "default: []" not in str(lines)
    assert "default: False" not in str(lines)


# --config


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and returns the flag that reads it."""

    def write(text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"--config={path}"

    return write


def test_config_is_read_and_the_command_line_wins(config):
    flag = config(
        "rank: 8\nlearning_rate: 1e-3\ncenter_crop: true\nrandom_flip: true\nallow_tf32: false\nmixed_precision:\n"
        "prompts:\n- a red axe\n- 'yes'\nseed: 7\nnegative_prompt: -blurry\n"
    )
    args = parse(flag, "--rank", "2", "--no-random_flip", "--seed=0")
    assert (args.rank, args.seed, args.learning_rate) == (2, 0, 1e-3)
    assert (args.center_crop, args.random_flip, args.allow_tf32, args.mixed_precision) == (True, False, False, None)
    assert (args.prompts, args.negative_prompt) == (["a red axe", "yes"], "-blurry")
    assert parse(flag, "--prompts", "a blue axe").prompts == ["a blue axe"]


def test_an_empty_config_says_nothing(config):
    assert vars(parse(config("# only a comment\n"))) | {"config": None} == vars(parse())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("rnak: 4", "there is no flag 'rnak'. Did you mean rank?"),
        ("4: 4", "there is no flag '4'."),
        ("help: true", "there is no flag 'help'"),
        ("config: other.yaml", "there is no flag 'config'"),
        ("rank: four", "--rank four: it must be a whole number, 1 or more."),
        ("rank: 0", "--rank 0: it must be 1 or more."),
        ("learning_rate: .nan", "--learning_rate .nan: it must be more than 0 and finite."),
        ("rank: [1, 2]", "takes one value, not 2"),
        ("lr_scheduler: cosin", "invalid choice: 'cosin'"),
        ("rank: true", "--rank true: it must be a whole number, 1 or more."),
        ("rank: 0x1F", "--rank 0x1F: it must be a whole number, 1 or more."),
        ("center_crop: 1", "'center_crop' is a switch: write true or false, not 1."),
        ("center_crop: truee", "'center_crop' is a switch: write true or false, not truee."),
        ("center_crop: [true]", "'center_crop' is a switch: write true or false"),
        ("prompts: {a: b}", "'prompts' must be one value or a list of values"),
        ("prompts: [a, [b]]", "'prompts' must be one value or a list of values"),
        ("prompts: [a, null]", "'prompts' must be one value or a list of values"),
        ("rank: 4\nseed: 1\nrank: 8", "'rank' is written in lines 1 and 3. Keep one of them."),
        ("- rank\n- 4", "it must hold one flag per line"),
        ("rank: 4: 5", "it can't be read as YAML"),
        (b"rank: \xff\xfe", "it can't be read (it is not UTF-8 text"),
    ],
)
def test_a_bad_config_is_reported_with_its_name(config, tmp_path, text, answer):
    message = refused(config(text))
    assert answer in message
    assert message.startswith(str(tmp_path / "run.yaml"))


def test_a_config_that_is_not_there(tmp_path):
    line = f"{tmp_path}/weapons.yml: there is no such file (--config)."
    assert refused(f"--config={tmp_path}/weapons.yml") == line
    (tmp_path / "weapons.yaml").write_text("rank: 4")
    assert refused(f"--config={tmp_path}/weapons.yml") == f"{line} Did you mean {tmp_path}/weapons.yaml?"
    assert (
        refused(f"--config={tmp_path}/void/run.yaml") == f"{tmp_path}/void/run.yaml: there is no such file (--config)."
    )
    assert refused(f"--config={tmp_path}") == f"{tmp_path}: it can't be read (Is a directory; --config)."


def test_a_mistake_on_the_command_line_is_not_the_files(config, tmp_path):
    assert refused(config("rank: 8"), "--rank", "0") == "--rank 0: it must be 1 or more."


WORDS = [
    "007",
    "12:30",
    "1_000",
    "0x1F",
    "1.10",
    "no",
    "off",
    "TRUE",
    "010",
    "2024-01-15",
    "2024-99-99",
    ".inf",
    "1e3",
    "=",
    "~x",
]


@pytest.mark.parametrize("word", WORDS)
def test_the_text_of_a_config_keeps_its_spelling(config, word):
    """YAML would make numbers, truth values and dates of these words."""
    args = parse(config(f"negative_prompt: {word}\nprompts: [{word}, a {word}]\n"))
    assert (args.negative_prompt, args.prompts) == (word, [word, f"a {word}"])
    args = parse(config(f"prompts: {word}\nnegative_prompt: '{word}'"))
    assert (args.negative_prompt, args.prompts) == (word, [word])


def test_numbers_switches_and_choices_of_a_config_mean_what_they_mean_on_the_command_line(config):
    args = parse(
        config(
            "rank: 010\nlearning_rate: 1e-4\nmax_grad_norm: .5\ncenter_crop: yes\nallow_tf32: Off\nmixed_precision: no"
        )
    )
    assert (args.rank, args.learning_rate, args.max_grad_norm) == (10, 1e-4, 0.5)
    assert (args.center_crop, args.allow_tf32, args.mixed_precision) == (True, False, "no")


@pytest.mark.parametrize("text", ["negative_prompt:", "negative_prompt: null", "negative_prompt: ~", "prompts: []"])
def test_what_is_empty_in_a_config_is_not_given(config, text):
    args = parse(config(text))
    assert (args.negative_prompt, args.prompts) == ("", [])


def test_what_a_run_saves_reads_as_it_was(config):
    import yaml

    values = {"negative_prompt": "007", "prompts": ["12:30", "no", "null", "~"], "learning_rate": 1e-5, "rank": 8}
    args = parse(config(yaml.safe_dump(values)))
    assert {name: getattr(args, name) for name in values} == values


@pytest.mark.parametrize("text", ["", " ", "\n", "a\0b"])
def test_an_empty_text_is_no_path(text):
    for kind in (path_text, user_path, output_folder):
        with pytest.raises(argparse.ArgumentTypeError, match="it must be a path, not an empty text"):
            kind(text)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name, reason in (
        ("dangling", f"dangling is a link to {tmp_path / 'gone' / 'folder'}, which does not exist"),
        ("dangling/below", "which does not exist"),
        ("loop", "loop can't be used (Too many levels of symbolic links)"),
        ("file", "file is a file"),
        ("file/below", "file is a file"),
        ("a" * 300, "can't be used (File name too long)"),
    ):
        with pytest.raises(
            argparse.ArgumentTypeError, match=f"it must be a folder that can be made, .*{re.escape(reason)}"
        ):
            output_folder(str(tmp_path / name))
    for name in ("new", "new/below", "link", "link/new"):
        assert output_folder(str(tmp_path / name)) == str(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("prompts: " + "[" * 100_000, "it has more than 50 levels"),
        ("prompts: &a [*a]", "stands for a part that contains the alias"),
        ("a: &a [x, x]\n" + "".join(f"{i}: &{i} [{', '.join([f'*{b}'] * 10)}]\n" for b, i in zip("abcdefg", "bcdefgh")), "its aliases"),
        ("prompts: [null, a red axe]", "must be one value or a list of values"),
        ("prompts:\n  -\n  - a red axe", "must be one value or a list of values"),
        ("prompts: [~]", "must be one value or a list of values"),
        ("a:\n  b:\n    c: 1\n    c: 2", "'c' is written in lines 3 and 4"),
        ("prompts: [{c: 1, c: 2}]", "'c' is written in line 1 twice"),
        ("{rank: 1, rank: 2}", "'rank' is written in line 1 twice"),
    ],
)  # fmt: skip
def test_a_config_is_refused_that_grows_repeats_or_leaves_out(config, text, answer):
    message = refusal_of(small_parser().parse, [config(text)])
    assert answer in message


@pytest.mark.parametrize(
    "items",
    [
        ["a", "--rank", "8"],
        ["--rank"],
        ["-x", "--center_crop"],
        ["--"],
        ["--prompts=b", "--nothing"],
        ["-5", "--config"],
    ],
)
def test_items_of_a_list_are_never_flags(config, items):
    found = parse(config(f"prompts: {items}\n"))
    assert found.prompts == items
    assert (found.rank, found.center_crop) == (4, False)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("rank: [4, 5]", "'rank' takes one value, not 2. Keep one of them."),
        ("learning_rate: [1e-4, --rank, '8']", "'learning_rate' takes one value, not 3. Keep one of them."),
        ("negative_prompt: [a, b]", "'negative_prompt' takes one value, not 2. Keep one of them."),
        (
            "rank: 4\nseed:\t[\n\t1]",
            "it can't be read as YAML in line 2 (found a tab that cannot start any token).",
        ),
        (
            "rank: 4\n\tseed: 1",
            "it can't be read as YAML in line 2 (found a tab that cannot start any token).",
        ),
        ("rank: 4\n---\nrank: 5", "it can't be read as YAML in line 2 (another document starts there)."),
        ("---\nrank: 4\n...\n---\nrank: 5", "it can't be read as YAML in line 4 (another document starts there)."),
    ],
)
def test_the_flag_or_the_line_of_a_mistake_in_a_config_is_named(config, tmp_path, text, answer):
    assert refused(config(text)).endswith(f": {answer}")


def test_a_list_of_one_is_that_value(config):
    assert parse(config("rank: [8]\nnegative_prompt: [--x]\n")).rank == 8


@pytest.mark.parametrize("text", ["-5e-1", "-.5", "-1E+2", "-3.", "-7"])
def test_negative_numbers_are_no_flags(text):
    parser = Parser()
    parser.add_argument("--logit_mean", type=between(-100, 100))
    assert parser.parse_args(["--logit_mean", text]).logit_mean == float(text)


@pytest.mark.parametrize("text", ["-inf", "-nan", "-1e400", "-5e3"])
def test_negative_numbers_out_of_bounds_are_refused_by_the_bounds(text):
    parser = Parser()
    parser.add_argument("--logit_mean", type=between(-100, 100))
    with pytest.raises(InputError, match=f"--logit_mean {text}: it must be from -100 to 100."):
        parser.parse_args(["--logit_mean", text])


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u3000"])
def test_blank_texts_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="it must be a text that is not empty"):
        filled_text(text)
    assert filled_text(" a ") == " a "


@pytest.mark.parametrize(
    "text", ["../../../evil", "/tmp/evil", "a/../../b", "..", "~/logs", "a\\..\\..\\b", "\\evil", "", " "]
)
def test_a_folder_inside_another_never_leads_out_of_it(text):
    with pytest.raises(argparse.ArgumentTypeError):
        inner_folder(text)


@pytest.mark.parametrize("text", ["logs", "a/b", ".", "..logs", "./logs"])
def test_folders_inside_another(text):
    assert inner_folder(text) == text

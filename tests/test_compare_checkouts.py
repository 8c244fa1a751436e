"""compare_checkouts.py finds every kind of difference between two checkouts, except times, machines and paths."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load
from safetensors.torch import save_file

from scripts import compare_checkouts
from scripts.comparing import differences, inputs, items, reading, texts


# Minimal versions of the two commands of a checkout, which print their name and write it into their output folder.
TRAIN = """import argparse, pathlib, sys
parser = argparse.ArgumentParser()
group = parser.add_argument_group("LoRA")
group.add_argument("--rank", type=int, default=4, help="how large it is (default: 4)")
group.add_argument("--output_dir", type=pathlib.Path, default=pathlib.Path("out"))
given, others = parser.parse_known_args()
if "train_data_dir" not in str(others):
    sys.exit("no pictures")
given.output_dir.mkdir(parents=True, exist_ok=True)
with open(given.output_dir / "words.txt", "a") as file:
    file.write("trained by SIDE\\n")
"""


@pytest.fixture
def checkout(tmp_path):
    """Returns a function that makes a checkout with the `changes` {old: new} in its commands."""

    def make(name, changes=()):
        folder = tmp_path / name
        folder.mkdir()
        source = TRAIN
        for old, new in dict(changes).items():
            assert old in source
            source = source.replace(old, new)
        for script in ("train_text_to_image_lora.py", "infer.py"):
            (folder / script).write_text(source)
        return folder

    return make


@pytest.fixture
def compare(tmp_path, capsys):
    """Returns a function that compares two checkouts with the real command, and returns its exit code and its lines."""

    def run(before, after, *names, words=()):
        flags = ["--work_dir", tmp_path / "work", "--jobs", 1, *words, "--items", *names]
        code = compare_checkouts.main([*map(str, ("--before", before, "--after", after, *flags))])
        return code, capsys.readouterr().out.splitlines()

    return run


def test_equal_checkouts_are_equal(checkout, compare):
    code, lines = compare(checkout("a"), checkout("b"), "help", "wrong_flags")
    assert code == 0
    assert [line.split()[:2] for line in lines] == [["help", "equal:"], ["wrong_flags", "equal:"]]


def test_groups_order_and_wrapping_of_help_do_not_matter(checkout, compare):
    rank, folder = TRAIN.splitlines()[3:5]
    regrouped = {f"{rank}\n{folder}": f"{folder}\n{rank.replace('group.', 'parser.')}", '"LoRA"': '"size"'}
    assert compare(checkout("a"), checkout("b", regrouped), "help")[0] == 0


@pytest.mark.parametrize(
    ("item", "changes", "expected"),
    [
        (
            "help",
            {"how large": "how wide"},
            "train: help of --rank: 'how large it is (default: 4)' became 'how wide it is",
        ),
        ("help", {'"--rank", type=int': '"--rank", metavar="N"'}, "flag --rank: '--rank RANK' became '--rank N'"),
        ("help", {'"--rank"': '"--rang"'}, "train: flag --rank: only there before (and 9 more: "),
        ("help", {"(default: 4)": "(default: 8)"}, "(default: 4)' became 'how large it is (default: 8)'"),
        ("wrong_flags", {"no pictures": "no files"}, "stderr of no_data: 'no pictures' became 'no files'"),
        ("wrong_flags", {'sys.exit("no pictures")': "sys.exit(2)"}, "exit code of no_data: 1 became 2"),
        ("wrong_flags", {"words.txt": "word.txt"}, "only before: deepspeed/run/words.txt, hub_offline/run/words.txt,"),
    ],
)
def test_changed_flags_messages_exit_codes_and_files_are_seen(checkout, compare, item, changes, expected):
    code, (line,) = compare(checkout("a"), checkout("b", changes), item)
    assert code == 1
    assert expected in line


def test_with_words_text_may_differ_and_is_listed(checkout, compare, tmp_path):
    a, b, words = checkout("a"), checkout("b", {"how large": "how wide"}), tmp_path / "words.txt"
    code, (line, last) = compare(a, b, "help", words=("--words", words))
    assert code == 0
    assert "texts that differ: 2" in line
    assert last == f"list of the differences of text: {words} (changes of numbers: 0)"
    assert words.read_text() == (
        "# help, train: help of --rank and 1 more\n- how large it is (default: 4)\n+ how wide it is (default: 4)\n"
    )


def test_with_words_a_flag_that_is_gone_still_fails(checkout, compare, tmp_path):
    changes = {'"--rank"': '"--rang"'}
    words = ("--words", tmp_path / "words.txt")
    assert compare(checkout("a"), checkout("b", changes), "help", words=words)[0] == 1


def test_a_run_that_was_begun_before_is_resumed_by_both(checkout, compare, tmp_path):
    code, (line,) = compare(checkout("a", {"SIDE": "before"}), checkout("b", {"SIDE": "after"}), "begun_before")
    assert code == 1
    assert "words.txt: text: line 2: 'trained by before' became 'trained by after'" in line


def test_what_a_commit_left_is_kept(checkout, compare):
    a, b = checkout("a"), checkout("b")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", a, *words], check=True)
    first, second = (compare(a, b, "help")[1][0] for _ in range(2))
    assert "(kept)" not in first
    assert second.count("(kept)") == 1
    (a / "infer.py").write_text("changed")
    assert "(kept)" not in compare(a, b, "help")[1][0]


def test_a_command_that_fails_is_reported_with_its_reason(checkout, compare):
    code, (line,) = compare(
        checkout("a"), checkout("b", {"given.output_dir.mkdir(": "sys.exit('no room') ("}), "plain"
    )
    assert code == 1
    assert line.startswith("plain               FAILED after: no room (see ")


def test_a_file_that_cannot_be_read_is_reported(checkout, compare):
    code, (line,) = compare(checkout("a"), checkout("b", {"words.txt": "about.json"}), "plain")
    assert code == 1
    assert "FAILED after: " in line
    assert "can't be read (JSONDecodeError" in line


def test_an_item_that_is_not_there_is_refused(checkout, compare):
    with pytest.raises(
        compare_checkouts.Failed, match="--items wrongs: there is no such item. There are: help, wrong_"
    ):
        compare(checkout("a"), checkout("b"), "help", "wrongs")


# The files of a training run, and the parts that may differ.


HEADER = {
    "format": "pt", "ss_steps": "12", "modelspec.date": "2026-01-01T00:00:00+00:00", "ss_training_started_at": "1",
}  # fmt: skip
ABOUT = {
    "command": "accelerate launch x.py --rank 4 --seed 7",
    "settings": {"rank": 4},
    "dataset": {"notes": ["2 left out"]},
}
ABOUT |= {"versions": {"torch": "2.13.0"}, "machine": {"system": "Linux-6", "python": "3.11", "precision": "no"}}
REPEAT = {"flags": {"seed": ["7"]}, "machine": {"torch": "2.13.0", "device": "cpu AVX2, 1 threads"}}
SAID = (
    "\rtraining:   0%|          | 0/6 [00:00<?, ?it/s]\rtraining: 100%|####| 6/6 [00:03<00:00, 1.9it/s, loss=0.05]\n"
    "0.71 s a step, 2 min for the 90 left; at most 644 MiB of memory so far\n"
    "LoRA: FOLDER/out/pytorch_lora_weights.safetensors  (model card: FOLDER/out/README.md, 31 s)\n"
)
LEFT = {
    "lora": [1.0, 2.0], "header": HEADER, "chunks": {"prompt": "an axe", "diffusers_version": "0.39.0"}, "pixel": 0,
    "repeat": REPEAT, "metrics": {"step": 1, "train_loss": 0.5, "images_per_second": 3.1}, "about": ABOUT,
    "state": {"state": {"seed": 7, "started_at": 1, "tracker_run_id": "a"}, "settings": {"rank": 4}},
    "yaml": "rank: 4\nseed: 7\n", "card": "# LoRA\n| rank | 4 |\n| seed | 7 |\n", "said": SAID, "code": 0,
    "page": "<head><title>a</title></head><p>Written 2026-01-01 12:00</p><b>Linux-6</b>", "average": [0.0], "cached": "1234",
}  # fmt: skip


@pytest.fixture
def left(tmp_path):
    """Returns a function that writes the folder of a run like `LEFT` with `changes`, and returns what is read from it."""

    def write(name, **changes):
        folder, what = tmp_path / f"plain-{name}", LEFT | changes
        out = folder / "out"
        (out / "checkpoint-6").mkdir(parents=True)
        (out / "cache" / "latents").mkdir(parents=True)
        (out / "cache" / "latents" / f"{what['cached']}.safetensors").write_bytes(name.encode())
        save_file({"unet.a": torch.tensor(what["lora"])}, out / "pytorch_lora_weights.safetensors", what["header"])
        torch.save({"average": torch.tensor(what["average"])}, out / "checkpoint-6" / "ema.pt")
        info = PngInfo()
        for key, value in (what["chunks"] | {"repeat": json.dumps(what["repeat"])}).items():
            info.add_text(key, value)
        Image.new("L", (1, 1), what["pixel"]).save(out / "0.png", pnginfo=info)
        (out / "metrics.jsonl").write_text(json.dumps(what["metrics"]) + "\n")
        (out / "about.json").write_text(json.dumps(what["about"]))
        (out / "checkpoint-6" / "state.json").write_text(json.dumps(what["state"]))
        (out / "run.yaml").write_text(what["yaml"])
        (out / "README.md").write_text(what["card"])
        (out / "report.html").write_text(what["page"])
        (folder / "1.stdout").write_text(what["said"].replace("FOLDER", str(folder)))
        (folder / "1.stderr").write_text("")
        made = {"checkout": f"/checkouts/{name}", "codes": {"1": what["code"]}}
        return reading.read_item(items.Item("plain", {"1": "train"}), folder, made)

    return write


NEXT_TO_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora": [NEXT_TO_ONE, 2.0]}, "pytorch_lora_weights.safetensors: unet.a: differs by 1.19e-07 at most"),
        ({"lora": [1.0]}, "unet.a: (2,) torch.float32 became (1,) torch.float32"),
        ({"average": [-0.0]}, "checkpoint-6/ema.pt: average: differs by 0 at most"),
        ({"header": HEADER | {"ss_steps": "13"}}, "header ss_steps: '12' became '13'"),
        ({"chunks": {"prompt": "an axe."}}, "0.png: prompt: 'an axe' became 'an axe.'"),
        ({"pixel": 1}, "0.png: pixels: differs by 1 at most"),
        ({"repeat": REPEAT | {"flags": {"seed": ["8"]}}}, "0.png: repeat.flags.seed[0]: '7' became '8'"),
        ({"metrics": {"step": 1, "train_loss": 0.25}}, "metrics.jsonl: row 0.train_loss: 0.5 became 0.25"),
        ({"metrics": {"step": 1, "loss": 0.5}}, "metrics.jsonl: row 0.train_loss: only there before"),
        ({"about": ABOUT | {"command": "accelerate launch x.py --seed 7"}}, "about.json: command"),
        ({"about": ABOUT | {"dataset": {"notes": ["3 left out"]}}}, "notes[0]: '2 left out' became '3 left out'"),
        ({"state": {"state": {"seed": 7}, "settings": {}}}, "checkpoint-6/state.json: settings.rank: only there before"),
        ({"yaml": "rank: true\nseed: 7\n"}, "run.yaml: rank: 4 became True"),
        ({"card": "# LoRA\n| rank | 8 |\n| seed | 7 |\n"}, "README.md: text: line 2: '| rank | 4 |' became '| rank | 8 |'"),
        ({"page": LEFT["page"].replace("Written", "Made")}, "report.html: text: 'Written DATE' became 'Made DATE'"),
        ({"said": SAID.replace("6/6", "5/6")}, "stdout of 1: line 1: '[progress] training 6/6' became"),
        ({"said": SAID.replace("card", "page")}, "stdout of 1: line 3: 'LoRA: $item/out/"),
        ({"said": "LoRA" + SAID.partition("LoRA")[2]}, "stdout of 1: line 1: '[progress] training"),
        ({"code": 1}, "exit code of 1: 0 became 1"),
        ({"cached": "5678"}, "files: only before: cache/latents/1234.safetensors; only after: cache/latents/5678"),
    ],
)  # fmt: skip
def test_a_difference_is_seen(left, changes, expected):
    found = differences.differences(left("a"), left("b", **changes))
    assert found
    assert expected in str(found[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"header": HEADER | {"modelspec.date": "2027-01-01T00:00:00+00:00", "ss_training_started_at": "2"}},
        {"chunks": {"prompt": "an axe", "diffusers_version": "0.40.0"}, "repeat": REPEAT | {"machine": {"torch": "3"}}},
        {"metrics": LEFT["metrics"] | {"images_per_second": 4.2, "peak_memory_gib": 1.0}},
        {"about": ABOUT | {"versions": {"torch": "2.13.0", "commit": "abc"}, "command": "accelerate launch x.py --seed 7 --rank 4"}},
        {"state": {"state": {"seed": 7, "started_at": 2, "tracker_run_id": "b"}, "settings": {"rank": 4}}},
        {"yaml": "seed: 7\nrank: 4\n", "card": "# LoRA\n| seed | 7 |\n| rank | 4 |\n"},
        {"page": LEFT["page"].replace("2026-01-01 12:00", "2027-02-03 04:05")},
        {"said": SAID.replace("0.71 s", "1.2e+02 s").replace("2 min", "3 h 20 min").replace("644 MiB", "1.2 GiB")},
        {"said": SAID.replace("1.9it/s", "2.0s/it").replace("31 s", "104 s")},
        {"said": SAID + "since step 5 a step takes 6 times as long as before: other programs use this machine\n"},
    ],
)  # fmt: skip
def test_times_machines_paths_and_orders_do_not_matter(left, changes):
    assert [*map(str, differences.differences(left("a"), left("b", **changes)))] == []


def test_numbers_that_change_with_words_are_marked(left):
    found = differences.differences(left("a"), left("b", said=SAID.replace("90 left", "80 left")))
    assert "THE NUMBERS DIFFER\n- TIME a step, TIME for the 90 left" in differences.list_of_words({"plain": found})


def test_what_the_commands_are_given_is_the_same_each_time():
    """The folder of the inputs is named after their content, so that kept results are found."""
    for make in (inputs.pictures, inputs.drawing_inputs, inputs.broken_inputs):
        assert make() == make()
    assert load(inputs.safetensors({"a": np.ones((2, 3), np.float32)}, {"b": "c"}))["a"].tolist() == [[1, 1, 1]] * 2


def test_every_line_of_the_tables_is_a_command():
    """Each wrong command has its own label, after which its files are named."""
    known = items.all_items()
    assert len(known) == len({item.name for item in known.values()})
    assert sum(len(item.lines) for item in known.values() if item.may_fail) >= 60
    for item in known.values():
        for label, line in item.lines.items():
            assert line.split()[0] in ("train", "torchrun", "infer") or "=" in line.split()[0], line
            assert label.replace("_", "").isalnum()


def test_the_help_of_argparse_is_read_whole():
    done = subprocess.run(
        [sys.executable, compare_checkouts.__file__, "--help"], capture_output=True, text=True, check=True
    )
    found = texts.help_entries(done.stdout)
    assert found["flag --items"] == "--items NAME [NAME ...]"
    assert found["help of --after"] == ("the later checkout (default: this one)",)
    assert sum(key.startswith("flag") for key in found) == 7

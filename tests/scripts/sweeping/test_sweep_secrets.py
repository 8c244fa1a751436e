"""A token for the trials of a sweep reaches them, but is in no file and no message of the sweep."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts import sweep
from scripts.sweeping.settings import SweepError
from text_to_image_lora import redaction


TOKEN = "it's a 'secret' tokén \"99\\xyz\""  # every quote, and letters that JSON escapes
PLAIN = "supersecrettoken99xyz"
FLAGS = ["validation_split=0.1", "train_data_dir=a", "max_train_steps=2"]


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch):
    monkeypatch.setattr(redaction, "SECRETS", set())
    monkeypatch.setattr(sys, "argv", ["sweep.py"])


@pytest.fixture
def launcher(tmp_path):
    """Notes the words of each trial outside of the sweep, trains, and then prints its words as a failed launcher would."""
    path = tmp_path / "launcher.py"
    path.write_text(
        "import json, subprocess, sys\n"
        f"open({str(tmp_path / 'words.jsonl')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"done = subprocess.run([sys.executable, {str(ROOT / 'tests/sweep_launcher.py')!r}, *sys.argv[1:]])\n"
        "print('the command', *sys.argv[1:])\nsys.exit(done.returncode)\n"
    )
    return f"{sys.executable} {path}"


def words_of_trials(tmp_path):
    return [json.loads(line) for line in (tmp_path / "words.jsonl").read_text().splitlines()]


def run(*words):
    return subprocess.run(
        [sys.executable, "scripts/sweep.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def assert_nowhere(folder, *texts):
    escaped = {form for text in texts for form in (text, json.dumps(text)[1:-1], text.replace("'", "'\"'\"'"))}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not [form for form in escaped if form.encode() in path.read_bytes()], path


@pytest.mark.parametrize("token", [PLAIN, TOKEN, "xq"])
@pytest.mark.parametrize("where", ["command", "file"])
def test_a_token_reaches_the_trials_but_no_file(tmp_path, launcher, token, where, capsys):
    folder, recipe = tmp_path / "sweep", tmp_path / "sweep.yaml"
    recipe.write_text(json.dumps({"flags": {"hub_token": token}} if where == "file" else {"seed": 0}))
    words = [recipe, "--sweep_dir", folder, "--launcher", launcher, "--sweep", "rank=2,4", "--flags", *FLAGS]
    words += [f"hub_token={token}"] if where == "command" else []
    sweep.main([*map(str, words)])
    said = capsys.readouterr()
    assert all(words[words.index("--hub_token") + 1] == token for words in words_of_trials(tmp_path))
    assert "--hub_token '***'" in (folder / "trial-0001" / "command.txt").read_text()
    assert "--hub_token '***'" in (folder / "results.md").read_text()
    assert token not in said.out + said.err
    if len(token) > 3:  # shorter texts are in many files by chance
        assert_nowhere(folder, token)
    assert "hub_token" not in (folder / "trials.log").read_text()


def test_a_sweep_goes_on_with_another_token(tmp_path, launcher):
    words = ["--sweep_dir", str(tmp_path / "sweep"), "--launcher", launcher, "--sweep", "rank=2", "--flags", *FLAGS]
    for token in ([f"hub_token={PLAIN}"], ["hub_token=another-token"], []):
        sweep.main([*words, *token])
    assert len(words_of_trials(tmp_path)) == 1


def test_tokens_in_other_flags_and_in_the_launcher_are_masked_too(tmp_path, launcher, capsys):
    folder, address = tmp_path / "sweep", "https://me:pass-phrase@example.com/axes?token=query-token"
    launcher = f"env WANDB_API_KEY={PLAIN} {launcher}"
    words = ["--launcher", launcher, "--sweep", "rank=2", "--flags", *FLAGS, f"dataset_name={address}"]
    sweep.main(["--sweep_dir", str(folder), *words])
    sweep.main(["--sweep_dir", str(folder), *words])  # the stored settings are equal
    assert address in words_of_trials(tmp_path)[0]
    said = capsys.readouterr()
    assert_nowhere(folder, PLAIN, "pass-phrase", "query-token")
    assert not [text for text in (PLAIN, "pass-phrase", "query-token") if text in said.out + said.err]


def test_a_sweep_of_an_earlier_version_goes_on_and_names_its_token(tmp_path, launcher, monkeypatch, capsys):
    from scripts.sweeping import study

    words = ["--sweep_dir", str(tmp_path / "sweep"), "--launcher", launcher, "--sweep", "rank=2", "--flags", *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(study, "without_secrets", lambda flags: flags)
        sweep.main([*words, f"hub_token={PLAIN}"])
    sweep.main([*words, f"hub_token={PLAIN}"])
    said = capsys.readouterr()
    assert "trials.log: an earlier version wrote a token into it. Revoke the token." in said.err
    assert len(words_of_trials(tmp_path)) == 1


@pytest.mark.parametrize(
    "varied",
    [
        f"hub_token={PLAIN},another-token",
        f"trigger_word=axe,{PLAIN}",
        f"dataset_name=https://me:{PLAIN}@example.com/a",
    ],
)
def test_secrets_cannot_be_varied(tmp_path, varied):
    flags = [*FLAGS, f"hub_token={PLAIN}"] if varied.startswith("trigger") else FLAGS[:1]
    name = varied.partition("=")[0]
    with pytest.raises(SweepError, match=f"{name} can't be varied: its values are or contain secrets"):
        sweep.main(["--sweep_dir", str(tmp_path / "sweep"), "--sweep", varied, "--flags", *flags])
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--sweep", "rank=2", f"--hub_token={PLAIN}"],
        ["--sweep", "rank=2", "--hub_token", PLAIN],
        ["--sweep", "rank=2", "--flags", f"--hub_token={PLAIN}"],
        ["--sweep", "rank=2", "--flags", f"hub_token:{PLAIN}"],
        ["--sweep", "rank=2", "--flags", f"hub_token={PLAIN}", f"rank={PLAIN}"],
        ["--sweep", f"rank={PLAIN}", "--flags", f"hub_token={PLAIN}", *FLAGS],
        ["--sweep", "rank=2", "--launcher", f"env HF_TOKEN={PLAIN} '", "--flags", *FLAGS],
    ],
)
def test_no_refusal_tells_a_token(tmp_path, words):
    done = run("--sweep_dir", tmp_path / "sweep", *words)
    assert done.returncode == 2
    assert PLAIN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("value", [[PLAIN], {"a": PLAIN}, {PLAIN: "a"}])
@pytest.mark.parametrize("group", ["flags", "sweep"])
def test_no_refusal_tells_a_token_of_a_file(tmp_path, value, group):
    recipe = tmp_path / "sweep.yaml"
    groups = {"sweep": {"rank": ["2"]}, "flags": {"validation_split": "0.1"}}
    groups[group]["hub_token"] = value
    recipe.write_text(json.dumps(groups | {"sweep_dir": str(tmp_path / "sweep")}))
    done = run(recipe)
    assert done.returncode == 2
    assert PLAIN not in done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["sweep.yaml"]

"""The hub on a loopback port: what is uploaded, failed uploads, and datasets in the form of the hub."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import datasets
import httpx
import pytest
import torch
import wandb
import yaml
from conftest import ROOT, read_lora, read_metrics, read_records, run_command, words_of_run, write_pictures
from loopback_hub import (
    FailingHub,
    Hub,
    Repositories,
    Slow,
    Storage,
    environment,
    serving,
    taken_for_the_hub,
    uploaded,
)

from scripts.comparing.wandb_record import read_wandb
from text_to_image_lora import hub as hub_client
from text_to_image_lora.errors import InputError, TrainingError
from text_to_image_lora.training.checkpoint import find_damage


SECRET = "hf_TopSecretTokenOfTheTest"
PROMPTS = ["a red axe", "a blue axe"]


def test_push_to_hub_uploads_weights_card_and_pictures_only(train, tmp_path, capfd):
    with serving(Hub) as server, taken_for_the_hub(server):
        out = train(
            push_to_hub=True, hub_model_id="me/axes", hub_token=SECRET, validation_prompts=PROMPTS, report_to="wandb",
            save_every_n_epochs=1, validation_steps=1, output_kohya_format=True,
        )  # fmt: skip
    wandb.teardown()  # the process of W&B writes its file shortly after the end of a run
    said = capfd.readouterr()
    assert "uploaded: " in said.out
    assert "/me/axes/commit/abc" in said.out
    files = uploaded(server)
    pictures = [f"validation/step-000002/prompt-0{k}-0.png" for k in (0, 1)]
    assert set(files) == {"pytorch_lora_weights.safetensors", "out.safetensors", "README.md", *pictures}
    for name, content in files.items():
        assert content == (out / name).read_bytes()
    card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert [(row["text"], row["output"]["url"]) for row in card["widget"]] == list(zip(PROMPTS, pictures))
    # The folder also contains files that must not be uploaded.
    assert {path.name for path in out.iterdir()} >= {
        "run.yaml", "metrics.jsonl", "checkpoint-2", "wandb", "validation",
    }  # fmt: skip
    for method, path, headers, body in server.seen:
        assert method == "GET" or headers["Authorization"] == f"Bearer {SECRET}"
        assert {name.lower() for name, value in headers.items() if SECRET in value} <= {"authorization"}
        assert SECRET.encode() not in body + path.encode()
    assert SECRET not in said.out + said.err
    for path in out.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_failed_upload_is_reported(train, tmp_path):
    fails = pytest.raises(TrainingError, match=r"^The upload failed \(.*500.*\). Everything is in ")
    with serving(FailingHub, failing=("/api/repos/create", 500)) as server, taken_for_the_hub(server), fails as caught:
        train(push_to_hub=True, hub_model_id="me/axes", hub_token=SECRET)
    assert "\n" not in str(caught.value)
    assert len(read_lora(tmp_path / "out")) == 60


def test_a_failing_upload_loses_nothing(arguments, train, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = dict(push_to_hub=True, hub_model_id="me/axes", report_to="wandb")
    with serving(FailingHub, failing=("/commit/main", 403)) as server:
        done = run_command(arguments(hub_token=SECRET, **flags), env=environment(server, tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train_text_to_image_lora.py: The upload failed (")
    assert "403" in last
    assert f"Everything is in {out}: run the same command again" in last
    assert SECRET not in done.stdout + done.stderr
    assert len(read_lora(out)) == 60
    assert len(read_metrics(out)) == 2
    assert (out / "checkpoint-2" / "state.json").is_file()
    # The W&B run is finished, and its folder is logged.
    assert "wandb sync" in done.stdout
    (run,) = (out / "wandb").glob("offline-run-*")
    assert [record.exit.exit_code for record in read_wandb(run) if record.HasField("exit")] == [0]
    # The next call of the command uploads it without training again.
    before = (out / "pytorch_lora_weights.safetensors").read_bytes()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with serving(Hub) as server, taken_for_the_hub(server):
        train(**flags)
    assert "uploaded: " in capsys.readouterr().out
    assert uploaded(server).keys() == {"pytorch_lora_weights.safetensors", "README.md"}
    assert uploaded(server)["pytorch_lora_weights.safetensors"] == before
    assert {headers["Authorization"] for method, _, headers, _ in server.seen if method == "POST"} == {
        f"Bearer {SECRET}"
    }
    assert len(read_metrics(out)) == 2


class Silent(Hub):
    """Never answers the requests whose path ends as the server's `silent`."""

    def do_POST(self):
        if self.path.endswith(self.server.silent):
            self.server.given_up.wait(60)
        super().do_POST()


def end_requests():
    """Waits for the threads whose answer is not awaited any more; their retries would close the client of the next test."""
    for thread in threading.enumerate():
        if thread.name == hub_client.REQUEST:
            thread.join(60)


@pytest.mark.parametrize("silent", ["/repos/create", "/preupload/main", "/commit/main"])
def test_a_silent_server_ends_an_upload(train, tmp_path, monkeypatch, silent):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(hub_client, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(hub_client, "UPLOAD_SECONDS", 1)
    monkeypatch.setattr(hub_client, "SLOWEST_UPLOAD", 1e9)  # the report has more than a megabyte
    given_up = threading.Event()
    with serving(Silent, silent=silent, given_up=given_up) as server, taken_for_the_hub(server):
        with pytest.raises(
            TrainingError, match="The upload failed .the server did not answer completely within 1"
        ) as end:
            train(push_to_hub=True, hub_model_id="me/axes")
        given_up.set()
        end_requests()
    assert "run the same command again to upload it" in str(end.value)
    assert len(read_lora(tmp_path / "out")) == 60


@pytest.fixture
def parquet(tmp_path):
    """Returns a dataset like svjack/pokemon-blip-captions-en-zh: pictures in a parquet file, with two caption columns."""
    folder = write_pictures(tmp_path / "plain")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": (folder / row["file_name"]).read_bytes(), "path": None} for row in rows],
            "en_text": [row["text"] for row in rows],
            "zh_text": [f"斧 {k}" for k in range(len(rows))],
        },
        features=datasets.Features(
            {"image": datasets.Image(), "en_text": datasets.Value("string"), "zh_text": datasets.Value("string")}
        ),
    )
    (tmp_path / "pokemon" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "pokemon" / "data" / "train-00000-of-00001.parquet")
    return folder, tmp_path / "pokemon"


def test_a_parquet_dataset_trains_like_the_same_pictures_in_a_folder(train, parquet, tmp_path):
    plain, pokemon = parquet
    a = train(train_data_dir=plain, output_dir=tmp_path / "a")
    b = train(
        train_data_dir=None, dataset_name=pokemon, caption_column="en_text", image_column="image",
        cache_dir=tmp_path / "hf", output_dir=tmp_path / "b",
    )  # fmt: skip
    first, second = read_lora(a), read_lora(b)
    assert all(torch.equal(first[key], second[key]) for key in first)
    chinese = read_records(dataset_name=str(pokemon), caption_column="zh_text", cache_dir=tmp_path / "hf")
    assert chinese["captions"][0] == ["斧 0"]


@pytest.mark.long
def test_model_and_dataset_by_their_names_on_the_hub(tiny_sd, arguments, train, parquet, tmp_path):
    plain, pokemon = parquet
    (tmp_path / "root" / "owner").mkdir(parents=True)
    shutil.copytree(tiny_sd, tmp_path / "root" / "owner" / "tiny")
    shutil.copytree(pokemon, tmp_path / "root" / "owner" / "pokemon")
    words = arguments(
        pretrained_model_name_or_path="owner/tiny", train_data_dir=None, dataset_name="owner/pokemon",
        caption_column="en_text", output_dir=tmp_path / "hub",
    )  # fmt: skip
    with serving(Repositories, root=tmp_path / "root") as server:
        done = run_command(words, env=environment(server, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    a, b = read_lora(tmp_path / "hub"), read_lora(train(train_data_dir=plain))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])
    card = (tmp_path / "hub" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "owner/tiny"
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["owner/pokemon"]
    # The second time without a network.
    words[words.index("--output_dir") + 1] = str(tmp_path / "offline")
    done = run_command(words, env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    c = read_lora(tmp_path / "offline")
    assert all(torch.equal(a[key], c[key]) for key in a)


def test_a_missing_dataset_is_reported_without_a_network(arguments, tmp_path):
    """The client would retry for half a minute; nothing listens on port 9."""
    words = arguments(train_data_dir=None, dataset_name="nobody/nothing", output_dir=tmp_path / "out")
    done = run_command(words, env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, timeout=20)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "nobody/nothing: neither a local folder nor a hub dataset" in done.stderr
    assert not (tmp_path / "out").exists()


# Checkpoints.


CHECKPOINTS = dict(push_checkpoints_to_hub=True, hub_model_id="owner/axes", hub_token=SECRET, max_train_steps=6)
ADDRESS = "hf://owner/axes"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that stores uploads, used in place of the real one; downloads are written to a folder of the test."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with serving(Storage, root=tmp_path / "root") as server, taken_for_the_hub(server):
        yield server


def names_of(folder):
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def test_checkpoints_go_to_the_hub_and_a_new_machine_resumes_from_them(train, hub, tmp_path, capsys):
    """Both machines run one command; the first finds no checkpoint and starts."""
    words = CHECKPOINTS | dict(checkpointing_steps=2, checkpoints_total_limit=1, resume_from_checkpoint=ADDRESS)
    train(output_dir=tmp_path / "first", **words | dict(max_train_steps=4))
    assert f"{ADDRESS}: there is no checkpoint yet, so a new run begins" in capsys.readouterr().out
    stored = hub.root / "owner" / "axes"
    assert names_of(stored) == ["checkpoint-2", "checkpoint-4"]
    assert find_damage(stored / "checkpoint-2") is None
    created = [json.loads(body) for _, path, _, body in hub.seen if path == "/api/repos/create"]
    assert {row["visibility"] for row in created} == {"private"}
    train(output_dir=tmp_path / "second", **words)
    said = capsys.readouterr()
    assert f"resuming from {tmp_path}/second/checkpoint-4 (step 4)" in said.out
    straight = read_lora(train(max_train_steps=6, output_dir=tmp_path / "straight"))
    second = read_lora(tmp_path / "second")
    assert all(torch.equal(straight[key], second[key]) for key in straight)
    assert names_of(stored) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    # The token is sent only in the authorization header.
    assert SECRET not in said.out + said.err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    for _, path, _, body in hub.seen:
        assert SECRET.encode() not in body + path.encode()


def test_a_damaged_checkpoint_on_the_hub_is_passed_over(train, hub, tmp_path, capsys):
    train(**CHECKPOINTS | dict(max_train_steps=4, checkpointing_steps=2))
    (hub.root / "owner" / "axes" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    options = dict(output_dir=tmp_path / "second", max_train_steps=4, resume_from_checkpoint=ADDRESS)
    train(**options)
    said = capsys.readouterr().out
    assert (
        "checkpoint-4: this checkpoint is damaged (optimizer.pt has changed since it was written) and is skipped"
        in said
    )
    assert f"resuming from {tmp_path}/second/checkpoint-2 (step 2)" in said


class LoginPage(Storage):
    """Answers requests for files whose path contains `server.hidden` with a page, as the network of a hotel does."""

    def do_GET(self):
        if "/resolve/" not in self.path or self.server.hidden not in self.path:
            super().do_GET()
            return
        page = b"<html>Please log in</html>" + self.path.encode()
        self.send_response(200)
        headers = {"X-Repo-Commit": "a" * 40, "ETag": f'"{len(page)}"', "Content-Length": str(len(page))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    do_HEAD = do_GET


class Page(Repositories):
    """Answers requests for some files with a web page and headers like the hub's, and requests for others with the files."""

    def do_GET(self):
        if not re.search(self.server.hidden, self.path):
            super().do_GET()
            return
        page = b"<html>Please log in</html>"
        self.send_response(200)
        headers = LIKE_THE_HUB | {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(page))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    do_HEAD = do_GET


@pytest.mark.parametrize(
    "hidden",
    [
        "resolve.*/model_index.json",
        pytest.param("resolve.*/tokenizer_config.json", marks=pytest.mark.long),
        pytest.param("resolve.*/unet/.*safetensors", marks=pytest.mark.long),
    ],
)
def test_a_page_does_not_stay_in_the_hubs_cache(tiny_sd, pictures, tmp_path, hidden):
    """With the page in the cache, the model would be refused for ever."""
    shutil.copytree(tiny_sd, tmp_path / "root" / "owner" / "tiny")
    words = words_of_run("owner/tiny", pictures, tmp_path, max_train_steps=1)
    with serving(Page, root=tmp_path / "root", hidden=hidden) as server:
        env = environment(server, tmp_path) | {"ACCELERATE_USE_CPU": "true"}
        done = run_command(words, env=env)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "owner/tiny" in done.stderr
        assert "answered with a web page" in done.stderr
        cached = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
        assert not [path for path in cached if b"log in" in path.read_bytes()]
        server.hidden = "nothing"
        done = run_command(words, env=env)
        assert done.returncode == 0, done.stderr
    assert read_lora(tmp_path / "out")


class Busy(Storage):
    """Is too busy for files, and asks to come back tomorrow."""

    def do_GET(self):
        if "/resolve/" not in self.path:
            super().do_GET()
            return
        self.send_response(429)
        name, value = self.server.sent
        self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET


@pytest.mark.parametrize(
    "sent",
    [("Retry-After", "86400"), ("RateLimit", '"api";r=0;t=3000'), ("Retry-After", "Wed, 21 Oct 2099 07:28:00 GMT")],
)
def test_a_busy_hub_makes_nobody_wait_until_tomorrow(train, tmp_path, monkeypatch, sent):
    from huggingface_hub.utils import _http

    (tmp_path / "root" / "owner" / "axes" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "root" / "owner" / "axes" / "checkpoint-3" / "manifest.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    pauses = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=pauses.append, time=time.time))
    refused = pytest.raises(InputError, match="checkpoint-3 can't be downloaded")
    with serving(Busy, root=tmp_path / "root", sent=sent) as server, taken_for_the_hub(server), refused:
        train(resume_from_checkpoint=ADDRESS)
    assert pauses
    assert max(pauses) <= 60


@pytest.mark.parametrize("hidden", ["adapter", "manifest"])
def test_a_page_instead_of_a_checkpoint_is_not_kept(train, tmp_path, monkeypatch, hidden):
    """A new run would upload its checkpoints over those that the network hides, and the cache would keep the page."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    straight = read_lora(train(max_train_steps=5, output_dir=tmp_path / "straight"))
    (tmp_path / "root").mkdir()
    with serving(LoginPage, root=tmp_path / "root", hidden="nothing") as server, taken_for_the_hub(server):
        train(**CHECKPOINTS | dict(max_train_steps=3), output_dir=tmp_path / "first")
        server.hidden = hidden
        words = dict(output_dir=tmp_path / "second", max_train_steps=5, resume_from_checkpoint=ADDRESS)
        with pytest.raises(InputError, match="none of its checkpoints is intact"):
            train(**words)
        assert not (tmp_path / "second").exists()
        server.hidden = "nothing"
        train(**words)
    resumed = read_lora(tmp_path / "second")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_a_newer_checkpoint_here_goes_before_the_hubs(train, hub, tmp_path, capsys):
    train(**CHECKPOINTS | dict(max_train_steps=2))
    train(max_train_steps=3)
    capsys.readouterr()
    train(max_train_steps=4, resume_from_checkpoint=f"{ADDRESS}/")
    assert f"resuming from {tmp_path}/out/checkpoint-3 (step 3)" in capsys.readouterr().out
    train(max_train_steps=4, resume_from_checkpoint=f"{ADDRESS}/checkpoint-2", output_dir=tmp_path / "named")
    assert f"resuming from {tmp_path}/named/checkpoint-2 (step 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner", "write hf://owner/name or hf://owner/name/checkpoint-500"),
        ("hf://owner/axes/checkpoint-7", "there is no such checkpoint. There are: checkpoint-2."),
    ],
)
def test_an_address_that_leads_nowhere_is_reported(train, hub, tmp_path, address, message):
    train(**CHECKPOINTS | dict(max_train_steps=2))
    with pytest.raises(InputError, match=re.escape(message)):
        train(resume_from_checkpoint=address, output_dir=tmp_path / "second")


def test_without_a_network_the_newest_here_is_taken(train, tmp_path, capsys):
    """If there is no local checkpoint, starting over would be a surprise."""
    with serving(FailingHub, failing=("", 500)) as server, taken_for_the_hub(server):
        with pytest.raises(InputError, match="the checkpoints can't be listed .*500"):
            train(resume_from_checkpoint=ADDRESS)
        train(max_train_steps=2)
        train(max_train_steps=3, resume_from_checkpoint=ADDRESS)
    said = capsys.readouterr().out
    assert f"{ADDRESS} can't be reached (" in said
    assert "using the newest local checkpoint" in said
    assert "checkpoint-2 (step 2)" in said


def test_an_upload_that_fails_stops_no_training(train, tmp_path, capsys):
    with serving(FailingHub, failing=("/api/repos/create", 500)) as server, taken_for_the_hub(server):
        out = train(**CHECKPOINTS | dict(max_train_steps=4, checkpointing_steps=2, hub_model_id="me/axes"))
    said = capsys.readouterr().out
    for step in (2, 4):
        assert f"checkpoint-{step} was not uploaded (" in said
    assert len(read_lora(out)) == 60


# Time-outs.


@pytest.mark.parametrize("silent", [1, 2])
def test_a_hub_that_does_not_answer_at_once_is_asked_again(tmp_path, monkeypatch, silent):
    monkeypatch.setattr(hub_client, "HUB_SECONDS", 0.3)
    monkeypatch.setattr(hub_client.time, "sleep", lambda seconds: None)
    (tmp_path / "root" / "owner" / "tiny").mkdir(parents=True)
    with serving(Slow, root=tmp_path / "root", silent=silent, given_up=threading.Event()) as server:
        with taken_for_the_hub(server):
            hub_client.ask_hub("owner/tiny", "model")
            assert len(server.seen) == silent + 1
            server.seen.clear()
            server.silent = 3
            with pytest.raises(httpx.TimeoutException):
                hub_client.ask_hub("owner/tiny", "model")
            assert len(server.seen) == 3
        server.given_up.set()


class Dripping(Repositories):
    """Sends a byte at a time, which no timeout between two pieces of an answer notices."""

    def do_GET(self):
        out = self.wfile

        def drip(data):
            for byte in data:
                out.write(bytes([byte]))
                if self.server.given_up.wait(0.1):
                    break

        self.wfile = SimpleNamespace(write=drip if self.drips() else out.write, flush=out.flush)
        try:
            super().do_GET()
        finally:
            self.wfile = out

    def drips(self):
        return self.path.startswith(self.server.slow)


@pytest.mark.parametrize("slow", ["/api/models", "/owner/tiny/resolve"])
def test_a_server_that_drips_is_given_up(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(hub_client, "ANSWER_SECONDS", 1)
    folder = tmp_path / "root" / "owner" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{" + " " * 1000 + "}")
    given_up = threading.Event()
    with serving(Dripping, root=tmp_path / "root", slow=slow, given_up=given_up) as server:
        with taken_for_the_hub(server), pytest.raises(TimeoutError, match="did not answer completely within 1 second"):
            hub_client.hub_file("owner/tiny", "config.json", cache_dir=tmp_path / "cache")
        given_up.set()
        end_requests()
    assert not [path for path in (tmp_path / "cache").rglob("config.json") if path.stat().st_size == 1002]


class Portal(Repositories):
    """A captive portal: answers every request with its own page."""

    def do_GET(self):
        page = b"<html>Please log in</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        for name, value in self.server.sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    do_HEAD = do_GET


class Truncated(Repositories):
    """Announces more bytes than it sends."""

    def send_header(self, name, value):
        super().send_header(name, str(int(value) + 100) if name == "Content-Length" else value)

    def do_GET(self):
        super().do_GET()
        self.close_connection = True

    do_HEAD = Repositories.do_HEAD


LIKE_THE_HUB = {"ETag": '"abc"', "X-Repo-Commit": "a" * 40}


@pytest.mark.parametrize(("kind", "headers"), [(Portal, {}), (Portal, LIKE_THE_HUB), (Truncated, {})])
@pytest.mark.parametrize("command", ["train", "infer"])
def test_an_answer_that_is_not_the_hubs_is_one_line(tmp_path, pictures, kind, headers, command):
    folder = tmp_path / "root" / "owner" / "tiny"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    flags = {
        "train": ["train_text_to_image_lora.py", "--train_data_dir", pictures, "--resolution", 32],
        "infer": ["infer.py", "--prompt", "a"],
    }[command]
    with serving(kind, root=tmp_path / "root", sent=headers) as server:
        done = subprocess.run(
            [sys.executable, *map(str, flags), "--pretrained_model_name_or_path", "owner/tiny", "--output_dir", tmp_path / "out"],
            cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | environment(server, tmp_path),
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "owner/tiny" in done.stderr
    assert not (tmp_path / "out").exists()

"""The hub on a loopback port: what is uploaded, what happens where that fails, and datasets as the hub keeps them."""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
import torch
import yaml
from conftest import read_lora, read_metrics, run_command, write_pictures
from test_export import Hub
from test_tracking import read_wandb

from text_to_image_lora.records import load_records


SECRET = "hf_TopSecretTokenOfTheTest"
PROMPTS = ["a red axe", "a blue axe"]


class FailingHub(Hub):
    """Answers `server.failing` (a path's end) with a status instead."""

    def do_POST(self):
        path, status = self.server.failing
        if not self.path.endswith(path):
            super().do_POST()
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps({"error": "the server's reason\nin two lines"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


class Repositories(BaseHTTPRequestHandler):
    """The folders `server.root`/owner/name as the hub gives models and datasets out; whatever else is asked is 404."""

    def do_GET(self):
        path, commit = self.path.partition("?")[0], "a" * 40
        match = re.fullmatch(r"(/api)?(/datasets|/models)?(/owner/\w+)(.*)", path)
        content, headers = None, {"X-Repo-Commit": commit}
        if match:
            folder = self.server.root / match[3][1:]
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            place = re.fullmatch(r"/(revision|tree|resolve)/[^/]+/?(.*)", match[4])
            if match[1] and (match[4] == "" or place[1] == "revision"):
                siblings = [{"rfilename": name} for name in files]
                content = json.dumps({"id": match[3][1:], "sha": commit, "siblings": siblings}).encode()
            elif match[1] and place[1] == "tree":
                entries = [
                    {"type": kind, "path": file.relative_to(folder).as_posix(), "oid": commit, "size": 1}
                    for file in (folder / place[2]).rglob("*")
                    for kind in ["file" if file.is_file() else "directory"]
                ]
                content = json.dumps(entries).encode()
            elif place and place[1] == "resolve" and place[2] in files:
                content = files[place[2]].read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            else:
                headers["X-Error-Code"] = "EntryNotFound"
        self.send_response(404 if content is None else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_):
        """Quiet."""


@contextlib.contextmanager
def serving(handler, **attributes):
    """A server on a free port; `seen` keeps its requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(seen=[], **attributes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def environment(server, folder, **more):
    """For a child that is to take the server for the hub."""
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*",
        "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **more,
    }  # fmt: skip


def uploaded(server):
    """{path: content} of the one commit."""
    (commit,) = (body for _, path, _, body in server.seen if path.endswith("/commit/main"))
    rows = [row["value"] for row in map(json.loads, commit.splitlines()) if row["key"] == "file"]
    return {row["path"]: base64.b64decode(row["content"]) for row in rows}


def test_push_to_hub_uploads_weights_card_and_pictures_only(arguments, tmp_path):
    out = tmp_path / "out"
    words = arguments(
        push_to_hub=True, hub_model_id="me/axes", hub_token=SECRET, validation_prompts=PROMPTS, report_to="wandb",
        save_every_n_epochs=1, validation_steps=1,
    )  # fmt: skip
    with serving(Hub) as server:
        done = run_command(words, env=environment(server, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "uploaded: " in done.stdout
    assert "/me/axes/commit/abc" in done.stdout
    files = uploaded(server)
    pictures = [f"validation/step-000002/prompt-0{k}-0.png" for k in (0, 1)]
    assert set(files) == {"pytorch_lora_weights.safetensors", "README.md", *pictures}
    for name, content in files.items():
        assert content == (out / name).read_bytes()
    card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert [(row["text"], row["output"]["url"]) for row in card["widget"]] == list(zip(PROMPTS, pictures))
    # There was more to upload by mistake.
    assert {path.name for path in out.iterdir()} >= {
        "run.yaml",
        "metrics.jsonl",
        "checkpoint-2",
        "wandb",
        "validation",
    }
    for method, path, headers, body in server.seen:
        assert method == "GET" or headers["Authorization"] == f"Bearer {SECRET}"
        assert {name.lower() for name, value in headers.items() if SECRET in value} <= {"authorization"}
        assert SECRET.encode() not in body + path.encode()
    assert SECRET not in done.stdout + done.stderr
    for path in out.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "failing", [("/api/repos/create", 500), ("/commit/main", 403)], ids=["breaks down", "may not"]
)
def test_a_failing_upload_loses_nothing(arguments, tmp_path, failing):
    out = tmp_path / "out"
    words = arguments(push_to_hub=True, hub_model_id="me/axes", hub_token=SECRET, report_to="wandb")
    with serving(FailingHub, failing=failing) as server:
        done = run_command(words, env=environment(server, tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train_text_to_image_lora.py: The upload failed (")
    assert str(failing[1]) in last
    assert f"Everything is in {out}: run the same command again" in last
    assert SECRET not in done.stdout + done.stderr
    assert len(read_lora(out)) == 60
    assert len(read_metrics(out)) == 2
    assert (out / "checkpoint-2" / "state.json").is_file()
    # The W&B run is a finished one, and the user is told where it is.
    assert "wandb sync" in done.stdout
    (run,) = (out / "wandb").glob("offline-run-*")
    assert [record.exit.exit_code for record in read_wandb(run) if record.HasField("exit")] == [0]
    if failing[1] == 500:
        return
    # And the same command again uploads it, without training again.
    before = (out / "pytorch_lora_weights.safetensors").read_bytes()
    words = [word for word in words if word not in ("--hub_token", SECRET)]
    with serving(Hub) as server:
        done = run_command(words, env=environment(server, tmp_path, HF_TOKEN=SECRET))
    assert done.returncode == 0, done.stderr
    assert uploaded(server).keys() == {"pytorch_lora_weights.safetensors", "README.md"}
    assert uploaded(server)["pytorch_lora_weights.safetensors"] == before
    assert {headers["Authorization"] for method, _, headers, _ in server.seen if method == "POST"} == {
        f"Bearer {SECRET}"
    }
    assert len(read_metrics(out)) == 2


@pytest.fixture
def parquet(tmp_path):
    """The layout of svjack/pokemon-blip-captions-en-zh: pictures in the parquet file, two columns of captions."""
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
    chinese = load_records(dataset_name=str(pokemon), caption_column="zh_text", cache_dir=tmp_path / "hf")
    assert chinese["captions"][0] == ["斧 0"]


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


def test_a_dataset_that_is_not_there_is_told_without_a_network(arguments, tmp_path):
    """The client would retry for half a minute; nothing listens on port 9."""
    words = arguments(train_data_dir=None, dataset_name="nobody/nothing", output_dir=tmp_path / "out")
    done = run_command(words, env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, timeout=20)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "nobody/nothing: neither a folder here nor a hub dataset" in done.stderr
    assert not (tmp_path / "out").exists()

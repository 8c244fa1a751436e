"""What a run logs is read back from the files of W&B, TensorBoard and trackio."""

import json
import re
import shlex
import shutil
import socket
import sqlite3
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
from accelerate import Accelerator
from conftest import ROOT, read_metrics, run_command, words_of_run, write_pictures
from loopback_hub import serving
from PIL import Image

from scripts.comparing.wandb_record import history_of, read_wandb
from text_to_image_lora.errors import InputError
from text_to_image_lora.reports import dashboard, panels, tracking
from text_to_image_lora.reports.settings import TRACKERS, TrackingSettings


wandb = pytest.importorskip("wandb")

KEY = "k" * 40
SECRET = "hf_TopSecretTokenOfTheTest"
PROMPTS = ["a red axe", "a blue axe, 日本, 50% off"]
PANELS = [
    "samples/00 a red axe",
    "samples/01 a blue axe, , 50 off",
]  # without characters that file names cannot contain
DETERMINISTIC = ("step", "train_loss", "lr", "grad_norm", "epoch")
NEW = tracking.LoggedProgress()
RUN = dict(rank=3, max_train_steps=3, validation_split=0.34, validation_steps=2)  # of the six pictures, two


def steps_in(folder):
    """Returns the rows of metrics.jsonl that training steps wrote."""
    return [row for row in read_metrics(folder) if "train_loss" in row]


class Refusing(BaseHTTPRequestHandler):
    """A server that answers 401, and appends the paths of requests to `server.seen`."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(self.path)
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture(scope="module")
def refusing_server():
    with serving(Refusing) as server:
        yield server


@pytest.fixture(scope="module")
def offline_run(tiny_sd, tmp_path_factory, refusing_server):
    """Runs the command as typed, with a token and W&B; returns the finished process and the output folder."""
    folder = tmp_path_factory.mktemp("tracked")
    out = folder / "my lora"
    pictures = write_pictures(folder / "pictures")
    words = words_of_run(
        tiny_sd, pictures, folder, output_dir=out, report_to="wandb", checkpointing_steps=2, validation_prompts=PROMPTS,
        validation_inference_steps=1, save_every_n_epochs=1, **RUN,
    )  # fmt: skip
    words.append(f"--hub_token={SECRET}")
    refusing_server.seen.clear()
    # There are a key and a network, but WANDB_MODE overrides them.
    url = f"http://127.0.0.1:{refusing_server.server_port}"
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
    done = run_command(words, env=environment | {"WANDB_DATA_DIR": str(folder / "wandb-data")}, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = (out / "wandb").glob("offline-run-*")
    return SimpleNamespace(done=done, out=out, run=run, pictures=pictures, asked=list(refusing_server.seen))


def test_wandb_gets_the_numbers_of_metrics_jsonl(offline_run):
    rows, history = steps_in(offline_run.out), history_of(read_wandb(offline_run.run))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0].keys() == {*DETERMINISTIC, "images_per_second", "peak_memory_gib"}
    for row in rows:
        assert row.items() <= (history[row["step"]] | {"step": row["step"]}).items()
        assert row["images_per_second"] > 0
        assert 0.1 < row["peak_memory_gib"] < 8


def test_wandb_gets_the_validation_loss_of_each_noise_level(offline_run):
    history = history_of(read_wandb(offline_run.run))
    rows = [row for row in read_metrics(offline_run.out) if "validation/loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 3]
    for row in rows:
        assert sum(name.startswith("validation/relative_loss_t") for name in row) == 8
        assert row.items() <= (history[row["step"]] | {"step": row["step"]}).items()


def test_wandb_gets_a_panel_for_each_prompt_with_the_base_beside(offline_run):
    history = history_of(read_wandb(offline_run.run))
    for p, panel in enumerate(PANELS):
        assert {step for step, row in history.items() if f"{panel}.filenames" in row} == {0, 2, 3}
        for step in (0, 2, 3):
            row = history[step]
            assert row["step"] == step
            assert row[f"{panel}._type"] == "images/separated"
            base = [(0, f"base, seed 0: {PROMPTS[p]}")] if step else []
            expected = [*base, (step, f"step {step}, seed 0: {PROMPTS[p]}")]
            assert row[f"{panel}.captions"] == [caption for _, caption in expected]
            for (drawn_at, _), name in zip(expected, row[f"{panel}.filenames"], strict=True):
                logged = Image.open(offline_run.run / "files" / name)
                saved = Image.open(offline_run.out / "validation" / f"step-{drawn_at:06d}" / f"prompt-{p:02d}-0.png")
                assert logged.tobytes() == saved.tobytes()


def test_wandb_draws_over_the_step_and_keeps_the_best(offline_run):
    metrics = {
        r.metric.name or r.metric.glob_name: r.metric for r in read_wandb(offline_run.run) if r.HasField("metric")
    }
    assert metrics["*"].step_metric == "step"
    assert metrics["validation/relative_loss"].summary.min
    assert metrics["peak_memory_gib"].summary.max
    history = history_of(read_wandb(offline_run.run))
    assert all(row["step"] == step for step, row in history.items())


def test_wandb_summary_holds_the_answer(offline_run):
    summary = {}
    for record in read_wandb(offline_run.run):
        summary |= {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
    (said,) = re.findall("Validation: (.*)", offline_run.done.stdout)
    assert summary["answer"][1:] == said[1:]
    last = [row for row in read_metrics(offline_run.out) if "validation/loss" in row][-1]
    assert summary.get("best_step") == last.get("validation/best_step")
    assert summary["take"] == "best"


def table_in(run, name):
    """Returns the columns and rows of a table in an offline run."""
    (path,) = (run / "files" / "media" / "table").glob(f"{name}_*.table.json")
    table = json.loads(path.read_text())
    return table["columns"], table["data"]


def test_wandb_gets_a_table_of_the_sample_pictures(offline_run):
    columns, rows = table_in(offline_run.run, "samples table")
    assert columns == [*panels.SAMPLES]
    assert [row[:3] for row in rows] == [[step, prompt, 0] for step in (2, 3) for prompt in PROMPTS]
    losses = {row["step"]: row.get("validation/relative_loss") for row in read_metrics(offline_run.out)}
    assert [row[-1] for row in rows] == [losses[2], losses[2], losses[3], losses[3]]
    for step, _, _, *_, change, _ in rows:
        assert 0 < change < 1, step
    (artifact,) = (r.artifact for r in read_wandb(offline_run.run) if "samplestable" in r.artifact.name)
    assert sum(entry.path.endswith(".jpg") for entry in artifact.manifest.contents) == 2 * 3


def test_wandb_gets_the_data_sheet(offline_run):
    columns, rows = table_in(offline_run.run, "data")
    assert columns == [*panels.DATA]
    assert len(rows) == 4  # of the six pictures, two are held out
    captions = [
        json.loads(line)["text"] for line in (offline_run.pictures / "metadata.jsonl").read_text().splitlines()
    ]
    assert {row[1] for row in rows} < set(captions)
    assert all(row[2:5] == ["pictures", "40x32", "32x32"] for row in rows)


def test_wandb_gets_the_lora_files_under_their_names(offline_run):
    found = {}
    for record in read_wandb(offline_run.run):
        if record.artifact.type == "lora":
            (entry,) = record.artifact.manifest.contents
            found[(set(record.artifact.aliases) - {"latest"}).pop()] = (record.artifact.name, entry.path, entry.size)
    sizes = {
        alias: (offline_run.out / place / "pytorch_lora_weights.safetensors").stat().st_size
        for alias, place in {"epoch-1": "epoch-0001", "best": "best", "last": ""}.items()
    }
    assert found == {
        alias: ("my-lora-lora", "pytorch_lora_weights.safetensors", size) for alias, size in sizes.items()
    }
    assert [*found][-1] == "last"  # W&B also gives the newest version the alias "latest"


def test_wandb_gets_the_configuration(offline_run):
    records = read_wandb(offline_run.run)
    config = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    assert config["rank"] == 3
    assert config["learning_rate"] == 1e-2
    assert config["effective_batch_size"] == 2
    assert json.loads(config["target_modules"])[0] == "to_q"
    assert config["validation_prompts"] == json.dumps(PROMPTS)
    assert not any("token" in key for key in config)
    about = json.loads((offline_run.out / "about.json").read_text())
    assert config["command"] == about["command"]
    assert config["dataset/fingerprint"] == about["dataset"]["fingerprint"] == about["settings"]["dataset"]
    assert config["versions/diffusers"] == diffusers.__version__
    assert config.get("versions/commit") == about["versions"].get("commit")
    assert "hub_token" not in about["command"]
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("text2image-fine-tune", "my lora")
    (exit_record,) = (record.exit for record in records if record.WhichOneof("record_type") == "exit")
    assert exit_record.exit_code == 0


def test_the_token_is_nowhere(offline_run):
    (arguments,) = (record.environment.args for record in read_wandb(offline_run.run) if record.environment.args)
    assert "--hub_token=***" in arguments
    files = [path for path in offline_run.out.parent.rglob("*") if path.is_file()]
    assert {"run.yaml", "README.md", "report.html", "about.json", "metrics.jsonl", "debug.log", "state.json"} <= {
        path.name for path in files
    }
    for path in files:
        assert not any(secret.encode() in path.read_bytes() for secret in (SECRET, KEY)), path
    assert SECRET not in offline_run.done.stdout + offline_run.done.stderr


def test_the_last_line_is_a_command_that_works(offline_run):
    last = offline_run.done.stdout.splitlines()[-1]
    words = shlex.split(last.partition("To upload it: ")[2])
    assert words[:2] == ["wandb", "sync"]
    assert [(ROOT / word).resolve() for word in words[2:]] == [offline_run.run.resolve()]
    assert "wandb:" not in offline_run.done.stderr


def test_offline_means_no_requests(offline_run):
    assert offline_run.asked == []


def test_metrics_are_the_same_without_a_tracker(offline_run, train):
    out = train(**RUN)
    for tracked, untracked in zip(read_metrics(offline_run.out), read_metrics(out), strict=True):
        assert list(tracked) == list(untracked)
        for name in tracked.keys() - {"images_per_second", "peak_memory_gib"}:
            assert tracked[name] == pytest.approx(untracked[name], rel=1e-5)
    assert not (out / "wandb").exists()


def test_a_resumed_run_continues_the_same_wandb_run(offline_run, train, tmp_path, capsys):
    out = tmp_path / "my lora"
    shutil.copytree(offline_run.out, out, symlinks=True)
    # As if killed while it wrote the metrics of step 4, with the last checkpoint at step 2.
    shutil.rmtree(out / "checkpoint-3")
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text() + '{"step": 4, "train_lo')
    before = steps_in(offline_run.out)
    train(output_dir=out, report_to="wandb", **RUN | dict(max_train_steps=4))
    wandb.teardown()  # flushes the file, as the end of a process does
    first, second = sorted((out / "wandb").glob("offline-run-*"))
    assert first.name == offline_run.run.name
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]
    rows = steps_in(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[:2] == before[:2]
    assert rows[2]["train_loss"] == pytest.approx(before[2]["train_loss"], rel=1e-5)
    assert history_of(read_wandb(first)).keys() == {0, 1, 2, 3}
    assert history_of(read_wandb(second)).keys() == {4}  # each step is logged once
    last = capsys.readouterr().out.splitlines()[-1]
    assert [Path(word).resolve() for word in shlex.split(last)[-2:]] == [first.resolve(), second.resolve()]


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Makes exactly these trackers importable (as empty packages)."""

    def only(*names):
        for name in TRACKERS:
            monkeypatch.setitem(sys.modules, name, None)
        for name in names:
            monkeypatch.delitem(sys.modules, name)
            (tmp_path / "site" / name).mkdir(parents=True)
            (tmp_path / "site" / name / "__init__.py").touch()
        monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])

    return only


@pytest.mark.parametrize(
    ("there", "report_to", "names"),
    [
        (["wandb", "tensorboard"], None, ["wandb"]),
        (["tensorboard"], None, []),
        (["wandb", "trackio"], "none", []),
        (["wandb", "trackio"], "all", ["wandb", "trackio"]),
        ([], "all", []),
        (["wandb", "trackio", "tensorboard"], "trackio", ["trackio"]),
        (["tensorboard"], "tensorboard", ["tensorboard"]),
    ],
)
def test_trackers_of(installed, there, report_to, names):
    installed(*there)
    assert TrackingSettings(report_to=report_to).trackers == names


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_tracker_is_named_with_its_remedy(installed, name):
    installed()
    how = "--no-deps -r requirements-trackio.txt" if name == "trackio" else name
    with pytest.raises(InputError, match=f"--report_to {name}: it is not installed. Run: pip install {how}$"):
        _ = TrackingSettings(report_to=name).trackers


def test_a_folder_called_wandb_is_not_the_package(installed, tmp_path, monkeypatch):
    installed("tensorboard")
    (tmp_path / "site" / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb")
    assert TrackingSettings().trackers == []


@pytest.fixture
def network(monkeypatch, tmp_path):
    """An environment without key, W&B settings or proxy, and with a port that answers and one that does not."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    wandb.teardown()  # W&B caches the environment
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"127.0.0.1:{server.getsockname()[1]}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        answers = f"127.0.0.1:{server.getsockname()[1]}"
        yield SimpleNamespace(answers=answers, silent=silent, folder=tmp_path)
    wandb.teardown()


def test_wandb_is_offline_without_a_key(network, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{network.answers}")
    assert tracking.wandb_mode() == "offline"


@pytest.mark.parametrize("where", ["environment", "netrc"])
@pytest.mark.parametrize(("place", "mode"), [("answers", "online"), ("silent", "offline")])
def test_wandb_is_online_with_a_key_and_a_network(network, monkeypatch, where, place, mode):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{getattr(network, place)}")
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:  # as `wandb login` writes it
        path = network.folder / "netrc"
        path.write_text(f"machine {getattr(network, place)}\n  login user\n  password {KEY}\n")
        path.chmod(0o600)
    assert tracking.wandb_mode() == mode


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_the_users_own_choice_overrides_the_default(network, monkeypatch, mode):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{network.silent if mode == 'online' else network.answers}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert tracking.wandb_mode() == mode


def test_wandb_offline_and_login_host_are_heeded(network, monkeypatch):
    """`wandb offline` and `wandb login --host` write a settings file."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    settings = network.folder / "wandb-config" / "settings"
    settings.parent.mkdir()
    settings.write_text(f"[default]\nbase_url = http://{network.answers}\n")
    assert tracking.wandb_mode() == "online"
    wandb.teardown()
    settings.write_text(f"[default]\nbase_url = http://{network.answers}\nmode = offline\n")
    assert tracking.wandb_mode() == "offline"


def test_a_proxy_is_a_network(network, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.invalid")
    monkeypatch.setenv("http_proxy", f"http://{network.answers}")
    assert tracking.wandb_mode() == "online"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("WANDB_API_KEY", "short", "40"), ("WANDB_MODE", "sometimes", "mode"), ("WANDB_BASE_URL", "wandb", "base_url")],
)
def test_wrong_wandb_settings_are_explained_in_one_line(network, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as error:
        tracking.wandb_mode()
    assert "--report_to none" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield Accelerator(cpu=True, log_with="wandb")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def test_a_server_that_refuses_leaves_an_offline_run(network, refusing_server, accelerator, monkeypatch, capsys, said):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{refusing_server.server_port}")
    refusing_server.seen.clear()
    run_id = tracking.start_trackers(accelerator, "axes", {"rank": 4}, network.folder, NEW)
    assert "/graphql" in refusing_server.seen
    accelerator.log({"train_loss": 0.5}, step=1)
    tracking.finish_trackers(accelerator)
    (folder,) = (network.folder / "wandb").glob(f"offline-run-*-{run_id}")
    assert shlex.split(said[0])[-1] == str(folder)
    wandb.teardown()  # flushes the file, as the end of a process does
    assert history_of(read_wandb(folder))[1]["train_loss"] == 0.5
    err = capsys.readouterr().err
    assert "rejected the run" in err
    assert KEY not in err


def test_tensorboard_takes_more_pictures_than_the_base_drew(tmp_path):
    """If more pictures are requested when a run is resumed, the missing base pictures are white."""
    added = []
    writer = SimpleNamespace(add_images=lambda name, pictures, step, dataformats: added.append(pictures))
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    samples = [panels.LoggedSample(0, 0, images[0], images[1]), panels.LoggedSample(1, 1, None, images[2])]
    panels.TensorBoard(SimpleNamespace(writer=writer)).show_pictures("samples/00 an axe", "an axe", samples, 3)
    assert added[0].shape == (2, 8, 16, 3)
    assert added[0][1, 0, 0].tolist() == [255] * 3
    assert added[0][1, 0, 8].tolist() == [0, 0, 255]


def test_a_disabled_wandb_logs_nothing(network, accelerator, monkeypatch, said):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracking.start_trackers(accelerator, "axes", {"rank": 4}, network.folder, NEW)
    dashboard.log_pictures(accelerator, {(0, 0): Image.new("RGB", (8, 8))}, {}, ["an axe"], {(0, 0): 7}, 0)
    tracking.finish_trackers(accelerator)
    assert said == []


@pytest.mark.parametrize(("to_send", "waited_for"), [(0, False), (500_000, True)])
def test_uploads_get_more_time(monkeypatch, capsys, to_send, waited_for):
    monkeypatch.setattr(tracking, "SECONDS_TO_FINISH", 0.01)
    tracker = tracking.FailSafeTracker(SimpleNamespace(name="wandb", finish=lambda: time.sleep(0.3)), {})
    tracker.to_send = to_send
    tracker.finish()
    assert ("does not respond" not in capsys.readouterr().err) == waited_for


LONG = "a drawing of a very long prompt, " * 4


def test_tensorboard_gets_numbers_pictures_and_words(train, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not among the requirements")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(report_to="tensorboard", validation_prompts=[f"{LONG} 1", f"{LONG} 2"], num_validation_images=2)
    rows = read_metrics(out)
    events = EventAccumulator(str(out / "logs" / "text2image-fine-tune"), size_guidance={"images": 0}).Reload()
    for name in rows[0].keys() - {"step"}:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert "step" not in events.Tags()["scalars"]
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("samples/")]
    assert [tag.partition(" ")[0] for tag in tags] == ["samples/00", "samples/01"]
    for tag in tags:  # the pictures of a prompt, each with the base model's picture on its left
        shapes = [(event.step, event.width, event.height) for event in events.Images(tag)]
        assert shapes == [(0, 64, 32), (2, 128, 32)]
    (sheet,) = events.Images("data/pictures")
    assert (sheet.width, sheet.height) == (6 * 128, 128)

    def words(tag):
        (event,) = events.Tensors(f"{tag}/text_summary")
        return event.tensor_proto.string_val[0].decode()

    assert "a blue axe number 1" in words("data")
    assert json.loads((out / "about.json").read_text())["command"] in words("command")
    assert "No pictures were held out" in words("answer")
    assert LONG.strip() in words("samples")


def test_trackio_gets_numbers_pictures_tables_and_files(arguments, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not among the requirements")
    words = arguments(report_to="trackio", validation_prompts=PROMPTS)
    done = run_command(words, env={"TRACKIO_DIR": str(tmp_path / "trackio")}, timeout=300)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "trackio" / "text2image-fine-tune.db") as database:
        logged = [(step, json.loads(values)) for step, values in database.execute("SELECT step, metrics FROM metrics")]
        aliases = {alias for (alias,) in database.execute("SELECT alias FROM artifact_aliases")}
    for row in read_metrics(tmp_path / "out"):
        assert any(step == row["step"] and values.items() >= row.items() - {("step", step)} for step, values in logged)
    captions = {
        (step, value["caption"])
        for step, values in logged
        for value in values.values()
        if isinstance(value, dict) and value.get("_type") == "trackio.image"
    }
    assert captions == {(step, prompt) for step in (0, 2) for prompt in PROMPTS}
    tables = {
        name: value["_value"]
        for _, values in logged
        for name, value in values.items()
        if isinstance(value, dict) and value.get("_type") == "trackio.table"
    }
    assert [(row["step"], row["prompt"]) for row in tables["samples table"]] == [(2, prompt) for prompt in PROMPTS]
    assert len(tables["data"]) == 6
    assert "last" in aliases


def test_trackio_runs_in_the_space_that_is_named(monkeypatch, accelerator):
    started = {}
    monkeypatch.setattr(accelerator, "log_with", ["trackio"])
    monkeypatch.setattr(accelerator, "init_trackers", lambda name, **how: started.update(how["init_kwargs"]))
    tracking.start_trackers(accelerator, "axes", {"rank": 4}, "runs/my lora", NEW, space_id="me/dashboard")
    space = {"space_id": "me/dashboard", "private": True}  # trackio's default is a public Space
    assert started == {"trackio": {"name": "my lora", "resume": "never"} | space}
    tracking.start_trackers(accelerator, "axes", {"rank": 4}, "runs/my lora", tracking.LoggedProgress(4))
    assert started == {"trackio": {"name": "my lora", "resume": "allow"}}

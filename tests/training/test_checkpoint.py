"""Checkpoints: a kill at any moment leaves an intact checkpoint, and loading never runs code."""

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, refusal_of
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file

from text_to_image_lora.errors import InputError
from text_to_image_lora.files import written_whole
from text_to_image_lora.training import hub_checkpoints
from text_to_image_lora.training.checkpoint import (
    TrainState,
    check_same_run,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    read_state,
    save_checkpoint,
    write_manifest,
)


SETTINGS = {"rank": 4, "lora_alpha": 4.0, "target_modules": ["to_q"]}


def make_run(steps=3):
    """Returns a model, an optimizer and a schedule after some steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lr_scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=10)
    advance(model, optimizer, lr_scheduler, steps)
    return model, optimizer, lr_scheduler


def advance(model, optimizer, lr_scheduler, steps):
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()


def make_learning(optimizer, lr_scheduler, scaler=None):
    """Returns the parts of a `Learning` that a checkpoint contains."""
    return SimpleNamespace(optimizer=optimizer, lr_scheduler=lr_scheduler, scaler=scaler, average=None)


def save(output_dir, step, run=None):
    model, optimizer, lr_scheduler = run or make_run()
    with written_whole(output_dir / f"checkpoint-{step}", folder=True) as folder:
        save_checkpoint(
            folder, adapter=model.state_dict(), learning=make_learning(optimizer, lr_scheduler),
            state=TrainState(seed=7, global_step=step), settings=SETTINGS,
        )  # fmt: skip
        write_manifest(folder)
    return output_dir / f"checkpoint-{step}"


def load(path, optimizer, lr_scheduler, scaler=None):
    return load_checkpoint(read_checkpoint(path), make_learning(optimizer, lr_scheduler, scaler))


def names(output_dir):
    return [path.name for path in list_checkpoints(output_dir)]


# Saving and loading.


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    run = make_run()
    path = save(tmp_path, 3, run)
    advance(*run, steps=4)
    model, optimizer, lr_scheduler = make_run(steps=0)
    model.load_state_dict(load(path, optimizer, lr_scheduler))
    assert lr_scheduler.get_last_lr() != run[2].get_last_lr()
    advance(model, optimizer, lr_scheduler, steps=4)
    assert lr_scheduler.get_last_lr() == run[2].get_last_lr()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run[0].parameters()))
    assert read_state(path) == (TrainState(seed=7, global_step=3, tracker_run_id=None), SETTINGS)


def test_the_loss_scale_comes_back(tmp_path):
    model, optimizer, lr_scheduler = make_run()
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    with written_whole(tmp_path / "checkpoint-1", folder=True) as folder:
        save_checkpoint(
            folder, adapter=model.state_dict(), learning=make_learning(optimizer, lr_scheduler, scaler),
            state=TrainState(seed=0), settings={},
        )  # fmt: skip
    fresh = torch.amp.GradScaler("cpu", init_scale=2.0)
    load(tmp_path / "checkpoint-1", optimizer, lr_scheduler, fresh)
    assert fresh.get_scale() == 512.0


def test_the_current_learning_rate_holds_from_the_first_step(tmp_path):
    path = save(tmp_path, 3)  # at 1e-2, with a linear schedule over 10 steps, 2 of them warmup
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    lr_scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=10)
    load(path, optimizer, lr_scheduler)
    used = []
    for _ in range(3):
        used.append(optimizer.param_groups[0]["lr"])
        advance(model, optimizer, lr_scheduler, steps=1)
    assert used == pytest.approx([4e-3 * (10 - step) / 8 for step in (3, 4, 5)])


@pytest.mark.parametrize(("before", "now", "device"), [("fused", "foreach", "cpu"), ("foreach", "fused", "meta")])
def test_the_current_flags_decide_where_step_counts_are_placed(tmp_path, before, now, device):
    """AdamW's fused kernel needs step counts on the device; other kernels need them on the CPU, to avoid synchronization.

    The meta device stands in for a GPU.
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), **{before: True})
    lr_scheduler = get_scheduler("constant", optimizer)
    advance(model, optimizer, lr_scheduler, steps=2)
    path = save(tmp_path, 2, (model, optimizer, lr_scheduler))
    optimizer = torch.optim.AdamW(torch.nn.Linear(3, 2, device="meta").parameters(), foreach=True)
    optimizer.param_groups[0].update({"foreach": None, "fused": None} | {now: True})  # without running a kernel
    load(path, optimizer, get_scheduler("constant", optimizer))
    assert optimizer.param_groups[0][now]
    states = optimizer.state.values()
    assert [state["exp_avg"].device.type for state in states] == ["meta"] * 2
    assert [state["step"].device.type for state in states] == [device] * 2


class Code:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def break_adapter(path, victim):
    (path / "adapter.safetensors").write_bytes((path / "adapter.safetensors").read_bytes()[:-1])


def break_optimizer(path, victim):
    (path / "optimizer.pt").write_bytes((path / "optimizer.pt").read_bytes()[:500])


def empty_optimizer(path, victim):
    (path / "optimizer.pt").write_bytes(b"")


def lose_optimizer(path, victim):
    (path / "optimizer.pt").unlink()


def pickle_code(path, victim):
    (path / "optimizer.pt").write_bytes(pickle.dumps({"optimizer": Code(victim)}, protocol=2))


def save_code(path, victim):
    torch.save({"optimizer": Code(victim)}, path / "optimizer.pt")


def save_code_in_average(path, victim):
    torch.save({"shadow_params": [], "decay": Code(victim)}, path / "ema.pt")


def save_another_thing(path, victim):
    torch.save([1, 2], path / "optimizer.pt")


def save_another_optimizer(path, victim):
    stored = torch.load(path / "optimizer.pt", weights_only=True)
    stored["optimizer"]["param_groups"][0]["params"] = [0]
    torch.save(stored, path / "optimizer.pt")


@pytest.mark.parametrize(
    "damage",
    [
        break_adapter, break_optimizer, empty_optimizer, lose_optimizer, pickle_code, save_code, save_code_in_average,
        save_another_thing, save_another_optimizer,
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_and_not_run(tmp_path, damage):
    path, victim = save(tmp_path, 3), tmp_path / "victim"
    damage(path, victim)
    _, optimizer, lr_scheduler = make_run()
    with pytest.raises(InputError, match="can't be loaded") as caught:
        load(path, optimizer, lr_scheduler)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not victim.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": {}}', '{"state": {"step": 1}, "settings": {}}'])
def test_a_state_that_cannot_be_read_is_refused(tmp_path, text):
    path = save(tmp_path, 3)
    (path / "state.json").write_text(text)
    with pytest.raises(InputError, match="can't be read") as caught:
        read_state(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["[" * 200_000, "5", "null", '{"state": {"seed": 1, "seed": 1}, "settings": {}}'])
def test_a_state_that_is_no_small_mapping_is_refused(tmp_path, text):
    path = save(tmp_path, 3)
    (path / "state.json").write_text(text)
    assert refusal_of(read_state, path).startswith(f"{path}: this checkpoint can't be read (state.json: ")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", ["x", -1, 0.0, None, float("nan"), 2**63]),
        ("global_step", ["x", -3, 2.5, True, 10**30, None]),
        ("started_at", ["x", 10**30, []]),
        ("tracker_run_id", [["x"], 5]),
        ("validation", ["x", [1], 5]),
        ("batch_size", ["x", 0, -1, 1.5]),
        ("due", [5, "loss", {}]),
        ("evil", [1]),
    ],
)
def test_a_state_with_values_of_other_kinds_is_refused(tmp_path, key, values):
    path = save(tmp_path, 3)
    stored = json.loads((path / "state.json").read_text())
    for value in values:
        (path / "state.json").write_text(json.dumps(stored | {"state": stored["state"] | {key: value}}))
        message = refusal_of(read_state, path)
        assert f"'{key}' is " in message
        assert message.endswith(" Resume from another one.")
    (path / "state.json").write_text(json.dumps(stored | {"settings": None}))
    assert "'settings' is null" in refusal_of(read_state, path)


@pytest.mark.parametrize(
    ("text", "damage"),
    [
        ("[" * 200_000, "more than 50 levels"),
        ("[]", "a list instead of a mapping"),
        ("5", "5 instead of a mapping"),
        ('{"state.json": 5}', "state.json has changed"),
        ('{"/etc/passwd": {}}', "names a file outside"),
        ('{"../../secret": {}}', "names a file outside"),
        ('{"a/../../secret": {}}', "names a file outside"),
        (json.dumps({"a" * 5000: {}}), "name too long"),
        (json.dumps({"a\0b": {}}), "is missing"),
    ],
)
def test_a_manifest_of_someone_else_is_damage(tmp_path, text, damage):
    path = save(tmp_path, 3)
    (path / "manifest.json").write_text(text)
    assert damage in str(find_damage(path))
    assert "\n" not in str(find_damage(path))


def damage_optimizer(change):
    """Returns a function that changes the contents of optimizer.pt."""

    def damage(path):
        stored = torch.load(path / "optimizer.pt", weights_only=True)
        torch.save(change(stored) or stored, path / "optimizer.pt")

    return damage


def damage_adapter(change):
    """Returns a function that changes the tensors of an adapter."""

    def damage(path):
        tensors = load_file(path / "adapter.safetensors")
        save_file({name: change(value) for name, value in tensors.items()}, path / "adapter.safetensors")

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damage_optimizer(lambda stored: stored["optimizer"]["state"][0].update(exp_avg=torch.zeros(1))),
        damage_optimizer(lambda stored: stored["optimizer"]["state"][0].update(exp_avg_sq=torch.zeros(3, 2))),
        damage_optimizer(lambda stored: stored["optimizer"]["state"][1].update(exp_avg=torch.zeros(2).long())),
        damage_optimizer(lambda stored: stored["optimizer"]["state"][1].update(step=torch.zeros(7))),
        damage_optimizer(lambda stored: stored["optimizer"]["state"][1].update(step="x")),
        damage_optimizer(lambda stored: stored["optimizer"]["state"][1].pop("exp_avg") is None),
        damage_optimizer(lambda stored: stored.update(optimizer=None)),
        damage_optimizer(lambda stored: stored.update(optimizer=5)),
        damage_optimizer(lambda stored: stored.update(lr_scheduler="x")),
        damage_optimizer(lambda stored: stored.update(lr_scheduler={})),
        damage_optimizer(lambda stored: stored["lr_scheduler"].update(last_epoch="x")),
        damage_optimizer(lambda stored: stored["lr_scheduler"].update(last_epoch=-7)),
        damage_optimizer(lambda stored: stored["lr_scheduler"].update(_last_lr=[float("nan")])),
        damage_optimizer(lambda stored: stored["lr_scheduler"].update(lr_lambdas=[{"func": 5}])),
        damage_adapter(lambda value: value * float("nan")),
        damage_adapter(lambda value: value.half()),
        damage_adapter(lambda value: value.long()),
    ],
)
def test_what_does_not_fit_the_run_is_refused(tmp_path, damage):
    path = save(tmp_path, 3)
    damage(path)
    _, optimizer, lr_scheduler = make_run(steps=0)
    message = refusal_of(load, path, optimizer, lr_scheduler)
    assert message.startswith(f"{path}: this checkpoint can't be loaded (")
    assert not optimizer.state  # nothing was restored
    assert lr_scheduler.last_epoch == 0


def test_a_schedule_takes_no_attributes_from_a_file(tmp_path):
    path = save(tmp_path, 3)
    damage_optimizer(lambda stored: stored["lr_scheduler"].update(step=5, optimizer=7, evil=1))(path)
    model, optimizer, lr_scheduler = make_run(steps=0)
    load(path, optimizer, lr_scheduler)
    advance(model, optimizer, lr_scheduler, steps=1)
    assert (lr_scheduler.last_epoch, lr_scheduler.optimizer) == (4, optimizer)


KILLED_ANYWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from text_to_image_lora.files import written_whole
from text_to_image_lora.training.checkpoint import find_damage, list_checkpoints, prune_checkpoints, write_manifest

FILES = ("adapter.safetensors", "optimizer.pt", "state.json")
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

def write(number, text):
    with written_whole(Path(f"checkpoint-{{number}}"), folder=True) as folder:
        for name in FILES:
            (folder / name).write_text(text)
        write_manifest(folder)

def save_over_an_old_one_and_prune(kill_at):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    write(2, "new")
    prune_checkpoints(".", 1, newest=2)

kill_at, survived = 0, False
while not survived:
    kill_at += 1
    os.mkdir(f"run-{{kill_at}}")
    os.chdir(f"run-{{kill_at}}")
    write(1, "old"), write(2, "old")
    child = os.fork()
    if child == 0:
        save_over_an_old_one_and_prune(kill_at)
        os._exit(0)
    survived = os.waitpid(child, 0)[1] == 0
    found = {{
        path.name: [(path / name).read_text() if (path / name).exists() else None for name in FILES]
        for path in list_checkpoints(".")
        if find_damage(path) is None
    }}
    prune_checkpoints(".", 1, newest=2)
    write(3, "new")
    print(json.dumps([found, [path.name for path in list_checkpoints(".")]]))
    os.chdir("..")
"""


def test_killed_at_any_moment_there_is_a_whole_checkpoint(tmp_path):
    script = KILLED_ANYWHERE.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) > 15
    for found, later in outcomes:
        assert found
        assert all(contents in (["old"] * 3, ["new"] * 3) for contents in found.values()), found
        assert "checkpoint-3" in later
    assert outcomes[0][0] == {"checkpoint-1": ["old"] * 3, "checkpoint-2": ["old"] * 3}
    assert outcomes[-1][0] == {"checkpoint-2": ["new"] * 3}


# Finding.


def test_only_whole_checkpoints_are_listed_in_order(tmp_path):
    assert list_checkpoints(tmp_path / "nowhere") == []
    for step in (100, 20, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-600").write_text("a file")
    (tmp_path / ".checkpoint-700.tmp").mkdir()
    assert find_damage(tmp_path / "checkpoint-100") is None
    for name in ("checkpoint-best", "checkpoint-8-old", "my-checkpoint-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"


def test_a_checkpoint_is_found_in_every_notation(tmp_path, monkeypatch):
    """Fault 4: upstream uses the basename, which is empty after a trailing slash."""
    output_dir = tmp_path / "out"
    path = save(output_dir, 20)
    save(output_dir, 30)
    monkeypatch.chdir(tmp_path)
    for wanted in (
        "checkpoint-20",
        "checkpoint-20/",
        "out/checkpoint-20",
        "out/checkpoint-20//",
        str(path),
        f"{path}/",
    ):
        assert find_checkpoint(output_dir, wanted).resolve() == path
    # A path from another machine is found by its last component.
    assert find_checkpoint(output_dir, "/content/drive/run/checkpoint-20/") == path
    # A checkpoint of another run is found at its path.
    other = save(tmp_path / "other", 20)
    assert find_checkpoint(output_dir, str(other)) == other


def test_nothing_to_resume_from(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "nowhere", "latest") is None
    save(tmp_path, 3)
    assert find_checkpoint(tmp_path, "none") is None


@pytest.mark.parametrize(
    "wanted", ["checkpoint-7", "checkpoint-40", "/nowhere/checkpoint-7/", "", ".", "checkpoint_old"]
)
def test_an_unknown_checkpoint_is_refused_with_a_list_of_existing_ones(tmp_path, wanted):
    save(tmp_path, 20)
    (tmp_path / "checkpoint-40").mkdir()
    with pytest.raises(InputError, match="there are: checkpoint-20.") as caught:
        find_checkpoint(tmp_path, wanted)
    assert "--resume_from_checkpoint" in str(caught.value)
    with pytest.raises(InputError, match="there are: none."):
        find_checkpoint(tmp_path / "nowhere", wanted)


# Pruning, and checkpoints of other runs.


@pytest.mark.parametrize(("limit", "kept"), [(None, 4), (9, 4), (4, 4), (2, 2), (1, 1)])
def test_the_newest_are_kept(tmp_path, limit, kept):
    steps = (5, 10, 90, 100)
    for step in steps:
        save(tmp_path, step)
    (tmp_path / "checkpoint-7").mkdir()  # no checkpoint, so it must not be deleted
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, limit, newest=100)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in steps[4 - kept :]]
    assert {path.name for path in tmp_path.iterdir()} == {*names(tmp_path), "checkpoint-7", "notes"}


def test_the_older_ones_stay_where_the_new_one_can_not_be_read_back(tmp_path, said):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / ".checkpoint-1.old").mkdir()
    data = (tmp_path / "checkpoint-2" / "optimizer.pt").read_bytes()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    prune_checkpoints(tmp_path, 1, newest=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert said == [
        "checkpoint-2 can't be read back (optimizer.pt has changed since it was written), so older checkpoints are kept: "
        "check the disk"
    ]
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(data)
    prune_checkpoints(tmp_path, 1, newest=2)
    assert len(said) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]  # including what a kill left


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = save(tmp_path, 3)
    before = read_state(path)[1]
    check_same_run(path, before, {"rank": 4, "lora_alpha": 4, "target_modules": ["to_q"]})
    with pytest.raises(InputError) as caught:
        check_same_run(
            path, before, {"rank": 8, "lora_alpha": 4.0, "target_modules": ["to_k"], "of_a_newer_version": 1}
        )
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "(rank was 4, is 8; target_modules was ['to_q'], is ['to_k'])" in message
    assert "--output_dir" in message
    assert "--resume_from_checkpoint none" in message
    assert "lora_alpha" not in message


@pytest.mark.parametrize("wanted", ["hf://me/axes", "hf://me/axes/checkpoint-20"])
def test_a_checkpoint_that_can_not_be_downloaded_is_refused(tmp_path, monkeypatch, wanted):
    """The network fails after the hub has listed the checkpoint."""

    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub_checkpoints, "_list_names_on_hub", lambda *_: ["checkpoint-20"])
    monkeypatch.setattr(hub_checkpoints, "retry_timeouts", lambda ask, seconds=None: ask())
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        InputError, match=r"^me/axes: checkpoint-20 can't be downloaded \(no route to host\)\. Run the command again"
    ):
        hub_checkpoints.find_checkpoint(tmp_path, wanted, None)


def test_a_run_verifies_its_results_and_not_its_checkpoints(train, monkeypatch):
    verified = []
    monkeypatch.setattr(
        "text_to_image_lora.models.receipt.check_lora_file", lambda path, *_, **__: verified.append(path) or 1
    )
    folder = train(
        max_train_steps=4, checkpointing_steps=1, save_every_n_epochs=1, validation_split=0.3, output_kohya_format=True
    )
    assert {path.parent.name for path in folder.glob("checkpoint-*/*.safetensors")} != set()
    # Files are written into a temporary folder beside their final one, such as .best.tmp.
    places = {path.relative_to(folder).parts[0] for path in verified}
    assert all(any(name in place for place in places) for name in ("pytorch_lora_weights", "best", "epoch-"))
    assert not [place for place in places if "checkpoint" in place]

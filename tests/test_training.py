"""Options of the loop that change how it trains, or what it leaves, and nothing else."""

import pytest
import torch
from conftest import TORCHRUN, read_lora, read_metrics, run_command


def assert_close(first, second):
    a, b = read_lora(first), read_lora(second)
    assert a.keys() == b.keys()
    difference = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm()
    assert difference < 1e-3 * torch.cat([a[k].flatten() for k in a]).norm()


def test_gradient_checkpointing_changes_nothing(train, tmp_path):
    plain = train(output_dir=tmp_path / "plain")
    assert_close(plain, train(gradient_checkpointing=True, output_dir=tmp_path / "less memory"))


# The rate of each of six steps as a share of --learning_rate: warm-up over two, then the schedule's own course.
SCHEDULES = {
    "constant": [1, 1, 1, 1, 1, 1],
    "constant_with_warmup": [0, 0.5, 1, 1, 1, 1],
    "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "cosine": [0, 0.5, 1, 0.853553, 0.5, 0.146447],
    "cosine_with_restarts": [0, 0.5, 1, 0.5, 1, 0.5],
    "polynomial": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "piecewise_constant": [1, 1, 0.1, 0.1, 0.01, 0.01],
}
WARMED_UP = dict(max_train_steps=6, lr_warmup_steps=2, learning_rate=1e-2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_and_their_warm_up(train, name):
    changes = {"cosine_with_restarts": {"lr_num_cycles": 2}, "piecewise_constant": {"lr_step_rules": "1:2,0.1:4,0.01"}}
    output_dir = train(lr_scheduler=name, gradient_accumulation_steps=2, **changes.get(name, {}), **WARMED_UP)
    rates = [row["lr"] / 1e-2 for row in read_metrics(output_dir)]
    assert rates == pytest.approx(SCHEDULES[name], abs=1e-4)


def test_warm_up_counts_optimizer_steps_on_two_processes(arguments, tmp_path):
    """A schedule prepared by Accelerate would be stepped once for each process."""
    done = run_command(arguments(lr_scheduler="linear", **WARMED_UP), TORCHRUN, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    rates = [row["lr"] / 1e-2 for row in read_metrics(tmp_path / "out")]
    assert rates == pytest.approx(SCHEDULES["linear"], abs=1e-4)


def test_a_usable_lora_every_so_many_epochs(train):
    output_dir = train(max_train_steps=9, save_every_n_epochs=2)  # six pictures in twos: three steps an epoch
    assert sorted(path.name for path in output_dir.glob("epoch-*")) == ["epoch-0002"]
    early, late = read_lora(output_dir / "epoch-0002"), read_lora(output_dir)
    assert early.keys() == late.keys()
    assert any(not early[key].equal(late[key]) for key in early)
    as_long = train(max_train_steps=6, output_dir=output_dir.with_name("as long"))
    assert all(value.equal(early[key]) for key, value in read_lora(as_long).items())


@pytest.mark.parametrize("name", ["true", "gaussian", "orthogonal"])
def test_each_initialisation_starts_at_the_base_and_trains(train, name):
    """Gaussian and true start with B at 0; orthogonal with B and A whose product is 0."""
    losses = [row["train_loss"] for row in read_metrics(train(init_lora_weights=name, max_train_steps=6))]
    plain = [row["train_loss"] for row in read_metrics(train(init_lora_weights="true", max_train_steps=1))]
    assert losses[0] == pytest.approx(plain[0], rel=1e-5)
    assert len(losses) == 6

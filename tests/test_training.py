"""Options of the training loop that change how it trains or what it saves, and nothing else."""

import pytest
import torch
from conftest import assert_same_weights, read_lora, read_metrics

from text_to_image_lora.training.objective import Diffusion


def test_gradient_checkpointing_changes_nothing(train, tmp_path):
    plain = train(output_dir=tmp_path / "plain")
    assert_same_weights(plain, train(gradient_checkpointing=True, output_dir=tmp_path / "less memory"))


def test_the_launchers_accumulation_divides_no_gradient(train, tmp_path, monkeypatch):
    """`accelerate config` asks for gradient accumulation, and `accelerate launch` sets the environment variable."""
    plain = train(output_dir=tmp_path / "plain", gradient_accumulation_steps=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    launched = train(output_dir=tmp_path / "launched", gradient_accumulation_steps=2)
    norms = [[row["grad_norm"] for row in read_metrics(folder)] for folder in (plain, launched)]
    assert norms[0] == norms[1]
    assert all(value.equal(read_lora(plain)[name]) for name, value in read_lora(launched).items())


def test_the_dropout_of_each_forward_pass_has_a_seed_of_its_own(train, monkeypatch):
    seeds, predict = [], Diffusion.weights

    def look(*args, **settings):  # the last call before the seed is set
        seeds.append(torch.initial_seed())
        return predict(*args, **settings)

    monkeypatch.setattr(Diffusion, "weights", look)
    train(lora_dropout=0.5, max_train_steps=4, train_batch_size=1, gradient_accumulation_steps=2)
    assert len(set(seeds[1:])) == len(seeds) - 1 == 7  # each value is that of the previous pass


# The learning rates of six steps, divided by --learning_rate: two steps of warmup, and then the schedule.
SCHEDULES = {
    "constant": [1, 1, 1, 1, 1, 1], "constant_with_warmup": [0, 0.5, 1, 1, 1, 1],
    "linear": [0, 0.5, 1, 0.75, 0.5, 0.25], "cosine": [0, 0.5, 1, 0.853553, 0.5, 0.146447],
    "cosine_with_restarts": [0, 0.5, 1, 0.5, 1, 0.5], "polynomial": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "piecewise_constant": [1, 1, 0.1, 0.1, 0.01, 0.01],
}  # fmt: skip
WARMED_UP = dict(max_train_steps=6, lr_warmup_steps=2, learning_rate=1e-2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_and_their_warm_up(train, name):
    changes = {"cosine_with_restarts": {"lr_num_cycles": 2}, "piecewise_constant": {"lr_step_rules": "1:2,0.1:4,0.01"}}
    output_dir = train(lr_scheduler=name, gradient_accumulation_steps=2, **changes.get(name, {}), **WARMED_UP)
    rates = [row["lr"] / 1e-2 for row in read_metrics(output_dir)]
    assert rates == pytest.approx(SCHEDULES[name], abs=1e-4)


def test_a_usable_lora_every_so_many_epochs(train):
    # Six pictures in batches of two: three steps per epoch.
    output_dir = train(max_train_steps=7, save_every_n_epochs=2)
    assert sorted(path.name for path in output_dir.glob("epoch-*")) == ["epoch-0002"]
    early, late = read_lora(output_dir / "epoch-0002"), read_lora(output_dir)
    assert early.keys() == late.keys()
    assert any(not early[key].equal(late[key]) for key in early)
    as_long = train(max_train_steps=6, output_dir=output_dir.with_name("as long"))
    assert all(value.equal(early[key]) for key, value in read_lora(as_long).items())


@pytest.mark.parametrize("name", ["true", "gaussian", "orthogonal"])
def test_each_initialisation_starts_at_the_base_and_trains(train, tmp_path, name):
    """With `gaussian` and `true`, B starts at 0; with `orthogonal`, the product of B and A is 0."""
    losses = [row["train_loss"] for row in read_metrics(train(init_lora_weights=name, max_train_steps=6))]
    plain = [row["train_loss"] for row in read_metrics(train(max_train_steps=1, output_dir=tmp_path / "plain"))]
    assert losses[0] == pytest.approx(plain[0], rel=1e-5)
    assert len(losses) == 6


# Timesteps and noise.


@pytest.fixture
def drawn(train, monkeypatch):
    """Collects the timesteps and noises of a run: those of the model's input, and those of its target."""

    def run(**flags):
        rows, add_noise, targets, target = [], Diffusion.add_noise, [], Diffusion.target

        def spy(self, latents, noise, timesteps):
            rows.append((timesteps.clone(), noise.clone()))
            return add_noise(self, latents, noise, timesteps)

        def spy_on_target(self, latents, noise, timesteps):
            targets.append(noise.clone())
            return target(self, latents, noise, timesteps)

        with monkeypatch.context() as patch:
            patch.setattr(Diffusion, "add_noise", spy)
            patch.setattr(Diffusion, "target", spy_on_target)
            train(resume_from_checkpoint="none", **flags)
        return torch.cat([t for t, _ in rows]).tolist(), torch.cat([n for _, n in rows]), torch.cat(targets)

    return run


def test_the_timesteps_of_a_run_are_those_that_were_asked_for(drawn):
    """Their range and distribution are tested in `training/test_data.py`."""
    timesteps, _, _ = drawn(timestep_range=[200, 210], max_train_steps=8)
    assert len(timesteps) == 16
    assert set(timesteps) <= set(range(200, 210))
    assert len(set(timesteps)) > 4
    odd, _, _ = drawn(timestep_sampling="logit_normal", logit_mean=-30, max_train_steps=2)
    assert set(odd) == {999}


def test_input_perturbation_is_on_the_input_alone(drawn):
    plain_steps, plain, clean = drawn(max_train_steps=10)
    assert torch.equal(plain, clean)
    steps, perturbed, target = drawn(max_train_steps=10, input_perturbation=0.1)
    assert steps == plain_steps
    assert torch.equal(target, clean)
    assert (perturbed - clean).std().item() == pytest.approx(0.1, rel=0.05)


def test_a_huber_run_has_the_formulas_loss(train, tmp_path):
    """Computes the first loss from the prediction and target of a plain run, which has equal draws."""
    options = dict(timestep_range=[990, 1000], max_train_steps=1)
    plain, narrow, wide = (
        read_metrics(train(output_dir=tmp_path / str(i), **options, **flags))[0]["train_loss"]
        for i, flags in enumerate([{}, *(dict(loss_type="huber", huber_c=c) for c in (1.0, 1e4))])
    )
    assert narrow < plain
    assert wide == pytest.approx(plain, rel=1e-2)  # so large that the loss is the squared error

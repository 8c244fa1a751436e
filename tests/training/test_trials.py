"""Trials before a run: they change nothing, and find out what fits."""

import copy

import pytest
import torch
from conftest import read_lora, read_metrics, run_command

from text_to_image_lora.models import lean, loading, lora
from text_to_image_lora.training.trials import Shapes, Trial, evenly, what_compiling_gives


@pytest.fixture
def make_trial(tiny_sd):
    """A `Trial` of the tiny UNet, whose device has memory for `room` samples."""
    base = loading.find_base_model(str(tiny_sd))
    unet = loading.load_components(base).denoiser
    lora.add_lora(unet, lora.LoraSettings(4, 4, base.family.target_modules))
    ((master,),) = lean.hold_lean(unet, [lora.trainable_parameters(unet)])
    shapes = Shapes(base.latent_shape((32, 32)), base.condition_shapes(1))

    def make(room=1000):
        def predict(denoiser, latents, timesteps, **condition):
            if len(latents) > room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return base.family.predict(denoiser, latents, timesteps, **condition)

        return Trial(base.family._replace(predict=predict), unet, [master], shapes, torch.float32, torch.device("cpu"))

    return make


def test_a_trial_changes_nothing(make_trial):
    trial = make_trial()
    before = copy.deepcopy(trial.denoiser.state_dict())
    trial(2)
    assert trial.parameters[0].grad is None
    assert not trial.denoiser.training
    assert all(torch.equal(value, before[name]) for name, value in trial.denoiser.state_dict().items())


@pytest.mark.parametrize(("room", "limit", "found"), [(3, 8, 2), (8, 8, 8), (100, 6, 6), (0, 4, 0), (1, 5, 1)])
def test_the_most_that_fit(make_trial, room, limit, found):
    assert make_trial(room).most_that_fit(limit) == found


@pytest.mark.parametrize(("count", "most", "size"), [(8, 100, 8), (8, 5, 4), (9, 4, 3), (10, 3, 3), (5, 0, 1)])
def test_batches_as_few_and_as_even_as_can_be(count, most, size):
    assert evenly(count, most) == size


def test_whether_compiling_pays_is_measured(make_trial):
    trial = make_trial()
    times = iter([(1.0, 0.5), (40.0, 0.3)])
    trial.seconds = lambda batch_size: next(times)
    called = []
    line = what_compiling_gives(lambda: called.append(1), trial, 2, 5000)
    assert called == [1]
    assert line == (
        "compiled in 40 s: forward and backward take 0.300 s instead of 0.500, which pays back after 200 of 5,000 steps"
    )
    times = iter([(1.0, 0.5), (40.0, 0.6)])
    assert what_compiling_gives(lambda: None, trial, 2, 5000).endswith("it does not pay here: leave --compile out")


def test_auto_trains_as_one_batch_does_and_goes_on_with_what_it_found(train, tmp_path):
    """A step's four samples fit at once here, and the checkpoint keeps the number."""
    how = dict(train_batch_size="auto", gradient_accumulation_steps=4, num_validation_images=0)
    auto = train(**how, max_train_steps=4, checkpointing_steps=2)
    given = train(
        train_batch_size=4,
        max_train_steps=4,
        num_validation_images=0,
        checkpointing_steps=2,
        output_dir=tmp_path / "given",
    )
    wanted, found = read_lora(given), read_lora(auto)
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    loss = read_metrics(auto)[-1]["train_loss"]
    on = train(**how, max_train_steps=4, resume_from_checkpoint="checkpoint-2")
    assert read_metrics(on)[-1]["train_loss"] == loss


def test_auto_needs_to_know_what_a_step_has(arguments):
    done = run_command(arguments(train_batch_size="auto"))
    assert done.returncode == 2
    assert "--gradient_accumulation_steps, such as 8" in done.stderr.strip()
    assert len(done.stderr.strip().splitlines()) == 1

"""Trials before a run: they change nothing, and find out what fits in memory."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import batch_sampler, read_lora, read_metrics, run_command, train_script

from text_to_image_lora.errors import TrainingError
from text_to_image_lora.models import lean, loading, lora
from text_to_image_lora.models.families import STABLE_DIFFUSION
from text_to_image_lora.models.settings import LoraSettings
from text_to_image_lora.training import batch_size, processes, trials
from text_to_image_lora.training.trials import Shapes, Trial, candidate_batch_sizes, heaviest_batch, measure_compiling


@pytest.fixture
def make_trial(tiny_sd):
    """Creates a `Trial` of the tiny UNet, as on a device with memory for `room` samples."""
    base = loading.find_base_model(str(tiny_sd))
    unet = loading.load_components(base).denoiser
    lora.add_lora(unet, LoraSettings(rank=4, lora_alpha=4, target_modules=base.family.target_modules))
    ((master,),) = lean.use_lean_forward(unet, [lora.trainable_parameters(unet)])
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


def test_fits_finds_out_what_fits(make_trial):
    trial = make_trial(3)
    assert [trial.fits(size) for size in (1, 3, 4)] == [True, True, False]


def test_other_errors_are_not_taken_for_lack_of_memory(make_trial):
    trial = make_trial()
    trial.shapes = trial.shapes._replace(latent=(3, 8, 8))
    with pytest.raises(RuntimeError, match="channels"):
        trial.fits(1)


def test_candidate_batch_sizes():
    assert candidate_batch_sizes(1) == [1]
    assert candidate_batch_sizes(8) == [8, 4, 3, 2, 1]
    assert candidate_batch_sizes(10) == [10, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("sizes", "limit", "world_size", "accumulation", "expected"),
    [
        ([(64, 64)] * 6, 4, 1, 1, ((64, 64), 4)),
        ([(64, 64)] * 6, 16, 1, 1, ((64, 64), 6)),  # the pictures do not fill a batch
        ([(64, 64)] * 6, 16, 2, 1, ((64, 64), 3)),
        ([(64, 64)] * 6 + [(96, 96)], 4, 1, 1, ((64, 64), 4)),  # the largest size has a single picture
        ([(64, 64)] * 6 + [(96, 96)] * 2, 4, 1, 1, ((96, 96), 2)),
    ],
)
def test_the_heaviest_batch_is_one_that_occurs(sizes, limit, world_size, accumulation, expected):
    pictures = SimpleNamespace(sizes=sizes)
    groups = [sorted(set(sizes)).index(size) for size in sizes]
    sampler = batch_sampler(
        np.arange(len(sizes)), batch_size=limit, accumulation=accumulation, rank=0, world_size=world_size, seed=0,
        groups=groups, num_steps=20,
    )  # fmt: skip
    index, count = heaviest_batch(pictures, sampler, limit)
    assert (sizes[index], count) == expected
    batches = [batch for step in range(20) for batch in sampler.micro_batches(step)]
    areas = [sizes[batch[0].index][0] * sizes[batch[0].index][1] * len(batch) for batch in batches]
    assert max(areas) == sizes[index][0] * sizes[index][1] * count


def test_whether_compiling_pays_off_is_measured(make_trial):
    trial = make_trial()
    times = iter([(1.0, 0.5), (40.0, 0.3)])
    trial.seconds = lambda batch_size: next(times)
    called = []
    line = measure_compiling(lambda: called.append(1), trial, 2, 5000)
    assert called == [1]
    assert line == (
        "compiled in 40 s: forward and backward pass take 0.300 s instead of 0.500 s, which pays off after 200 of 5,000 "
        "forward passes"
    )
    times = iter([(1.0, 0.5), (40.0, 0.6)])
    assert measure_compiling(lambda: None, trial, 2, 5000).endswith(
        "compiling does not pay off here: leave --compile out"
    )


def test_auto_uses_what_fits_and_trains_equally(train, tmp_path, monkeypatch, capsys):
    """Memory for two samples gives a batch size of 2, which a resumed run keeps when there is more memory."""
    how = dict(train_batch_size="auto", gradient_accumulation_steps=4, max_train_steps=4, num_validation_images=0)
    train(**how, dry_run=True)
    each = json.loads((tmp_path / "out" / "dataset.json").read_text())["memory_bytes"]["further_sample"]

    def make_room(samples):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=samples * each / 0.8))

    make_room(2.5)
    auto = train(**how, checkpointing_steps=2)
    assert "--train_batch_size auto: 2 of a step's 4 pictures at once" in capsys.readouterr().out
    given = train(
        train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=4, num_validation_images=0,
        output_dir=tmp_path / "given",
    )  # fmt: skip
    found = read_lora(auto)
    assert all(torch.equal(value, found[name]) for name, value in read_lora(given).items())
    make_room(100)
    again = train(**how, resume_from_checkpoint="checkpoint-2")
    assert "--train_batch_size auto: 2 of" in capsys.readouterr().out
    assert all(torch.equal(value, found[name]) for name, value in read_lora(again).items())
    assert len(read_metrics(again)) == 4


class Gpu:
    """The attributes of an `Accelerator` on a GPU that are used here; nothing runs on a GPU."""

    device, is_main_process = SimpleNamespace(type="cuda"), True


@pytest.mark.parametrize(
    ("flags", "room", "kept", "found"),
    [
        (["--train_batch_size", "4"], 4, None, 4),
        (["--train_batch_size", "4"], 3, None, None),
        (["--train_batch_size", "auto", "--gradient_accumulation_steps", "6"], 5, None, 3),
        (["--train_batch_size", "auto", "--gradient_accumulation_steps", "6"], 0, None, None),
        (["--train_batch_size", "auto", "--gradient_accumulation_steps", "6"], 9, 2, 2),
        (["--train_batch_size", "auto", "--gradient_accumulation_steps", "6"], 1, 2, None),
    ],
)
def test_on_a_gpu_a_step_is_tried(make_trial, monkeypatch, flags, room, kept, found):
    """Uses a trial with memory for `room` samples instead of that of a GPU."""
    trial = make_trial(room)
    words = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", *flags]
    settings = train_script.parse_settings(words)
    sizes = [(32, 32)] * 8
    sampler = batch_sampler(
        np.arange(8), batch_size=1, accumulation=6, rank=0, world_size=1, seed=0, groups=[0] * 8, num_steps=4
    )
    family = trial.family
    base = SimpleNamespace(
        family=family, kind="folder", _replace=lambda **_: SimpleNamespace(family=family, kind="folder")
    )
    run = SimpleNamespace(
        base=base, sampler=sampler, pictures=SimpleNamespace(sizes=sizes), lora=LoraSettings(), variations=1,
        identity={"num_chunks": 1}, state=SimpleNamespace(batch_size=kept),
    )  # fmt: skip
    moved = []
    encoder = SimpleNamespace(to=lambda device: moved.append(str(device)), device=Gpu.device)
    monkeypatch.setattr(trials, "find_shapes", lambda *_: trial.shapes)
    monkeypatch.setattr(trials, "Trial", lambda *_, **__: trial)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(processes, "broadcast_object_list", lambda answer: answer)
    models = SimpleNamespace(
        denoiser=trial.denoiser, vae=encoder, prompt_encoder=SimpleNamespace(text_encoders=[encoder]),
        trains_text_encoder=False,
    )  # fmt: skip
    if found is None:
        with pytest.raises(TrainingError, match="Out of memory: a training step does not fit on this device. Try "):
            batch_size.settle(settings, run, models, Gpu())
    else:
        assert batch_size.settle(settings, run, models, Gpu()) is trial
        assert sampler.batch_size == found
    assert moved[:2] == ["cpu", "cpu"]
    assert len(moved) == 4


def test_auto_needs_the_number_of_pictures_per_step(arguments):
    done = run_command(arguments(train_batch_size="auto"))
    assert done.returncode == 2
    assert "--gradient_accumulation_steps, such as 8" in done.stderr.strip()
    assert len(done.stderr.strip().splitlines()) == 1


def test_only_the_base_weights_are_moved(tiny_sd):
    """Adapter weights are views of their masters, from which moving would separate them."""
    unet = loading.load_components(loading.find_base_model(str(tiny_sd))).denoiser
    plain = {id(parameter) for parameter in unet.parameters()}
    lora.add_lora(unet, LoraSettings(rank=4, lora_alpha=4, target_modules=STABLE_DIFFUSION.target_modules))
    lean.use_lean_forward(unet, [lora.trainable_parameters(unet)])
    joined = [parameter for name, parameter in unet.named_parameters() if ".to_qkv." in name or ".to_kv." in name]
    assert {id(parameter) for parameter in trials.base_parameters(unet)} == plain | {
        id(parameter) for parameter in joined
    }
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with trials.base_moved_to_cpu(unet, torch.device("cpu")):
        pass
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_tensors_that_share_memory_share_it_after_moving():
    """Order, shapes and strides are kept, also those of tensors that are not contiguous."""
    whole = torch.arange(12.0).reshape(4, 3)
    parts = [whole, whole[2:], whole[:2].t(), whole + 1]
    found = list(trials.move_tensors(parts, torch.device("meta")))
    assert all(part.is_meta for part in found)
    assert [(part.shape, part.stride()) for part in found] == [(part.shape, part.stride()) for part in parts]
    memory = [part.untyped_storage()._cdata for part in found]
    assert memory[0] == memory[1] == memory[2] != memory[3]
    assert all(torch.equal(part, own) for part, own in zip(trials.move_tensors(parts, torch.device("cpu")), parts))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_predicts_equally_after_moving(tiny_sd):
    base, device = loading.find_base_model(str(tiny_sd)), torch.device("cuda")
    unet = loading.load_components(base).denoiser.to(device)
    lora.add_lora(unet, LoraSettings(rank=4, lora_alpha=4, target_modules=STABLE_DIFFUSION.target_modules))
    ((master,),) = lean.use_lean_forward(unet, [lora.trainable_parameters(unet)])
    more = [torch.zeros(1, *shape, device=device) for shape in (base.latent_shape((32, 32)), (), (77, 96))]
    with torch.no_grad():
        master.add_(1e-2)
        wanted = unet(more[0] + 1, more[1].expand(1), more[2]).sample
        with trials.base_moved_to_cpu(unet, device):
            assert {parameter.device.type for parameter in trials.base_parameters(unet)} == {"cpu"}
        assert torch.equal(unet(more[0] + 1, more[1].expand(1), more[2]).sample, wanted)
        master.add_(1e-2)
        assert not torch.equal(unet(more[0] + 1, more[1].expand(1), more[2]).sample, wanted)

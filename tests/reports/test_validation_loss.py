"""The validation loss does not depend on the training settings, does not affect training, and can stop a run."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import read_lora, read_metrics, write_pictures
from PIL import Image

from text_to_image_lora.reports import validation_loss
from text_to_image_lora.reports.sample_pictures import Painter
from text_to_image_lora.reports.stopping import Validation
from text_to_image_lora.training import objective
from text_to_image_lora.training.checkpoint import read_state


SPLIT = dict(validation_split=0.34, validation_steps=1)  # two of the six pictures


def validations(folder):
    return [row for row in read_metrics(folder) if "validation/loss" in row]


def judged_at(checkpoint):
    """Returns the state of validation in a checkpoint."""
    return Validation(**read_state(checkpoint)[0].validation)


@pytest.fixture
def others(tmp_path):
    return write_pictures(tmp_path / "others", count=3, seed=9)


@pytest.fixture(scope="module")
def validated(train_in, tmp_path_factory):
    """A run of four steps, each validated on three held-out pictures."""
    folder = tmp_path_factory.mktemp("validated")
    others = write_pictures(folder / "others", count=3, seed=9)
    return train_in(folder, validation_data_dir=others, validation_steps=1, max_train_steps=4)


# Its value.


def test_it_is_the_objective_at_fixed_noise(train, others, monkeypatch):
    """Compared with a plain loop over pictures and timesteps, with noise by (seed, picture, k) and the posterior mean."""
    tables = []
    original = validation_loss.LossMeter.__call__

    def look(meter, validation_set):
        table = original(meter, validation_set)
        tables.append((meter, validation_set, table))
        return table

    monkeypatch.setattr(validation_loss.LossMeter, "__call__", look)
    train(validation_data_dir=others, validation_steps=2, seed=5, lora_dropout=0.5, random_flip=True)
    meter, validation_set, table = tables[-2]
    assert table.shape == (3, 8)
    assert validation_loss.strata(1000) == [62, 187, 312, 437, 562, 687, 812, 937]
    models = meter.models
    scheduler, unet = models.diffusion.noise_scheduler, models.denoiser.eval()
    for index in range(3):
        row, name = validation_set.row(index)[0], validation_set.pictures.facts[index].image_id
        hidden_states = validation_set.of_caption(validation_set.caption(index))["encoder_hidden_states"]
        for k, t in enumerate(validation_loss.strata(1000)):
            noise = validation_loss._make_noise(row["mean"].shape, 5, name, k)[None]
            t = torch.tensor([t])
            noisy = scheduler.add_noise(row["mean"][None] * models.scaling_factor, noise, t)
            with torch.no_grad():
                pred = unet(noisy, t, hidden_states[None]).sample
            assert table[index, k] == pytest.approx(float((pred.double() - noise.double()).square().mean()), rel=1e-4)
    noises = [validation_loss._make_noise((4, 8, 8), s, name, k) for s in (0, 1) for name in "ab" for k in (0, 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])


def test_float64_is_of_the_cpu_alone(train, others, monkeypatch):
    """MPS has no float64, so losses are moved to the CPU first; the stand-in for a GPU tensor supports nothing else."""
    loss_of_samples = validation_loss.loss_of_samples

    def on_mps(*args):
        return SimpleNamespace(cpu=lambda: loss_of_samples(*args))

    monkeypatch.setattr(validation_loss, "loss_of_samples", on_mps)
    assert validations(train(validation_data_dir=others, max_train_steps=1))


def test_a_mask_hides_from_it():
    pred, target, mask = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    pred[0, 0, 0], mask[0, 0, 1] = 1, 0
    assert objective.loss_of_samples(pred, target, mask).tolist() == [0, 1]
    assert objective.loss_of_samples(pred, target).tolist() == [0.5, 1]


def test_it_starts_at_the_base(validated):
    first, *rest = validations(validated)
    assert [row["step"] for row in (first, *rest)] == [0, 1, 2, 3, 4]
    assert {v for name, v in first.items() if "relative" in name} == {1.0}
    assert first["validation/gap"] == 0
    assert sum("relative_loss_t" in name for name in first) == 8
    assert len({row["validation/loss"] for row in (first, *rest)}) == 5


def test_from_a_lora_it_is_relative_to_the_base_all_the_same(train, validated, others):
    end = validations(validated)[-1]
    again = validations(train(lora_weights=validated, validation_data_dir=others, max_train_steps=1))[0]
    assert again["step"] == 0
    assert again["validation/relative_loss"] == pytest.approx(end["validation/relative_loss"], rel=1e-5)


# What it does not depend on.


@pytest.fixture(scope="module")
def at_two_resolutions(train_in, tmp_path_factory):
    """Runs at two resolutions and at the larger of them, with equal pictures held out; one is too small for it."""
    folder = tmp_path_factory.mktemp("resolutions")
    write_pictures(folder / "pictures", count=7)
    others = write_pictures(folder / "others", count=3, seed=9)
    with Image.open(others / "1.png") as picture:
        small = picture.resize((30, 24))
    small.save(others / "1.png")
    options = dict(max_train_steps=3, validation_steps=1, train_data_dir=folder / "pictures", learning_rate=1e-3)
    return SimpleNamespace(
        both=train_in(folder, resolution=[24, 32], validation_data_dir=others, output_dir=folder / "both", **options),
        large=train_in(folder, resolution=32, validation_data_dir=others, output_dir=folder / "large", **options),
        small=train_in(folder, resolution=24, validation_data_dir=others, output_dir=folder / "small", **options),
    )


def test_each_held_out_picture_is_measured_once_at_its_largest_size(at_two_resolutions):
    """The picture that is too small for the larger resolution at the smaller one, the others as if that were the only one."""
    both, large, small = (
        judged_at(folder / "checkpoint-3").base
        for folder in (at_two_resolutions.both, at_two_resolutions.large, at_two_resolutions.small)
    )
    assert len(both) == 3
    for losses, expected in zip(both, (large[0], small[1], large[2]), strict=True):
        assert losses == pytest.approx(expected, rel=1e-5)  # encoded in batches of other sizes
    assert large[1] != pytest.approx(small[1], rel=0.01)
    assert [len(validations(folder)) for folder in (at_two_resolutions.both, at_two_resolutions.large)] == [4, 4]


def test_the_sizes_of_a_picture_are_on_one_side_of_the_split(train, tmp_path):
    """The split is that of a single resolution."""
    told = []
    for name, resolution in (("both", [24, 32]), ("one", 32)):
        out = train(resolution=resolution, validation_split=0.34, output_dir=tmp_path / name)
        about = json.loads((out / "about.json").read_text())["dataset"]
        told.append((about["pictures"], about["validated"], about["held_out"], about["samples_an_epoch"]))
        assert len(judged_at(out / "checkpoint-2").base_probe) == 2
    assert told[0][:3] == told[1][:3]
    assert (told[0][3], told[1][3]) == (8, 4)


def test_nothing_of_the_training_changes_it(train, validated, others):
    changes = dict(train_batch_size=4, random_flip=True, caption_dropout=0.5, rank=2)
    out = train(validation_data_dir=others, max_train_steps=1, **changes)
    assert validations(out)[0] == validations(validated)[0]


def test_the_order_of_the_rows_does_not_change_it(train, branches, pictures):
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    random.Random(1).shuffle(lines)
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    first, second = validations(branches)[0], validations(train(max_train_steps=1, **SPLIT))[0]
    assert second["validation/loss"] == pytest.approx(first["validation/loss"], rel=1e-12)


def test_training_does_not_notice_it(train, tmp_path, others):
    options = dict(max_train_steps=4, lora_dropout=0.3, random_flip=True, caption_dropout=0.3)
    without = train(output_dir=tmp_path / "without", **options)
    with_it = train(output_dir=tmp_path / "with", validation_data_dir=others, validation_steps=1, **options)
    a, b = read_lora(without), read_lora(with_it)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_resumed_after_a_stop(train, tmp_path):
    options = dict(checkpointing_steps=2, checkpoints_total_limit=9, learning_rate=0.03, max_train_steps=6, **SPLIT)
    straight = train(output_dir=tmp_path / "straight", **options)
    stopped = shutil.copytree(straight, tmp_path / "stopped")
    for step in (4, 6):
        shutil.rmtree(stopped / f"checkpoint-{step}")
    train(output_dir=stopped, **options)
    assert validations(straight) == validations(stopped)
    ends = [judged_at(folder / "checkpoint-6") for folder in (straight, stopped)]
    assert ends[0] == ends[1]
    assert ends[0].best_step > 0
    a, b = read_lora(straight / "best"), read_lora(stopped / "best")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_validation_may_begin_later(train, validated, others):
    """The base model is then measured with the LoRA disabled."""
    train()
    late = train(validation_data_dir=others, validation_steps=1, max_train_steps=4)
    assert judged_at(late / "checkpoint-4").base == judged_at(validated / "checkpoint-4").base
    assert validations(late)[-1] == validations(validated)[-1]


# Early stopping.


def test_patience_stops_and_the_same_command_stays_stopped(train, capsys, monkeypatch):
    def no_better(validation, table, step, **_):
        validation.waited += 1
        return False

    monkeypatch.setattr("text_to_image_lora.reports.stopping.update_best", no_better)
    options = dict(max_train_steps=20, early_stopping_patience=3, **SPLIT)
    out = train(**options)
    assert [row["step"] for row in validations(out)] == [0, 1, 2, 3]
    assert read_metrics(out)[-1]["step"] == 3
    said = capsys.readouterr().out
    assert "no step up to 3 was better than the base model" in said
    assert "stopped early at step 3 of 20: the loss of 3 validations in a row was not lower than before" in said
    assert "Stopped early at step 3 of 20." in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "checkpoint-3").is_dir()
    assert not (out / "best").exists()
    weights = read_lora(out)
    train(**options)
    said = capsys.readouterr().out
    assert "no step up to 3 was better than the base model" in said
    assert "stopped early at step 3 of 20" in said
    assert all(torch.equal(weights[name], value) for name, value in read_lora(out).items())
    train(**options | dict(early_stopping_patience=4))
    assert [row["step"] for row in validations(out)] == [0, 1, 2, 3, 4]


def test_other_pictures_to_validate_on_begin_anew(train, validated, others, tmp_path, capsys):
    """Losses on different pictures cannot be compared, even if there are equally many."""
    out = shutil.copytree(validated, tmp_path / "out")
    write_pictures(others, count=4, seed=11)
    train(max_train_steps=5, validation_data_dir=others, validation_steps=1)
    assert "the validation pictures have changed" in capsys.readouterr().out
    before, after = judged_at(validated / "checkpoint-4"), judged_at(out / "checkpoint-5")
    assert (len(before.base), len(after.base)) == (3, 4)


def test_other_captions_to_validate_on_begin_anew(train, validated, others, tmp_path, capsys):
    out = shutil.copytree(validated, tmp_path / "out")
    options = dict(validation_data_dir=others, validation_steps=1)
    train(max_train_steps=5, **options)
    assert "pictures have changed" not in capsys.readouterr().out
    (others / "metadata.jsonl").write_text((others / "metadata.jsonl").read_text().replace("red", "golden"))
    train(max_train_steps=6, **options)
    assert "the validation pictures have changed" in capsys.readouterr().out
    bases = [judged_at(folder / f"checkpoint-{step}").base for folder, step in ((validated, 4), (out, 5), (out, 6))]
    assert bases[0] == bases[1] != bases[2]


# Keeping the best LoRA.


def best_at(*steps):
    """Replaces `stopping.update_best` by a function for which exactly these steps are the best so far."""

    def update_best(validation, table, step, **_):
        if step in steps:
            validation.best_step = step
        return step in steps

    return update_best


BRANCH = dict(checkpointing_steps=1, checkpoints_total_limit=9, **SPLIT)


@pytest.fixture(scope="module")
def branches(train_in, tmp_path_factory):
    """A run of four steps with a checkpoint each; first step 2 was the best, then step 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("text_to_image_lora.reports.stopping.update_best", best_at(2, 3))
        return train_in(tmp_path_factory.mktemp("branches"), max_train_steps=4, **BRANCH)


@pytest.fixture
def branch(branches, tmp_path):
    """A copy of the run that `train` resumes."""
    return shutil.copytree(branches, tmp_path / "out")


def same(a, b):
    a, b = read_lora(a), read_lora(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_is_kept(branches):
    assert same(branches / "best", branches / "checkpoint-3")
    assert not same(branches / "best", branches)


def test_starting_over_leaves_nothing_of_the_run_before(train, branch, monkeypatch):
    """No step of the new run is better than the base model."""
    assert (branch / "best").is_dir()
    monkeypatch.setattr("text_to_image_lora.reports.stopping.update_best", best_at())
    train(resume_from_checkpoint="none", **SPLIT)
    assert not (branch / "best").exists()
    assert [row["step"] for row in validations(branch)] == [0, 1, 2]


def test_resuming_restores_the_best_of_the_checkpoint(train, branch, monkeypatch):
    """After a stop, best/ may hold the LoRA of a step after the checkpoint."""
    assert not same(branch / "checkpoint-2", branch / "checkpoint-3")
    for step in (3, 4):
        shutil.rmtree(branch / f"checkpoint-{step}")
    monkeypatch.setattr("text_to_image_lora.reports.stopping.update_best", best_at())
    train(max_train_steps=3, **BRANCH)
    assert same(branch / "best", branch / "checkpoint-2")


def test_a_best_after_the_checkpoint_is_deleted(train, branch):
    """The run is resumed from a checkpoint at which no step was better than the base model yet."""
    train(max_train_steps=1, resume_from_checkpoint="checkpoint-1", **BRANCH)
    assert not (branch / "best").exists()


def test_a_best_that_somebody_moved_away_stops_no_checkpoint(tmp_path):
    """If best/ is missing, nothing is copied; otherwise it replaces the one in the checkpoint."""
    judge = SimpleNamespace(output_dir=tmp_path / "run", validation=SimpleNamespace(best_step=2))
    validation_loss.Judge.keep_best(judge, tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-2").exists()
    for folder, name in (("run", "lora"), ("checkpoint-2", "old")):
        (tmp_path / folder / "best").mkdir(parents=True)
        (tmp_path / folder / "best" / name).touch()
    validation_loss.Judge.keep_best(judge, tmp_path / "checkpoint-2")
    assert [path.name for path in (tmp_path / "checkpoint-2" / "best").iterdir()] == ["lora"]


def test_the_lora_that_a_run_begins_with_is_not_lost(train, tmp_path):
    """If training makes it worse, best/ keeps it."""
    options = dict(max_train_steps=12, learning_rate=0.03, **SPLIT)
    first = train(output_dir=tmp_path / "first", **options)
    spoilt = options | dict(learning_rate=0.3, max_train_steps=2)
    second = train(output_dir=tmp_path / "second", lora_weights=first / "best", **spoilt)
    rows = validations(second)
    assert (
        rows[0]["validation/relative_loss"] < rows[-1]["validation/relative_loss"] < 1
    )  # still better than the base model
    assert {row["validation/best_step"] for row in rows} == {0}
    begun, best = read_lora(first / "best"), read_lora(second / "best")
    for name in begun:
        torch.testing.assert_close(best[name], begun[name], rtol=1e-5, atol=1e-7)


def test_a_checkpoint_comes_after_the_pictures_of_its_step(train, monkeypatch):
    """A run that was killed while it drew resumes from the previous checkpoint, and draws them again."""
    options = dict(max_train_steps=2, checkpointing_steps=1, validation_prompt="an axe", validation_steps=2)
    generate, calls = Painter.generate, []

    def killed(painter, drawings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(painter, drawings)

    monkeypatch.setattr(Painter, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        train(**options)
    out = train(**options)
    assert [path.name for path in sorted((out / "validation").iterdir())] == ["step-000000", "step-000002"]

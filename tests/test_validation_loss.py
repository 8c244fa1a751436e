"""The validation loss: the same whatever the run is like around it, nothing of it in training, and it stops a run."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import TORCHRUN, read_lora, read_metrics, run_command, write_pictures
from PIL import Image

from text_to_image_lora import objective, validation
from text_to_image_lora.checkpoint import read_state
from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures import Picture, divide, examine, groups_of, hold_out, probe_of
from text_to_image_lora.records import load_records


SPLIT = dict(validation_split=0.34, validation_steps=1)  # two of the six pictures


def validations(folder):
    return [row for row in read_metrics(folder) if "validation/loss" in row]


@pytest.fixture
def others(tmp_path):
    return write_pictures(tmp_path / "others", count=3, seed=9)


# What it is.


def test_it_is_the_objective_at_fixed_noise(train, others, monkeypatch, tiny_sd):
    """Against a plain loop in float64: every picture, every stratum, noise by (seed, picture, k), the posterior's mean."""
    tables = []
    original = validation.loss_table

    def look(unet, validation_set, **options):
        table = original(unet, validation_set, **options)
        tables.append((unet, validation_set, options, table))
        return table

    monkeypatch.setattr(validation, "loss_table", look)
    train(validation_data_dir=others, validation_steps=2, seed=5, lora_dropout=0.5, random_flip=True)
    unet, validation_set, options, table = tables[-2]
    assert table.shape == (3, 8)
    assert validation.strata(1000) == [62, 187, 312, 437, 562, 687, 812, 937]
    scheduler, unet = options["noise_scheduler"], unet.eval()
    for index in range(3):
        row = validation_set[index]
        for k, t in enumerate(validation.strata(1000)):
            noise = validation._noise_of(row["mean"].shape, 5, validation_set.images[index].image_id, k)[None]
            t = torch.tensor([t])
            noisy = scheduler.add_noise(row["mean"][None] * options["scaling_factor"], noise, t)
            with torch.no_grad():
                pred = unet(noisy, t, row["encoder_hidden_states"][None]).sample
            assert table[index, k] == pytest.approx(float((pred.double() - noise.double()).square().mean()), rel=1e-4)
    noises = [validation._noise_of((4, 8, 8), s, name, k) for s in (0, 1) for name in "ab" for k in (0, 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])


def test_a_mask_hides_from_it():
    pred, target, mask = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    pred[0, 0, 0], mask[0, 0, 1] = 1, 0
    assert objective.loss_of_samples(pred, target, mask).tolist() == [0, 1]
    assert objective.loss_of_samples(pred, target).tolist() == [0.5, 1]


def test_it_starts_at_the_base(train):
    first, *rest = validations(train(max_train_steps=3, **SPLIT))
    assert [row["step"] for row in (first, *rest)] == [0, 1, 2, 3]
    assert {v for name, v in first.items() if "relative" in name} == {1.0}
    assert first["validation/gap"] == 0
    assert sum("relative_loss_t" in name for name in first) == 8
    assert len({row["validation/loss"] for row in (first, *rest)}) == 4


def test_from_a_lora_it_is_relative_to_the_base_all_the_same(train, tmp_path, others):
    options = dict(validation_data_dir=others, validation_steps=1)
    start = train(output_dir=tmp_path / "start", **options)
    end = validations(start)[-1]
    again = validations(train(output_dir=tmp_path / "more", lora_weights=start, **options))[0]
    assert again["step"] == 0
    assert again["validation/relative_loss"] == pytest.approx(end["validation/relative_loss"], rel=1e-5)


# The same whatever is around it.


@pytest.mark.parametrize("changes", [dict(train_batch_size=4), dict(random_flip=True, caption_dropout=0.5)], ids=str)
def test_nothing_of_the_training_changes_it(train, tmp_path, others, changes):
    options = dict(validation_data_dir=others, validation_steps=2)
    first = validations(train(output_dir=tmp_path / "one", **options))[0]
    second = validations(train(output_dir=tmp_path / "two", **options | changes))[0]
    assert first == second


def test_the_order_of_the_rows_does_not_change_it(train, tmp_path, pictures):
    first = validations(train(output_dir=tmp_path / "one", **SPLIT))[0]
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    random.Random(1).shuffle(lines)
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    second = validations(train(output_dir=tmp_path / "two", **SPLIT))[0]
    assert second["validation/loss"] == pytest.approx(first["validation/loss"], rel=1e-12)


def test_two_processes_say_the_same(train, arguments, tmp_path, others):
    options = dict(validation_data_dir=others, validation_steps=1, learning_rate=1e-3)
    one = train(train_batch_size=4, output_dir=tmp_path / "one", **options)
    words = arguments(train_batch_size=2, output_dir=tmp_path / "two", **options)
    done = run_command(words, TORCHRUN, env={"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Validation: ") == 1
    for a, b in zip(validations(one), validations(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_training_does_not_notice_it(train, tmp_path, others):
    options = dict(max_train_steps=4, lora_dropout=0.3, random_flip=True, caption_dropout=0.3)
    without = train(output_dir=tmp_path / "without", **options)
    validated = train(output_dir=tmp_path / "with", validation_data_dir=others, validation_steps=1, **options)
    a, b = read_lora(without), read_lora(validated)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_it_goes_on_after_a_stop(train, tmp_path):
    options = dict(checkpointing_steps=2, checkpoints_total_limit=9, learning_rate=0.03, **SPLIT)
    straight = train(max_train_steps=6, output_dir=tmp_path / "straight", **options)
    stopped = tmp_path / "stopped"
    train(max_train_steps=6, output_dir=stopped, **options)
    for step in (4, 6):
        shutil.rmtree(stopped / f"checkpoint-{step}")
    train(max_train_steps=6, output_dir=stopped, **options)
    assert validations(straight) == validations(stopped)
    states = [read_state(folder / "checkpoint-6")[0].validation for folder in (straight, stopped)]
    assert states[0] == states[1]
    assert states[0].best_step > 0
    a, b = read_lora(straight / "best"), read_lora(stopped / "best")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_validation_may_begin_later(train, tmp_path, others):
    """The base is measured then, from the model with its LoRA switched off."""
    early = train(output_dir=tmp_path / "early", validation_data_dir=others, max_train_steps=4)
    train(output_dir=tmp_path / "late")
    late = train(output_dir=tmp_path / "late", validation_data_dir=others, max_train_steps=4)
    states = [read_state(folder / "checkpoint-4")[0].validation for folder in (early, late)]
    assert states[0].base == states[1].base
    assert validations(early)[-1] == validations(late)[-1]


# No leak.


def test_what_looks_alike_is_never_on_both_sides(tmp_path):
    """Copies, smaller and recompressed copies, and repeats: the content of no picture held out is trained on."""
    folder = write_pictures(tmp_path / "3_axe", count=12, size=(64, 64))
    (folder / "metadata.jsonl").unlink()
    for i in range(4):
        shutil.copy(folder / f"{i}.png", folder / f"copy{i}.png")
        Image.open(folder / f"{i + 4}.png").resize((48, 48)).save(folder / f"small{i}.jpg", quality=80)
    dataset = load_records(train_data_dir=folder, say=lambda line: None)
    good, _ = examine(dataset, range(len(dataset)))
    images = [good[index] for index in range(len(dataset))]
    assert len(set(groups_of(images))) == 12
    (kept, trained), (held_out, validated) = divide(dataset, images, None, 0.3, lambda line: None)
    assert 4 <= len(validated) <= 6
    assert len(trained) + len(validated) == 20
    assert [len(kept), len(held_out)] == [len(trained), len(validated)]
    groups = groups_of([*trained, *validated])
    assert not set(groups[: len(trained)]) & set(groups[len(trained) :])
    assert set(kept["num_repeats"]) == {3}
    for records, shown in ((kept, trained), (held_out, validated)):
        assert [examine(records, range(len(records)))[0][i] for i in range(len(records))] == shown


def test_what_is_in_the_validation_folder_is_not_trained_on(train, pictures, others, capsys):
    shutil.copy(pictures / "2.png", others / "same.png")
    Image.open(pictures / "4.png").resize((80, 64)).save(others / "larger.png")
    with open(others / "metadata.jsonl", "a") as file:
        for name in ("same.png", "larger.png"):
            file.write(json.dumps({"file_name": name, "text": "x"}) + "\n")
    train(validation_data_dir=others)
    out = capsys.readouterr().out
    assert "2 pictures are not trained on, because they look like one that is validated on" in out
    assert "only 5 pictures to validate on" in out
    assert "4 pictures, 2 steps an epoch" in out


def test_the_split_is_the_pictures_own():
    """It depends on content alone: not on order, and a picture more moves few others."""
    rng = np.random.default_rng(0)
    images = [Picture(rng.bytes(16).hex(), 9, 9, int.from_bytes(rng.bytes(16))) for _ in range(100)]
    chosen = {images[i].image_id for i in hold_out(images, 0.1)}
    assert len(chosen) == 10
    assert {images[::-1][i].image_id for i in hold_out(images[::-1], 0.1)} == chosen
    more = [*images, *(Picture(rng.bytes(16).hex(), 9, 9, int.from_bytes(rng.bytes(16))) for _ in range(10))]
    assert len({more[i].image_id for i in hold_out(more, 0.1)} & chosen) >= 8
    assert len(hold_out(images[:3], 0.01)) == 1
    assert hold_out(images[:1] * 5, 0.2) == []
    # A crowd of alike pictures is too much of the whole; others are there.
    crowd = [image._replace(hash=images[0].hash) for image in images[:60]] + images[60:]
    assert all(index >= 60 for index in hold_out(crowd, 0.1))


def test_class_pictures_are_not_validated_on(train, tmp_path, capsys):
    write_pictures(tmp_path / "class", count=6, seed=5)
    train(class_data_dir=tmp_path / "class", **SPLIT)
    out = capsys.readouterr().out
    assert "only 2 pictures to validate on" in out
    assert "10 pictures, " in out


def test_copies_alone_cannot_be_divided(train, tmp_path):
    folder = write_pictures(tmp_path / "one", count=1)
    for i in range(1, 4):
        shutil.copy(folder / "0.png", folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": "x"}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match="4 pictures can't be divided"):
        train(train_data_dir=folder, validation_split=0.25)


def test_a_dry_run_divides_too(train, tmp_path, capsys):
    train(dry_run=True, **SPLIT)
    assert "4 pictures, 4 captions (4 different); 2 more to validate on" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["validated"] == 2


# Stopping.


def test_patience_stops_and_the_same_command_stays_stopped(train, capsys, monkeypatch):
    def no_better(validation, table, step):
        validation.waited += 1
        return False

    monkeypatch.setattr("text_to_image_lora.stopping.take_in", no_better)
    options = dict(max_train_steps=20, early_stopping_patience=3, **SPLIT)
    out = train(**options)
    assert [row["step"] for row in validations(out)] == [0, 1, 2, 3]
    assert read_metrics(out)[-1]["step"] == 3
    assert "no step was better than the base model (of 3)" in capsys.readouterr().out
    assert (out / "checkpoint-3").is_dir()
    assert not (out / "best").exists()
    weights = read_lora(out)
    train(**options)
    assert "no step was better than the base model (of 3)" in capsys.readouterr().out
    assert all(torch.equal(weights[name], value) for name, value in read_lora(out).items())
    train(**options | dict(early_stopping_patience=4))
    assert [row["step"] for row in validations(out)] == [0, 1, 2, 3, 4]


def test_the_best_is_kept_and_that_of_another_run_is_not(train, tmp_path):
    def change(validation, table, step):
        validation.best_step = 2 if step >= 2 else None
        return step == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("text_to_image_lora.stopping.take_in", change)
        out = train(max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=9, **SPLIT)
    best, second, last = (read_lora(folder) for folder in (out / "best", out / "checkpoint-2", out))
    assert all(torch.equal(best[name], second[name]) for name in best)
    assert not all(torch.equal(best[name], last[name]) for name in best)
    train(learning_rate=5.0, resume_from_checkpoint="none", **SPLIT)
    assert not (out / "best").exists()


def test_other_pictures_to_validate_on_begin_anew(train, others, capsys):
    """Their losses can't be compared with those of before, whether they are as many or not."""
    options = dict(validation_data_dir=others, validation_steps=1)
    before = read_state(train(**options) / "checkpoint-2")[0].validation
    write_pictures(others, count=4, seed=11)
    out = train(max_train_steps=4, **options)
    assert "the pictures to validate on are others than before" in capsys.readouterr().out
    after = read_state(out / "checkpoint-4")[0].validation
    assert (len(before.base), len(after.base)) == (3, 4)


def test_best_is_that_of_the_checkpoint_which_is_gone_on_from(train):
    """After a stop, best/ may hold a later step's, of a branch that is given up."""

    def at(best_steps):
        def change(validation, table, step):
            if step in best_steps:
                validation.best_step = step
            return step in best_steps

        return change

    options = dict(checkpointing_steps=1, checkpoints_total_limit=9, **SPLIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("text_to_image_lora.stopping.take_in", at({1, 3}))
        out = train(max_train_steps=3, **options)
        third = read_lora(out / "best")
        shutil.rmtree(out / "checkpoint-3")
        patch.setattr("text_to_image_lora.stopping.take_in", at(set()))
        train(max_train_steps=3, **options)
    best, first = read_lora(out / "best"), read_lora(out / "checkpoint-1")
    assert all(torch.equal(best[name], first[name]) for name in best)
    assert not all(torch.equal(best[name], third[name]) for name in best)


def test_the_probe_is_of_ones_own_pictures(pictures, tmp_path):
    from text_to_image_lora.records import with_class_pictures

    write_pictures(tmp_path / "class", count=30, seed=5)
    own, others = (load_records(train_data_dir=folder) for folder in (pictures, tmp_path / "class"))
    dataset = with_class_pictures(own, others)
    images = [Picture(f"{i:032x}", 9, 9) for i in range(36)]
    records, shown = probe_of(dataset, images, 6, seed=0)
    assert records["is_class"][:] == [False] * 6
    assert shown == images[:6]


def test_class_pictures_alone_are_nothing_to_train_on(train, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "copy")
    write_pictures(tmp_path / "class", count=3, seed=5)
    with pytest.raises(InputError, match="All pictures to train on look like one"):
        train(validation_data_dir=tmp_path / "copy", class_data_dir=tmp_path / "class")


def test_starting_over_leaves_no_validation_of_the_run_before(train):
    train(**SPLIT)
    out = train(resume_from_checkpoint="none", seed=3, **SPLIT)
    assert [row["step"] for row in validations(out)] == [0, 1, 2]


def test_the_lora_that_a_run_begins_with_is_not_lost(train, tmp_path):
    """Where training spoils it, best/ holds it."""
    options = dict(max_train_steps=12, learning_rate=0.03, **SPLIT)
    first = train(output_dir=tmp_path / "first", **options)
    spoilt = options | dict(learning_rate=5.0, max_train_steps=2)
    second = train(output_dir=tmp_path / "second", lora_weights=first / "best", **spoilt)
    rows = validations(second)
    assert rows[0]["validation/relative_loss"] < rows[-1]["validation/relative_loss"] < 1  # still better than the base
    assert {row["validation/best_step"] for row in rows} == {0}
    begun, best = read_lora(first / "best"), read_lora(second / "best")
    for name in begun:
        torch.testing.assert_close(best[name], begun[name], rtol=1e-5, atol=1e-7)


def test_a_best_of_steps_given_up_goes(train):
    """Gone on from a checkpoint before any step was better than the base, with a later best/ there."""
    options = dict(checkpointing_steps=1, checkpoints_total_limit=9, **SPLIT)

    def only_second(validation, table, step):
        validation.best_step = 2 if step == 2 else validation.best_step
        return step == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("text_to_image_lora.stopping.take_in", only_second)
        out = train(max_train_steps=2, **options)
    assert (out / "best").is_dir()
    train(max_train_steps=1, resume_from_checkpoint="checkpoint-1", **options)
    assert not (out / "best").exists()


def test_a_checkpoint_comes_after_the_pictures_of_its_step(train, monkeypatch):
    """Killed while it draws, a run goes on from before, and draws them again."""
    options = dict(max_train_steps=2, checkpointing_steps=1, validation_prompt="an axe", validation_steps=2)
    draw, calls = validation.generate_images, []

    def killed(*given, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*given, **options)

    monkeypatch.setattr(validation, "generate_images", killed)
    with pytest.raises(KeyboardInterrupt):
        train(**options)
    out = train(**options)
    assert [path.name for path in sorted((out / "validation").iterdir())] == ["step-000000", "step-000002"]


def test_a_validation_folder_with_the_same_pictures_is_told(train, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "copy")
    with pytest.raises(InputError, match="All pictures to train on look like one in --validation_data_dir"):
        train(validation_data_dir=tmp_path / "copy")

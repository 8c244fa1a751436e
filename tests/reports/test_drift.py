"""The drift of a LoRA: how much it changes the predictions for captions without the concept."""

import re

import numpy as np
import pytest
import torch
from conftest import TORCHRUN, read_metrics, refusal_of, run_command, train_script, write_pictures

from text_to_image_lora.reports import stopping, validation_loss
from text_to_image_lora.training.checkpoint import read_state


CONCEPT = dict(trigger_word="sks", validation_split=0.34, validation_steps=1, max_train_steps=3)


def drifts(folder):
    return [row["validation/drift"] for row in read_metrics(folder) if "validation/drift" in row]


def test_it_is_the_change_from_the_base_model_without_the_concept(train, tiny_sd, tmp_path, monkeypatch):
    """Compared with a plain loop over pictures and timesteps, with the base model and the text encoder from disk."""
    from diffusers import StableDiffusionPipeline

    tables, original = [], validation_loss.LossMeter.drift

    def look(meter, validation_set):
        tables.append((meter, validation_set, original(meter, validation_set)))
        return tables[-1][2]

    monkeypatch.setattr(validation_loss.LossMeter, "drift", look)
    others = write_pictures(tmp_path / "others", count=3, seed=9)
    out = train(trigger_word="sks", validation_data_dir=others, validation_steps=2, seed=5)
    ((meter, validation_set, table),) = tables  # the base model has no drift, which needs no measurement
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    expected = np.zeros((3, 8))
    for index in range(3):
        row, name = validation_set.row(index)[0], validation_set.pictures.facts[index].image_id
        text = f"a {['red', 'blue', 'green'][index]} axe number {index}"
        hidden_states = stock.encode_prompt([text], "cpu", 1, False)[0]
        for k, t in enumerate(meter.timesteps):
            noise = validation_loss._make_noise(row["mean"].shape, 5, name, k)[None]
            noisy = stock.scheduler.add_noise(
                row["mean"][None] * meter.models.scaling_factor, noise, torch.tensor([t])
            )
            with torch.no_grad():
                pred, base = (unet(noisy, t, hidden_states).sample for unet in (meter.models.denoiser, stock.unet))
            expected[index, k] = (pred - base).square().mean()
    assert table == pytest.approx(expected, rel=1e-3)
    base = np.array(read_state(out / "checkpoint-2")[0].validation["base"]).mean(axis=0)
    assert drifts(out) == [0, pytest.approx(float((expected.mean(axis=0) / base).mean()), rel=1e-3)]


def test_training_towards_the_base_model_lowers_it(train, tmp_path):
    """As the concept is left out of the captions, the predictions for them are trained towards the base model's."""
    common = CONCEPT | dict(concept_phrases=["axe"], trigger_word=None, max_train_steps=30, validation_steps=30)
    plain = drifts(train(**common, output_dir=tmp_path / "plain"))
    preserved = drifts(
        train(
            **common, output_dir=tmp_path / "kept", preservation="output", preservation_share=1, preservation_weight=4
        )
    )
    assert plain[0] == preserved[0] == 0
    assert 0 < preserved[1] < 0.5 * plain[1]


@pytest.mark.parametrize(
    "flags",
    [dict(train_text_encoder=True), dict(cache_variations=0), dict(use_ema=True), dict(use_dora=True)],
    ids=str,
)
def test_each_way_to_train(train, flags):
    first, *later = drifts(train(**CONCEPT, **flags))
    assert first == 0
    assert len(later) == 3
    assert all(drift > 0 for drift in later)


def test_it_is_only_measured_if_the_concept_is_known(train, tmp_path):
    assert drifts(train(validation_split=0.34)) == []
    assert (
        len(drifts(train(validation_split=0.34, concept_phrases=["red", "axe"], output_dir=tmp_path / "named"))) == 2
    )


def test_two_processes_equal_one(train, arguments, tmp_path):
    alone = drifts(train(**CONCEPT, output_dir=tmp_path / "alone"))
    words = arguments(**CONCEPT, output_dir=tmp_path / "both", train_batch_size=1)
    done = run_command(words, TORCHRUN, {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert drifts(tmp_path / "both") == pytest.approx(alone, rel=1e-4)


# The best step under a limit.


def test_the_best_step_is_within_the_limit(monkeypatch, train, tmp_path, said):
    """The loss falls at every step, and the drift grows."""
    common = CONCEPT | dict(learning_rate=3e-2, max_train_steps=4)
    free = train(**common, output_dir=tmp_path / "free")
    _, *grown = drifts(free)
    losses = [row["validation/relative_loss"] for row in read_metrics(free) if "validation/drift" in row]
    assert grown == sorted(grown)
    best = int(np.argmin(losses[1:3])) + 1
    assert losses[best] < 1, "the limit is tested by a step that is better than the base model"
    assert read_metrics(free)[-1]["validation/best_step"] > best
    limit = (grown[best - 1] + grown[best]) / 2
    bound = train(**common, output_dir=tmp_path / "bound", max_drift=limit, early_stopping_patience=2)
    last = [row for row in read_metrics(bound) if "validation/drift" in row][-1]
    assert (last["step"], last["validation/best_step"]) == (best + 2, best)
    assert last["validation/best_drift"] == grown[best - 1]
    assert any(f"loss with a drift of {grown[best - 1]:.3f}" in line for line in said)
    assert read_state(bound / f"checkpoint-{best + 2}")[0].validation["best_drift"] == grown[best - 1]


def test_no_step_within_the_limit(train, said):
    out = train(**CONCEPT, max_drift=1e-9)
    assert "validation/best_step" not in read_metrics(out)[-1]
    assert not (out / "best").exists()
    (line,) = [line for line in said if line.startswith("Validation: ")]
    assert line == (
        "Validation: no step up to 3 was better than the base model with a drift of at most 1e-09 (--max_drift). Add "
        "--preservation output, raise --max_drift, or lower --learning_rate."
    )


def test_a_step_that_is_not_allowed_counts_towards_the_patience():
    base = np.ones((3, 8))
    validation = stopping.Validation(base=base.tolist(), base_probe=base.tolist(), best=base.tolist())
    assert stopping.update_best(validation, base * 0.9, 1, drift=0.1)
    assert not stopping.update_best(validation, base * 0.8, 2, drift=0.3, allowed=False)
    assert (validation.best_step, validation.best_drift, validation.waited) == (1, 0.1, 1)
    assert validation.worse_since is None
    assert stopping.update_best(validation, base * 0.85, 3, drift=0.2)
    assert (validation.best_step, validation.best_drift, validation.waited) == (3, 0.2, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(max_drift=0.1), "--max_drift needs validation pictures: add --validation_split 0.1"),
        (
            dict(max_drift=0.1, validation_split=0.34),
            "--max_drift: nothing names the concept. Name it by --concept_phrases as the captions do.",
        ),
        (
            dict(concept_phrases=["spear"], validation_split=0.34),
            "drift: no caption contains 'spear'; the first is 'a red axe number 0'. Name the concept by --concept_phrases "
            "as the captions do, or write a caption without it: --preservation_prompt TEXT.",
        ),
        (
            dict(concept_phrases=["red"]),
            "--concept_phrases is only used for --preservation, for --num_class_images without --class_prompt, and to measure "
            "the drift of validated runs: add --preservation output or --validation_split 0.1.",
        ),
    ],
)
def test_what_is_refused(arguments, flags, message):
    from text_to_image_lora.training.inputs import find_inputs

    words = arguments(**flags)
    assert refusal_of(lambda: find_inputs(train_script.parse_settings(words))) == message


@pytest.mark.parametrize(
    ("drift", "preserves", "advised"),
    [(None, False, False), (0.09, False, False), (0.1, False, True), (0.55, False, True), (0.55, True, False)],
)
def test_preservation_is_advised_if_the_drift_is_high(drift, preserves, advised):
    advice = stopping.advise_on_drift(drift, preserves=preserves)
    assert (advice is not None) is advised
    if advised:
        assert advice.startswith(f"A drift of {drift:.3f} is high")
        assert "--preservation output" in advice


# Where it is shown.


def test_it_is_shown_on_the_page_and_on_the_card(train):
    out = train(**CONCEPT, learning_rate=3e-2)
    drift = read_metrics(out)[-1]["validation/best_drift"]
    page = (out / "report.html").read_text()
    assert f"<b>{drift:.3f}</b><span>drift from the base model" in page
    assert "Drift from the base model without the concept" in page
    card = (out / "README.md").read_text()
    assert f"difference from the base model's predictions is {100 * drift:.1f}% of the base model's loss." in card


def test_captions_without_the_concept_are_on_the_sheet_and_the_page(train, tmp_path, monkeypatch):
    """Class pictures are shown with their captions alone, as these have no concept."""
    from text_to_image_lora.pictures import inspection

    write_pictures(tmp_path / "class", count=2, captions=["an axe, sks"], seed=3)
    rows, draw = [], inspection.labelled_sheet
    monkeypatch.setattr(inspection, "labelled_sheet", lambda found: rows.extend(found) or draw(found))
    flags = dict(
        class_data_dir=tmp_path / "class", preview_data=tmp_path / "sheet.png", concept_phrases=["red", "sks"]
    )
    others = write_pictures(tmp_path / "others", count=3, seed=9)
    out = train(**flags, validation_data_dir=others)
    given = {
        f"a {colour} axe number {k}": "the empty caption" for k, colour in enumerate(["red", "blue", "green"] * 2)
    }
    given |= {f"a red axe number {k}": f"a axe number {k}" for k in (0, 3)}
    texts = [f"{caption}  (without the concept: {without})" for caption, without in given.items()]
    assert sorted(row.label.text for row in rows) == sorted([*texts, "an axe, sks", "an axe, sks"])
    shown = re.findall("<br>without the concept: (.*?)</span>", (out / "report.html").read_text())
    assert shown == [without.replace("the empty", "no") for without in given.values()]

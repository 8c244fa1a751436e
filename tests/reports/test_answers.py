"""The answer of a run's page, from metrics and files made by hand."""

import json
import re

import numpy as np
import pytest
from conftest import refusal_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from text_to_image_lora.reports import report_page, runs, sample_pictures, stopping
from text_to_image_lora.reports.equal_files import find_equal


def write_run(
    folder, losses, *, held_out=4, patience=None, num_steps=36, finished=False, pictures="0123", weights=0.0
):
    """Writes a run that was validated with these relative losses {step: loss}, judged as a run judges itself."""
    folder.mkdir(parents=True, exist_ok=True)
    shifts = np.linspace(0.9, 1.1, max(held_out, 2))[:, None]
    base = np.ones((max(held_out, 2), 8))
    validation = stopping.Validation(base=base.tolist(), base_probe=base.tolist(), best=base.tolist())
    rows = []
    for step, loss in losses.items():
        table = 1 + (loss - 1) * shifts * base
        if step:
            stopping.update_best(validation, table, step)
        row = {"step": step, **stopping.make_metrics(table, table, validation, range(8))}
        rows.append(row | stopping.metrics_of_best(validation))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"max_train_steps": num_steps, "early_stopping_patience": patience, "dataset": "0123"}
    numbers = dict.fromkeys(("pictures", "captions", "different_captions", "samples_an_epoch", "steps_an_epoch"), 1)
    tables = {name: {} for name in ("sizes", "concepts", "repeats")}
    sheet = numbers | tables | {"validated": held_out, "held_out": pictures, "shown": [], "fingerprint": "0"}
    about = {"settings": settings, "dataset": sheet}
    (folder / "about.json").write_text(json.dumps(about))
    last = max(losses, default=0)
    for place in ["best"] * (validation.best_step is not None) + [""] * finished:
        (folder / place).mkdir(exist_ok=True)
        step = str(validation.best_step if place else last)
        save_file({"x": np.full(1, weights)}, folder / place / "pytorch_lora_weights.safetensors", {"ss_steps": step})
    return runs.make_answer(runs.read_run(folder))


@pytest.mark.parametrize("losses", [{}, {0: 1.0}])
def test_a_run_before_its_first_validation_is_not_judged_yet(tmp_path, losses):
    answer = write_run(tmp_path, losses)
    assert answer.sentence == "Not judged yet: so far, only the base model was validated."
    assert (answer.judged, answer.waits, answer.best_step, answer.gain) == (False, True, None, None)


def test_a_run_whose_steps_are_all_worse_is_judged(tmp_path):
    answer = write_run(tmp_path, {0: 1.0, 3: 1.2})
    assert answer.sentence.startswith("No step up to 3 was better than the base model. Lower --learning_rate")
    assert (answer.judged, answer.waits) == (True, False)


def test_a_run_that_holds_nothing_out_says_how_to_choose(tmp_path):
    answer = write_run(tmp_path, {}, held_out=0)
    assert (answer.sentence, answer.judged, answer.waits) == (runs.NOT_JUDGED, False, False)


@pytest.mark.parametrize(
    ("losses", "best_step"),
    [
        ({0: 1, 6: 0.931, 12: 0.871, 18: 0.861}, 18),
        ({0: 1, 6: 0.931, 12: 0.871, 18: 0.872}, 12),
        ({0: 1, 6: 0.999}, 6),
    ],
)
def test_headline_and_curve_agree(tmp_path, losses, best_step):
    answer = write_run(tmp_path, losses)
    assert answer.best_step == best_step == min(losses, key=losses.get)
    assert answer.gain == pytest.approx(100 * (1 - losses[best_step]))
    assert answer.error is not None
    assert f"{answer.gain:.1f} ± {answer.error:.1f}%" in answer.sentence


FELL_THEN_ROSE = {0: 1.0, 6: 0.9, 12: 0.8, 15: 0.85, 18: 0.86}


@pytest.mark.parametrize(
    ("changes", "stopped_early"),
    [
        (dict(patience=2, finished=True), True),
        (dict(patience=None, finished=True), False),
        (dict(patience=3, finished=True), False),
        (dict(patience=2, finished=False), False),  # it was stopped in between
        (dict(patience=2, finished=True, num_steps=18), False),  # patience ended where the steps did
    ],
)
def test_an_early_stop_is_told(tmp_path, changes, stopped_early):
    answer = write_run(tmp_path, FELL_THEN_ROSE, **changes)
    assert answer.stopped_early == stopped_early
    assert ("The run stopped early at step 18 of 36: " in answer.sentence) == stopped_early


def test_metrics_of_an_earlier_version_have_no_error(tmp_path):
    write_run(tmp_path, {0: 1.0, 6: 0.9})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("validation/best_standard_error", None)
        row.pop("validation/sure_step", None)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = runs.make_answer(runs.read_run(tmp_path))
    assert answer.sentence == "Best at step 6, 10.0% below the base model's loss; still improving."


def test_cards_of_equal_prompts_are_told_apart_by_their_options(tmp_path):
    """By whatever differs: guidance, size, negative prompt; the seed stands there anyway."""
    write_run(tmp_path, {0: 1.0})
    (tmp_path / "about.json").unlink()
    different = [
        {"guidance_scale": "2.0"},
        {"guidance_scale": "9.0"},
        {"negative_prompt": "rust", "guidance_scale": "9.0"},
    ]
    pictures = {
        f"prompt-{place:02d}-0": (Image.new("RGB", (8, 8)), {"prompt": "a red axe", "seed": 3} | options)
        for place, options in enumerate(different)
    }
    sample_pictures.save_pictures(tmp_path / "validation" / "step-000006", pictures)
    text = report_page.write_page(tmp_path).read_text(encoding="utf-8")
    notes = re.findall(r'<span class="quiet">seed 3</span> <span class="quiet">([^<]*)</span>', text)
    assert notes == ["guidance 2.0", "guidance 9.0", "without rust, guidance 9.0"]


def compare(tmp_path, *runs_):
    """Writes the page that compares runs with these arguments of `write_run`, and returns its text and its order."""
    for number, (losses, changes) in enumerate(runs_):
        write_run(tmp_path / f"run-{number}", losses, weights=float(number), **changes)
    folders = report_page.find_runs([tmp_path])
    text = report_page.write_comparison(folders, tmp_path / "report.html", "runs").read_text(encoding="utf-8")
    rows = re.findall(r'<tr class="(best)?">\s*<td><span class="dot"[^>]*></span>([\w-]+)', text)
    return text, [name for _, name in rows], [name for best, name in rows if best]


A_LITTLE, MUCH = {0: 1.0, 6: 0.9}, {0: 1.0, 6: 0.6}


def test_runs_on_the_same_pictures_are_ranked_by_gain(tmp_path):
    text, order, best = compare(tmp_path, (A_LITTLE, {}), (MUCH, {}))
    assert (order, best) == (["run-1", "run-0"], ["run-1"])
    assert "run-1 did best." in text


def test_runs_on_different_pictures_are_not_ranked(tmp_path):
    text, order, best = compare(tmp_path, (A_LITTLE, {}), (MUCH, {"pictures": "4567"}))
    assert (order, best) == (["run-0", "run-1"], [])
    assert "The runs were validated on different pictures" in text
    assert "did best" not in text


@pytest.mark.parametrize("changes", [{"validation_split": 0.2}, {"train_data_dir": ["other"]}, {}])
def test_runs_of_earlier_versions_are_compared_by_their_flags(tmp_path, changes):
    for number, flags in enumerate(({}, changes)):
        (tmp_path / f"run-{number}").mkdir()
        written = {"train_data_dir": ["axes"], "validation_split": 0.1, "rank": number} | flags
        (tmp_path / f"run-{number}" / "run.yaml").write_text(json.dumps(written))
    text, *_ = compare(tmp_path, (A_LITTLE, {"pictures": None}), (MUCH, {"pictures": None}))
    assert ("The runs were validated on different pictures" in text) == bool(changes)


def test_runs_that_hold_nothing_out_do_not_stop_the_others_from_being_ranked(tmp_path):
    text, order, best = compare(tmp_path, ({}, {"held_out": 0, "pictures": None}), (A_LITTLE, {}), (MUCH, {}))
    assert (order[0], best) == ("run-2", ["run-2"])


def test_runs_that_were_not_validated_yet_have_no_best_one(tmp_path):
    text, _, best = compare(tmp_path, ({0: 1.0}, {}), ({0: 1.0}, {}))
    assert best == []
    assert "Not judged yet: no run has validated a step on held-out pictures so far." in text


def test_equal_recommended_files_are_told(tmp_path):
    for number, weights in enumerate((0.0, 0.0, 1.0)):
        write_run(tmp_path / f"run-{number}", A_LITTLE, weights=weights)
    path = report_page.write_comparison(report_page.find_runs([tmp_path]), tmp_path / "report.html", "runs")
    text = path.read_text(encoding="utf-8")
    assert "run-0 and run-1 are the same LoRA: their files hold equal weights." in text
    assert text.count("the same LoRA") == 1


@pytest.mark.parametrize(("last", "equal"), [({0: 1, 6: 0.9}, True), ({0: 1, 3: 0.8, 6: 0.9}, False)])
def test_the_last_lora_may_be_the_best_one(tmp_path, last, equal):
    write_run(tmp_path, last, finished=True)
    (tmp_path / "about.json").unlink()
    text = report_page.write_page(tmp_path).read_text(encoding="utf-8")
    assert ("are the same LoRA: their files hold equal weights." in text) == equal


def test_files_are_equal_whatever_their_names_headers_and_order(tmp_path):
    """A file of other weights, shapes or types is another LoRA."""
    a, b = np.arange(4, dtype=np.float32), np.ones(3, dtype=np.float32)
    kept = {
        "one": ({"a": a, "b": b}, {"ss_steps": "1"}), "two": ({"b": b, "a": a}, {"ss_steps": "2"}), "three": ({"a": a, "b": b}, None),
        "values": ({"a": a + 1, "b": b}, None), "names": ({"b": a, "a": b}, None), "shape": ({"a": a.reshape(2, 2), "b": b}, None),
        "type": ({"a": a.astype(np.float64), "b": b}, None), "fewer": ({"a": a}, None),
    }  # fmt: skip
    files = {}
    for name, (tensors, header) in kept.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, files[name], header)
    for name in ("x", "y"):
        files[name] = tmp_path / f"{name}.bin"
        files[name].write_bytes(b"weights")
    assert find_equal(files) == [["one", "two", "three"], ["x", "y"]]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("about.json", "[]"),
        ("about.json", "[" * 100_000),
        ("about.json", '{"settings": 5}'),
        ("about.json", '{"dataset": []}'),
        ("about.json", '{"settings": {"early_stopping_patience": "x"}}'),
        ("about.json", '{"settings": {"max_train_steps": []}}'),
        ("run.yaml", "- rank"),
        ("run.yaml", "rank: " + "[" * 100_000),
        ("run.yaml", "rank: &a [*a]"),
        ("run.yaml", "rank: !!python/object/apply:os.system [ls]"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused_in_one_line(tmp_path, file, text):
    write_run(tmp_path, {0: 1.0, 3: 0.9})
    (tmp_path / file).write_text(text)
    assert refusal_of(runs.read_run, tmp_path).startswith(f"{tmp_path / file}: ")


def test_files_with_other_names_and_texts_are_no_sample_pictures(tmp_path):
    write_run(tmp_path, {0: 1.0, 3: 0.9})
    for place in ("step-x", "step-000003"):
        (tmp_path / "validation" / place).mkdir(parents=True)
        info = PngInfo()
        info.add_text("seed", "x" * 5000)
        Image.new("RGB", (4, 4)).save(tmp_path / "validation" / place / "prompt-y.png", pnginfo=info)
    (pictures,) = runs.read_run(tmp_path).pictures.values()
    assert [sample.seed for sample in pictures.values()] == [None]

"""`metrics.jsonl` and the metrics of each step: complete lines, each written once, and no NaN."""

import io
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, batch_sampler, read_metrics

from text_to_image_lora.errors import NotANumberError
from text_to_image_lora.reports import curves, metrics, progress
from text_to_image_lora.reports import reports as reports_of_runs
from text_to_image_lora.reports.metrics import MetricsFile, StepMetrics
from text_to_image_lora.reports.numbers import read_numbers
from text_to_image_lora.reports.progress import Pauses, StepResolutions, format_duration, peak_memory_gib


@pytest.fixture
def written(tmp_path):
    """A file of steps 0 to 3 from a run that was killed while it wrote step 3."""
    path = tmp_path / "metrics.jsonl"
    metrics_file = MetricsFile(path, 0)
    for step in range(3):
        metrics_file.write(step, {"train_loss": 1 / (1 + step)})
    with open(path, "a") as file:
        file.write('{"step": 3, "train_lo')
    return path


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (1, [0, 1]), (2, [0, 1, 2]), (5, [0, 1, 2])])
def test_rows_that_a_resumed_run_writes_again_are_discarded(written, first_step, kept):
    MetricsFile(written, first_step).write(first_step + 1, {"train_loss": 0.5})
    assert [row["step"] for row in read_metrics(written.parent)] == [*kept, first_step + 1]


def test_a_validation_that_is_still_due_is_not_there_twice(tmp_path):
    """The run was stopped during the validation, resumed, and killed while it validated again."""
    metrics_file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        metrics_file.write(step, {"train_loss": 0.5})
        metrics_file.write(step, {"validation/loss": 0.5})
    assert MetricsFile(tmp_path / "metrics.jsonl", 2, ["pictures"]).discarded == {}
    assert MetricsFile(tmp_path / "metrics.jsonl", 2, ["loss", "pictures"]).discarded == {2: 1}
    assert [list(row)[1] for row in read_metrics(tmp_path)] == ["train_loss", "validation/loss", "train_loss"]


@pytest.mark.parametrize("garbage", ["\0\0\0\n", '{"step": 3, "tra\n', '{"step": 3'])
def test_a_damaged_line_is_ignored(written, garbage):
    with open(written, "a") as file:
        file.write("\n" + garbage)
    assert MetricsFile(written, 2).discarded == {}
    assert [row["step"] for row in read_metrics(written.parent)] == [0, 1, 2]


def test_json_has_no_infinity(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl", 0).write(1, {"grad_norm": math.inf, "lr": 1e-4, "train_loss": math.nan})
    assert read_metrics(tmp_path) == [{"step": 1, "grad_norm": None, "lr": 1e-4, "train_loss": None}]


def test_starting_over_begins_new_metrics(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.yaml").write_text("max_train_steps: 3\n")
    (tmp_path / "out" / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    out = train(max_train_steps=1, resume_from_checkpoint="none")
    assert [row["step"] for row in read_metrics(out)] == [1]


def numbers(loss):
    """The numbers that the training loop reports at a step."""
    return {"train_loss": torch.tensor(loss), "asked": False, "lr": 1e-4, "grad_norm": torch.tensor(0.5)}


@pytest.fixture
def reports(tmp_path, said):
    """A `StepMetrics` whose tracker appends everything it receives to `logged`."""
    logged = []
    tracker = SimpleNamespace(
        name="tensorboard", writer=None, attempt=lambda work: work(),
        log=lambda values, step: logged.append((step, dict(values))),
    )  # fmt: skip
    accelerator = SimpleNamespace(device=torch.device("cpu"), trackers=[tracker])
    made = StepMetrics(accelerator, MetricsFile(tmp_path / "metrics.jsonl", 0), 100, tmp_path, "--lighter", Pauses())
    made.logged, made.said = logged, said
    return made


def test_numbers_are_what_they_were_when_they_were_put(reports, tmp_path):
    """Changing a tensor in place afterwards, as the training loop does, has no effect."""
    loss = torch.tensor(0.5)
    values = {"train_loss": loss, "asked": False, "lr": 1e-4, "grad_norm": torch.tensor(2.0, dtype=torch.float64)}
    reports.put(1, values, samples=4, seconds=0.5)
    loss.fill_(7)
    reports.flush()
    assert read_metrics(tmp_path)[-1] == {"step": 1, "train_loss": 0.5, "lr": 1e-4, "grad_norm": 2.0} | {
        "images_per_second": 8.0,
        "peak_memory_gib": read_metrics(tmp_path)[-1]["peak_memory_gib"],
    }


def test_a_step_is_written_while_the_next_one_runs(reports, tmp_path):
    reports.put(1, numbers(0.5), samples=1, seconds=1)
    assert reports.logged == []
    reports.put(2, numbers(0.25), samples=1, seconds=1)
    assert [step for step, _ in reports.logged] == [1]
    for _ in range(2):  # the second call has nothing to write
        reports.flush()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["train_loss"], row["lr"]) for row in rows] == [(1, 0.5, 1e-4), (2, 0.25, 1e-4)]
    assert [{"step": step, **values} for step, values in reports.logged] == rows
    assert 0.01 < peak_memory_gib(torch.device("cpu")) < 64


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is what getrusage says")
def test_peak_memory_is_the_process_s_own():
    """It does not include the memory of the parent process."""
    held = np.ones(2**28)
    code = "import torch; from text_to_image_lora.reports.progress import peak_memory_gib as peak; print(peak(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.01 < float(done.stdout) < held.nbytes / 2**30


@pytest.mark.parametrize(("takes", "pause"), [(0.1, 10), (2, 40)])
def test_the_page_is_written_now_and_then(reports, monkeypatch, takes, pause):
    """At most every ten seconds, however short the epochs are, and for at most a twentieth of the time."""
    clock, written = SimpleNamespace(now=0.0), []

    def update_page(folder):
        clock.now += takes
        written.append(clock.now)

    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(metrics, "update_page", update_page)
    while clock.now < 200:
        clock.now += 0.5  # an epoch
        reports.write_page()
    assert np.diff(written) == pytest.approx(pause + takes, abs=0.51)


def put_losses(reports, losses, first=1):
    """Reports and writes steps with these losses."""
    for step, loss in enumerate(losses, first):
        reports.put(step, numbers(loss), samples=1, seconds=1)
        reports.flush()


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["train_loss", "grad_norm"])
def test_a_step_that_is_not_finite_is_counted_and_logged_once(reports, tmp_path, name, number):
    put_losses(reports, [0.5])
    for step in (2, 3):
        reports.put(step, numbers(0.5) | {name: torch.tensor(number)}, samples=1, seconds=1)
        reports.flush()
    put_losses(reports, [0.5], first=4)
    assert [row.get("skipped") for row in read_metrics(tmp_path)] == [None, 1, 1, None]
    assert [row[name] for row in read_metrics(tmp_path)] == [pytest.approx(0.5), None, None, pytest.approx(0.5)]
    assert [name in values for _, values in reports.logged] == [True, False, False, True]  # trackers take no null
    (line,) = reports.said
    assert line.startswith("step 2 is skipped: its loss is ")
    assert str(number) in line
    assert reports.describe_skipped() == "2 steps were skipped because their loss or gradient was not finite: 2, 3"
    assert reports.divergence(finished=True) is None


@pytest.mark.parametrize(
    ("first", "cause"), [(1, "The weights of the base model or"), (5, "The --learning_rate is probably too high")]
)
def test_ten_skipped_steps_in_a_row_end_the_run(reports, tmp_path, first, cause):
    put_losses(reports, [0.5] * (first - 1) + [math.nan] * 9)
    assert reports.divergence(finished=False) is None
    put_losses(reports, [math.nan], first=first + 9)
    error = reports.divergence(finished=False)
    assert isinstance(error, NotANumberError)
    assert error.exit_code == 3
    assert f"of 10 steps in a row is not finite, since step {first}." in str(error)
    assert cause in str(error)
    assert f"the last finite weights are in {tmp_path / 'last-good'}" in str(error)
    assert "\n" not in str(error)
    put_losses(reports, [0.5], first=first + 10)
    assert reports.divergence(finished=False) is None


def test_a_run_does_not_end_on_steps_that_were_skipped(reports):
    put_losses(reports, [0.5, math.nan])
    assert reports.divergence(finished=True) is None  # a single skipped step may be an accident
    put_losses(reports, [math.nan], first=3)
    assert reports.divergence(finished=False) is None
    assert "2 steps in a row" in str(reports.divergence(finished=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_of_a_single_step_that_was_skipped_has_failed(reports, bad):
    reports.num_steps = 1
    put_losses(reports, [bad])
    assert reports.divergence(finished=False) is None
    error = reports.divergence(finished=True)
    assert error.exit_code == 3
    assert str(error).startswith("The loss or gradient of 1 step in a row is not finite, since step 1.")


NO_ROWS = (
    "5", "[]", "null", '"x"', '{"a": 1}', '{"step": null}', '{"step": "x"}', '{"step": 1.5}', '{"step": -1}', '{"step": true}',
    '{"step": 1' + "0" * 40 + "}", '{"step": 1, "train_loss": "x"}', '{"step": 1, "train_loss": [1]}', "[" * 200_000,
    '{"step": 1, "train_loss": NaN}', '{"step": 1, "train_loss": 1' + "0" * 400 + "}", "\0\1",
)  # fmt: skip


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_is_no_row_is_skipped(written, line):
    before = read_numbers(written.parent)
    written.write_text(line + "\n" + written.read_text())
    after = read_numbers(written.parent)
    assert (after.last_step, after.curves["train_loss"].values.tolist()) == (
        2,
        before.curves["train_loss"].values.tolist(),
    )
    assert MetricsFile(written, 2).discarded == {}
    assert [row["step"] for row in read_metrics(written.parent)] == [0, 1, 2]


def test_the_loss_scale_of_fp16_may_settle(reports):
    """It starts at 2**16 and is halved at each step that overflows, so more skipped steps are allowed, without a message."""
    reports.uses_grad_scaler = True
    for step in range(1, 26):
        reports.put(step, numbers(0.5) | {"grad_norm": torch.tensor(math.inf)}, samples=1, seconds=1)
    reports.flush()
    assert [line for line in reports.said if "skipped" in line] == []
    assert reports.divergence(finished=False) is None
    reports.put(26, numbers(0.5) | {"grad_norm": torch.tensor(math.inf)}, samples=1, seconds=1)
    reports.flush()
    assert "26 steps in a row" in str(reports.divergence(finished=False))


def put_steps(reports, seconds):
    first = reports.pace.num_added + 1
    for step, each in enumerate(seconds, first):
        reports.put(step, numbers(0.5), samples=1, seconds=each)


def test_the_remaining_time_is_logged_after_ten_steps(reports):
    put_steps(reports, [9] * 2 + [2] * 7)
    assert reports.said == []
    put_steps(reports, [2] * 30)
    (line,) = reports.said
    assert line.startswith("2 s per step, 3 min for the remaining 90 steps; peak memory so far: ")


@pytest.mark.parametrize(("seconds", "words"), [(3, "3 s"), (600, "10 min"), (12_000, "3 h 20 min")])
def test_durations_are_formatted(seconds, words):
    assert format_duration(seconds) == words


@pytest.mark.parametrize("full", [False, True])
def test_a_slowdown_is_logged_once(reports, monkeypatch, full):
    """Flags that save memory are suggested only if the memory is full."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(percent=98 if full else 40))
    put_steps(reports, [0.1] * 30 + [0.9] * 4 + [0.1] * 3)  # a few slow steps are normal
    assert len(reports.said) == 1
    put_steps(reports, [0.9] * 5)
    assert "since step 38, a step takes 9 times as long" in reports.said[1]
    assert reports.said[1].endswith(
        "resume with --lighter." if full else "using this machine, or its clock rate was reduced"
    )
    put_steps(reports, [0.1] * 5 + [0.9] * 20)
    assert len(reports.said) == 2


def steps_of_two_resolutions():
    """Returns the `StepResolutions` of an epoch of 20 steps: 16 at squares of 64 pixels and buckets beside them, 4 at 192."""
    sizes = [(64, 64)] * 14 + [(96, 32)] * 2 + [(192, 192)] * 4
    groups = [0] * 14 + [1] * 2 + [2] * 4
    sampler = batch_sampler([*range(20)], batch_size=1, seed=3, groups=groups)
    return StepResolutions(sampler, sizes, (64, 192))


def test_the_remaining_time_counts_the_steps_of_each_resolution(reports):
    """16 steps of 1 s and 4 of 9 s take 52 s, 2.6 s each; the median of all is 1 s."""
    reports.pace.resolutions = of = steps_of_two_resolutions()
    assert of.shares == {64: 0.8, 192: 0.2}
    sides = [of.of(step) for step in range(1, 21)]
    assert Counter(sides) == {64: 16, 192: 4}
    put_steps(reports, [{64: 1, 192: 9}[side] for side in sides[:10]])
    assert reports.said[0].startswith("2.6 s per step, 4 min for the remaining 90 steps; ")


def test_a_resolution_that_did_not_occur_yet_counts_by_its_area(reports):
    reports.pace.resolutions = of = steps_of_two_resolutions()
    of.of = lambda step: 64
    put_steps(reports, [1] * 10)
    assert reports.said[0].startswith("2.6 s per step, ")


def test_steps_of_a_larger_resolution_are_no_slowdown(reports):
    """By chance, five of them follow each other; nine times as long as the others is usual for them."""
    reports.pace.resolutions = of = steps_of_two_resolutions()
    of.of = lambda step: 192 if step % 30 > 20 else 64
    put_steps(reports, [9 if of.of(step) == 192 else 1 for step in range(1, 100)])
    assert len(reports.said) == 1
    put_steps(reports, [20] * 40)  # of the smaller ones
    assert "a step takes 20 times as long" in reports.said[1]


@pytest.mark.parametrize(("first_step", "losses"), [(3, [1.0, 0.5, 0.25]), (2, [1.0, 0.5]), (0, [])])
def test_the_smoothed_loss_of_a_resumed_run_goes_on(reports, tmp_path, first_step, losses):
    """From the rows that are kept; skipped steps and validations have no part in it."""
    put_losses(reports, [1.0, 0.5, 0.25])
    reports.metrics_file.write(3, {"validation/loss": 9.0})
    again = MetricsFile(tmp_path / "metrics.jsonl", first_step)
    if losses:
        assert again.smooth_loss.value == pytest.approx(curves.smooth(losses)[-1], rel=1e-4)
    else:
        assert again.smooth_loss.value is None
    if first_step == 3:
        assert again.smooth_loss.value == pytest.approx(reports.smooth_loss.value)


def test_steps_that_were_skipped_are_not_in_the_smoothed_loss(reports, tmp_path):
    put_losses(reports, [1.0, math.nan, 0.5])
    assert MetricsFile(tmp_path / "metrics.jsonl", 3).smooth_loss.value == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("name", "seconds", "words"),
    [
        (("validation", ""), None, "2 s per step, 3 min for the remaining 90 steps, without the time of 5 validations; "),
        (("validation", ""), 60, "2 s per step, 8 min for the remaining 90 steps and 5 validations (60 s each); "),
        (
            ("set", " of sample pictures"), 0.5,
            "2 s per step, 3 min for the remaining 90 steps and 5 sets of sample pictures (0.5 s each); ",
        ),
    ],
)  # fmt: skip
def test_the_remaining_time_includes_the_pauses(reports, name, seconds, words):
    """One of the base model tells how long a pause takes; the pause after step 10 is still to come there."""
    reports.pace.pauses = pauses = Pauses([10, 30, 50, 70, 100], name)
    if seconds is not None:
        pauses.record(0, seconds)
    put_steps(reports, [2] * 10)
    assert reports.said[0].startswith(words)


def test_pauses_are_counted_once():
    pauses = Pauses([10, 20, 30])
    assert [pauses.num_left(step) for step in (0, 10, 11, 30, 31)] == [3, 3, 2, 1, 0]
    pauses.record(10, 4.0)
    assert [pauses.num_left(step) for step in (10, 20, 30)] == [2, 2, 1]
    assert pauses.seconds_left(10) == 8.0
    assert pauses.describe(25) == " and 1 validation"


def test_the_bar_leaves_pauses_out_of_the_speed_and_includes_them_in_the_rest(monkeypatch):
    """Ten steps of a second, then a pause of a minute: as many steps a second as before, and the pauses are still to come."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.TrainingBar, "_time", lambda self: clock.now, raising=False)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    pauses = Pauses([10, 20])
    bar = progress.TrainingBar(pauses, total=20, file=io.StringIO(), mininterval=0)
    bar._time = lambda: clock.now
    bar.start_t = bar.last_print_t = clock.now
    for _ in range(10):
        clock.now += 1
        bar.update()
    assert (bar.format_dict["left"], bar.format_dict["since"]) == ("00:10", "00:10")
    clock.now += 60
    pauses.record(10, 60)
    bar.leave_out(60)
    assert (bar.format_dict["left"], bar.format_dict["since"]) == ("01:10", "01:10")
    clock.now += 1
    bar.update()
    assert bar.format_dict["rate"] == pytest.approx(1.0)
    assert "11/20 [01:11<01:09" in str(bar)
    bar.close()


def test_the_first_loss_does_not_dominate_the_smoothed_loss():
    """The first averages are plain means; later values count by the usual decay."""
    assert curves.smooth([4.0, 1.0, 1.0]) == [4.0, 2.5, 2.0]
    late = curves.smooth([1.0] * 100 + [2.0])
    assert late[-1] == pytest.approx(1 + (1 - curves.SMOOTHING))


@pytest.mark.parametrize("step", [0.0, -1.0, 1e-9])
def test_a_clock_that_stands_still_ends_no_run(train, tmp_path, monkeypatch, step):
    """The ticks of some clocks are longer than a small step."""
    now = itertools.count(1000)
    monkeypatch.setattr(reports_of_runs, "time", SimpleNamespace(monotonic=lambda: next(now) * step))
    rows = read_metrics(train(max_train_steps=3))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["images_per_second"] < 1e9 for row in rows)

"""Tests the suite for GPUs: its rows, the table, and rows that can't be measured."""

import time

import pytest
import torch
from conftest import ROOT

from scripts import benchmark
from scripts.benchmarks import gpu
from scripts.benchmarks.gpu import Row, measure_rows, rows_for
from scripts.benchmarks.runs import CommandFailed, Result, other_scripts, prepare


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def silent(*_, **__):
    pass


def test_the_suite_without_a_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        benchmark.main(benchmark.parse_args(["--suite", "gpu"]))
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert "needs a CUDA GPU" in err


def test_a_suite_of_rows_that_work_and_rows_that_do_not(tiny_sd, tmp_path):
    others = other_scripts(bare_unet=True)
    setting = prepare(tiny_sd, tmp_path, resolution=32, rank=2, batch_size=2, others=others)
    rows = [
        Row("plain", precision="no", batch_size=2, runner="bare UNet"),
        Row("unknown flag", ("--no_such_flag", "on")),
        Row("unknown choice", ("--lr_scheduler", "wiggly")),
        Row("refused", ("--snr_gamma", "5", "--debiased_estimation"), precision="no"),
        Row("with a package", needs="no_such_package"),
    ]
    outcomes = measure_rows(rows, setting, time.monotonic() + 300, steps=2, show=silent)
    plain, *unmeasured = outcomes
    step = plain.result.figures["median"]
    assert len(plain.result.figures["step_seconds"]) == 1
    assert plain.images_per_second == pytest.approx(2 / step)
    reasons = [outcome.reason for outcome in unmeasured]
    assert reasons[0].startswith("left out: there is no flag --no_such_flag")
    assert reasons[1] == "left out: argument --lr_scheduler: invalid choice: 'wiggly'"
    assert reasons[2].startswith("failed: train_text_to_image_lora.py: Pass one of --snr_gamma")
    assert reasons[3] == "no_such_package is not installed"
    machine, rates = {"device": "A CPU", "torch": "2"}, {"tf32": 1e12}
    section = gpu.section_of("command", machine, rates, outcomes, ["One."], setting, steps=2)
    assert section.startswith("### A CPU, PyTorch 2\n\nThe command was `command`: model, 32², rank 2")
    assert f"\n| plain | {step:.3g} | {plain.images_per_second:.3g} |" in section
    assert f"\n| refused | {reasons[2]} | | | | | |\n" in section


class Machine:
    """Runs rows like a GPU with memory for batch sizes up to `most`, on which larger batches are faster up to `best`."""

    def __init__(self, best=1000, most=1000):
        self.best, self.most, self.ran = best, most, []

    def run(self, command, *, steps, timeout):
        self.ran.append(command.batch_size)
        if command.batch_size > self.most:
            raise CommandFailed("torch.OutOfMemoryError: CUDA out of memory.")
        figures = {"median": 0.1 * max(1, command.batch_size / self.best), "step_seconds": [], "first_step_after": 1}
        return Result(10.0, 2.0, 3.0, figures | {"flops": 1e12, "operators": {"mm": 2000}})


def growing_rows():
    return [row for row in rows_for() if row.growing or row.name in ("operators", "bf16", "fp32, --allow_tf32")]


def test_batch_sizes_grow_until_a_larger_one_is_not_faster():
    machine = Machine(best=4)
    outcomes = measure_rows(growing_rows(), machine, time.monotonic() + 60, show=silent)
    assert machine.ran == [1, 1, 2, 4, 8, 1]
    assert [o.reason for o in outcomes if o.row.batch_size > 8] == [
        "not measured: the previous batch size was not faster, or did not fit into memory"
    ] * 2
    assert "Best batch size: 4, with 40 images/s." in gpu.findings_of(outcomes)
    assert "ours: 2,000 operators and 1 TFLOP per step." in gpu.findings_of(outcomes)
    table = gpu.table_of(outcomes, {"bf16": 1e14})
    # 4 pictures of 1 TFLOP in 0.1 s, of 100 TFLOP/s
    assert "| bf16, batch 4 | 0.1 | 40 | 40.0% | 2.00 | 3.00 | 1 |" in table
    assert "| fp32, --allow_tf32 | 0.1 | 10 |  | 2.00 |" in table  # without its matrix rate, MFU is unknown


def test_out_of_memory_is_a_row():
    machine = Machine(most=8)
    outcomes = measure_rows(growing_rows(), machine, time.monotonic() + 60, show=silent)
    assert machine.ran == [1, 1, 2, 4, 8, 16, 1]
    assert "| bf16, batch 16 | out of memory | | | | | |" in gpu.table_of(outcomes, {})
    assert "Best batch size: 8, with 80 images/s." in gpu.findings_of(outcomes)


def test_rows_after_the_time_limit_are_not_measured():
    machine = Machine()
    outcomes = measure_rows(rows_for(8, baseline=True), machine, time.monotonic(), show=silent)
    assert machine.ran == []
    assert gpu.NO_TIME in {o.reason for o in outcomes}
    assert not [o for o in outcomes if o.result]
    assert gpu.findings_of(outcomes)[0].endswith("not measured: the time limit was reached.")


def test_the_rows_differ_in_name():
    names = [row.name for row in rows_for(8, baseline=True)]
    assert len(set(names)) == len(names)
    assert {"bf16, 2 GPUs", "bf16, 8 GPUs", "bf16, baseline"} <= {*names}
    assert not [row.name for row in rows_for() if row.processes > 1 or row.runner == "baseline"]


@pytest.mark.long
def test_the_losses_of_two_processes_equal_those_of_one(tiny_sd, tmp_path):
    setting = prepare(tiny_sd, tmp_path, resolution=32, rank=2)
    sentence = gpu.compare_ranks(setting, time.monotonic() + 300, steps=3, precision="no")
    assert "3 steps in no: the losses differ by at most" in sentence
    assert float(sentence.split("at most ")[1].split()[0]) < 1e-4


@pytest.mark.gpu
@needs_cuda
def test_a_row_on_a_gpu(tmp_path):
    others = other_scripts(bare_unet=True)
    setting = prepare(ROOT / "models" / "mini-sd", tmp_path, resolution=64, rank=4, others=others)
    for runner in ("ours", "bare UNet"):
        (outcome,) = measure_rows([Row("a", runner=runner)], setting, time.monotonic() + 300, steps=8, show=silent)
        assert outcome.result is not None, outcome.reason
        assert len(outcome.result.figures["step_seconds"]) == 7
        assert 0 < outcome.result.memory_gib <= outcome.result.peak_memory_gib

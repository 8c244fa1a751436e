"""The benchmarks: what is timed and counted, what the tables say of it, and what becomes of rows that can't be measured."""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from scripts import benchmark
from scripts.benchmarks import bare_unet, gpu, inside
from scripts.benchmarks.gpu import Row, measure_rows, rows_for
from scripts.benchmarks.runs import CommandFailed, Ran, prepare, run


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def silent(*_, **__):
    pass


# Inside.


def test_the_median_leaves_out_the_first_fifth():
    assert inside.middle([100.0, 90.0, *[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]) == 4.5
    assert inside.middle([3.0]) == 3.0


def counted(work):
    counter = inside.Counter()
    with counter:
        work()
    counter.end_of_step()
    return counter.told()


def test_arithmetic_is_what_pytorch_counts():
    conv, rows = torch.nn.Conv2d(3, 5, 3), torch.randn(2, 3, 8, 8, requires_grad=True)

    def work():
        conv(rows).flatten(1).matmul(torch.ones(180, 7)).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        work()
    assert counted(work)["flops"] == theirs.get_total_flops()


def test_arithmetic_that_pytorch_passes_over():
    """The lean forward adds in place, and attention on a CPU is an operator of its own."""
    out, a, b = torch.zeros(3, 4), torch.randn(3, 5), torch.randn(5, 4)
    told = counted(lambda: out.addmm_(a, b))
    assert (told["operators"], told["flops"]) == ({"addmm_": 1}, 2 * 3 * 4 * 5)
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 16 * 16 * 8
    told = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward())
    assert told["flops"] == 2 * product + 5 * product


def test_views_and_the_loader_are_not_counted(monkeypatch):
    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    monkeypatch.setattr(iterator, "__next__", iterator.__next__)  # to be put back
    counter = inside.Counter()
    counter.leave_out_loading()
    with counter:
        for (batch,) in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(6, 2)), batch_size=2):
            (batch.t()[0] + 1).detach()
            counter.end_of_step()
    assert [step["operators"] for step in counter.steps[1:]] == [{"add": 1}] * 2  # the first makes the iterator


def test_a_clock_that_saw_no_step_says_so():
    clock = inside.Clock()
    clock.end_of_step()
    with pytest.raises(SystemExit, match="was seen 1 times"):
        clock.told()


def bare_steps(model, batch_size):
    """A `Counter` and a `Clock` that saw three steps of the bare UNet."""
    words = ["--pretrained_model_name_or_path", str(model), "--resolution", "32", "--max_train_steps", "3"]
    words += ["--train_batch_size", str(batch_size), "--rank", "4", "--report_to", "none"]  # some don't concern it
    counter, clock = inside.Counter(), inside.Clock()
    hooks = [register_optimizer_step_post_hook(watch.end_of_step) for watch in (counter, clock)]
    try:
        with counter:
            bare_unet.main(bare_unet.parse_args(words))
    finally:
        for hook in hooks:
            hook.remove()
    return counter, clock


def test_the_bare_unet_steps_to_its_input_alone(tiny_sd):
    counter, clock = bare_steps(tiny_sd, 3)
    assert (len(counter.steps), len(clock.told()["step_seconds"])) == (3, 2)
    told = counter.told()
    assert told["operators"] == counter.steps[1]["operators"]
    assert told["operators"]["convolution"] == told["operators"]["convolution_backward"] > 10
    # As much arithmetic backward as forward, and what attention computes again: none for the weights' gradients.
    smaller = bare_steps(tiny_sd, 1)[0].told()
    assert told["flops"] == 3 * smaller["flops"]


def test_a_matrix_rate():
    assert 1e8 < inside.matrix_rate("fp32", torch.device("cpu"), side=256, repeats=4) < 1e14


# Outside.


def test_a_command_that_fails_says_why():
    code = "import sys; print('x' * 9000); print('ValueError: no', file=sys.stderr); print('50%', file=sys.stderr); sys.exit(3)"
    with pytest.raises(CommandFailed, match="^ValueError: no$") as caught:
        run([sys.executable, "-c", code])
    assert not caught.value.out_of_memory
    with pytest.raises(CommandFailed, match="^killed by SIGKILL$"):
        run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    code = "raise RuntimeError('CUDA out of memory. Tried ...')"
    with pytest.raises(CommandFailed) as caught:
        run([sys.executable, "-c", code])
    assert caught.value.out_of_memory


def test_a_command_that_takes_too_long_is_ended_with_what_it_has_started():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    with pytest.raises(CommandFailed, match=r"^stopped after 1 s$"):
        run([sys.executable, "-c", code], timeout=0.6)
    assert time.monotonic() - began < 20


def test_what_a_command_tells_is_read():
    ran = run([sys.executable, "-c", 'print(\'\\nBENCHMARK {"median": 2, "memory_gib": 3.5}\')'])
    assert (ran.told["median"], ran.memory_gib) == (2, 3.5)
    assert 0 < ran.peak_memory_gib < 5


def turn_of(**steps):
    """A turn in which the runners' steps took so long: 2 and 12 of them, and 5 s to start."""
    return {
        name.replace("_", " "): {
            count: Ran(
                5 + count * step,
                1.0 + count / 100,
                2.0 + step,
                {"median": step, "start": 4 + step, "step_seconds": [step]},
            )
            for count in (2, 12)
        }
        for name, step in steps.items()
    }


def test_medians_and_ratios_of_turns():
    """One turn in which the machine was busy changes neither a median nor a ratio."""
    turns = [
        turn_of(ours=2.0, bare_UNet=1.0, baseline=3.0),
        turn_of(ours=20.0, bare_UNet=10.0, baseline=3.0),
        turn_of(ours=2.2, bare_UNet=1.0, baseline=3.3),
    ]
    counted = {name: {"operators": {"mm": 3, "add": 4}, "flops": 6e12} for name in turns[0]}
    results = benchmark.results_of(turns, counted, [9e12, 1e13, 3e13], short=2, long=12)
    assert json.loads(json.dumps(results))["runners"].keys() == turns[0].keys()
    assert results["matrix_rate"] == 1e13
    ours = results["runners"]["ours"]
    assert (ours["step_seconds"], ours["operators"], ours["flops"]) == (2.2, 7, 6e12)
    assert ours["step_seconds_by_commands"] == pytest.approx(2.2)
    assert ours["start_seconds"] == pytest.approx(6.2)
    assert ours["mfu"] == pytest.approx(6 / 2.2 / 10)
    assert (ours["memory_gib"], ours["peak_memory_gib"]) == (pytest.approx(1.12), 22)
    assert [(r["steps"], r["told"]["median"]) for r in ours["runs"]][:3] == [(2, 2.0), (12, 2.0), (2, 20.0)]
    assert results["ratios"]["ours / bare UNet"] == {"median": 2.0, "turns": [2.0, 2.0, 2.2]}
    assert results["ratios"]["baseline / ours"]["median"] == pytest.approx(1.5)
    table = benchmark.table_of(results, "bf16")
    assert "| ours | 2.2 | 2.2 | 6.2 | 6 | 27.3% | 7 | 1.12 | 22.00 |" in table
    assert table.splitlines()[-3:] == [
        "Matrix rate (bf16): 10 TFLOP/s",
        "ours / bare UNet: 2.00 (turns: 2.00, 2.00, 2.20)",
        "baseline / ours: 1.50 (turns: 1.50, 0.15, 1.50)",
    ]


@pytest.mark.long
def test_steps_are_timed_beside_the_bare_unet_and_a_baseline(tiny_sd, tmp_path):
    script, flags = "train_text_to_image_lora.py", ["--report_to", "none", "--latent_cache_dir", tmp_path / "cache"]
    words = [
        "--model",
        tiny_sd,
        "--resolution",
        32,
        "--train_batch_size",
        2,
        "--rank",
        2,
        "--repeats",
        1,
        "--bare_unet",
    ]
    words += ["--short", 2, "--long", 4, "--json", tmp_path / "times.json", "--work_dir", tmp_path]
    words += ["--baseline", script, "--baseline_flags", *flags]
    command = [sys.executable, "scripts/benchmark.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "times.json").read_text())
    assert results["arguments"]["train_batch_size"] == 2
    assert results["machine"]["threads"] == 1
    assert benchmark.table_of(results, "float32") in done.stdout
    ours, bare, baseline = (results["runners"][name] for name in ("ours", "bare UNet", "baseline"))
    assert ours["operators_by_kind"] == baseline["operators_by_kind"]
    assert bare["operators"] < ours["operators"]
    assert [len(r["told"]["step_seconds"]) for r in ours["runs"]] == [1, 3]


# The suite.


def test_the_suite_without_a_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        benchmark.main(benchmark.parse_args(["--suite", "gpu"]))
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert "needs a CUDA GPU" in err


def test_a_suite_of_rows_that_work_and_rows_that_do_not(tiny_sd, tmp_path):
    setting = prepare(tiny_sd, tmp_path, resolution=32, rank=2, batch_size=2, bare_unet=True)
    rows = [
        Row("plain", precision="no", batch_size=2, runner="bare UNet"),
        Row("of tomorrow", ("--no_such_flag", "on")),
        Row("a choice of tomorrow", ("--lr_scheduler", "wiggly")),
        Row("refused", ("--snr_gamma", "5", "--debiased_estimation"), precision="no"),
        Row("with a package", needs="no_such_package"),
    ]
    outcomes = measure_rows(rows, setting, time.monotonic() + 300, steps=2, say=silent)
    plain, *others = outcomes
    assert len(plain.ran.told["step_seconds"]) == 1
    assert plain.images_per_second == pytest.approx(2 / plain.ran.told["median"])
    words = [outcome.words for outcome in others]
    assert words[0].startswith("left out: there is no flag --no_such_flag")
    assert words[1] == "left out: argument --lr_scheduler: invalid choice: 'wiggly'"
    assert words[2].startswith("failed: train_text_to_image_lora.py: Pass one of --snr_gamma")
    assert words[3] == "no_such_package is not installed"
    machine, rates = {"device": "A CPU", "torch": "2"}, {"tf32": 1e12}
    section = gpu.section_of("command", machine, rates, outcomes, ["One."], setting, steps=2)
    assert section.startswith("### A CPU, PyTorch 2\n\n`command`: model, 32², rank 2")
    assert f"\n| plain | {plain.ran.told['median']:.3g} | {plain.images_per_second:.3g} |" in section
    assert f"\n| refused | {words[2]} | | | | | |\n" in section


class Machine:
    """Runs rows as a GPU with memory for batches of `most`, on which larger batches are faster up to `best`."""

    def __init__(self, best=1000, most=1000):
        self.best, self.most, self.ran = best, most, []

    def run(self, how, runner, *, steps, batch_size, precision, flags, processes, timeout):
        self.ran.append(batch_size)
        if batch_size > self.most:
            raise CommandFailed("torch.OutOfMemoryError: CUDA out of memory.")
        told = {
            "median": 0.1 * max(1, batch_size / self.best),
            "step_seconds": [],
            "first_step_after": 1,
            "flops": 1e12,
        }
        return Ran(10.0, 2.0, 3.0, told | {"operators": {"mm": 2000}})


def growing_rows():
    return [row for row in rows_for() if row.growing or row.name in ("operators", "bf16", "fp32, --allow_tf32")]


def test_batches_grow_until_that_brings_nothing():
    machine = Machine(best=4)
    outcomes = measure_rows(growing_rows(), machine, time.monotonic() + 60, say=silent)
    assert machine.ran == [1, 1, 2, 4, 8, 1]
    assert [o.words for o in outcomes if o.row.batch_size > 8] == [
        "not measured: the batch before it was no faster, or did not fit"
    ] * 2
    assert "Best batch: 4, 40 images/s." in gpu.findings_of(outcomes)
    assert "ours: 2,000 operators and 1 TFLOP a step." in gpu.findings_of(outcomes)
    table = gpu.table_of(outcomes, {"bf16": 1e14})
    # 4 pictures of 1 TFLOP in 0.1 s, of 100 TFLOP/s
    assert "| bf16, batch 4 | 0.1 | 40 | 40.0% | 2.00 | 3.00 | 1 |" in table
    assert "| fp32, --allow_tf32 | 0.1 | 10 |  | 2.00 |" in table  # its rate is not known


def test_out_of_memory_is_a_row():
    machine = Machine(most=8)
    outcomes = measure_rows(growing_rows(), machine, time.monotonic() + 60, say=silent)
    assert machine.ran == [1, 1, 2, 4, 8, 16, 1]
    assert "| bf16, batch 16 | out of memory | | | | | |" in gpu.table_of(outcomes, {})
    assert "Best batch: 8, 80 images/s." in gpu.findings_of(outcomes)


def test_when_the_time_is_spent_the_rest_is_not_measured():
    machine = Machine()
    outcomes = measure_rows(rows_for(8, baseline=True), machine, time.monotonic(), say=silent)
    assert machine.ran == []
    assert "not measured: the time was spent" in {o.words for o in outcomes}
    assert not [o for o in outcomes if o.ran]
    assert gpu.findings_of(outcomes)[0].endswith("not measured: the time was spent.")


def test_the_rows_differ_in_name():
    names = [row.name for row in rows_for(8, baseline=True)]
    assert len(set(names)) == len(names)
    assert {"bf16, 2 GPUs", "bf16, 8 GPUs", "bf16, baseline"} <= {*names}
    assert not [row.name for row in rows_for() if row.processes > 1 or row.runner == "baseline"]


@pytest.mark.long
def test_two_ranks_beside_one(tiny_sd, tmp_path):
    setting = prepare(tiny_sd, tmp_path, resolution=32, rank=2)
    sentence = gpu.compare_ranks(setting, time.monotonic() + 300, steps=3, precision="no")
    assert "3 steps in no: the losses differ by at most" in sentence
    assert float(sentence.split("at most ")[1].split()[0]) < 1e-4


@pytest.mark.gpu
@needs_cuda
def test_a_row_on_a_gpu(tmp_path):
    setting = prepare(ROOT / "models" / "mini-sd", tmp_path, resolution=64, rank=4, bare_unet=True)
    for runner in ("ours", "bare UNet"):
        (outcome,) = measure_rows([Row("a", runner=runner)], setting, time.monotonic() + 300, steps=8, say=silent)
        assert outcome.ran is not None, outcome.words
        assert len(outcome.ran.told["step_seconds"]) == 7
        assert 0 < outcome.ran.memory_gib <= outcome.ran.peak_memory_gib

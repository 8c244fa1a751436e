"""Tests how the benchmarks measure inside a process: times and operators of steps, and the UNet alone."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks import bare_unet, inside


def test_the_median_leaves_out_the_first_fifth():
    assert inside.settled_median([100.0, 90.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]) == 4.5
    assert inside.settled_median([3.0]) == 3.0


def counted(work):
    counter = inside.Counter()
    with counter:
        work()
    counter.end_of_step()
    return counter.figures()


def test_floating_point_operations_are_those_that_pytorch_counts():
    conv, rows = torch.nn.Conv2d(3, 5, 3), torch.randn(2, 3, 8, 8, requires_grad=True)

    def work():
        conv(rows).flatten(1).matmul(torch.ones(180, 7)).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        work()
    assert counted(work)["flops"] == theirs.get_total_flops()


def test_operators_without_a_formula_in_pytorch_are_counted():
    """PyTorch has no formula for addition in place, which the lean forward pass uses, and for attention on a CPU."""
    out, a, b = torch.zeros(3, 4), torch.randn(3, 5), torch.randn(5, 4)
    assert counted(lambda: out.addmm_(a, b)) == {"operators": {"addmm_": 1}, "flops": 2 * 3 * 4 * 5}
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 16 * 16 * 8
    figures = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward())
    assert figures["flops"] == 2 * product + 5 * product


def test_views_and_the_loader_are_not_counted(monkeypatch):
    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    monkeypatch.setattr(iterator, "__next__", iterator.__next__)  # so that the original is restored after the test
    counter = inside.Counter()
    counter.leave_out_loading()
    with counter:
        for (batch,) in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(6, 2)), batch_size=2):
            (batch.t()[0] + 1).detach()
            counter.end_of_step()
    assert [step["operators"] for step in counter.steps[1:]] == [{"add": 1}] * 2  # the first step makes the iterator


def test_a_clock_without_two_steps_reports_an_error():
    clock = inside.Clock()
    clock.end_of_step()
    with pytest.raises(SystemExit, match="made 1 optimizer steps"):
        clock.figures()


def bare_steps(model, batch_size):
    """Returns a `Counter` and a `Clock` of three steps of the bare UNet."""
    words = ["--pretrained_model_name_or_path", str(model), "--resolution", "32", "--max_train_steps", "3"]
    words += ["--train_batch_size", str(batch_size), "--rank", "4", "--report_to", "none"]  # the last two are ignored
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
    assert (len(counter.steps), len(clock.figures()["step_seconds"])) == (3, 2)
    figures = counter.figures()
    assert figures["operators"] == counter.steps[1]["operators"]
    assert figures["operators"]["convolution"] == figures["operators"]["convolution_backward"] > 10
    smaller = bare_steps(tiny_sd, 1)[0].figures()
    assert figures["flops"] == 3 * smaller["flops"]


def test_a_matrix_rate():
    assert 1e8 < inside.matrix_rate("fp32", torch.device("cpu"), side=256, repeats=4) < 1e14

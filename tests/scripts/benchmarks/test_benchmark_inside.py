"""What the benchmarks see from inside a process: steps that are timed and counted, and the UNet alone."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks import bare_unet, inside


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

"""No training step synchronizes with the device: reported values are read one step later."""

import pytest
import torch
from conftest import read_metrics
from torch.optim.optimizer import register_optimizer_step_post_hook

from scripts.benchmarks import inside


FLAGS = dict(max_train_steps=6, gradient_accumulation_steps=2, num_validation_images=0, checkpointing_steps=0)
OPTIONS = [
    {},
    dict(use_ema=True, snr_gamma=5.0, loss_type="huber", max_grad_norm=0.1),
    dict(mixed_precision="bf16", gradient_checkpointing=True, use_dora=True, lora_dropout=0.1),
    dict(perceptual_loss="self", timestep_sampling="logit_normal", loraplus_lr_ratio=4),
]
# Operators for which the host waits, because their output is a number, or because its size depends on the data.
WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "_unique2"}


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "weighted", "bf16 dora", "perceptual"])
def test_no_step_asks_for_a_number(train, monkeypatch, options):
    """Counts operators on a CPU in each step; the loader's random draws are made on the CPU ahead of the steps."""
    loader = torch.utils.data.dataloader._BaseDataLoaderIter
    monkeypatch.setattr(loader, "__next__", loader.__next__)  # so that the original is restored
    counter = inside.Counter()
    counter.leave_out_loading()
    hook = register_optimizer_step_post_hook(counter.end_of_step)
    try:
        with counter:
            out = train(**FLAGS | options)
    finally:
        hook.remove()
    assert len(counter.steps) == len(read_metrics(out)) == 6
    for step in counter.steps[1:]:  # the models are loaded before the first step
        waited_for = {name: step["operators"][name] for name in WAITING & step["operators"].keys()}
        # The reported values of the previous step are one tensor, which is read long after the device has computed it.
        assert waited_for == {}, waited_for


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch can tell waiting on a GPU alone")
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "weighted", "bf16 dora", "perceptual"])
def test_no_step_waits_for_the_gpu(train, options):
    """PyTorch raises an error at every synchronization between the second and the last but one step."""
    steps = []

    def watch(*_):
        steps.append(len(steps))
        torch.cuda.set_sync_debug_mode("error" if 2 <= len(steps) < 5 else "default")

    hook = register_optimizer_step_post_hook(watch)
    try:
        train(**FLAGS | options)
    finally:
        hook.remove()
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 6

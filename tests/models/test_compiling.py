"""Compiled steps equal the plain steps up to rounding, and only whole steps are compiled."""

import pytest
import torch
from conftest import read_metrics

from text_to_image_lora.errors import InputError
from text_to_image_lora.models import compiling


# PyTorch's compiler uses features that PyTorch deprecates (torch.jit, objects of autograd.Function).
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def compiled_without_kernels(monkeypatch):
    """Makes the compiler trace functions and leave the computation to PyTorch, which takes seconds instead of minutes."""
    monkeypatch.setattr(compiling, "OPTIONS", dict.fromkeys(compiling.OPTIONS, {"backend": "aot_eager"}))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


FLAGS = dict(train_batch_size=4, max_train_steps=6, num_validation_images=1, validation_prompt="a red axe", rank=2)


@pytest.mark.parametrize("how", ["blocks", "full"])
def test_steps_are_traced_whole_and_stay_what_they_were(train, tmp_path, compiled_without_kernels, how):
    """Six pictures in batches of four: every second batch is not full, and is not compiled."""
    plain = [row["train_loss"] for row in read_metrics(train(**FLAGS, output_dir=tmp_path / "plain"))]
    found = [row["train_loss"] for row in read_metrics(train(**FLAGS, compile=how))]
    assert found == pytest.approx(plain, rel=1e-4)
    assert not compiled_without_kernels["graph_break"]
    graphs = compiled_without_kernels["stats"]["unique_graphs"]
    assert 0 < graphs <= 3  # each kind of block, or the UNet, is compiled once, in the trial, and reused by the steps


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (dict(compile="graphs"), "--compile graphs needs a CUDA GPU. Use --compile blocks or full."),
        (dict(compile="full", perceptual_loss="self"), "--perceptual_loss self can't be combined with --compile"),
    ],
)
def test_what_does_not_go_together_is_refused(train, flags, answer):
    with pytest.raises(InputError, match=answer):
        train(**flags)


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "changes"), [("full", {}), ("blocks", dict(gradient_checkpointing=True, mixed_precision="bf16"))]
)
def test_compiled_for_this_machine(train, tmp_path, how, changes):
    """Twenty steps with the kernels of the compiler."""
    flags = FLAGS | changes | dict(max_train_steps=20)
    plain = read_metrics(train(**flags, output_dir=tmp_path / "plain"))
    found = read_metrics(train(**flags, compile=how, output_dir=tmp_path / how))
    # In bf16, fused kernels round at other places; single norms differed by up to 16%, their mean by less than 2%.
    bounds = {"train_loss": (1e-4, 1e-4), "grad_norm": (1e-3, 1e-3)}
    if changes:
        bounds = {"train_loss": (0.01, 0.01), "grad_norm": (0.3, 0.03)}
    for name, (each, mean) in bounds.items():
        expected, got = ([row[name] for row in rows] for rows in (plain, found))
        assert got == pytest.approx(expected, rel=each)
        assert sum(got) == pytest.approx(sum(expected), rel=mean)

"""The real geometry of Stable Diffusion v1.5 with random weights."""

import pytest
from conftest import read_lora, read_metrics, run_command, write_pictures


RANK = 16
# A transformer block of width d has 8 attention layers (two of them with 768 inputs) and 2 feed-forward layers.
PARAMETERS = RANK * sum(blocks * (28 * width + 2 * 768) for width, blocks in ((320, 5), (640, 5), (1280, 6)))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """Saves a pipeline with SD1.5's configuration and random weights: 2 GB in float16."""
    from scripts.benchmarks.runs import make_sd15

    return make_sd15(tmp_path_factory.mktemp("sd15") / "model")


@pytest.mark.long
def test_two_steps_at_sd15_size(sd15, arguments, tmp_path):
    words = arguments(
        pretrained_model_name_or_path=sd15, train_data_dir=write_pictures(tmp_path / "set", count=2, size=(300, 256)),
        resolution=256, train_batch_size=1, mixed_precision="bf16", rank=RANK, center_crop=True, learning_rate=1e-4,
    )  # fmt: skip
    done = run_command(words, timeout=900)
    assert done.returncode == 0, done.stderr
    assert f"LoRA on 160 modules ({PARAMETERS:,} parameters)" in done.stdout
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == [1, 2]
    tensors = read_lora(tmp_path / "out")
    assert len(tensors) == 320
    assert sum(t.numel() for t in tensors.values()) == PARAMETERS
    size = (tmp_path / "out" / "pytorch_lora_weights.safetensors").stat().st_size
    assert 4 * PARAMETERS < size < 4 * PARAMETERS + 200_000  # float32 and the header
    assert all(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name), "a module did not train"

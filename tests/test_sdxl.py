"""The real geometry of Stable Diffusion XL with random weights, for one step."""

import psutil
import pytest
from conftest import read_lora, read_metrics, run_command, write_pictures
from family_fixtures import tokenizers_of, true_xl


RANK, NEEDED = 16, 18  # GiB


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """Saves a pipeline with XL's configuration and random weights: 7 GB in bfloat16."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    if psutil.virtual_memory().available < NEEDED * 2**30:
        pytest.skip(f"less than {NEEDED} GiB of memory are free")
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    models = true_xl()
    for model in models.values():
        model.to(torch.bfloat16).to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.fill_(float(name.endswith("weight")))
            else:
                parameter.data.normal_(std=0.02)
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))
            assert "position_ids" in name
    schedule = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    first, second = tokenizers_of(folder)
    StableDiffusionXLPipeline(
        **models, tokenizer=first, tokenizer_2=second, scheduler=EulerDiscreteScheduler(**schedule), add_watermarker=False
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"


@pytest.mark.long
def test_a_step_at_sdxl_size(sdxl, arguments, tmp_path):
    words = arguments(
        pretrained_model_name_or_path=sdxl, train_data_dir=write_pictures(tmp_path / "set", count=1, size=(600, 512)),
        resolution=512, train_batch_size=1, max_train_steps=1, mixed_precision="bf16", rank=RANK, center_crop=True,
        learning_rate=1e-4, output_kohya_format=True, checkpointing_steps=0, gradient_checkpointing=True,
        num_cpu_threads=None,
    )  # fmt: skip
    done = run_command(words, timeout=1800, env={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert "LoRA on 700 modules (41,861,120 parameters)" in done.stdout
    assert "700 of 700 LoRA modules read back correctly from the diffusers file and from the kohya file" in done.stdout
    (row,) = read_metrics(tmp_path / "out")
    assert 0 < row["train_loss"] < 10
    assert row["peak_memory_gib"] < NEEDED
    tensors = read_lora(tmp_path / "out")
    assert len(tensors) == 1400
    assert all(value.abs().max() > 0 for name, value in tensors.items() if "lora_B" in name), "a module did not train"
    print(f"peak memory {row['peak_memory_gib']:.1f} GiB, loss {row['train_loss']:.3f}")

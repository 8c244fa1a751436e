"""Utilities for any model in memory: eval mode, precision, device, and hashes of its weights."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any


def dtype_of(precision: str) -> Any:
    """Returns the dtype of the frozen base model for a mixed precision of Accelerate."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def non_finite(tensors: Iterable[tuple[str, Any]]) -> str:
    """Describes which of the named tensors contain NaN or infinities, for messages; "" if none of them does."""

    def is_finite(value):
        if not value.is_floating_point() or value.numel() == 0:
            return True
        value = value.float() if value.itemsize == 1 else value  # float8 has no minimum
        # NaN propagates; this takes a fiftieth of the time of `isfinite` on all values.
        return all(bound.isfinite().item() for bound in value.detach().aminmax())

    found = [name for name, value in tensors if not is_finite(value)]
    if not found:
        return ""
    return f"{len(found)} of its tensors {'is' if len(found) == 1 else 'are'} not finite, the first: {found[0]}"


def check_weights(name: str, model: Any) -> None:
    """Raises `ValueError` if weights of a loaded model are missing, no floating-point numbers, or NaN or infinite.

    diffusers only logs that weights are missing, and leaves them without data.
    """
    missing = [key for key, value in model.named_parameters() if value.is_meta]
    if missing:
        raise ValueError(f"the {name} lacks {len(missing)} of its weights, the first: {missing[0]}")
    if odd := [key for key, value in model.named_parameters() if not value.is_floating_point()]:
        raise ValueError(f"{len(odd)} weights of the {name} are no floating-point numbers, the first: {odd[0]}")
    if faults := non_finite(model.named_parameters()):
        raise ValueError(f"the {name} is damaged: {faults}")


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switches a model to eval mode inside the context, and restores its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def in_its_precision(model: Any) -> Iterator[None]:
    """Casts the first input of a model to the dtype of its weights inside the context.

    This is for pipelines, whose latents become float32 after a step if the model's output is float32.
    """
    dtype = next(model.parameters()).dtype

    def cast(_, inputs):
        return (inputs[0].to(dtype), *inputs[1:])

    handle = model.register_forward_pre_hook(cast)
    try:
        yield
    finally:
        handle.remove()


def place(model: Any, device: Any, dtype: Any, *, channels_last: bool = False) -> None:
    """Moves a model to a device and casts its frozen weights to `dtype`, with a single copy of each weight.

    No weight is mapped from a file afterwards, so the file may change. Trainable parameters keep their dtype. With
    `channels_last`, the weights of convolutions get that memory format.
    """
    import torch

    def move(tensor):
        if tensor.requires_grad or not tensor.is_floating_point():
            return tensor.to(device)
        order = torch.channels_last if channels_last and tensor.dim() == 4 else torch.preserve_format
        return tensor.to(device, dtype, memory_format=order, copy=True)

    model._apply(move)


def sample_identity(model: Any) -> str:
    """Returns a quick hash of the signs of about a thousand values of each weight.

    The hash does not depend on the precision, because rounding keeps signs, even those of values that become zero. A
    fine-tuned model has a different hash; a model whose weights are only scaled does not.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 1000)].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# Keys of configurations that do not change what a model computes in training: precision, initialization, sampling, labels.
NOT_COMPUTED = {
    "dtype", "torch_dtype", "force_upcast", "sample_size", "architectures", "model_type", "transformers_version", "id2label",
    "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder",
    "chunk_size_feed_forward", "initializer_range", "initializer_factor",
}  # fmt: skip
NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def settings_of(model: Any) -> dict[str, Any]:
    """Returns the settings of a model, or of a noise scheduler, that change what equal weights compute in training."""
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    plain = json.loads(json.dumps(dict(config), default=str))
    if "beta_schedule" in plain:
        return {key: plain.get(key) for key in NOISE_SCHEDULE}
    return {key: value for key, value in plain.items() if not key.startswith("_") and key not in NOT_COMPUTED}


def weights_identity(model: Any, dtype: Any = None) -> str:
    """Returns a hash of a model's configuration and weights, which are cast to `dtype` if it is given."""
    import torch

    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    config = {k: v for k, v in dict(config).items() if not k.startswith("_") and k not in ("transformers_version",)}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]

"""What can be done with any model in memory: eval mode for a while, and an identity of its weights."""

import contextlib
import hashlib
import json


def dtype_of(precision):
    """What the frozen base is in, in each of Accelerate's mixed precisions."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


@contextlib.contextmanager
def evaluating(model):
    """Eval mode inside, and the mode it had afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def in_its_precision(model):
    """Inside, the model takes its first input in the precision of its own weights, whatever it is handed in.

    For pipelines, whose latents are float32 after a step where the model's output is.
    """
    dtype = next(model.parameters()).dtype

    def cast(_, inputs):
        return (inputs[0].to(dtype), *inputs[1:])

    handle = model.register_forward_pre_hook(cast)
    try:
        yield
    finally:
        handle.remove()


def place(model, device, dtype, *, channels_last=False):
    """Brings a model to a device, its frozen weights in `dtype`, each by one copy from where it is: from a file's map too.

    No weight is mapped afterwards, so that the file may change. What is trained keeps its dtype. With `channels_last`
    the weights of convolutions come in that order.
    """
    import torch

    def placed(tensor):
        if tensor.requires_grad or not tensor.is_floating_point():
            return tensor.to(device)
        order = torch.channels_last if channels_last and tensor.dim() == 4 else torch.preserve_format
        return tensor.to(device, dtype, memory_format=order, copy=True)

    model._apply(placed)


def sample_identity(model):
    """A quick hash of a model's weights: of the signs of some thousand values of each tensor.

    The same in every precision that the model is loaded in, since rounding changes no sign, not even that of what becomes
    zero; a model that was tuned further has others, and only one that is scaled as a whole has not.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 1000)].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_identity(model, dtype=None):
    """A hash of a model's configuration and weights, in their own dtype or in `dtype`, wherever it was loaded from."""
    import torch

    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    config = {k: v for k, v in dict(config).items() if not k.startswith("_") and k not in ("transformers_version",)}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]

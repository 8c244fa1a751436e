"""`torch.compile` for training steps; validation and sample pictures run uncompiled.

Shapes are static: each picture size has its own graph, and a smaller batch, such as the last batch of an epoch, runs
uncompiled. A batch is larger, with a graph of its own, by the samples of --preservation. Compiled code is cached on disk for later runs.
"""

import os
import warnings
from pathlib import Path
from typing import Any


# The options of torch.compile for each choice of --compile. "blocks" compiles each class of transformer block once, "full"
# and "graphs" compile the whole denoiser; "graphs" also records it as CUDA graphs.
OPTIONS = {"blocks": {}, "full": {}, "graphs": {"mode": "reduce-overhead"}}


def compile_steps(denoiser: Any, how: str, batch_size: int, folder: str | Path) -> None:
    """Compiles the forward passes of a denoiser that have gradients and at least `batch_size` samples.

    Must be called before DDP or Accelerate wrap the denoiser. `folder` is the cache of the compiler.
    """
    import torch._dynamo

    # Harmless warnings while tracing: the compiler reads every attribute of the weights, and traces into diffusers'
    # cached check of PyTorch's version.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
    warnings.filterwarnings("ignore", r"Dynamo detected a call to a `functools.lru_cache`", UserWarning)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # There is a graph for each picture size and block width; beyond this limit, torch would silently run uncompiled.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    names = getattr(denoiser, "_repeated_blocks", None) or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    for part in blocks if how == "blocks" and blocks else [denoiser]:
        part.forward = _for_full_batches(part.forward, batch_size, OPTIONS[how])


def _for_full_batches(forward, batch_size, options):
    import torch

    compiled = torch.compile(forward, dynamic=False, **options)

    def choose(hidden_states, *others, **named):
        trains = torch.is_grad_enabled() and len(hidden_states) >= batch_size
        return (compiled if trains else forward)(hidden_states, *others, **named)

    return choose

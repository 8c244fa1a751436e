"""`torch.compile` for training steps; validation and sample pictures run as they are.

Shapes are static: each size of pictures has a graph of its own, and a batch that is not full, as the last of an epoch may
be, is computed without. What was compiled is kept on disk for later runs.
"""

import os
import warnings


# How --compile says it: the options of torch.compile. "blocks" compiles each kind of transformer block once, the others the
# whole denoiser; "graphs" replays each of its graphs by a single launch (CUDA graphs).
OPTIONS = {"blocks": {}, "full": {}, "graphs": {"mode": "reduce-overhead"}}


def compile_steps(denoiser, how, batch_size, folder):
    """From now on, forward passes with gradients of `batch_size` samples are compiled; `folder` is the compiler's cache.

    Call it before DDP or Accelerate wrap the denoiser.
    """
    import torch._dynamo

    # What the compiler makes PyTorch warn of: it looks at every attribute of the layers' weights, and traces into
    # diffusers' look at the version of PyTorch.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
    warnings.filterwarnings("ignore", r"Dynamo detected a call to a `functools.lru_cache`", UserWarning)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # A graph for each size and each width of a block; beyond the limit torch would run the rest uncompiled, in silence.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    repeated = getattr(denoiser, "_repeated_blocks", None) or () if how == "blocks" else ()
    parts = [module for module in denoiser.modules() if type(module).__name__ in repeated] or [denoiser]
    for part in parts:
        part.forward = _for_full_batches(part.forward, batch_size, OPTIONS[how])


def _for_full_batches(forward, batch_size, options):
    import torch

    compiled = torch.compile(forward, dynamic=False, **options)

    def choose(hidden_states, *others, **named):
        trains = torch.is_grad_enabled() and len(hidden_states) == batch_size
        return (compiled if trains else forward)(hidden_states, *others, **named)

    return choose

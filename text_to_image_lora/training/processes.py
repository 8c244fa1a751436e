"""What several processes must agree on, and the kernels that each of them uses."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import InputError


def broadcast_from_main(function: Callable[[], Any], accelerator: Any) -> Any:
    """Calls `function()` on the main process and returns its result, or raises its `InputError`, on every process."""
    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer = [function(), None]
        except InputError as error:
            answer = [None, str(error)]
    result, refused = broadcast_object_list(answer)
    if refused is not None:
        raise InputError(refused)
    return result


@contextlib.contextmanager
def no_sync(accelerator: Any, models: list, *, unless: bool) -> Iterator[None]:
    """Disables gradient synchronization of the models, `unless` this is the last backward pass of the step."""
    with contextlib.ExitStack() as stack:
        for model in [] if unless else models:
            stack.enter_context(accelerator.no_sync(model))
        yield


def check_equal_everywhere(values: dict[str, Any]) -> None:
    """Raises `InputError` on every process if a process has other values than process 0, and names those that differ."""
    gathered = gather_object([values])
    for rank, found in enumerate(gathered):
        names = gathered[0].keys() | found.keys()
        differ = sorted(name for name in names if gathered[0].get(name) != found.get(name))
        if differ:
            raise InputError(
                f"Process {rank} and process 0 have different settings or pictures: {', '.join(differ)}. Run the same "
                "command with the same pictures on all machines."
            )


def use_deterministic_kernels(enabled: bool) -> None:
    """Selects kernels that return equal bits each time, or else the fastest. Must be called before a GPU is used.

    See https://docs.pytorch.org/docs/stable/notes/randomness.html. Plain attention is the only implementation with a
    deterministic backward pass everywhere.
    """
    if enabled:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(enabled)
    cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False  # it helps to find bugs and costs time
    torch.backends.cudnn.deterministic = enabled
    for name in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(not enabled)


def describe_device(device: torch.device) -> str:
    """Returns the device as logs show it: "cuda", "cpu (2 threads)"."""
    if device.type != "cpu":
        return device.type
    return f"cpu ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''})"


def emulates_bf16(device: torch.device) -> bool:
    """Whether a GPU reports support for bf16 but emulates it, as a T4 does."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)

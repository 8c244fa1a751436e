"""What several processes must agree on, and how each computes."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import InputError


def as_main_says(find, accelerator):
    """What `find()` gives on the main process, on every process; an `InputError` of it is one on all of them."""
    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer = [find(), None]
        except InputError as error:
            answer = [None, str(error)]
    found, refused = broadcast_object_list(answer)
    if refused is not None:
        raise InputError(refused)
    return found


@contextlib.contextmanager
def no_sync(accelerator: Any, models: list, *, unless: bool) -> Iterator[None]:
    """Inside, the processes don't share the models' gradients, unless it is the last backward pass of a step."""
    with contextlib.ExitStack() as stack:
        for model in [] if unless else models:
            stack.enter_context(accelerator.no_sync(model))
        yield


def check_alike(values):
    """Raises `InputError` on every process where they don't all have the same dict, and names what differs."""
    of_all = gather_object([values])
    for rank, others in enumerate(of_all):
        differ = sorted(name for name in of_all[0].keys() | others.keys() if of_all[0].get(name) != others.get(name))
        if differ:
            raise InputError(
                f"process {rank} is to train something else than process 0: {', '.join(differ)}. Give all the same "
                "command and the same pictures."
            )


def be_deterministic(wanted):
    """Kernels that give the same bits each time, or those that are fastest; to be called before a GPU is used.

    https://docs.pytorch.org/docs/stable/notes/randomness.html; of the attentions only the plain one has such a backward
    everywhere.
    """
    if wanted:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which finds faults and costs time
    torch.backends.cudnn.deterministic = wanted
    for enable in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(not wanted)


def in_words(device):
    """The device for people: "cuda", "cpu (2 threads)"."""
    if device.type != "cpu":
        return device.type
    return f"cpu ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''})"


def emulates_bf16(device):
    """Whether a GPU says that it has bf16 and emulates it, as a T4 does."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)

"""What goes wrong in a way that the user can act on, told in one line."""


class InputError(Exception):
    """Bad input: one sentence with the remedy, which the scripts print on stderr before they exit with code 2."""


class TrainingError(Exception):
    """A run that can't go on: one sentence with the remedy; the scripts print it and exit with code 1."""


def is_out_of_memory(error):
    """Whether an exception says that memory is used up: the device's or the machine's, whichever library raised it."""
    # CUDA and MPS, cuBLAS and cuDNN, PyTorch's allocator for the CPU on Linux and on Windows.
    said = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in str(error) for s in said))

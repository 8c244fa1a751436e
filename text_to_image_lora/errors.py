"""What goes wrong in a way that the user can act on, told in one line, and the exit code that goes with it."""


class InputError(Exception):
    """Bad input: one sentence with the remedy, which the scripts print on stderr before they exit with its code."""

    exit_code = 2


class TrainingError(Exception):
    """A run that can't go on: one sentence with the remedy."""

    exit_code = 1


class NotANumberError(TrainingError):
    """Loss, gradient or weights are not numbers any more."""

    exit_code = 3


class Stopped(BaseException):
    """A run that was asked to stop before its end, for a reason, and where it did: run again, it goes on.

    No `Exception`: what a library does about its own errors doesn't keep it from stopping.
    """

    def __init__(self, reason, exit_code, where):
        super().__init__(reason, exit_code, where)
        self.reason, self.exit_code, self.where = reason, exit_code, where

    def __str__(self):
        return f"{self.reason}: stopped {self.where}. Run the same command again to go on."


def is_out_of_memory(error):
    """Whether an exception says that memory is used up: the device's or the machine's, whichever library raised it."""
    # CUDA and MPS, cuBLAS and cuDNN, PyTorch's allocator for the CPU on Linux and on Windows.
    said = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in str(error) for s in said))


def is_dead_worker(error):
    """Whether an exception says that a process which loads data is no more."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)

"""What goes wrong in a way that the user can act on, told in one line."""


class InputError(Exception):
    """Bad input: one sentence with the remedy, which the scripts print on stderr before they exit with code 2."""


class TrainingError(Exception):
    """A run that can't go on: one sentence with the remedy; the scripts print it and exit with code 1."""


def is_out_of_memory(error):
    """Whether an exception says that memory is used up: the device's or the machine's, whichever library raised it."""
    # By name, so that torch need not be imported to ask.
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)

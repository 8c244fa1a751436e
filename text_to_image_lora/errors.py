"""What goes wrong in a way that the user can act on, told in one line."""


class InputError(Exception):
    """Bad input: one sentence with the remedy, which the scripts print on stderr before they exit with code 2."""


class TrainingError(Exception):
    """A run that can't go on: one sentence with the remedy; the scripts print it and exit with code 1."""

"""The parts of compare_checkouts.py: the commands that are run, their inputs, how their results are read, and how two results are compared."""

"""The parts of compare_checkouts.py: it runs commands, makes their inputs, reads their results, and compares two results."""

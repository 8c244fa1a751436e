"""The parts of compare_checkouts.py: what is run in each checkout, what is read of it, and how that is compared."""

"""The modules of `evaluate.py`."""

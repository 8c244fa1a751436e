"""The modules of `sweep.py`."""

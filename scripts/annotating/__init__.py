"""What caption.py and mask.py have in common: a model writes something beside each picture of a folder."""

"""The project's scripts: a command a file, and a folder for the parts of each of the larger ones."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]

"""What the libraries load and say while they are imported."""

import contextlib
import logging
import os
import sys
import warnings


def quiet_libraries():
    """Keeps the libraries' import-time advice off the terminal: none of it is about the user's run."""
    # diffusers 0.39 passes it to huggingface_hub 1.x, which doesn't know it any more.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns when a loader's worker is forked
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("xformers", "bitsandbytes", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def hidden(*names):
    """Inside, these modules can't be found; afterwards they can, and who imports them gets them.

    diffusers and peft import bitsandbytes and xformers wherever they are installed, which takes a second and 44 MB.
    Those that are imported already stay in sight.
    """
    names = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]

"""The workshop of the small base: it is drawn, made and measured here, by commands such as `python -m scripts.mini_sd.make`."""

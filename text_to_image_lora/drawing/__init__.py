"""Pictures from prompts: for `infer.py`, for the sample pictures of a training run, and for evaluation."""

"""Models: families, loading, prompts, the LoRA and its file formats."""

"""What is trained: model families, loading, prompts, LoRA and its file."""

"""The parts of `train_text_to_image_lora.py`, in four rooms; each uses only the rooms below it (CONTRIBUTING.md)."""

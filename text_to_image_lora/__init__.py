"""The parts of `train_text_to_image_lora.py`: flat files, each importing only from the floors below it."""

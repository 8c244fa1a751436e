"""What a run tells: validation losses, sample pictures, metrics, trackers, the model card."""

"""Reports on a run: validation losses, sample pictures, metrics, trackers, the report page and the model card."""

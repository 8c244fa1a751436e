"""What a training step needs: batches, draws, the cache, the objective, optimizers, checkpoints."""

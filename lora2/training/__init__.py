"""Training: batches, steps, optimizer, loop."""

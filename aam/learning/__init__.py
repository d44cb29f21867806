"""What a run learns, and how: objectives, steps, batches by memory, ranks, checkpoints."""

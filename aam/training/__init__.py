"""Training: objectives, loop, checkpoints and the numbers that judge them."""

"""What a model says, and how good that is beside simple methods."""

"""The training loop, its step, its objective, roll back and saving."""

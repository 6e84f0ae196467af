"""The training loop, its step, its objective, the update, roll back and saving."""
